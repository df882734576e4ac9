"""Running a model only as far as is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from . import hf_gated_delta


class Stopped(Exception):
    """The last layer wanted has run."""


@contextmanager
def stopping_after(model: nn.Module, layer: int) -> Iterator[None]:
    """Ends each forward pass before the decoder block above `layer`: nothing there can change what it wrote.

    Inside it a forward pass raises `Stopped`, for the caller to suppress; where `layer` is the last, it just ends.

    Raises:
        ValueError: a layer the model does not have.
    """
    blocks = {site.layer_index: site.block for site in hf_gated_delta.layers(model)}
    if layer not in blocks:
        raise ValueError(f"layer: expected one of {sorted(blocks)}, got {layer}")
    block = blocks[layer]
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and any(x is block for x in m))
    above = list(stack)[[x is block for x in stack].index(True) + 1 :]

    def stop(module, args):
        raise Stopped

    handle = above[0].register_forward_pre_hook(stop) if above else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
