"""The write rules, one entry each, for the bodies that test all of them (test_rules.py, test_rules_backward.py).

An entry (`Case`) says how inputs of a rule are made and what one token does, in plain torch and sharing no code with
the package; `loop` makes of it what every output must be, in float64, with edits, packing and gradients. A new rule is
a new entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import targets as here
import torch
from targets import Target, to_cpu
from torch import Tensor

from writesae import ops
from writesae.edits import ADD, AFTER, BEFORE, DELETE, Edits
from writesae.ops._dispatch import kernel_error
from writesae.ops.rule import Rule, RuleCall, RuleOutput
from writesae.testing import DEVICE_TOLERANCE, TOLERANCE, check_close, gated_delta_rule_inputs, poisoned_memory

EXACT = 1e-12  # of the package's reference in float64

# (state as the gate leaves it [N, H, K, V], what is added to it as left [N, H, R, K] and right [N, H, R, V], the native
# write last, query [N, H, K]) of token t, from the state before it
Token = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A rule with one kind of gate.

    Attributes:
        name: in test ids.
        rule: the rule.
        gate: its kind of gate here.
        inputs: tensors by name from (generator, B, T, Hk, H, K, V, decay, correlated); see `Case.make`.
        token: `Token` from inputs `[N, T, ...]` and options.
        operands: the names of queries, keys and values.
        heads: "grouped" (H value heads read Hk key heads), "own" (Hk = H) or "one" (H = 1, no axis of heads).
        skip: `[N, T, H, V]` of the output that passes by the state, from the inputs.
        close: changes inputs so that the gates of some tokens are all but zero, and exactly zero.
        mix: changes inputs of weak decay so that gates near one and near nothing take turns.
        options: keywords of the rule in every call, unless others are given.
        others: other keywords, each a test.
        fixed: inputs without an axis of tokens.
        optional: inputs that may be left out, one by one.
        step: the rule's one-token function.
        widened: operands' types that its CUDA kernels compute in float32.
    """

    name: str
    rule: Rule
    gate: str
    inputs: Callable[..., dict[str, Tensor]] = field(repr=False)
    token: Callable[..., Token] = field(repr=False)
    operands: tuple[str, str, str]
    heads: str = "grouped"
    skip: Callable[[dict[str, Tensor]], Tensor] | None = field(default=None, repr=False)
    close: Callable[[dict[str, Tensor]], None] | None = field(default=None, repr=False)
    mix: Callable[[dict[str, Tensor]], None] | None = field(default=None, repr=False)
    options: dict = field(default_factory=dict)
    others: tuple[dict, ...] = ()
    fixed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    step: Callable | None = field(default=None, repr=False)
    widened: tuple[torch.dtype, ...] = ()

    def make(
        self, B, T, Hk, H, K, V, dtype=torch.float32, decay="usual", correlated=False, seed=0
    ) -> dict[str, Tensor]:
        """Inputs by name. decay and correlated: as in `testing.gated_delta_rule_inputs`."""
        Hk, H = self.fit(Hk, H)
        x = self.inputs(torch.Generator().manual_seed(seed), B, T, Hk, H, K, V, decay, correlated)
        return {name: value.to(dtype) for name, value in x.items()}

    def variants(self):
        """(inputs, options): without each argument that may be left out, and with each set of other options."""
        for name in self.optional:
            x = self.make(2, 21, 1, 2, 16, 24)
            del x[name]
            yield x, {}
        for options in self.others:
            x = self.make(2, 50, 1, 2, 24, 40, correlated=True)
            if not options.get("use_qk_l2norm", True):
                x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
            yield x, options

    def fit(self, Hk: int, H: int) -> tuple[int, int]:
        """The nearest numbers of heads that the rule has."""
        return {"grouped": (Hk, H), "own": (H, H), "one": (1, 1)}[self.heads]

    def tokens(self, x: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """x with what has an axis of tokens changed."""
        return {name: value if name in self.fixed else change(value) for name, value in x.items()}

    def sizes(self, x: dict[str, Tensor]) -> tuple[int, int, int, int, int, int]:
        """(B, T, Hk, H, K, V)."""
        _, k, v = (x[name] for name in self.operands)
        if self.heads == "one":
            return *v.shape[:2], 1, 1, k.shape[-1], v.shape[-1]
        return *v.shape[:2], k.shape[2], v.shape[2], k.shape[3], v.shape[3]


# ---- inputs and mathematics -----------------------------------------------------------------------------------------


def _normal(generator, *shape):
    return torch.randn(*shape, generator=generator)


def _keys(generator, *shape, correlated):
    """`[B, T, heads, K]` or `[B, T, K]`; correlated ones share a large common part."""
    k = _normal(generator, *shape)
    return 0.3 * k + _normal(generator, 1, 1, *shape[2:]) if correlated else k


def _log_decay(generator, *shape, decay):
    """Of a channel gate, `[B, T, H, K]`."""
    if decay != "usual":
        return torch.full(shape, {"none": 0.0, "weak": -1e-3, "strong": -20.0}[decay])
    softplus = torch.nn.functional.softplus
    return -softplus(_normal(generator, *shape)) * torch.rand(*shape[2:], generator=generator)


def _heads(x, H):
    return x.repeat_interleave(H // x.shape[2], 2)


def _delta_inputs(generator, B, T, Hk, H, K, V, decay, correlated):
    return gated_delta_rule_inputs(B, T, Hk, H, K, V, decay=decay, correlated=correlated, seed=generator.initial_seed())


def _channel_delta_inputs(generator, B, T, Hk, H, K, V, decay, correlated):
    x = _delta_inputs(generator, B, T, Hk, H, K, V, decay, correlated)
    return {**x, "g": _log_decay(generator, B, T, H, K, decay=decay)}


def _delta(x, use_qk_l2norm=False, scale=None) -> Token:
    q, k, v, g, beta = (x[name] for name in ("q", "k", "v", "g", "beta"))
    if use_qk_l2norm:
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    q, k = (_heads(y, v.shape[2]) for y in (q * scale, k))
    g = g if g.ndim == 4 else g[..., None]

    def token(S, t):
        gated = g[:, t, ..., None].exp() * S
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("nhkv,nhk->nhv", gated, k[:, t]))
        return gated, k[:, t, :, None], u[:, :, None], q[:, t]

    return token


def _close_g(x):
    x["g"][:, 5::7] = -200.0
    x["g"][:, 6::7] = -float("inf")


def _mix_g(x):
    x["g"][:, ::2] = -20 * torch.rand(x["g"][:, ::2].shape)
    x["g"][:, 5::16] = -20.0
    x["g"][:, 6::16] = -120.0


def _ssd_inputs(generator, B, T, Hk, H, K, V, decay, correlated):
    A = {"usual": -torch.rand(H, generator=generator), "none": torch.zeros(H), "weak": torch.full((H,), -1e-3)}
    return {
        "x": _normal(generator, B, T, H, V), "dt": torch.nn.functional.softplus(_normal(generator, B, T, H)) + 0.05,
        "A": A.get(decay, torch.full((H,), -40.0)), "B": _keys(generator, B, T, Hk, K, correlated=correlated),
        "C": _normal(generator, B, T, Hk, K), "D": _normal(generator, H),
    }  # fmt: skip


def _ssd(x) -> Token:
    H = x["x"].shape[2]
    k, q = _heads(x["B"], H), _heads(x["C"], H)

    def token(S, t):
        gated = (x["dt"][:, t] * x["A"]).exp()[..., None, None] * S
        return gated, k[:, t, :, None], (x["dt"][:, t, :, None] * x["x"][:, t])[:, :, None], q[:, t]

    return token


def _ssd_skip(x):
    return x["D"][:, None] * x["x"] if "D" in x else 0


def _close_dt(x):
    x["dt"][:, 5::7] = 30.0
    x["dt"][:, 6::7] = 3000.0
    x["A"] -= 1.0


def _mix_dt(x):
    x["dt"] *= 1e-3
    x["dt"][:, ::2] = 20 * torch.rand(x["dt"][:, ::2].shape)
    x["dt"][:, 5::16] = 20.0
    x["dt"][:, 6::16] = 120.0
    x["A"] -= 1.0


def _dplr_inputs(generator, B, T, Hk, H, K, V, decay, correlated):
    """RWKV-7: a unit key is read, and a share of what it finds is taken away."""
    x = _gla_inputs(generator, B, T, Hk, H, K, V, decay, correlated)
    unit = torch.nn.functional.normalize(_keys(generator, B, T, H, K, correlated=correlated), dim=-1)
    return {**x, "a": unit, "b": -torch.sigmoid(_normal(generator, B, T, H, K)) * unit}


def _gla_inputs(generator, B, T, Hk, H, K, V, decay, correlated):
    return {
        "q": _normal(generator, B, T, H, K), "k": _keys(generator, B, T, H, K, correlated=correlated),
        "v": _normal(generator, B, T, H, V), "g": _log_decay(generator, B, T, H, K, decay=decay),
    }  # fmt: skip


def _dplr(x) -> Token:
    def token(S, t):
        gated, left, right = x["g"][:, t, ..., None].exp() * S, x["k"][:, t, :, None], x["v"][:, t, :, None]
        if "a" in x:
            read = torch.einsum("nhkv,nhk->nhv", S, x["a"][:, t])
            left, right = torch.cat([x["b"][:, t, :, None], left], 2), torch.cat([read[:, :, None], right], 2)
        return gated, left, right, x["q"][:, t]

    return token


def _selective_inputs(generator, B, T, Hk, H, K, V, decay, correlated):
    A = {"usual": -torch.rand(V, K, generator=generator), "none": torch.zeros(V, K), "weak": torch.full((V, K), -1e-3)}
    return {
        "x": _normal(generator, B, T, V), "dt": torch.nn.functional.softplus(_normal(generator, B, T, V)) + 0.05,
        "A": A.get(decay, torch.full((V, K), -40.0)), "B": _keys(generator, B, T, K, correlated=correlated),
        "C": _normal(generator, B, T, K), "D": _normal(generator, V),
    }  # fmt: skip


def _selective(x) -> Token:
    def token(S, t):
        gated = (x["dt"][:, t, None] * x["A"].T).exp()[:, None] * S
        right = (x["dt"][:, t] * x["x"][:, t])[:, None, None]
        return gated, x["B"][:, t, None, None], right, x["C"][:, t, None]

    return token


def _selective_skip(x):
    return (x["D"] * x["x"])[:, :, None] if "D" in x else 0


_NORMALISED = {"use_qk_l2norm": True}
_AS_GIVEN = ({"use_qk_l2norm": False, "scale": 0.125}, {"use_qk_l2norm": True, "scale": 0.7})
GATED_DELTA_RULE = Case(
    "gated_delta_rule", ops.RULES["gated_delta_rule"], "scalar", _delta_inputs, _delta, ("q", "k", "v"),
    close=_close_g, mix=_mix_g, options=_NORMALISED, others=_AS_GIVEN, step=ops.gated_delta_rule_step,
)  # fmt: skip
KDA = replace(GATED_DELTA_RULE, name="kda", gate="channel", inputs=_channel_delta_inputs, widened=(torch.float16,))
SSD = Case(
    "ssd", ops.RULES["ssd"], "scalar", _ssd_inputs, _ssd, ("C", "B", "x"), skip=_ssd_skip, close=_close_dt, mix=_mix_dt,
    fixed=("A", "D"), optional=("D",), step=ops.ssd_step, widened=(torch.float16,),
)  # fmt: skip
DPLR = Case(
    "dplr", ops.RULES["dplr"], "channel", _dplr_inputs, _dplr, ("q", "k", "v"), "own", close=_close_g, mix=_mix_g,
    step=ops.dplr_step, widened=(torch.float16,),
)  # fmt: skip
GLA = replace(DPLR, name="gla", inputs=_gla_inputs)
SELECTIVE_SCAN = Case(
    "selective_scan", ops.RULES["selective_scan"], "element", _selective_inputs, _selective, ("C", "B", "x"), "one",
    skip=_selective_skip, close=_close_dt, mix=_mix_dt, fixed=("A", "D"), optional=("D",), step=ops.selective_scan_step,
)  # fmt: skip
CASES = [GATED_DELTA_RULE, KDA, SSD, DPLR, GLA, SELECTIVE_SCAN]


# ---- where a case runs ----------------------------------------------------------------------------------------------


def runs(case: Case, target: Target, gradient: bool = False) -> bool:
    """Whether the target has the case's kernel (and its backward), by what the rule declares."""
    if target.kind == "reference":
        return True
    limits = case.rule.limits.get("cpu" if target.kind == "cpu" else "cuda")
    if limits is None or kernel_error(case.rule.name, target.kind) is not None:
        return False
    return case.gate in (limits.gradient if gradient else limits.gates)


def targets(case: Case, which: str = "all", gradient: bool = False) -> list[Target]:
    """What a case is run on. which: "all"; "few", the CPU's best instruction set alone of its; "kernels", all without
    the reference; "devices", without the CPU too."""
    found = {
        "all": here.REFERENCE + here.ALL, "few": here.REFERENCE + here.FEW, "kernels": here.ALL,
        "devices": here.DEVICES,
    }  # fmt: skip
    return [target for target in found[which] if runs(case, target, gradient)]


def cases(which: str = "all", gradient: bool = False) -> list[Case]:
    """Those with a target; which: as in `targets`, or a kind of target, or "scans": of the CPU, in csrc/scan.h."""
    if which == "scans":
        return [case for case in cases("cpu", gradient) if case.heads != "one"]
    if which in ("reference", "cpu"):
        return [case for case in CASES if any(t.kind == which for t in targets(case, "few", gradient))]
    return [case for case in CASES if targets(case, which, gradient)]


# ---- what the outputs must be ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """What `loop` finds, float64.

    Attributes:
        o: `[B, T, H, V]`.
        final_state: `[N, H, K, V]`.
        left, right: `[B, T, Hk, R, K]`, `[B, T, H, R, V]`, the writes.
        snapshots: `[P, H, K, V]`, or `[N, P, H, K, V]` of a list of positions; None where none were asked for.
        read: the same of the states as their tokens read them, before edits after the read.
    """

    o: Tensor
    final_state: Tensor
    left: Tensor
    right: Tensor
    snapshots: Tensor | None
    read: Tensor | None


def loop(case: Case, x, initial_state=None, cu_seqlens=None, edits=None, snapshots=None, **options) -> Truth:
    """A rule token by token in float64, all sequences side by side, those that ended standing still. Differentiable."""
    B, T, Hk, H, K, V = case.sizes(x)
    x = {name: value.double() for name, value in x.items()}
    lengths = torch.tensor([T] * B) if cu_seqlens is None else cu_seqlens.long().diff()
    N, longest = len(lengths), int(lengths.max())
    if cu_seqlens is not None:
        at = (cu_seqlens[:-1, None] + torch.arange(longest)).clamp(max=T - 1)  # [N, longest]
        x = case.tokens(x, lambda value: value[0, at])
    token = case.token(x, **{**case.options, **options})
    alive = (torch.arange(longest) < lengths[:, None])[..., None, None, None]  # [N, longest, 1, 1, 1]
    S = torch.zeros(N, H, K, V).double() if initial_state is None else initial_state.double()
    as_list = snapshots is not None and not (isinstance(snapshots, Tensor) and snapshots.ndim == 2)
    given = [] if snapshots is None else snapshots
    places = [(n, t) for n in range(N) for t in given] if as_list else [tuple(map(int, place)) for place in given]
    found, os, lefts, rights = {}, [], [], []
    for t in range(longest):
        before, after = (_at(edits, t, when, N) for when in (BEFORE, AFTER))
        gated, left, right, query = token(S, t)
        native = right[:, :, -1:] * _kept(edits, before, N, H)  # which edits remove
        right = torch.cat([right[:, :, :-1], native], 2)
        new = _added(gated + torch.einsum("nhrk,nhrv->nhkv", left, right), edits, before)
        os.append(torch.einsum("nhkv,nhk->nhv", new, query))
        removed = torch.einsum("nhrk,nhrv->nhkv", left[:, :, -1:], native * (1 - _kept(edits, after, N, H)))
        read, new = new, _added(new - removed, edits, after)
        S = torch.where(alive[:, t], new, S)
        lefts.append(left[:, :: H // Hk]), rights.append(right)
        if any(t == p for _, p in places):
            found[t] = S, read
    outputs = [torch.stack(rows, 1) for rows in (os, lefts, rights)]
    if case.skip is not None:
        outputs[0] = outputs[0] + case.skip(x)
    if cu_seqlens is not None:
        outputs = [torch.cat([rows[n, :length] for n, length in enumerate(lengths.tolist())])[None] for rows in outputs]
    shots = [torch.stack([found[t][i][n] for n, t in places]) if places else None for i in (0, 1)]
    if as_list:
        shots = [y.unflatten(0, (N, -1)) for y in shots]
    return Truth(outputs[0], S, *outputs[1:], *shots)


def _at(edits, t, when, N) -> list[tuple[int, int, int]]:
    """(edit, sequence, head) of the edits at a position; row -1 is every row."""
    if edits is None:
        return []
    here = ((edits.position == t) & (edits.when == when)).nonzero().flatten().tolist()
    rows = ((i, range(N) if edits.row[i] < 0 else [int(edits.row[i])]) for i in here)
    return [(i, n, int(edits.head[i])) for i, ns in rows for n in ns]


def _kept(edits, which, N, H) -> Tensor:
    """`[N, H, 1, 1]`: 0 where an edit removes the token's writes, else 1."""
    kept = torch.ones(N, H, 1, 1).double()
    for i, n, h in which:
        if edits.kind[i] != ADD:
            kept[n, h] = 0
    return kept


def _added(S, edits, which) -> Tensor:
    """States with what edits add."""
    for i, n, h in which:
        if edits.kind[i] != DELETE:
            outer = torch.outer(edits.left[i].double(), edits.right[i].double())
            S = S.index_put((torch.tensor([n]), torch.tensor([h])), outer[None], accumulate=True)
    return S


def operator_inputs(case: Case, *sizes) -> dict[str, Tensor]:
    """q, k, v, g, beta, which the operator of every rule with kernels takes; of the gate's shape."""
    x = gated_delta_rule_inputs(*sizes)
    if case.gate == "channel":
        x["g"] = _log_decay(torch.Generator().manual_seed(0), *x["g"].shape, x["k"].shape[-1], decay="usual")
    return x


def operator_erase(case: Case, B, T, Hk, H, K, V) -> tuple:
    """a and b, which the operators of a low-rank rule take last, or None."""
    if case.rule.transition != "low rank":
        return ()
    if "a" not in case.make(1, 1, 1, 1, 1, 1):
        return None, None
    x = case.make(B, T, H, H, K, V)
    return x["a"], x["b"]


# ---- running and comparing ------------------------------------------------------------------------------------------


def run(case, target, x, initial_state=None, cu_seqlens=None, edits=None, snapshots=None, **options) -> RuleOutput:
    """The rule on a target, on poisoned memory, from and to CPU tensors."""
    start, offsets, places = (target.put(y) for y in (initial_state, cu_seqlens, snapshots))
    call = RuleCall(case.rule, target.put(x), {**case.options, **options}, start, offsets)
    with poisoned_memory(), target.in_use():
        out = call.run(edits=edits, snapshots=places, output_final_state=True, return_writes=True, backend=target.kind)
    return to_cpu(out)


def allowed(case: Case, target: Target, x, dtype: torch.dtype) -> float:
    """Of a tensor's error. CPU kernels compute in float32, the others in the operands' type where they share one."""
    if target.kind == "reference":
        return EXACT
    kinds = {torch.float32 if x[name].dtype in case.widened else x[name].dtype for name in case.operands}
    if target.kind == "cpu" or len(kinds) > 1:
        return TOLERANCE[dtype]
    return max(TOLERANCE[dtype], DEVICE_TOLERANCE[kinds.pop()])


def doubled(x):
    """In float64: tensors, dicts of them, Edits' sides."""
    if isinstance(x, dict):
        return {name: doubled(value) for name, value in x.items()}
    if isinstance(x, Edits):
        return replace(x, left=x.left.double(), right=x.right.double())
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def compare(case: Case, x, record=None, which="all", on=None, **call) -> dict[str, RuleOutput]:
    """Runs the targets (`on`, or those that `which` names), then the loop on the same numbers; compares all outputs,
    and the states that the writes give. The reference runs in float64.

    record: pytest's `record_property`. Returns the outputs by target.
    """
    chosen = targets(case, which) if on is None else on
    outs = {}
    for target in chosen:
        wide = target.kind == "reference"
        outs[target.name] = run(case, target, *((doubled(x),) if wide else (x,)), **(_wide(call) if wide else call))
    truth = loop(case, x, **call)
    for target in chosen:
        got = outs[target.name]
        dtype = torch.float64 if target.kind == "reference" else x[case.operands[2]].dtype
        assert got.o.dtype == dtype, f"o with {target.name} is {got.o.dtype}"
        pairs = {"o": (got.o, truth.o), "final_state": (got.final_state, truth.final_state)}
        pairs |= {"left": (got.writes.left, truth.left), "right": (got.writes.right, truth.right)}
        if call.get("snapshots") is not None:
            pairs["snapshots"] = (got.snapshots, truth.snapshots)
            writes = got.writes.to(dtype=torch.float64)
            for name, read in (("snapshots", False), ("read", True)):
                states = writes.states(call["snapshots"], read=read).to(got.snapshots.dtype)
                pairs[f"{name} by the writes"] = (states, getattr(truth, name))
        errors = [
            check_close(
                f"{name} of {case.name} with {target.name}", a, b.reshape(a.shape), allowed(case, target, x, a.dtype)
            )
            for name, (a, b) in pairs.items()
        ]
        assert got.first_nonfinite.tolist() == [-1] * len(got.writes.right), f"first_nonfinite with {target.name}"
        note(record, case, target, dtype, errors)
    return outs


def _wide(call):
    return {name: doubled(value) for name, value in call.items()}


def note(record, case, target, dtype, errors) -> None:
    """For the summary that conftest prints."""
    if record is not None and (target.kind in ("twin", "cuda") or dtype == torch.float32):
        label = " ".join(
            [case.name, target.kind, *([] if target.kind == "cpu" else [str(dtype).removeprefix("torch.")])]
        )
        record(f"relative_rms {label}", max(error.rms for error in errors))
        record(f"worst_element {label}", max(error.worst for error in errors))


# ---- edits ----------------------------------------------------------------------------------------------------------


def edits_for(rows, lengths, H, K, V, count=12, seed=1):
    """Edits of every kind, before and after the read, at first and last positions, several at one place."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(0, rows, (count,), generator=generator)
    lengths = torch.tensor(lengths)
    for i in range(count):  # an empty sequence has no position to edit
        while lengths[row[i]] == 0:
            row[i] = (row[i] + 1) % rows
    position = (torch.rand(count, generator=generator) * lengths[row]).long()
    position[0], position[1] = 0, lengths[row[1]] - 1
    head = torch.randint(0, H, (count,), generator=generator)
    for column in (row, position, head):
        column[4:8] = column[3]
    kinds = ["add", "delete", "replace", "delete", "add", "replace", "add", "delete"]
    kinds += ["add"] * (count - len(kinds))
    left, right = torch.randn(count, K, generator=generator), torch.randn(count, V, generator=generator)
    return Edits(row, position, head, left, right, kinds, torch.randint(0, 2, (count,), generator=generator))
