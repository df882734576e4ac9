"""The selective scan, the element-gated write rule of Mamba-1 and its family, with its writes."""

from __future__ import annotations

from torch import Tensor

from .._arguments import check_floats
from .._autocast import without_autocast
from ..writes import Writes
from . import _dispatch
from .reference.selective_scan import selective_scan as reference


@without_autocast
def selective_scan(
    x: Tensor,  # [B, T, V]
    dt: Tensor,  # [B, T, V]
    A: Tensor,  # [V, K]
    B: Tensor,  # [B, T, K]
    C: Tensor,  # [B, T, K]
    D: Tensor | None = None,  # [V]
    initial_state: Tensor | None = None,  # [N, 1, K, V]
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Writes]:
    """Runs `S_t[n, c] = exp(dt_{t,c} A_{c,n}) S_{t-1}[n, c] + B_t[n] dt_{t,c} x_t[c]`, `y_t = S_t^T C_t + D x_t`.

    Args:
        x: inputs of V channels.
        dt: step sizes of every channel, after softplus.
        A: negative rates (-exp(A_log)); K is Mamba's state size.
        B, C: write and read keys, shared by all channels.
        D: skip weights, or None.
        initial_state: state before the first token, default zero. Hugging Face keeps its transpose [V, K].
        backend: "reference" or None: there is no kernel for this rule yet, and None says so once.

    Returns:
        (y `[B,T,V]`, final_state `[B,1,K,V]`, `Writes` with one head), in the inputs' dtype.

    Raises:
        ValueError: a wrong shape, naming the argument; a backend that has no kernel.

    Source: Gu and Dao, *Mamba*, arXiv 2312.00752; the writes: Young, arXiv 2605.12770.
    """
    check_floats(("D", "initial_state"), x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=initial_state)
    if x.ndim != 3:
        raise ValueError(f"x: expected [B, T, V], got shape {tuple(x.shape)}")
    rows, T, V = x.shape
    if dt.shape != x.shape:
        raise ValueError(f"dt: expected the shape of x {tuple(x.shape)}, got {tuple(dt.shape)}")
    if A.ndim != 2 or A.shape[0] != V:
        raise ValueError(f"A: expected [V={V}, K], got shape {tuple(A.shape)}")
    K = A.shape[1]
    for name, value in (("B", B), ("C", C)):
        if tuple(value.shape) != (rows, T, K):
            raise ValueError(f"{name}: expected [B={rows}, T={T}, K={K}], got shape {tuple(value.shape)}")
    if D is not None and tuple(D.shape) != (V,):
        raise ValueError(f"D: expected [V={V}], got shape {tuple(D.shape)}")
    shape = (rows, 1, K, V)
    if initial_state is not None and tuple(initial_state.shape) != shape:
        raise ValueError(f"initial_state: expected [N, 1, K, V] = {shape}, got shape {tuple(initial_state.shape)}")
    _dispatch.reference_only("selective_scan", backend)
    return reference(x, dt, A, B, C, D, initial_state)
