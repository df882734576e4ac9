"""Loss recovered, closed loop: how much of what a head's memory is worth to the model does a dictionary keep?

The model reads held-out text with every write of a head (of a layer, of all heads at once) replaced by its code, each
write made in answer to the changed state; see `recovered_rule`. Cross-entropy then lies between that of the model as it
is and that of the model with all these writes deleted, and the share recovered is

    (CE deleted - CE coded) / (CE deleted - CE plain)

Beside it stands the untrained codebook: as many native writes of other text as the dictionary has atoms, coded by the
same rule. For dictionaries of states, which do not code writes, every read goes through the reconstruction instead.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..interrupt import finishing
from ..models.hf_gated_delta import RuleHandler, intercept, layers
from ..models.identity import require_same_model, weights_digest
from ..models.quiet import quiet
from ..models.shared_prefix import Stack
from ..progress import tqdm
from ..sae import SAE
from ..sae.resume import tokens_digest
from ..sae.stream import Passages
from ..text.tokens import check_ids
from .codebook import codebook as untrained
from .engine import ForkEngine
from .firing import check_sae, check_size, native_writes
from .parts import Parts, concatenate
from .recovered_result import FIXED, OWN, RecoveredResult
from .recovered_rule import Coder, coded, deleted, loop_rule, plain_rule, read_rule
from .replace import _code, _describe, _sites

BY = ("head", "layer", "all")
READS = ("before", "after")
_SLICE = 2**26  # logits that exist at once
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_TAKEN = (*FIXED, "coded", "codebook", "reconstruction")

Site = tuple[int, int]


@torch.no_grad()
@quiet()
def run_recovered(
    model,
    saes: SAE | Mapping[Site, SAE],
    passages: Passages | Tensor,
    *,
    codebook: Passages | Tensor | None = None,
    ks: Sequence[int] | None = (1, 8),
    by: str | Sequence[str] = ("head", "all"),
    read: str | Sequence[str] = "before",
    conditions: Mapping[str, Coder] | None = None,
    batch: int = 48,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
    any_model: bool = False,
) -> RecoveredResult:
    """Cross-entropy with every write coded, closed loop, between that of the plain model and that with none.

    Args:
        model: causal language model with gated-delta layers, in evaluation mode.
        saes: a dictionary that knows its layer and head, or {(layer, head): dictionary}; all of writes, or all of
            states.
        passages: held-out text, `[P, T]` tokens; each begins with an empty state.
        codebook: other text, whose native writes make an untrained codebook beside each dictionary of writes; as many
            tokens as a dictionary has atoms at least. Text that the dictionary was trained on is fair. None leaves it
            out.
        ks: atoms a write (of states: a state), each tried; None is each dictionary's own.
        by: what is changed at once, some of "head" (each by itself), "layer" (all heads given of one), "all".
        read: when a token reads the changed state, "before": its own write is coded, too, so that a head without writes
            gives nothing; "after": its own write is still as it was made; or "both", one by one. Dictionaries of states
            have no such choice: every read is of the reconstruction.
        conditions: {name: function} of other codes of writes to try. A function takes `left [n, K]`, `right [n, V]` of
            n writes and returns factors `[n, m, K]`, `[n, m, V]`: what is written is the sum over m.
        batch: passages in one forward pass.
        seed: of the codebook's draw and the bootstrap.
        out: folder for finished runs; the same call on the same folder goes on and gives the same result.
        progress: show a bar.
        any_model: also with dictionaries that name another model.

    Raises:
        ValueError: before any work, for what cannot be run, naming the argument.
    """
    start = time.perf_counter()
    saes = _sites(saes)
    require_same_model(model, saes, any_model)
    if model.training:
        raise ValueError("model: expected evaluation mode (model.eval()), got training mode")
    target = _check_saes(model, saes)
    by = (by,) if isinstance(by, str) else tuple(by)
    chosen = READS if read == "both" else (read,) if isinstance(read, str) else tuple(read)
    _check_settings(saes, ks, by, chosen, batch, target, codebook)
    reads: tuple[str | None, ...] = chosen if target == "write" else (None,)
    text, training = _passages("passages", passages, model), None
    if codebook is not None:
        training = _passages("codebook", codebook, model)
    wanted: tuple[int | None, ...] = (None,) if ks is None else tuple(ks)
    own = _check_conditions(conditions, target)
    names = ["reconstruction"] if target == "state" else ["coded"] if training is None else ["coded", "codebook"]
    # Of all settings, those that decide a number; the batch is among them because it decides the last bits.
    plan = {
        "test": "loss recovered", "model": weights_digest(model), "torch": torch.__version__,
        "saes": {f"{layer}:{head}": [weights_digest(sae), _describe(sae)] for (layer, head), sae in saes.items()},
        "passages": tokens_digest(text.ids), "codebook": None if training is None else tokens_digest(training.ids),
        "batch": batch, "seed": seed,
        "conditions": {name: out and _code(name, function) for name, function in own.items()},  # type: ignore[arg-type]
    }  # fmt: skip
    parts = Parts(None if out is None else Path(out), plan)
    groups = dict(_groups(saes, by))
    books: dict[Site, SAE] = {}

    def coder(site: Site, condition: str, k: int | None) -> Coder:
        if condition == "coded":
            return coded(saes[site], k)
        if condition != "codebook":
            return deleted if condition == "deleted" else own[condition]
        if not books and training is not None:  # when first asked for: a resumed run may not need them
            found, _ = native_writes(model, saes, list(training.ids.long().numpy()), seed, progress)
            books.update((at, untrained(saes[at], *found[at])) for at in saes)
        return coded(books[site], saes[site].k if k is None else k)

    def rules(read: str | None, group: str, condition: str, k: int | None) -> dict[int, RuleHandler]:
        found: dict[int, RuleHandler] = {}
        for layer, heads in _by_layer(groups.get(group, [])):
            if condition == "reconstruction":
                found[layer] = read_rule({head: (saes[layer, head], k) for head in heads})
            else:  # of states the counterpart of deletion is to read nothing
                found[layer] = loop_rule({head: coder((layer, head), condition, k) for head in heads}, read or "before")
        return found

    runs: list[tuple[str | None, str, str, int | None]] = [(None, "", "plain", None)]
    for when, group in ((when, group) for when in reads for group in groups):
        runs.append((when, group, "deleted", None))
        runs += [(when, group, name, k) for k in wanted for name in names]
        runs += [(when, group, name, None) for name in own]
    tables, total = [], len(text) * text.length
    with tqdm(
        desc="closed loop", total=len(runs) * total, unit=" tokens", unit_scale=True, disable=not progress
    ) as bar:  # fmt: skip
        for run in runs:
            when, group, condition, k = run
            place = group.replace(":", "h").replace(" ", "")
            name = "-".join(str(x) for x in (when, place, condition, k) if x)
            part = parts.read(name)
            if part is None:
                with finishing("pass over the text", parts.kept) as stop:
                    loss = passage_losses(model, text, rules(*run), batch, bar.update)
                    part = _table(*run, loss, text.length)
                    parts.write(name, part)
                stop.check()
            else:
                bar.update(total)
            tables.append(part)
    return RecoveredResult(
        concatenate(tables), groups, (*FIXED, *names), wanted, target, reads, text.length,
         seed, time.perf_counter() - start, {site: _describe(sae) for site, sae in saes.items()},
        tuple(own),
    )  # fmt: skip


@torch.no_grad()
def passage_losses(
    model,
    passages: Passages,
    rules: Mapping[int, RuleHandler],
    batch: int = 48,
    done: Callable[[int], object] = lambda tokens: None,
) -> np.ndarray:
    """`[P]` cross-entropy of each passage, summed over its tokens but the first, in nats.

    Args:
        rules: {layer: what its recurrence calls}; layers without one run as they are, by our kernel.
        done: told the tokens of each batch when it is finished.
    """
    stack = Stack(model)
    every = {layer: rules.get(layer, plain_rule) for layer in stack.sites}
    found: list[Tensor] = []
    device = model.get_input_embeddings().weight.device
    with intercept(model, every, private=True):
        for rows in passages.ids.split(batch):
            ids = rows.long().to(device)
            last, wanted = stack.last(ids)[:, :-1], ids[:, 1:]
            step = max(1, _SLICE // (stack.vocabulary * max(last.shape[1], 1)))
            for lo in range(0, len(ids), step):
                part = last[lo : lo + step]
                logits = stack.logits(part.flatten(0, 1)).unflatten(0, part.shape[:2])
                to = wanted[lo : lo + step].to(logits.device)
                wide = logits if logits.dtype == torch.float64 else logits.float()
                loss = torch.nn.functional.cross_entropy(wide.transpose(1, 2), to, reduction="none")
                found.append(loss.double().sum(1).cpu())
            done(ids.numel())
    losses = torch.cat(found).numpy()
    if not np.isfinite(losses).all():
        bad = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise ValueError(f"passages: expected a finite loss of every passage, got {losses[bad]} in passage {bad}")
    return losses


# ---- what is run --------------------------------------------------------------------------------------------------


def _groups(saes: Mapping[Site, SAE], by: Sequence[str]) -> Iterator[tuple[str, list[Site]]]:
    sites = sorted(saes)
    if "head" in by:
        yield from ((f"{layer}:{head}", [(layer, head)]) for layer, head in sites)
    if "layer" in by:
        yield from ((f"layer {layer}", [(layer, head) for head in heads]) for layer, heads in _by_layer(sites))
    if "all" in by and (len(sites) > 1 or by == ("all",)):
        yield "all", sites


def _by_layer(sites: Sequence[Site]) -> list[tuple[int, list[int]]]:
    return [(layer, [h for at, h in sites if at == layer]) for layer in sorted({layer for layer, _ in sites})]


def _table(
    read: str | None, group: str, condition: str, k: int | None, loss: np.ndarray, length: int
) -> dict[str, np.ndarray]:
    P = len(loss)
    text = {name: np.empty(P, object) for name in ("read", "group", "condition")}
    text["read"][:], text["group"][:], text["condition"][:] = read or "", group, condition
    return {
        **text, "k": np.full(P, OWN if k is None else k), "passage": np.arange(P), "loss": loss,
        "tokens": np.full(P, length - 1),
    }  # fmt: skip


# ---- checks before any work ---------------------------------------------------------------------------------------


def _check_saes(model, saes: Mapping[Site, SAE]) -> str:
    """Their common target."""
    targets = {sae.target for sae in saes.values()}
    if len(targets) > 1:
        raise ValueError("saes: expected dictionaries of writes, or of states, got both; run them apart")
    target = targets.pop()
    known = {site.layer_index: site for site in layers(model)}
    for (layer, head), sae in saes.items():
        if layer not in known:
            ForkEngine(model, layer)  # says what that layer is instead
        binding = known[layer].binding
        if binding.rule.name != "gated_delta_rule" or binding.gate != "scalar":
            raise ValueError(
                "saes: expected layers on the gated delta rule with a scalar gate, which the closed loop computes; "
                f"layer {layer} runs the {binding.name}"
            )
        (check_sae if target == "write" else check_size)(sae, known[layer], layer, head)
    return target


def _positive(x) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _check_settings(saes, ks, by, reads, batch, target, codebook) -> None:
    if not reads or len(set(reads)) < len(reads) or not set(reads) <= set(READS):
        got = ", ".join(map(str, reads)) or "none"
        raise ValueError(f"read: expected some of {', '.join(READS)} (or both), each once, got {got}")
    if not by or len(set(by)) < len(by) or not set(by) <= set(BY):
        raise ValueError(f"by: expected some of {', '.join(BY)}, each once, got {', '.join(map(str, by)) or 'none'}")
    if not _positive(batch):
        raise ValueError(f"batch: expected at least 1 passage, got {batch!r}")
    if codebook is not None and target == "state":
        raise ValueError("codebook: expected None for dictionaries of states, which code no writes")
    thresholds = [site for site, sae in sorted(saes.items()) if sae.threshold is not None]
    if ks is None:
        return
    if not len(ks) or len(set(ks)) < len(ks) or not all(map(_positive, ks)):
        raise ValueError(f"ks: expected integers >= 1, each once, or None, got {tuple(ks)}")
    if thresholds:
        raise ValueError(
            f"ks: expected None (each dictionary's own) with dictionaries that keep atoms above a threshold, as that "
            f"of {thresholds[0]} does, got {tuple(ks)}"
        )
    for site, sae in sorted(saes.items()):
        if max(ks) > sae.F:
            raise ValueError(f"ks: expected k <= F={sae.F} for the dictionary of {site}, got {max(ks)}")


def _check_conditions(conditions: Mapping[str, Coder] | None, target: str) -> dict[str, Coder]:
    conditions = dict(conditions or {})
    if conditions and target == "state":
        raise ValueError("conditions: expected None for dictionaries of states, which code no writes")
    for name, function in conditions.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _TAKEN or not callable(function):
            raise ValueError(
                f"conditions: expected {{name: function}}, names like my_code and none of {', '.join(_TAKEN)}, got "
                f"{name!r}: {type(function).__name__}"
            )
    return conditions


def _passages(name: str, given: Passages | Tensor, model) -> Passages:
    if not isinstance(given, Passages):
        if not isinstance(given, Tensor) or given.ndim != 2:
            raise ValueError(f"{name}: expected Passages or int [P, T] tokens, got {type(given).__name__}")
        given = Passages(given)
    if given.length < 2:
        raise ValueError(f"{name}: expected at least 2 tokens a passage, got {given.length}")
    check_ids(given.ids, model)
    return given
