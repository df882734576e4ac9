"""Mamba-1 in transformers since 5.15: Mamba, Falcon-Mamba, Jamba, Zamba.

A layer's forward calls `mamba_selective_scan` for whole sequences and `mamba_selective_state_update` for one token on a
cache, by their names in its own file; Zamba's once a head. Tensors are `[B, d, T]` there, states `[B, d, K]`, both the
transpose of ours. As with Mamba-2, what they do around the rule is done here: bias and softplus of dt before it, the
skip D x and the gate z after it, so that the rule's value x is what is written and nothing else.

Several tokens on a filled cache are refused: transformers drops the state there without a word.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from ..ops.rule import RuleCall, RuleOutput
from ..ops.selective_scan import RULE
from .binding import Binding, Given, LayerSite, Recurrence, register
from .frame import running

_INPUTS = ("hidden_states", "dt", "A", "B", "C")


def _inputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor | None, softplus: Any) -> dict:
    """Inputs of the rule, of x, dt `[B, T, d]`, B, C `[B, T, K]`. The models make step sizes in dt's own dtype, and go
    on in float32."""
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    dt = F.softplus(dt) if softplus else dt
    runs = torch.promote_types(dt.dtype, torch.float32)
    return {name: t.to(runs) for name, t in (("x", x), ("dt", dt), ("A", A), ("B", B), ("C", C))}


def _gated(given: Given, o: Tensor) -> Tensor:
    """Output o, laid as x, with what the functions add and multiply themselves."""
    D, z = given.get("D"), given.get("z")
    if D is not None:
        x = given["hidden_states"]
        o = o + x * (D[:, None] if x.ndim == 3 else D)
    return o if z is None else o * F.silu(z)


# ---- whole sequences ------------------------------------------------------------------------------------------


def _bind(site: LayerSite, given: Given) -> RuleCall:
    _refuse_a_dropped_state(site, given["hidden_states"].shape[-1])
    x, dt, B, C = (given[name].mT for name in ("hidden_states", "dt", "B", "C"))
    inputs = _inputs(x, dt, given["A"], B, C, given.get("delta_bias"), given.get("delta_softplus"))
    return RuleCall(site.binding.rule, inputs)


def _refuse_a_dropped_state(site: LayerSite, T: int) -> None:
    frame = running()
    held = () if frame is None else getattr(frame.cache, "layers", ())
    states = getattr(held[site.layer_index], "recurrent_states", None) if site.layer_index < len(held) else None
    for state in states.values() if isinstance(states, dict) else (states,):
        if isinstance(state, Tensor) and bool(state.any()):  # one that was reset is zero
            raise ValueError(
                f"cache: expected an empty one, or one token at a time, got {T} tokens on a filled cache of "
                f"{type(site.module).__name__}, which drops its state there (transformers {transformers.__version__}); "
                "feed the whole text at once, or token by token"
            )


def _answer(given: Given, output: RuleOutput) -> Tensor | tuple[Tensor, Tensor | None]:
    o = _gated(given, output.o.mT)
    if not given.get("return_last_state"):
        return o
    return o, None if output.final_state is None else output.final_state[:, 0].mT


# ---- one token ------------------------------------------------------------------------------------------------


def _bind_one(site: LayerSite, given: Given) -> RuleCall:
    x, dt, B, C = (given[name][:, None] for name in ("hidden_states", "dt", "B", "C"))
    inputs = _inputs(x, dt, given["A"], B, C, given.get("dt_bias"), given.get("dt_softplus"))
    return RuleCall(site.binding.rule, inputs, initial_state=given["state"].to(inputs["x"].dtype).mT[:, None])


def _answer_one(given: Given, output: RuleOutput) -> Tensor:
    assert output.final_state is not None
    given["state"].copy_(output.final_state[:, 0].mT)
    return _gated(given, output.o[:, 0]).to(given["hidden_states"].dtype)


def _step(given: Given, state: Tensor) -> tuple[tuple, dict[str, Any]]:
    x, dt, B, C = (given[name][..., -1] for name in ("hidden_states", "dt", "B", "C"))
    z = given.get("z")
    return (state[:, 0].mT.contiguous(), x, dt, given["A"], B, C, given.get("D")), {
        "z": None if z is None else z[..., -1], "dt_bias": given.get("delta_bias"),
        "dt_softplus": bool(given.get("delta_softplus")),
    }  # fmt: skip


def queries(call: RuleCall) -> Tensor:
    """`[B, T, 1, K]`: C reads as it is, for all channels alike."""
    C = call.inputs["C"]
    assert C is not None
    return C[:, :, None]


def _not_all_at_once(*args, **kwargs) -> None:
    """What training mode tries first, in one kernel with convolution and output map. None: go the plain way."""


_SCAN = Recurrence(
    "mamba_selective_scan", _INPUTS, _bind, _answer, asks_state="return_last_state", optional=("D", "z"),
    known=frozenset({"delta_bias", "delta_softplus", "use_mambapy", "use_associative_scan"}),
    changes=frozenset({"initial_states", "cu_seqlens", "dt_limit"}),
)  # fmt: skip
_STEP = Recurrence(
    "mamba_selective_state_update", ("state", *_INPUTS), _bind_one, _answer_one, asks_state=None, step=_step,
    parts=lambda given, returned: (returned, given["state"]), optional=("D",),
    known=frozenset({"dt_bias", "dt_softplus", "z"}), changes=frozenset({"state_batch_indices", "cache_seqlens"}),
)  # fmt: skip

BINDING = register(
    Binding(
        name="selective scan",
        kind="Mamba-1",
        models=("Mamba in transformers >= 5.15", "Falcon-Mamba", "Jamba", "Zamba"),
        rule=RULE,
        gate="element",
        recurrences=(_SCAN, _STEP),
        layer={
            "layer_index": ("layer_idx",),
            "num_k_heads": ("n_mamba_heads", 1),  # all of them but Zamba have one
            "num_v_heads": ("n_mamba_heads", 1),
            "K": ("ssm_state_size",),
            "V": ("mamba_head_dim", "intermediate_size"),
            "conv_kernel_size": ("conv_kernel_size",),
            "out_proj": ("out_proj",),
        },
        one_head_a_call=True,
        value="x",
        strength="dt",
        queries=queries,
        convs=("causal_conv1d_fn",),
        bypasses={"mamba_inner_fn": _not_all_at_once},
    )
)
