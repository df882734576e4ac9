"""The package mamba-ssm: layers of `Mamba2` and `Mamba` (Mamba-1), as in its `MambaLMHeadModel`.

A layer calls `mamba_chunk_scan_combined` or `selective_scan_fn` for whole sequences and, from its method `step`,
`selective_state_update` for one token, by their names in its own file. States are `[B, H, V, K]` and `[B, d, K]`, the
transposes of ours. Bias, softplus and limits of dt, the skip D x and the gate z are done here, so that the rule's value
x is what is written. Its paths that do all in one kernel are switched off while a layer is attached, by the flags that
the layers have for it (`use_mem_eff_path`, `use_fast_path`).

The package is for GPUs. What it takes to run it on a CPU is in `mamba_ssm_cpu`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.rule import RuleCall, RuleOutput
from ..ops.selective_scan import RULE as SELECTIVE_SCAN
from ..ops.ssd import RULE as SSD
from . import looking_back, mamba_ssm_cpu
from .binding import Binding, Given, LayerSite, Recurrence, register
from .hf_mamba2 import one_a_head, transposed
from .mamba_ssm_cpu import import_library, on_cpu
from .model_call import offsets
from .patch import Owner

__all__ = ["MAMBA", "MAMBA2", "import_library", "on_cpu"]

_INPUTS = ("x", "dt", "A", "B", "C")
_ORIGIN = ("mamba_ssm.ops.", "causal_conv1d.")


def _all_in_one(name: str, flag: str):
    """Stands in for a kernel that does everything, in layers that have no flag against it."""

    def refuse(*args, **kwargs):
        raise ValueError(
            f"model: expected a layer that calls its recurrence by itself, got one that calls {name}, which does the "
            f"convolution, the recurrence and the output in one kernel; switch that off in the layer (as {flag}=False "
            "does in mamba-ssm)"
        )

    return refuse


def _steps_of(dt: Tensor, bias: Tensor | None, softplus: Any) -> Tensor:
    """Step sizes in float32, as the kernels make them. `bias` broadcasts."""
    dt = dt.float() if bias is None else dt.float() + bias.float()
    return F.softplus(dt) if softplus else dt


def _finished(o: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """What the functions do after the rule, in float32: `(o + D x) silu(z)`, in x's dtype."""
    if D is not None:
        o = o + D.float() * x.float()
    if z is not None:
        o = o * F.silu(z.float())
    return o.to(x.dtype)


# ---- Mamba-2 ---------------------------------------------------------------------------------------------------------


def _ssd(site: LayerSite, given: Given, dt: Tensor, A: Tensor, state: Tensor | None, cu_seqlens=None) -> RuleCall:
    inputs = {"x": given["x"].float(), "dt": dt, "A": A, "B": given["B"].float(), "C": given["C"].float()}
    return RuleCall(site.binding.rule, inputs, initial_state=transposed(state), cu_seqlens=cu_seqlens)


def _bind_scan(site: LayerSite, given: Given) -> RuleCall:
    dt = _steps_of(given["dt"], given.get("dt_bias"), given.get("dt_softplus"))
    limits = given.get("dt_limit")
    if limits is not None:
        dt = dt.clamp(*limits)
    seq_idx = given.get("seq_idx")
    packed = None if seq_idx is None else offsets(None, seq_idx, given["x"].shape[1])
    state = given.get("initial_states")
    return _ssd(site, given, dt, given["A"], None if state is None else state.float(), packed)


def _answer_scan(given: Given, output: RuleOutput) -> Tensor | tuple[Tensor, Tensor | None]:
    D = given.get("D")
    o = _finished(output.o, given["x"], D if D is None or D.ndim == 2 else D[:, None], given.get("z"))
    return (o, transposed(output.final_state)) if given.get("return_final_states") else o


_a_head = functools.partial(one_a_head, function="selective_state_update")


def _bind_scan_step(site: LayerSite, given: Given) -> RuleCall:
    x, D = given["x"], given.get("D")
    if x.ndim != 3 or (D is not None and D.shape != x.shape[1:]):
        raise ValueError(
            "model: expected selective_state_update of a Mamba-2 layer with x [B, H, V] and D [H, V], got "
            f"{tuple(x.shape)} and {None if D is None else tuple(D.shape)} (mamba-ssm's own step cannot do D_has_hdim)"
        )
    # The step clamps nothing: the models limit dt in whole sequences only.
    bias = None if given.get("dt_bias") is None else _a_head(given, "dt_bias", 1)
    dt = _steps_of(_a_head(given, "dt", 1), bias, given.get("dt_softplus"))
    of_token = {name: given[name][:, None] for name in ("x", "B", "C")}
    return _ssd(site, of_token, dt[:, None], _a_head(given, "A", 2), given["state"].float())


def _answer_scan_step(given: Given, output: RuleOutput) -> Tensor:
    given["state"].copy_(transposed(output.final_state))
    return _finished(output.o[:, 0], given["x"], given.get("D"), given.get("z"))


def _scan_step(given: Given, state: Tensor) -> tuple[tuple, dict]:
    K, V = state.shape[-2:]
    x, dt, B, C = (given[name][:, -1] for name in ("x", "dt", "B", "C"))

    def a_head(value: Tensor | None) -> Tensor | None:
        return value if value is None or value.ndim > dt.ndim else value[..., None].expand(*value.shape, V)

    D, bias = given.get("D"), given.get("dt_bias")
    D = D if D is not None and D.ndim == 2 else a_head(D)
    z = given.get("z")
    return (state.mT.contiguous(), x, a_head(dt), given["A"][:, None, None].expand(-1, V, K), B, C, D), {
        "z": None if z is None else z[:, -1], "dt_bias": a_head(bias), "dt_softplus": bool(given.get("dt_softplus")),
    }  # fmt: skip


def _queries(call: RuleCall) -> Tensor:
    """`[B, T, G, K]`: C reads as it is."""
    C = call.inputs["C"]
    assert C is not None
    return C if C.ndim == 4 else C[:, :, None]


def _update(bind: Callable, answer: Callable, step: Callable) -> Recurrence:
    return Recurrence(
        "selective_state_update", ("state", *_INPUTS), bind, answer, asks_state=None, step=step,
        parts=lambda given, returned: (returned, given["state"]), optional=("D", "z", "dt_bias", "dt_softplus"),
        changes=frozenset({"state_batch_indices"}),
    )  # fmt: skip


MAMBA2 = register(
    Binding(
        name="Mamba-2 recurrence of mamba-ssm",
        kind="Mamba-2",
        models=("MambaLMHeadModel of mamba-ssm, with Mamba2 layers",),
        rule=SSD,
        recurrences=(
            Recurrence(
                "mamba_chunk_scan_combined", _INPUTS, _bind_scan, _answer_scan, asks_state="return_final_states",
                optional=("chunk_size", "D", "z", "dt_bias", "initial_states", "seq_idx", "cu_seqlens", "dt_softplus",
                          "dt_limit", "return_final_states"),
                changes=frozenset({"return_varlen_states"}),
            ),
            _update(_bind_scan_step, _answer_scan_step, _scan_step),
        ),
        layer={
            "layer_index": ("layer_idx", "layer_index"),
            "num_k_heads": ("ngroups", "n_groups"),
            "num_v_heads": ("nheads", "num_heads"),
            "K": ("d_state", "ssm_state_size"),
            "V": ("headdim", "head_dim"),
            "conv_kernel_size": ("d_conv", "conv_kernel_size"),
            "norm": lambda layer: getattr(layer, "norm", None),  # if rmsnorm
            "out_proj": ("out_proj",),
        },
        value="x",
        strength="dt",
        queries=_queries,
        home=("mamba_ssm.modules.mamba2",),
        origin=_ORIGIN,
        methods=("forward", "step"),
        roles=("hidden_states",),  # Mamba2Simple knows no cache
        convs=("causal_conv1d_fn",),
        bypasses={
            "use_mem_eff_path": False,
            "mamba_split_conv1d_scan_combined": _all_in_one("mamba_split_conv1d_scan_combined", "use_mem_eff_path"),
        },
        on_cpu=mamba_ssm_cpu.FUNCTIONS,
        stand_ins=mamba_ssm_cpu.install,
    )
)  # fmt: skip


# ---- Mamba-1 ---------------------------------------------------------------------------------------------------------


def _of_channels(state: Tensor | None) -> Tensor | None:
    """`[B, 1, K, V]` of the package's `[B, d, K]`."""
    return None if state is None else state.float().transpose(-1, -2)[:, None]


def _keys(x: Tensor, name: str) -> Tensor:
    """`[B, K, T]` of one group.

    Raises:
        ValueError: keys that do not depend on the token, or of several groups.
    """
    x = x[:, 0] if x.ndim == 4 and x.shape[1] == 1 else x
    if x.ndim != 3:
        raise ValueError(
            f"model: expected {name} of selective_scan_fn as [B, K, T] or [B, 1, K, T], got {tuple(x.shape)}"
        )
    return x


def _bind_selective(site: LayerSite, given: Given) -> RuleCall:
    bias = given.get("delta_bias")
    dt = _steps_of(given["delta"], None if bias is None else bias[:, None], given.get("delta_softplus"))
    inputs = {
        "x": given["u"].float().transpose(1, 2), "dt": dt.transpose(1, 2), "A": given["A"],
        "B": _keys(given["B"], "B").float().transpose(1, 2), "C": _keys(given["C"], "C").float().transpose(1, 2),
        "D": None,
    }  # fmt: skip
    return RuleCall(site.binding.rule, inputs)


def _answer_selective(given: Given, output: RuleOutput) -> Tensor | tuple[Tensor, Tensor]:
    D = given.get("D")
    o = _finished(output.o.transpose(1, 2), given["u"], None if D is None else D[:, None], given.get("z"))
    if not given.get("return_last_state"):
        return o
    assert output.final_state is not None
    return o, output.final_state[:, 0].transpose(-1, -2)


def _bind_selective_step(site: LayerSite, given: Given) -> RuleCall:
    x = given["x"]
    if x.ndim != 2:
        raise ValueError(
            f"model: expected selective_state_update of a Mamba-1 layer with x [B, d], got {tuple(x.shape)}"
        )
    dt = _steps_of(given["dt"], given.get("dt_bias"), given.get("dt_softplus"))
    inputs = {
        "x": x.float()[:, None], "dt": dt[:, None], "A": given["A"], "B": given["B"].float()[:, None],
        "C": given["C"].float()[:, None], "D": None,
    }  # fmt: skip
    return RuleCall(site.binding.rule, inputs, initial_state=_of_channels(given["state"]))


def _answer_selective_step(given: Given, output: RuleOutput) -> Tensor:
    assert output.final_state is not None
    given["state"].copy_(output.final_state[:, 0].transpose(-1, -2))
    return _finished(output.o[:, 0], given["x"], given.get("D"), given.get("z"))


def _look_back(owner: Owner, blocks: nn.ModuleList) -> None:
    """Without causal-conv1d a layer calls its module for the short convolution. Under `patch.lock`."""
    for block in blocks:
        conv = getattr(getattr(block, "mixer", None), "conv1d", None)
        if conv is not None:
            owner.join(conv, "forward", looking_back.channels_first, conv.kernel_size[0] - 1)


def _selective_step(given: Given, state: Tensor) -> tuple[tuple, dict]:
    u, dt = given["u"][..., -1], given["delta"][..., -1]
    B, C = (_keys(given[name], name)[..., -1] for name in ("B", "C"))
    z = given.get("z")
    return (state[:, 0].mT.contiguous(), u, dt, given["A"], B, C, given.get("D")), {
        "z": None if z is None else z[..., -1], "dt_bias": given.get("delta_bias"),
        "dt_softplus": bool(given.get("delta_softplus")),
    }  # fmt: skip


MAMBA = register(
    Binding(
        name="Mamba recurrence of mamba-ssm",
        kind="Mamba-1",
        models=("MambaLMHeadModel of mamba-ssm, with Mamba layers",),
        rule=SELECTIVE_SCAN,
        gate="element",
        recurrences=(
            Recurrence(
                "selective_scan_fn", ("u", "delta", "A", "B", "C"), _bind_selective, _answer_selective,
                asks_state="return_last_state",
                optional=("D", "z", "delta_bias", "delta_softplus", "return_last_state"),
            ),
            _update(_bind_selective_step, _answer_selective_step, _selective_step),
        ),
        layer={
            "layer_index": ("layer_idx", "layer_index"),
            "num_k_heads": 1,
            "num_v_heads": 1,
            "K": ("d_state", "ssm_state_size"),
            "V": ("d_inner", "intermediate_size"),
            "conv_kernel_size": ("d_conv", "conv_kernel_size"),
            "out_proj": ("out_proj",),
        },
        value="x",
        strength="dt",
        queries=_queries,
        home=("mamba_ssm.modules.mamba_simple",),
        origin=_ORIGIN,
        methods=("forward", "step"),
        roles=("hidden_states", "cache"),
        convs=("causal_conv1d_fn",),
        bypasses={"use_fast_path": False, "mamba_inner_fn": _all_in_one("mamba_inner_fn", "use_fast_path")},
        on_cpu=mamba_ssm_cpu.FUNCTIONS,
        stand_ins=mamba_ssm_cpu.install,
        looks_back=_look_back,
    )
)  # fmt: skip
