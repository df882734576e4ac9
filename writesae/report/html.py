"""One self-contained page for a replacement test: figures inlined, no script, nothing fetched."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from . import plots
from .load import load_run
from .style import STYLE

TOP_ATOMS, CONTEXTS = 12, 4
_MAIN = ("atom", "delete", "random")


def build(source: str | Path | tuple[Mapping, Mapping], out: str | Path) -> Path:
    """Draws the figures and writes `report.html` into `out`.

    Args:
        source: the folder of a finished run, or (summary, firings) as `load_run` returns them.
        out: folder for `report.html` and `plots/*.png`.
    Returns:
        Path of the page.
    """
    summary, table = load_run(source) if isinstance(source, (str, Path)) else source
    out = Path(out)
    figures = draw(summary, table, out / "plots")
    page = out / "report.html"
    page.write_text(render(summary, table, figures), encoding="utf-8")
    return page


def draw(summary: Mapping, table: Mapping[str, np.ndarray], folder: Path) -> dict[str, Path]:
    """The figures that a run has data for, as {name: PNG file}."""
    head = summary["headline"]
    curves = {c: _curve(table, head, c) for c in summary["settings"]["conditions"] if c != "native"}
    kl = {name: curve[:, 1:].mean(1) for name, curve in curves.items()}
    won = kl["atom"] < kl["delete"]
    out = {"kl_scatter": plots.kl_scatter(kl["atom"], kl["delete"], folder / "kl_scatter.png")}
    if "random" in kl:
        path = folder / "ratio_densities.png"
        out["ratio_densities"] = plots.ratio_densities(kl["atom"], kl["delete"], kl["random"], path)
    out["horizon_curve"] = plots.horizon_curve(curves, folder / "horizon_curve.png")
    population = _headline_test(summary)["population"]
    if population["n"]:
        out["feature_win_rates"] = plots.feature_win_rates(
            population["win_rates"], population["firings"], folder / "feature_win_rates.png"
        )
    out["win_rate_by_cosine"] = plots.win_rate_by(
        table["cosine"], won, "cosine of atom and native write", folder / "win_rate_by_cosine.png"
    )
    path = folder / "activation_histogram.png"
    out["activation_histogram"] = plots.activation_histogram(table["activation"], path)
    return out


def _curve(table: Mapping[str, np.ndarray], head: Mapping, condition: str) -> np.ndarray:
    middle = "" if condition == "delete" else f"{head['scale']}."
    return table[f"{head['direction']}:{head['native']}.{middle}{condition}"]


def _headline_test(summary: Mapping) -> Mapping:
    head = summary["headline"]
    return summary["tests"][f"{head['native']}/{head['scale']}"][head["horizon"]][head["direction"]]


# ---- numbers --------------------------------------------------------------------------------------------------


def percent(x: float | None, digits: int = 1) -> str:
    return "–" if x is None else f"{100 * x:.{digits}f}&#8239;%"


def interval(pair: Sequence[float] | None) -> str:
    return "–" if pair is None else f"{100 * pair[0]:.1f}–{100 * pair[1]:.1f}"


def number(x: float | None) -> str:
    """Three significant digits, scientific below a thousandth."""
    if x is None:
        return "–"
    if x == 0:
        return "0"
    if 1e-3 <= abs(x) < 1e5:
        return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"
    mantissa, exponent = f"{x:.2e}".split("e")
    return f"{mantissa}&#8239;×&#8239;10<sup>{int(exponent)}</sup>".replace("<sup>-", "<sup>−")


# ---- page -----------------------------------------------------------------------------------------------------


def render(summary: Mapping, table: Mapping[str, np.ndarray], figures: Mapping[str, Path]) -> str:
    """The page as text."""
    model = escape(str(summary.get("model", "a language model")))
    sites = ", ".join(f"layer {s.split(':')[0]}, head {s.split(':')[1]}" for s in summary["settings"]["sites"])
    body = [
        f'<header><p class="kicker">Replacement test</p><h1>Can an atom stand in for what the model writes?</h1>'
        f'<p class="sub">{model} · {sites} · {summary["n"]:,} firings of {summary["features"]:,} features in '
        f"{summary['documents']:,} documents</p></header>",
        _question(summary), _key_figures(summary), _verdict(summary), _figures(summary, figures), _tables(summary),
        _atoms(table, summary), _method(summary), _versions(summary),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Replacement test: {model}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _question(summary: Mapping) -> str:
    return (
        '<p class="lead">At a token where a dictionary atom fires, we take the model’s own write out of its recurrent '
        "state and put the atom in its place. If the atom captures what the write means to the model, the predictions "
        "that follow should move less than when the write is simply deleted, and deletion less than a random write.</p>"
    )


def _key_figures(summary: Mapping) -> str:
    medians = {c: x for c, x in summary["kl_median"].items() if c in _MAIN}
    test = _headline_test(summary)
    cards = [
        (percent(summary["win_rate"]), "atom closer than deletion",
         f"95&#8239;%: {interval(summary['win_rate_ci95'])} · by feature "
         f"{interval(summary['win_rate_ci95_by_feature'])}"),
    ]  # fmt: skip
    if summary["strict_chain"] is not None:
        cards.append(
            (percent(summary["strict_chain"]), "atom &lt; deletion &lt; random",
             f"95&#8239;%: {interval(summary['strict_chain_ci95'])} · chance 16.7")
        )  # fmt: skip
    population = test["population"]
    if population["n"]:
        note = f"95&#8239;%: {interval(population['ci95'])} · {population['n']} features"
        cards.append((percent(population["rate"]), "features that mostly win", note))
    order = " / ".join(plots.NAMES[c].split()[0] for c in medians)
    cards.append((" / ".join(number(1e3 * x) for x in medians.values()), f"median KL, 10<sup>−3</sup> "
                                                                         f"nats<br>{order}", ""))
    if summary["native_kl_max"] is not None:
        cards.append((number(summary["native_kl_max"]), "largest KL with the write put back", "must be exactly 0"))
    return '<section class="cards">' + "".join(
        f'<div class="card"><div class="value{" long" if len(value) > 12 else ""}">{value}</div>'
        f'<div class="label">{label}</div><div class="note">{note}</div></div>'
        for value, label, note in cards
    ) + "</section>"  # fmt: skip


def _verdict(summary: Mapping) -> str:
    test = _headline_test(summary)
    low, high = (
        min(summary["win_rate_ci95_by_feature"][0], summary["win_rate_ci95_by_passage"][0]),
        max(summary["win_rate_ci95_by_feature"][1], summary["win_rate_ci95_by_passage"][1]),
    )
    if low > 0.5:
        says = "The atom disturbs the model less than deletion does, more often than chance"
    elif high < 0.5:
        says = "The atom disturbs the model <em>more</em> than deletion does, more often than chance"
    else:
        says = "Atom and deletion cannot be told apart here: the interval over features or passages includes one half"
    wilcoxon = test["wilcoxon"]
    p = "p &lt; 10<sup>−300</sup>" if wilcoxon["p"] == 0 else f"p = {number(wilcoxon['p'])}"
    wins = test["win_rate"]
    return (
        f"<p>{says}. Of {wins['n']:,} firings the atom was closer in {wins['wins']:,}, deletion in {wins['losses']:,}, "
        f"with {wins['ties']:,} ties (paired effect {wins['paired_effect']:+.3f}; Wilcoxon signed-rank {p}). "
        f"The typical atom has cosine {summary['cosine_median']:.2f} with the write it replaces.</p>"
    )


_CAPTIONS = {
    "kl_scatter": ("Atom against deletion, firing by firing", "Each point is one firing. Below the dashed line "
                                                              "the atom "
                   "in the write’s place moves the next-token predictions less than leaving the write out."),
    "ratio_densities": ("How much closer?", "Distribution over firings of the ratio of two KLs; left of 1× the "
                                            "first is "
                        "smaller. Short vertical lines are medians."),
    "horizon_curve": ("How long does it last?", "Median KL by number of tokens after the edit; bands hold the "
                                                "middle half "
                      "of the firings."),
    "feature_win_rates": ("Is it a few features or most?", "Every feature with at least five firings, by the "
                                                           "share of its "
                          "own firings that it wins against deletion (at most 30 used each)."),
    "win_rate_by_cosine": ("Where does it work?", "Win rate in equal-count groups of firings by how well the atom is "
                           "aligned with the write that it replaces; bars are 95&#8239;% intervals."),
    "activation_histogram": ("What fired", "Activations of the firings tested."),
}  # fmt: skip


def _figures(summary: Mapping, figures: Mapping[str, Path]) -> str:
    blocks = []
    for i, (name, path) in enumerate(figures.items(), 1):
        title, caption = _CAPTIONS[name]
        stop = "" if title.endswith("?") else "."
        data = base64.b64encode(Path(path).read_bytes()).decode()
        blocks.append(
            f'<figure class="{name}"><img alt="{title}" src="data:image/png;base64,{data}">'
            f"<figcaption><b>Figure {i}. {title}{stop}</b> {caption}</figcaption></figure>"
        )
    return f'<section class="figures">{"".join(blocks)}</section>'


_NATIVE = {
    "increment": "the increment (what the token actually added)", "outer": "the outer product (erase left in place)"
}  # fmt: skip
_SCALE = {"coef": "the atom at its own coefficient", "matched": "the atom at the write’s norm"}
_METRIC = {"h0": "at the token", "h1": "next token", "mean": "mean of the tokens after"}


def _tables(summary: Mapping) -> str:
    out = ["<section><h2>Every reading of the test</h2>"]
    rows = []
    head = summary["headline"]
    for variant, metrics in summary["tests"].items():
        native, scale = variant.split("/")
        rows.append(f'<tr class="group"><th colspan="8">Write = {_NATIVE[native]}; {_SCALE[scale]}</th></tr>')
        for metric, directions in metrics.items():
            for direction, test in directions.items():
                here = (native, scale, metric, direction) == tuple(
                    head[x] for x in ("native", "scale", "horizon", "direction")
                )
                chain, people = test.get("strict_chain"), test["population"]
                medians = " / ".join(number(1e3 * test["kl"][c]["median"]) for c in _MAIN if c in test["kl"])
                label = f"{_METRIC[metric]}{', reversed' if direction == 'reverse' else ''}"
                rows.append(
                    f'<tr{" class=here" if here else ""}><th>{label}</th>'
                    f"<td>{percent(test['win_rate']['rate'])}</td><td>{interval(test['win_rate']['ci95'])}</td>"
                    f"<td>{interval(test['win_rate_by_feature']['ci95'])}</td>"
                    f"<td>{interval(test['win_rate_by_passage']['ci95'])}</td>"
                    f"<td>{percent(chain['rate']) if chain else '–'}</td><td>{percent(people['rate'])}</td>"
                    f"<td>{medians}</td></tr>"
                )
    conditions = " / ".join(plots.NAMES[c].split()[0] for c in _MAIN if c in summary["kl_median"])
    out.append(
        '<div class="scroll"><table><thead><tr><th>KL</th><th>win rate</th><th>Wilson 95&#8239;%</th>'
        "<th>by feature</th><th>by passage</th><th>chain</th><th>features</th>"
        f"<th>median KL, 10<sup>−3</sup><br>{conditions}</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="small">The highlighted row is the headline, fixed in advance. Intervals in per cent; “by '
        'feature” and '
        "“by passage” resample whole clusters. “Chain” is atom &lt; deletion &lt; random, strictly; “features” "
        "the share "
        "of features that win most of their firings. Reversed is KL(patched‖baseline). "
        f"n = {summary['n']:,} firings in every row.</p>"
    )
    against = _headline_test(summary)["atom_against"]
    if against:
        medians = summary["kl_median"]
        rows = "".join(
            f"<tr><th>{plots.NAMES[c]}</th><td>{percent(x['rate'])}</td><td>{interval(x['ci95'])}</td>"
            f"<td>{x['ties']}</td><td>{number(1e3 * medians[c])}</td></tr>"
            for c, x in against.items()
        )
        out.append(
            "<h3>The atom against other things one could write</h3><table class=narrow><thead><tr><th>instead "
            "of the atom"
            "</th><th>atom closer</th><th>Wilson 95&#8239;%</th><th>ties</th><th>its median KL, "
            "10<sup>−3</sup></th></tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )
    for layer, record in summary["heads"].items():
        if record["n"] > 1:
            rates = record["heads"].items()
            cells = "".join(f"<tr><th>head {h}</th><td>{percent(rate)}</td></tr>" for h, rate in rates)
            out.append(
                f"<h3>Heads of layer {layer}: {percent(record['mean'])} ± {100 * record['sd']:.1f}</h3>"
                f"<table class=narrow><thead><tr><th>head</th><th>win "
                f"rate</th></tr></thead><tbody>{cells}</tbody></table>"
            )
    return "".join(out) + "</section>"


def _atoms(table: Mapping[str, np.ndarray], summary: Mapping) -> str:
    """The features with most firings tested, each with its strongest contexts from different passages."""
    head = summary["headline"]
    kl = {c: _curve(table, head, c)[:, 1:].mean(1) for c in ("atom", "delete")}
    site = np.stack([table["layer"], table["head"], table["feature"]], 1)
    unique, of, counts = np.unique(site, axis=0, return_inverse=True, return_counts=True)
    of = of.reshape(-1)
    blocks = []
    for u in np.argsort(-counts, kind="stable")[:TOP_ATOMS]:
        mine = np.flatnonzero(of == u)
        layer, at, feature = unique[u]
        won = float((kl["atom"][mine] < kl["delete"][mine]).mean())
        shown, seen = [], set()
        for i in mine[np.argsort(-table["activation"][mine], kind="stable")]:
            if table["passage"][i] not in seen:
                seen.add(table["passage"][i])
                shown.append(_context(table, i))
            if len(shown) == CONTEXTS:
                break
        blocks.append(
            f'<div class="atom"><h3>Atom {feature}<span> layer {layer}, head {at} · {len(mine)} firings · wins '
            f"{percent(won, 0)} · median cosine "
            f"{np.median(table['cosine'][mine]):.2f}</span></h3>{''.join(shown)}</div>"
        )
    return (
        "<section><h2>The atoms most often tested</h2><p>Each line is the text around one firing, strongest first; the "
        "marked token is where the atom fired and the write was replaced. ⏎ is a line break.</p>"
        f'<div class="atoms">{"".join(blocks)}</div></section>'
    )


def _context(table: Mapping[str, np.ndarray], i: int) -> str:
    tokens, at = list(table["context"][i]), int(table["context_at"][i])
    # A few tokens before and after say what fired; more would push it out of sight.
    before, after = "".join(tokens[max(at - 14, 0) : at]), "".join(tokens[at + 1 : at + 7])
    return (
        f'<div class="context"><span class="act">{table["activation"][i]:.2f}</span><code>{_shown(before)}'
        f"<mark>{_shown(tokens[at])}</mark>{_shown(after)}</code>"
        f'<span class="doc">{escape(str(table["document"][i]))}</span></div>'
    )


def _shown(text: str) -> str:
    text = re.sub(" {3,}", "  ", text)  # indentation says nothing here and pushes words out of sight
    return escape(text).replace("\r", "").replace("\n", '<span class="nl">⏎</span>').replace("\t", "→")


def _method(summary: Mapping) -> str:
    settings = summary["settings"]
    selection = settings["selection"]
    chosen = (
        f"Features were chosen on other text ({selection['tokens']:,} tokens): those with the largest code at "
        f"{selection['min_selected']} tokens or more. " if selection else "All features that fired were tested. "
    )  # fmt: skip
    sites = "".join(
        f"<li>Layer {name.split(':')[0]}, head {name.split(':')[1]}: {escape(str(record.get('kind')))}, "
        f"{record.get('F'):,} atoms, {record.get('k')} active, state {record.get('K')}×{record.get('V')}"
        + (f", FVU {record['metrics']['fvu']:.3f}" if isinstance(record.get("metrics", {}).get("fvu"), float) else "")
        + "</li>"
        for name, record in settings["sites"].items()
    )
    return (
        "<section><h2>How it was done</h2>"
        f"<ul>{sites}</ul>"
        "<p>At a firing at token t the state after the write, S<sub>t</sub>, becomes S<sub>t</sub> − N + R, "
        "where N is the "
        "write and R what replaces it: the atom with its code, nothing, or a random rank-1 matrix of the atom’s "
        "size. The "
        f"text then continues unchanged for {settings['horizon']} tokens and the next-token distributions are "
        f"compared with "
        "those of the unpatched model: KL(baseline‖patched), averaged over the tokens after the edit. The test follows "
        "every edit exactly; only the layers above it are run again.</p>"
        f"<p>{chosen}At each token only the feature with the largest code is considered, a few tokens are drawn "
        f"from every "
        "passage, and a passage’s last tokens are left out so that every firing is followed to the end "
        f"({summary['tokens']:,} tokens read). A win is strict; ties count for neither side. Wilson intervals "
        f"treat firings "
        f"as independent; the cluster bootstrap ({settings['resamples']:,} resamples) does not. Seed "
        f"{settings['seed']}.</p>"
        "<p>The test was introduced in J. Young, <cite>WriteSAE: Sparse Autoencoders for Recurrent State</cite>, "
        "arXiv 2605.12770.</p></section>"
    )


def _versions(summary: Mapping) -> str:
    made = " · ".join(f"{escape(name)} {escape(str(version))}" for name, version in summary["versions"].items())
    speed = summary.get("firings_per_second")
    took = f" · {summary['seconds']:.0f} s, {speed:.0f} firings a second" if speed else ""
    return f"<footer>{made}{took}</footer>"
