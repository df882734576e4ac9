"""What a replacement test found: one row a firing, and the statistics over them."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .._installed import version_of
from ..files import make_folder, write_json
from . import statistics
from .conditions import PLAIN, arm, scales_of
from .divergence import DIRECTIONS
from .parts import write_table

METRICS = ("h0", "h1", "mean")
HEADLINE = ("mean", "forward")
# Of J. Young, arXiv 2605.12770, on Qwen3.5-0.8B: another model, other atoms, chosen by hand; beside ours, no target.
PAPER = {"win_rate": 0.924, "n": 4851, "atoms": 18, "strict_chain": 0.895, "population": 0.898, "population_n": 87}


@dataclass(frozen=True)
class ReplacementResult:
    """Firings tested, and how they were.

    Attributes:
        table: columns of n rows. `forward:<arm>` and `reverse:<arm>` `[n, horizon + 1]` are KL(baseline || patched) and
            its reverse in nats by tokens after the edit; an arm is "after.increment.delete",
            "after.increment.coef.atom", ... The rest describes the firing: document, passage, row, position, token,
            layer, head, feature, activation, native_norm, outer_norm, atom_norm, atom_size (with its code), cosine (of
            atom and native increment), context, context_at.
        natives, scales, conditions, horizon, seed, requested, tokens, seconds, selected, sites, reads: of the run.
        rule: "all heads" where the sites are all heads of their layers, "longest memory", or "given".
    """

    table: dict[str, np.ndarray]
    natives: tuple[str, ...]
    scales: tuple[str, ...]
    conditions: tuple[str, ...]
    horizon: int
    seed: int
    requested: int
    tokens: int
    seconds: float
    selected: dict | None
    sites: dict[tuple[int, int], dict] = field(default_factory=dict)
    reads: tuple[str, ...] = ("after",)
    rule: str = "given"

    def __len__(self) -> int:
        return len(self.table["feature"])

    def kl(
        self,
        native: str,
        condition: str,
        scale: str | None = None,
        metric: str = "mean",
        direction: str = "forward",
        read: str | None = None,
    ) -> np.ndarray:
        """`[n]` KL of every firing in one condition: at the token (h0), the next (h1), or the mean from h1 on.

        `read` is when the state was changed, the headline's unless given. Read after, the token itself (h0) is 0.
        """
        return _metric(self.table[f"{direction}:{arm(native, condition, scale, read or self.reads[0])}"], metric)

    def _at(self, scale: str) -> list[str]:
        """The conditions that are edits of their own at a scale."""
        return [c for c in self.conditions if scales_of(c, (scale,))]

    def summary(self, resamples: int = statistics.RESAMPLES) -> dict:
        """Every statistic, for every time of reading, reading of the native write, scale, horizon and direction."""
        table, n = self.table, len(self)
        for name in ("feature", "activation"):
            statistics.check_finite(**{name: table[name]})
        site = table["layer"] * 100_000 + table["head"]
        feature = site * 10_000_000 + table["feature"]  # the same number at two sites is two features
        by_feature = statistics.ClusterBootstrap(feature, resamples, self.seed)
        by_passage = statistics.ClusterBootstrap(table["passage"], resamples, self.seed)
        tests = {}
        for read in self.reads:
            for native in self.natives:
                for scale in self.scales:
                    kept = self._at(scale)
                    others = [c for c in kept if c not in ("atom", *PLAIN)]
                    tests[f"{read}/{native}/{scale}"] = {
                        metric: {
                            direction: statistics.replacement_tests(
                                {c: self.kl(native, c, scale, metric, direction, read) for c in kept},
                                by_feature, by_passage, feature, others,
                            )
                            for direction in DIRECTIONS
                        }
                        for metric in METRICS if (read, metric) != ("after", "h0")  # which is 0 for everything
                    }  # fmt: skip
        read, native, scale = self.reads[0], self.natives[0], self.scales[0]
        head = tests[f"{read}/{native}/{scale}"][HEADLINE[0]][HEADLINE[1]]
        rates = {}
        for layer, at in sorted(self.sites):
            mine = (table["layer"] == layer) & (table["head"] == at)
            if mine.any():
                kl = {c: self.kl(native, c, scale)[mine] for c in ("atom", "delete")}
                rates[layer, at] = float((kl["atom"] < kl["delete"]).mean())
        put_back = self.natives if "native" in self.conditions else ()
        exact = [table[f"{d}:{arm(x, 'native', read=r)}"] for d in DIRECTIONS for x in put_back for r in self.reads]
        codebook = head["atom_against"].get("codebook")
        return {
            "n": n, "firings_requested": self.requested, "tokens": self.tokens,
            "seconds": self.seconds, "firings_per_second": n / self.seconds if self.seconds else None,
            "headline": {
                "read": read, "native": native, "scale": scale, "horizon": HEADLINE[0], "direction": HEADLINE[1],
            },
            "win_rate": head["win_rate"]["rate"], "win_rate_ci95": head["win_rate"]["ci95"],
            "win_rate_ci95_by_feature": head["win_rate_by_feature"]["ci95"],
            "win_rate_ci95_by_passage": head["win_rate_by_passage"]["ci95"],
            "atom_vs_codebook": None if codebook is None else codebook["rate"],
            "atom_vs_codebook_ci95": None if codebook is None else codebook["ci95"],
            "strict_chain": head["strict_chain"]["rate"] if "strict_chain" in head else None,
            "strict_chain_ci95": head["strict_chain"]["ci95"] if "strict_chain" in head else None,
            "kl_median": {c: head["kl"][c]["median"] for c in self._at(scale) if c != "native"},
            "native_kl_max": float(max(x.max() for x in exact)) if exact else None,
            "cosine_median": float(np.median(table["cosine"])),
            "norm_median": {x: float(np.median(table[x])) for x in ("native_norm", "outer_norm", "atom_size")},
            "features": by_feature.clusters, "passages": by_passage.clusters,
            "documents": len(set(table["document"].tolist())),
            "heads": statistics.across_heads(rates), "sites": self._by_site(native, scale), **self._tables(native),
            "paper": PAPER, "tests": tests,
            "settings": {
                "horizon": self.horizon, "reads": list(self.reads), "natives": list(self.natives),
                "scales": list(self.scales), "conditions": list(self.conditions), "seed": self.seed,
                "resamples": resamples, "selection": self.selected, "rule": self.rule,
                "sites": {f"{layer}:{at}": record for (layer, at), record in sorted(self.sites.items())},
            },
            "versions": versions(),
        }  # fmt: skip

    def _by_site(self, native: str, scale: str) -> dict[str, dict]:
        """The headline of every site by itself: one good site must not stand for the others."""
        table, out = self.table, {}
        for layer, head in sorted(self.sites):
            mine = (table["layer"] == layer) & (table["head"] == head)
            if mine.any():
                kl = {c: self.kl(native, c, scale)[mine] for c in self._at(scale) if c != "native"}
                won = statistics.win_rate(kl["atom"], kl["delete"])
                out[f"{layer}:{head}"] = {
                    **{name: won[name] for name in ("statistic", "n", "rate", "ci95", "wins", "losses", "ties")},
                    "features": len(np.unique(table["feature"][mine])),
                    "kl_median": {c: float(np.median(x)) for c, x in kl.items()},
                }
        return out

    def _tables(self, native: str) -> dict[str, list[dict]]:
        """ "table": `_rows` of every site by itself, and "pooled": of all of them together, where there are several."""
        table, rows, tested = self.table, [], np.zeros(len(self), bool)
        for layer, head in sorted(self.sites):
            mine = (table["layer"] == layer) & (table["head"] == head)
            tested |= mine
            if mine.any():
                rows += [{"site": f"{layer}:{head}", **row} for row in self._rows(native, mine)]
        several = len({row["site"] for row in rows}) > 1
        return {"table": rows, "pooled": self._rows(native, tested) if several else []}

    def _rows(self, native: str, mine: np.ndarray) -> list[dict]:
        """Conditions x scales x times of reading: how often each is closer than deletion, and the atom than it.

        `upper` is how often it is closer than deletion where deletion's KL is over its median: elsewhere deleting the
        write does next to nothing. `of_zero` is the median KL as a share of that of emptying the head's whole state,
        where that was tested.
        """
        rows = []
        for read in self.reads:
            zero = None
            if "zero" in self.conditions:
                zero = float(np.median(self.kl(native, "zero", read=read)[mine]))
            for condition in self.conditions:
                for scale in scales_of(condition, self.scales) if condition != "native" else ():
                    kl = {
                        c: self.kl(native, c, s, read=read)[mine]
                        for c, s in ((condition, scale), ("atom", scale or self.scales[0]), ("delete", None))
                    }
                    median = float(np.median(kl[condition]))
                    upper = kl["delete"] > np.median(kl["delete"])
                    pairs = {
                        "beats_delete": (condition, "delete", slice(None)), "upper": (condition, "delete", upper),
                        "atom_beats": ("atom", condition, slice(None)),
                    }  # fmt: skip
                    rates: dict[str, dict | None] = {}
                    for name, (one, other, which) in pairs.items():
                        a, b = kl[one][which], kl[other][which]
                        found = None if one == other or not len(a) else statistics.win_rate(a, b)
                        rates[name] = found and {k: found[k] for k in ("rate", "ci95", "ties")}
                    rows.append({
                        "read": read, "scale": scale, "condition": condition, "n": int(mine.sum()), "kl_median": median,
                        "of_zero": median / zero if zero else None, **rates,
                    })  # fmt: skip
        return rows

    def save(self, folder: str | Path, **extra) -> dict:
        """Writes `summary.json` (with `extra` entries) and `firings.parquet` into `folder`; returns the summary."""
        folder = make_folder(Path(folder))
        summary = {**extra, **self.summary()}
        write_table(folder / "firings.parquet", self.table)
        write_json(folder / "summary.json", summary)
        return summary


def _metric(curve: np.ndarray, metric: str) -> np.ndarray:
    if metric == "mean":
        return curve[:, 1:].mean(1)
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    return curve[:, int(metric[1:])]


def versions() -> dict[str, str]:
    """Of what made a run."""
    names = ("writesae", "torch", "transformers", "numpy", "scipy", "statsmodels")
    return {"python": platform.python_version(), **{name: version_of(name) or "not installed" for name in names}}
