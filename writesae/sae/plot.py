"""The curves of a training run as one SVG file, drawn here: it follows the reader's light or dark theme by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from ..files import write_text
from .watch import LOOKS

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP_X, _GAP_Y = 380, 190, 62, 64, 78, 74
# Colours that can be told apart with any colour vision, of light and of dark paper; a fifth curve starts again.
_STYLE = """
text{font:12px sans-serif;fill:#444}.title{font-weight:600;fill:#222}.paper{fill:#fff}.axis{stroke:#8a8a8a}
.grid{stroke:#e9e9e9}polyline[class]{fill:none;stroke-width:1.6}
.c0{stroke:#0072B2;fill:#0072B2}.c1{stroke:#D55E00;fill:#D55E00}
.c2{stroke:#009E73;fill:#009E73}.c3{stroke:#CC79A7;fill:#CC79A7}.c4{stroke:#8C6BB1;fill:#8C6BB1}
.one{opacity:.3}
@media(prefers-color-scheme:dark){text{fill:#cfd4da}.title{fill:#e3e7ec}.paper{fill:#14171b}.axis{stroke:#6b7480}
.grid{stroke:#2a3038}.c0{stroke:#4BA9E2;fill:#4BA9E2}.c1{stroke:#F08A4B;fill:#F08A4B}.c2{stroke:#33C699;fill:#33C699}
.c3{stroke:#DE9FC3;fill:#DE9FC3}.c4{stroke:#B79BDD;fill:#B79BDD}}
"""
_MOST_ALONE = 24  # beside the means, so many sites' own curves are shown


def draw(path: Path, history: Sequence[Mapping]) -> bool:
    """Writes the looks at held-out passages of a `Trainer.history`: a panel for each of `LOOKS`, the mean over sites of
    each variant, and faint curves of the sites where they are few. Returns whether there was anything to show."""
    looks = [record for record in history if "held_out_fvu" in record]
    if not looks:
        return False
    variants = list(dict.fromkeys(name.rpartition("/")[0] for name in looks[-1]["held_out_fvu"]))
    parts = []
    for i, (what, title) in enumerate(LOOKS.items()):
        parts += _panel(looks, what, title, variants, _LEFT + i % 2 * (_WIDTH + _GAP_X),
                        _TOP + i // 2 * (_HEIGHT + _GAP_Y))  # fmt: skip
    width, height = _LEFT + 2 * _WIDTH + _GAP_X + 24, _TOP + 2 * _HEIGHT + _GAP_Y + 46
    at = _LEFT
    for i, name in enumerate(variants if len(variants) > 1 else ()):
        parts.append(f'<rect class="c{i % 5}" x="{at}" y="14" width="14" height="3"/>'
                     f'<text x="{at + 19}" y="20">{escape(name)}</text>')  # fmt: skip
        at += 40 + 7 * len(name)
    write_text(path, f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(width, at)} {height}" role="img">\n'
               f'<title>Training</title><style>{_STYLE}</style><rect class="paper" width="100%" height="100%"/>\n'
               + "\n".join(parts) + "\n</svg>\n")  # fmt: skip
    return True


def _panel(looks, what: str, title: str, variants: list[str], x0: float, y0: float) -> list[str]:
    curves: list[tuple[str, list[tuple[float, float]]]] = []
    for i, variant in enumerate(variants):
        whose = [name for name in looks[-1][what] if name.rpartition("/")[0] == variant]
        every = [[(r["step"], r[what][name]) for r in looks if name in r[what]] for name in whose]
        if 1 < len(looks[-1][what]) <= _MOST_ALONE and len(whose) > 1:
            curves += [(f"c{i % 5} one", points) for points in every]
        means = [(r["step"], sum(r[what][n] for n in whose) / len(whose)) for r in looks if set(whose) <= set(r[what])]
        curves.append((f"c{i % 5}", means))
    curves = [(kind, [(x, y) for x, y in points if math.isfinite(y)]) for kind, points in curves]
    xs = [x for _, points in curves for x, _ in points] or [0]
    ys = [y for _, points in curves for _, y in points] or [0]
    across, up = _ticks(0, max(xs)), _ticks(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        return (x0 + _WIDTH * x / across[-1], y0 + _HEIGHT * (1 - (y - up[0]) / (up[-1] - up[0])))

    found = [f'<text class="title" x="{x0}" y="{y0 - 12}">{escape(title)}</text>']
    for value in up:
        y = place(0, value)[1]
        found.append(f'<line class="grid" x1="{x0}" x2="{x0 + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{x0 - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')  # fmt: skip
    base = y0 + _HEIGHT
    found.append(f'<line class="axis" x1="{x0}" x2="{x0 + _WIDTH}" y1="{base}" y2="{base}"/>')
    for value in across:
        x = place(value, up[0])[0]
        found.append(f'<text x="{x:.1f}" y="{base + 17}" text-anchor="middle">{value:,.0f}</text>')
    found.append(f'<text x="{x0 + _WIDTH}" y="{base + 33}" text-anchor="end">steps</text>')
    for kind, points in curves:
        if len(points) == 1:
            x, y = place(*points[0])
            found.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>')
        elif points:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
            found.append(f'<polyline class="{kind}" points="{line}"/>')
    return found


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, at least two, that enclose low and high."""
    if not high > low:
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 2, low + abs(low) / 2)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(x * power for x in (1, 2, 5, 10) if x * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]
