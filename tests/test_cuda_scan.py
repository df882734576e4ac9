"""The CUDA kernels of the scans whose rule is not the delta rule with a gate a head, by their operators, against the
recurrence token by token in float64: forward, step and backward. On the host twin and the GPU (see targets.py)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from test_gated_delta_rule import edits_for
from torch import Tensor

from writesae.edits import ADD, AFTER, DELETE, Edits
from writesae.ops._dispatch import operators
from writesae.ops.gated_delta_rule import pack_edits
from writesae.testing import DEVICE_TOLERANCE, TOLERANCE, check_close, gated_delta_rule_inputs, poisoned_memory


@dataclass(frozen=True)
class Rule:
    """operator: its name. reads: whether it erases what its key finds. channel: whether its gate is of each channel."""

    operator: str
    reads: bool
    channel: bool
    backward: bool = True
    alike: bool = True  # whether float16 is computed as such


RULES = {"ssd": Rule("ssd", False, False)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]


@pytest.fixture(params=[x for x in RULES if RULES[x].backward])
def trained(request):
    """A rule that has a backward."""
    return RULES[request.param]


def inputs(rule: Rule, B=1, T=64, Hk=1, H=1, K=32, V=64, norm=True, **options) -> dict[str, Tensor]:
    """q, k, v, g, beta; the gates of a rule that has one a channel differ from channel to channel."""
    x = gated_delta_rule_inputs(B, T, Hk, H, K, V, **options)
    if rule.channel:
        spread = torch.rand(B, T, H, K, generator=torch.Generator().manual_seed(7)) * 2
        x["g"] = (x["g"].float()[..., None] * spread).to(x["g"].dtype)
    if not norm:
        x["k"] = torch.nn.functional.normalize(x["k"].float(), dim=-1).to(x["k"].dtype)
    return x


def plain(
    rule: Rule, q, k, v, g, beta, scale=1.0, initial_state=None, norm=False, lengths=None, edits=None, places=None
) -> tuple[Tensor, ...]:
    """(o, final_state, left, right, snapshots) of the recurrence, token by token. `edits`: Edits, or with sides of their
    own as (Edits, left, right). `places`: [P, 2]."""
    B, T, H, V = v.shape
    K, group = k.shape[-1], H // k.shape[2]
    if norm:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    gate = (g if rule.channel else g[..., None].expand(*g.shape, K)).exp()
    starts = [(b, 0, T) for b in range(B)] if lengths is None else []
    for n in lengths or []:
        starts.append((0, sum(x[2] for x in starts), n))
    e, left, right = edits if isinstance(edits, tuple) else (edits, None, None)
    if e is not None and left is None:
        left, right = e.left.to(v), e.right.to(v)
    o, u, final, shots = {}, {}, [], {}
    for n, (b, origin, length) in enumerate(starts):
        for h in range(H):
            S = v.new_zeros(K, V) if initial_state is None else initial_state[n, h]
            for t in range(length):
                at, hk = origin + t, h // group
                S = gate[b, at, h, :, None] * S
                here = [] if e is None else [
                    i for i in range(len(e)) if (e.row[i], e.position[i], e.head[i]) == (n, t, h)
                ]  # fmt: skip
                removed = any(e.kind[i] != ADD and e.when[i] != AFTER for i in here)
                gone = any(e.kind[i] != ADD and e.when[i] == AFTER for i in here)
                value = v[b, at, h] - (k[b, at, hk] @ S if rule.reads else 0)
                u[b, at, h] = beta[b, at, h] * value * (0.0 if removed else 1.0)
                before = S
                for i in here:
                    if e.kind[i] != DELETE:
                        added = left[i][:, None] * right[i]
                        before, S = (before if e.when[i] == AFTER else before + added), S + added
                native = k[b, at, hk, :, None] * u[b, at, h]
                o[b, at, h] = scale * (before + native).T @ q[b, at, hk]
                S = S if gone else S + native
                if places is not None:
                    for i, (m, s) in enumerate(places.tolist()):
                        if (m, s) == (n, t):
                            shots[i, h] = S
            final.append(S)
    rows = lambda x: torch.stack([x[b, t, h] for b in range(B) for t in range(T) for h in range(H)]).view(B, T, H, V)  # noqa: E731
    count = 0 if places is None else len(places)
    stacked = [shots[i, h] for i in range(count) for h in range(H)]
    snapshots = torch.stack(stacked).view(count, H, K, V) if stacked else v.new_zeros(0, H, K, V)
    return rows(o), torch.stack(final).view(len(starts), H, K, V), k, rows(u), snapshots


def call(rule, target, x, scale=1.0, initial_state=None, norm=False, lengths=None, edits=None, places=None):
    """The operator on a target, on poisoned memory, from and to CPU tensors."""
    cu = None if lengths is None else torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    packed = (None, None, None) if edits is None else pack_edits(edits)
    args = [*x.values(), scale, initial_state, norm, cu, *packed, places, True]
    with poisoned_memory(), target.in_use():
        out = getattr(operators(target.kind), rule.operator)(*[put(target, y) for y in args])
    return [y.cpu() for y in out]


def put(target, x):
    return target.put(x) if isinstance(x, Tensor) else x


def allowed(rule, x, got):
    kinds = {x[name].dtype for name in "qkv"}
    type_ = kinds.pop() if len(kinds) == 1 else torch.float32
    if type_ == torch.float16 and not rule.alike:
        type_ = torch.float32
    return max(TOLERANCE[got.dtype], DEVICE_TOLERANCE[type_])


def compare(rule, x, targets, record=None, **options):
    found = [call(rule, target, x, **options) for target in targets]
    if options.get("initial_state") is not None:
        options["initial_state"] = options["initial_state"].double()
    expected = plain(rule, *(y.double() for y in x.values()), **options)
    for target, got in zip(targets, found, strict=True):
        assert got[0].dtype == x["v"].dtype
        for name, a, b in zip(("o", "final_state", "left", "right", "snapshots"), got, expected, strict=True):
            error = check_close(f"{name} of {rule} with {target.name}", a, b, allowed(rule, x, a))
            if record is not None:
                record(f"relative_rms {x['v'].dtype}", error.rms)
    return found


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 127])
def test_lengths(T, rule, device_targets, record_property):
    x = inputs(rule, 2, T, 2, 4, 24, 40, correlated=True)
    places = torch.tensor([[0, 0], [1, T // 2], [0, T - 1]])
    initial = torch.randn(2, 4, 24, 40)
    compare(rule, x, device_targets, record_property, norm=True, initial_state=initial, places=places, scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K, V", [(32, 32), (64, 136), (128, 128), (256, 72), (7, 5), (40, 33)])
def test_sizes(K, V, dtype, rule, device_targets, record_property):
    x = inputs(rule, 1, 70, 1, 2, K, V, dtype=dtype, correlated=True, norm=False)
    places = torch.tensor([[0, 3], [0, 63], [0, 64], [0, 69]])
    compare(rule, x, device_targets, record_property, edits=edits_for(1, [70], 2, K, V), places=places)


@pytest.mark.parametrize("decay", ["none", "weak", "usual", "strong"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decay(decay, dtype, rule, device_targets, record_property):
    x = inputs(rule, 1, 130, 1, 2, 64, 48, dtype=dtype, decay=decay, correlated=True)
    places = torch.tensor([[0, 127], [0, 129]])
    initial = torch.randn(1, 2, 64, 48)
    compare(rule, x, device_targets, record_property, norm=True, initial_state=initial, places=places)


def test_mixed_decay_is_exact(rule, device_targets, record_property):
    """Gates near one right after gates near nothing: differences of log-decays keep their last bits."""
    x = inputs(rule, 1, 128, 1, 1, 32, 32, decay="weak", correlated=True)
    x["g"][:, ::2] = -20 * torch.rand(x["g"][:, ::2].shape)
    x["g"][:, 5::16] = -120.0
    x["g"][:, 9::32] = -torch.inf
    compare(rule, x, device_targets, record_property, norm=True, initial_state=torch.randn(1, 1, 32, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_split(dtype, rule, device_targets, record_property):
    """Enough chunks for few heads that sequences are split over blocks; packed, with empty ones."""
    lengths = [0, 1, 1300, 65] if dtype == torch.float32 else [2200, 0, 1, 66]
    x = inputs(rule, 1, sum(lengths), 1, 1, 32, 24, dtype=dtype, decay="weak")
    edits = edits_for(4, lengths, 1, 32, 24, count=20)
    initial = torch.randn(4, 1, 32, 24)
    compare(rule, x, device_targets, record_property, norm=True, lengths=lengths, edits=edits, initial_state=initial)


@pytest.mark.parametrize("when", ["before", "after", ["after", "after", "before", "after"]], ids=str)
@pytest.mark.parametrize("position", [0, 31, 32, 63, 64, 128])
def test_edits_at_borders(position, when, rule, device_targets, record_property):
    kinds = ["add", "delete", "replace", "add"]
    edits = Edits([0] * 4, [position] * 4, [0] * 4, torch.randn(4, 32), torch.randn(4, 32), kinds, when)
    places = torch.tensor([[0, position], [0, 128]])
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs(rule, 1, 129, 1, 1, 32, 32, decay="weak", correlated=True, dtype=dtype)
        compare(rule, x, device_targets, record_property, norm=True, edits=edits, places=places)


def test_strided_and_mixed_types(rule, device_targets):
    x = inputs(rule, 2, 40, 1, 2, 24, 40)
    x = {name: torch.stack([y, y], 1)[:, 1] for name, y in x.items()} | {"v": x["v"].bfloat16()}
    assert not x["k"].is_contiguous() and not x["g"].is_contiguous()
    compare(rule, x, device_targets, norm=True)


def test_nothing_to_do(rule, device_targets):
    x = inputs(rule, 1, 0, 1, 2, 16, 24)
    initial = torch.randn(2, 2, 16, 24)
    for target in device_targets:
        assert torch.equal(call(rule, target, x, lengths=[0, 0], initial_state=initial)[1], initial)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K, V", [(32, 64), (7, 5), (128, 130), (256, 40)])
def test_step(K, V, dtype, rule, device_targets):
    """One token of every row, in place, with edits and without."""
    x = inputs(rule, 3, 1, 2, 6, K, V, dtype=dtype, correlated=True)
    initial = torch.randn(3, 6, K, V)
    for edits in (None, edits_for(3, [1, 1, 1], 6, K, V)):
        packed = (None, None, None) if edits is None else pack_edits(edits)
        expected = plain(
            rule, *(y.double() for y in x.values()), 0.3, initial_state=initial.double(), norm=True, edits=edits
        )
        for target in device_targets:
            state = target.put(initial.clone())
            args = [*(y[:, 0] for y in x.values()), state, 0.3, True, *packed, True]
            with poisoned_memory(), target.in_use():
                step = getattr(operators(target.kind), f"{rule.operator}_step")
                o, left, right = (y.cpu() for y in step(*[put(target, y) for y in args]))
            for name, a, b in zip(
                ("o", "state", "left", "right"),
                (o, state.cpu(), left, right),
                (expected[0][:, 0], expected[1], expected[2][:, 0], expected[3][:, 0]),
                strict=True,
            ):
                check_close(f"{name} with {target.name}", a, b, TOLERANCE[a.dtype])


def gradients(rule, target, x, initial_state=None, norm=False, lengths=None, edits=None, places=None):
    """{name: gradient} of a sum of everything the scan returns, with weights of its own; `target` None: by the plain
    recurrence in float64."""
    wide = target is None
    x = {name: (y.double() if wide else y).clone().requires_grad_(wide) for name, y in x.items()}
    initial = None if initial_state is None else (initial_state.double() if wide else initial_state).clone()
    if wide and initial is not None:
        initial.requires_grad_()
    generator = torch.Generator().manual_seed(9)
    order = torch.arange(0 if edits is None else len(edits))
    names = [*x, "initial_state", "edit_left", "edit_right"]
    if wide:
        sides = () if edits is None else (edits.left.double().requires_grad_(), edits.right.double().requires_grad_())
        out = plain(rule, *x.values(), 0.7, initial, norm, lengths, (edits, *sides) if sides else None, places)
        weights = [torch.randn(y.shape, generator=generator).double() for y in out]
        sum((y * w).sum() for y, w in zip(out, weights, strict=True)).backward()
        given = [*x.values(), initial, *(sides or (None, None))]
        return {name: None if y is None else y.grad for name, y in zip(names, given, strict=True)}
    out = call(rule, target, x, 0.7, initial, norm, lengths, edits, places)
    weights = [torch.randn(y.shape, generator=generator) for y in out]
    d_o, d_final, d_left, d_right, d_shots = weights
    cu = None if lengths is None else torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    packed = (None, None, None) if edits is None else pack_edits(edits)
    args = [*x.values(), 0.7, initial, norm, cu, *packed, places, out[3], d_o.to(x["v"].dtype), d_final, d_left, d_right]
    with poisoned_memory(), target.in_use():
        backward = getattr(operators(target.kind), f"{rule.operator}_backward")
        found = backward(*[put(target, y) for y in [*args, None if places is None else d_shots]])
    found = dict(zip(names, (y.cpu() for y in found), strict=True))
    if edits is not None:  # sorted, as the operator has them
        for key in (edits.position, edits.head, edits.row):
            order = order[torch.argsort(key[order], stable=True)]
        for side in ("edit_left", "edit_right"):
            found[side] = torch.empty_like(found[side]).index_copy_(0, order, found[side])
    return found


def compare_gradients(rule, x, targets, record=None, **options):
    found = [gradients(rule, target, x, **options) for target in targets]
    expected = gradients(rule, None, x, **options)
    for target, got in zip(targets, found, strict=True):
        for name, value in got.items():
            if name == "initial_state" and options.get(name) is None:
                continue
            truth = expected[name] if expected[name] is not None else torch.zeros_like(value)
            error = check_close(f"d_{name} of {rule} with {target.name}", value, truth, 2 * allowed(rule, x, value))
            if record is not None:
                record(f"gradient relative_rms {x['v'].dtype}", error.rms)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 127])
def test_gradients_of_lengths(T, trained, device_targets, record_property):
    x = inputs(trained, 2, T, 2, 4, 24, 40)
    places = torch.tensor([[0, 0], [1, T // 2], [0, T - 1]])
    options = {"norm": True, "initial_state": torch.randn(2, 4, 24, 40), "places": places}
    compare_gradients(trained, x, device_targets, record_property, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K, V", [(32, 32), (64, 136), (128, 128), (256, 64), (7, 5)])
def test_gradients_of_sizes(K, V, dtype, trained, device_targets, record_property):
    x = inputs(trained, 1, 67, 1, 2, K, V, dtype=dtype)
    edits = edits_for(1, [67], 2, K, V)
    options = {"initial_state": torch.randn(1, 2, K, V), "edits": edits}
    compare_gradients(trained, x, device_targets, record_property, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_edits_and_snapshots(dtype, trained, device_targets, record_property):
    lengths = [70, 0, 1, 131, 65]
    x = inputs(trained, 1, sum(lengths), 1, 2, 32, 40, dtype=dtype, decay="weak")
    edits = edits_for(5, lengths, 2, 32, 40, count=30)
    places = torch.tensor([[3, 130], [0, 0], [3, 64], [0, 63], [3, 64], [2, 0], [3, 64], [4, 32]])
    options = {"lengths": lengths, "edits": edits, "places": places, "initial_state": torch.randn(5, 2, 32, 40)}
    compare_gradients(trained, x, device_targets, record_property, norm=True, **options)


def test_large_keys_are_refused(rule, device_targets):
    x = inputs(rule, 1, 3, 1, 1, 264, 8)
    with pytest.raises(ValueError, match=f"{rule.operator}: .* K up to 256, got K = 264"):
        call(rule, device_targets[0], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bank_conflicts(dtype, rule, device_targets):
    if device_targets[0].kind != "twin":
        pytest.skip("the host twin counts them")
    torch.ops.writesae_twin.statistics()
    call(rule, device_targets[0], inputs(rule, 1, 130, 1, 2, 128, 128, dtype=dtype))
    _, _, _, products, _, conflicts, _, shared = torch.ops.writesae_twin.statistics()
    assert products > 1000 and conflicts == 0 and shared < 163 * 1024
