"""Kimi Delta Attention in transformers: Kimi Linear, Ling 3.0 (BailingHybrid), GLM 5.3 Flash (Glm5Next).

The gated delta rule with a gate a key channel: g is `[B, T, H, K]`, made by the layer and handed over as log-decay, and
beta is past its sigmoid. There are as many key heads as value heads, and K = V. The two functions take the arguments of
`torch_chunk_gated_delta_rule` and its one-token sibling, so the calls are bound as those are.
"""

from __future__ import annotations

from ..ops.gated_delta_rule import RULE
from .binding import Binding, register
from .hf_gated_delta import queries, recurrence, step

BINDING = register(
    Binding(
        name="Kimi delta rule",
        kind="Kimi-delta",
        models=("Kimi-Linear", "Ling-3.0", "GLM-5.3-Flash"),
        rule=RULE,
        gate="channel",
        recurrences=(recurrence("chunk_kimi_delta_attention"), recurrence("recurrent_kimi_delta_attention", step=step)),
        layer={
            "layer_index": ("layer_idx",),
            "num_k_heads": ("num_heads",),
            "num_v_heads": ("num_heads",),
            "K": ("head_dim",),
            "V": ("head_dim",),
            "conv_kernel_size": ("conv_kernel_size",),
            "norm": ("o_norm",),
            "out_proj": ("o_proj",),
        },
        value="v",
        strength="beta",
        queries=queries,
        convs=("causal_conv1d_fn",),
    )
)
