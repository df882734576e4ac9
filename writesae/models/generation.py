"""What `generate` itself says of the calls it makes: which rows it has stopped, which stream a call belongs to.

Nothing is guessed from tokens. `generate` asks its stopping criteria after every token, whatever they are (end tokens,
strings, time, a user's own), and its logits processors before it; both lists are listened to while it runs.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn


class _Local(threading.local):
    def __init__(self):
        self.running: list[Generation] = []


_local = _Local()


class Generation:
    """One `generate` in progress on one thread.

    Attributes:
        model: whose `generate` it is.
        processing: logits processors are at work, so a call of the model now belongs to them (classifier-free guidance
            runs a second text beside the first).
        rows: rows of the text itself, once known.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.processing = False
        self.rows: int | None = None
        self._finished: Tensor | None = None  # [rows] bool, as of the last token chosen
        self._padded: Tensor | None = None  # [rows] bool, of that token itself
        self._ends = False  # whether rows that are finished get pads
        self._fed = {False: 0, True: 0}  # columns of each stream that have been recorded

    def heard(self, criteria, result) -> None:
        """The stopping criteria have answered for the token just chosen."""
        if not isinstance(result, Tensor) or result.ndim != 1 or len(result) != self.rows:
            return  # beam search asks about candidates, not about the rows it feeds
        before = torch.zeros_like(result) if self._finished is None else self._finished
        self._ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._padded, self._finished = before, before | result

    def ended(self) -> Tensor | None:
        """`[rows]` bool: rows whose latest token is a pad that `generate` put, or that it chose past the end."""
        if self._finished is None or self._padded is None or self.processing:
            return None
        everything = self._finished.all()
        return self._padded | everything if self._ends else everything.expand_as(self._padded)

    def repeated(self, start: int, T: int) -> int:
        """How many of T columns from `start` on have been fed before (without a cache, all but the latest)."""
        return min(max(self._fed[self.processing] - start, 0), T)

    def recorded(self, stop: int) -> None:
        """A call up to column `stop` has come to its end."""
        self._fed[self.processing] = max(self._fed[self.processing], stop)


def running(models) -> Generation | None:
    """The innermost `generate` in progress on this thread, if it is one of these modules'."""
    found = _local.running[-1] if _local.running else None
    return found if found is not None and any(found.model is m for m in models) else None


def generate_body(entry, call, args, kwargs):
    """Runs a `generate` and knows of it until it returns."""
    depth = len(_local.running)
    try:
        try:
            _local.running.append(Generation(entry.module))
            return call(*args, **kwargs)
        finally:
            del _local.running[depth:]
    finally:  # again, should an interrupt have hit the line above
        del _local.running[depth:]


def listen_to_criteria(original):
    """Stands in for `StoppingCriteriaList.__call__`."""

    def __call__(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if _local.running:
            _local.running[-1].heard(self, result)
        return result

    return __call__


def listen_to_processors(original):
    """Stands in for `LogitsProcessorList.__call__`."""

    def __call__(self, *args, **kwargs):
        generation = _local.running[-1] if _local.running else None
        if generation is None:
            return original(self, *args, **kwargs)
        try:
            generation.processing = True
            return original(self, *args, **kwargs)
        finally:
            generation.processing = False

    return __call__
