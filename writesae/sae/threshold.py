"""The threshold of a BatchTopK dictionary from states: what its training estimates, where a file does not hold it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..untrusted import is_integer, shown
from .block import Block
from .sae import SAE

_PART = 512  # states encoded at a time, at most
_VALUES = 2**22  # of their pre-activations or entries
_WIDTHS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def estimate_threshold(
    sae: SAE, states: Block | Tensor | Sequence[Block | Tensor], number: int | None = None, seed: int = 0
) -> SAE:
    """A copy of a dictionary that fires over one threshold: that over which k atoms a state fire on average.

    Over the states given it fires as the publisher's BatchTopK does with all of them in one batch. However many they
    are, they are encoded a part at a time, some times over.

        sae = SAE.from_pretrained(folder, batchtopk="topk")
        with ModelStream(model, passages, [(layer, head)]) as stream:
            block = Block([part[layer] for part in stream.writes(rows)], head)
        sae = estimate_threshold(sae, block)

    Args:
        sae: of sparsity "topk", or with one threshold for all atoms.
        states: a `Block` of passages, states `[..., K, V]`, or several of either, of text like that in training.
        number: how many states to use, drawn at random; default all of them.
        seed: of the draw.

    Returns:
        A dictionary of sparsity "threshold", without the metrics of the other. How many states there were is kept in
        its `training_record["published"]["batchtopk"]`, of one that was not published in `["threshold"]`.

    Raises:
        ValueError: a threshold for each atom (JumpReLU, Gated), no states, states of another size, or ones whose
            pre-activations are not finite.
    """
    if sae.sparsity == "pursuit":
        raise ValueError("sae: expected top k or one threshold for all atoms, got pursuit")
    if sae.threshold is not None and bool((sae.threshold != sae.threshold[0]).any()):
        raise ValueError("sae: expected top k or one threshold for all atoms, got a threshold for each")
    if number is not None and not is_integer(number, 1):
        raise ValueError(f"number: expected an integer >= 1, got {shown(number)}")
    sources: list = list(states) if isinstance(states, (list, tuple)) else [states]
    for x in sources:
        shape = tuple(getattr(x, "shape", ()))
        if not isinstance(x, (Block, Tensor)) or len(shape) < 3 or shape[-2:] != (sae.K, sae.V):
            got = f"shape {shape}" if isinstance(x, (Block, Tensor)) else shown(x)
            raise ValueError(f"states: expected a Block or states [..., K={sae.K}, V={sae.V}], got {got}")
    if other := next((x.target for x in sources if isinstance(x, Block) and x.target != sae.target), None):
        raise ValueError(f"states: expected a Block of {sae.target}s, as the dictionary is, got one of {other}s")
    sizes = [math.prod(x.shape[:-2]) for x in sources]
    total = sum(sizes)
    if not total:
        raise ValueError("states: expected at least one, got none")
    order = torch.arange(total)
    if number is not None and number < total:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:number].sort().values
    part = max(1, min(_PART, _VALUES // max(sae.F, sae.K * sae.V)))

    def preactivations() -> Iterator[Tensor]:
        first = 0
        for x, size in zip(sources, sizes, strict=True):
            mine = order[(order >= first) & (order < first + size)] - first
            first += size
            for at in mine.to(x.device).split(part) if len(mine) else ():
                X = x.flatten(0, -3)[at] if isinstance(x, Tensor) else x.examples(at // x.shape[1], at % x.shape[1])
                pre = sae.preactivations(X.to(sae.b_enc.device))
                if not bool(torch.isfinite(pre).all()):
                    raise ValueError("states: expected finite pre-activations, got a NaN or infinity")
                yield pre

    level = nth_largest(preactivations, sae.k * len(order))
    # Codes are those over the threshold, and the level itself is one of the k P: the next smaller number. Where fewer
    # than k P are positive, all of these fire.
    level = (level.view(_WIDTHS[level.element_size()]) - 1).clamp_min(0).view(level.dtype)
    out = copy.deepcopy(sae)
    out.sparsity, out.metrics = "threshold", {}
    out.threshold = level.expand(sae.F).clone()
    record, how = out.training_record, f"threshold estimated from {len(order):,} states"
    if isinstance(record.get("published"), dict):
        record["published"]["batchtopk"] = how
    else:
        record["threshold"] = how
    return out


def nth_largest(parts: Callable[[], Iterator[Tensor]], n: int) -> Tensor:
    """The n-th largest of floating tensors, a scalar; 0 if it is not positive. Exact, in the memory of one part.

    Positive numbers are ordered as their bits, so that each pass over the parts settles 16 bits: it counts how many
    numbers, of those that begin as the result does, have which next 16 bits.
    """
    first = next(parts())
    width = _WIDTHS[first.element_size()]
    found = 0
    for shift in range(8 * first.element_size() - 16, -1, -16):
        counts = torch.zeros(2**16, dtype=torch.int64)
        for x in parts():
            bits = torch.where(x > 0, x, 0).flatten().view(width).to(torch.int64) >> shift
            counts += (bits[bits >> 16 == found] & 0xFFFF).bincount(minlength=2**16).cpu()
        over = counts.flip(0).cumsum(0)  # how many have these 16 bits or larger ones
        step = int((over < n).sum())
        if step == 2**16:
            raise RuntimeError("numbers that two passes over them must find alike were not")
        n -= int(over[step - 1]) if step else 0
        found = found << 16 | 2**16 - 1 - step
    return torch.tensor(found, dtype=width, device=first.device).view(first.dtype)
