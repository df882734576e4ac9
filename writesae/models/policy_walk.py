"""`walk`: the edits that policies make in one call of a layer, as if it were run token by token.

A stretch is run as it is and encoded; at the first token of a row at which a policy acts, the stretch ends, the edit is
made, and the row goes on from there. Stretches are twice as long as the last one, and short after an edit. So what a
policy is shown is the state with every earlier edit in effect, and what nothing acts on is run once. Rows go on at
paces of their own, packed into one call. With all edits known, the call is run by whoever asked, like one with planned
edits; where nothing acts, the first run is that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..edits import ADD, AFTER, BEFORE, DELETE, REPLACE, Edits
from ..ops.rule import RuleCall, RuleOutput
from ..policies import Change, TokenView
from ..writes import Writes
from .frame import Frame
from .policy_sites import GroupCodes, Listener
from .policy_step import Made, Step

if TYPE_CHECKING:
    from .tap import Tap

Piece = tuple[int, int, int]  # sequence, its first token, one past its last


@dataclass(eq=False)
class Player:
    """One attach, at the layer that is running: its listeners and, by group, its codes of a run."""

    tap: Tap
    listeners: list[Listener]
    groups: list[int]  # of those that it listens to
    counts: dict[tuple[int, int], int] = field(default_factory=dict)  # (policy, head) -> tokens at which it acted

    @classmethod
    def of(cls, tap: Tap, frame: Frame) -> Player | None:
        """None where none of its policies acts in this call."""
        here = tap.listeners(frame.site.layer_index)
        if frame.head is not None:
            here = [x for x in here if x.heads == [frame.head]]
        if not here:
            return None
        return cls(tap, here, sorted({x.group for x in here if x.group is not None}))

    def note(self, frame: Frame, call: RuleCall) -> None:
        """Has the tap count what its policies saw and did."""
        B, T = frame.site.binding.size(call)
        tokens = B * T if frame.mask is None else int(frame.mask.sum())
        self.tap.note_policies(frame, tokens, self.counts)


@dataclass(eq=False)
class Walked:
    """What policies did in a call.

    Attributes:
        edits: theirs and the planned ones, None where there are none.
        output: of the call with them, where it has been found on the way; else None.
        codes: {attach: {group: codes}} of that output, of groups that need not be encoded again.
    """

    edits: Edits | None
    output: RuleOutput | None
    codes: dict[Tap, dict[int, GroupCodes]]


@dataclass(eq=False)
class _Run:
    """Some tokens of some sequences, run and encoded."""

    call: RuleCall
    pieces: list[Piece]
    flat: Tensor | None  # [tokens] where they stand among the call's, rows one after another; None: all of them
    output: RuleOutput
    codes: list[dict[int, GroupCodes]]  # by player
    carries: list[dict[int, Tensor | None]]  # what they were encoded from
    edited: bool

    @property
    def writes(self) -> Writes:
        assert self.output.writes is not None
        return self.output.writes


def walk(frame: Frame, call: RuleCall, players: Sequence[Player], planned: Edits | None, backend) -> Walked:
    """Asks every policy at every token that it listens to.

    Args:
        players: outer attaches first.
        planned: edits of the call, positions counted from its first column, rows given.
    Raises:
        ValueError: what a policy answers is no change of its site's state, naming the policy.
    """
    graph = torch.is_grad_enabled()  # which the call has to be part of
    with torch.no_grad():
        return _Walk(frame, call, players, planned, backend, graph).walked()


class _Walk:
    def __init__(self, frame: Frame, call: RuleCall, players, planned: Edits | None, backend, graph: bool):
        self.frame, self.call, self.players, self.planned, self.backend = frame, call, players, planned, backend
        self.graph = graph
        B, T = frame.site.binding.size(call)
        if call.cu_seqlens is None:
            self.bounds = [(b * T, b * T + T) for b in range(B)]
        else:
            offsets = call.cu_seqlens.tolist()
            self.bounds = list(zip(offsets[:-1], offsets[1:], strict=True))
        self.shape = B, T
        self.start = frame.start if call.cu_seqlens is None else 0
        self.real = None if frame.fed is None else frame.fed.flatten().cpu()
        self.fresh = None if frame.mask is None else frame.mask.flatten().cpu()
        self.found: list[Made] = []

    def walked(self) -> Walked:
        whole = self._whole()
        acting = self._ask(whole)
        if not acting:
            codes = {player.tap: found for player, found in zip(self.players, whole.codes, strict=True)}
            return Walked(self.planned, None if self.graph else whole.output, codes)
        if not self.graph and (step := self._step(whole, self.found)) is not None:
            known = self._codes(step, whole)
            return Walked(None, step.output(), known)
        at = {}  # sequence -> (next token, length of the next stretch)
        for n, t in acting.items():
            lo, hi = self.bounds[n]
            if t + 1 < hi - lo:
                at[n] = t + 1, 8 if t else 1
        if at:
            state = self._go_on(whole, [(n, 0, t) for n, (t, _) in at.items()])
            while at:
                at = self._stretch(at, state)
        return Walked(_joined(self.planned, self._edits(self.found)), None, {})

    def _step(self, run: _Run, made: Sequence[Made]) -> Step | None:
        """Edits of a run of one token a row, which needs no other run."""
        if run.edited or any(hi - lo != 1 for _, lo, hi in run.pieces):
            return None
        step = Step(self.frame.site.binding, run.call, run.output, made)
        return step if step.fits else None

    def _codes(self, step: Step, run: _Run) -> dict[Tap, dict[int, GroupCodes]]:
        """Codes with the edits of a step in effect, of groups of which they follow."""
        layer = self.frame.site.layer_index
        known: dict[Tap, dict[int, GroupCodes]] = {}
        for player, codes, carries in zip(self.players, run.codes, run.carries, strict=True):
            known[player.tap] = {}
            for g, of_group in codes.items():
                group = player.tap.group(layer, g)
                heads = {self._head(head): slot for slot, head in enumerate(group.heads)}
                found = step.codes(group, heads, of_group, carries[g])
                if found is not None:
                    known[player.tap][g] = found
        return known

    # ---- running ----------------------------------------------------------------------------------------------

    def _whole(self) -> _Run:
        carries = [{g: p.tap.carry(self.frame, g, self.call.initial_state) for g in p.groups} for p in self.players]
        pieces = [(n, 0, hi - lo) for n, (lo, hi) in enumerate(self.bounds)]
        return self._run(self.call, pieces, None, self.planned, carries)

    def _stretch(self, at: dict[int, tuple[int, int]], state: _State) -> dict[int, tuple[int, int]]:
        """Runs every sequence on for its stretch; what is left to do."""
        pieces = []
        for n, (t, length) in at.items():
            lo, hi = self.bounds[n]
            pieces.append((n, t, min(t + length, hi - lo)))
        run = self._some(pieces, state, self._planned_in(pieces))
        acting = self._ask(run)
        left, again = {}, []
        for i, (n, lo, hi) in enumerate(pieces):
            length = self.bounds[n][1] - self.bounds[n][0]
            if n not in acting:
                state.keep(i, n, run)
                if hi < length:
                    left[n] = hi, 2 * (hi - lo)
            elif (stop := acting[n] + 1) < length:
                left[n] = stop, 2 * (stop - lo) if stop > lo + 1 else 1
                again.append((n, lo, stop))
        if again and not self._stepped(run):
            run = self._some(again, state, self._all_in(again))
            for i, (n, _, _) in enumerate(again):
                state.keep(i, n, run)
        elif again:
            for i, (n, _, _) in enumerate(pieces):
                state.keep(i, n, run)
        return left

    def _stepped(self, run: _Run) -> bool:
        """Makes the edits of a run of one token a row in what it left, if that can be done."""
        piece = {n: (i, lo) for i, (n, lo, _) in enumerate(run.pieces)}
        made = [
            replace(x, sequence=piece[x.sequence][0], token=0)
            for x in self.found
            if x.sequence in piece and x.token == piece[x.sequence][1]
        ]
        step = self._step(run, made)
        if step is None:
            return False
        known = self._codes(step, run)
        if any(len(known[player.tap]) < len(player.groups) for player in self.players):
            return False
        step.output()
        return True

    def _go_on(self, whole: _Run, pieces: list[Piece]) -> _State:
        """States after the first tokens of some sequences, their edits in effect."""
        state = _State(self.call.initial_state, whole.carries)
        run = self._some(pieces, state, self._all_in(pieces))
        for i, (n, _, _) in enumerate(pieces):
            state.keep(i, n, run)
        return state

    def _some(self, pieces: list[Piece], state: _State, edits: Edits | None) -> _Run:
        device = self.call.cu_seqlens.device if self.call.cu_seqlens is not None else None
        flat = torch.cat([torch.arange(self.bounds[n][0] + lo, self.bounds[n][0] + hi) for n, lo, hi in pieces])
        inputs = {name: self._tokens(x, flat) for name, x in self.call.inputs.items()}
        value, _ = self.frame.site.binding.factors(replace(self.call, inputs=inputs))
        offsets = torch.tensor([0, *(hi - lo for _, lo, hi in pieces)]).cumsum(0).to(device or value.device)
        ns = [n for n, _, _ in pieces]
        call = replace(self.call, inputs=inputs, initial_state=state.states(ns), cu_seqlens=offsets)
        return self._run(call, pieces, flat, edits, state.carries(ns))

    def _tokens(self, x: Tensor | None, flat: Tensor) -> Tensor | None:
        if x is None or x.ndim < 3 or x.shape[:2] != self.shape:
            return x  # no input of tokens has fewer axes
        return x.reshape(-1, *x.shape[2:])[flat.to(x.device)][None]

    def _run(self, call: RuleCall, pieces, flat, edits: Edits | None, carries) -> _Run:
        output = call.run(edits=edits, return_writes=True, output_final_state=True, backend=self.backend)
        assert output.writes is not None
        layer, head = self.frame.site.layer_index, self.frame.head
        codes = []
        for player, of_player in zip(self.players, carries, strict=True):
            at = None if head is None else [0]
            codes.append({g: player.tap.codes(layer, g, output.writes, of_player[g], at) for g in player.groups})
        return _Run(call, pieces, flat, output, codes, carries, edits is not None)

    # ---- asking -----------------------------------------------------------------------------------------------

    def _ask(self, run: _Run) -> dict[int, int]:
        """{sequence: its first token at which a policy acts}; what they do is added to `found`."""
        tokens = sum(hi - lo for _, lo, hi in run.pieces)
        asked = []
        for p, player in enumerate(self.players):
            for listener in player.listeners:
                codes = None if listener.group is None else run.codes[p][listener.group]
                marks = listener.asked(codes, tokens, lambda: self._positions(run))
                if marks is not None:
                    asked.append((p, listener, marks))
        if not asked:
            return {}
        some = torch.stack([marks.any(1) for _, _, marks in asked]).any(0)
        if self.real is not None:
            some &= self.real if run.flat is None else self.real[run.flat]
        acting: dict[int, int] = {}
        piece, first = 0, 0  # of the token looked at, and where that piece begins
        for token in some.nonzero().flatten().tolist():
            while token >= first + run.pieces[piece][2] - run.pieces[piece][1]:
                first += run.pieces[piece][2] - run.pieces[piece][1]
                piece += 1
            n, lo, _ = run.pieces[piece]
            if n not in acting and self._ask_at(run, asked, token, piece, n, lo + token - first):
                acting[n] = lo + token - first
        return acting

    def _positions(self, run: _Run) -> Tensor:
        return torch.cat([torch.arange(lo, hi) for _, lo, hi in run.pieces]) + self.start

    def _ask_at(self, run: _Run, asked, token: int, piece: int, n: int, t: int) -> bool:
        acts = False
        flat = self.bounds[n][0] + t
        fresh = self.fresh is None or bool(self.fresh[flat])
        for p, listener, marks in asked:
            for slot in marks[token].nonzero().flatten().tolist():
                changes = self._answer(run, p, listener, token, slot, piece, n, t)
                if not changes:
                    continue
                acts, head = True, self._head(listener.heads[slot])
                when = AFTER if listener.policy.read == "after" else BEFORE
                self.found.extend(Made(n, t, head, change, when, listener.sites[slot]) for change in changes)
                if fresh:
                    counts, key = self.players[p].counts, (listener.number, listener.heads[slot])
                    counts[key] = counts.get(key, 0) + 1
        return acts

    def _head(self, head: int) -> int:
        """Its number in the call."""
        return head if self.frame.head is None else 0

    def _answer(self, run: _Run, p: int, listener: Listener, token: int, slot: int, piece: int, n: int, t: int):
        site, policy, writes = listener.sites[slot], listener.policy, run.writes
        b, at = divmod(token, writes.right.shape[1])
        head = self._head(site.head)
        if listener.group is None:
            features, values = torch.empty(0, dtype=torch.int64, device=site.device), writes.right.new_empty(0)
        else:
            features, values = run.codes[p][listener.group].of_token(token, slot, len(listener.heads))
        view = TokenView(
            site, n + self.frame.first_row, t + self.start, features, values, listener.mine(slot, features),
            lambda: (writes.left[b, at, writes.left_head(head), -1], writes.right[b, at, head, -1]),
            lambda which: self._activation(run, p, listener, slot, token, piece, which),
        )  # fmt: skip
        answer = policy.act(view)
        changes = [] if answer is None else [answer] if isinstance(answer, Change) else list(answer)
        for change in changes:
            if not isinstance(change, Change):
                raise ValueError(
                    f"policies: expected {type(policy).__name__}.act to return what view.add, view.delete or "
                    f"view.replace give, or None, got {type(change).__name__}"
                )
        return changes

    def _activation(self, run: _Run, p: int, listener: Listener, slot: int, token: int, piece: int, which: Tensor):
        """`[m]` pre-activations of some features at one token of a run."""
        if listener.group is None:
            raise ValueError(f"view: expected a dictionary at site {listener.sites[slot].key}, got none")
        group = self.players[p].tap.group(self.frame.site.layer_index, listener.group)
        writes = run.writes
        codes = run.codes[p][listener.group]
        v, w, b = group.v_enc[slot], group.w_enc[slot], group.b_enc[slot]
        if len(which) and not 0 <= int(which.min()) <= int(which.max()) < len(v):
            raise ValueError(f"features: expected 0 <= feature < {len(v)}, got {which.tolist()}")
        if not run.edited and not group.of_writes and codes.carry is not None and self._last(run, piece) == token:
            return codes.carry[piece, slot][which] + b[which]
        writes = writes.memoryless() if group.of_writes else writes
        carry = run.carries[p][listener.group]
        carry = None if carry is None else carry[:, slot : slot + 1][:, :, which]
        found = ops.activations(
            writes, v[which][None], w[which][None], torch.arange(len(which), device=v.device).expand(
                *writes.right.shape[:2], 1, -1
            ).contiguous(), b[which][None], heads=[self._head(listener.heads[slot])], carry=carry, backend=self.backend,
        )  # fmt: skip
        return found.flatten(0, 1)[token, 0]

    @staticmethod
    def _last(run: _Run, piece: int) -> int:
        """The last token of a piece, counted through the run."""
        return sum(hi - lo for _, lo, hi in run.pieces[: piece + 1]) - 1

    # ---- edits ------------------------------------------------------------------------------------------------

    def _planned_in(self, pieces: list[Piece]) -> Edits | None:
        return None if self.planned is None else _inside(self.planned, pieces)

    def _all_in(self, pieces: list[Piece]) -> Edits | None:
        """Planned edits and those found, of some tokens."""
        inside = {n: (i, lo, hi) for i, (n, lo, hi) in enumerate(pieces)}
        mine = []
        for x in self.found:
            if x.sequence in inside:
                i, lo, hi = inside[x.sequence]
                if lo <= x.token < hi:
                    mine.append(replace(x, sequence=i, token=x.token - lo))
        return _joined(self._planned_in(pieces), self._edits(mine) if mine else None)

    @staticmethod
    def _edits(found: Sequence[Made]) -> Edits:
        places, codes = [], []
        left: list[Tensor] = []
        right: list[Tensor] = []
        for x in found:
            change, when, m = x.change, x.when, len(x.change.left)
            if change.removes:
                codes.append((REPLACE if m else DELETE, when))
                codes += [(ADD, when)] * (m - 1)
            else:
                codes += [(ADD, when)] * m
            alone = change.removes and not m
            places += [(x.sequence, x.token, x.head)] * (m + alone)
            for sides, side in ((left, change.left), (right, change.right)):
                sides.append(side.new_zeros(1, side.shape[-1]) if alone else side)
        kind, late = torch.tensor(codes, dtype=torch.int8).unbind(1)
        row, position, head = torch.tensor(places).unbind(1)
        dtype = torch.float64 if left[0].dtype == torch.float64 else torch.float32
        p, q = (torch.cat([x.to(dtype) for x in side]) for side in (left, right))
        return Edits(row, position, head, p, q, kind, late)


class _State:
    """Where each sequence stands: its state, and what its codes go on from."""

    def __init__(self, initial: Tensor | None, carries: list[dict[int, Tensor | None]]):
        self._initial, self._first = initial, carries
        self._states: dict[int, Tensor] = {}
        self._carries: list[dict[int, dict[int, Tensor | None]]] = [{g: {} for g in x} for x in carries]

    def keep(self, i: int, n: int, run: _Run) -> None:
        """Sequence n is where piece i of a run ends."""
        final = run.output.final_state
        assert final is not None
        self._states[n] = final[i]
        for kept, codes in zip(self._carries, run.codes, strict=True):
            for g, found in codes.items():
                kept[g][n] = None if found.carry is None else found.carry[i]

    def states(self, ns: list[int]) -> Tensor | None:
        if all(n in self._states for n in ns):
            return torch.stack([self._states[n] for n in ns])
        return None if self._initial is None else self._initial[ns]

    def carries(self, ns: list[int]) -> list[dict[int, Tensor | None]]:
        found = []
        for first, kept in zip(self._first, self._carries, strict=True):
            mine: dict[int, Tensor | None] = {}
            for g, start in first.items():
                if all(n in self._states for n in ns):
                    parts = [x for x in (kept[g][n] for n in ns) if x is not None]
                    mine[g] = torch.stack(parts) if len(parts) == len(ns) else None
                else:
                    mine[g] = None if start is None else start[ns]
            found.append(mine)
        return found


def _joined(planned: Edits | None, found: Edits | None) -> Edits | None:
    if planned is None or found is None:
        return found if planned is None else planned
    device = found.right.device
    return Edits.cat([planned._with(left=planned.left.to(device), right=planned.right.to(device)), found])


def _inside(edits: Edits, pieces: list[Piece]) -> Edits | None:
    """Edits of some tokens, rows and positions counted in them."""
    parts = []
    for i, (n, lo, hi) in enumerate(pieces):
        mine = edits._at(((edits.row == n) & (edits.position >= lo) & (edits.position < hi)).nonzero().flatten())
        parts.append(mine._with(row=torch.full_like(mine.row, i), position=mine.position - lo))
    found = Edits.cat(parts)
    return found if len(found) else None
