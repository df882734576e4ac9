"""Random calls of the operators' kernels against their references in float64, and calls that must be refused.

`cases(seed)` yields (name, call) without end; a call raises `Defect` where a result is wrong or a refusal unclear.
Every case is made anew from (seed, number), which is what its name says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from writesae import ops
from writesae.edits import KINDS, WHENS, Edits
from writesae.ops.reference import causal_conv as conv_reference
from writesae.ops.reference import rms_norm as norm_reference
from writesae.testing import check_close, cpu_isa, dictionary, gated_delta_rule_inputs, make_writes, poisoned_memory

SIZES = (1, 2, 3, 5, 7, 8, 16, 31, 32, 33, 64, 65)
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 130)
ISA = ("avx512", "avx2", "portable")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Defect(AssertionError):
    """A wrong result, or an unclear refusal."""


def cases(seed: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Cases without end; the n-th is the same for the same seed."""
    n = 0
    while True:
        draw = random.Random(f"{seed} {n}")
        kind = draw.choice([_scan, _scan, _gradient, _encode, _encode, _conv, _norm, _refused])
        yield f"{kind.__name__[1:]} (seed {seed}, case {n})", lambda kind=kind, draw=draw: kind(draw)
        n += 1


def _seed(draw: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(draw.randrange(2**31))


def _strided(draw: random.Random, x: Tensor) -> Tensor:
    """The same numbers, perhaps laid out otherwise: a slice of a larger tensor, or transposed."""
    how = draw.randrange(4)
    if how == 0 and x.ndim >= 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == 1:
        wide = torch.full((*x.shape[:-1], x.shape[-1] * 2 + 1), float("nan"), dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x


def _cuts(draw: random.Random, T: int) -> Tensor:
    inner = sorted(draw.choices(range(T + 1), k=draw.randrange(1, 4)))  # empty sequences too
    return torch.tensor([0, *inner, T])


def _edits(draw: random.Random, lengths: list[int], H: int, K: int, V: int) -> Edits | None:
    rows = [r for r, n in enumerate(lengths) if n]
    if not rows or draw.random() < 0.5:
        return None
    row = draw.choices(rows, k=draw.randrange(1, 9))
    position = [draw.randrange(lengths[r]) for r in row]
    head = [draw.randrange(H) for _ in row]
    generator = _seed(draw)
    left, right = (torch.randn(len(row), n, generator=generator) for n in (K, V))
    return Edits(row, position, head, left, right, draw.choices(KINDS, k=len(row)), draw.choices(WHENS, k=len(row)))


def _scan_case(draw: random.Random, rule: str = "gated_delta_rule"):
    """(inputs, options) of a rule's public function."""
    Hk = draw.choice((1, 1, 2, 3))
    H, T = Hk * draw.choice((1, 1, 2, 4)), draw.choice(LENGTHS)
    packed = draw.random() < 0.3
    B = 1 if packed else draw.choice((1, 1, 2, 3))
    K, V = draw.choice(SIZES), draw.choice(SIZES)
    x = gated_delta_rule_inputs(
        B, T, Hk, H, K, V, draw.choice(DTYPES), draw.choice(("usual", "none", "weak", "strong")),
        draw.random() < 0.5, draw.randrange(2**31),
    )  # fmt: skip
    cu = _cuts(draw, T) if packed else None
    lengths = [T] * B if cu is None else cu.diff().tolist()
    state = torch.randn(len(lengths), H, K, V, generator=_seed(draw)) if draw.random() < 0.5 else None
    options: dict = dict(cu_seqlens=cu, edits=_edits(draw, lengths, H, K, V), initial_state=state)
    if rule == "ssd":
        skip = {} if draw.random() < 0.5 else {"D": torch.randn(H, generator=_seed(draw))}
        rates = {"A": -torch.rand(H, generator=_seed(draw)) * draw.choice((1e-3, 1.0, 20.0))}
        return {"x": x["v"], "dt": x["beta"].float(), **rates, "B": x["k"], "C": x["q"], **skip}, options
    if draw.random() < 0.3:
        x["g"] = x["g"][..., None] * torch.rand(H, K, generator=_seed(draw)).to(x["g"])
    return x, options | dict(use_qk_l2norm=draw.random() < 0.7, scale=draw.choice((None, 1.0, 0.3)))


def _wide(x: dict, options: dict) -> tuple[dict, dict]:
    state = options["initial_state"]
    state = None if state is None else state.double()
    return {n: v.double() for n, v in x.items()}, {**options, "initial_state": state}


def _blown_up(expected: Tensor) -> bool:
    """Without normalised keys the rule itself may grow beyond all bounds; then no error is meaningful."""
    return not bool(torch.isfinite(expected).all()) or float(expected.detach().abs().max()) > 1e4


def _scan(draw: random.Random) -> None:
    rule = draw.choice(("gated_delta_rule", "gated_delta_rule", "ssd"))
    run = ops.RULES[rule].run
    x, options = _scan_case(draw, rule)
    with poisoned_memory(), cpu_isa(draw.choice(ISA)):
        got = run(
            **{n: _strided(draw, v) for n, v in x.items()}, **options, output_final_state=True, return_writes=True,
            backend="cpu",
        )  # fmt: skip
    wide, options = _wide(x, options)
    expected = run(**wide, **options, output_final_state=True, return_writes=True, backend="reference")
    if _blown_up(expected.final_state) or _blown_up(expected.o):
        return
    for name in ("o", "final_state"):
        a, b = getattr(got, name), getattr(expected, name)
        if float(b.abs().max()) >= torch.finfo(a.dtype).tiny:  # below it a half has few digits or none
            check_close(name, a, b)
    check_close("right", got.writes.right, expected.writes.right)


def _gradient(draw: random.Random) -> None:
    rule = draw.choice(("gated_delta_rule", "gated_delta_rule", "ssd"))
    x, options = _scan_case(draw, rule)
    if rule == "gated_delta_rule":
        options["use_qk_l2norm"] = True
    x = {n: v.float() for n, v in x.items()}
    weight = torch.randn(x["x" if rule == "ssd" else "v"].shape, generator=_seed(draw))
    found = []
    for backend, wide in (("cpu", False), ("reference", True)):
        inputs, rest = _wide(x, options) if wide else (x, options)
        leaves = {n: v.clone().requires_grad_() for n, v in inputs.items()}
        out = ops.RULES[rule].run(**leaves, **rest, backend=backend)
        found.append(torch.autograd.grad((out.o * weight.to(out.o.dtype)).sum(), list(leaves.values())))
        if wide and _blown_up(out.o):
            return
    for name, got, expected in zip(x, *found, strict=True):
        # Of a key of one or two numbers, normalising leaves next to nothing of the gradient but rounding.
        if name not in ("q", "k") or x["q"].shape[-1] >= 5:
            check_close(f"gradient of {name}", got, expected, 1e-4)


def _encode(draw: random.Random) -> None:
    Hl = draw.choice((1, 2))
    H, T, K, V = Hl * draw.choice((1, 2)), draw.choice(LENGTHS), draw.choice(SIZES), draw.choice(SIZES)
    F, r, generator = draw.choice((1, 3, 17, 40, 70)), draw.choice((1, 1, 2)), _seed(draw)
    cu = _cuts(draw, T) if draw.random() < 0.3 else None
    writes = make_writes(
        generator, 1 if cu is not None else draw.choice((1, 2)), T, H, Hl, K, V, decay=draw.choice((0.0, 0.1, 5.0)),
        state=draw.random() < 0.4, cu=cu, edits=draw.choice((0, 0, 6)),
    )  # fmt: skip
    heads = draw.choice((None, [H - 1], [0, H - 1]))
    v, w, b = dictionary(generator, H if heads is None else len(heads), F, K, V, r)
    mode = dict(threshold=draw.choice((0.0, 0.5))) if draw.random() < 0.3 else dict(k=draw.randrange(1, F + 1))
    narrow = [x.float() for x in (v, w, b)]
    with poisoned_memory(), cpu_isa(draw.choice(ISA)):
        got = ops.encode(writes.to(torch.float32), *narrow, heads=heads, backend="cpu", **mode)
    expected = ops.encode(writes, v, w, b, heads=heads, backend="reference", **mode)
    scale = max(float(expected.carry.abs().max()), float(expected.values.abs().max()) if expected.values.numel() else 0)
    limit = 4e-6 * max(scale, 1e-3)
    if float((got.carry - expected.carry).abs().max()) > limit:
        raise Defect("carry")
    if expected.offsets is None:
        if float((got.values - expected.values).abs().max()) > limit:
            raise Defect("values")
        if not bool((got.indices.sort(-1).values.diff(dim=-1) > 0).all()):
            raise Defect("an index twice in one token")
    elif abs(len(got.values) - len(expected.values)) > 1 + 1e-3 * len(expected.values):
        raise Defect(f"{len(got.values)} codes above the threshold, expected {len(expected.values)}")


def _conv(draw: random.Random) -> None:
    B, T, D, W = draw.choice((1, 2)), draw.choice(LENGTHS), draw.choice(SIZES), draw.choice((1, 2, 3, 4, 5))
    generator, dtype = _seed(draw), draw.choice(DTYPES)
    cu = _cuts(draw, T) if B == 1 and draw.random() < 0.4 else None
    x, weight = (torch.randn(*s, generator=generator).to(dtype) for s in ((B, T, D), (D, W)))
    bias = torch.randn(D, generator=generator).to(dtype) if draw.random() < 0.5 else None
    activation = draw.choice((None, "silu"))
    with poisoned_memory(), cpu_isa(draw.choice(ISA)):
        got = ops.causal_conv(_strided(draw, x), weight, bias, activation, cu, "cpu")
    # Rounded in the same places, before the activation and after.
    check_close("causal_conv", got, conv_reference.causal_conv(x, weight, bias, activation, cu))


def _norm(draw: random.Random) -> None:
    rows, D, dtype, generator = draw.choice((1, 2, 33)), draw.choice(SIZES), draw.choice(DTYPES), _seed(draw)
    x, gate = (torch.randn(rows, D, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(D, generator=generator).to(dtype)
    settings = dict(eps=draw.choice((1e-6, 1e-5)), zero_centred=draw.random() < 0.5)
    gate = gate if draw.random() < 0.5 else None
    with poisoned_memory(), cpu_isa(draw.choice(ISA)):
        got = ops.rms_norm(_strided(draw, x), weight, gate, **settings, backend="cpu")
    check_close("rms_norm", got, norm_reference.rms_norm(x, weight, gate, **settings))  # rounded in the same places


_BAD = (
    None, 3, 1.5, "x", [1.0, 2.0], torch.zeros(0), torch.zeros(3), torch.zeros(1, 2, 3), torch.zeros(1, 4, 1, 8).long(),
    torch.zeros(1, 4, 1, 8, dtype=torch.complex64), torch.zeros(1, 4, 1, 8).to_sparse(), torch.zeros(1, 4, 1, 9),
    torch.zeros(2, 4, 1, 8), torch.zeros(1, 4, 1, 8, device="meta"), torch.zeros(1, 4, 1, 8).bool(),
)  # fmt: skip


def _refused(draw: random.Random) -> None:
    """One argument is something else: either the call is right after all, or a ValueError names the argument."""
    x = gated_delta_rule_inputs(1, 4, 1, 1, 8, 8)
    name, bad = draw.choice((*x, "initial_state", "cu_seqlens")), draw.choice(_BAD)
    if bad is None and name not in x:
        return
    try:
        ops.gated_delta_rule(**{**x, name: bad})
    except ValueError as error:
        if name not in str(error) and not any(other in str(error) for other in x):
            raise Defect(f"{name}={_short(bad)}: the refusal names no argument: {error}") from None
    except Exception as error:
        raise Defect(f"{name}={_short(bad)}: {type(error).__name__}: {error}") from error
    else:
        if not isinstance(bad, Tensor) or bad.shape != x.get(name, torch.zeros(1, 1, 8, 8)).shape:
            if name in x and not isinstance(bad, Tensor):
                raise Defect(f"{name}={_short(bad)} was taken")


def _short(value) -> str:
    return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
