"""Tiny random models of flash-linear-attention. Imports fla, so it is for tests that have found it."""

from __future__ import annotations

import warnings

import torch

VOCAB = 64
# Where a family's name and sizes are not the common ones. Heads differ from key heads and K from V where they can.
_FAMILIES = {
    "gated_deltanet": ("GatedDeltaNet", dict(num_heads=2, num_v_heads=4, head_dim=16, expand_v=1.5)),
    "deltanet": ("DeltaNet", dict(num_heads=2, expand_k=0.5)),
    "kda": ("KDA", dict(num_heads=2, num_v_heads=4, head_dim=16, expand_v=1.5)),
    "gla": ("GLA", dict(num_heads=4, num_kv_heads=2, expand_k=0.5)),
    "hgrn2": ("HGRN2", dict(expand_ratio=16)),
    "retnet": ("RetNet", dict(num_heads=2)),
    "rwkv7": ("RWKV7", dict(head_dim=16)),
}
FAMILIES = list(_FAMILIES)


def tiny_fla(family: str, seed: int = 0, dtype=torch.float32, **overrides):
    """A random model in eval mode whose states are felt in the logits."""
    import fla.models

    name, sizes = _FAMILIES[family]
    common = dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, intermediate_size=32, pad_token_id=0, bos_token_id=2,
        eos_token_id=1, max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = getattr(fla.models, f"{name}Config")(**{**common, **sizes, **overrides})
        model = getattr(fla.models, f"{name}ForCausalLM")(config).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("A_log"):
                parameter.data.uniform_(-4.0, -1.0)
            elif parameter_name.endswith("dt_bias"):
                parameter.data.uniform_(-1.0, 1.0)
            elif parameter.ndim >= 2 and "x_" not in parameter_name:
                parameter.data.normal_(0.0, 0.4 if "conv" in parameter_name else parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def tokens(rows: int, columns: int, seed: int = 1):
    return torch.randint(3, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(seed))


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of two rows of six, the first with two pads on its left, and its mask."""
    text, mask = tokens(2, 6, seed=2), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    return text.masked_fill(mask == 0, 0), mask
