"""Autocast must not reach sums that are float32 by contract: states, activations, losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch

_F = TypeVar("_F", bound=Callable)


def without_autocast(function: _F) -> _F:
    """Within the function autocast is off: operands stay in the dtypes they came in."""

    @wraps(function)
    def call(*args, **kwargs):
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            if not torch.is_autocast_enabled("cuda"):
                return function(*args, **kwargs)
            with torch.autocast("cuda", enabled=False):
                return function(*args, **kwargs)

    return call  # type: ignore[return-value]
