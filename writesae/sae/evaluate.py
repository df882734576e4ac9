"""What a dictionary is worth on held-out writes: FVU, L0, dead atoms, and how near atoms are to native writes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .block import Block
from .sae import SAE, SparseCodes

_PART = 512  # states formed at a time


def fvu(states: Tensor, prediction: Tensor) -> float:
    """Fraction of variance unexplained, `sum ||X - prediction||^2 / sum ||X - mean||^2`.

    The mean is that of `states` `[n, K, V]` themselves, so that predicting it gives exactly 1.
    """
    if states.shape != prediction.shape:
        raise ValueError(f"prediction: expected the states' shape {tuple(states.shape)}, got {tuple(prediction.shape)}")
    mean = states.mean(0, keepdim=True).expand_as(states)
    return _square(states, prediction) / _square(states, mean)


def _square(X: Tensor, prediction: Tensor) -> float:
    return float((X - prediction).double().square().sum())


@torch.no_grad()
def block_fvu(block: Block, sae: SAE | None, rows: Tensor, positions: Tensor) -> float:
    """FVU of a dictionary's reconstructions over states (or writes, as is the block's target) of a block, a part at a
    time; None predicts their mean (exactly 1)."""
    _, _, K, V = block.shape
    rows, positions = rows.to(block.device), positions.to(block.device)
    total = torch.zeros(K, V, dtype=torch.float64, device=block.device)
    for r, p in zip(rows.split(_PART), positions.split(_PART), strict=True):
        total += block.examples(r, p).double().sum(0)
    mean = (total / len(rows)).to(block.right.dtype)
    error = variance = 0.0
    for r, p in zip(rows.split(_PART), positions.split(_PART), strict=True):
        X = block.examples(r, p)
        about = mean.expand_as(X)
        variance += _square(X, about)
        error += _square(X, about if sae is None else sae.decode(codes_of(sae, block, r, p)))
    return error / variance


def codes_of(sae: SAE, block: Block, rows: Tensor, positions: Tensor) -> SparseCodes:
    """`[P, j]` codes of what the dictionary encodes at (row, position) of a block of its target."""
    if sae.target == "state":
        return sae.encode(block.states(rows, positions))
    return sae.encode_writes(*block.natives(rows, positions))


@torch.no_grad()
def evaluate(sae: SAE, block: Block, states: int | None = None, seed: int = 0) -> dict:
    """Evaluates a dictionary on the writes of its head in a block of held-out passages, on the block's device.

    Args:
        sae: the dictionary, of a size and target that go with the block.
        block: of the dictionary's target. With a root, of a dictionary seen through it (`readers.seen_through`).
        states: how many tokens to use, drawn at random; default every token.
        seed: of that draw.

    Returns:
        A dictionary of numbers:
        `states`; `fvu` (the mean of these states scores exactly 1); `l0` atoms active a state; `dead` and `alive` atoms
        (alive: fires at least once); `cosine_median`: over alive atoms, of the median over its firings of the signed
        cosine of atom and native write; `cosine_above_0.05`: share of alive atoms with that median over 0.05;
        `winner_cosine_median`: over states, for the atom with the largest code; `winner_better_than_deletion`: share
        of states where `a A` is nearer to the native write than nothing is; and `winner_error_median` of
        `||N - a A|| / ||N||`. Of a dictionary of writes also `write_cosine_median`: over tokens, of the cosine of the
        write and its whole reconstruction.

    Raises:
        ValueError: a block of another head size or target.
    """
    if block.target != sae.target:
        raise ValueError(f"block: expected one of {sae.target}s, as the dictionary is, got one of {block.target}s")
    N, T, K, V = block.shape
    if (K, V) != (sae.K, sae.V):
        raise ValueError(f"block: expected K={sae.K}, V={sae.V}, the dictionary's sizes, got K={K}, V={V}")
    order = torch.arange(N * T)
    if states is not None and states < N * T:
        order = torch.randperm(N * T, generator=torch.Generator().manual_seed(seed))[:states].sort().values
    order = order.to(block.device)
    rows, positions = order // T, order % T
    sae = sae if sae.b_enc.device == block.device else copy.deepcopy(sae).to(block.device)
    found: list[tuple[Tensor, Tensor]] = []
    active, winners, errors, whole = 0, [], [], []
    atom_norm = _atom_norms(sae)
    for r, p in zip(rows.split(_PART), positions.split(_PART), strict=True):
        codes = codes_of(sae, block, r, p)
        left, right = block.natives(r, p)
        cosine, inner, norm = _against_natives(sae, codes, left, right, atom_norm)
        fires = codes.values > 0
        active += int(fires.sum())
        found.append((codes.indices[fires], cosine[fires]))
        best = codes.values.max(1)
        i = best.indices[:, None]
        wins = (best.values > 0) & (norm > 0)
        winners.append(cosine.gather(1, i)[wins, 0])
        a, size = best.values, atom_norm[codes.indices.gather(1, i)[:, 0]]
        square = norm.square() - 2 * a * inner.gather(1, i)[:, 0] + (a * size).square()
        errors.append((square.clamp_min(0).sqrt() / norm)[wins])
        if sae.target == "write":
            cosine = torch.cosine_similarity(block.examples(r, p).flatten(1), sae.decode(codes).flatten(1))
            whole.append(cosine[norm > 0])
    feature, cosine = (torch.cat(x).cpu() for x in zip(*found, strict=True))
    alive, medians = grouped_medians(feature, cosine)
    winner, error = torch.cat(winners).cpu(), torch.cat(errors).cpu()
    of_writes = {} if sae.target == "state" else {"write_cosine_median": _median(torch.cat(whole).cpu())}
    return {
        "states": len(order), "fvu": block_fvu(block, sae, rows, positions), "l0": active / len(order),
        "dead": sae.F - len(alive), "alive": len(alive), "cosine_median": _median(medians),
        "cosine_above_0.05": float((medians > 0.05).float().mean()) if len(medians) else 0.0,
        "winner_cosine_median": _median(winner),
        "winner_better_than_deletion": float((error < 1).float().mean()) if len(error) else 0.0,
        "winner_error_median": _median(error), **of_writes,
    }  # fmt: skip


def grouped_medians(group: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(groups present, rising; median of each group's values, the lower of two middles), from `[n]` columns."""
    order = torch.argsort(value, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    groups, counts = group[order].unique_consecutive(return_counts=True)
    middle = counts.cumsum(0) - counts + (counts - 1) // 2
    return groups, value[order][middle]


def _median(x: Tensor) -> float:
    return float(x.median()) if len(x) else 0.0


def _atom_norms(sae: SAE) -> Tensor:
    """`[F]` Frobenius norms."""
    if not sae.rank_one_atoms:
        return sae.W_dec.norm(dim=1)
    gram = (sae.v_dec @ sae.v_dec.mT) * (sae.w_dec @ sae.w_dec.mT)
    return gram.sum((1, 2)).clamp_min(0).sqrt()


def _against_natives(sae: SAE, codes: SparseCodes, left: Tensor, right: Tensor, norms: Tensor):
    """Signed cosine `[P, j]` and inner product `[P, j]` of atoms and the native write (all R of it), and its norm."""
    at = codes.indices
    if sae.rank_one_atoms:
        on_v = torch.einsum("pjxk,prk->pjxr", sae.v_dec[at], left)
        inner = (on_v * torch.einsum("pjxv,prv->pjxr", sae.w_dec[at], right)).sum((2, 3))
    else:
        native = torch.einsum("prk,prv->pkv", left, right).flatten(1)
        inner = (native @ sae.W_dec.T).gather(1, at)
    gram = (left @ left.mT) * (right @ right.mT)
    norm = gram.sum((1, 2)).clamp_min(0).sqrt()
    size = norm[:, None] * norms[at]
    return torch.where(size > 0, inner / size, 0.0), inner, norm
