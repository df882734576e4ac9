"""Paired statistics of the replacement test: does the atom disturb the model less than deletion does?

Everything here works on plain numpy columns, one entry a firing. Intervals and tests come from scipy and statsmodels;
only the cluster bootstrap, which neither has, is written out (it is one matrix product). Every result is a dict that
names the statistic and carries its n, ready for JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 5000
MIN_FIRINGS, MAX_FIRINGS = 5, 30


def need(module: str):
    """Imports an optional dependency, or says which extra brings it."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed for the statistics of an experiment: pip install writesae[experiments]"
        ) from error


def check_finite(**columns: np.ndarray) -> None:
    """Raises ValueError naming the first column that holds a NaN or an infinity, or has another length."""
    length = None
    for name, column in columns.items():
        column = np.asarray(column)
        if column.ndim != 1:
            raise ValueError(f"{name}: expected one value a firing (1 dimension), got shape {column.shape}")
        length = len(column) if length is None else length
        if len(column) != length:
            raise ValueError(f"{name}: expected {length} values, one a firing, got {len(column)}")
        bad = ~np.isfinite(column.astype(np.float64))
        if bad.any():
            raise ValueError(
                f"{name}: expected finite values, got {int(bad.sum())} NaN or infinite of {len(column)} "
                f"(first at firing {int(np.flatnonzero(bad)[0])})"
            )
    if not length:
        raise ValueError("firings: expected at least one firing, got none")


def proportion(success: np.ndarray, name: str) -> dict:
    """Share of true entries of `success [n]` with its Wilson 95 % interval."""
    n, count = len(success), int(np.count_nonzero(success))
    low, high = need("statsmodels.stats.proportion").proportion_confint(count, n, alpha=0.05, method="wilson")
    return {"statistic": name, "n": n, "count": count, "rate": count / n, "ci95": [float(low), float(high)]}


def win_rate(treatment: np.ndarray, control: np.ndarray) -> dict:
    """Share of firings whose `treatment [n]` KL is strictly below its `control [n]` KL; Wilson 95 %."""
    check_finite(treatment=treatment, control=control)
    out = proportion(treatment < control, "win rate, strict, Wilson 95 % interval")
    wins, losses = out["count"], int((treatment > control).sum())
    out.update(wins=wins, losses=losses, ties=out["n"] - wins - losses, paired_effect=(wins - losses) / out["n"])
    return out


def strict_chain(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> dict:
    """Share of firings with first < second < third (atom < delete < random), each strictly; Wilson 95 %."""
    check_finite(first=first, second=second, third=third)
    out = proportion((first < second) & (second < third), "strict chain, Wilson 95 % interval")
    out["ties"] = int(((first == second) | (second == third)).sum())
    return out


def wilcoxon(treatment: np.ndarray, control: np.ndarray) -> dict:
    """Two-sided paired Wilcoxon signed-rank test; zero differences are dropped and counted.

    With no non-zero difference at all there is nothing to rank: p = 1, and `n_used` says 0.
    """
    check_finite(treatment=treatment, control=control)
    difference = np.asarray(treatment, np.float64) - np.asarray(control, np.float64)
    zeros = int((difference == 0).sum())
    out = {"statistic": "paired Wilcoxon signed-rank, two-sided", "n": len(difference), "zeros": zeros}
    out["n_used"] = out["n"] - zeros
    if not out["n_used"]:
        return {**out, "W": 0.0, "p": 1.0}
    result = need("scipy.stats").wilcoxon(difference, zero_method="wilcox", alternative="two-sided")
    return {**out, "W": float(result.statistic), "p": float(result.pvalue)}


def cliffs_delta(treatment: np.ndarray, control: np.ndarray) -> dict:
    """Cliff's delta, in [-1, 1]: P(treatment < control) - P(treatment > control) over all pairs of unlike firings.

    Positive where the `treatment [n]` KLs are the smaller ones; unlike the win rate it knows nothing of the pairing.
    The word is that of Romano et al. (2006): negligible below 0.147, small below 0.33, medium below 0.474, else large.
    """
    check_finite(treatment=treatment, control=control)
    n = len(treatment)
    delta = float(2 * need("scipy.stats").mannwhitneyu(control, treatment, method="asymptotic").statistic / n**2 - 1)
    word = next((word for word, below in _EFFECTS if abs(delta) < below), "large")
    return {"statistic": "Cliff's delta, over all pairs", "n": n, "delta": delta, "word": word}


_EFFECTS = (("negligible", 0.147), ("small", 0.33), ("medium", 0.474))


def by_quartile(treatment: np.ndarray, control: np.ndarray) -> list[dict]:
    """Win rate by quartile of the control's KL, smallest first: are failures where there is nothing to lose?"""
    check_finite(treatment=treatment, control=control)
    out = []
    for part in np.array_split(np.argsort(control, kind="stable"), 4):
        if len(part):
            won = win_rate(treatment[part], control[part])
            kept = {name: won[name] for name in ("n", "rate", "ci95", "losses", "ties")}
            out.append({**kept, "from": float(control[part].min()), "to": float(control[part].max())})
    return out


class ClusterBootstrap:
    """Resamples whole clusters (features, passages) with replacement; the same draws serve every statistic.

    Args:
        clusters: `[n]` label of every firing's cluster.
        resamples: draws.
        seed: of the draws.
    """

    def __init__(self, clusters: np.ndarray, resamples: int = RESAMPLES, seed: int = 0):
        if resamples < 1:
            raise ValueError(f"resamples: expected at least 1, got {resamples}")
        labels, self._of = np.unique(np.asarray(clusters), return_inverse=True)
        if not len(labels):
            raise ValueError("clusters: expected at least one firing, got none")
        self.clusters, self.resamples = len(labels), resamples
        # A draw of G clusters out of G is a multinomial count for each, so a resampled mean is two dot products.
        draw = np.random.default_rng(seed)
        weights = draw.multinomial(self.clusters, np.full(self.clusters, 1 / self.clusters), size=resamples)
        self._weights = weights.astype(np.float64)  # once, not at every product
        self._counts = self._weights @ np.bincount(self._of, minlength=self.clusters)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """`[resamples]` resampled means of `values [n]`."""
        values = np.asarray(values, np.float64)
        if values.shape != self._of.shape:
            raise ValueError(f"values: expected {len(self._of)} values, one a firing, got shape {values.shape}")
        return (self._weights @ np.bincount(self._of, values, self.clusters)) / self._counts

    def interval(self, values: np.ndarray, by: str) -> dict:
        """Percentile 95 % interval of the mean of `values [n]`."""
        low, high = np.percentile(self.mean(values), [2.5, 97.5])
        return {
            "statistic": f"cluster bootstrap by {by}, percentile 95 % interval", "n": len(self._of),
            "clusters": self.clusters, "resamples": self.resamples, "ci95": [float(low), float(high)],
        }  # fmt: skip


def population(treatment: np.ndarray, control: np.ndarray, feature: np.ndarray) -> dict:
    """Per-feature test: the mean of the features' own win rates, and how many win more of their firings than they lose.

    `mean` is the mean win rate over features with a bootstrap over features (`mean_ci95`; None for a single one), and
    `rate` the share of features that win most of their firings, with its Wilson interval. A feature needs `MIN_FIRINGS`
    firings; its first `MAX_FIRINGS` in table order (a random order of passages) are used, so that frequent features do
    not speak for rare ones. `significant` counts features whose wins exceed chance by a one-sided sign test (ties left
    out) at a false discovery rate of 5 % (Benjamini-Hochberg).
    """
    check_finite(treatment=treatment, control=control, feature=feature)
    features, rates, p_values, used = [], [], [], 0
    for label in np.unique(feature):
        index = np.flatnonzero(feature == label)
        if len(index) < MIN_FIRINGS:
            continue
        index = index[:MAX_FIRINGS]
        wins, losses = int((treatment[index] < control[index]).sum()), int((treatment[index] > control[index]).sum())
        p = need("scipy.stats").binomtest(wins, wins + losses, 0.5, "greater").pvalue if wins + losses else 1.0
        features.append(int(label))
        rates.append(((wins > losses), wins / len(index)))
        p_values.append(float(p))
        used += len(index)
    name = f"features winning most of their firings, of those with at least {MIN_FIRINGS} (at most {MAX_FIRINGS} used)"
    if not features:
        none = dict.fromkeys(("rate", "ci95", "mean", "mean_ci95"))
        return {"statistic": name, "n": 0, "count": 0, **none, "firings": 0, "significant": 0}
    own = np.array([rate for _, rate in rates])
    out = proportion(np.array([won for won, _ in rates]), name)
    rejected = need("statsmodels.stats.multitest").multipletests(p_values, alpha=0.05, method="fdr_bh")[0]
    out.update(
        firings=used, significant=int(rejected.sum()), features=features, win_rates=own.tolist(),
        median_win_rate=float(np.median(own)), mean=float(own.mean()), mean_ci95=_mean_interval(own),
    )  # fmt: skip
    return out


def _mean_interval(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> list[float] | None:
    """Percentile 95 % interval of the mean, by a bootstrap over `values [n]`; None for a single one."""
    if len(values) < 2:
        return None
    if values.std() == 0:
        return [float(values[0])] * 2
    found = need("scipy.stats").bootstrap(
        (values,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(seed)
    )  # fmt: skip
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def across_heads(rates: Mapping[tuple[int, int], float]) -> dict[str, dict]:
    """Per layer: mean and sample standard deviation over heads of {(layer, head): win rate}."""
    out = {}
    for layer in sorted({layer for layer, _ in rates}):
        heads = {head: rates[layer, head] for (at, head) in sorted(rates) if at == layer}
        values = np.array(list(heads.values()))
        out[str(layer)] = {
            "statistic": "win rate over heads of the layer, mean and sample standard deviation", "n": len(values),
            "mean": float(values.mean()), "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
            "heads": {str(head): float(rate) for head, rate in heads.items()},
        }  # fmt: skip
    return out


def explained(measured: np.ndarray, predicted: np.ndarray, clusters: ClusterBootstrap, by: str) -> dict:
    """R^2 of `predicted [n]` for `measured [n]`, without any fit, and their Spearman rank correlation.

    R^2 is 1 less the squared error over the variance of what was measured: below 0 where its mean predicts better. The
    intervals are of the cluster bootstrap; that of the rank correlation keeps the ranks that they have among all.
    """
    check_finite(measured=measured, predicted=predicted)
    y, x = np.asarray(measured, np.float64), np.asarray(predicted, np.float64)

    def r2(mean) -> np.ndarray:
        return 1 - mean((y - x) ** 2) / np.maximum(mean(y * y) - mean(y) ** 2, 1e-300)

    rank = need("scipy.stats").rankdata
    a, b = (rank(z) / len(z) for z in (x, y))

    def correlation(mean) -> np.ndarray:
        first, second = mean(a), mean(b)
        spread = (mean(a * a) - first**2) * (mean(b * b) - second**2)
        return (mean(a * b) - first * second) / np.sqrt(np.maximum(spread, 1e-300))

    return {
        "statistic": f"R^2 without a fit, and Spearman's rank correlation; bootstrap by {by}, percentile 95 %",
        "n": len(y), "clusters": clusters.clusters, "r2": float(r2(np.mean)),
        "ci95": np.percentile(r2(clusters.mean), [2.5, 97.5]).tolist(), "spearman": float(correlation(np.mean)),
        "spearman_ci95": np.percentile(correlation(clusters.mean), [2.5, 97.5]).tolist(),
    }  # fmt: skip


def describe(values: np.ndarray) -> dict:
    """Median, quartiles and mean of one KL column."""
    low, mid, high = np.percentile(values, [25, 50, 75])
    return {"n": len(values), "median": float(mid), "iqr": [float(low), float(high)], "mean": float(np.mean(values))}


def replacement_tests(
    kl: Mapping[str, np.ndarray],
    by_feature: ClusterBootstrap,
    by_passage: ClusterBootstrap,
    feature: np.ndarray,
    others: Sequence[str] = (),
) -> dict:
    """Every statistic of one native-write definition, scale, horizon and KL direction.

    Args:
        kl: {condition: `[n]` KL of every firing}; needs "atom" and "delete"; "random" adds the chain.
        by_feature, by_passage: bootstraps over the same n firings.
        feature: `[n]` feature of every firing.
        others: further conditions to test the atom against: whatever else could have been put in the write's place.
    """
    check_finite(feature=feature, **kl)
    atom, delete = np.asarray(kl["atom"]), np.asarray(kl["delete"])
    won = atom < delete
    out = {
        "win_rate": win_rate(atom, delete),
        "win_rate_by_feature": by_feature.interval(won, "feature"),
        "win_rate_by_passage": by_passage.interval(won, "passage"),
        "wilcoxon": wilcoxon(atom, delete),
        "cliffs_delta": cliffs_delta(atom, delete),
        "by_quartile": by_quartile(atom, delete),
        "population": population(atom, delete, feature),
        "kl": {name: describe(column) for name, column in kl.items()},
    }
    if "random" in kl:
        random = np.asarray(kl["random"])
        chain = (atom < delete) & (delete < random)
        out["strict_chain"] = strict_chain(atom, delete, random)
        out["strict_chain_by_feature"] = by_feature.interval(chain, "feature")
        out["strict_chain_by_passage"] = by_passage.interval(chain, "passage")
    out["atom_against"] = {name: against(atom, np.asarray(kl[name]), by_feature, by_passage) for name in others}
    return out


def against(atom: np.ndarray, other: np.ndarray, by_feature: ClusterBootstrap, by_passage: ClusterBootstrap) -> dict:
    """The atom against one other thing put in the write's place: how often it is closer, and by how much."""
    won = atom < other
    return {
        **win_rate(atom, other), "by_feature": by_feature.interval(won, "feature")["ci95"],
        "by_passage": by_passage.interval(won, "passage")["ci95"], "cliffs_delta": cliffs_delta(atom, other),
        "wilcoxon": wilcoxon(atom, other),
    }  # fmt: skip
