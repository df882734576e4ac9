"""Diagonal plus low rank: the channel-gated write rules of RWKV-7, KDA (Kimi-Linear) and GLA, with their writes."""

from __future__ import annotations

from torch import Tensor

from .._arguments import check_floats
from .._autocast import without_autocast
from ..writes import Writes
from . import _dispatch
from .reference.dplr import dplr as reference


@without_autocast
def dplr(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V]
    g: Tensor,  # [B, T, H, K]
    a: Tensor | None = None,  # [B, T, H, K]
    b: Tensor | None = None,  # [B, T, H, K]
    initial_state: Tensor | None = None,  # [N, H, K, V]
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Writes]:
    """Runs `S_t = Diag(e^g) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T`, `o_t = S_t^T q_t`.

    RWKV-7 is a = kappa, b = -(a (.) kappa), q its r; KDA is a = e^g (.) k, b = -beta k, v scaled by beta; GLA has
    neither a nor b.

    Args:
        q, k, v: queries (already scaled), keys, values.
        g: log-decay of every key channel.
        a, b: what the erase reads and where it writes; both or neither.
        initial_state: state before the first token, default zero.
        backend: "reference" or None: there is no kernel for this rule yet, and None says so once.

    Returns:
        (o `[B,T,H,V]`, final_state `[B,H,K,V]`, `Writes`), in the inputs' dtype; with an erase, two writes a token.

    Raises:
        ValueError: a wrong shape, naming the argument; a backend that has no kernel.

    Source: Peng et al., *RWKV-7*, arXiv 2503.14456; Yang et al., *GLA*, arXiv 2312.06635; the writes: Young, arXiv
    2605.12770.
    """
    check_floats(("a", "b", "initial_state"), q=q, k=k, v=v, g=g, a=a, b=b, initial_state=initial_state)
    if v.ndim != 4:
        raise ValueError(f"v: expected [B, T, H, V], got shape {tuple(v.shape)}")
    rows, T, H, V = v.shape
    if k.ndim != 4 or tuple(k.shape[:3]) != (rows, T, H):
        raise ValueError(f"k: expected [B={rows}, T={T}, H={H}, K], got shape {tuple(k.shape)}")
    if (a is None) != (b is None):
        raise ValueError(f"{'a' if a is None else 'b'}: expected a and b together or neither, got None")
    for name, value in (("q", q), ("g", g), ("a", a), ("b", b)):
        if value is not None and value.shape != k.shape:
            raise ValueError(f"{name}: expected the shape of k {tuple(k.shape)}, got {tuple(value.shape)}")
    shape = (rows, H, k.shape[3], V)
    if initial_state is not None and tuple(initial_state.shape) != shape:
        raise ValueError(f"initial_state: expected [N, H, K, V] = {shape}, got shape {tuple(initial_state.shape)}")
    _dispatch.reference_only("dplr", backend)
    return reference(q, k, v, g, a, b, initial_state)
