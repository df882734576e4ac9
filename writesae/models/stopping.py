"""Running a model only as far as is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from . import patch
from .model_call import Stopped
from .sites import layers


def _stop(entry, call, args, kwargs):
    if entry.serving():
        raise Stopped
    return call(*args, **kwargs)


@contextmanager
def stopping_after(model: nn.Module, layer: int) -> Iterator[None]:
    """Ends each forward pass of this thread before the decoder block above `layer`: nothing there can change what it
    wrote.

    Inside it a forward pass raises `Stopped`, for the caller to suppress; where `layer` is the last, it just ends.

    Raises:
        ValueError: a layer the model does not have.
    """
    blocks = {site.layer_index: site.block for site in layers(model)}
    if layer not in blocks:
        raise ValueError(f"layer: expected one of {sorted(blocks)}, got {layer}")
    block = blocks[layer]
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and any(x is block for x in m))
    above = list(stack)[[x is block for x in stack].index(True) + 1 :]
    with patch.Owner(private=True) as owner, owner:
        with patch.lock:
            for module in above[:1]:
                owner.join(module, "forward", _stop, None)
        yield
