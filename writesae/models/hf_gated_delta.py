"""The gated delta rule in transformers: Qwen3-Next, Qwen3.5, Qwen3.5-MoE, Qwen4-Exp, OLMo-Hybrid.

Since transformers 5.15 a layer's forward calls functions of its own modelling file (`torch_chunk_gated_delta_rule`,
...), shared by every model of that file; before, it calls attributes of the layer.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ..ops.gated_delta_rule import RULE
from ..ops.rule import RuleCall, RuleOutput
from .binding import Binding, Given, LayerSite, Recurrence, register
from .frame import running
from .seam import CallHandler, ConvHandler, RuleHandler, intercept, intercept_conv
from .short_conv import causal_conv
from .sites import device_of, layers

# The seam goes by these names here, too.
__all__ = [
    "BINDING", "CallHandler", "ConvHandler", "LayerSite", "RuleHandler", "causal_conv", "device_of", "intercept",
    "intercept_conv", "layers", "running",
]  # fmt: skip

_INPUTS = ("query", "key", "value", "g", "beta")
_KNOWN = ("chunk_size", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel", "cu_seqlens")
# Arguments by which the fast kernels of the field compute something else. (Layers hand on whatever the caller of the
# model gave, so an argument that no recurrence knows is none of ours.)
_CHANGES = (
    "scale", "head_first", "state_v_first", "transpose_state_layout", "use_gate_in_kernel", "A_log", "dt_bias",
    "lower_bound", "safe_gate", "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "cp_context", "gk", "gv",
)  # fmt: skip


def _bind(site: LayerSite, given: Given) -> RuleCall:
    q, k, v, g, beta = (given[name] for name in _INPUTS)
    heads, keys = site.num_v_heads, site.num_k_heads
    if keys != heads and k.shape[2] == heads:  # already repeated to value heads: undo, as views
        q, k = q[:, :, :: heads // keys], k[:, :, :: heads // keys]
    inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    options = {"use_qk_l2norm": bool(given.get("use_qk_l2norm_in_kernel"))}
    return RuleCall(site.binding.rule, inputs, options, given.get("initial_state"))


def _answer(given: Given, output: RuleOutput) -> tuple[Tensor, Tensor | None]:
    return output.o.to(given["value"].dtype), output.final_state


def step(given: Given, state: Tensor) -> tuple[tuple, dict]:
    q, k, v, g, beta = (given[name][:, -1:] for name in _INPUTS)
    settings = {"use_qk_l2norm_in_kernel": bool(given.get("use_qk_l2norm_in_kernel"))}
    return (q, k, v), {"g": g, "beta": beta, "initial_state": state, "output_final_state": True, **settings}


def queries(call: RuleCall) -> Tensor:
    """`[B, T, Hk, K]`: q as the rule uses it."""
    q = call.inputs["q"]
    assert q is not None
    if call.options.get("use_qk_l2norm"):
        q = q * torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6)
    return q * q.shape[-1] ** -0.5


def _short_convs(module: nn.Module) -> list[nn.Conv1d]:
    """Convolutions that are modules with a forward of their own (OLMo-Hybrid before transformers 5.15), q, k, v."""
    return [m for m in module.children() if isinstance(m, nn.Conv1d) and type(m).forward is not nn.Conv1d.forward]


recurrence = functools.partial(
    Recurrence, arguments=_INPUTS, bind=_bind, answer=_answer, known=frozenset(_KNOWN), changes=frozenset(_CHANGES)
)

BINDING = register(
    Binding(
        name="gated delta rule",
        kind="gated-delta",
        models=("Qwen3-Next", "Qwen3.5", "OLMo-Hybrid"),
        rule=RULE,
        recurrences=(recurrence("chunk_gated_delta_rule"), recurrence("recurrent_gated_delta_rule", step=step)),
        layer={
            "layer_index": ("layer_idx",),
            "num_k_heads": ("num_k_heads",),
            "num_v_heads": ("num_v_heads",),
            "K": ("head_k_dim",),
            "V": ("head_v_dim",),
            "conv_kernel_size": ("conv_kernel_size",),
            "norm": ("norm", "o_norm"),
            "out_proj": ("out_proj", "o_proj"),
        },
        value="v",
        strength="beta",
        queries=queries,
        convs=("causal_conv1d_fn",),
        conv_modules=_short_convs,
    )
)
