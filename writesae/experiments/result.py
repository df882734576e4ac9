"""What a replacement test found: one row a firing, and the statistics over them."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ..files import make_folder
from . import statistics
from .conditions import arm
from .divergence import DIRECTIONS
from .parts import to_arrow, write_atomically

METRICS = ("h0", "h1", "mean")
HEADLINE = ("mean", "forward")
BASELINES = ("mean", "previous", "singular")


@dataclass(frozen=True)
class ReplacementResult:
    """Firings tested, and how they were.

    Attributes:
        table: columns of n rows. `forward:<arm>` and `reverse:<arm>` `[n, horizon + 1]` are KL(baseline || patched) and
            its reverse in nats by tokens after the edit; an arm is "increment.delete", "increment.coef.atom", ... The
            rest describes the firing: document, passage, row, position, token, layer, head, feature, activation,
            native_norm, outer_norm, atom_norm, cosine (of atom and native increment), context, context_at.
        natives, scales, conditions, horizon, seed, requested, tokens, seconds, selected, sites: of the run.
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

    def __len__(self) -> int:
        return len(self.table["feature"])

    def kl(
        self, native: str, condition: str, scale: str | None = None, metric: str = "mean", direction: str = "forward"
    ) -> np.ndarray:
        """`[n]` KL of every firing in one condition: at the token (h0), the next (h1), or the mean from h1 on."""
        return _metric(self.table[f"{direction}:{arm(native, condition, scale)}"], metric)

    def summary(self, resamples: int = statistics.RESAMPLES) -> dict:
        """Every statistic, for both readings of the native write, both scales, three horizons and both directions."""
        table, n = self.table, len(self)
        for name in ("feature", "activation"):
            statistics.check_finite(**{name: table[name]})
        site = table["layer"] * 100_000 + table["head"]
        feature = site * 10_000_000 + table["feature"]  # the same number at two sites is two features
        by_feature = statistics.ClusterBootstrap(feature, resamples, self.seed)
        by_passage = statistics.ClusterBootstrap(table["passage"], resamples, self.seed)
        others = [c for c in self.conditions if c in BASELINES]
        tests = {}
        for native in self.natives:
            for scale in self.scales:
                tests[f"{native}/{scale}"] = {
                    metric: {
                        direction: statistics.replacement_tests(
                            {c: self.kl(native, c, scale, metric, direction) for c in self.conditions},
                            by_feature, by_passage, feature, others,
                        )
                        for direction in DIRECTIONS
                    }
                    for metric in METRICS
                }  # fmt: skip
        native, scale = self.natives[0], self.scales[0]
        head = tests[f"{native}/{scale}"][HEADLINE[0]][HEADLINE[1]]
        rates = {}
        for layer, at in sorted(self.sites):
            mine = (table["layer"] == layer) & (table["head"] == at)
            if mine.any():
                kl = {c: self.kl(native, c, scale)[mine] for c in ("atom", "delete")}
                rates[layer, at] = float((kl["atom"] < kl["delete"]).mean())
        put_back = self.natives if "native" in self.conditions else ()
        exact = [table[f"{d}:{arm(x, 'native')}"] for d in DIRECTIONS for x in put_back]
        return {
            "n": n, "firings_requested": self.requested, "tokens": self.tokens,
            "seconds": self.seconds, "firings_per_second": n / self.seconds if self.seconds else None,
            "headline": {"native": native, "scale": scale, "horizon": HEADLINE[0], "direction": HEADLINE[1]},
            "win_rate": head["win_rate"]["rate"], "win_rate_ci95": head["win_rate"]["ci95"],
            "win_rate_ci95_by_feature": head["win_rate_by_feature"]["ci95"],
            "win_rate_ci95_by_passage": head["win_rate_by_passage"]["ci95"],
            "strict_chain": head["strict_chain"]["rate"] if "strict_chain" in head else None,
            "strict_chain_ci95": head["strict_chain"]["ci95"] if "strict_chain" in head else None,
            "kl_median": {c: head["kl"][c]["median"] for c in self.conditions if c != "native"},
            "native_kl_max": float(max(x.max() for x in exact)) if exact else None,
            "cosine_median": float(np.median(table["cosine"])),
            "features": by_feature.clusters, "passages": by_passage.clusters,
            "documents": len(set(table["document"].tolist())),
            "heads": statistics.across_heads(rates), "sites": self._by_site(native, scale), "tests": tests,
            "settings": {
                "horizon": self.horizon, "natives": list(self.natives), "scales": list(self.scales),
                "conditions": list(self.conditions), "seed": self.seed, "resamples": resamples,
                "selection": self.selected,
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
                kl = {c: self.kl(native, c, scale)[mine] for c in self.conditions if c != "native"}
                won = statistics.win_rate(kl["atom"], kl["delete"])
                out[f"{layer}:{head}"] = {
                    **{name: won[name] for name in ("statistic", "n", "rate", "ci95", "wins", "losses", "ties")},
                    "features": len(np.unique(table["feature"][mine])),
                    "kl_median": {c: float(np.median(x)) for c, x in kl.items()},
                }
        return out

    def save(self, folder: str | Path, **extra) -> dict:
        """Writes `summary.json` (with `extra` entries) and `firings.parquet` into `folder`; returns the summary."""
        folder = Path(folder)
        make_folder(folder)
        summary = {**extra, **self.summary()}
        rows = to_arrow(self.table)
        write_atomically(folder / "firings.parquet", lambda path: pq.write_table(rows, path, compression="zstd"))
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        write_atomically(folder / "summary.json", lambda path: path.write_text(text))
        return summary


def _metric(curve: np.ndarray, metric: str) -> np.ndarray:
    if metric == "mean":
        return curve[:, 1:].mean(1)
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    return curve[:, int(metric[1:])]


def versions() -> dict[str, str]:
    """Of what made a run."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("writesae", "torch", "transformers", "numpy", "scipy", "statsmodels"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            from .. import __version__

            found[name] = __version__ if name == "writesae" else "not installed"
    return found
