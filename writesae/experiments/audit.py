"""The side effects of edits: what else changes when a memory is edited, beside what random edits of that size do.

    result = writesae.audit(model, tokenizer, {"erase 17": EraseFeature(17, 5, 3)}, text, saes=saes)
    print(result.lines())

Of every passage the unedited model is run, then the edited one, then two controls that make changes of the same size,
rank, place and time: Gaussian factors, and the model's own writes at other tokens. Each is followed to the end of the
passage: how the change of the edited state decays (`|dS|`, exact), the KL and the top-1 flips of every later
prediction, the loss on all text after the edit, and how far every layer's memory is moved. What is called harmful,
local or no more than random follows from intervals by rules that stand in `audit_result`.

An edit's own effect on its layer is exact: under teacher forcing its gates and keys do not depend on its states, so the
change is itself a memory with those gates, made of the differences of the writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..edits import BEFORE, DELETE, REPLACE, Edits
from ..models.attach import attach
from ..models.identity import require_same_model
from ..models.quiet import quiet
from ..models.sites import layers
from ..policies import Policy
from ..progress import tqdm
from ..sae import SAE
from ..text import Corpus
from ..text.tokens import check_ids
from ..writes import Writes
from .audit_edits import Acting, Audited, Clean, Given, Site
from .audit_result import ARMS, AuditResult
from .divergence import kl_pair, token_losses
from .parts import concatenate
from .replace import passages_of

__all__ = ["audit"]


@torch.no_grad()
@quiet()
def audit(
    model,
    tokenizer,
    edits=None,
    text=None,
    *,
    policies=None,
    saes: Mapping[Site, SAE] | None = None,
    passages: int = 64,
    context: int = 256,
    horizon: int = 64,
    batch: int = 8,
    seed: int = 0,
    progress: bool = True,
    any_model: bool = False,
    bos: bool = True,
) -> AuditResult:
    """Runs edits beside matched random ones, and says what else they change.

    Args:
        model: causal language model in evaluation mode, of any family that `attach` takes.
        tokenizer: its tokenizer; not needed for `text` that is tokens.
        edits: {name: what is done}, or one without a name. What is done is `{layer: Edits}` (row is the number of the
            passage, -1 every one), an `audit_edits.DeleteHead`, `EraseFeature`, `ScaleFeature` or `InstallToken`, or
            anything of your own with their three attributes.
        text: `[P, T]` tokens, a `Corpus`, or (name, text) pairs.
        policies: {name: policy, or several that act together}, or such without a name: audited beside the edits.
        saes: {(layer, head): dictionary}, of the features that edits and policies name.
        passages, context: of a text, how many passages of how many tokens are used.
        horizon: tokens after a passage's first edit at which effects are told one by one.
        batch: passages in one forward pass.
        seed: of places, controls and bootstrap.
        progress: show a bar.
        any_model: also with dictionaries that name another model.
        bos: begin every document of a text with the first token.
    Raises:
        ValueError: before any work for arguments of other kinds, a dictionary that is missing or of another model, text
            without a whole passage; in the end for an edit that was made in fewer than two passages.
    """
    named = _named(edits, "edit") | _named(policies, "policies")
    if not named:
        raise ValueError("edits: expected at least one, or policies, got none")
    saes = dict(saes or {})
    require_same_model(model, saes, any_model)
    if model.training:
        raise ValueError("model: expected evaluation mode (model.eval()), got training mode")
    if horizon < 1:
        raise ValueError(f"horizon: expected at least 1 token, got {horizon}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1 passage, got {batch}")
    ids = _tokens(text, tokenizer, passages, context, seed, bos)
    check_ids(ids, model)
    if ids.shape[1] < horizon + 4:
        raise ValueError(
            f"context: expected more than horizon + 3 = {horizon + 3} tokens a passage, got {ids.shape[1]}"
        )
    for name, one in named.items():
        for layer, head in one.needs:
            if (layer, head) not in saes:
                raise ValueError(f"saes: {name} takes the dictionary of {layer}:{head}, got none")
    runner = _Runner(model, saes, horizon, seed)
    found: dict[tuple[str, str], list[dict[str, np.ndarray]]] = {(n, arm): [] for n in named for arm in ARMS}
    bar = tqdm(total=len(ids), desc="auditing", unit=" passages", disable=not progress)
    for lo in range(0, len(ids), batch):
        runner.read(ids[lo : lo + batch], lo)
        for number, (name, one) in enumerate(named.items()):
            for arm, part in runner.arms(one, number):
                found[name, arm].append(part)
        bar.update(len(ids[lo : lo + batch]))
    bar.close()
    for name in named:
        n = sum(len(part["passage"]) for part in found[name, "edit"])
        if n < 2:
            raise ValueError(f"edits: {name}: expected to be made in two passages at least, got {n} of {len(ids)}")
    return AuditResult(
        {key: concatenate(parts) for key, parts in found.items()}, {name: one.says for name, one in named.items()},
        runner.layers, runner.grid, horizon, len(ids), ids.shape[1], seed,
    )  # fmt: skip


def _named(given, name: str) -> dict[str, Audited]:
    """What was given by its names; without one, by this one."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(x, str) for x in given):
        given = {name: given}
    return {name: _audited(name, one) for name, one in given.items()}


def _audited(name: str, one: Any) -> Audited:
    if isinstance(one, Mapping) and one and all(isinstance(x, Edits) for x in one.values()):
        return Given(one)
    several = (one,) if isinstance(one, Policy) else one
    if isinstance(several, (list, tuple)) and several and all(isinstance(x, Policy) for x in several):
        return Acting(tuple(several))
    if all(hasattr(one, x) for x in ("says", "needs", "edits")):
        return one
    raise ValueError(
        f"edits: {name}: expected {{layer: Edits}}, an edit such as audit_edits.DeleteHead, or policies, got "
        f"{type(one).__name__}"
    )


def _tokens(text, tokenizer, passages: int, context: int, seed: int, bos: bool) -> Tensor:
    """`[P, T]` whole passages."""
    if isinstance(text, Tensor):
        if text.ndim != 2 or not len(text) or text.is_floating_point():
            raise ValueError(f"text: expected int [P, T], got {text.dtype} of shape {tuple(text.shape)}")
        return text.long().cpu()
    if passages < 2:
        raise ValueError(f"passages: expected at least 2, got {passages}")
    most = 8 * passages * context if isinstance(text, Corpus) else None
    found = passages_of(text, tokenizer, context, bos=bos, max_tokens=most, seed=seed)
    whole = [p.tokens for p in found if len(p.tokens) == context]
    if not whole:
        raise ValueError(f"text: expected a passage of {context} tokens, got none")
    order = np.random.default_rng(seed).permutation(len(whole))[:passages]
    return torch.from_numpy(np.stack([whole[i] for i in order]))


@dataclass(frozen=True)
class _Run:
    """One run of the model: `logits [B, T, vocabulary]`, {layer: Writes}."""

    logits: Tensor
    writes: dict[int, Writes]


class _Runner:
    """Runs batches of passages plain, edited and with controls, and compares."""

    def __init__(self, model, saes: Mapping[Site, SAE], horizon: int, seed: int):
        self.model, self.saes, self.horizon, self.seed = model, saes, horizon, seed
        self.layers = [site.layer_index for site in layers(model)]
        steps = [0, *(2**i for i in range(16))]
        self.grid = sorted({h for h in steps if h < horizon} | {horizon})
        self._tested = False

    def _run(self, ids: Tensor, sites: Mapping[Site, Any], **more) -> tuple[_Run, Any]:
        """One run with the writes of all layers recorded, and (run, tap of the sites and whatever else acts)."""
        every, acts = {(layer, 0): None for layer in self.layers}, bool(sites or more)
        with contextlib.ExitStack() as stack:
            tap = stack.enter_context(attach(self.model, every, self_test=not self._tested))
            # Apart, so that policies without sites of their own act at those that were given, and at no others.
            inner = attach(self.model, sites, any_model=True, self_test=not self._tested, **more) if acts else None
            of_sites = tap if inner is None else stack.enter_context(inner)
            logits = self.model(input_ids=ids, use_cache=False).logits
        self._tested = True
        return _Run(logits, dict(tap.writes)), of_sites

    def read(self, ids: Tensor, first: int) -> None:
        """The unedited model on passages `[B, T]`, of which `first` is the number of the first."""
        self.ids = ids.to(next(self.model.parameters()).device)
        self.plain, tap = self._run(self.ids, self.saes)
        last = ids.shape[1] - 3 - self.horizon
        self.clean = Clean(self.model, first, ids, self.plain.writes, tap.firings, self.saes, last, self.seed)
        self.loss = token_losses(self.plain.logits, self.ids)

    def arms(self, one: Audited, number: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """(arm, its columns), of the passages in which the edit is made; none where it is made in none."""
        asked: dict[int, Edits | None] = dict(one.edits(self.clean))
        if isinstance(one, Acting):
            sites: dict[Site, Any] = {site: None for policy in one.policies for site in policy.sites or ()}
            edited, _ = self._run(self.ids, {**sites, **self.saes}, policies=list(one.policies))
            asked = dict.fromkeys(self.layers)
        elif any(asked.values()):
            edited, _ = self._run(self.ids, {}, edits=asked)
        else:
            return
        made = {layer: changes(self.plain.writes[layer], edited.writes[layer], e) for layer, e in asked.items()}
        rows, first, places = _begins(made, self.ids.shape[1] - 3)
        if not len(rows):
            return
        yield "edit", self._compare(edited, rows, first, places)
        for arm, control in (("random", gaussian), ("other", elsewhere)):
            instead = {
                layer: control(e, self.plain.writes[layer], self._generator(number, arm, layer))
                for layer, e in made.items() if len(e)
            }  # fmt: skip
            run, _ = self._run(self.ids, {}, edits=instead)
            yield arm, self._compare(run, rows, first, places)

    def _generator(self, number: int, arm: str, layer: int) -> torch.Generator:
        seeds = np.random.SeedSequence([self.seed, self.clean.first, number, ARMS.index(arm), layer])
        return torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))

    def _compare(self, run: _Run, rows: Tensor, first: Tensor, places: Tensor) -> dict[str, np.ndarray]:
        """What a run changed in the passages `rows`, edited first at `first`."""
        H, T = self.horizon, self.ids.shape[1]
        kl, flip = np.full((len(rows), H + 1), np.nan), np.full((len(rows), H + 1), np.nan)
        change, plain = np.zeros(len(rows)), np.zeros(len(rows))
        loss = token_losses(run.logits, self.ids)
        for i, (row, t) in enumerate(zip(rows.tolist(), first.tolist(), strict=True)):
            stop = min(t + H + 1, T)
            base, logits = self.plain.logits[row, t:stop], run.logits[row, t:stop]
            kl[i, : stop - t] = kl_pair(base, {"x": logits})["x"][0].cpu().numpy()
            flip[i, : stop - t] = (base.argmax(-1) != logits.argmax(-1)).cpu().numpy()
            rest = slice(t + 1, T - 1)  # what is predicted past the edit's own prediction
            plain[i] = float(self.loss[row, rest].mean())
            change[i] = float((loss[row, rest] - self.loss[row, rest]).mean())
        moved, share = self._states(run, rows, first)
        return {
            "passage": (rows + self.clean.first).numpy(), "position": first.numpy(), "places": places.numpy(),
            "plain": plain, "change": change, "kl": kl, "flip": flip, "state": moved, "share": share,
        }  # fmt: skip

    def _states(self, run: _Run, rows: Tensor, first: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """`[n, G]` norm of the change of the edited layer's state, exact, and `[n, layers, G]` that of every layer as a
        share of its state's norm, at the grid of horizons behind the first edit."""
        pairs = torch.stack([rows[:, None].expand(-1, len(self.grid)), first[:, None] + torch.tensor(self.grid)], -1)
        pairs = pairs.flatten(0, 1)
        share = np.zeros((len(rows), len(self.layers), len(self.grid)))
        moved = None
        for i, layer in enumerate(self.layers):
            clean, other = self.plain.writes[layer], run.writes[layer]
            untouched = torch.equal(clean.decay, other.decay) and torch.equal(clean.left, other.left)
            if untouched and other.edits is None and torch.equal(clean.right, other.right):
                continue  # below the edit
            before = clean.to(torch.float64).states(pairs)
            if untouched:  # the edited layer: its change is a memory of its own
                difference = replace(clean, right=other.right - clean.right, edits=other.edits, initial_state=None)
                change = difference.to(torch.float64).states(pairs)
            else:
                change = other.to(torch.float64).states(pairs) - before
            size, norm = (x.flatten(1).norm(dim=1).view(len(rows), -1).cpu().numpy() for x in (change, before))
            share[:, i] = size / np.maximum(norm, 1e-30)
            moved = size if moved is None else moved
        return (np.zeros((len(rows), len(self.grid))) if moved is None else moved), share


def _begins(made: Mapping[int, Edits], latest: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows with a change, position of the first in each, places changed in each), all `[n]`; of rows in which that is
    no later than `latest`."""
    row = torch.cat([e.row for e in made.values()])
    position = torch.cat([e.position for e in made.values()])
    rows, of = torch.unique(row, return_inverse=True)
    first = torch.full_like(rows, torch.iinfo(torch.int64).max).scatter_reduce_(0, of, position, "amin")
    layer = torch.cat([torch.full_like(e.row, layer) for layer, e in made.items()])
    head = torch.cat([e.head for e in made.values()])
    distinct = torch.unique(torch.stack([row, position, layer, head], 1), dim=0)
    places = torch.zeros_like(rows).index_add_(
        0, torch.searchsorted(rows, distinct[:, 0].contiguous()), torch.ones_like(distinct[:, 0])
    )
    early = first <= latest
    return rows[early], first[early], places[early]


# ---- what was changed, and what is put there instead ----------------------------------------------------------------


def changes(clean: Writes, edited: Writes, asked: Edits | None = None) -> Edits:
    """What a run of edits did to the states, as additions: those it made, and minus every write that it did not make.

    Args:
        clean: the layer's writes without edits.
        edited: the same with them.
        asked: the edits, where they are known; writes that were left out are looked for at their places only.
    """
    parts = [edited.edits._with(kind=torch.zeros_like(edited.edits.kind))] if edited.edits is not None else []
    gone = ((edited.right == 0).all(-1) & (clean.right != 0).any(-1)).any(-1).cpu()  # [B, T, H]
    if asked is not None:
        wanted = torch.zeros_like(gone)
        taken = ((asked.kind == DELETE) | (asked.kind == REPLACE)) & (asked.when == BEFORE)
        wanted[asked.row[taken], asked.position[taken], asked.head[taken]] = True
        gone &= wanted
    row, position, head = gone.nonzero(as_tuple=True)
    if len(row):
        left, right = (x.float().cpu() for x in clean.native(row, position, head, "total"))  # [E, R, *]
        if left.ndim == 2:
            left, right = left[:, None], right[:, None]
        row, position, head = (x.repeat_interleave(left.shape[1]) for x in (row, position, head))
        parts.append(Edits.add(row, position, head, left.flatten(0, 1), -right.flatten(0, 1)))
    if not parts:
        _, _, _, K, V = clean.shape
        return Edits.add(0, 0, 0, torch.zeros(K), torch.zeros(V))[:0]
    every = Edits.cat([part._with(left=part.left.float().cpu(), right=part.right.float().cpu()) for part in parts])
    order = np.lexsort((every.when.numpy(), every.head.numpy(), every.position.numpy(), every.row.numpy()))
    return every[torch.from_numpy(order)]


def gaussian(made: Edits, writes: Writes, generator: torch.Generator) -> Edits:
    """As many additions of Gaussian factors at the same places and times, of the same norm together at each."""
    left = torch.randn(made.left.shape, generator=generator)
    right = torch.randn(made.right.shape, generator=generator)
    size = made.left.norm(dim=1) * made.right.norm(dim=1) / (left.norm(dim=1) * right.norm(dim=1))
    return _sized(made, left * size[:, None], right)


def elsewhere(made: Edits, writes: Writes, generator: torch.Generator) -> Edits:
    """The head's own writes at other tokens of the batch, drawn evenly, of the norm of what was changed: taken away
    where that had more of the place's write taken than added, else added."""
    B, T, _, _, _ = writes.shape
    row = torch.randint(B, (len(made),), generator=generator)
    position = torch.randint(1, T, (len(made),), generator=generator)
    same = (row == made.row) & (position == made.position)
    position = torch.where(same, (position % (T - 1)) + 1, position)
    left, right = (x.float().cpu() for x in writes.native(row, position, made.head))
    own, value = (x.float().cpu() for x in writes.native(made.row, made.position, made.head))
    sign = ((made.left * own).sum(1) * (made.right * value).sum(1)).sign()
    sign = torch.where(sign == 0, 1.0, sign)
    scale = made.left.norm(dim=1) * made.right.norm(dim=1) / (left.norm(dim=1) * right.norm(dim=1)).clamp_min(1e-30)
    return _sized(made, left * (sign * scale)[:, None], right)


def _sized(made: Edits, left: Tensor, right: Tensor) -> Edits:
    """Additions at the places of `made`, scaled so that those of one place together have the norm of what was there."""
    place = torch.stack([made.row, made.position, made.head, made.when.long()], 1)
    _, of = torch.unique_consecutive(place, dim=0, return_inverse=True)
    wanted, got = _norms(made.left, made.right, of), _norms(left, right, of)
    scale = (wanted / got.clamp_min(1e-30))[of]
    return made._with(left=left * scale[:, None], right=right)


def _norms(left: Tensor, right: Tensor, of: Tensor) -> Tensor:
    """`[places]` Frobenius norms of the sums of `left right^T` over entries of one place; `of [E]` rises."""
    counts = torch.bincount(of)
    if len(counts) == len(of):
        return left.norm(dim=1) * right.norm(dim=1)
    return torch.stack([
        torch.linalg.matrix_norm(a.mT @ b) for a, b in
        zip(left.split(counts.tolist()), right.split(counts.tolist()), strict=True)
    ])  # fmt: skip
