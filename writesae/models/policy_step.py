"""Policies' edits of one token a row, without running it again: what decoding does.

An edit is a product p q^T on the state, so that state, output and activations follow from those without it: S + p q^T,
o + (p . query) q and, of feature i, `a_i + (v_i . p)(q . w_i)`. Where p q^T is an atom of the site's dictionary those
increments are a column of the Gram matrix of encoder and atoms, which is kept; and without the native write a_i is, of
a head with one decay, its decay times a_i of the token before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..edits import AFTER, BEFORE, Edits
from ..ops.reference.encode import topk
from ..ops.rule import RuleCall, RuleOutput
from ..policies import Change, PolicySite
from ..writes import Writes
from .binding import Binding
from .policy_sites import Group, GroupCodes


@dataclass(eq=False)
class Made:
    """A change that a policy makes: sequence and token in it, counted from the call's first; head of the call."""

    sequence: int
    token: int
    head: int
    change: Change
    when: int
    site: PolicySite


class Step:
    """The edits of a call of one token a row.

    Args:
        output: of the call without them, with its writes. Its final state is changed in place, and its outputs.
        made: of the edits, at least one.
    """

    def __init__(self, binding: Binding, call: RuleCall, output: RuleOutput, made: Sequence[Made]):
        assert output.writes is not None
        self.binding, self.call, self.plain, self.made = binding, call, output, made
        self.writes: Writes = output.writes
        # (sequence, head) of native writes that are not made, and of those taken away after their token's read.
        places = [{(x.sequence, x.head) for x in made if x.change.removes and x.when == w} for w in (BEFORE, AFTER)]
        self.unmade, self.undone = places[0], places[1] - places[0]

    @property
    def fits(self) -> bool:
        """Whether it can be done so. Outputs of half precision are rounded, and would be twice."""
        exact = self.plain.o.dtype in (torch.float32, torch.float64)
        return self.writes.right.shape[3] == 1 and (exact or all(x.when == AFTER for x in self.made))

    def native(self, n: int, head: int) -> tuple[Tensor, Tensor]:
        """Left `[K]` and right `[V]` of the write of one row."""
        left, right = self.writes.left.flatten(0, 1), self.writes.right.flatten(0, 1)
        return left[n, self.writes.left_head(head), 0], right[n, head, 0]

    def output(self) -> RuleOutput:
        """The call's, with the edits in effect."""
        state, o, queries = self.plain.final_state, self.plain.o.flatten(0, 1), None
        assert state is not None
        products = []
        for removed, when in ((self.unmade, BEFORE), (self.undone, AFTER)):
            for n, head in sorted(removed):
                left, right = self.native(n, head)
                products.append((n, head, left, -right, when))
        kept = products[len(self.unmade) :]  # what is added beyond the writes that were made
        for x in self.made:
            sides = x.change.left.to(state), x.change.right.to(state)
            kept.extend((x.sequence, x.head, p, q, x.when) for p, q in zip(*sides, strict=True))
        products = products[: len(self.unmade)] + kept
        for n, head, p, q, when in products:
            state[n, head].addr_(p, q)
            if when == BEFORE:
                queries = self.binding.queries(self.call).flatten(0, 1) if queries is None else queries
                read = p.to(queries) @ queries[n, self.writes.left_head(head)]
                (o[n, head] if o.ndim == 3 else o[n]).add_((read * q).to(o))
        writes = self.writes
        if self.unmade:
            right = writes.right.clone()
            for n, head in self.unmade:
                right.flatten(0, 1)[n, head] = 0
            writes = replace(writes, right=right)
        if kept:
            row, at, lefts, rights, late = zip(*kept, strict=True)
            sides = torch.stack(lefts), torch.stack(rights)
            rows, heads, whens = (torch.tensor(x) for x in (row, at, late))
            writes = replace(writes, edits=Edits(rows, rows * 0, heads, *sides, "add", whens))  # type: ignore[call-arg]
        return replace(self.plain, writes=writes)

    def codes(self, group: Group, heads: dict[int, int], codes: GroupCodes, carry: Tensor | None) -> GroupCodes | None:
        """Codes of a group with the edits in effect, changed in place; None where it has to be encoded again.

        Args:
            heads: {head of the call: slot of the group}.
            codes: without them. carry: what those went on from.
        """
        mine = [x for x in self.made if x.head in heads]
        if group.of_writes:
            return None if any((x.sequence, x.head) in self.unmade for x in mine) else codes
        before = {(x.sequence, x.head) for x in mine if x.when == BEFORE}
        now = codes.carry
        if before and (now is None or codes.offsets is not None):
            return None
        if not mine or now is None:
            return codes
        for removed, when in ((self.unmade, BEFORE), (self.undone, AFTER)):
            for n, head in removed:
                if head in heads:
                    self._remove(group, now, n, head, heads[head], carry)
            for x in mine:
                if x.when == when:
                    now[x.sequence, heads[x.head]] += _moved(group, heads[x.head], x.change, x.site)
            if when == BEFORE:
                for n, head in before:
                    slot = heads[head]
                    values, indices = _topk(now[n, slot] + group.b_enc[slot], group.k)
                    codes.values.flatten(0, 1)[n, slot] = values
                    codes.indices.flatten(0, 1)[n, slot] = indices
        return codes

    def _remove(self, group: Group, now: Tensor, n: int, head: int, slot: int, carry: Tensor | None) -> None:
        if carry is not None:
            now[n, slot] = self.writes.decay.flatten(0, 1)[n, head].exp() * carry[n, slot]
        else:
            left, right = self.native(n, head)
            now[n, slot] -= _responses(group, slot, left[None], right[None])


def _topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk` of one token, without sorting what is below."""
    some = (pre >= pre.topk(k).values[-1]).nonzero().flatten()
    if len(some) < k:  # a NaN
        return topk(pre, k)
    values, order = topk(pre[some], k)
    return values, some[order]


def _moved(group: Group, slot: int, change: Change, site: PolicySite) -> Tensor:
    """`[F]`: how a change moves the activations."""
    if change.atoms is None:
        return _responses(group, slot, change.left, change.right)
    features, doses = change.atoms
    return doses.to(torch.float32) @ torch.stack([site.moved_by(i) for i in features.tolist()])


def _responses(group: Group, slot: int, left: Tensor, right: Tensor) -> Tensor:
    v, w = group.v_enc[slot], group.w_enc[slot]  # [F, r, K], [F, r, V]
    return ((v @ left.to(v).T) * (w @ right.to(w).T)).sum((1, 2))
