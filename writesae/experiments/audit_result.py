"""What an audit found, and its verdicts: rules that were fixed before anything was measured.

Cost, of the change D of the loss on the rest of a passage (all predictions past the edit's own), in nats a token:

    harmful         the whole 95 % interval of D lies above `HARM` = 0.01 (perplexity up by 1 %)
    harmless        the whole interval lies below it
    cannot be told  the interval holds it

Beside random, of D less that of Gaussian changes of the same size, rank, place and time in the same passages:

    more            the whole interval lies above 0
    less            the whole interval lies below 0
    no more         the interval holds 0

Reach, of the mean KL at the last quarter of the horizon, less a tenth (`FADED`) of the mean KL where it is largest:

    local           the whole interval lies below 0
    lingering       the whole interval lies above 0
    cannot be told  the interval holds 0

Intervals resample passages; of fewer than `LEAST` = 10 nothing can be told. An edit that changes no prediction at all
does nothing, which is said instead.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import make_folder, write_json, write_text
from . import statistics
from .result import versions

TEST = "audit"
ARMS = ("edit", "random", "other")
HARM, FADED, LEAST = 0.01, 0.1, 10
_ROUNDING = 1e-10  # nats: a KL of float32's rounding
COSTS = ("harmful", "harmless", "cannot be told")
BESIDE = ("more", "less", "no more", "cannot be told")
REACHES = ("local", "lingering", "cannot be told")


def cost_of(low: float, high: float) -> str:
    """One of `COSTS`, of an interval of the change of the loss."""
    return "harmful" if low > HARM else "harmless" if high < HARM else "cannot be told"


def beside_of(low: float, high: float) -> str:
    """One of `BESIDE`, of an interval of the difference to random changes."""
    return "more" if low > 0 else "less" if high < 0 else "no more"


def reach_of(low: float, high: float) -> str:
    """One of `REACHES`, of an interval of what is left of the KL less a tenth of its peak."""
    return "local" if high < 0 else "lingering" if low > 0 else "cannot be told"


@dataclass(frozen=True)
class AuditResult:
    """Edits, and what else they change.

    Attributes:
        runs: {(edit, arm): columns}, arm "edit", "random" (Gaussian factors) or "other" (the model's writes at other
            tokens); a row is a passage in which the edit was made. passage, position (of its first edit), places
            (edited in it), plain and change (loss on the rest, nats a token, without the edit and by how much it grows)
            `[n]`; kl and flip `[n, horizon + 1]` of each prediction from the first edit's own on, NaN past the end;
            state `[n, G]`, norm of the change of the edited layer's state; share `[n, layers, G]`, of every layer's
            change as a share of its state's norm.
        says: {edit: what it does}.
        layers: the recurrent layers, in order.
        grid: the G horizons of state and share.
        horizon, passages, context, seed: of the run.
    """

    runs: dict[tuple[str, str], dict[str, np.ndarray]]
    says: dict[str, str]
    layers: Sequence[int]
    grid: Sequence[int]
    horizon: int
    passages: int
    context: int
    seed: int

    def summary(self, resamples: int = statistics.RESAMPLES) -> dict:
        """Every curve with its intervals, and the verdicts, ready for JSON."""
        return {
            "test": TEST, "passages": self.passages, "context": self.context, "horizon": self.horizon,
            "seed": self.seed, "resamples": resamples, "layers": list(self.layers), "grid": list(self.grid),
            "rules": {"harm": HARM, "faded": FADED, "least": LEAST},
            "edits": [self._edit(name, resamples) for name in self.says], "versions": versions(),
        }  # fmt: skip

    def _edit(self, name: str, resamples: int) -> dict:
        found = self._found(name, resamples)
        return {**found, "verdict": verdict(found)}

    def _found(self, name: str, resamples: int) -> dict:
        edit = self.runs[name, "edit"]
        boot = statistics.ClusterBootstrap(np.arange(len(edit["passage"])), resamples, self.seed)
        arms = {arm: self._arm(self.runs[name, arm], boot) for arm in ARMS}
        plain = float(edit["plain"].mean())
        out = {
            "name": name, "says": self.says[name], "n": len(edit["passage"]), "places": int(edit["places"].sum()),
            "plain": plain, "perplexity": math.exp(min(plain, 700)), "arms": arms,
        }  # fmt: skip
        if np.nanmax(edit["kl"]) < _ROUNDING and np.abs(edit["change"]).max() < _ROUNDING**0.5:
            return {**out, "does": "nothing"}
        against, enough = {}, len(edit["passage"]) >= LEAST
        for arm in ARMS[1:]:
            difference = edit["change"] - self.runs[name, arm]["change"]
            ci95 = boot.interval(difference, "passage")["ci95"]
            word = beside_of(*ci95) if enough else BESIDE[-1]
            against[arm] = {"change": float(difference.mean()), "ci95": ci95, "is": word}
        kl = edit["kl"]
        means = np.nanmean(kl, 0)
        peak = int(np.nanargmax(means))
        tail = np.nanmean(kl[:, -max(1, self.horizon // 4) :], 1)
        left = boot.mean(tail - FADED * np.nan_to_num(kl[:, peak]))
        low, high = (float(x) for x in np.percentile(left, [2.5, 97.5]))
        below = np.flatnonzero(means < FADED * means[peak])
        below = below[below > peak]
        return {
            **out, "does": "something", "against": against,
            "cost": cost_of(*arms["edit"]["change"]["ci95"]) if enough else COSTS[-1],
            "reach": reach_of(low, high) if enough else REACHES[-1],
            "left": {"n": len(kl), "kl": float(tail.mean()), "ci95": [low, high]},
            "peak": {"at": peak, "kl": float(means[peak])}, "faded_at": int(below[0]) if len(below) else None,
        }  # fmt: skip

    def _arm(self, run: Mapping[str, np.ndarray], boot: statistics.ClusterBootstrap) -> dict:
        change = boot.interval(run["change"], "passage")
        first = run["state"][:, :1]
        decay = np.divide(run["state"], first, out=np.zeros_like(run["state"]), where=first > 0)
        rise = [float(np.expm1(x)) for x in (run["change"].mean(), *change["ci95"])]
        flips = run["flip"][:, 1:]
        return {
            "change": {"n": len(run["change"]), "mean": float(run["change"].mean()), "ci95": change["ci95"]},
            "perplexity_rise": {"n": len(run["change"]), "share": rise[0], "ci95": rise[1:]},
            "flips": {"n": int(np.isfinite(flips).sum()), "share": float(np.nanmean(flips))},
            "kl": _curve(run["kl"], boot), "flip": _curve(run["flip"], boot), "state": _curve(run["state"], boot),
            "decay": np.median(decay, 0).tolist(), "share": np.median(run["share"], 0).tolist(),
        }  # fmt: skip

    def lines(self, summary: Mapping | None = None) -> str:
        """A verdict a line, for a terminal; of a `summary` that was made already."""
        found = self.summary() if summary is None else summary
        return "\n".join(f"{edit['name']}: {edit['verdict']}" for edit in found["edits"])

    def save(self, folder: str | Path, **extra) -> dict:
        """Writes `summary.json` (with `extra` entries) and `audit.csv`, a row a passage, edit and arm; returns the
        summary."""
        folder = make_folder(Path(folder))
        summary = {**extra, **self.summary()}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["edit", "arm", "passage", "position", "places", "plain", "change", "kl_sum", "flips"])
        for (name, arm), run in self.runs.items():
            kl, flip = np.nansum(run["kl"], 1), np.nansum(run["flip"], 1)
            columns = (run[x].tolist() for x in ("passage", "position", "places", "plain", "change"))
            writer.writerows(zip([name] * len(kl), [arm] * len(kl), *columns, kl.tolist(), flip.tolist(), strict=True))
        write_text(folder / "audit.csv", text.getvalue())
        write_json(folder / "summary.json", summary)
        return summary


def _curve(values: np.ndarray, boot: statistics.ClusterBootstrap) -> dict:
    """Mean, median and the mean's 95 % interval of each column of `[n, H]`, over passages that reach so far."""
    n = np.isfinite(values).sum(0)
    filled = np.nan_to_num(values)
    counted = np.isfinite(values).astype(float)
    low, high = [], []
    for column, there in zip(filled.T, counted.T, strict=True):
        weight = boot.mean(there)
        found = np.percentile(
            np.divide(boot.mean(column), weight, out=np.zeros_like(weight), where=weight > 0), [2.5, 97.5]
        )
        low.append(float(found[0]))
        high.append(float(found[1]))
    mean = np.divide(filled.sum(0), n, out=np.zeros(len(n)), where=n > 0)
    median = [float(np.median(c[np.isfinite(c)])) if k else 0.0 for c, k in zip(values.T, n, strict=True)]
    return {"n": n.tolist(), "mean": mean.tolist(), "median": median, "low": low, "high": high}


def verdict(edit: Mapping) -> str:
    """An edit of a summary in one sentence or two, by the rules above."""
    if edit["does"] == "nothing":
        return "Does nothing: no prediction changes."
    change, rise = edit["arms"]["edit"]["change"], edit["arms"]["edit"]["perplexity_rise"]
    random = edit["arms"]["random"]["perplexity_rise"]["share"]
    cost = {
        "harmful": "Harmful", "harmless": "Harmless", "cannot be told": "Whether it is harmful cannot be told",
    }[edit["cost"]]  # fmt: skip
    beside = {
        "more": "more than random changes of its size do", "less": "less than random changes of its size do",
        "no more": "no more than random changes of its size do, as far as can be told",
        "cannot be told": "beside random changes of its size",
    }[edit["against"]["random"]["is"]]  # fmt: skip
    reach = {
        "local": "local: its effect fades below a tenth of its peak",
        "lingering": "lingering: its effect stays above a tenth of its peak",
        "cannot be told": "whether its effect fades below a tenth of its peak cannot be told",
    }[edit["reach"]]  # fmt: skip
    low, high = rise["ci95"]
    if change["n"] < LEAST:
        cost, reach = f"Too few passages to tell (at least {LEAST})", "how far it reaches cannot be told"
    return (
        f"{cost}: it changes the perplexity of the rest by {percent(rise['share'])} (95 %: {percent(low)} to "
        f"{percent(high)}, {change['n']} passages), {beside} ({percent(random)}); {reach} within the horizon."
    )


def percent(share: float) -> str:
    """A change in per cent with its sign: to two digits, or all that is needed to be told from 0."""
    value = 100 * share
    text = f"{value:+.2f}" if abs(value) < 10 else f"{value:+,.0f}"
    if float(text.replace(",", "")) == 0 and value != 0:
        text = f"{value:+.1g}"
    return text.replace("-", "−") + " %"
