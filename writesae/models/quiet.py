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
from collections.abc import Iterator

FALSE_ALARMS = re.compile(r"is falling back to its reference PyTorch implementation|[Tt]he fast path is not available")

_NAME = "warning_once"  # of every logger, put there by transformers; ours stands in its place while a context is open
_OURS = "_writesae_instead_of"
# id of each open context -> its thread. No lock: an interrupt may come between taking one and the block that gives it
# back. Whoever changes something looks again afterwards, so that the last one to do so leaves things right.
_inside: dict[int, int] = {}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the context, this thread's calls do not log `FALSE_ALARMS`. Everything else is logged, other threads too;
    nothing of it is left after the last context."""
    context = _Context()
    try:
        context.open()
        yield
    finally:
        context.close()


class _Context:
    closed = False

    def open(self) -> None:
        _inside[id(self)] = threading.get_ident()
        _settle()

    def close(self) -> None:
        _inside.pop(id(self), None)
        _settle()
        self.closed = True

    def __del__(self):
        if not self.closed:  # an interrupt came between the lines above
            self.close()


def _settle() -> None:
    while (said := getattr(logging.Logger, _NAME, None)) is not None:  # None: no transformers here
        instead_of = getattr(said, _OURS, None)
        if bool(_inside) == (instead_of is not None):
            return
        setattr(logging.Logger, _NAME, instead_of or _silenced(said))


def _silenced(said):
    @functools.wraps(said)
    def warning_once(self, message, *args, **kwargs):
        return None if _is_false_alarm(message) else said(self, message, *args, **kwargs)

    setattr(warning_once, _OURS, said)
    return warning_once


def _is_false_alarm(message) -> bool:
    return bool(FALSE_ALARMS.search(str(message))) and threading.get_ident() in _inside.copy().values()
