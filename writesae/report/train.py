"""The page of a training: how its dictionaries did on held-out text while they were trained, and how they ended."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..files import make_folder, write_text
from ..untrusted import is_integer, is_number, read_json
from . import plots
from .html import clean, figure, template
from .schema import _ANY, COUNT, INTEGER, TEXT, _fields, _is, _list, _mapping, _or_none
from .style import STYLE

RECORD, HISTORY = "metrics.json", "training.json"
LOOKS = {
    "held_out_fvu": ("How much is left unexplained?", "FVU of held-out {of}"),
    "held_out_l0": ("How many atoms are active?", "atoms active at a held-out {one}"),
    "dead": ("How many atoms die?", "dead atoms"),
    "beats_deletion": ("Would an atom do for a write?", "writes at which it beats deletion"),
}
_LIMIT = 256 * 2**20
_POINTS = 300  # of the curve of the loss
_ALONE = 24  # so many dictionaries are drawn one by one beside their means
_ROWS = 600  # dictionaries listed; dictionaries.csv has all
_HUES = ("atom", "delete", "mean", "previous", "zero", "singular")

_REAL = _is(lambda x: is_number(x) or isinstance(x, float), "a number")  # a NaN tells of a run that diverged
_RECORD = _fields(
    {
        "model": TEXT, "seconds": _REAL, "config": _mapping(TEXT, _ANY),
        "metrics": _mapping(TEXT, _fields(
            {"fvu": _REAL, "l0": _REAL, "dead": COUNT, "alive": COUNT, "states": COUNT, "cosine_median": _REAL,
             "winner_cosine_median": _REAL, "winner_better_than_deletion": _REAL},
            {"write_cosine_median": _REAL},
        )),
    }
)  # fmt: skip
_LOOK = _fields({"step": COUNT, **{name: _mapping(TEXT, _REAL) for name in LOOKS}})
_STEP = _fields({"step": COUNT, "layer": INTEGER, "head": INTEGER, "loss": _REAL}, {"variant": _or_none(TEXT)})
_HISTORY = _list(lambda x, where: (_LOOK if isinstance(x, Mapping) and "held_out_fvu" in x else _STEP)(x, where))


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds the record of a training that ended."""
    return all((Path(folder) / name).is_file() for name in (RECORD, HISTORY))


def build(folder: str | Path, out: str | Path) -> Path:
    """Draws the figures and writes `report.html` into `out`.

    Args:
        folder: a finished training; of one by several processes, that of all.
        out: folder for `report.html`, `dictionaries.csv` and `plots/*.svg` with their numbers.
    Returns:
        Path of the page.
    Raises:
        ValueError: values of other types than a training's, or a link where a file would be written.
    """
    folder = Path(folder)
    try:
        record = read_json(folder / RECORD, _LIMIT, strict=False)
        history = read_json(folder / HISTORY, _LIMIT, strict=False, kind=list)
        _RECORD(record, RECORD)
        _HISTORY(history, HISTORY)
        if not record["metrics"]:
            raise ValueError(f"{RECORD}.metrics: expected at least one dictionary, got none")
    except ValueError as error:
        raise ValueError(f"run: {folder}: {str(error).removeprefix('run: ')}") from error
    out = make_folder(Path(out))
    rows = _rows(record["metrics"])
    names = ("dictionary", "fvu", "l0", "alive", "dead", "cosine", "winner_cosine", "beats_deletion", "states")
    write_text(out / "dictionaries.csv", plots.table({name: [row[name] for row in rows] for name in names}))
    page = out / "report.html"
    write_text(page, _render(record, history, rows, _figures(record, history, rows, out / "plots")))
    return page


def _rows(metrics: Mapping) -> list[dict]:
    """A record a dictionary, those with the least FVU first."""
    found = [
        {
            "dictionary": clean(name), "variant": clean(name.rpartition("/")[0]), "fvu": m["fvu"], "l0": m["l0"],
            "alive": m["alive"], "dead": m["dead"], "cosine": m["cosine_median"], "states": m["states"],
            "winner_cosine": m["winner_cosine_median"], "beats_deletion": m["winner_better_than_deletion"],
            "write_cosine": m.get("write_cosine_median"),
        }
        for name, m in metrics.items()
    ]  # fmt: skip
    return sorted(found, key=lambda row: (not math.isfinite(row["fvu"]), row["fvu"]))


def config_of(record: Mapping) -> Mapping:
    """The settings of the first variant, or of the only one."""
    config = record["config"]
    nested = [x for x in config.values() if isinstance(x, Mapping)]
    return nested[0] if nested and len(nested) == len(config) else config


# ---- figures --------------------------------------------------------------------------------------------------------


def _figures(record: Mapping, history: Sequence[Mapping], rows: list[dict], folder: Path) -> list:
    """(figure, title, what it shows) of each."""
    of = "write" if config_of(record).get("target") == "write" else "state"
    looks = [x for x in history if "held_out_fvu" in x and x["held_out_fvu"]]
    found = []
    for name, (title, axis) in LOOKS.items() if looks else ():
        label = axis.format(of=of + "s", one=of)
        path = curves(looks, name, label, folder / f"{name}.svg")
        found.append((path, title, f"{label[0].upper()}{label[1:]}, by step. " + _WHOSE))
    steps = [x for x in history if "loss" in x and math.isfinite(x["loss"])]
    if steps:
        found.append((losses(steps, folder / "loss.svg"), "Did it settle?", "Loss of the steps, mean over dictionaries "
                      "and over neighbouring steps."))  # fmt: skip
    ended = [row for row in rows if math.isfinite(row["fvu"]) and math.isfinite(row["l0"])]
    if len(ended) > 1:
        path = trade(ended, _variants(list(record["metrics"])), folder / "fvu_l0.svg")
        found.append((path, "What do more atoms buy?", "FVU and L0 at the end, a point a dictionary."))
    return [(figure(path), title, text) for path, title, text in found]


_WHOSE = "Lines are means over a variant’s sites, faint ones single sites."


def _variants(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition("/")[0] for name in names))


def curves(looks: Sequence[Mapping], what: str, label: str, path: Path) -> Path:
    """A look's number by step: the mean of every variant, and its sites where they are few."""
    names = list(looks[-1][what])
    variants = _variants(names)
    steps = [look["step"] for look in looks]
    values = {name: [float(look[what].get(name, math.nan)) for look in looks] for name in names}

    def paint(axes, colours):
        for i, variant in enumerate(variants):
            mine = np.array([values[name] for name in names if name.rpartition("/")[0] == variant])
            colour = colours[_HUES[i % len(_HUES)]]
            if len(mine) > 1 and len(names) <= _ALONE:
                axes.plot(steps, mine.T, color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(steps, mine.mean(0), color=colour, linewidth=1.7, marker="o", markersize=3,
                      label=plots.plain(variant) if len(variants) > 1 else None)  # fmt: skip
        axes.set(xlabel="steps", ylabel=label)
        if what in ("dead", "held_out_l0"):
            axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
        if what == "beats_deletion":
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if 1 < len(variants) <= 12:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=3, columnspacing=1.0)

    return plots.draw(path, (5.0, 3.3), paint, {"step": steps, **{clean(name): x for name, x in values.items()}})


def losses(steps: Sequence[Mapping], path: Path) -> Path:
    """Mean loss by step, of neighbouring steps where they are many."""
    number, loss = (np.array([x[name] for x in steps], float) for name in ("step", "loss"))
    part = number * min(_POINTS, number.max() + 1) // (number.max() + 1)
    parts, of = np.unique(part, return_inverse=True)
    count = np.bincount(of, minlength=len(parts))
    x, y = (np.bincount(of, values, len(parts)) / count for values in (number, loss))

    def paint(axes, colours):
        axes.plot(x, y, color=colours["atom"], linewidth=1.3)
        axes.set(xlabel="steps", ylabel="loss", yscale="log" if (y > 0).all() else "linear")

    return plots.draw(path, (5.0, 3.3), paint, {"step": x, "loss": y})


def trade(rows: Sequence[Mapping], variants: Sequence[str], path: Path) -> Path:
    """FVU against L0, a point a dictionary, in the colours of `variants`."""

    def paint(axes, colours):
        for i, variant in enumerate(variants):
            mine = [row for row in rows if row["variant"] == clean(variant)]
            axes.scatter([row["l0"] for row in mine], [row["fvu"] for row in mine], s=22, alpha=0.75, linewidths=0,
                         color=colours[_HUES[i % len(_HUES)]],
                         label=plots.plain(variant) if len(variants) > 1 else None)  # fmt: skip
        axes.set(xlabel="L0: atoms active", ylabel="FVU", xlim=(0, None))
        if 1 < len(variants) <= 12:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=3, columnspacing=1.0)

    return plots.draw(
        path, (5.0, 3.3), paint, {name: [row[name] for row in rows] for name in ("dictionary", "l0", "fvu")}
    )


# ---- page -----------------------------------------------------------------------------------------------------------


def _render(record: Mapping, history: Sequence[Mapping], rows: list[dict], figures: list) -> str:
    from markupsafe import Markup

    config = config_of(record)
    variants = [clean(str(name)) for name, x in record["config"].items() if isinstance(x, Mapping)]
    settings = [(clean(str(name)), clean(str(x))) for name, x in config.items() if not isinstance(x, (Mapping, list))]
    sites = {name.rpartition("/")[2] for name in record["metrics"]}
    dead = sum(row["dead"] for row in rows)
    return template("train.html.j2").render(
        rows=rows[:_ROWS], more=max(0, len(rows) - _ROWS), every=len(rows), sites=len(sites), variants=variants,
        settings=settings, figures=figures, model=clean(record["model"]), seconds=record["seconds"], real=_real,
        share=_share, target="write" if config.get("target") == "write" else "state",
        steps=config["steps"] if is_integer(config.get("steps")) else None, dead=dead,
        atoms=dead + sum(row["alive"] for row in rows), means={
            name: sum(row[name] for row in rows) / len(rows) for name in ("fvu", "l0", "beats_deletion", "cosine")
        },
        style=Markup(STYLE), style_digest=base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode(),
    )  # fmt: skip


def _real(x: float | None, digits: int = 3) -> str:
    """A number, or that there is none: of a run that diverged."""
    return "–" if x is None else f"{x:.{digits}f}".replace("-", "−") if math.isfinite(x) else "diverged"


def _share(x: float) -> str:
    return f"{100 * x:.1f}\u202f%" if math.isfinite(x) else "diverged"
