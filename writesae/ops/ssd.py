"""SSD, the scalar-gated additive write rule of Mamba-2 and its family, with its writes."""

from __future__ import annotations

from torch import Tensor

from .._arguments import check_floats
from .._autocast import without_autocast
from ..writes import Writes
from . import _dispatch
from .reference.ssd import ssd as reference


@without_autocast
def ssd(
    x: Tensor,  # [B, T, H, V]
    dt: Tensor,  # [B, T, H]
    A: Tensor,  # [H]
    B: Tensor,  # [B, T, G, K]
    C: Tensor,  # [B, T, G, K]
    D: Tensor | None = None,  # [H]
    initial_state: Tensor | None = None,  # [N, H, K, V]
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Writes]:
    """Runs `S_t = exp(dt A) S_{t-1} + B_t (dt x_t)^T`, `y_t = S_t^T C_t + D x_t`.

    Args:
        x: inputs; V is Mamba-2's head dimension.
        dt: step sizes, after softplus and clamping.
        A: negative rates (-exp(A_log)).
        B, C: write and read keys; K is Mamba-2's state size. Head h reads group h // (H / G).
        D: skip weights, or None.
        initial_state: state before the first token, default zero. Hugging Face keeps its transpose [V, K].
        backend: "reference" or None: there is no kernel for this rule yet, and None says so once.

    Returns:
        (y `[B,T,H,V]`, final_state `[B,H,K,V]`, `Writes` with left = B and right = dt x), in the inputs' dtype.

    Raises:
        ValueError: a wrong shape, naming the argument; a backend that has no kernel.

    Source: Dao and Gu, *Transformers are SSMs*, arXiv 2405.21060; the writes: Young, arXiv 2605.12770.
    """
    check_floats(("D", "initial_state"), x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=initial_state)
    if x.ndim != 4:
        raise ValueError(f"x: expected [B, T, H, V], got shape {tuple(x.shape)}")
    rows, T, H, V = x.shape
    if tuple(dt.shape) != (rows, T, H):
        raise ValueError(f"dt: expected [B={rows}, T={T}, H={H}], got shape {tuple(dt.shape)}")
    for name, value in (("A", A), ("D", D)):
        if value is not None and tuple(value.shape) != (H,):
            raise ValueError(f"{name}: expected [H={H}], got shape {tuple(value.shape)}")
    if B.ndim != 4 or B.shape[:2] != (rows, T) or B.shape[2] == 0 or H % B.shape[2]:
        raise ValueError(f"B: expected [B={rows}, T={T}, G dividing H={H}, K], got shape {tuple(B.shape)}")
    if C.shape != B.shape:
        raise ValueError(f"C: expected the shape of B {tuple(B.shape)}, got {tuple(C.shape)}")
    shape = (rows, H, B.shape[3], V)
    if initial_state is not None and tuple(initial_state.shape) != shape:
        raise ValueError(f"initial_state: expected [N, H, K, V] = {shape}, got shape {tuple(initial_state.shape)}")
    _dispatch.reference_only("ssd", backend)
    return reference(x, dt, A, B, C, D, initial_state)
