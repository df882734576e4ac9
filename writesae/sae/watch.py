"""What is seen of a dictionary while it trains: its FVU, L0 and dead atoms, and a cheap stand-in for the edit test."""

from __future__ import annotations

import torch
from torch import Tensor

from .block import Block
from .evaluate import codes_of
from .sae import SAE

_PART = 512  # states formed at a time
# Of a look: name in the history, and what it is.
LOOKS = {
    "held_out_fvu": "FVU of held-out states",
    "held_out_l0": "atoms active at a held-out state",
    "dead": "dead atoms",
    "beats_deletion": "share of writes at which the winning atom beats deletion",
}


@torch.no_grad()
def look(sae: SAE, block: Block, root: Tensor | None = None) -> dict[str, float]:
    """`held_out_fvu`, `held_out_l0` and `beats_deletion` of a dictionary on all tokens of a block of its target.

    `beats_deletion` is the share of writes N for which `a A`, the atom with the largest code, leaves less of the write
    than deleting it does, `|N - a A| < |N|`; a token where nothing fires is none of them. With the readers' root `[K,
    K]` (`readers.roots`) the norms are those that later queries see, `|R (N - a A)|`. A block with a root of its own,
    and a dictionary seen through it, need none. It foretells what `writesae replace` measures, at the price of a
    product a token: no more than a hint, as the model is not run.
    """
    N, T, K, V = block.shape
    order = torch.arange(N * T, device=block.device)
    root = None if root is None else root.to(block.right)
    total = torch.zeros(K, V, dtype=torch.float64, device=block.device)
    error = square = total.new_zeros(())
    active = better = writes = 0
    for part in order.split(_PART):
        rows, positions = part // T, part % T
        X, codes = block.examples(rows, positions), codes_of(sae, block, rows, positions)
        total += X.double().sum(0)
        square = square + X.double().square().sum()
        error = error + (sae.decode(codes) - X).double().square().sum()
        active += int((codes.values > 0).sum())
        size, best = codes.values.max(1)
        native = torch.einsum("prk,prv->pkv", *block.natives(rows, positions))
        atom = _atoms(sae, codes.indices.gather(1, best[:, None])[:, 0])
        if root is not None:
            native, atom = root @ native, root @ atom
        left = (native - size[:, None, None] * atom).flatten(1).norm(dim=1)
        norm = native.flatten(1).norm(dim=1)
        better += int(((size > 0) & (left < norm)).sum())
        writes += int((norm > 0).sum())
    variance = square - total.square().sum() / len(order)
    return {
        "held_out_fvu": float(error / variance),
        "held_out_l0": active / len(order),
        "beats_deletion": better / max(writes, 1),
    }


def _atoms(sae: SAE, at: Tensor) -> Tensor:
    """`[P, K, V]` atoms."""
    if sae.rank_one_atoms:
        return torch.einsum("prk,prv->pkv", sae.v_dec[at], sae.w_dec[at])
    return sae.W_dec[at].view(-1, sae.K, sae.V)
