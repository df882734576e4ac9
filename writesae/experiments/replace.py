"""The replacement test: can a dictionary's atom stand in for what the model writes?

At a firing of feature i the state is patched, `S_t - N + R`, the text goes on as it is, and next-token distributions
are compared with the unpatched ones. If the atom is what the write means to the model, putting the atom in its place
(R = its atom) disturbs less than taking it out (R = 0), and that less than a random rank-1 write of the same size. And
if learning the atoms was worth anything, it disturbs less than what nobody trained: see `nulls`.

Method: J. Young, *WriteSAE: Sparse Autoencoders for Recurrent State*, arXiv 2605.12770.
"""

from __future__ import annotations

import hashlib
import marshal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..interrupt import finishing
from ..models.identity import require_same_model, weights_digest
from ..models.quiet import quiet
from ..progress import tqdm
from ..sae import SAE
from ..text import Corpus
from ..text.passages import DocumentEnd
from ..text.passages import passages as cut
from ..text.tokens import check_ids, check_vocabulary, tokenizing
from .conditions import (
    BASELINE,
    NATIVES,
    OF_WRITES,
    READS,
    SCALES,
    TRAINING_CONDITIONS,
    Condition,
    arms,
    chosen,
    deltas,
)
from .engine import ForkEngine, Places
from .firing import check_sae, native_writes, sample, survey, top_codes
from .nulls import Fired, Material
from .parts import Parts, concatenate
from .result import ReplacementResult
from .sites import rule, with_longest_memory

_BEFORE, _AFTER = 24, 8  # tokens of context kept around a firing


@dataclass(frozen=True)
class Passage:
    """`tokens` of one document, the `row`-th piece of it."""

    document: str
    row: int
    tokens: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.document}#{self.row}"


def passages_of(
    texts: Corpus | Iterable[tuple[str, str]],
    tokenizer,
    context: int = 256,
    *,
    bos: bool = True,
    max_tokens: int | None = None,
    seed: int = 0,
) -> list[Passage]:
    """A corpus, or (document name, text) pairs, cut into passages of `context` tokens, a document's last one shorter.

    Args:
        texts, tokenizer: what is read, and how.
        context: tokens a passage.
        bos: put `text.tokens.first_token` before every document.
        max_tokens: read no more than these, from files in an order drawn by `seed`. What is read comes in corpus order.

    Raises:
        ValueError: no text at all, and what reading raises.
    """
    if context < 2:
        raise ValueError(f"context: expected at least 2 tokens a passage, got {context}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
    tokenize, first = tokenizing(tokenizer, bos)
    corpus = texts if isinstance(texts, Corpus) else Corpus.from_texts(texts)
    drawn, files = (corpus, None) if max_tokens is None else corpus.shuffled(seed)
    found: list[tuple[tuple, Passage]] = []
    rows: list = []
    for event in cut(drawn, tokenize, context, first, max_tokens):
        if isinstance(event, DocumentEnd):
            for row in rows:
                f, _, index = row.after.place
                place = (f if files is None or not len(files) else int(files[f]), index, row.row)
                found.append((place, Passage(event.source, row.row, row.tokens.astype(np.int64))))
            rows = []
        else:
            rows.append(event)
    if not found:
        raise ValueError("corpus: expected at least one passage of text, got none")
    return [passage for _, passage in sorted(found, key=lambda item: item[0])]


def select_tokens(firings: int) -> int:
    """Tokens of the text on which features are chosen that are looked at, unless asked for others."""
    return max(20_000, 200 * firings)


@torch.no_grad()
@quiet()
def run_replacement(
    model,
    tokenizer,
    saes: SAE | Mapping[tuple[int, int], SAE],
    passages: Sequence[Passage],
    *,
    select: Sequence[Passage] | None = None,
    train: Sequence[Passage] | None = None,
    min_selected: int = 5,
    firings: int = 1000,
    each: int = 8,
    horizon: int = 8,
    read: str | Sequence[str] = "after",
    natives: Sequence[str] = NATIVES,
    scales: Sequence[str] = SCALES,
    conditions: Sequence | Mapping[str, Condition] | None = None,
    seed: int = 0,
    memory: int = 2**30,
    longest: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    any_model: bool = False,
) -> ReplacementResult:
    """Runs the replacement test.

    Args:
        model: causal language model in evaluation mode.
        tokenizer: for the tokens shown in reports only; None leaves numbers.
        saes: a dictionary that knows its layer and head, or {(layer, head): dictionary}.
        passages: test text, see `passages_of`; it should be text the dictionary has not seen.
        select: text on which features are chosen: only features with the largest code at `min_selected` or more of its
            tokens are tested. None tests whatever fires.
        train: text whose native writes make the conditions "codebook", "codebook_nearest" and "mean"; text that the
            dictionary was trained on is fair. None takes `select`.
        firings: firings tested a site; fewer when the passages run out.
        each: firings tested a passage and site at most, so that the test spreads over documents.
        horizon: tokens followed after the edit.
        read: when the state is changed: "after" token t has read it, "before", or both in one run.
        natives, scales: see `conditions`; the first read, native and scale are the headline.
        conditions: names of `conditions.CONDITIONS` and (name, function) pairs, all that are tested, or {name:
            function}, tested beside the default ones. A function takes `nulls.Edited` and returns what is put in the
            write's place. None is the default: of these, all that the texts allow.
        seed: of the order of passages, the choice of tokens and the random control.
        memory: bytes that a batch of forks may take, roughly.
        longest: test only this many sites: those of the model's heads with the longest memory, measured on `select` (or
            `train`, or the test text); each needs a dictionary. None tests every site given.
        out: folder for finished parts; the same call on the same folder resumes and gives the same rows.
        progress: show a bar.
        any_model: also with dictionaries that name another model.

    Raises:
        ValueError: before any work, for settings, sites or texts that cannot be tested, or another model's dictionary.
    """
    start = time.perf_counter()
    saes = _sites(saes)
    require_same_model(model, saes, any_model)
    reads = READS if read == "both" else (read,) if isinstance(read, str) else tuple(read)
    conditions = chosen(conditions, training=train is not None or select is not None)
    _check_of_writes(conditions, saes)
    _check(reads, natives, scales, firings, each, horizon)
    if longest is not None:
        text = select or train or passages
        saes = with_longest_memory(model, saes, [passage.tokens for passage in text], longest, progress)
    begin = "before" if "before" in reads else "after"
    engines = {layer: ForkEngine(model, layer, horizon, begin) for layer in sorted({layer for layer, _ in saes})}
    for (layer, head), sae in saes.items():
        check_sae(sae, engines[layer].site, layer, head)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model)
    for passage in (*passages, *(select or ()), *(train or ())):
        check_ids(torch.from_numpy(np.asarray(passage.tokens, np.int64)), model)
    usable = [i for i, passage in enumerate(passages) if len(passage.tokens) > horizon + 1]
    if not usable:
        raise ValueError(f"passages: expected one of more than horizon + 1 = {horizon + 1} tokens, got none")
    # Of all settings, those that decide a row; memory is among them because batch sizes decide the last bits.
    plan = {
        "test": "replacement", "model": weights_digest(model), "torch": torch.__version__,
        "saes": {f"{layer}:{head}": weights_digest(sae) for (layer, head), sae in saes.items()},
        "passages": _digest(passages), "select": None if select is None else _digest(select),
        "train": None if train is None else _digest(train), "min_selected": min_selected, "firings": firings,
        "each": each, "horizon": horizon, "reads": list(reads), "natives": list(natives), "scales": list(scales),
        "conditions": {name: out and _code(name, function) for name, function in conditions.items()}, "seed": seed,
        "memory": memory,
    }  # fmt: skip
    parts = Parts(None if out is None else Path(out), plan)
    allowed, selected = _selection(model, saes, select, min_selected, progress)
    materials = _materials(model, saes, train or select, conditions, seed, progress)
    tables, seen_tokens = [], 0
    most = max(len(passages[i].tokens) for i in usable)
    order = np.random.default_rng(seed).permutation(usable)
    show = _Shown(tokenizer)
    bar = tqdm(total=firings * len(saes), desc="replacing", unit=" firings", disable=not progress)
    for layer, engine in engines.items():
        heads = {head: sae for (at, head), sae in saes.items() if at == layer}
        a_fork = engine.bytes_a_fork(most, 1 + len(arms(natives, scales, tuple(conditions), reads)))
        room = memory // a_fork // (each * len(heads))
        if room < 1:
            raise ValueError(
                f"memory: expected at least {a_fork * each * len(heads):,} bytes, for the "
                f"{each * len(heads)} forks of one passage, got {memory:,} (lower each, or raise memory)"
            )
        size, counts = min(room, 16), dict.fromkeys(heads, 0)
        for batch, lo in enumerate(range(0, len(order), size)):
            chunk = [passages[i] for i in order[lo : lo + size]]
            name = f"{layer:03}-{batch:05}"
            part = parts.read(name)
            if part is None:
                with finishing("batch of passages", parts.kept) as stop:
                    part = _batch(
                        engine, heads, chunk, order[lo : lo + size], allowed, materials, reads, natives, scales,
                        conditions, each, seed, show,
                    )  # fmt: skip
                    parts.write(name, part)
                stop.check()
            seen_tokens += sum(len(passage.tokens) for passage in chunk)
            kept = np.zeros(len(part["head"]), bool)
            for head in heads:
                mine = np.flatnonzero(part["head"] == head)[: firings - counts[head]]
                kept[mine] = True
                counts[head] += len(mine)
            tables.append({column: values[kept] for column, values in part.items()})
            bar.update(int(kept.sum()))
            if all(count >= firings for count in counts.values()):
                break
    bar.close()
    table = concatenate(tables)
    if not len(table["feature"]):
        raise ValueError("passages: expected firings of the features under test, got none")
    return ReplacementResult(
        table, natives=tuple(natives), scales=tuple(scales), conditions=tuple(conditions), horizon=horizon, seed=seed,
        requested=firings, tokens=seen_tokens, seconds=time.perf_counter() - start, selected=selected,
        sites={site: {**_describe(sae), "write": engines[site[0]].write} for site, sae in saes.items()}, reads=reads,
        rule=rule(saes, engines) if longest is None else "longest memory",
    )  # fmt: skip


def _sites(saes) -> dict[tuple[int, int], SAE]:
    if isinstance(saes, SAE):
        if saes.layer is None or saes.head is None:
            raise ValueError("saes: the dictionary does not say its layer and head; pass {(layer, head): dictionary}")
        saes = {(saes.layer, saes.head): saes}
    saes = {(int(layer), int(head)): sae for (layer, head), sae in sorted(saes.items())}
    if not saes:
        raise ValueError("saes: expected at least one dictionary, got none")
    return saes


def _check(reads, natives, scales, firings, each, horizon) -> None:
    for name, given, known in (("read", reads, READS), ("natives", natives, NATIVES), ("scales", scales, SCALES)):
        wrong = [x for x in given if x not in known]
        if wrong or not given or len(set(given)) < len(given):
            got = ", ".join(map(str, given)) or "none"
            more = " (or both)" if name == "read" else ""
            raise ValueError(f"{name}: expected some of {', '.join(known)}{more}, each once, got {got}")
    for name, value in (("firings", firings), ("each", each)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if horizon < 1:
        raise ValueError(f"horizon: expected at least 1 token after the edit, got {horizon}")


def _check_of_writes(conditions, saes) -> None:
    for condition in OF_WRITES:
        others = [site for site, sae in saes.items() if sae.target != "write"]
        if condition in conditions and others:
            raise ValueError(
                f"conditions: {condition} codes writes, expected dictionaries of writes, got one of states at "
                f"{others[0]}"
            )


def _code(name: str, function: Condition | None) -> str | None:
    """A digest of a user's condition, so that a run does not go on with another; what it refers to is not part."""
    if function is None:
        return None
    code = getattr(function, "__code__", None)
    if code is None:
        raise ValueError(
            f"conditions: {name}: expected a plain function where out is given, so that a resumed run can tell it from "
            f"another, got {type(function).__name__}"
        )
    return hashlib.sha256(marshal.dumps(code)).hexdigest()


def _digest(passages: Sequence[Passage]) -> str:
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(passage.name.encode() + np.asarray(passage.tokens, np.int64).tobytes())
    return digest.hexdigest()


def _describe(sae: SAE) -> dict:
    keys = ("kind", "F", "k", "K", "V", "r", "sparsity", "target")
    survey = (sae.training_record or {}).get("survey")  # a site that was chosen by its outcome says so
    chosen_of = len(survey) if isinstance(survey, (list, tuple)) else None
    return {
        **{key: getattr(sae, key) for key in keys}, "metrics": dict(sae.metrics or {}), "chosen_of": chosen_of,
    }  # fmt: skip


def _selection(model, saes, select, min_selected, progress):
    """Masks of the features under test, and a record of the choice."""
    if select is None:
        return dict.fromkeys(saes), None
    counts, tokens = survey(model, saes, [passage.tokens for passage in select], progress)
    allowed = {site: count >= min_selected for site, count in counts.items()}
    for site, mask in allowed.items():
        if not mask.any():
            raise ValueError(
                f"select: expected a feature of site {site} with the largest code at {min_selected} tokens or "
                f"more, got none in {tokens} tokens"
            )
    record = {
        "tokens": tokens, "passages": len(select), "min_selected": min_selected,
        "features": {f"{layer}:{head}": int(mask.sum()) for (layer, head), mask in allowed.items()},
    }  # fmt: skip
    return allowed, record


def _materials(model, saes, text, conditions, seed, progress) -> dict[tuple[int, int], Material]:
    """What the conditions need of every site; the text is read only if one of them needs its writes."""
    books, means = {}, {}
    if any(condition in conditions for condition in TRAINING_CONDITIONS):
        books, means = native_writes(model, saes, [passage.tokens for passage in text], seed, progress)
    return {site: Material(site[1], sae, books.get(site), means.get(site)) for site, sae in saes.items()}


def _batch(
    engine, heads, chunk, numbers, allowed, materials, reads, natives, scales, conditions, each, seed, show
) -> dict:
    """Every firing tested in a batch of passages, as table columns."""
    layer, horizon = engine.layer, engine.horizon
    lengths = [len(passage.tokens) for passage in chunk]
    ids = torch.zeros(len(chunk), max(lengths), dtype=torch.int64)
    for p, passage in enumerate(chunk):
        ids[p, : lengths[p]] = torch.from_numpy(np.asarray(passage.tokens, np.int64))
    rows: list[tuple[int, int, int, int, float]] = []

    def choose(writes):
        for head, sae in heads.items():
            feature, value = (x.cpu() for x in top_codes(writes, sae, head))
            names = [f"{layer}:{head}/{passage.name}" for passage in chunk]
            for p, t in sample(feature, value, lengths, names, each, horizon, allowed[layer, head], seed):
                rows.append((p, t, head, int(feature[p, t]), float(value[p, t])))
        rows.sort()
        if not rows:
            rows.append((0, 0, next(iter(heads)), 0, 0.0))  # a stand-in, dropped below: an empty batch has no shapes
        row, position, head = torch.tensor([r[:3] for r in rows], dtype=torch.int64).reshape(-1, 3).unbind(1)
        return Places(row, position, head)

    clean = engine.clean(ids, torch.tensor(lengths), choose)
    p, t, head, feature = np.array([r[:4] for r in rows], np.int64).reshape(-1, 4).T
    code = torch.tensor([r[4] for r in rows])
    atoms = {h: sae.atoms() for h, sae in heads.items()}
    rank = max(v.shape[1] for v, _ in atoms.values())
    v = torch.zeros(len(rows), rank, engine.site.K)
    w = torch.zeros(len(rows), rank, engine.site.V)
    for i, (_, _, h, f, _) in enumerate(rows):
        v_dec, w_dec = atoms[h]
        v[i, : v_dec.shape[1]], w[i, : w_dec.shape[1]] = v_dec[f], w_dec[f]
    names = [f"{layer}:{h}/{chunk[a].name}@{b}" for a, b, h in zip(p, t, head, strict=True)]
    sites = tuple(materials[layer, h] for h in heads)
    fired = Fired(v, w, code, names, torch.from_numpy(feature), sites)
    changes = deltas(clean, fired, natives, scales, conditions, seed, reads)
    found = engine.divergences(clean, engine.run(clean, changes), BASELINE)
    # Where the forks begin after the token, its own KL is 0 without having been run.
    kl = {
        name: tuple(np.pad(x.cpu().numpy(), ((0, 0), (engine.first, 0))) for x in found[name])
        for name in arms(natives, scales, tuple(conditions), reads)
    }
    left, right, outer = (x.to("cpu", torch.float32) for x in (clean.left, clean.right, clean.outer_right))
    norm = left.norm(dim=1) * right.norm(dim=1)
    gram = torch.einsum("nrk,nsk->nrs", v, v) * torch.einsum("nrv,nsv->nrs", w, w)
    atom_norm = gram.sum((1, 2)).clamp_min(0).sqrt()
    inner = (torch.einsum("nrk,nk->nr", v, left) * torch.einsum("nrv,nv->nr", w, right)).sum(1)
    contexts = [show.around(chunk[a].tokens, b) for a, b in zip(p, t, strict=True)]
    strings = np.empty(len(rows), object)
    strings[:] = [tokens for tokens, _ in contexts]
    documents = np.empty(len(rows), object)
    documents[:] = [chunk[a].document for a in p]
    table = {
        "document": documents, "passage": np.asarray(numbers)[p].astype(np.int64),
        "row": np.array([chunk[a].row for a in p], np.int64), "position": t, "token": ids[p, t].numpy(),
        "layer": np.full(len(rows), layer, np.int64), "head": head, "feature": feature, "activation": code.numpy(),
        "native_norm": norm.numpy(), "outer_norm": (left.norm(dim=1) * outer.norm(dim=1)).numpy(),
        "atom_norm": atom_norm.numpy(), "atom_size": (code * atom_norm).numpy(),
        "cosine": (inner / (norm * atom_norm).clamp_min(1e-30)).numpy(),
        "context": strings, "context_at": np.array([at for _, at in contexts], np.int64),
        **{f"forward:{name}": pair[0] for name, pair in kl.items()},
        **{f"reverse:{name}": pair[1] for name, pair in kl.items()},
    }  # fmt: skip
    real = code.numpy() > 0
    return {name: column[real] for name, column in table.items()}


class _Shown:
    """Tokens as text, each looked up once."""

    def __init__(self, tokenizer):
        self._tokenizer, self._known = tokenizer, {}

    def around(self, tokens: np.ndarray, t: int) -> tuple[list[str], int]:
        """(strings of the tokens around position t, index of t among them)."""
        lo = max(t - _BEFORE, 0)
        return [self._text(int(token)) for token in tokens[lo : t + _AFTER + 1]], t - lo

    def _text(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = str(token) if self._tokenizer is None else self._tokenizer.decode([token])
        return self._known[token]
