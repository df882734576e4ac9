"""What is no dense floating tensor is refused by name wherever an operator wants one, in one form of words; so are the
numbers of `Edits`. Reprs are short, and `Firings` go to pandas."""

from __future__ import annotations

import inspect
import sys

import numpy as np
import pytest
import torch

from writesae import SAE, Edits, Firings, ops
from writesae.testing import dictionary, gated_delta_rule_inputs, make_writes
from writesae.writes import Writes

B, T, H, K, V, F, TOP = 2, 5, 2, 4, 3, 6, 2

NO_TENSORS = {
    "None": None, "list": [1.0, 2.0], "numpy": np.zeros(3, np.float32), "int": 3, "text": "x", "object": object(),
}  # fmt: skip
NO_FLOATS = {
    "int64": torch.zeros(2, 3, dtype=torch.int64), "bool": torch.zeros(2, dtype=torch.bool),
    "complex": torch.zeros(2, dtype=torch.complex64), "float8": torch.zeros(2).to(torch.float8_e4m3fn),
    "sparse": torch.eye(3).to_sparse(), "quantized": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
    "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "jagged": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
}  # fmt: skip
NO_INTEGERS = {
    "float32": torch.zeros(2), "bool": torch.zeros(2, dtype=torch.bool), "sparse": torch.eye(3).long().to_sparse(),
    "complex": torch.zeros(2, dtype=torch.complex64),
}  # fmt: skip


def _calls() -> dict[str, tuple]:
    """{function: (good arguments, floating ones, integer ones, those that may be None)}."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = gated_delta_rule_inputs(B, T, 1, H, K, V)
    state = normal(B, H, K, V)
    writes = make_writes(generator, B, T, H, 1, K, V).to(torch.float32)
    v, w, b = (y.float() for y in dictionary(generator, H, F, K, V))
    at = torch.randint(F, (B, T, H, TOP), generator=generator)
    encoder = {"v_enc": v, "w_enc": w, "b_enc": b}
    pursued = {"v_enc": v[0], "w_enc": w[0], "v_dec": v[0], "w_dec": w[0]}
    one = {name: y[:1] for name, y in x.items()}
    packed = {"initial_state": state[:1], "cu_seqlens": torch.tensor([0, T])}
    mixed = {"x": normal(1, T, V), "dt": normal(1, T, V).abs(), "A": -normal(V, K).abs(), "B": normal(1, T, K)}
    mixed |= {"C": normal(1, T, K), "D": normal(V)}
    channel = gated_delta_rule_inputs(1, T, H, H, K, V)
    rule = {n: channel[n] for n in ("q", "k", "v")} | {"g": -normal(1, T, H, K).abs()}
    rule |= {"a": normal(1, T, H, K), "b": normal(1, T, H, K)}
    mamba = {"x": normal(1, T, H, V), "dt": normal(1, T, H).abs(), "A": -normal(H).abs(), "B": normal(1, T, 1, K)}
    mamba |= {"C": normal(1, T, 1, K), "D": normal(H)}
    return {
        "gated_delta_rule": (
            one | packed, (*x, "initial_state"), ("cu_seqlens",), ("initial_state", "cu_seqlens"),
        ),
        "gated_delta_rule_step": (
            {n: y[:, 0].contiguous() for n, y in x.items()} | {"state": state.clone()}, (*x, "state"), (), (),
        ),
        "first_nonfinite": ({"right": normal(B, T, H, V)}, ("right",), (), ()),
        "causal_conv": (
            {"x": normal(1, T, 4), "weight": normal(4, 3), "bias": normal(4), "cu_seqlens": torch.tensor([0, T])},
            ("x", "weight", "bias"), ("cu_seqlens",), ("bias", "cu_seqlens"),
        ),
        "rms_norm": (
            {"x": normal(B, 4), "weight": normal(4), "gate": normal(B, 4)}, ("x", "weight", "gate"), (), ("gate",),
        ),
        "encode": (
            {"writes": writes, **encoder, "k": TOP, "carry": normal(B, H, F)}, (*encoder, "carry"), (),
            ("b_enc", "carry"),
        ),
        "activations": (
            {"writes": writes, "v": v, "w": w, "b": b, "indices": at, "initial_state": state},
            ("v", "w", "b", "initial_state"), ("indices",), ("b", "initial_state"),
        ),
        "pursuit": (
            {"left": normal(T, 1, K), "right": normal(T, 1, V), **pursued, "k": TOP},
            ("left", "right", *pursued), (), (),
        ),
        "factored_loss": (
            {"writes": writes, "values": normal(*at.shape), "indices": at, "v_dec": v, "w_dec": w,
             "bias": normal(H, K, V), "initial_state": state},
            ("values", "v_dec", "w_dec", "bias", "initial_state"), ("indices",), ("bias", "initial_state"),
        ),
        "training_loss": (
            {"writes": writes, **encoder, "v_dec": v, "w_dec": w, "offset": normal(H, K, V), "k": TOP,
             "weight": normal(B, T)},
            (*encoder, "v_dec", "w_dec", "offset", "weight"), (), ("b_enc", "offset", "weight"),
        ),
        "ssd": (
            mamba | packed, (*mamba, "initial_state"), ("cu_seqlens",), ("D", "initial_state", "cu_seqlens"),
        ),
        "ssd_step": (
            {n: y if n in "AD" else y[:, 0].contiguous() for n, y in mamba.items()} | {"state": state[:1].clone()},
            (*mamba, "state"), (), ("D",),
        ),
        "dplr": (
            rule | packed, (*rule, "initial_state"), ("cu_seqlens",), ("initial_state", "cu_seqlens"),
        ),
        "dplr_step": (
            {n: y[:, 0].contiguous() for n, y in rule.items()} | {"state": state[:1].clone()}, (*rule, "state"), (), (),
        ),
        "selective_scan": (
            mixed | packed | {"initial_state": state[:1, :1]}, (*mixed, "initial_state"), ("cu_seqlens",),
            ("D", "initial_state", "cu_seqlens"),
        ),
        "selective_scan_step": (
            {n: y if n in "AD" else y[:, 0].contiguous() for n, y in mixed.items()} | {"state": state[:1, :1].clone()},
            (*mixed, "state"), (), ("D",),
        ),
    }  # fmt: skip


CALLS = _calls()
ARGUMENTS = [(f, name, kind) for f, (_, floats, integers, _) in CALLS.items()
             for name, kind in [(x, "float") for x in floats] + [(x, "integer") for x in integers]]  # fmt: skip


def test_every_public_function_and_tensor_argument_is_here():
    assert set(CALLS) == {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    others = {"edits", "writes", "snapshots", "threshold", "mask", "heads"}  # below
    for name, (_, floats, integers, _) in CALLS.items():
        hints = {n: str(p.annotation) for n, p in inspect.signature(getattr(ops, name)).parameters.items()}
        tensors = {n for n, hint in hints.items() if "Tensor" in hint}
        missing = tensors - {*floats, *integers} - others
        assert missing <= ({"initial_state"} if name == "encode" else {"carry"}), f"{name}: {missing}"


@pytest.mark.filterwarnings("ignore:.*running the slow")
@pytest.mark.parametrize(("function", "name", "kind"), ARGUMENTS)
def test_what_is_no_such_tensor_is_refused(function, name, kind):
    good, _, _, optional = CALLS[function]
    getattr(ops, function)(**good)
    bad = NO_TENSORS | (NO_FLOATS if kind == "float" else NO_INTEGERS)
    for what, value in bad.items():
        if what == "None" and name in optional:
            continue
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got ") as found:
            getattr(ops, function)(**good | {name: value})
        assert len(str(found.value)) < 200, what
    if kind == "float" and function != "first_nonfinite":
        with pytest.raises(ValueError, match="^[a-z_A-Z.]+: expected a tensor on (cpu|meta), where .* is, got one on"):
            getattr(ops, function)(**good | {name: good[name].to("meta")})


@pytest.mark.parametrize("value", [None, [1], {}, torch.zeros(2), "x"], ids=str)
def test_what_is_no_writes_or_edits_is_refused(value):
    encoder, loss, train = (CALLS[x][0] for x in ("encode", "factored_loss", "training_loss"))
    chosen = CALLS["activations"][0]
    for call in (
        lambda: ops.encode(**encoder | {"writes": value}), lambda: ops.factored_loss(**loss | {"writes": value}),
        lambda: ops.training_loss(**train | {"writes": value}), lambda: ops.activations(**chosen | {"writes": value}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^writes: expected Writes, got "):
            call()
    if value is None:
        return
    for name in (*ops.RULES, *(f"{name}_step" for name in ops.RULES)):
        with pytest.raises(ValueError, match="^edits: expected Edits or None, got "):
            getattr(ops, name)(**CALLS[name][0], edits=value)


def test_other_arguments():
    rule, encoder, loss = (CALLS[x][0] for x in ("gated_delta_rule", "encode", "factored_loss"))
    bad = {
        "snapshots: expected integers, got float 1.5": lambda: ops.gated_delta_rule(**rule, snapshots=[1.5]),
        "snapshots: expected integers, got bool": lambda: ops.gated_delta_rule(**rule, snapshots=[True]),
        "snapshots: expected a tensor of integers": lambda: ops.gated_delta_rule(**rule, snapshots=torch.ones(1, 2)),
        "scale: expected a finite number or None, got str": lambda: ops.gated_delta_rule(**rule, scale="x"),
        "scale: expected a finite number or None, got float nan": lambda: ops.gated_delta_rule(**rule, scale=np.nan),
        "heads: expected integers, got float 0.5": lambda: ops.encode(**encoder, heads=[0.5, 1]),
        "threshold: expected a number or": lambda: ops.encode(**encoder, threshold="x"),
        "threshold: expected a floating dtype": lambda: ops.encode(**encoder, threshold=torch.zeros(H, F).long()),
        "mask: expected a bool tensor .*, got None|list": lambda: ops.factored_loss(**loss, mask=[True]),
        "mask: expected a bool tensor .*, got a tensor": lambda: ops.factored_loss(**loss, mask=torch.ones(B, T)),
        "eps: expected a number >= 0, got None": lambda: ops.rms_norm(torch.zeros(2, 4), torch.ones(4), eps=None),
        "left: expected a tensor, got None": lambda: Writes(torch.zeros(1, 2, 3), None, torch.zeros(1, 2, 3, 1, 4)),
        "row: expected a tensor, got list": lambda: Firings(*([0],) * 6),
        "positions: expected integers": lambda: encoder["writes"].states([0.5]),
        "atom: expected a pair": lambda: encoder["writes"].cosine(torch.zeros(4)),
        r"atom\[1\]: expected a dense tensor": lambda: encoder["writes"].cosine((torch.zeros(K), None)),
        "edit: expected Edits": lambda: encoder["writes"].propagate(None),
    }
    for message, call in bad.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


# ---- Edits ----------------------------------------------------------------------------------------------------------


def test_edits_broadcast():
    p, q = torch.arange(1.0, 5), torch.arange(3.0)
    one = Edits.add(0, [3, 5, 7], head=1, left=p, right=q)
    assert len(one) == 3 and one.row.tolist() == [0, 0, 0] and one.position.tolist() == [3, 5, 7]
    assert one.head.tolist() == [1, 1, 1] and torch.equal(one.left, p.expand(3, 4)) and one.right.shape == (3, 3)
    assert one.kind.tolist() == [0, 0, 0] and one.kind.dtype == torch.int8
    two = Edits.replace(torch.tensor([0, 1]), 2, 0, torch.stack([p, p]), q[None])
    assert two.kind.tolist() == [2, 2] and two.position.tolist() == [2, 2] and two.right.shape == (2, 3)
    gone = Edits.delete(-1, range(4), 1, 4, 3)
    assert gone.kind.tolist() == [1] * 4 and gone.row.tolist() == [-1] * 4 and gone.left.shape == (4, 4)
    assert len(Edits.delete([0], [0], [0], 4, 3)) == 1 and len(Edits.add([], [], [], p, q)) == 0
    assert len(Edits.cat([one, two, gone])) == 9 and one[torch.tensor([True, False, True])].position.tolist() == [3, 7]
    assert Edits(0, 1, 0, p, q, torch.tensor([2])).kind.tolist() == [2]
    assert Edits([0, 0], [1, 2], 0, p, q, ["add", "delete"]).kind.tolist() == [0, 1]
    assert Edits(np.int64(0), np.arange(2), np.array(1), p.numpy(), [1.0, 2.0]).position.tolist() == [0, 1]
    p.requires_grad_()
    Edits.add(0, [0, 1], 0, p, q).left.sum().backward()
    assert p.grad.tolist() == [2.0] * 4


def test_broadcast_edits_act_as_the_full_list():
    x = gated_delta_rule_inputs(B, T, 1, H, K, V)
    p, q = torch.randn(K), torch.randn(V)
    full = Edits([0, 0], [1, 3], [1, 1], torch.stack([p, p]), torch.stack([q, q]))
    for backend in (None, "reference"):
        a, b = (
            ops.gated_delta_rule(**x, edits=e, backend=backend).o for e in (full, Edits.add(0, [1, 3], 1, p, q))
        )  # fmt: skip
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("position: expected integers, got float 1.5", {"position": [0, 1.5]}),
        ("position: expected integers, got float 2.0", {"position": 2.0}),
        ("position: expected integers, got float nan", {"position": [float("nan")]}),
        ("position: expected integers, got bool True", {"position": True}),
        ("position: expected integers, got str 3", {"position": "3"}),
        ("position: expected integers, got list", {"position": [[1]]}),
        ("position: expected integers, got NoneType|None", {"position": None}),
        ("position: expected integers that fit in 64 bits, got 9223372036854775808", {"position": [2**63]}),
        ("position: expected a tensor of integers .n., got a tensor of torch.float32", {"position": torch.ones(2)}),
        ("position: expected a tensor of integers .n., got a tensor of torch.bool", {"position": torch.tensor([True])}),
        ("head: expected integers, got float 0.5", {"head": np.array([0.5])}),
        ("row: expected integers, got bool", {"row": np.array([True])}),
        ("row: expected integers, got ", {"row": [torch.tensor(1.5)]}),
        ("kind: expected one of add, delete, replace, got 'erase'", {"kind": "erase"}),
        ("kind: expected one of add, delete, replace, got 1", {"kind": ["add", 1]}),
        ("kind: expected codes 0 to 2, got 3 in edit 0", {"kind": torch.tensor([3], dtype=torch.int8)}),
        ("kind: expected codes 0 to 2, got -1", {"kind": [-1]}),
        ("kind: expected a tensor of integers", {"kind": torch.tensor([1.0])}),
        ("left: expected finite values, got a NaN or infinity in edit 0", {"left": torch.full((4,), torch.nan)}),
        ("right: expected finite values, got a NaN or inf.* in edit 1", {"right": torch.tensor([[0.0], [torch.inf]])}),
        ("left: expected numbers .*, got None", {"left": None}),
        ("left: expected a floating dtype, got torch.int64", {"left": [1, 2]}),
        ("left: expected a dense tensor", {"left": torch.eye(3).to_sparse()}),
        ("left: expected floating .E, size. or .size.", {"left": torch.zeros(1, 1, 2)}),
        ("right: expected a tensor on cpu", {"right": torch.zeros(3, device="meta")}),
        ("head: expected 3 entries, as position has, or one for all, got 2", {"position": [1, 2, 3], "head": [0, 1]}),
        ("left: expected 3 entries, as position has", {"position": [1, 2, 3], "left": torch.zeros(2, 4)}),
    ],
)  # fmt: skip
def test_edits_refuse(message, change):
    good = {"row": 0, "position": 1, "head": 0, "left": torch.zeros(4), "right": torch.zeros(3), "kind": "add"}
    Edits(**good)
    with pytest.raises(ValueError, match=f"^{message}"):
        Edits(**good | change)


def test_edits_refuse_sizes():
    for K_, V_, message in ((0, 3, "K: expected a size"), (4, 2.0, "V: expected a size"), (True, 3, "K: expected")):
        with pytest.raises(ValueError, match=message):
            Edits.delete(0, 0, 0, K_, V_)
    with pytest.raises(ValueError, match="parts: expected at least one Edits, got none"):
        Edits.cat([])


# ---- reprs, pandas --------------------------------------------------------------------------------------------------


def test_reprs_are_short():
    writes, encoder = CALLS["encode"][0]["writes"], CALLS["encode"][0]
    out = ops.gated_delta_rule(**gated_delta_rule_inputs(B, T, 1, H, K, V), return_writes=True)
    edits = Edits.cat([Edits.add(0, [3, 5], 1, torch.zeros(4), torch.zeros(3)), Edits.delete(-1, 2, 0, 4, 3)])
    assert repr(edits) == "Edits(2 add, 1 delete; row -1..0, position 2..5, head 0..1; K=4, V=3)"
    assert repr(edits[:0]) == "Edits(none; row none, position none, head none; K=4, V=3)"
    assert repr(writes) == "Writes(B=2, T=5, H=2, Hl=1, R=1, K=4, V=3; scalar gate, transition none, float32; 0.0 MB)"
    assert repr(out).startswith("RuleOutput(o=float32[2, 5, 2, 3], writes=Writes(B=2, ")
    codes = ops.encode(**encoder)
    assert repr(codes) == (
        "Codes(values=float32[2, 5, 2, 2], indices=int64[2, 5, 2, 2], carry=float32[2, 2, 6], heads=(0, 1))"
    )
    assert repr(ops.training_loss(**CALLS["training_loss"][0])).startswith("Step(loss=float32[], errors=float32[2, 5, ")
    assert repr(Firings.empty()) == "Firings(none)"
    assert repr(_firings()) == (
        "Firings(2; row 0..1, position 4, layer 7, head 2..3, feature 5..6; activation 0.5..1.25)"
    )
    sae = SAE(4, 3, 6, 2)
    assert repr(sae).startswith("SAE(bilinear, K=4, V=3, F=6, k=2")
    assert repr(sae.encode(torch.randn(5, 4, 3))) == "SparseCodes(values=float32[5, 2], indices=int64[5, 2])"
    for x in (edits, writes, out, codes, sae):
        assert "tensor(" not in repr(x) and len(repr(x)) < 250


def _firings() -> Firings:
    columns = ([0, 1], [4, 4], [7, 7], [2, 3], [5, 6], [0.5, 1.25])
    return Firings(*map(torch.tensor, columns))


def test_firings_to_pandas(monkeypatch):
    pytest.importorskip("pandas", reason="pandas is an extra")
    frame = _firings().to_pandas()
    assert list(frame.columns) == ["row", "position", "layer", "head", "feature", "activation"]
    assert frame.feature.tolist() == [5, 6] and frame.activation.dtype == np.float32 and frame.row.dtype == np.int32
    assert len(Firings.empty().to_pandas()) == 0
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_pandas: needs pandas: pip install writesae\[pandas\]"):
        _firings().to_pandas()
