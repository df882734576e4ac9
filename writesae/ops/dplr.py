"""Diagonal plus low rank: the channel-gated write rules of RWKV-7, Comba and GLA, with their writes, snapshots and
edits. KDA is one of them too, but has a single write a token: `gated_delta_rule` runs it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._arguments import check_floats
from .._autocast import without_autocast
from ..edits import Edits
from ._dispatch import Limits
from .reference.dplr import dplr as reference
from .rule import Rule, RuleOutput, RuleStepOutput
from .scan import Scan, ask

SCAN = Scan("dplr", reference, erases=False, low_rank=True)


@without_autocast
def dplr(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V]
    g: Tensor,  # [B, T, H, K]
    a: Tensor | None = None,  # [B, T, H, K]
    b: Tensor | None = None,  # [B, T, H, K]
    initial_state: Tensor | None = None,  # [N, H, K, V]
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    edits: Edits | None = None,
    snapshots: Tensor | Sequence[int] | None = None,  # [P, 2] or P positions
    return_writes: bool = False,
    backend: str | None = None,
) -> RuleOutput:
    """Runs `S_t = Diag(e^g) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T`, `o_t = S_t^T q_t` over whole sequences.

    RWKV-7 is a = kappa, b = -(a (.) kappa), q its r; GLA has neither a nor b.

    Args:
        q, k, v: queries (already scaled), keys, values.
        g: log-decay of every key channel.
        a, b: what the erase reads, of the state before its gate, and where it writes; both or neither.
        initial_state: state before the first token, default zero.
        output_final_state, cu_seqlens, snapshots, return_writes, backend: as in `gated_delta_rule`.
        edits: as in `gated_delta_rule`. With an erase a token makes two writes, `b (S^T a)^T` and `k v^T`; the native
            write that an edit deletes or replaces is `k v^T`, which carries the value, and the erase stays.

    Returns:
        `out.o [B,T,H,V]` in v's dtype; `out.final_state [N,H,K,V]`, `out.writes` (with an erase two a token, the native
        one last) and `out.snapshots` in float32 (float64 for float64 inputs, reference only).

    Raises:
        ValueError: a wrong shape, dtype or place, naming the argument; a backend that cannot run this.
        RuntimeError: a second derivative asked of a kernel; backend="reference" has one.

    Differentiable once, in q, k, v, g, a, b, initial_state and the edits' left and right. Where there is no kernel, and
    under forward mode and `torch.func`, the reference runs and says so. Autocast changes nothing.

    Source: Peng et al., *RWKV-7*, arXiv 2503.14456; Yang et al., *GLA*, arXiv 2312.06635; the writes: Young, arXiv
    2605.12770.
    """
    tensors = {"q": q, "k": k, "v": v, "g": g, "a": a, "b": b, "initial_state": initial_state}
    check_floats(("a", "b", "initial_state"), **tensors)
    if v.ndim != 4:
        raise ValueError(f"v: expected [B, T, H, V], got shape {tuple(v.shape)}")
    B, T, H, V = v.shape
    erase = _check(q, k, v, g, a, b, "BT")
    asked = ask("dplr", B, T, (H, k.shape[-1], V), initial_state, cu_seqlens, edits, snapshots)
    return SCAN.run(
        tensors, q, k, v, g, _strength(v), 1.0, initial_state, output_final_state, False, asked, return_writes, backend,
        erase,
    )  # fmt: skip


@without_autocast
def dplr_step(
    q: Tensor,  # [B, H, K]
    k: Tensor,  # [B, H, K]
    v: Tensor,  # [B, H, V]
    g: Tensor,  # [B, H, K]
    state: Tensor,  # [B, H, K, V]  float32, contiguous; updated in place
    a: Tensor | None = None,  # [B, H, K]
    b: Tensor | None = None,  # [B, H, K]
    edits: Edits | None = None,
    return_writes: bool = False,
    backend: str | None = None,
) -> RuleStepOutput:
    """One token of `dplr` for every row, `state` updated in place: the step of decoding.

    Args:
        q, k, v, g, a, b, return_writes, backend: as in `dplr`, without the time axis.
        state: the state before the token on entry, after its writes and edits on return.
        edits: changes made at this token, before or after it reads; their positions are not looked at.

    Returns:
        `out.o [B,H,V]` in v's dtype; with `return_writes` `out.left [B,H,K]` and `out.right [B,H,V]`, float32; with an
        erase `[B,H,2,K]` and `[B,H,2,V]`, the native write last.

    Raises:
        ValueError: a wrong shape, dtype or place, naming the argument.
        RuntimeError: a gradient asked for; the state is overwritten, so no backend has one.
    """
    tensors = {"q": q, "k": k, "v": v, "g": g, "state": state, "a": a, "b": b}
    check_floats(("a", "b"), **tensors)
    if v.ndim != 3:
        raise ValueError(f"v: expected [B, H, V], got shape {tuple(v.shape)}")
    erase = _check(q, k, v, g, a, b, "B")
    return SCAN.step(tensors, q, k, v, g, _strength(v), state, 1.0, False, edits, return_writes, backend, erase)


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor | None, b: Tensor | None, lead: str
) -> tuple[Tensor, Tensor] | None:
    """Refuses shapes that do not fit v; lead: its axes before heads. Returns a and b."""
    if k.ndim != v.ndim or k.shape[:-1] != v.shape[:-1]:
        sizes = ", ".join(f"{name}={size}" for name, size in zip(f"{lead}H", v.shape[:-1], strict=True))
        raise ValueError(f"k: expected [{sizes}, K], got shape {tuple(k.shape)}")
    if (a is None) != (b is None):
        raise ValueError(f"{'a' if a is None else 'b'}: expected a and b together or neither, got None")
    for name, x in (("q", q), ("g", g), ("a", a), ("b", b)):
        if x is not None and x.shape != k.shape:
            raise ValueError(f"{name}: expected the shape of k {tuple(k.shape)}, got {tuple(x.shape)}")
    return None if a is None or b is None else (a, b)


def _strength(v: Tensor) -> Tensor:
    """The beta of the operators, `[..., H]`: values are written as they are."""
    return v.new_ones(()).expand(v.shape[:-1])


LIMITS = SCAN.declare(
    cpu=Limits("dplr", gates=("channel",), gradient=("channel",)),
    cuda=Limits("dplr", largest={"k": 256}, gates=("channel",), gradient=("channel",)),
)
RULE = Rule("dplr", ("channel",), "low rank", ("q", "k", "v", "g", "a", "b"), dplr, LIMITS)
