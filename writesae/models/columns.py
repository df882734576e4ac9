"""How many columns a cache holds. Caches of attention layers say so; one of recurrent layers alone does not, and is
counted here: what each call fed is noted on the cache itself, so that its copies know, too."""

from __future__ import annotations

import torch
from torch import Tensor

_NOTE = "_writesae_columns"  # attribute of a cache: (columns it held, state that went with them)


def columns_held(cache) -> int | None:
    """Columns that a cache holds; None where it does not say, and was filled or changed while nobody counted.

    Raises:
        ValueError: it is no cache that could say.
    """
    offset = getattr(cache, "seqlen_offset", None)  # of mamba-ssm's InferenceParams
    if isinstance(offset, int):
        return offset
    length = getattr(cache, "get_seq_length", None)
    if length is None:
        raise ValueError(
            f"cache: expected one that says how many columns it holds (get_seq_length), got {type(cache).__name__}"
        )
    if not _is_silent(cache):
        return int(length())
    state = _last_state(cache)
    if state is None or not (_of_minimax(cache) or cache.has_previous_state()):
        return 0
    columns, known = getattr(cache, _NOTE, (0, None))
    return columns if known is not None and _same_rows(state, known) else None


def note_columns(cache, columns: int) -> None:
    """Remembers what a cache holds now, if it does not say so itself."""
    if not _is_silent(cache):
        return
    state = _last_state(cache)
    if state is not None:
        setattr(cache, _NOTE, (columns, state.detach().clone()))


def _is_silent(cache) -> bool:
    """Whether no layer of a cache counts columns, or the one that is asked is none of those that do."""
    if _of_minimax(cache):
        return True
    layers = getattr(cache, "layers", None) or ()
    return bool(layers) and not any(callable(getattr(layer, "get_seq_length", None)) for layer in layers)


def _of_minimax(cache) -> bool:
    """Its states are beside its layers, of which the first, which is asked for columns, is not in use."""
    return isinstance(getattr(cache, "linear_cache", None), list)


def _last_state(cache) -> Tensor | None:
    """What the last layer that has one keeps for its convolution, `[B, D, W]`: the latest few tokens of every row. Of a
    layer without a convolution, its state."""
    if _of_minimax(cache):
        return next((state for state in reversed(cache.linear_cache) if isinstance(state, Tensor)), None)
    for layer in reversed(cache.layers):
        kept = getattr(layer, "conv_states", None)
        for state in kept.values() if isinstance(kept, dict) else (kept,):
            if isinstance(state, Tensor):
                return state
    return None


def _same_rows(state: Tensor, known: Tensor) -> bool:
    """Whether every row is one of those known: beams are chosen among rows, and samples repeat them."""
    if state.shape[1:] != known.shape[1:] or state.dtype != known.dtype:
        return False
    known = known.to(state.device)
    if state.shape == known.shape and torch.equal(state, known):
        return True
    return all(bool((known == row).flatten(1).all(1).any()) for row in state)
