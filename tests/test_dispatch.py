"""Which implementation runs: chosen and refused by one predicate, from the limits that each op declares."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

from writesae import ops
from writesae.ops import _dispatch
from writesae.testing import check_close, gated_delta_rule_inputs


@pytest.fixture(autouse=True)
def _unsaid(monkeypatch):
    monkeypatch.setattr(_dispatch, "_said", set())


def channel_inputs(T=9):
    x = gated_delta_rule_inputs(2, T, 1, 2, 8, 6)
    return x | {"g": -torch.rand(2, T, 2, 8)}


def test_every_op_declares_its_limits():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))} - {"first_nonfinite"}
    assert set(_dispatch.LIMITS) == functions
    for name, rule in ops.RULES.items():
        assert rule.name == name and rule.limits is _dispatch.LIMITS[name] and rule.run is getattr(ops, name)
        names = list(inspect.signature(rule.run).parameters)
        assert names[: len(rule.arguments)] == list(rule.arguments)
        rest = ("initial_state", "output_final_state", "cu_seqlens", "edits", "snapshots", "return_writes", "backend")
        assert [x for x in names[len(rule.arguments) :] if x in rest] == list(rest)
        for limits in rule.limits.values():
            assert set(limits.gradient) <= set(limits.gates) <= set(rule.gates)


def test_what_has_no_kernel_says_so():
    x, w = torch.randn(2, 4), torch.ones(4)
    for call, said in (
        (lambda b: ops.rms_norm(x, w, backend=b), "rms_norm has no {} kernel in this version"),
        (lambda b: ops.causal_conv(x[None], w[:, None], backend=b), "causal_conv has no {} kernel in this version"),
    ):
        for backend in ("twin", "cuda"):
            with pytest.raises(ValueError, match=f'backend="{backend}" cannot run this: {said.format(backend)}'):
                call(backend)
        with pytest.raises(ValueError, match="backend: expected one of reference, cpu, cuda or None, got 'gpu'"):
            call("gpu")


def test_a_library_built_before_an_op_has_no_kernel_of_it(monkeypatch):
    monkeypatch.setattr(_dispatch, "_built", {})
    x = gated_delta_rule_inputs(1, 3)
    with pytest.raises(ValueError, match="gated_delta_rule has no cpu kernel in this version"):
        ops.gated_delta_rule(**x, backend="cpu")
    with pytest.warns(RuntimeWarning, match="gated_delta_rule: running the slow .* gated_delta_rule has no cpu kernel"):
        assert torch.equal(ops.gated_delta_rule(**x).o, ops.gated_delta_rule(**x, backend="reference").o)


def test_sizes_that_a_kernel_does_not_take(monkeypatch):
    """Asked of the CUDA kernels as if they were here: a meta tensor has a shape for every backend."""
    monkeypatch.setattr(_dispatch, "backends", lambda: {"reference": None, "cpu": None, "cuda": None})
    for op in ("gated_delta_rule", "gated_delta_rule_step", "ssd", "encode", "factored_loss"):
        monkeypatch.setitem(_dispatch._built, (op, "cuda"), _dispatch.LIMITS[op]["cuda"])
    for op, name in (("gated_delta_rule", "k"), ("gated_delta_rule_step", "k"), ("ssd", "B"), ("encode", "right")):
        for size, fits in ((256, True), (257, False)):
            tensors = {"first": None, name: torch.empty(1, 2, 1, size, device="meta")}
            assert _dispatch.can_run("cuda", op, tensors) is fits
        with pytest.raises(ValueError, match=f"{op}: .* the last axis of {name} has 257 entries, expected at most 256"):
            _dispatch.can_run("cuda", op, tensors, raise_error=True)
        assert _dispatch.can_run("cpu", op, tensors)


def test_a_gate_that_a_kernel_does_not_take(monkeypatch):
    x = channel_inputs()
    limits = _dispatch.Limits("gated_delta_rule")
    monkeypatch.setitem(_dispatch._built, ("gated_delta_rule", "cpu"), limits)
    with pytest.raises(ValueError, match='backend="cpu" cannot run this: its kernel takes no channel gate'):
        ops.gated_delta_rule(**x, backend="cpu")
    with pytest.warns(RuntimeWarning, match="gated_delta_rule: running the slow .* takes no channel gate") as found:
        out = ops.gated_delta_rule(**x)
    assert torch.equal(out.o, ops.gated_delta_rule(**x, backend="reference").o)
    assert [w.filename for w in found] == [__file__]  # the line that led here, outside the package
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.gated_delta_rule(**x)  # said once


def test_a_gradient_that_a_kernel_does_not_have(monkeypatch):
    """The reference runs and says so; asked by name, the kernel refuses. Without a gradient it runs."""
    x = channel_inputs()
    limits = _dispatch.Limits("gated_delta_rule", gates=("scalar", "channel"))
    monkeypatch.setitem(_dispatch._built, ("gated_delta_rule", "cpu"), limits)
    asked = {name: value.clone().requires_grad_() for name, value in x.items()}
    with pytest.warns(RuntimeWarning, match="gated_delta_rule: running the slow .* no backward for a channel gate"):
        got = ops.gated_delta_rule(**asked).o
    expected = ops.gated_delta_rule(**asked, backend="reference").o
    for name, a, b in zip(asked, *(torch.autograd.grad(o.sum(), list(asked.values())) for o in (got, expected)),
                          strict=True):  # fmt: skip
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="no backward for a channel gate, and q asks for a gradient"):
        ops.gated_delta_rule(**asked, backend="cpu")
    with torch.no_grad():
        assert _dispatch.choose("gated_delta_rule", None, asked) == "cpu"


@pytest.mark.filterwarnings("ignore:.*running the slow")
@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("backend", ["reference", None])
def test_equal_channels_are_the_gate_of_a_head(backend, step):
    x, state = channel_inputs(), torch.randn(2, 2, 8, 6)
    x["g"] = x["g"][..., :1].expand(-1, -1, -1, 8)
    scalar = x | {"g": x["g"][..., 0]}
    with torch.no_grad():
        if not step:
            a, b = (
                ops.gated_delta_rule(**y, initial_state=state, output_final_state=True, use_qk_l2norm=True,
                                     return_writes=True, backend=backend) for y in (x, scalar)
            )  # fmt: skip
            check_close("right", a.writes.right, b.writes.right)
            check_close("final_state", a.final_state, b.final_state)
            assert a.writes.gate == "channel" and a.writes.transition == "delta"
        else:
            x, scalar = ({n: value[:, 0] for n, value in y.items()} for y in (x, scalar))
            states = state.clone(), state.clone()
            a, b = (
                ops.gated_delta_rule_step(**y, state=s, use_qk_l2norm=True, backend=backend)
                for y, s in zip((x, scalar), states, strict=True)
            )
            check_close("state", *states)
    check_close("o", a.o, b.o)


@pytest.mark.parametrize("shape", [(2, 9, 2, 7), (2, 9), (2, 9, 1, 8), (2, 9, 2, 8, 1)], ids=str)
def test_a_gate_of_another_shape_is_refused(shape):
    said = r"g: expected \[B=2, T=9, H=2\] or \[B=2, T=9, H=2, K=8\], got shape"
    with pytest.raises(ValueError, match=said):
        ops.gated_delta_rule(**channel_inputs() | {"g": torch.zeros(shape)})
