"""The public functions as cases, and torch's derivatives and maps with what each should give: for test_transforms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.autograd.forward_ad as forward_mode
from torch import func

from writesae import ops
from writesae.edits import Edits
from writesae.ops import RuleCall
from writesae.testing import dictionary, gated_delta_rule_inputs, make_writes
from writesae.writes import Writes

TOLERANCE = 1e-4  # of derivatives in float32; their reference's are differences, good to some 1e-8

B, T, H, K, V, F, TOP = 2, 5, 2, 4, 3, 6, 2


# torch.autograd, without torch.func: kernels without a backward refuse it, as they always did.
PLAIN_AUTOGRAD = ("backward", "vmap_under_backward", "double_backward", "forward_over_reverse", "autocast_backward")


# Where tensors have no numbers, so that offsets of packed sequences and edits cannot be checked.
TRACING = ("compiled", "exported", "fake", "linearized", "functionalized")


@dataclass(frozen=True)
class Case:
    """run(backend, *inputs) gives a tuple of floating outputs; refused: transforms that it refuses by name."""

    run: object
    inputs: tuple
    refused: dict[str, str]


def floats(*tensors):
    return tuple(x.float() for x in tensors)


def _cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = gated_delta_rule_inputs(B, T, 1, H, K, V)
    state = normal(B, H, K, V)
    when = ["after", "after", "before"]
    edits = Edits([0, 1, -1], [1, 3, 4], [0, 1, 1], normal(3, K), normal(3, V), ["add", "replace", "delete"], when)

    def scan(backend, q, k, v, g, beta, initial, **more):
        out = ops.gated_delta_rule(
            q, k, v, g, beta, initial_state=initial, output_final_state=True, use_qk_l2norm=True, return_writes=True,
            backend=backend, **more,
        )  # fmt: skip
        shots = () if out.snapshots is None else (out.snapshots,)
        return out.o, out.final_state, out.writes.left, out.writes.right, *shots

    def edited(backend, q, k, v, g, beta, initial, left, right):
        change = replace(edits, left=left, right=right)
        return scan(backend, q, k, v, g, beta, initial, edits=change, snapshots=[1, 4])

    def packed(backend, q, k, v, g, beta):
        rows = (y.reshape(1, B * T, *y.shape[2:]) for y in (q, k, v, g, beta))
        return scan(backend, *rows, None, cu_seqlens=torch.tensor([0, 3, 3, B * T]))

    def step(backend, q, k, v, g, beta, state):
        state = state.clone()
        return ops.gated_delta_rule_step(q, k, v, g, beta, state, backend=backend).o, state

    writes = make_writes(generator, B, T, H, 1, K, V, state=True)
    v, w, b = dictionary(generator, H, F, K, V)
    v_dec, w_dec, offset = *dictionary(generator, H, F, K, V)[:2], normal(H, K, V)
    at = torch.randint(F, (B, T, H, TOP), generator=generator)
    trace = floats(writes.decay, writes.left, writes.right, writes.initial_state)

    def made(decay, left, right, initial, edits=None):
        return Writes(decay, left, right, initial_state=initial, edits=edits)

    def encode(backend, *tensors):
        return (ops.encode(made(*tensors[:4]), *tensors[4:7], k=TOP, backend=backend).values,)

    def encode_edited(backend, left, right, *tensors):
        change = Edits([0, -1], [1, 3], [0, 1], left, right, when=["after", "before"])
        return (ops.encode(made(*tensors[:4], change), *tensors[4:7], k=TOP, backend=backend).values,)

    def threshold(backend, *tensors):
        return (ops.encode(made(*tensors[:4]), *tensors[4:7], threshold=0.5, backend=backend).values,)

    def pursue(_, left, right, v, w):  # it has no kernel
        return (ops.pursuit(left, right, v, w, v, w, TOP)[0],)

    def activations(backend, *tensors):
        return (ops.activations(made(*tensors[:4]), *tensors[4:6], at, tensors[6], backend=backend),)

    def loss(backend, values, v, w, offset):
        fixed = made(*(y.to(values) for y in trace))
        return (ops.factored_loss(fixed, values, at, v, w, offset, backend=backend),)

    def train(backend, *tensors):
        fixed = made(*(y.to(tensors[0]) for y in trace))
        return (ops.training_loss(fixed, *tensors, k=TOP, backend=backend).loss,)

    def of(name):
        """(o, final state and the native writes' right side) of a rule, by its tensors in order."""

        def run(backend, *tensors, **more):
            *tensors, initial = tensors
            rule = ops.RULES[name]
            call = RuleCall(rule, dict(zip(rule.arguments, tensors, strict=True)), more, initial)
            out = call.run(return_writes=True, output_final_state=True, backend=backend)
            return out.o, out.final_state, out.writes.right[..., -1, :]

        return run

    def mamba_step(backend, x, dt, A, B, C, D, state):
        state = state.clone()
        return ops.ssd_step(x, dt, A, B, C, state, D, backend=backend).o, state

    def low_rank_step(backend, q, k, v, g, a, b, state):
        state = state.clone()
        return ops.dplr_step(q, k, v, g, state, a, b, backend=backend).o, state

    def selective_step(backend, x, dt, A, B, C, D, state):
        state = state.clone()
        return ops.selective_scan_step(x, dt, A, B, C, state, D, backend=backend).o, state

    plain = gated_delta_rule_inputs(B, T, H, H, K, V)
    channel = -torch.nn.functional.softplus(normal(B, T, H, K))
    low_rank = (plain["q"], plain["k"], plain["v"], channel, normal(B, T, H, K), normal(B, T, H, K) / 4)
    mamba = (normal(B, T, H, V), normal(B, T, H).abs(), -normal(H).abs(), normal(B, T, 1, K), normal(B, T, 1, K),
             normal(H), state)  # fmt: skip
    selective = (normal(B, T, V), normal(B, T, V).abs(), -normal(V, K).abs(), normal(B, T, K), normal(B, T, K),
                 normal(V), state[:, :1])  # fmt: skip
    # A kernel's second derivative is refused; what has no kernel has one.
    hidden = dict.fromkeys(TRACING, "numbers.*are needed, and t")
    rule = dict.fromkeys(("double_backward", "forward_over_reverse"), "gated_delta_rule_backward: no")
    once = {"double_backward": "once_differentiable", "forward_over_reverse": "no forward-mode derivative of a"}
    return {
        "gated_delta_rule": Case(scan, (*x.values(), state), rule),
        "gated_delta_rule, edited": Case(edited, (*x.values(), state, edits.left, edits.right), rule | hidden),
        "gated_delta_rule, packed": Case(packed, tuple(x.values()), rule | hidden),
        "gated_delta_rule_step": Case(
            step, (*(y[:, 0] for y in x.values()), state), dict.fromkeys(DERIVATIVES, "gated_delta_rule_step"),
        ),
        "causal_conv": Case(
            lambda backend, x, w, b: (ops.causal_conv(x, w, b, "silu", backend=backend),),
            (normal(B, T, 4), normal(4, 3), normal(4)),
            dict.fromkeys(PLAIN_AUTOGRAD, "causal_conv: no backward"),
        ),
        "rms_norm": Case(
            lambda backend, x, w, gate: (ops.rms_norm(x, w, gate, backend=backend),),
            (normal(B, T, 4), normal(4), normal(B, T, 4)),
            dict.fromkeys(PLAIN_AUTOGRAD, "rms_norm: no backward"),
        ),
        "encode": Case(encode, (*trace, *floats(v, w, b)), once),
        "encode, edited": Case(
            encode_edited, (normal(2, K), normal(2, V), *trace, *floats(v, w, b)), once | hidden
        ),
        "encode, threshold": Case(
            threshold, (*trace, *floats(v, w, b)),
            dict.fromkeys(DERIVATIVES, "encode.*threshold mode") | dict.fromkeys(("meta", "fake"), "encode_threshold"),
        ),
        "pursuit": Case(
            pursue, floats(normal(T, 1, K), normal(T, 1, V), v[0], w[0]),
            dict.fromkeys((*DERIVATIVES, *TRACING, "meta"), "pursuit: "),
        ),
        "activations": Case(activations, (*trace, *floats(v, w, b)), once),
        "factored_loss": Case(loss, (normal(*at.shape), *floats(v_dec, w_dec, offset)), once),
        "training_loss": Case(train, floats(v, w, b, v_dec, w_dec, offset), once),
        "gated_delta_rule, channel gate": Case(
            of("gated_delta_rule"), (x["q"], x["k"], x["v"], channel, x["beta"], state), rule,
        ),
        "ssd": Case(
            of("ssd"), mamba, dict.fromkeys(("double_backward", "forward_over_reverse"), "ssd_backward: no"),
        ),
        "ssd_step": Case(
            mamba_step, (*(y if y.ndim == 1 else y[:, 0] for y in mamba[:-1]), state),
            dict.fromkeys(DERIVATIVES, "ssd_step"),
        ),
        "dplr": Case(
            of("dplr"), (*low_rank, state),
            dict.fromkeys(("double_backward", "forward_over_reverse"), "dplr_backward: no"),
        ),
        "dplr_step": Case(
            low_rank_step, (*(y[:, 0] for y in low_rank), state), dict.fromkeys(DERIVATIVES, "dplr_step"),
        ),
        "selective_scan": Case(
            of("selective_scan"), selective,
            dict.fromkeys(("double_backward", "forward_over_reverse"), "selective_scan_backward: no"),
        ),
        "selective_scan_step": Case(
            selective_step, tuple(y[:, 0] if y.ndim == 3 else y for y in selective),
            dict.fromkeys(DERIVATIVES, "selective_scan_step"),
        ),
    }  # fmt: skip


# ---- transforms: (f, inputs) -> outputs, f(*inputs) -> a tuple ------------------------------------------------------


def directions(tensors) -> tuple:
    """One for each; no random numbers, which vmap refuses."""
    return tuple(
        (torch.arange(x.numel()) * 0.7 + i).sin().view(x.shape).to(x.dtype) for i, x in enumerate(tensors)
    )  # fmt: skip


def scalar(f):
    def call(*inputs):
        outputs = f(*inputs)
        return sum((y * z).sum() for y, z in zip(outputs, directions(outputs), strict=True))

    return call


def every(inputs) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def jvp(f, inputs):
    return func.jvp(f, inputs, directions(inputs))[1]


def forward_ad(f, inputs):
    with forward_mode.dual_level():
        duals = [forward_mode.make_dual(x, t) for x, t in zip(inputs, directions(inputs), strict=True)]
        # A tangent that an output does not carry is 0 to torch, and is the fault looked for here.
        return tuple(forward_mode.unpack_dual(y).tangent.clone() for y in f(*duals))


def jacfwd(f, inputs):
    """All tangents at once of the first output, from the first input: a jvp under vmap."""
    return func.jacfwd(lambda x: f(x, *inputs[1:])[0])(inputs[0])


def jacrev(f, inputs):
    return func.jacrev(lambda x: f(x, *inputs[1:])[0])(inputs[0])


def grad(f, inputs):
    return func.grad(scalar(f), argnums=every(inputs))(*inputs)


def vjp(f, inputs):
    outputs, pull = func.vjp(f, *inputs)
    return pull(directions(outputs))


def backward(f, inputs):
    asked = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(scalar(f)(*asked), asked)


def grad_of_vmap(f, inputs):
    stacked = [torch.stack([x, x * 1.25]) for x in inputs]
    return func.grad(lambda *y: sum(scalar(f)(*(z[i] for z in y)) for i in range(2)), argnums=every(inputs))(*stacked)


def vmap_under_grad(f, inputs):
    stacked = [torch.stack([x, x * 1.25]) for x in inputs]
    return func.grad(lambda *y: torch.vmap(scalar(f))(*y).sum(), argnums=every(inputs))(*stacked)


def vmap_under_backward(f, inputs):
    stacked = [torch.stack([x, x * 1.25]).requires_grad_() for x in inputs]
    return torch.autograd.grad(torch.vmap(scalar(f))(*stacked).sum(), stacked)


def grad_under_vmap(f, inputs):
    stacked = [torch.stack([x, x * 1.25]) for x in inputs]
    return torch.vmap(func.grad(scalar(f), argnums=every(inputs)))(*stacked)


def jvp_under_vmap(f, inputs):
    stacked = [torch.stack([x, x * 1.25]) for x in inputs]
    return torch.vmap(lambda *y: func.jvp(f, y, directions(inputs))[1])(*stacked)


def vmap_under_jvp(f, inputs):
    stacked = tuple(torch.stack([x, x * 1.25]) for x in inputs)
    tangents = tuple(torch.stack([t, t]) for t in directions(inputs))
    return func.jvp(torch.vmap(f), stacked, tangents)[1]


def vmap(f, inputs):
    return torch.vmap(f)(*(torch.stack([x, x * 1.25]) for x in inputs))


def vmap_of_one(f, inputs):
    """One input mapped at a time, along its last axis, the rest as they are."""
    found = []
    for i in every(inputs):
        dims = tuple(-1 if j == i else None for j in every(inputs))
        mapped = (torch.stack([x, x * 1.25], -1) if j == i else x for j, x in enumerate(inputs))
        found.extend(torch.vmap(f, dims)(*mapped))
    return tuple(found)


def grad_of_grad(f, inputs):
    def first(*y):
        found = func.grad(scalar(f), argnums=every(y))(*y)
        return sum((z * t).sum() for z, t in zip(found, directions(y), strict=True))

    return func.grad(first, argnums=every(inputs))(*inputs)


def jvp_of_grad(f, inputs):
    return func.jvp(func.grad(scalar(f), argnums=every(inputs)), inputs, directions(inputs))[1]


def double_backward(f, inputs):
    asked = [x.clone().requires_grad_() for x in inputs]
    found = torch.autograd.grad(scalar(f)(*asked), asked, create_graph=True)
    return torch.autograd.grad(sum((z * t).sum() for z, t in zip(found, directions(inputs), strict=True)), asked)


def forward_over_reverse(f, inputs):
    asked = [x.clone().requires_grad_() for x in inputs]
    out = scalar(f)(*asked)
    with forward_mode.dual_level():
        found = torch.autograd.grad(out, asked, forward_mode.make_dual(torch.ones_like(out), torch.ones_like(out)))
        return tuple(forward_mode.unpack_dual(x).tangent for x in found)


def linearized(f, inputs):
    return func.linearize(f, *inputs)[1](*directions(inputs))


def functionalized(f, inputs):
    return func.functionalize(f)(*inputs)


# ---- what they should give, in float64 by other ways ----------------------------------------------------------------


def loop(of):
    """What a mapped transform should be: `of` of each element."""

    def each(f, inputs):
        found = [of(f, tuple(x * c for x in inputs)) for c in (1.0, 1.25)]
        return tuple(map(torch.stack, zip(*found, strict=True)))

    return each


def loop_of_one(f, inputs):
    found = []
    for i in every(inputs):
        each = [f(*(x * c if j == i else x for j, x in enumerate(inputs))) for c in (1.0, 1.25)]
        found.extend(map(torch.stack, zip(*each, strict=True)))
    return tuple(found)


def along(of):
    """The derivative of `of` along `directions`, by central differences."""

    def difference(f, inputs):
        with torch.no_grad():
            step = 1e-6
            there, back = (
                of(f, tuple(x + s * t for x, t in zip(inputs, directions(inputs), strict=True))) for s in (step, -step)
            )
            return tuple((a - b) / (2 * step) for a, b in zip(there, back, strict=True))

    return difference


def differences(f, inputs):
    """The Jacobian of the first output by the first input."""
    columns = []
    for i in range(inputs[0].numel()):
        unit = torch.zeros(inputs[0].numel(), dtype=inputs[0].dtype).index_fill_(0, torch.tensor(i), 1e-6)
        unit = unit.view_as(inputs[0])
        columns.append((f(inputs[0] + unit, *inputs[1:])[0] - f(inputs[0] - unit, *inputs[1:])[0]) / 2e-6)
    return torch.stack(columns, -1).unflatten(-1, inputs[0].shape)


def value(f, inputs):
    return f(*inputs)


def graded(f, inputs):
    with torch.enable_grad():
        return backward(f, inputs)


TRANSFORMS = {
    jvp: along(value), forward_ad: along(value), jacfwd: differences, jacrev: differences, grad: graded, vjp: graded,
    backward: graded, grad_of_vmap: loop(graded), vmap_under_grad: loop(graded), vmap_under_backward: loop(graded),
    grad_under_vmap: loop(graded), jvp_under_vmap: loop(along(value)), vmap_under_jvp: loop(along(value)),
    vmap: loop(value), vmap_of_one: loop_of_one, grad_of_grad: along(graded), jvp_of_grad: along(graded),
    double_backward: along(graded), forward_over_reverse: graded, linearized: along(value), functionalized: value,
}  # fmt: skip
DERIVATIVES = tuple(transform.__name__ for transform in TRANSFORMS)
CASES = _cases()
