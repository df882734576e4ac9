"""Mamba-2 in transformers since 5.15: Mamba-2, Bamba, Nemotron-H, Granite-4 (GraniteMoeHybrid), Falcon-H1, Zamba2.

A layer's forward calls `mamba2_chunk_scan` for whole sequences and `mamba2_selective_state_update` for one token on a
cache, by their names in its own file. Both keep states as `[B, H, V, K]`, the transpose of ours. What they do around
the rule is done here: bias, softplus and limits of dt before it, the skip D x and Falcon-H1's gate z after it, so that
the rule's value x is what is written and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..ops.rule import RuleCall, RuleOutput
from ..ops.ssd import RULE
from .binding import Binding, Given, LayerSite, Recurrence, register

_INPUTS = ("hidden_states", "dt", "A", "B", "C")


def transposed(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.transpose(-1, -2)


def _step_sizes(dt: Tensor, bias: Tensor | None, softplus: Any) -> Tensor:
    """dt `[..., H]` in its own dtype, as the models make it."""
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def _inputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Mapping[str, Tensor]:
    """Inputs of the rule. The models compute it in float32, whatever their dtype."""
    return {"x": x.float(), "dt": dt.float(), "A": A, "B": B.float(), "C": C.float()}


# ---- whole sequences ------------------------------------------------------------------------------------------


def _bind(site: LayerSite, given: Given) -> RuleCall:
    dt = _step_sizes(given["dt"], given.get("dt_bias"), given.get("dt_softplus"))
    limits = given.get("dt_limit")
    if limits is not None:
        dt = dt.clamp(*limits)
    inputs = _inputs(given["hidden_states"], dt, given["A"], given["B"], given["C"])
    return RuleCall(site.binding.rule, inputs, initial_state=transposed(given.get("initial_states")))


def _answer(given: Given, output: RuleOutput) -> Tensor | tuple[Tensor, Tensor | None]:
    o, D = output.o, given.get("D")
    if D is not None:
        o = o + D[:, None] * given["hidden_states"].float()
    return (o, transposed(output.final_state)) if given.get("return_final_states") else o


# ---- one token ------------------------------------------------------------------------------------------------


def one_a_head(given: Given, name: str, axes: int, function: str) -> Tensor:
    """`[..., H]` of an argument of `function` that layers repeat along its last axes, as a view.

    Raises:
        ValueError: it is not one value repeated.
    """
    x = given[name]
    repeated = zip(x.shape[-axes:], x.stride()[-axes:], strict=True)
    if any(size > 1 and stride != 0 for size, stride in repeated):
        raise ValueError(
            f"model: expected {name} of {function} to be one value a head (expanded), got shape "
            f"{tuple(x.shape)} with strides {x.stride()}"
        )
    for _ in range(axes):
        x = x[..., 0]
    return x


_a_head = functools.partial(one_a_head, function="mamba2_selective_state_update")


def _bind_one(site: LayerSite, given: Given) -> RuleCall:
    bias = None if given.get("dt_bias") is None else _a_head(given, "dt_bias", 1)
    # No limits: the models clamp dt in whole sequences only, also where theirs (Nemotron-H, Zamba2) are above 0.
    dt = _step_sizes(_a_head(given, "dt", 1), bias, given.get("dt_softplus"))
    x, B, C = (given[name][:, None] for name in ("hidden_states", "B", "C"))
    inputs = _inputs(x, dt[:, None], _a_head(given, "A", 2), B, C)
    return RuleCall(site.binding.rule, inputs, initial_state=transposed(given["state"].float()))


def _answer_one(given: Given, output: RuleOutput) -> Tensor:
    given["state"].copy_(transposed(output.final_state))
    o, x = output.o[:, 0], given["hidden_states"]
    if given.get("D") is not None:
        o = o + x.float() * given["D"]
    if given.get("z") is not None:
        o = o * F.silu(given["z"])
    return o.to(x.dtype)


def _step(given: Given, state: Tensor) -> tuple[tuple, dict]:
    K, V = state.shape[-2:]
    x, dt, B, C = (given[name][:, -1] for name in ("hidden_states", "dt", "B", "C"))

    def a_head(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[..., None].expand(*value.shape, V)

    arguments = (state.mT.contiguous(), x, a_head(dt), given["A"][:, None, None].expand(-1, V, K), B, C)
    # Falcon-H1 has the step apply a gate; any numbers will do.
    return (*arguments, a_head(given.get("D"))), {
        "z": x, "dt_bias": a_head(given.get("dt_bias")), "dt_softplus": bool(given.get("dt_softplus")),
    }  # fmt: skip


def queries(call: RuleCall) -> Tensor:
    """`[B, T, G, K]`: C reads as it is."""
    C = call.inputs["C"]
    assert C is not None
    return C


def _not_all_at_once(*args, **kwargs) -> None:
    """What training mode tries first, in one kernel with convolution, norm and output map. None: go the plain way."""


_SCAN = Recurrence(
    "mamba2_chunk_scan", _INPUTS, _bind, _answer, asks_state="return_final_states", optional=("chunk_size",),
    known=frozenset({"D", "dt_bias", "initial_states", "dt_softplus", "dt_limit"}),
    changes=frozenset({"z", "return_varlen_states", "state_dtype"}),
)  # fmt: skip
_STEP = Recurrence(
    "mamba2_selective_state_update", ("state", *_INPUTS), _bind_one, _answer_one, asks_state=None, step=_step,
    parts=lambda given, returned: (returned, given["state"]), optional=("D",),
    known=frozenset({"dt_bias", "dt_softplus", "z"}), changes=frozenset({"state_batch_indices", "cache_seqlens"}),
)  # fmt: skip

BINDING = register(
    Binding(
        name="Mamba-2 recurrence",
        kind="Mamba-2",
        models=("Mamba-2 in transformers >= 5.15", "Nemotron-H", "Granite-4", "Falcon-H1", "Bamba", "Zamba2"),
        rule=RULE,
        recurrences=(_SCAN, _STEP),
        layer={
            "layer_index": ("layer_idx",),
            "num_k_heads": ("n_groups",),
            "num_v_heads": ("num_heads",),
            "K": ("ssm_state_size",),
            "V": ("head_dim",),
            "conv_kernel_size": ("conv_kernel_size",),
            "norm": lambda layer: getattr(layer, "norm", None),  # Falcon-H1 may have none
            "out_proj": ("out_proj",),
        },
        value="x",
        strength="dt",
        queries=queries,
        convs=("causal_conv1d_fn",),
        bypasses={"mamba2_split_conv1d_scan_combined": _not_all_at_once},
    )
)
