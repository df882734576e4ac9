"""Lightning Attention in transformers: MiniMax (MiniMax-Text-01, MiniMax-M1).

Its recurrence, `S_t = e^(-slope) S_{t-1} + k_t v_t^T`, is `ops.ssd` with dt = 1. It is written out in the layer's
forward, so there is no function to stand in for: the forward itself is the recurrence here (`Binding.inline`), and what
it does before and after is done by the layer's own modules. The self-test compares whole forwards.

States are `[B, H, K, V]`, as ours. A `MiniMaxCache` is not told how many columns it holds; `columns` counts them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.rule import RuleCall, RuleOutput
from ..ops.ssd import RULE
from . import patch
from .arguments import NAMES
from .binding import Binding, Given, LayerSite, Recurrence, register
from .frame import running
from .hf_mamba2 import queries


def _cache(given: Given) -> Any:
    return next((given[name] for name in NAMES["cache"] if given.get(name) is not None), None)


def _state(site: LayerSite, given: Given) -> Tensor | None:
    cache = _cache(given)
    return None if cache is None else cache.get_linear_cache(site.layer_index)


def _bind(site: LayerSite, given: Given) -> RuleCall:
    module: Any = site.module
    state, mask = _state(site, given), given.get("attention_mask")
    qkv = module.act_fn(module.qkv_proj(given["hidden_states"])).unflatten(-1, (site.num_v_heads, -1))
    if mask is not None and _masks_everything(module):
        qkv = (qkv * mask[:, :, None, None]).to(qkv.dtype)
    C, B, v = qkv.chunk(3, -1)
    if mask is not None and not _masks_everything(module) and state is None:
        v = v * mask.bool()[:, :, None, None]
    inputs = {"x": v, "dt": v.new_ones(()).expand(v.shape[:-1]), "A": -module.slope_rate.flatten(), "B": B, "C": C}
    runs = torch.promote_types(v.dtype, torch.float32)
    inputs = {name: t.to(runs) for name, t in inputs.items()}
    return RuleCall(site.binding.rule, inputs, initial_state=None if state is None else state.to(runs))


def _masks_everything(module: nn.Module) -> bool:
    """Older releases mask values alone, and on an empty cache alone."""
    return "apply_mask_to_padding_states" in patch.forward_of(module).__globals__


def _answer(given: Given, output: RuleOutput) -> tuple[Tensor, Tensor]:
    frame = running()
    assert frame is not None and output.final_state is not None
    module: Any = frame.site.module
    x, state = given["hidden_states"], output.final_state.to(given["hidden_states"].dtype)
    o = module.norm(output.o.flatten(2).to(x.dtype))
    cache = _cache(given)
    if cache is not None:
        cache.set_linear_cache(frame.site.layer_index, state)
    return module.out_proj(F.sigmoid(module.output_gate(x)) * o), state


def _step(given: Given, state: Tensor) -> tuple[tuple, dict[str, Any]]:
    frame = running()
    assert frame is not None
    x, cache = given["hidden_states"], patch.forward_of(frame.site.module).__globals__["MiniMaxCache"]()
    cache.set_linear_cache(frame.site.layer_index, state.to(x.dtype))
    return (x[:, -1:], None, None, cache), {}


BINDING = register(
    Binding(
        name="Lightning recurrence",
        kind="Lightning",
        models=("MiniMax",),
        rule=RULE,
        recurrences=(
            Recurrence(
                "forward",
                ("hidden_states",),
                _bind,
                _answer,
                asks_state=None,
                step=_step,
                optional=("position_embeddings", "attention_mask", "cache"),
            ),
        ),
        layer={
            "layer_index": ("layer_idx",),
            "num_k_heads": ("num_attention_heads",),
            "num_v_heads": ("num_attention_heads",),
            "K": ("head_dim",),
            "V": ("head_dim",),
            "norm": ("norm",),
            "out_proj": ("out_proj",),
        },
        value="x",
        strength="dt",
        queries=queries,
        inline=("MiniMaxLightningAttention",),
        home=("transformers.models.minimax.",),
    )
)
