"""Tiny random models of flash-linear-attention. Imports fla, so it is for tests that have found it."""

from __future__ import annotations

import torch

from writesae.models.tiny import fla_families, tiny_fla

__all__ = ["FAMILIES", "VOCAB", "padded", "tiny_fla", "tokens"]
VOCAB = 64
FAMILIES = fla_families()


def tokens(rows: int, columns: int, seed: int = 1):
    return torch.randint(3, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(seed))


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of two rows of six, the first with two pads on its left, and its mask."""
    text, mask = tokens(2, 6, seed=2), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    return text.masked_fill(mask == 0, 0), mask
