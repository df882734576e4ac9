"""How a long run is interrupted: the first Ctrl-C finishes the part in hand, the second stops at once.

A part is what a run keeps as a whole (a shard, a training step, a batch of passages, a case), so that after the first
one nothing is lost. `writesae` then ends with exit status 130 and says how to go on.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm

INTERRUPTED = 130  # exit status
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the latter is what batch systems and service managers send first


class Stop:
    """Whether a stop was asked for: true from then on."""

    def __init__(self) -> None:
        self.asked = False

    def __bool__(self) -> bool:
        return self.asked

    def check(self) -> None:
        """Called where a part is done and kept; raises KeyboardInterrupt if a stop was asked for."""
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def finishing(part: str, kept: bool = True) -> Iterator[Stop]:
    """Within it, the first SIGINT or SIGTERM is only noted, and told; the next raises KeyboardInterrupt at once.

    Off the main thread, where Python takes no signals, nothing is changed.

    Args:
        part: what is finished first, for the message: "shard".
        kept: whether finished parts are kept at all. If not, nothing is changed either.
    """
    stop = Stop()
    if not kept or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number, frame) -> None:
        stop.check()
        stop.asked = True
        with suppress(OSError, RuntimeError):  # a closed terminal; a signal that came in the midst of printing
            tqdm.write(f"stopping after this {part}; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def script(main: Callable[[], object]) -> None:
    """Runs a script's `main`; interrupted, it ends as `writesae` does. For scripts that go on where they were."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was", file=sys.stderr)
        sys.exit(INTERRUPTED)


@contextmanager
def held() -> Iterator[None]:
    """Holds the signals back, also from a process started within it, for as long as that lives: what one of them means
    is the parent's to say, and a terminal sends it to both."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
