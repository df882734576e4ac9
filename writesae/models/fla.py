"""flash-linear-attention's own models (fla 0.6): Gated DeltaNet, DeltaNet, Kimi Delta Attention, GLA, HGRN-2, RWKV-7,
RetNet, simple GLA.

A layer's forward calls functions by their names in its own file, `[B, T, H, D]`, and hands them raw logits of gate and
beta: softplus, sigmoid and bounds are made here. Caches are `[V, K]` where the call says `state_v_first`.

The layers pack the rows of a padded batch into one, without the pads; here they are laid out again as the model was fed
them, so that rows and positions of writes, edits and firings are those of the batch. A pad decays and writes nothing.

Nothing here imports fla: its layers are known by the file they come from. On a machine without a GPU it can run none of
its functions, and `fla_stand_ins` takes their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.dplr import RULE as DPLR
from ..ops.gated_delta_rule import RULE as DELTA
from ..ops.rule import RuleCall, RuleOutput
from ..ops.ssd import RULE as SSD
from . import fla_stand_ins
from .binding import Binding, Given, LayerSite, Recurrence, register
from .frame import running

_V_FIRST = ("state_v_first", "transpose_state_layout")  # its name in 0.6, and before
_ORIGIN = ("fla.ops.",)
_SAME = frozenset({"scale", "initial_state", "output_final_state", "cu_seqlens", *_V_FIRST})
_CHANGES = frozenset({
    "head_first", "reverse", "gk", "gv", "g_gamma", "cp_context", "output_attentions", "return_intermediate_states",
})  # fmt: skip


# ---- rows and states ------------------------------------------------------------------------------------------


def _places(given: Given) -> tuple[Tensor, tuple[int, int]] | None:
    """Where the tokens of a packed row stand in the padded batch it was made from, `[total]`, and that batch's B and T;
    None where the layer has packed nothing.

    Raises:
        ValueError: the model was given packed sequences in a way that its layers do not look at.
    """
    frame, offsets = running(), given.get("cu_seqlens")
    if frame is None:
        return None
    if offsets is None:
        if frame.cu_seqlens is not None:
            raise ValueError(
                f"packed batch: expected cu_seqlens, by which alone flash-linear-attention's "
                f"{type(frame.site.module).__name__} keeps sequences apart, got position_ids or cu_seq_lens_q"
            )
        return None
    B, T = frame.hidden.shape[:2]
    # More or fewer offsets are the caller's own sequences, and the layer has not looked at the mask.
    if frame.layer_mask is None or frame.layer_mask.ndim != 2 or len(offsets) != B + 1:
        return None
    places = frame.layer_mask[:, -T:].flatten().nonzero()[:, 0]
    return (places, (B, T)) if len(places) == given["v"].shape[1] else None


def _in_rows(x: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """`[1, total, ...]` to `[B, T, ...]`, zeros at pads."""
    B, T = shape
    if len(places) == B * T:
        return x.reshape(B, T, *x.shape[2:])
    return x.new_zeros(B * T, *x.shape[2:]).index_copy(0, places, x[0]).unflatten(0, (B, T))


def _call(
    site: LayerSite,
    given: Given,
    tokens: Mapping[str, Tensor | None],
    heads: Mapping[str, Tensor | None] | None = None,
    options: Mapping[str, Any] | None = None,
) -> RuleCall:
    """A call of the family's rule from its inputs of each token, and those of each head."""
    found, offsets = _places(given), given.get("cu_seqlens")
    if found is not None:
        tokens = {name: None if x is None else _in_rows(x, *found) for name, x in tokens.items()}
        offsets = None
    inputs = {name: {**tokens, **(heads or {})}[name] for name in site.binding.rule.arguments}
    state = _turned(given, given.get("initial_state"))
    return RuleCall(site.binding.rule, inputs, options or {}, state, None if offsets is None else offsets.long())


def _turned(given: Given, state: Tensor | None) -> Tensor | None:
    """A state between ours, `[N, H, K, V]`, and the call's."""
    v_first = any(given.get(name) for name in _V_FIRST)
    return state.transpose(-1, -2) if v_first and state is not None else state


def _answer(given: Given, output: RuleOutput) -> tuple[Tensor, Tensor | None]:
    o, found = output.o.to(given["v"].dtype), _places(given)
    if found is not None:
        o = o.flatten(0, 1)[found[0]][None]
    return o, _turned(given, output.final_state)


def _scaled(q: Tensor, given: Given) -> Tensor:
    scale = given.get("scale")
    return q * (q.shape[-1] ** -0.5 if scale is None else scale)


def _step(*tokens: str, settings: tuple[str, ...] = ()) -> Callable[[Given, Tensor], tuple[tuple, dict]]:
    """How a layer calls a function of these arguments for one token: as it does for whole sequences."""

    def step(given: Given, state: Tensor) -> tuple[tuple, dict]:
        last = {name: given[name][:, -1:] for name in tokens}
        same = {name: given[name] for name in ("scale", *_V_FIRST, *settings) if given.get(name) is not None}
        turned = _turned(given, state)
        assert turned is not None
        return (), {**last, **same, "initial_state": turned.contiguous(), "output_final_state": True}

    return step


def _sizes(norm: Callable[[nn.Module], Any], **names: Any) -> dict[str, Any]:
    """Fields of a layer's site, by the names of fla's layers and of those that come with models. norm: its norm after
    the rule, if it takes a gate."""
    return {
        "layer_index": ("layer_idx",), "num_k_heads": ("num_k_heads", "num_heads"),
        "num_v_heads": ("num_v_heads", "num_heads"), "K": ("head_k_dim", "head_dim"), "V": ("head_v_dim", "head_dim"),
        "norm": norm, "out_proj": lambda layer: getattr(layer, "o_proj", None), "conv_kernel_size": _conv_size, **names,
    }  # fmt: skip


def _conv_size(layer: nn.Module) -> Any:
    return getattr(layer, "conv_size", 1) if getattr(layer, "use_short_conv", False) else 1


def _queries(name: str) -> Callable[[RuleCall], Tensor]:
    """Queries that have been scaled already."""

    def queries(call: RuleCall) -> Tensor:
        q = call.inputs[name]
        assert q is not None
        return q

    return queries


# ---- the delta rule: Gated DeltaNet, DeltaNet, Kimi Delta Attention -------------------------------------------

_GATE = ("use_gate_in_kernel", "A_log", "dt_bias", "lower_bound")
_BETA = ("use_beta_sigmoid_in_kernel", "allow_neg_eigval")
_NORM = ("use_qk_l2norm_in_kernel",)


def _log_decay(given: Given) -> Tensor:
    """g `[B, T, H]` or `[B, T, H, K]`, made of its logits where the function would make it."""
    g = given["g"]
    if not given.get("use_gate_in_kernel"):
        return g
    A_log, bias, bound = (given.get(name) for name in _GATE[1:])
    rate = None if A_log is None else A_log.float().exp()
    if rate is not None and g.ndim == 4:
        rate = rate[:, None]
    g = g.float() if bias is None else g.float() + bias.float().view(g.shape[2:])
    if bound is None:
        if rate is None:
            raise ValueError("model: expected A_log with use_gate_in_kernel and no lower_bound, got None")
        return -rate * F.softplus(g)
    return bound * torch.sigmoid(g if rate is None else rate * g)


def _strength(given: Given) -> Tensor:
    """beta `[B, T, H]`, likewise."""
    beta = given["beta"]
    if not given.get("use_beta_sigmoid_in_kernel"):
        return beta
    return beta.float().sigmoid() * (2 if given.get("allow_neg_eigval") else 1)


def _bind_delta(site: LayerSite, given: Given) -> RuleCall:
    beta = _strength(given)
    g = _log_decay(given) if given.get("g") is not None else torch.zeros_like(beta)  # DeltaNet does not decay
    inputs = {"q": given["q"], "k": given["k"], "v": given["v"], "g": g, "beta": beta}
    return _call(site, given, inputs, options={"use_qk_l2norm": bool(given.get("use_qk_l2norm_in_kernel"))})


def _delta_queries(call: RuleCall) -> Tensor:
    q = call.inputs["q"]
    assert q is not None
    if call.options.get("use_qk_l2norm"):
        q = q * torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6)
    return q * q.shape[-1] ** -0.5


def _delta_rule(name: str, *gate: str) -> tuple[Recurrence, Recurrence]:
    """The two functions of a delta rule: for many tokens, and for few."""
    tokens, settings = ("q", "k", "v", *gate, "beta"), (*_GATE, *_BETA, *_NORM)
    known = (_SAME | {*settings, "safe_gate", "cu_seqlens_cpu"}) - {"scale"}
    common = (tokens, _bind_delta, _answer)
    changes = _CHANGES | {"scale"}
    return (
        Recurrence(f"chunk_{name}", *common, known=known, changes=changes),
        Recurrence(
            f"fused_recurrent_{name}", *common, known=known, changes=changes, step=_step(*tokens, settings=settings)
        ),
    )


def _delta_binding(name: str, kind: str, model: str, functions: str, *gate: str, **more: Any) -> Binding:
    return register(
        Binding(
            name=name, kind=kind, models=(f"{model} in flash-linear-attention",), rule=DELTA,
            recurrences=_delta_rule(functions, *gate), value="v", strength="beta", queries=_delta_queries,
            origin=_ORIGIN, stand_ins=fla_stand_ins.install,
            looks_back=fla_stand_ins.look_back, **more,
        )
    )  # fmt: skip


def _gated_norm(layer: nn.Module) -> Any:
    # Without a gate it is of another class, and takes no second argument.
    return getattr(layer, "o_norm", None) if getattr(layer, "use_gate", False) else None


GATED_DELTANET = _delta_binding(
    "gated delta rule", "gated-delta", "GatedDeltaNet", "gated_delta_rule", "g", home=("fla.layers.gated_deltanet",),
    layer=_sizes(_gated_norm),
)  # fmt: skip
DELTANET = _delta_binding(
    "delta rule", "delta", "DeltaNet", "delta_rule", home=("fla.layers.delta_net",), layer=_sizes(_gated_norm)
)
KDA = _delta_binding(
    "Kimi delta rule", "Kimi-delta", "KimiDeltaAttention", "kda", "g", home=("fla.layers.kda",), gate="channel",
    layer=_sizes(lambda layer: getattr(layer, "o_norm", None)),
)  # fmt: skip


# ---- without an erase: GLA, HGRN-2, simple GLA, RetNet --------------------------------------------------------


def _bind_gla(site: LayerSite, given: Given) -> RuleCall:
    g = given["g"] if given.get("g") is not None else given["gk"]
    inputs = {"q": _scaled(given["q"], given), "k": given["k"], "v": given["v"], "g": g, "a": None, "b": None}
    return _call(site, given, inputs)


def _bind_simple_gla(site: LayerSite, given: Given) -> RuleCall:
    return _bind_gla(site, {**given, "g": given["g"][..., None].expand_as(given["k"])})


def _gla_step(given: Given, state: Tensor) -> tuple[tuple, dict]:
    """The function for whole sequences calls the gate g, that for few tokens gk."""
    return _step("q", "k", "v", "gk")({"gk": given.get("g"), **given}, state)


def _bind_nothing(site: LayerSite, given: Given) -> RuleCall:
    raise ValueError(
        f'model: expected mode "chunk" or "fused_recurrent" of {type(site.module).__name__}, got "fused_chunk", which '
        "flash-linear-attention no longer has"
    )


def _gla_norm(layer: nn.Module) -> Any:
    return getattr(layer, "g_norm_swish_gate", None)


def _additive_binding(name: str, kind: str, model: str, **more: Any) -> Binding:
    return register(
        Binding(
            name=name, kind=kind, models=(f"{model} in flash-linear-attention",), value="v", gate="channel", rule=DPLR,
            queries=_queries("q"), origin=_ORIGIN, stand_ins=fla_stand_ins.install,
            looks_back=fla_stand_ins.look_back, **more,
        )
    )  # fmt: skip


_GLA = (
    Recurrence("fused_chunk_gla", ("q", "k", "v", "g"), _bind_nothing, _answer, known=_SAME),  # ends like the next
    Recurrence("chunk_gla", ("q", "k", "v", "g"), _bind_gla, _answer, known=_SAME, changes=_CHANGES),
    Recurrence(
        "fused_recurrent_gla", ("q", "k", "v", "gk"), _bind_gla, _answer, known=_SAME, changes=_CHANGES - {"gk"},
        step=_gla_step,
    ),
)  # fmt: skip
_SIMPLE_GLA = (
    Recurrence("chunk_simple_gla", ("q", "k", "v", "g"), _bind_simple_gla, _answer, known=_SAME, changes=_CHANGES),
    Recurrence(
        "fused_recurrent_simple_gla", ("q", "k", "v", "g"), _bind_simple_gla, _answer, known=_SAME, changes=_CHANGES,
        step=_step("q", "k", "v", "g"),
    ),
)  # fmt: skip

GLA = _additive_binding(
    "gated linear attention", "gated-linear", "GatedLinearAttention", home=("fla.layers.gla",), recurrences=_GLA,
    layer=_sizes(_gla_norm),
)  # fmt: skip
HGRN2 = _additive_binding(
    "HGRN-2 recurrence", "HGRN-2", "HGRN2Attention", home=("fla.layers.hgrn2",), recurrences=_GLA,
    layer=_sizes(lambda layer: None, K=("head_f_dim",), V=("head_i_dim",)),
)  # fmt: skip
# Its gate is one a head; `ssd` would have it as dt A with x divided by dt, which may be 0.
SIMPLE_GLA = _additive_binding(
    "simple gated linear attention", "simple-gated-linear", "SimpleGatedLinearAttention",
    home=("fla.layers.simple_gla",), recurrences=_SIMPLE_GLA, layer=_sizes(_gla_norm),
)  # fmt: skip


def _bind_retention(site: LayerSite, given: Given) -> RuleCall:
    """`ssd` with dt = 1: head h decays by 1 - 2^(-5 - h) a token."""
    q, v = _scaled(given["q"], given), given["v"]
    heads = torch.arange(v.shape[2], dtype=torch.float32, device=v.device)
    rates = {"A": torch.log1p(-(2.0 ** (-5 - heads))), "D": None}
    return _call(site, given, {"x": v, "dt": v.new_ones(v.shape[:3]), "B": given["k"], "C": q}, rates)


def _retention(name: str, step: bool = False) -> Recurrence:
    tokens = ("q", "k", "v")
    return Recurrence(
        name, tokens, _bind_retention, _answer, known=_SAME, changes=_CHANGES, step=_step(*tokens) if step else None
    )


RETENTION = register(
    Binding(
        name="retention",
        kind="retention",
        models=("MultiScaleRetention in flash-linear-attention",),
        rule=SSD,
        recurrences=(
            _retention("chunk_retention"),
            _retention("parallel_retention"),
            _retention("fused_recurrent_retention", step=True),
        ),
        layer=_sizes(_gla_norm),
        value="x",
        strength="dt",
        queries=_queries("C"),
        home=("fla.layers.multiscale_retention",),
        origin=_ORIGIN,
        stand_ins=fla_stand_ins.install,
        looks_back=fla_stand_ins.look_back,
    )
)


# ---- RWKV-7 ---------------------------------------------------------------------------------------------------


def _bind_rwkv7(site: LayerSite, given: Given) -> RuleCall:
    """`chunk_rwkv7`: a reads and b writes the erase, b (S^T a)^T."""
    scale = given.get("scale", 1.0)
    q = given["r"] if scale == 1 else _scaled(given["r"], given)
    return _call(site, given, {"q": q, "k": given["k"], "v": given["v"], "g": given["w"], "a": given["a"],
                               "b": given["b"]})  # fmt: skip


def _bind_rwkv7_few(site: LayerSite, given: Given) -> RuleCall:
    """`fused_mul_recurrent_rwkv7`: a is how much of what kk reads is erased."""
    kk = given["kk"]
    return _bind_rwkv7(site, {**given, "a": -kk, "b": kk * given["a"]})


def _rwkv7_step(given: Given, state: Tensor) -> tuple[tuple, dict]:
    if "kk" not in given:  # arguments of the function for many tokens
        kk = -given["a"]
        given = {**given, "kk": kk, "a": torch.where(kk == 0, 0, given["b"] / kk)}
    return _step("r", "w", "k", "v", "kk", "a")(given, state)


_RWKV7_CHUNK = frozenset({"safe_gate", "lower_bound", "chunk_size", "cu_seqlens_cpu", "disable_recompute"})

RWKV7 = register(
    Binding(
        name="RWKV-7 recurrence",
        kind="RWKV-7",
        models=("RWKV7Attention in flash-linear-attention",),
        rule=DPLR,
        gate="channel",
        erases_apart=True,
        recurrences=(
            Recurrence(
                "chunk_rwkv7", ("r", "w", "k", "v", "a", "b"), _bind_rwkv7, _answer, known=_SAME | _RWKV7_CHUNK,
                changes=_CHANGES,
            ),
            Recurrence(
                "fused_mul_recurrent_rwkv7", ("r", "w", "k", "v", "kk", "a"), _bind_rwkv7_few, _answer, known=_SAME,
                changes=_CHANGES, step=_rwkv7_step,
            ),
        ),
        layer={
            "layer_index": ("layer_idx",), "num_k_heads": ("num_heads",), "num_v_heads": ("num_heads",),
            "K": ("head_dim",), "V": ("head_v_dim", "head_dim"), "out_proj": ("o_proj",),
        },
        value="v",
        queries=_queries("q"),
        home=("fla.layers.rwkv7",),
        origin=_ORIGIN,
        stand_ins=fla_stand_ins.install,
        looks_back=fla_stand_ins.look_back,
    )
)  # fmt: skip
