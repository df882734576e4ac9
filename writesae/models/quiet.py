"""`quiet`: false alarms of transformers, silent while our kernels do the work that they speak of.

transformers says once a process that a layer "is falling back ... much slower" (5.23 and later, when it first runs) or
that "the fast path is not available" (earlier, when it is made) where flash-linear-attention or causal-conv1d are
missing.
Once means that the message is remembered as said. So it is turned away before it is remembered, and a plain model that
later runs without us still says it; a logging filter would come too late for that.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import threading
import weakref
from collections.abc import Iterator

FALSE_ALARMS = re.compile(r"is falling back to its reference PyTorch implementation|[Tt]he fast path is not available")

_NAME = "warning_once"  # of every logger, put there by transformers; ours stands in its place while a context is open
_OURS = "_writesae_instead_of"
_lock = threading.Lock()
_inside: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # one _Token for each open context -> its thread


class _Token:
    pass


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the context, this thread's calls do not log `FALSE_ALARMS`. Everything else is logged, other threads too;
    nothing of it is left after the last context."""
    token = _Token()
    try:
        with _lock:
            _inside[token] = threading.get_ident()
            _install()
        yield
    finally:
        with _lock:
            _inside.pop(token, None)
            if not _inside:
                _remove()


def _install() -> None:
    said = getattr(logging.Logger, _NAME, None)
    if said is None or hasattr(said, _OURS):  # no transformers here, or quiet already
        return

    @functools.wraps(said)
    def warning_once(self, message, *args, **kwargs):
        if threading.get_ident() in _inside.values() and FALSE_ALARMS.search(str(message)):
            return None
        return said(self, message, *args, **kwargs)

    setattr(warning_once, _OURS, said)
    setattr(logging.Logger, _NAME, warning_once)


def _remove() -> None:
    said = getattr(getattr(logging.Logger, _NAME, None), _OURS, None)
    if said is not None:
        setattr(logging.Logger, _NAME, said)
