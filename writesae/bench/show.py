"""Tables and the picture, from records alone: what is printed, what stands in the README and what is drawn are one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..files import write_text

START, END = "<!-- bench: start -->", "<!-- bench: end -->"
_RATIOS = {"x faster": "× faster", "x time": "× the time", "x less": "× less"}
_WORDLESS = {**_RATIOS, "%": " %", "relative": ""}


def number(value: float) -> str:
    """Three digits, thousands set apart."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def measured(row: dict) -> str:
    if row["value"] is None:
        return "–"
    if row["unit"] == "x faster" and row["value"] < 1:
        return number(row["value"]) + "× as fast"
    unit = _WORDLESS.get(row["unit"], f" {row['unit']}")
    return number(row["value"]) + unit


def asked(row: dict) -> str:
    """The target and the aim, as in "≥ 3× (aim 5×)"."""
    if row["target"] is None:
        return ""
    sign = "≤" if row["less_is_better"] else "≥"
    unit = "×" if row["unit"] in _RATIOS else _WORDLESS.get(row["unit"], f" {row['unit']}")
    aim = f" (aim {number(row['aim'])}{unit})" if row.get("aim") is not None else ""
    return f"{sign} {number(row['target'])}{unit}{aim}"


def verdict(row: dict) -> str:
    if row["value"] is None:
        return "not measured"
    if row["met"] is None:
        return ""
    if not row["met"]:
        return "missed"
    aim = row.get("aim")
    if aim is not None and (row["value"] <= aim if row["less_is_better"] else row["value"] >= aim):
        return "aim met"
    return "met"


def rate(row: dict) -> str:
    if row.get("rate") is None:
        return ""
    share = f" ({row['share']:.0%} of {_CEILING[row['ceiling_of']]})" if row.get("share") is not None else ""
    return f"{number(row['rate'])} {row['rate_unit']}{share}"


_CEILING = {"float32": "fp32 products", "bfloat16": "bf16 products", "copy": "copying"}


def spread(row: dict) -> str:
    return "" if row.get("spread") is None or row["value"] is None else f"{row['spread']:.0%}"


def line(row: dict) -> str:
    """One row as a sentence, for the terminal while it runs."""
    if row["value"] is None:
        return f"{row['name']}: {row['note'] or 'not measured'}"
    text = f"{row['name']}: {measured(row)}"
    if row["peer"]:
        text += f" against {row['peer']}"
    details = [f"spread {spread(row)}" if spread(row) else "", rate(row)]
    if row["target"] is not None:
        details.append(f"asked {asked(row)}: {verdict(row).upper()}")
    details.append(row.get("note", ""))
    details = "; ".join(x for x in details if x)
    return f"{text}  [{details}]" if details else text


def ordered(records: Iterable[dict], names: Sequence[str]) -> list[dict]:
    """Records in the order of the registry, then the others by name."""
    place = {name: i for i, name in enumerate(names)}
    return sorted(records, key=lambda r: (place.get(r["case"], len(place)), r["case"]))


def by_machine(records: Sequence[dict]) -> list[list[dict]]:
    """Records of one machine together: figures of two machines never share a table."""
    groups: dict[tuple, list[dict]] = {}
    for found in records:
        machine = found["machine"]
        key = (machine.get("device"), machine.get("processor"), machine.get("cores"), machine.get("torch_threads"))
        groups.setdefault(key, []).append(found)
    return list(groups.values())


def caption(records: Sequence[dict]) -> str:
    """Machine, versions, dates and ceilings of a group."""
    machine = records[0]["machine"]
    parts = [f"{machine.get('device') or machine['processor']}, {machine['cores']} cores"]
    if machine.get("torch_threads") and not machine.get("device"):
        parts[0] += f", {machine['torch_threads']} threads, {machine.get('kernels') or 'no'} kernels"
    for name in ("torch", "transformers", "transformer-lens", "flash-linear-attention"):
        seen = sorted({r["versions"][name] for r in records if r["versions"].get(name)})
        if seen:
            parts.append(f"{name} {' and '.join(seen)}")
    dates = sorted({r["date"][:10] for r in records})
    parts.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
    text = "; ".join(parts) + "."
    seen: dict[str, list[float]] = {}
    for found in records:
        for name, ceiling in (found.get("ceilings") or {}).items():
            seen.setdefault(name, []).append(ceiling["value"])
    units = {name: "GB/s" if name == "copy" else "GFLOP/s" for name in seen}
    limits = [
        f"{_CEILING[name]} {number(min(x))} to {number(max(x))} {units[name]}" for name, x in sorted(seen.items())
    ]
    return text + (f" What the machine gave around these runs: {', '.join(limits)}." if limits else "")


def headline(row: dict) -> bool:
    """Whether the README shows it: asked for, a peer outrun, or a figure that is lacking."""
    return row["target"] is not None or row["unit"] == "x faster" or row["value"] is None


def table(records: Sequence[dict], all_rows: bool = True) -> str:
    """A Markdown table of one machine's records, columns aligned so that it reads in a terminal too.

    all_rows: also the rows that are no `headline`.
    """
    rows = [["figure", "against", "measured", "spread", "asked for", "", "rate and share of the ceiling, remarks"]]
    for found in records:
        for row in found["rows"]:
            if all_rows or headline(row):
                remarks = "; ".join(x for x in (rate(row), row.get("note", "")) if x)
                cells = [row["name"], row["peer"], measured(row), spread(row), asked(row), verdict(row), remarks]
                rows.append([cell.replace("|", "\\|") for cell in cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def report(records: Sequence[dict], all_rows: bool = True) -> str:
    """Every machine's table and caption."""
    return "\n\n".join(f"{table(group, all_rows)}\n\n{caption(group)}" for group in by_machine(records))


def readme(path: Path, records: Sequence[dict], picture_path: Path | None) -> None:
    """Replaces what stands between the two marker comments of a Markdown file by the table and the picture.

    Raises:
        ValueError: the markers are not both there once and in order, or a record is of a quick run.
    """
    quick = sorted(r["case"] for r in records if r.get("quick"))
    if quick:
        raise ValueError(f"readme: expected full measurements, got quick ones of {', '.join(quick)}")
    if not records:
        raise ValueError("readme: expected at least one record, got none")
    text = path.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"readme: expected {START} and then {END}, each once, in {path}")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    body = report(records, all_rows=False)
    if picture_path is not None:
        relative = Path(os.path.relpath(picture_path, path.parent)).as_posix()
        body += f"\n\n![Speed over each peer, on a logarithmic axis; a mark shows what was asked for]({relative})"
    write_text(path, f"{before}{START}\n{body}\n{END}{after}", argument="readme")


def _speed(row: dict, value: float) -> float:
    return value if row["unit"] == "x faster" else 1 / value


def picture(records: Sequence[dict], path: Path) -> Path | None:
    """Speed over the peer of every `headline` that is a ratio. None where there is none.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from ..report.plots import draw

    ratios = ("x faster", "x time")
    rows = [r for found in records for r in found["rows"] if r["unit"] in ratios and r["value"] and headline(r)]
    if not rows:
        return None

    def paint(axes, theme):
        from matplotlib.ticker import FuncFormatter, LogLocator

        at = list(range(len(rows), 0, -1))
        speeds = [_speed(row, row["value"]) for row in rows]
        colours = [{True: "#0072B2", False: "#D55E00", None: "#A9B2BC"}[row["met"]] for row in rows]
        axes.barh(at, [s - 1 for s in speeds], left=1, height=0.62, color=colours)
        axes.set_xscale("log")
        marked = speeds[:]
        for y, row, speed in zip(at, rows, speeds, strict=True):
            goals = [_speed(row, row[name]) for name in ("target", "aim") if row.get(name) is not None]
            for goal, width, style in zip(goals, (2, 1), ("-", (0, (1.5, 1))), strict=False):
                axes.plot([goal, goal], [y - 0.42, y + 0.42], color=theme["native"], linewidth=width, linestyle=style,
                          solid_capstyle="butt")  # fmt: skip
            right = float(max(1, speed))
            for goal in sorted(goals):  # beside the bar, unless a mark is in the way
                right = goal if right < goal < 1.7 * right else right
            axes.annotate(f"{number(speed)}×", (right, y), (5, 0), textcoords="offset points", va="center")
            marked += goals
        axes.axvline(1, color=theme["line"], linewidth=0.8)
        axes.set_xlim(min(0.8, *marked) / 1.15, max(1, *marked) * 2.2)
        axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
        axes.set_yticks(at, [f"{row['name']}\nagainst {row['peer']}" for row in rows], fontsize=7.5, linespacing=1.1)
        axes.set_ylim(0.4, len(rows) + 0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("times as fast as the peer (blue: target met; orange: missed; grey: none set)\n"
                        "thick mark: asked for; thin broken mark: aimed at")  # fmt: skip

    return draw(path, (10, 1.2 + 0.37 * len(rows)), paint)
