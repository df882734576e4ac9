"""What the policies of an attach listen to: their sites, and the tokens of a call at which each has to be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..policies import Policy, PolicySite
from .binding import LayerSite
from .directions import token_directions
from .sites import device_of

_NO_CODES = ("matrix", "flat")  # dense encoders, which read whole states


@dataclass(eq=False)
class Group:
    """Heads of one layer whose dictionaries have one shape, so that one `ops.encode` call serves them all."""

    heads: list[int]
    v_enc: Tensor  # [Hs, F, r, K]
    w_enc: Tensor  # [Hs, F, r, V]
    b_enc: Tensor  # [Hs, F]
    k: int
    threshold: Tensor | None  # [Hs, F]
    of_writes: bool
    atoms: tuple[Tensor, Tensor] | None  # [Hs, F, r, K], [Hs, F, r, V] of pursuit dictionaries


@dataclass(eq=False)
class GroupCodes:
    """Codes of a run of tokens for the heads of one group of dictionaries, as `ops.encode` gives them."""

    values: Tensor
    indices: Tensor
    offsets: Tensor | None
    carry: Tensor | None

    def of_token(self, token: int, slot: int, slots: int) -> tuple[Tensor, Tensor]:
        """Features `[n]` and codes `[n]` that fire at one token (counted through the rows) and head."""
        if self.offsets is not None:
            lo, hi = self.offsets[token * slots + slot : token * slots + slot + 2].tolist()
            fires = self.values[lo:hi] > 0
            return self.indices[lo:hi][fires], self.values[lo:hi][fires]
        values, indices, counts = self._by_token
        n = counts[token][slot]
        return indices[token, slot, :n], values[token, slot, :n]

    @cached_property
    def _by_token(self) -> tuple[Tensor, Tensor, list[list[int]]]:
        """Top-k values and indices `[tokens, slots, k]`, copied (they may be changed), and how many are above 0."""
        values, indices = self.values.flatten(0, 1).clone(), self.indices.flatten(0, 1).clone()
        return values, indices, (values > 0).sum(-1).tolist()


@dataclass(eq=False)
class Listener:
    """One policy at the heads of one layer whose dictionaries are encoded together, or at heads without codes.

    Attributes:
        number: of the policy in its attach.
        group: number of the group in its layer, None without codes.
        heads: value head of each slot. sites: {slot: site} of those the policy acts on.
        wanted: `[slots, F]` bool, the features it listens to; None: every token of its sites.
        positions: `[n]` columns at which it is asked; None: all.
    """

    number: int
    policy: Policy
    group: int | None
    heads: list[int]
    sites: dict[int, PolicySite]
    wanted: Tensor | None
    positions: Tensor | None

    def asked(self, codes: GroupCodes | None, tokens: int, position: Callable[[], Tensor]) -> Tensor | None:
        """`[tokens, slots]` bool: where it has to be asked; None: nowhere.

        Args:
            tokens: of the run, all rows together. position: gives `[tokens]` their columns.
        """
        if self.wanted is None:
            mine = torch.zeros(len(self.heads), dtype=torch.bool)
            mine[list(self.sites)] = True
            asked = mine.expand(tokens, -1)
        else:
            assert codes is not None
            asked = self._heard(codes, self.wanted, tokens)
        if self.positions is not None:
            here = torch.isin(position(), self.positions.to(position().device))
            asked = asked.to(here.device) & here[:, None]
        return asked.cpu() if bool(asked.any()) else None

    def _heard(self, codes: GroupCodes, wanted: Tensor, tokens: int) -> Tensor:
        slots = len(self.heads)
        if codes.offsets is None:
            slot = torch.arange(slots, device=wanted.device)[:, None]
            indices, values = (x.flatten(0, 1) for x in (codes.indices, codes.values))
            return (wanted[slot, indices] & (values > 0)).any(-1)
        place = torch.arange(tokens * slots, device=wanted.device).repeat_interleave(codes.offsets.diff())
        heard = place[wanted[place % slots, codes.indices] & (codes.values > 0)]
        found = torch.zeros(tokens * slots, dtype=torch.bool, device=wanted.device)
        found[heard] = True
        return found.view(tokens, slots)

    def mine(self, slot: int, features: Tensor) -> Tensor:
        """Which of these features it listens to."""
        return torch.ones_like(features, dtype=torch.bool) if self.wanted is None else self.wanted[slot, features]


def check_policies(policies: Sequence[Policy] | None, sites: Mapping[tuple[int, int], Any]) -> list[Policy]:
    """The policies of `attach`. Raises ValueError for something else, and for sites that the attach does not have."""
    if policies is None:
        return []
    if isinstance(policies, (str, Policy)) or not isinstance(policies, Sequence):
        raise ValueError(f"policies: expected a list of policies, got {type(policies).__name__}")
    for i, policy in enumerate(policies):
        if not isinstance(policy, Policy) or not hasattr(policy, "read"):
            hint = " (whose __init__ does not call Policy's)" if isinstance(policy, Policy) else ""
            raise ValueError(f"policies[{i}]: expected a writesae.Policy, got {type(policy).__name__}{hint}")
        unknown = [at for at in policy.sites or () if at not in sites]
        if unknown:
            raise ValueError(
                f"policies[{i}]: expected sites of this attach, got {unknown[0]}; list it in sites, with its dictionary"
            )
    return list(policies)


class PolicySites:
    """The policies of one attach, by layer.

    Attributes:
        sites: of each policy, its sites by (layer, head).
        layers: {layer: listeners}.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        dictionaries: Mapping[int, Mapping[int, Any]],
        model: nn.Module,
        found: Mapping[int, LayerSite],
    ):
        """Raises ValueError where a policy cannot act on one of its sites, naming both."""
        self.policies = policies
        self.sites: list[dict[tuple[int, int], PolicySite]] = []
        self.layers: dict[int, list[Listener]] = {}
        shared: dict[tuple[int, int], PolicySite] = {}
        for i, policy in enumerate(policies):
            mine = {}
            for layer, head, dictionary in _places(policy, dictionaries):
                at = (layer, head)
                if at not in shared:
                    shared[at] = _site(found[layer], head, dictionary, model)
                try:
                    if dictionary is not None and policy.reads_codes and dictionary.kind in _NO_CODES:
                        raise ValueError(
                            f"expected an encoder of factors at site {at}, got kind {dictionary.kind}, whose codes "
                            "need whole states"
                        )
                    policy.check(shared[at])
                except ValueError as error:
                    raise ValueError(f"policies[{i}] ({type(policy).__name__}): {error}") from None
                mine[at] = shared[at]
            if not mine:
                raise ValueError(
                    f"policies[{i}] ({type(policy).__name__}): expected sites with a dictionary among those of this "
                    "attach, got none"
                )
            self.sites.append(mine)

    def listen(self, layer: int, groups: Sequence[list[int]]) -> None:
        """Makes the listeners of a layer. groups: value heads that are encoded together."""
        listeners = []
        for i, policy in enumerate(self.policies):
            heads = {head: site for (ell, head), site in self.sites[i].items() if ell == layer}
            positions = None if policy.positions is None else torch.tensor(policy.positions)
            for g, slots in enumerate(groups if policy.reads_codes else ()):
                sites = {slot: heads.pop(head) for slot, head in enumerate(slots) if head in heads}
                if sites:
                    wanted = _wanted(policy, sites, len(slots))
                    listeners.append(Listener(i, policy, g, slots, sites, wanted, positions))
            for head, site in heads.items():
                listeners.append(Listener(i, policy, None, [head], {0: site}, None, positions))
        if listeners:
            self.layers[layer] = listeners


def _places(policy: Policy, dictionaries: Mapping[int, Mapping[int, Any]]) -> Iterable[tuple[int, int, Any]]:
    for layer, heads in dictionaries.items():
        for head, dictionary in heads.items():
            if policy.sites is not None:
                mine = (layer, head) in policy.sites
            else:
                mine = dictionary is not None or not (policy.needs_dictionary or policy.features is not None)
            if mine:
                yield layer, head, dictionary


def _wanted(policy: Policy, sites: Mapping[int, PolicySite], slots: int) -> Tensor | None:
    features = {slot: policy.features_at(site.key) for slot, site in sites.items()}
    if any(x is None for x in features.values()):
        return None
    first = next(iter(sites.values()))
    wanted = torch.zeros(slots, len(first.encoder[2]), dtype=torch.bool, device=first.device)
    for slot, listed in features.items():
        wanted[slot, list(listed or ())] = True
    return wanted


def _site(layer: LayerSite, head: int, dictionary, model: nn.Module) -> PolicySite:
    def to_logit(token: int) -> Tensor:
        return token_directions(model, layer, head, [token])[0]

    return PolicySite(layer.layer_index, head, layer.K, layer.V, dictionary, device_of(layer.module), to_logit)
