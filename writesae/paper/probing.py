"""What a linear probe finds in codes, in the state they are of, and in the residual stream."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from ..experiments.statistics import need
from ..models.attach import attach
from .lab import SPLITS, Lab
from .measures import above, ratio, spans
from .study import Answer, Claim, Figure, Findings, Setting, Study
from .token_classes import labelled

NAMES = ("codes", "codes, which fire", "state", "state, PCA", "state, top pair", "write", "residual stream")


def run(lab: Lab) -> Findings:
    site = next(iter(lab.saes))
    found = {split: _examples(lab, split) for split in SPLITS}
    found = {split: (x, y, who) for split, (x, y, who) in _common(found).items()}
    scores, rows = {}, {"passage": found["test"][2], "label": found["test"][1]}
    for name in NAMES:
        for shuffled in (False, True):
            hit = lab.unit(
                f"probe-{NAMES.index(name)}-{'shuffled' if shuffled else 'plain'}",
                lambda name=name, shuffled=shuffled: {"hit": _probe(lab, found, name, shuffled)},  # type: ignore[misc]
            )["hit"]
            key = f"{name}, labels shuffled" if shuffled else name
            rows[key] = hit.astype(np.int8)
            scores[key] = balanced(hit, found["test"][1], found["test"][2], lab.seed)
    classes, counts = np.unique(found["test"][1], return_counts=True)
    statistics: dict[str, Any] = {
        "site": f"{site[0]}:{site[1]}", "label": lab["label"], "chance": 1 / len(classes), "accuracy": scores,
        "classes": dict(zip(classes.tolist(), counts.tolist(), strict=True)),
        "examples": {split: len(y) for split, (_, y, _) in found.items()},
    }  # fmt: skip
    weight = _weights(found["test"][1])
    said = ", ".join(f"{name} {100 * scores[name]['ratio']:.1f} %" for name in NAMES[1:])
    answers = []
    for claim, (one, other) in zip(STUDY.claims, (("codes", "codes, labels shuffled"), ("codes", "state, PCA"),
                                                  ("codes", "residual stream")), strict=True):  # fmt: skip
        gain = ratio(
            weight * (rows[one] - rows[other].astype(float)), weight, found["test"][2], "passage", lab.seed
        )  # fmt: skip
        low, high = gain["ci95"]
        answers.append(Answer(
            claim.key, f"{100 * scores[one]['ratio']:.1f} %, {100 * gain['ratio']:+.1f} over {other}", gain["n"],
            "tokens",
            (100 * low, 100 * high), f"{said}; codes with labels shuffled "
            f"{100 * scores['codes, labels shuffled']['ratio']:.1f} %", above((low, high), 0),
        ))  # fmt: skip
    return Findings(statistics, {"tokens": rows}, {"probing": _figure(statistics)}, answers, [
        "Accuracy is balanced: every class counts alike, so that chance is one over their number. Probes are logistic "
        "regressions learnt on train text, their penalty chosen on validation text.",
        "The label is of the token itself, which the residual stream at its own place has seen.",
    ])  # fmt: skip


@torch.no_grad()
def _examples(lab: Lab, split: str) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """({representation: `[n, D]`}, labels `[n]`, passages `[n]`) of tokens drawn from a split."""
    sparse = need("scipy.sparse")
    ((layer, head), sae), count = next(iter(lab.saes.items())), lab[split]
    passages = lab.text(split, 8 * count, lab["context"])
    labels = labelled(passages, lab.tokenizer, lab["label"])
    rng = lab.rng("examples", split)
    device = lab.model.get_input_embeddings().weight.device
    parts: dict[str, list] = {name: [] for name in NAMES if name != "state, PCA"}
    kept: list[np.ndarray] = []
    who: list[np.ndarray] = []
    for i in rng.permutation(len(passages)):
        at = np.flatnonzero(labels[i] != "")
        at = np.sort(rng.permutation(at[at > 0])[: lab["each"]])
        at = at[: count - sum(map(len, kept))]
        if not len(at):
            continue
        ids = torch.from_numpy(passages[i].tokens)[None].to(device)
        with attach(lab.model, {(layer, head): None}) as tap:
            stream = lab.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        places = torch.from_numpy(np.stack([np.zeros_like(at), at], 1)).to(device)
        writes = tap.writes[layer].head(head)
        X = writes.states(places)[:, 0].float()
        u, sigma, vh = torch.linalg.svd(X, full_matrices=False)
        sign = torch.where(u[:, :1, 0].sum(1, keepdim=True) < 0, -1.0, 1.0)
        codes = sae.encode(X.to(sae.mean.device))
        row = np.repeat(np.arange(len(at)), codes.indices.shape[1])
        values, columns = (x.cpu().numpy().reshape(-1) for x in (codes.values, codes.indices))
        each = sparse.csr_matrix((values, (row, columns)), shape=(len(at), sae.F))
        parts["codes"].append(each)
        parts["codes, which fire"].append((each > 0).astype(np.float64))
        parts["state"].append(X.flatten(1).cpu().numpy())
        parts["state, top pair"].append(torch.cat([u[:, :, 0] * sign * sigma[:, :1], vh[:, 0] * sign], 1).cpu().numpy())
        left, right = (x.float() for x in writes.native(0, places[:, 1], 0))
        parts["write"].append(torch.cat([left, right], 1).cpu().numpy())
        parts["residual stream"].append(stream[layer][0, places[:, 1]].flatten(1).float().cpu().numpy())
        kept.append(labels[i][at])
        who.append(np.full(len(at), i))
        if sum(map(len, kept)) >= count:
            break
    joined = {name: (sparse.vstack(x).tocsr() if name.startswith("codes") else np.concatenate(x))
              for name, x in parts.items()}  # fmt: skip
    return joined, np.concatenate(kept), np.concatenate(who)


def _common(found: dict) -> dict:
    """Tokens of classes that every split has often enough.

    Raises:
        ValueError: fewer than two such classes.
    """
    some = [
        {c for c, n in zip(*np.unique(y, return_counts=True), strict=True) if n >= 10} for _, y, _ in found.values()
    ]
    classes = sorted(set.intersection(*some))
    if len(classes) < 2:
        raise ValueError(
            f"label: expected two classes with 10 tokens or more in every split, got {classes}; raise train"
        )
    out = {}
    for split, (x, y, who) in found.items():
        kept = np.flatnonzero(np.isin(y, classes))
        out[split] = {name: each[kept] for name, each in x.items()}, y[kept].astype(str), who[kept]
    return out


def _probe(lab: Lab, found: dict, name: str, shuffled: bool) -> np.ndarray:
    """`[n]` whether the probe is right at each test token."""
    linear, preparing = need("sklearn.linear_model"), need("sklearn.preprocessing")
    source = "state" if name == "state, PCA" else name
    x = {split: found[split][0][source] for split in SPLITS}
    if name == "state, PCA":
        n = min(lab["components"], *x["train"].shape)
        pca = need("sklearn.decomposition").PCA(n, random_state=lab.seed).fit(x["train"])
        x = {split: pca.transform(each) for split, each in x.items()}
    scale = (preparing.MaxAbsScaler if name.startswith("codes") else preparing.StandardScaler)().fit(x["train"])
    x = {split: scale.transform(each) for split, each in x.items()}
    y = found["train"][1]
    if shuffled:
        y = lab.rng("labels").permutation(y)
    best: Any = None
    score = -1.0
    for C in lab["penalties"]:
        with warnings.catch_warnings():  # a probe that could go on a little is a probe
            warnings.simplefilter("ignore", need("sklearn.exceptions").ConvergenceWarning)
            probe = linear.LogisticRegression(C=C, max_iter=lab["sweeps"], class_weight="balanced").fit(x["train"], y)
        right = probe.predict(x["validation"]) == found["validation"][1]
        mine = float(np.average(right, weights=_weights(found["validation"][1])))
        if mine > score:
            best, score = probe, mine
    return best.predict(x["test"]) == found["test"][1]


def _weights(labels: np.ndarray) -> np.ndarray:
    """`[n]` such that every class weighs the same."""
    _, at, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return 1 / counts[at]


def balanced(hit: np.ndarray, labels: np.ndarray, passages: np.ndarray, seed: int) -> dict:
    """Balanced accuracy as `ratio`, with a bootstrap over passages."""
    weight = _weights(labels)
    return ratio(weight * hit, weight, passages, "passage", seed)


def _figure(statistics: dict) -> Figure:
    def paint(axes, colours):
        names = [name for name in NAMES][::-1]
        for suffix, colour, label in (("", "atom", "probe"), (", labels shuffled", "random", "labels shuffled")):
            found = [statistics["accuracy"][name + suffix] for name in names]
            value, spread = spans(found, "ratio")
            axes.errorbar(100 * value, names, xerr=100 * spread, fmt="o", lw=1.4, color=colours[colour], label=label)
        axes.axvline(100 * statistics["chance"], color=colours["line"], lw=0.9, ls=(0, (4, 3)))
        axes.set(xlabel=f"balanced accuracy of the label “{statistics['label']}”, %", xlim=(0, 102))
        axes.legend(loc="upper right")

    return Figure(paint, "Balanced accuracy of linear probes on test text, with intervals over passages; the dashed "
                  "line is chance.")  # fmt: skip


_NO_SOURCE = "its sources name the analysis, not its label or numbers"
STUDY = Study(
    "probing", "What a linear probe finds",
    "A logistic regression reads what kind of token it is from the codes of a dictionary of states, from the state, "
    "from low-rank projections of it, from the token's own write and from the residual stream; the same with labels "
    "shuffled.",
    (
        Claim("probing.labels", "Codes tell a token's class better than with labels at random.", "–", _NO_SOURCE),
        Claim("probing.pca", "They tell it better than a projection of the state by PCA.", "–", _NO_SOURCE),
        Claim("probing.stream", "They tell it better than the residual stream that the layer reads.", "–", _NO_SOURCE),
    ),
    {
        "label": Setting("class", "class", "inside (a Python string or comment), class (of Python's lexer) or shape "
                         "(of the token's letters)"),
        "train": Setting(12_000, 1500, "tokens of train text"),
        "validation": Setting(3000, 500, "tokens of validation text"),
        "test": Setting(6000, 800, "tokens of test text"),
        "context": Setting(256, 128, "tokens of a passage"),
        "each": Setting(40, 40, "tokens of a passage at most"),
        "components": Setting(32, 16, "directions of the projection by PCA"),
        "penalties": Setting((0.001, 0.01, 0.1, 1.0), (0.01, 1.0), "inverse penalties tried"),
        "sweeps": Setting(500, 60, "iterations of a probe at most"),
    },
    run,
)  # fmt: skip
