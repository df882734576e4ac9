"""`Tap`: what one `attach` saw. Turns each call's `Writes` into `Firings` with the dictionaries it was given."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor, nn

from .. import ops
from ..edits import Edits
from ..firings import Firings
from ..ops._transforms import transformed
from ..policies import Policy, PolicyReport
from ..writes import Writes
from .binding import LayerSite
from .carries import Carries, Carry
from .finite import Check, Checks
from .frame import Frame
from .gather import Gathered
from .grid import Grid, Tokens, check_activations, feature_bits, rounded
from .planned_edits import PlannedEdits
from .policy_sites import Group, GroupCodes, Listener, PolicySites
from .sites import device_of

DENSE_KINDS = ("matrix", "flat")  # their encoder reads whole states
_DENSE_BLOCK = 64  # states held at a time on that path


class Tap:
    """What an `attach` context yields.

    Attributes:
        writes: `{layer: Writes}` of the latest call of each hooked layer (`record_writes=True` only). Rows and columns
            are those of that call: while decoding with a cache, one column. With gradients on, part of the graph.
        write_gradients: `{layer: [B, T, H, V]}` (`write_gradients=True` only) of the latest backward pass: how its loss
            changes as `writes[layer].right` is changed, later tokens and layers answering to it. So `right . gradient`
            is, to first order, minus what deleting that write does to the loss. 0 where an edit removed the write or
            beta is 0.
        starts: `{layer: column}` at which that call's first token stands in its row.
        calls: `{layer: number of calls}` since attaching; not reset by `clear`.
        applied: `{layer: [E] bool}`: which of the layer's planned edits have applied so far.
        policies: a `PolicyReport` for each policy, in order: how often it has acted.

    All of it, firings too, is of calls that came to their end: what a failed forward pass recorded is taken back.
    """

    def __init__(self, sites: Mapping[int, Mapping[int, Any]], edits: Mapping[int, Edits], options: dict):
        self.writes: dict[int, Writes] = {}
        self.write_gradients: dict[int, Tensor] = {}
        self.starts: dict[int, int] = {}
        self.calls: dict[int, int] = {layer: 0 for layer in sorted({*sites, *edits})}
        self._sites, self._planned = sites, PlannedEdits(edits)
        self.applied = self._planned.applied
        self.policies: list[PolicyReport] = []
        self._policy_sites: PolicySites | None = None
        self._record_writes = options["record_writes"]
        self._activations = options["activations"]
        self._encoding = {"backend": options["backend"], "precision": options["precision"]}
        self._lock = threading.Lock()
        self._gathered = Gathered()
        self._checks: list[Checks] = []
        self._groups: dict[int, list[Group]] = {}
        self._fire_per_token = 0  # of all layers, top-k alone
        self._dense: dict[int, dict[int, Any]] = {}
        self._carries = Carries()

    def __repr__(self) -> str:
        sites = [(layer, head) for layer, heads in self._sites.items() for head in heads]
        shown = ", ".join(map(str, sites[:4])) + (f", ... ({len(sites)})" if len(sites) > 4 else "")
        edits = ""
        if self.applied:
            done, planned = (sum(f(x) for x in self.applied.values()) for f in (lambda x: int(x.sum()), len))
            edits = f", edits {done} of {planned} applied"
        return f"Tap(sites [{shown}], calls {sum(self.calls.values())}{edits})"

    # ---- public -----------------------------------------------------------------------------------------------

    @property
    def firings(self) -> Firings:
        """Every firing since the last `clear`, call by call. Row: batch row as the model was fed (with beam search,
        batch x beams rows), or sequence of a packed batch. Position: column in that row, cached ones counted.

        They are on the host. Of a model on a device they stay there until this asks for them, 4 to 6 bytes a top-k
        code, and then cross in one copy; more than 1 GiB of them move over meanwhile. `device_firings` leaves them.

        Raises:
            ValueError: a NaN or infinity in a state (found here for a model on a device, in the forward pass on a CPU).
        """
        with self._lock:
            self._require_finite()
            return self._gathered.joined()

    @property
    def device_firings(self) -> Firings:
        """The same on the device of the model: `LazyFirings`, whose codes nobody copies and whose columns are computed
        there, each when it is asked for. `of_site` and `counts` do not wait for the device. Of a model on a CPU these
        are `firings`.

        A NaN or infinity in a state is not looked for here, but by `firings`, `clear` and the end of the context.

        Raises:
            ValueError: the hooked layers are on several devices.
        """
        with self._lock:
            return self._gathered.on_device()

    def take(self, mask: Tensor | None = None) -> Callable[[], Firings]:
        """Hands over the firings since the last `clear` or `take`, as a function that returns them when called.

        A model on a device can be fed the next batch before that; the firings cross meanwhile, in one copy. The
        function raises what `firings` would.

        Args:
            mask: `[B, T]` on the host, where there was one call: False or 0 at its pads, whose codes then do not cross.
        """
        with self._lock:
            gathered, checks, self._gathered, self._checks = self._gathered, self._checks, Gathered(), []
            if mask is not None:
                gathered.drop_pads(mask)
            gathered.leave()

        def firings() -> Firings:
            for check in checks:
                check.require()
            return gathered.joined()

        return firings

    def clear(self) -> None:
        """Forgets the firings and writes seen so far. `calls` counts on; a cached generation goes on unharmed."""
        with self._lock:
            self._require_finite()
            self._gathered, self.writes, self.write_gradients, self.starts = Gathered(), {}, {}, {}

    def _require_finite(self) -> None:
        """Raises for the first of the checks on their way that found something. With the lock held."""
        checks, self._checks = self._checks, []
        for check in checks:
            check.require()

    # ---- set up -----------------------------------------------------------------------------------------------

    def prepare(self, sites: Mapping[int, LayerSite], model: nn.Module, policies: Sequence[Policy]) -> None:
        """Stacks the dictionaries' factors, once, and binds policies. Raises ValueError where one cannot act."""
        if policies:
            self._policy_sites = PolicySites(policies, self._sites, model, sites)
            self.policies = [PolicyReport(*x) for x in zip(policies, self._policy_sites.sites, strict=True)]
        for layer, heads in self._sites.items():
            device = device_of(sites[layer].module)
            alike: dict[tuple, list[tuple[int, Any, tuple]]] = {}
            for head, sae in heads.items():
                if sae is None:
                    continue
                if self._activations != "exact":
                    check_activations(self._activations, sae.F)
                if sae.kind in DENSE_KINDS:
                    self._dense.setdefault(layer, {})[head] = sae
                    continue
                pursued = getattr(sae, "sparsity", None) == "pursuit"
                factors = (*sae.encoder(), *(sae.atoms() if pursued else ()))
                factors = tuple(x.detach().to(device, torch.float32) for x in factors)
                of_writes = getattr(sae, "target", "state") == "write"
                # Policies act within a call, and of layers that make a call a head within each of those.
                alone = head if policies and sites[layer].binding.one_head_a_call else None
                key = (*factors[0].shape, int(sae.k), sae.threshold is None, of_writes, pursued, alone)
                alike.setdefault(key, []).append((head, sae, factors))
            for (F, _, _, k, top, of_writes, *_), members in alike.items():
                stacked = [torch.stack(parts).contiguous() for parts in zip(*(m[2] for m in members), strict=True)]
                threshold = None
                if not top:
                    threshold = torch.stack(
                        [torch.as_tensor(m[1].threshold, dtype=torch.float32).detach().expand(F) for m in members]
                    )
                v_enc, w_enc, b_enc, *atoms = stacked
                self._groups.setdefault(layer, []).append(
                    Group(
                        [m[0] for m in members], v_enc, w_enc, b_enc, k, threshold, of_writes,
                        (atoms[0], atoms[1]) if atoms else None,
                    )
                )  # fmt: skip
                self._fire_per_token += len(members) * k * top
            if self._policy_sites is not None:
                self._policy_sites.listen(layer, [group.heads for group in self._groups.get(layer, ())])
        if self._dense:
            where = ", ".join(f"layer {layer} head {head}" for layer, by in self._dense.items() for head in by)
            warnings.warn(
                f"attach: slow path for {where}: a dense encoder reads whole states, which have to be rebuilt token by "
                'token; dictionaries of kind "bilinear" do without',
                RuntimeWarning,
                stacklevel=5,
            )

    # ---- edits and policies -----------------------------------------------------------------------------------

    def edits_of_call(self, frame: Frame, lengths: list[int]) -> Edits | None:
        """The planned edits that fall into the columns of this call, positions counted from its first."""
        found = self._planned.of_call(frame, lengths)
        if found is None:
            return None
        edits, which = found
        pending = self._pending_of(frame)
        pending.applied.append((frame.site.layer_index, which))
        if frame.call is None:
            pending.keep()
        return edits

    def listeners(self, layer: int) -> list[Listener]:
        """Policies at a layer."""
        return [] if self._policy_sites is None else self._policy_sites.layers.get(layer, [])

    def group(self, layer: int, number: int) -> Group:
        """Heads of a layer that are encoded together, by number."""
        return self._groups[layer][number]

    def note_policies(self, frame: Frame, tokens: int, counts: Mapping[tuple[int, int], int]) -> None:
        """Policies have seen a call of so many real tokens; counts: {(policy, head): at how many it acted}."""
        pending = self._pending_of(frame)
        layer = frame.site.layer_index
        for number, sites in enumerate(() if self._policy_sites is None else self._policy_sites.sites):
            heads = (h for ell, h in sites if ell == layer and frame.head in (None, h))
            pending.acted += [(number, (layer, h), tokens, counts.get((number, h), 0)) for h in heads]
        if frame.call is None:
            pending.keep()

    def require_everything_ran(self, strict: bool) -> None:
        """Raises ValueError when a site was never called, or a state broke; where an edit's position never came or a
        policy never acted, warns or, if `strict`, raises."""
        with self._lock:
            self._require_finite()
        for layer, count in self.calls.items():
            if not count:
                what = f"site(s) {[(layer, h) for h in self._sites[layer]]}" if layer in self._sites else "edits"
                raise ValueError(f"sites: layer {layer} never ran while attached, so its {what} saw nothing")
        self._planned.require_all_applied(strict, stacklevel=6)
        for i, report in enumerate(self.policies):
            if not report.total:
                message = f"policies: policies[{i}], {report.policy!r}, never acted, at any of its sites"
                if strict:
                    raise ValueError(message)
                warnings.warn(message, RuntimeWarning, stacklevel=5)

    # ---- recording --------------------------------------------------------------------------------------------

    def check_finite(self, frame: Frame, writes: Writes, first: Tensor) -> None:
        """Raises ValueError at the first NaN or infinity written; for a device, as soon as somebody asks the tap.

        Args:
            first: `[B]` where it stands, as `RuleOutput.first_nonfinite`.
        """
        check = Check(first, writes.shape[2], frame.site.layer_index, frame.start, writes.cu_seqlens)
        if first.device.type == "cpu":
            check.require(first)
            return
        pending = self._pending_of(frame)
        pending.checks.append(check)
        if frame.call is None:
            pending.keep()

    def record(
        self, frame: Frame, writes: Writes, initial_state: Tensor | None, final_state: Tensor | None,
        codes: Mapping[int, GroupCodes] | None = None,
    ) -> None:  # fmt: skip
        """Takes in one call of one hooked layer. Thread-safe. codes: by group, where they are known already."""
        layer = frame.site.layer_index
        found = without_tangents(writes)  # codes are numbers only
        pending = self._pending_of(frame)
        parts = self._firings_of(layer, frame, found, initial_state, final_state, codes or {}, pending)
        B, T = writes.right.shape[:2]
        room = B * T * self._fire_per_token
        if self._record_writes:
            writes = replace(writes, initial_state=self._kept_state(frame, writes, initial_state))
        for part in parts:
            pending.gathered.add(part, room)
        pending.called.append((layer, self.writes.get(layer), self.starts.get(layer)))
        with self._lock:
            self.calls[layer] += 1
            if self._record_writes:
                self.writes[layer], self.starts[layer] = writes, frame.start
        if frame.call is None:  # a layer called on its own: there is nothing around it that could fail
            pending.keep()

    def _pending_of(self, frame: Frame) -> _Pending:
        """What the model's call in progress has recorded so far."""
        if frame.call is None:
            return _Pending(self)
        if self not in frame.call.pending:
            frame.call.pending[self] = _Pending(self)
        return frame.call.pending[self]

    @torch.no_grad()
    def _firings_of(
        self, layer: int, frame: Frame, writes: Writes, initial_state, final_state, known: Mapping[int, GroupCodes],
        pending: _Pending,
    ) -> list:  # fmt: skip
        parts: list[Grid | Firings] = []
        if layer in self._groups or layer in self._dense:
            tokens = Tokens.of(writes, frame.start, frame.mask, frame.first_row)
            packed = self._activations == "packed"
            for i, group in enumerate(self._groups.get(layer, ())):
                codes, F = known.get(i), group.v_enc.shape[1]
                if codes is None:
                    codes = self.codes(layer, i, writes, self.carry(frame, i, initial_state))
                carried = frame.cache is not None and frame.head is None and final_state is not None
                if carried and codes.carry is not None:
                    kept = Carry.of(codes.carry, initial_state, final_state, group.heads)
                    pending.carries.append((frame.cache, (layer, i), kept))
                values = codes.values.detach().float()
                if codes.offsets is not None:
                    # Above a threshold there are as many as there are, so a device has been waited for already.
                    values = rounded(values, F) if packed else values
                    parts.append(_above(replace(codes, values=values), group.heads, tokens, layer))
                    continue
                bits = feature_bits(F) if packed else None
                parts.append(Grid((values, codes.indices), bits, tokens, tuple(group.heads), layer, F))
            for head, sae in self._dense.get(layer, {}).items():
                for part in _dense_firings(sae, writes, head, tokens, layer):
                    activation = rounded(part.activation, sae.F) if packed else part.activation
                    parts.append(replace(part, activation=activation))
        return parts

    def codes(
        self, layer: int, number: int, writes: Writes, carry: Tensor | None = None, heads: list[int] | None = None
    ) -> GroupCodes:
        """Codes of one group of a layer.

        Args:
            carry: `[N, Hs, F]` activations that they go on from; None: what the writes' initial state says.
            heads: where the group's heads are among the writes; None: under their numbers.
        """
        group = self._groups[layer][number]
        heads = group.heads if heads is None else heads
        if group.atoms is not None:
            return GroupCodes(*_pursued(group, writes, heads), None, None)
        found = ops.encode(
            writes.memoryless() if group.of_writes else writes, group.v_enc, group.w_enc, group.b_enc, k=group.k,
            threshold=group.threshold, heads=heads, carry=carry, **self._encoding,
        )  # fmt: skip
        # Of other gates the state itself is what goes on.
        carried = found.carry if writes.gate == "scalar" and not group.of_writes else None
        return GroupCodes(found.values, found.indices, found.offsets, carried)

    def carry(self, frame: Frame, number: int, initial_state: Tensor | None) -> Tensor | None:
        """`[N, Hs, F]`: activations after the last call, if the cache's state is still that."""
        kept = self._carry(frame, number, initial_state)
        return None if kept is None else kept.carry

    def _carry(self, frame: Frame, number: int, initial_state: Tensor | None) -> Carry | None:
        if frame.cache is None or frame.head is not None or initial_state is None:
            return None
        layer = frame.site.layer_index
        with self._lock:
            return self._carries.get(frame.cache, (layer, number), initial_state, self._groups[layer][number].heads)

    def _kept_state(self, frame: Frame, writes: Writes, initial_state: Tensor | None) -> Tensor | None:
        """The state before the call, for writes that outlive it: the cache updates its own in place."""
        state = writes.initial_state
        if state is None:
            return None
        copy = None
        if state is initial_state and state.device.type != "cpu" and self._groups.get(frame.site.layer_index):
            kept = self._carry(frame, 0, state)
            copy = None if kept is None else kept.untouched()
        return state.clone() if copy is None else copy


class _Pending:
    """What one call of a model has put into a tap: its own until the call comes to its end, and then the tap's."""

    def __init__(self, tap: Tap):
        self.tap = tap
        self.gathered = Gathered()
        self.carries: list[tuple[Any, tuple[int, int], Carry]] = []  # cache, (layer, group)
        self.checks: list[Check] = []
        self.called: list[tuple[int, Writes | None, int | None]] = []  # layer, writes and start of the call before
        self.applied: list[tuple[int, Tensor]] = []  # layer, which of its edits
        self.acted: list[tuple[int, tuple[int, int], int, int]] = []  # policy, site, tokens seen, tokens acted at

    def keep(self) -> None:
        """The call has come to its end."""
        checks = [Checks(self.checks)] if self.checks else []
        with self.tap._lock:
            self.tap._gathered.extend(self.gathered)
            self.tap._checks.extend(checks)
            for kept in self.carries:
                self.tap._carries.keep(*kept)
            for layer, which in self.applied:
                self.tap.applied[layer][which] = True
            for number, site, seen, acted in self.acted:
                report = self.tap.policies[number]
                report.seen[site] += seen
                report.applied[site] += acted

    def undo(self) -> None:
        """The call has failed: as if it had never been."""
        tap = self.tap
        with tap._lock:
            for layer, writes, start in reversed(self.called):
                tap.calls[layer] -= 1
                tap.writes.pop(layer, None)
                tap.starts.pop(layer, None)
                if writes is not None:
                    tap.writes[layer] = writes
                if start is not None:
                    tap.starts[layer] = start


def without_tangents(writes: Writes) -> Writes:
    """The same numbers without what forward mode carries beside them."""
    if not transformed(writes.decay, writes.left, writes.right, writes.initial_state):
        return writes
    names = ("decay", "left", "right", "beta", "initial_state")
    given = {name: getattr(writes, name) for name in names}
    return replace(writes, **{n: forward_mode.unpack_dual(x).primal for n, x in given.items() if x is not None})


def _above(codes, heads: list[int], tokens: Tokens, layer: int) -> Firings:
    """Codes above a threshold to firings, without a loop over tokens."""
    shape = (*tokens.row.shape, len(heads))
    fires, counts = codes.values > 0, codes.offsets.diff()
    if tokens.real is not None:
        fires &= tokens.real[:, :, None].expand(shape).flatten().repeat_interleave(counts)
    place = torch.arange(len(counts), device=fires.device).repeat_interleave(counts)[fires]
    head = torch.tensor(heads, dtype=torch.int32).to(fires.device, non_blocking=True)
    per_site = (tokens.row[:, :, None], tokens.position[:, :, None], head)
    row, position, head = (x.to(torch.int32).expand(shape).flatten()[place] for x in per_site)
    return _columns_to_firings(row, position, layer, head, codes.indices[fires], codes.values[fires])


def _columns_to_firings(row, position, layer: int, head, feature, value) -> Firings:
    row, position, head, feature = (x.to("cpu", torch.int32) for x in (row, position, head, feature))
    return Firings(row, position, torch.full_like(row, layer), head, feature, value.detach().to("cpu", torch.float32))


def _pursued(group: Group, writes: Writes, heads: list[int]) -> tuple[Tensor, Tensor]:
    """Codes `[B, T, Hs, k]` of a group's writes by orthogonal matching pursuit."""
    assert group.atoms is not None
    found = []
    for i, head in enumerate(heads):
        one = writes.head(head)
        v, w = (x[i] for x in group.atoms)
        found.append(
            ops.pursuit(one.left.squeeze(2), one.right.squeeze(2), group.v_enc[i], group.w_enc[i], v, w, group.k)
        )
    values, indices = (torch.stack(x, 2) for x in zip(*found, strict=True))
    return values.float(), indices


def _dense_firings(sae, writes: Writes, head: int, tokens: Tokens, layer: int) -> Iterator[Firings]:
    """Firings of a dictionary with a dense encoder, from states rebuilt a block at a time."""
    if getattr(sae, "target", "state") == "write":
        writes = writes.memoryless()
    writes = writes.head(head)
    planned = writes.edits
    for n, b, start, stop in writes.sequences():
        state = None if writes.initial_state is None else writes.initial_state[n : n + 1]
        for lo in range(start, stop, _DENSE_BLOCK):
            hi = min(lo + _DENSE_BLOCK, stop)
            edits = None
            if planned is not None:
                at = planned.position + start
                e = planned[((planned.row == n) | (planned.row < 0)) & (at >= lo) & (at < hi)]
                edits = e._with(row=e.row * 0, position=e.position + start - lo)
            block = replace(writes.tokens(b, lo, hi), initial_state=state, edits=edits)
            states = block.states(range(hi - lo))[0, :, 0]  # [t, K, V]
            state = states[-1:, None]
            if edits is not None and edits.any_after:  # codes are of what the queries read
                states = block.states(range(hi - lo), read=True)[0, :, 0]
            codes = sae.encode(states)
            fires = codes.values > 0
            if tokens.real is not None:
                fires &= tokens.real[b, lo:hi, None]
            t = fires.nonzero()[:, 0]
            row, position = tokens.row[b, lo:hi][t], tokens.position[b, lo:hi][t]
            yield _columns_to_firings(
                row, position, layer, torch.full_like(row, head), codes.indices[fires], codes.values[fires]
            )
