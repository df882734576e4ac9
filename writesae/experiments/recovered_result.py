"""What a closed-loop run gives: each passage's loss under every condition, and the share of the loss recovered."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files import make_folder, write_json, write_text
from .parts import write_table
from .result import versions
from .statistics import ClusterBootstrap

TEST = "loss recovered"
LEAST_COST = 0.005  # nats a token: below, a head's deletion costs too little for a share of it to mean anything
RESAMPLES = 2000
OWN = 0  # in the column k: each dictionary's own number of atoms
FIXED = ("plain", "deleted")


@dataclass
class RecoveredResult:
    """Losses of held-out passages, closed loop.

    Attributes:
        table: columns, one entry a passage and condition: `read` ("" where there is none), `group` ("5:3", "layer 5"
            or "all"; "" for plain), `condition`, `k` (atoms a write; 0 is each dictionary's own, and where there is
            none), `passage`, `loss` (sum over its predicted tokens, nats), `tokens` (how many those are).
        groups: {group: its sites}, in the order that they are shown in.
        conditions: of the table, "plain" and "deleted" first, but for `own`.
        ks: atoms a write, as asked for; None is each dictionary's own.
        target: "write" or "state": what the dictionaries reconstruct.
        reads: when a token reads the changed state, each tried; (None,) for dictionaries of states.
        sites: {site: what its dictionary is}.
        own: conditions of the caller's, which know no k.
    """

    table: dict[str, np.ndarray]
    groups: dict[str, list[tuple[int, int]]]
    conditions: tuple[str, ...]
    ks: tuple[int | None, ...]
    target: str
    reads: tuple[str | None, ...]
    context: int
    seed: int
    seconds: float
    sites: dict[tuple[int, int], dict] = field(default_factory=dict)
    own: tuple[str, ...] = ()

    def losses(self, group: str, condition: str, k: int | None = None, read: str | None = None) -> np.ndarray:
        """`[passages]` loss of each, in nats a token; `read` is the first of `reads` unless said.

        Raises:
            KeyError: no such group, condition, k or read in this run.
        """
        table = self.table
        mine = table["condition"] == condition
        if condition != "plain":
            mine = mine & (table["group"] == group) & (table["read"] == (read or self.reads[0] or ""))
            if condition != "deleted":
                mine = mine & (table["k"] == (OWN if k is None else k))
        if not mine.any():
            raise KeyError(f"{group} {condition} k={k} read={read}")
        order = np.argsort(table["passage"][mine], kind="stable")
        return (table["loss"][mine] / table["tokens"][mine])[order]

    def summary(self, resamples: int = RESAMPLES) -> dict:
        """Cross-entropies and shares with their intervals, ready for JSON."""
        plain = self.losses("", "plain")
        return {
            "test": TEST, "passages": len(plain), "context": self.context, "tokens": len(plain) * (self.context - 1),
            "seconds": self.seconds, "plain": float(plain.mean()),
            "groups": [self._group(name, read, plain, resamples) for read in self.reads for name in self.groups],
            "settings": {
                "target": self.target, "reads": list(self.reads), "ks": list(self.ks),
                "conditions": [*self.conditions, *self.own], "least_cost": LEAST_COST,
                "seed": self.seed, "resamples": resamples,
                "sites": {f"{layer}:{head}": record for (layer, head), record in sorted(self.sites.items())},
            },
            "versions": versions(),
        }  # fmt: skip

    def _group(self, name: str, read: str | None, plain: np.ndarray, resamples: int) -> dict:
        """One head, layer, or all of them: what deleting costs, and what each condition recovers of it."""
        gone = self.losses(name, "deleted", read=read)
        draws = ClusterBootstrap(np.arange(len(plain)), resamples, self.seed)
        cost = Ratio(gone - plain, draws)
        meaning = cost.value >= LEAST_COST and cost.surely_positive
        arms = []
        coded = [condition for condition in self.conditions if condition not in FIXED]
        for k, condition in [*((k, name) for k in self.ks for name in coded), *((None, name) for name in self.own)]:
            loss = self.losses(name, condition, k, read)
            share = Ratio(gone - loss, draws, gone - plain) if meaning else None
            arms.append({
                "condition": condition, "k": k, "loss": float(loss.mean()),
                "share": None if share is None else share.value, "ci95": None if share is None else share.interval,
            })  # fmt: skip
        gains = []
        for k in self.ks if "codebook" in self.conditions and meaning else ():
            book, coder = (self.losses(name, condition, k, read) for condition in ("codebook", "coded"))
            gain = Ratio(book - coder, draws, gone - plain)
            gains.append({"k": k, "share": gain.value, "ci95": gain.interval})
        note = None
        if cost.value < LEAST_COST:
            what = "this head's writes cost" if len(self.groups[name]) == 1 else "the writes of these heads cost"
            note = f"no meaning: {what} less than {LEAST_COST} nats"
        elif not meaning:
            note = "no meaning: what the deletion costs cannot be told from nothing on these passages"
        return {
            "read": read, "group": name, "heads": len(self.groups[name]), "deleted": float(gone.mean()),
            "cost": cost.value, "cost_ci95": cost.interval, "note": note, "arms": arms, "gains": gains,
        }  # fmt: skip

    def save(self, folder: str | Path, **extra) -> dict:
        """Writes `summary.json` (with `extra` entries), `recovered.csv` and `losses.parquet`; returns the summary."""
        folder = make_folder(Path(folder))
        summary = {**extra, **self.summary()}
        write_table(folder / "losses.parquet", self.table)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(flat(summary))
        write_text(folder / "recovered.csv", text.getvalue())
        write_json(folder / "summary.json", summary)
        return summary


class Ratio:
    """A mean over passages, or a ratio of two, with its 95 % interval by a bootstrap over passages, paired.

    Args:
        above: `[P]` one value a passage.
        draws: the same for all, so that ratios of one run can be compared.
        below: `[P]`, or None for 1.
    """

    def __init__(self, above: np.ndarray, draws: ClusterBootstrap, below: np.ndarray | None = None):
        self.value = float(above.mean() / (1 if below is None else below.mean()))
        self.interval: list[float] | None = None
        if len(above) > 1:
            found = draws.mean(above) / (1 if below is None else draws.mean(below))
            low, high = np.percentile(found, [2.5, 97.5])
            self.interval = [float(low), float(high)]

    @property
    def surely_positive(self) -> bool:
        return self.value > 0 if self.interval is None else self.interval[0] > 0


def flat(summary: dict) -> list[list]:
    """A summary as a table: its header, then a row for each group, condition and k."""
    rows: list[list] = [[
        "read", "group", "heads", "plain", "deleted", "cost", "cost_low", "cost_high", "condition", "k", "loss",
        "share", "share_low", "share_high", "note",
    ]]  # fmt: skip
    for group in summary["groups"]:
        cost = group["cost_ci95"] or ["", ""]
        for arm in group["arms"]:
            rows.append([
                group["read"] or "", group["group"], group["heads"], summary["plain"], group["deleted"], group["cost"],
                *cost, arm["condition"], "own" if arm["k"] is None else arm["k"], arm["loss"],
                "" if arm["share"] is None else arm["share"], *(arm["ci95"] or ["", ""]), group["note"] or "",
            ])  # fmt: skip
    return rows


def printed(summary: dict) -> str:
    """A summary as lines for a terminal: what a head's deletion costs, and the shares recovered."""
    arms = [(arm["condition"], arm["k"]) for arm in summary["groups"][0]["arms"]]
    head = ["head", "deleted", *(f"{condition} {label(k)}" for condition, k in arms)]
    rows: list[Sequence[str]] = [head]
    for group in summary["groups"]:
        if group["note"]:
            rows.append([group["group"], f"{group['deleted']:.4f}", group["note"]])
            continue
        cells = [f"{group['deleted']:.4f}"]
        for arm in group["arms"]:
            interval = "" if arm["ci95"] is None else " [{:.1f}, {:.1f}]".format(*(100 * x for x in arm["ci95"]))
            cells.append(f"{100 * arm['share']:.1f} %{interval}")
        rows.append([group["group"], *cells])
    full = [row for row in rows if len(row) == len(head)]
    widths = [max(len(row[i]) for row in full) for i in range(len(head))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = [f"plain {summary['plain']:.4f} nats a token; share of what deletion costs that is recovered, 95 %:"]
    before = None
    for row, read in zip(rows, [None, *(group["read"] for group in summary["groups"])], strict=True):
        if read != before:
            lines.append(f"read {read}:")
        lines.append("  ".join(f"{x:<{w}}" for x, w in zip(row, widths, strict=False)).rstrip())
        before = read
    return "\n".join(lines)


def label(k: int | None) -> str:
    return "own k" if k is None else f"k={k}"
