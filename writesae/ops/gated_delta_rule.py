"""The gated delta rule: a gate a head (Gated DeltaNet; DeltaNet is g = 0) or a key channel (Kimi Delta Attention)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._arguments import check_floats
from .._autocast import without_autocast
from ..edits import Edits
from ._dispatch import Limits
from .reference.gated_delta_rule import gated_delta_rule as reference
from .rule import Rule, RuleOutput, RuleStepOutput
from .scan import Scan, ask, check_scale, check_shapes

SCAN = Scan("gated_delta_rule", reference, erases=True)


@without_autocast
def gated_delta_rule(
    q: Tensor,  # [B, T, Hk, K]
    k: Tensor,  # [B, T, Hk, K]
    v: Tensor,  # [B, T, H, V]
    g: Tensor,  # [B, T, H] or [B, T, H, K]
    beta: Tensor,  # [B, T, H]
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, H, K, V]
    output_final_state: bool = False,
    use_qk_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    edits: Edits | None = None,
    snapshots: Tensor | Sequence[int] | None = None,  # [P, 2] or P positions
    return_writes: bool = False,
    backend: str | None = None,
) -> RuleOutput:
    """Runs `S_t = (I - beta k k^T) G_t S_{t-1} + beta k v^T`, `o_t = scale S_t^T q_t` over whole sequences.

    G_t is the gate: `e^g`, or with a channel gate `Diag(e^g)`, which decays each key channel at a pace of its own.

    Args:
        q, k: queries and keys. Value head h reads key head h // (H / Hk).
        v: values.
        g: log-decay, <= 0 in every trained model (0 is DeltaNet), of each head, or of each head's key channels.
        beta: erase and write strength.
        scale: multiplies q; default K ** -0.5.
        initial_state: state before the first token, default zero. Computed in float32.
        output_final_state: also return the state after the last token.
        use_qk_l2norm: first divide q and k by sqrt(sum x^2 + 1e-6), as Qwen3-Next, Qwen3.5 and Kimi Linear do.
        cu_seqlens: offsets of packed sequences, 0 first and T last; needs B = 1. Then N = len - 1, else N = B.
        edits: changes to the states, addressed by row (of a packed batch: the sequence) and position in that row; each
            before or after its token reads the state.
        snapshots: states to return, after all edits of their position: `[P, 2]` int tensor of (row, position), or
            positions taken in every row.
        return_writes: also return the `Writes`.
        backend: "reference", "cpu", "cuda", or None for the kernel of the tensors' device.

    Returns:
        `out.o [B,T,H,V]` in v's dtype; `out.final_state [N,H,K,V]`, `out.writes` and `out.snapshots` (`[P,H,K,V]`, or
        `[N,P,H,K,V]` for a list of positions) in float32 (float64 for float64 inputs, reference only). With writes,
        `out.first_nonfinite [B]` says where an increment is not finite; see `RuleOutput`.

    Raises:
        ValueError: a wrong shape, dtype or place, naming the argument.
        RuntimeError: a second derivative asked of a kernel; backend="reference" has one.

    Under forward mode and `torch.func` (jvp, grad and what is made of them) the reference runs, which is slow and
    right; a lone vmap joins its axis to B. It runs too where no kernel takes a channel gate, or has a backward for one,
    and says so. Autocast changes nothing: inputs stay as they come, states float32.

    Differentiable once, in q, k, v, g, beta, initial_state and the edits' left and right; o, final_state, the writes
    and the snapshots all carry gradient. A write that an edit deletes or replaces is not made, so v and beta of that
    token have gradient 0 there, and k what reaches it by other ways. One deleted or replaced after the read is made:
    `out.writes` hold it, with its opposite among their edits after the read, and it answers to its own o alone. Kept
    for the backward: the inputs and the writes; states are computed anew, and one in 512 tokens is held while it runs.
    On CUDA, with its adjoint, one in 64 tokens in bfloat16 where q, k and v are all bfloat16 (K / 32 times what v
    takes), else one in 32 in float32.

    Source: Yang et al., *Gated Delta Networks*, arXiv 2412.06464; the channel gate: *Kimi Linear*, arXiv 2510.26692;
    the writes: Young, arXiv 2605.12770.
    """
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state}
    check_floats(("initial_state",), **tensors)
    check_shapes(q, k, v, g, beta)
    B, T, H, V = v.shape
    K = k.shape[-1]
    scale = check_scale(scale, K)
    asked = ask("gated_delta_rule", B, T, (H, K, V), initial_state, cu_seqlens, edits, snapshots)
    return SCAN.run(
        tensors, q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm, asked, return_writes,
        backend,
    )  # fmt: skip


@without_autocast
def gated_delta_rule_step(
    q: Tensor,  # [B, Hk, K]
    k: Tensor,  # [B, Hk, K]
    v: Tensor,  # [B, H, V]
    g: Tensor,  # [B, H] or [B, H, K]
    beta: Tensor,  # [B, H]
    state: Tensor,  # [B, H, K, V]  float32, contiguous; updated in place
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    edits: Edits | None = None,
    return_writes: bool = False,
    backend: str | None = None,
) -> RuleStepOutput:
    """One token of `gated_delta_rule` for every row, `state` updated in place: the step of decoding.

    Args:
        q, k, v, g, beta, scale, use_qk_l2norm, return_writes, backend: as in `gated_delta_rule`, without the time axis.
        state: the state before the token on entry, after its write and edits on return.
        edits: changes made at this token, before or after it reads; their positions are not looked at.

    Returns:
        `out.o [B,H,V]` in v's dtype; with `return_writes` `out.left [B,Hk,K]` and `out.right [B,H,V]`, float32.

    Raises:
        ValueError: a wrong shape, dtype or place, naming the argument.
        RuntimeError: a gradient asked for; the state is overwritten, so no backend has one.
    """
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state}
    check_floats(**tensors)
    check_shapes(q, k, v, g, beta, "B")
    scale = check_scale(scale, k.shape[-1])
    return SCAN.step(tensors, q, k, v, g, beta, state, scale, use_qk_l2norm, edits, return_writes, backend)


LIMITS = SCAN.declare(
    cpu=Limits("gated_delta_rule", gates=("scalar", "channel"), gradient=("scalar", "channel")),
    cuda=Limits("gated_delta_rule", largest={"k": 256}, gates=("scalar", "channel"), gradient=("scalar", "channel")),
)
ARGUMENTS = ("q", "k", "v", "g", "beta")
RULE = Rule("gated_delta_rule", ("scalar", "channel"), "delta", ARGUMENTS, gated_delta_rule, LIMITS)
