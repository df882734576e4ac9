"""Every operator under every transform of torch: equal to the float64 reference, or refused by name. An operator or a
public function without an entry here fails."""

from __future__ import annotations

import inspect
import warnings
from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from transform_cases import (
    CASES,
    TOLERANCE,
    TOP,
    TRANSFORMS,
    B,
    F,
    H,
    K,
    T,
    V,
    along,
    backward,
    floats,
    forward_ad,
    grad,
    graded,
    jvp,
    loop,
    loop_of_one,
    value,
    vmap,
    vmap_of_one,
)

from writesae import ops
from writesae.edits import Edits
from writesae.testing import check_close, dictionary, gated_delta_rule_inputs, make_writes
from writesae.writes import Writes


@pytest.mark.filterwarnings("ignore:.*running the slow")
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda x: x.__name__)
@pytest.mark.parametrize("name", CASES)
def test_derivatives_and_maps(name, transform):
    case = CASES[name]

    def kernel(*inputs):
        return case.run(None, *inputs)

    refusal = case.refused.get(transform.__name__)
    if refusal is not None:
        with pytest.raises(RuntimeError, match=refusal):
            transform(kernel, case.inputs)
        return
    got = transform(kernel, case.inputs)
    wide = tuple(x.double() for x in case.inputs)
    expected = TRANSFORMS[transform](lambda *inputs: case.run("reference", *inputs), wide)
    if isinstance(got, torch.Tensor):
        got, expected = (got,), (expected,)
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        check_close(f"{name}, {transform.__name__}, {i}", a, b.detach(), TOLERANCE)


# ---- tracing, autocast, tensors that are more than tensors ----------------------------------------------------------


def compiled(f, inputs):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")(*inputs)


class _Module(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *inputs):
        return self.f(*inputs)


def exported(f, inputs):
    return torch.export.export(_Module(f), inputs).module()(*inputs)


def meta(f, inputs):
    return f(*(x.to("meta") for x in inputs))


def fake(f, inputs):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return f(*(mode.from_tensor(x) for x in inputs))


def autocast(dtype):
    def call(f, inputs):
        with torch.autocast("cpu", dtype):
            return f(*inputs)

    return call


def autocast_backward(f, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        return backward(f, inputs)


class _Named(torch.Tensor):
    """A subclass that does nothing."""


def subclass(f, inputs):
    return f(*(x.as_subclass(_Named) for x in inputs))


class _Wrapper(torch.Tensor):
    """A subclass that holds its tensor, and runs every operator on that."""

    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(
            cls, inside.shape, dtype=inside.dtype, device=inside.device, strides=inside.stride()
        )  # fmt: skip

    def __init__(self, inside):
        self.inside = inside

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        def bare(x):
            return x.inside if isinstance(x, _Wrapper) else x

        found = operator(*tree_map(bare, args), **tree_map(bare, kwargs or {}))
        return tree_map(lambda x: _Wrapper(x) if isinstance(x, torch.Tensor) else x, found)


def wrapper(f, inputs):
    return tuple(x.inside for x in f(*map(_Wrapper, inputs)))


OTHERS = {
    "compiled": compiled, "exported": exported, "meta": meta, "fake": fake, "subclass": subclass, "wrapper": wrapper,
    "autocast": autocast(torch.bfloat16), "autocast_float16": autocast(torch.float16),
    "autocast_reference": autocast(torch.bfloat16), "autocast_backward": autocast_backward,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*running the slow", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("transform", OTHERS)
@pytest.mark.parametrize("name", CASES)
def test_tracing_autocast_and_subclasses(name, transform):
    """Autocast in particular leaves dtypes and sums as they are."""
    case = CASES[name]

    def run(*inputs):
        return case.run("reference" if transform == "autocast_reference" else None, *inputs)

    if transform == "autocast_backward" and name == "dplr":
        return  # no kernel: torch's own backward of torch's own operations
    refusal = case.refused.get(transform)
    if refusal is None and transform == "autocast_backward":
        refusal = case.refused.get("backward")
    if refusal is not None:
        with pytest.raises(RuntimeError, match=refusal):
            OTHERS[transform](run, case.inputs)
        return
    wide = tuple(x.double() for x in case.inputs)
    reference = graded if "backward" in transform else value
    expected = reference(lambda *inputs: case.run("reference", *inputs), wide)
    got = OTHERS[transform](run, case.inputs)
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == torch.float32 and a.shape == b.shape
        if transform not in ("meta", "fake"):
            check_close(f"{name}, {transform}, {i}", a, b.detach(), TOLERANCE)


SCANS = tuple(
    name for name, rule in ops.RULES.items() if rule.limits and "element" not in rule.gates
)  # whose operators are alike


# ---- the operators themselves ---------------------------------------------------------------------------------------


def _operators() -> dict[str, torch._ops.OpOverload]:
    """All of torch.ops.writesae that take a tensor."""
    names = (x.split("::")[1] for x in torch._C._dispatch_get_all_op_names() if x.startswith("writesae::"))
    found = {name: getattr(torch.ops.writesae, name).default for name in names}
    return {n: op for n, op in found.items() if any("Tensor" in str(a.type) for a in op._schema.arguments)}


def _arguments_of() -> dict[str, tuple]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = tuple(gated_delta_rule_inputs(B, T, 1, H, K, V).values())
    state = normal(B, H, K, V)
    rule = (*x, 0.5, state, False, None, None, None, None, None)
    back = (normal(B, T, H, V), normal(B, T, H, V), normal(B, H, K, V), normal(B, T, 1, K), normal(B, T, H, V), None)
    step = (*(y[:, 0].contiguous() for y in x), state, 0.5, False, None, None, None, True)
    scans = {name: (*rule, True) for name in SCANS} | {f"{name}_backward": (*rule, *back) for name in SCANS}
    scans |= {f"{name}_step": step for name in SCANS}
    # With a gate of each channel, and a and b.
    channel = (*x[:3], -normal(B, T, H, K).abs(), x[4])
    erase, erased = (normal(B, T, H, K), normal(B, T, H, K) / 4), (normal(B, T, H, V), normal(B, T, H, V))
    low_rank = {"": (True, *erase), "_backward": (*back, *erase, *erased)}
    scans |= {f"dplr{suffix}": (*channel, *rule[5:], *rest) for suffix, rest in low_rank.items()}
    scans["dplr_step"] = (*(y[:, 0].contiguous() for y in channel), *step[5:], *(y[:, 0] for y in erase))
    mixed = (normal(B, T, V), normal(B, T, V).abs(), -normal(V, K).abs(), normal(B, T, K), normal(B, T, K), normal(V))
    initial, none_of_scan = normal(B, 1, K, V), (None,) * 5
    writes = make_writes(generator, B, T, H, 1, K, V)
    v, w, b = floats(*dictionary(generator, H, F, K, V))
    first = (*floats(writes.decay, writes.left, writes.right), torch.arange(H), v, w)
    carry, at = normal(B, H, F), torch.randint(F, (B, T, H, TOP), generator=generator)
    none = (None,) * 4
    return {
        **scans,
        "selective_scan": (*mixed, initial, *none_of_scan, True),
        "selective_scan_backward": (
            *mixed, initial, *none_of_scan, normal(B, T, V), normal(B, 1, K, V), normal(B, T, V), None,
        ),
        "selective_scan_step": (
            *(y[:, :1].contiguous() if y.ndim == 3 else y for y in mixed[:5]), initial, mixed[5], *[None] * 3, True,
        ),
        "causal_conv": (normal(B, T, 4), normal(4, 3), normal(4), True, None),
        "rms_norm": (normal(B, 4), normal(4), normal(B, 4), 1e-6, False, False),
        "encode_topk": (*first, b, TOP, carry, *none, "fp32"),
        "encode_threshold": (*first, b, torch.full((H, F), 0.5), carry, *none, "fp32"),
        "encode_at": (*first, at, carry, *none),
        "encode_backward": (*first, at, normal(*at.shape), *none),
        "encode_writes_backward": (*first, at, normal(*at.shape), None),
        "factored_loss": (
            *first[:4], normal(*at.shape), at, v, w, None, None, normal(B, T, H), state, None, None, None, True,
        ),
    }  # fmt: skip


RIGHT = "right"
OPERATORS = {  # forward mode, gradients of torch.func, gradients of torch.autograd, vmap
    **{name: (RIGHT, RIGHT, RIGHT, RIGHT) for name in SCANS},
    **{f"{name}_backward": ("no forward-mode", "no backward", "no backward", RIGHT) for name in SCANS},
    **{
        f"{name}_step": ("no forward-mode", "no backward", "no backward", "not defined under vmap")
        for name in (*SCANS, "selective_scan")
    },
    "selective_scan": (RIGHT, RIGHT, RIGHT, RIGHT),
    "selective_scan_backward": ("no forward-mode", "no backward", "no backward", RIGHT),
    "causal_conv": (RIGHT, RIGHT, "no backward", RIGHT),
    "rms_norm": (RIGHT, RIGHT, "no backward", RIGHT),
    "encode_topk": ("no forward-mode", "no backward", "no backward", RIGHT),
    "encode_threshold": ("no forward-mode", "no backward", "no backward", "not defined under vmap"),
    "encode_at": ("no forward-mode", "no backward", "no backward", RIGHT),
    "encode_backward": ("no forward-mode", "no backward", "no backward", RIGHT),
    "encode_writes_backward": ("no forward-mode", "no backward", "no backward", RIGHT),
    "factored_loss": ("no forward-mode", "no backward", "no backward", RIGHT),
}


def test_every_operator_has_an_entry():
    assert set(_operators()) == set(OPERATORS) == set(_arguments_of())


def test_every_public_function_has_an_entry():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert functions == {name.split(",")[0] for name in CASES} | {"first_nonfinite"}


def _of_floats(name, integers=True):
    """(operator of its floating arguments alone, these). integers: whether it returns those too."""
    operator, arguments = _operators()[name], _arguments_of()[name]
    which = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.is_floating_point()]

    def call(*inputs):
        full = list(arguments)
        for i, x in zip(which, inputs, strict=True):
            full[i] = x
        found = operator(*full)
        found = (found,) if isinstance(found, torch.Tensor) else found
        kept = (x for x in found if integers or x.is_floating_point())
        return tuple(x for x in kept if x.numel())  # what was not asked for comes out empty

    return call, tuple(arguments[i] for i in which)


def _reference_of(scan: str):
    """The operator of a rule by its reference, on what has a gradient."""
    reference = getattr(import_module(f"writesae.ops.reference.{scan}"), scan)
    if scan == "dplr":
        none = [None] * 3

        def low_rank(q, k, v, g, beta, s, a, b):
            found = reference(q, k, v, g, beta, 0.5, s, False, *none, a, b)
            return *found[:4], found[5]

        return low_rank
    return lambda q, k, v, g, beta, s: reference(q, k, v, g, beta, 0.5, s, False, *[None] * 3)[:4]


def _selective_reference(*inputs):
    o, final, _, right, _ = import_module("writesae.ops.reference.selective_scan").selective_scan(*inputs, *[None] * 3)
    return o, final, right[:, :, 0, 0]


@pytest.mark.filterwarnings("ignore:.*running the slow")
@pytest.mark.parametrize("asked", range(3), ids=("forward", "func", "autograd"))
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_differentiate_or_refuse(name, asked):
    """Right means: as the public function, whose reference the tests above know."""
    call, inputs = _of_floats(name, integers=False)
    transform = (forward_ad, grad, backward)[asked]
    if OPERATORS[name][asked] is not RIGHT:
        for one in range(len(inputs)):  # each alone: a guard must look at all

            def alone(x, one=one):
                return call(*(x if i == one else y for i, y in enumerate(inputs)))

            with pytest.raises(RuntimeError, match=f"writesae::{name}: {OPERATORS[name][asked]}"):
                transform(alone, (inputs[one].clone(),))
        return
    got = transform(call, inputs)
    plain = {
        **{scan: _reference_of(scan) for scan in SCANS},
        "selective_scan": _selective_reference,
        "causal_conv": lambda *y: (ops.causal_conv(*y, "silu", backend="reference"),),
        "rms_norm": lambda *y: (ops.rms_norm(*y, backend="reference"),),
    }[name]
    expected = (along(value) if transform is forward_ad else graded)(plain, tuple(x.double() for x in inputs))
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        check_close(f"{name}, {i}", a, b, TOLERANCE)


def _outputs(out):
    return out.o, out.final_state, out.writes.left[:, :, :, 0], out.writes.right[:, :, :, 0]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_under_vmap(name):
    """Every argument mapped, and each one alone, gives what a loop gives, to the bit."""
    call, inputs = _of_floats(name)
    if OPERATORS[name][3] is not RIGHT:
        with pytest.raises(RuntimeError, match=f"writesae::{name}: {OPERATORS[name][3]}"):
            vmap(call, inputs)
        return
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"writesae::{name}", "CPU"):  # of CUDA alone: its sizes
        inputs = tuple(x.to("meta") for x in inputs)
        assert [x.shape[1:] for x in vmap(call, inputs)] == [x.shape for x in call(*inputs)]
        return
    for transform, reference in ((vmap, loop(value)), (vmap_of_one, loop_of_one)):
        for a, b in zip(transform(call, inputs), reference(call, inputs), strict=True):
            assert torch.equal(a, b)


def test_second_derivatives_are_never_lost():
    """A loss whose gradient is a constant hides a second derivative from torch's once_differentiable."""
    *trace, v, w, b = CASES["encode"].inputs
    v, w = v.requires_grad_(), w.clone().requires_grad_()
    writes = Writes(*trace[:3], initial_state=trace[3])
    (first,) = torch.autograd.grad(ops.encode(writes, v, w, b, k=TOP).values.sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="encode is once_differentiable"):
        first.square().sum().backward()
    v.requires_grad_(False)


@pytest.mark.parametrize("name", [*SCANS, "gated_delta_rule, channel gate", "encode", "factored_loss", "training_loss"])
def test_backward_passes_mapped(name):
    """torch.autograd.functional.jacobian(vectorize=True) maps the backward pass alone."""
    case = CASES[name]
    inputs = [x.clone().requires_grad_() for x in case.inputs]
    (y, *_) = case.run(None, *inputs)
    grads = torch.eye(y.numel()).view(-1, *y.shape)[:3]
    if not name.startswith(SCANS):
        with pytest.raises(RuntimeError, match="no vmap of a backward pass"):
            torch.autograd.grad(y, inputs, grads, is_grads_batched=True)
        return
    got = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(y, inputs, g, retain_graph=True) for g in grads]
    for a, *b in zip(got, *expected, strict=True):
        assert torch.equal(a, torch.stack(b))


@pytest.mark.parametrize("name", ["gated_delta_rule", "encode", "activations", "factored_loss", "training_loss"])
@pytest.mark.filterwarnings("ignore:.*running the slow", "ignore::DeprecationWarning")
def test_compiled_gradients(name):
    """A compiled function is differentiated by the same kernels, or torch.compile says what it cannot trace."""
    case = CASES[name]

    def run(*inputs):
        return case.run(None, *inputs)

    torch._dynamo.reset()
    f = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(backward(f, case.inputs), backward(run, case.inputs), strict=True):
        check_close(name, a, b, TOLERANCE)


@pytest.mark.filterwarnings("ignore:.*running the slow", "ignore::DeprecationWarning")
def test_compiled_forward_mode():
    """A jvp inside torch.compile raises no level of torch.autograd.forward_ad; the operator must see it."""
    case = CASES["gated_delta_rule"]

    def run(*inputs):
        return case.run(None, *inputs)

    torch._dynamo.reset()
    got = torch.compile(lambda *x: jvp(run, x), fullgraph=True, backend="aot_eager")(*case.inputs)
    for a, b in zip(got, jvp(run, case.inputs), strict=True):
        check_close("compiled jvp", a, b, TOLERANCE)


def test_writes_under_autocast():
    *trace, _, _, _ = CASES["encode"].inputs
    writes = Writes(*trace[:3], initial_state=trace[3])
    edit = Edits.add(0, 1, 0, torch.randn(K), torch.randn(V))
    for ask in (
        lambda: writes.states([1, 4]), writes.norms, lambda: writes.cosine((edit.left[0], edit.right[0])),
        lambda: writes.propagate(edit),
    ):  # fmt: skip
        plain = ask()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ask(), plain)


def test_first_nonfinite():
    """It looks at numbers: it refuses where there are none or too many."""
    right = torch.zeros(B, T, H, V)
    right[1, 2, 0] = torch.nan
    assert ops.first_nonfinite(right) == (1, 2, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.first_nonfinite(right) == (1, 2, 0)
    for call in (
        lambda: ops.first_nonfinite(right.to("meta")),
        lambda: torch.vmap(lambda x: x * (ops.first_nonfinite(x) is None))(torch.stack([right, right])),
        lambda: fake(ops.first_nonfinite, (right,)),
        lambda: compiled(ops.first_nonfinite, (right,)),
    ):
        with pytest.raises(RuntimeError, match="first_nonfinite: the numbers of right are needed"):
            call()


def test_slow_paths_say_so_once():
    from writesae.ops import _dispatch

    _dispatch._said.clear()
    case = CASES["gated_delta_rule"]
    with pytest.warns(RuntimeWarning, match="gated_delta_rule: running the slow plain torch formula"):
        jvp(lambda *x: case.run(None, *x), case.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jvp(lambda *x: case.run(None, *x), case.inputs)
