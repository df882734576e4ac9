"""Tiny random models of transformers' families, for tests: see `writesae.models.tiny`."""

from writesae.models.tiny import (
    VOCAB,
    families,
    kda_families,
    mamba2_families,
    mamba_families,
    tiny_kda,
    tiny_mamba,
    tiny_mamba2,
    tiny_minimax,
    tiny_model,
    tokens,
)

__all__ = [
    "VOCAB", "families", "kda_families", "mamba2_families", "mamba_families", "tiny_kda", "tiny_mamba", "tiny_mamba2",
    "tiny_minimax", "tiny_model", "tokens",
]  # fmt: skip
