"""Inputs and comparisons that tests and benchmarks share."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .writes import Writes

# Relative RMS error allowed against the float64 reference on the same (rounded) inputs, by the dtype of the compared
# tensor. Measured over every case of tests/test_rules.py on AVX-512, AVX2 and portable code (AMD EPYC,
# g++ 12): float32 at most 1.1e-6, worst element 1.4e-6 of the tensor's largest magnitude; bfloat16 outputs 1.7e-3 and
# float16 outputs 2.2e-4 (worst 3.1e-3 and 3.8e-4), which is the rounding of the output itself.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}

# The same for the CUDA kernels, by the dtype of the inputs: matrix units take half-precision operands as they are,
# and intermediate results are rounded to the operands' type (float32 goes in three tf32 products). Measured on the host
# twin over every case of the operators' tests: outputs at most 4.6e-7 (float32), 4.6e-3 (bfloat16), 8.8e-4 (float16);
# gradients 1.0e-6, 9.8e-3, 8.9e-4. With sums of products cut off as the hardware's are (twin-truncating, twin-ampere):
# outputs 2.6e-6, 8.4e-3, 9.1e-4; gradients 4.2e-6, 9.3e-3, 3.7e-4.
DEVICE_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


@dataclass(frozen=True)
class Difference:
    """rms: error RMS over reference RMS. worst: largest error over the reference's largest magnitude."""

    rms: float
    worst: float


def difference(got: Tensor, expected: Tensor) -> Difference:
    """How far `got` is from `expected`, in float64. NaN or infinity in `got` counts as infinitely far."""
    if got.shape != expected.shape:
        raise ValueError(f"got: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    if not expected.numel():
        return Difference(0.0, 0.0)
    got, expected = got.detach().double(), expected.detach().double()
    error = got - expected
    if not bool(torch.isfinite(error).all()):
        return Difference(float("inf"), float("inf"))
    tiny = 1e-30  # an all-zero reference allows no error, and divides by something
    rms = error.square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(tiny)
    return Difference(float(rms), float(error.abs().max() / expected.abs().max().clamp_min(tiny)))


def check_close(name: str, got: Tensor, expected: Tensor, tolerance: float | None = None) -> Difference:
    """Raises AssertionError when the relative RMS error exceeds the tolerance of `got`'s dtype; returns the difference.

    The worst element may be 20 times the tolerance away, relative to the largest magnitude.
    """
    tolerance = TOLERANCE[got.dtype] if tolerance is None else tolerance
    found = difference(got, expected)
    if not (found.rms <= tolerance and found.worst <= 20 * tolerance):
        raise AssertionError(
            f"{name}: relative RMS error {found.rms:.2e}, worst element {found.worst:.2e}, allowed {tolerance:.0e}"
        )
    return found


def gated_delta_rule_inputs(
    B: int = 1,
    T: int = 64,
    Hk: int = 1,
    H: int = 1,
    K: int = 32,
    V: int = 64,
    dtype: torch.dtype = torch.float32,
    decay: str = "usual",
    correlated: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """{q, k, v, g, beta} for `gated_delta_rule`.

    decay: "usual" (a trained model's spread), "none" (g = 0), "weak" (-1e-3) or "strong" (-20).
    correlated: keys share a large common part, so that a missing delta correction shows; with independent keys and
        strong decay it moves the output by a few per cent only.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    k = normal(B, T, Hk, K)
    if correlated:
        k = 0.3 * k + normal(1, 1, Hk, K)
    if decay == "usual":
        g = -torch.nn.functional.softplus(normal(B, T, H)) * torch.rand(H, generator=generator)
    else:
        g = torch.full((B, T, H), {"none": 0.0, "weak": -1e-3, "strong": -20.0}[decay])
    out = {"q": normal(B, T, Hk, K), "k": k, "v": normal(B, T, H, V), "g": g, "beta": torch.sigmoid(normal(B, T, H))}
    return {name: x.to(dtype) for name, x in out.items()}


def make_writes(
    generator: torch.Generator,
    B: int,
    T: int,
    H: int,
    Hl: int,
    K: int,
    V: int,
    R: int = 1,
    decay: float = 0.1,
    state: bool = False,
    cu: Tensor | None = None,
    edits: int = 0,
) -> Writes:
    """Writes for `encode`, float64 of values exactly representable in float32.

    Left factors are correlated, as keys are in trained models.

    Args:
        decay: scale of the log-decays, minus half-normal.
        state: with an initial state.
        cu: `[N + 1]` borders of packed sequences; B is then 1 and T their sum.
        edits: how many random edits, half of them at one place, every other one after its token's read.
    """
    from .edits import Edits
    from .writes import Writes

    N = B if cu is None else len(cu) - 1
    left = _normal(generator, B, T, Hl, R, K) + 2 * _normal(generator, 1, 1, Hl, 1, K)
    left = left / left.norm(dim=-1, keepdim=True)
    changes = None
    if edits:
        lengths = torch.tensor([T] * B) if cu is None else cu.diff()
        rows = lengths.nonzero().flatten()
        row = rows[torch.randint(len(rows), (edits,), generator=generator)]
        position = (torch.rand(edits, generator=generator) * lengths[row]).long()
        position[: edits // 2], row[: edits // 2] = position[0], row[0]  # many at one place
        head = torch.randint(H, (edits,), generator=generator)
        p, q = _normal(generator, edits, K), _normal(generator, edits, V)
        changes = Edits(row, position, head, p.float(), q.float(), when=torch.arange(edits) % 2)
    log_decay = -(_normal(generator, B, T, H).abs() * decay).float().double()
    right = _normal(generator, B, T, H, R, V).float().double()
    return Writes(
        log_decay, left.float().double(), right, cu_seqlens=cu, edits=changes,
        initial_state=_normal(generator, N, H, K, V).float().double() if state else None,
    )  # fmt: skip


def dictionary(generator: torch.Generator, Hs: int, F: int, K: int, V: int, r: int = 1) -> tuple[Tensor, ...]:
    """(v `[Hs, F, r, K]`, w `[Hs, F, r, V]`, b `[Hs, F]`), float64 of values exactly representable in float32."""
    shapes = (Hs, F, r, K), (Hs, F, r, V), (Hs, F)
    return tuple(_normal(generator, *shape).float().double() for shape in shapes)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@contextmanager
def cpu_isa(name: str):
    """Runs CPU kernels with one instruction set ("avx512", "avx2" or "portable") inside the block."""
    before = torch.ops.writesae.cpu_isa("")
    torch.ops.writesae.cpu_isa(name)
    try:
        yield
    finally:
        torch.ops.writesae.cpu_isa(before)


@contextmanager
def cpu_bf16(name: str):
    """Multiplies bfloat16 by one means ("amx", "avx512_bf16", "tiles" or "rounded") inside the block."""
    torch.ops.writesae.cpu_bf16(name)
    try:
        yield
    finally:
        torch.ops.writesae.cpu_bf16("best")


@contextmanager
def poisoned_memory():
    """Fresh tensors are filled with NaN inside the block, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
