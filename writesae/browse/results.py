"""What runs found of single atoms: replacement tests (win rate, KL, cosine, keys) and the paper's partition study."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..untrusted import read_json

_SHOWN = 12  # firings listed of an atom and run
_PARTITION = "features.csv"


class Results:
    """Runs of `writesae replace` (their headline) and of `writesae paper partition`, by atom.

    Args:
        folders: of the runs.
    Raises:
        ValueError: a folder that is neither; names it.
    """

    def __init__(self, folders: Iterable[str | Path] = ()):
        self.folders = [Path(folder) for folder in folders]
        self._runs: list[tuple[str, dict, dict[str, np.ndarray], str]] = []
        self._medians: dict[tuple[int, int, int], float] = {}
        for folder in self.folders:
            if (folder / _PARTITION).is_file():
                self._medians |= _medians(folder / _PARTITION)
                continue
            from ..report.load import load_run

            try:
                summary, columns = load_run(folder)
            except ValueError as error:
                raise ValueError(f"results: {str(error).removeprefix('run: ')}") from error
            head = summary["headline"]
            self._runs.append((folder.name, summary, columns, f"{head['read']}.{head['native']}"))

    def files(self) -> list[Path]:
        """What they were read from."""
        names = ("summary.json", "firings.parquet", _PARTITION)
        return [folder / name for folder in self.folders for name in names if (folder / name).is_file()]

    def columns(self, sites, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(win rate, mean cosine) `[n]` float32 of all features, NaN where none was tested.

        Args:
            sites: (layer, head) in order. first: `[sites + 1]` number of the first feature of each.
        """
        n = int(first[-1])
        tested, won, cosines, cosine = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
        for _, summary, c, arm in self._runs:
            key, mine = _keys(c["layer"], c["head"], c["feature"], sites, first)
            np.add.at(cosine, key, c["cosine"][mine])
            np.add.at(cosines, key, 1)
            pair = _pair(summary, c, arm)
            if pair is not None:
                np.add.at(won, key, (pair[0] < pair[1])[mine])
                np.add.at(tested, key, 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            rate, mean = won / tested, cosine / cosines
        if self._medians:
            places = np.array(list(self._medians))
            key, mine = _keys(places[:, 0], places[:, 1], places[:, 2], sites, first)
            mean[key] = np.array(list(self._medians.values()))[mine]
        return rate.astype(np.float32), mean.astype(np.float32)

    def of(self, layer: int, head: int, feature: int) -> list[dict] | None:
        """An entry a run that tested the atom: how often it was closer than deletion and than the codebook (mean KL of
        the tokens after, or of the headline's horizon), medians by condition, and some firings."""
        out: list[dict[str, Any]] = []
        for name, summary, c, arm in self._runs:
            mine = (c["layer"] == layer) & (c["head"] == head) & (c["feature"] == feature)
            if not mine.any():
                continue
            scale = summary["headline"]["scale"]
            kl = {}
            for condition in summary["settings"]["conditions"]:
                found = _curve(c, arm, condition, scale)
                if found is not None:
                    kl[condition] = found[mine]
            entry: dict[str, Any] = {
                "run": name, "n": int(mine.sum()), "headline": dict(summary["headline"]),
                "cosine": _mean(c["cosine"][mine]),
                "kl_median": {condition: _number(np.median(x)) for condition, x in kl.items()},
                "closer_than": {
                    other: _mean(kl["atom"] < kl[other]) for other in kl if other not in ("atom", "native")
                } if "atom" in kl else {},
            }  # fmt: skip
            entry["win_rate"] = entry["closer_than"].get("delete")
            at = np.flatnonzero(mine)[:_SHOWN]
            entry["firings"] = [
                {"document": str(c["document"][i]), "row": int(c["row"][i]), "position": int(c["position"][i]),
                 "activation": _number(c["activation"][i]),
                 "kl": {condition: _number(x[j]) for condition, x in kl.items()}} for j, i in enumerate(at)
            ]  # fmt: skip
            out.append(entry)
        return out or None

    def keys(self, layer: int, head: int, feature: int) -> list[dict]:
        """Tokens whose keys a run found nearest to the atom's key side, with their mean cosine."""
        for _, summary, *_ in self._runs:
            found = (summary.get("atoms") or {}).get(f"{layer}:{head}", {}).get(str(feature), {})
            if found.get("answers_to"):
                return [{"token": text, "cosine": float(cosine)} for text, cosine in found["answers_to"]]
        return []


def _keys(layer, head, feature, sites, first) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the features, which rows they are of)."""
    number = {site: i for i, site in enumerate(sites)}
    at = np.array([number.get((int(a), int(b)), -1) for a, b in zip(layer, head, strict=True)], np.int64)
    feature = np.asarray(feature, np.int64)
    mine = (at >= 0) & (feature >= 0) & (feature < np.diff(first)[at])
    return first[at[mine]] + feature[mine], mine


def _curve(c, arm: str, condition: str, scale: str) -> np.ndarray | None:
    """`[n]` mean forward KL of the tokens after the edit."""
    found = c.get(f"forward:{arm}.{scale}.{condition}", c.get(f"forward:{arm}.{condition}"))
    return None if found is None or found.ndim != 2 or found.shape[1] < 2 else found[:, 1:].mean(1)


def _pair(summary: dict, c, arm: str) -> tuple[np.ndarray, np.ndarray] | None:
    scale = summary["headline"]["scale"]
    one, other = (_curve(c, arm, condition, scale) for condition in ("atom", "delete"))
    return None if one is None or other is None else (one, other)


def _number(x) -> float | None:
    return float(x) if math.isfinite(x) else None


def _mean(x: np.ndarray) -> float | None:
    return _number(np.mean(x)) if len(x) else None


def _medians(path: Path) -> dict[tuple[int, int, int], float]:
    """{(layer, head, feature): median cosine} of the partition study."""
    summary = read_json(path.with_name("summary.json"), 2**26)
    if summary.get("study") != "partition":
        raise ValueError(f"results: expected a run of `writesae replace` or `paper partition`, got {path.parent}")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {
                (int(x["layer"]), int(x["head"]), int(x["feature"])): float(x["median"]) for x in csv.DictReader(file)
            }
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"results: {path}: expected layer, head, feature and median, got {error}") from error
