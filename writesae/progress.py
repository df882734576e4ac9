"""The progress bar of all long work: tqdm's, as wide as the terminal; in a log a line now and then.

Whoever shows progress takes `tqdm` from here, with its own arguments.
"""

from __future__ import annotations

from typing import Any

from tqdm import tqdm as _tqdm

_LOG_SECONDS = 30.0  # between two lines of a log


class tqdm(_tqdm):
    """`tqdm.tqdm` that writes no carriage returns where there is no terminal."""

    def __init__(self, *args: Any, **options: Any) -> None:
        file = options.get("file")
        self._drawn = _is_terminal(file)
        options.setdefault("dynamic_ncols", self._drawn)
        if not self._drawn:
            options.setdefault("mininterval", _LOG_SECONDS)
            options.setdefault("maxinterval", 2 * _LOG_SECONDS)
        super().__init__(*args, **options)

    @staticmethod
    def status_printer(file):
        """What puts a state of the bar on its file."""
        if _is_terminal(file):
            return _tqdm.status_printer(file)

        def line(text: str) -> None:
            if text.strip():
                file.write(text.strip() + "\n")
                file.flush()

        return line

    def close(self) -> None:
        """Ends the bar; of one that stays, its last state is shown."""
        if self._drawn or getattr(self, "disable", True):
            super().close()
            return
        if self.leave:
            self._ema_dt = lambda: None  # so that the rate is that of the whole
            self.display(pos=0)
        self.disable = True
        self._decr_instances(self)


def _is_terminal(file) -> bool:
    import sys

    file = sys.stderr if file is None else file
    return bool(getattr(file, "isatty", lambda: False)())
