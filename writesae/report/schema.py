"""What a run's summary and table must be before anything of them is drawn: numbers are numbers, names are known ones.

A run's folder may come from a stranger, so every value that a page shows is listed here with its type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from ..untrusted import is_integer, is_number, shown

READS = {"after": "changed after the token has read it", "before": "changed before the token reads it"}
NATIVES = {
    "increment": "the increment (what the token actually added)", "outer": "the outer product (erase left in place)"
}  # fmt: skip
SCALES = {"coef": "the atom at its own coefficient", "matched": "the atom at the write’s norm"}
METRICS = {"h0": "at the token", "h1": "next token", "mean": "mean of the tokens after"}
DIRECTIONS = ("forward", "reverse")
CONDITIONS = {
    "atom": "atom", "delete": "deletion", "random": "random rank-1", "native": "native write", "mean": "mean write",
    "other_atom": "another, silent atom", "own_key": "own key, random value",
    "codebook": "codebook of native writes", "codebook_nearest": "nearest write of the codebook",
    "singular": "top singular pair of Sₜ", "singular_before": "top singular pair of Sₜ₋₁",
    "scaled": "the write at the atom’s size", "previous": "previous write", "nearest": "nearest atom",
    "least_squares": "least squares over active atoms", "reconstruction": "whole reconstruction",
    "codebook_reconstruction": "as many native writes as atoms", "zero": "whole state emptied",
}  # fmt: skip
WHOLE = ("reconstruction", "codebook_reconstruction", "zero")  # they change the whole state, whatever the write
PLAIN = ("native", "delete", *WHOLE)  # they have no size
EFFECTS = ("negligible", "small", "medium", "large")
RULES = ("all heads", "longest memory", "given")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")  # a user's own condition, too

Check = Callable[[object, str], None]


def _is(test: Callable[[object], bool], what: str) -> Check:
    def check(value, where):
        if not test(value):
            raise ValueError(f"run: {where}: expected {what}, got {shown(value)}")

    return check


def _one_of(*names: str) -> Check:
    return _is(lambda x: isinstance(x, str) and x in names, f"one of {', '.join(names)}")


def _site(name: object) -> bool:
    layer, _, head = str(name).partition(":")
    return all(x.isascii() and x.isdigit() and len(x) < 7 for x in (layer, head))


NUMBER, COUNT = _is(is_number, "a finite number"), _is(is_integer, "an integer >= 0")
INTEGER = _is(lambda x: is_integer(x, -(2**62)), "an integer")
RATE = _is(lambda x: is_number(x) and 0 <= x <= 1, "a share between 0 and 1")
_ANY = _is(lambda x: True, "anything")
TEXT = _is(lambda x: isinstance(x, str), "text")
SITE = _is(_site, "LAYER:HEAD")


def _or_none(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def _list(check: Check, length: int | None = None) -> Check:
    def each(value, where):
        if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
            raise ValueError(f"run: {where}: expected a list{f' of {length}' if length else ''}, got {shown(value)}")
        for i, x in enumerate(value):
            check(x, f"{where}[{i}]")

    return each


def _mapping(key: Check, check: Check) -> Check:
    def each(value, where):
        if not isinstance(value, Mapping):
            raise ValueError(f"run: {where}: expected an object, got {shown(value)}")
        for name, x in value.items():
            key(name, f"{where}: a key")
            check(x, f"{where}.{name}"[:200])

    return each


def _fields(needed: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with these entries at least; what a page does not show may be anything."""

    def each(value, where):
        if not isinstance(value, Mapping):
            raise ValueError(f"run: {where}: expected an object, got {shown(value)}")
        for name, check in needed.items():
            if name not in value:
                raise ValueError(f"run: {where}: expected an entry {name}, got none")
            check(value[name], f"{where}.{name}")
        for name, check in (optional or {}).items():
            if name in value:
                check(value[name], f"{where}.{name}")

    return each


def _both(*checks: Check) -> Check:
    def each(value, where):
        for check in checks:
            check(value, where)

    return each


def _a_median_each(value, where) -> None:
    for name in value["atom_against"]:
        if name not in value["kl"]:
            raise ValueError(f"run: {where}.kl: expected medians of all that the atom is tested against, not of {name}")


def _a_rate_each(value, where) -> None:
    if value["n"] and len(value.get("win_rates", ())) != value["n"]:
        raise ValueError(f"run: {where}: expected win_rates of {value['n']} features, got other or none")


_PAIR = _list(NUMBER, 2)
_CONDITION = _is(lambda x: isinstance(x, str) and _NAME.fullmatch(x) is not None, "the name of a condition")
_EFFECT = _fields({"delta": NUMBER, "word": _one_of(*EFFECTS)})
_SHARE = _fields({"rate": RATE, "ci95": _PAIR, "ties": COUNT})
_TEST = _both(_fields(
    {
        "win_rate": _fields({
            "n": COUNT, "wins": COUNT, "losses": COUNT, "ties": COUNT, "rate": RATE, "ci95": _PAIR,
            "paired_effect": NUMBER,
        }),
        "win_rate_by_feature": _fields({"ci95": _PAIR}), "win_rate_by_passage": _fields({"ci95": _PAIR}),
        "wilcoxon": _fields({"p": RATE}), "cliffs_delta": _EFFECT,
        "by_quartile": _list(_fields({
            "n": COUNT, "rate": RATE, "ci95": _PAIR, "losses": COUNT, "ties": COUNT, "from": NUMBER, "to": NUMBER,
        })),
        "population": _both(
            _fields(
                {
                    "n": COUNT, "rate": _or_none(RATE), "ci95": _or_none(_PAIR), "firings": COUNT,
                    "mean": _or_none(RATE), "mean_ci95": _or_none(_PAIR),
                },
                {"win_rates": _list(RATE)},
            ),
            _a_rate_each,
        ),
        "kl": _both(_mapping(_CONDITION, _fields({"median": NUMBER})), _fields({"atom": _ANY, "delete": _ANY})),
        "atom_against": _mapping(_CONDITION, _both(_SHARE, _fields({
            "n": COUNT, "wins": COUNT, "losses": COUNT, "by_feature": _PAIR, "by_passage": _PAIR,
            "cliffs_delta": _EFFECT,
        }))),
    },
    {"strict_chain": _fields({"rate": RATE})},
), _a_median_each)  # fmt: skip
# What the demo's first page says of its others.
_WRITES = _fields({
    "n": COUNT, "heads": COUNT, "k": COUNT, "atom_vs_codebook": RATE, "atom_vs_codebook_ci95": _PAIR, "win_rate": RATE,
    "win_rate_ci95": _PAIR, "all_atoms": RATE, "all_atoms_ci95": _PAIR,
})  # fmt: skip
_CLOSED_LOOP = _fields({
    "read": _one_of(*READS), "heads": COUNT, "plain": NUMBER, "deleted": NUMBER,
    "arms": _list(_fields({
        "condition": _one_of("coded", "codebook"), "k": COUNT, "share": _or_none(NUMBER), "ci95": _or_none(_PAIR),
    })),
})  # fmt: skip
_ROW = _fields({
    "read": _one_of(*READS), "scale": _or_none(_one_of(*SCALES)), "condition": _CONDITION, "n": COUNT,
    "kl_median": NUMBER, "of_zero": _or_none(NUMBER), "beats_delete": _or_none(_SHARE), "upper": _or_none(_SHARE),
    "atom_beats": _or_none(_SHARE),
})  # fmt: skip
_TOKENS = _list(_is(lambda x: isinstance(x, (list, tuple)) and len(x) == 2 and isinstance(x[0], str)
                    and is_number(x[1]), "a text and a number"))  # fmt: skip
_ABOUT = _fields({
    "promoted": _or_none(_TOKENS), "answers_to": _TOKENS,
    "neighbours": _list(_is(lambda x: isinstance(x, (list, tuple)) and len(x) == 2 and is_integer(x[0])
                            and is_number(x[1]), "a feature and a number")),
})  # fmt: skip
_SUMMARY = _fields(
    {
        "n": _is(lambda x: is_integer(x, 1), "an integer >= 1"),
        "features": COUNT, "documents": COUNT, "tokens": COUNT, "seconds": NUMBER,
        "firings_per_second": _or_none(NUMBER),
        "headline": _fields({
            "read": _one_of(*READS), "native": _one_of(*NATIVES), "scale": _one_of(*SCALES),
            "horizon": _one_of(*METRICS), "direction": _one_of(*DIRECTIONS),
        }),
        "win_rate": RATE, "win_rate_ci95": _PAIR, "win_rate_ci95_by_feature": _PAIR, "win_rate_ci95_by_passage": _PAIR,
        "strict_chain": _or_none(RATE), "strict_chain_ci95": _or_none(_PAIR),
        "atom_vs_codebook": _or_none(RATE), "atom_vs_codebook_ci95": _or_none(_PAIR),
        "norm_median": _fields({"native_norm": NUMBER, "atom_size": NUMBER}),
        "table": _list(_both(_ROW, _fields({"site": SITE}))), "pooled": _list(_ROW),
        "paper": _fields({
            "win_rate": RATE, "n": COUNT, "atoms": COUNT, "strict_chain": RATE, "population": RATE,
            "population_n": COUNT,
        }),
        "kl_median": _both(_mapping(_CONDITION, NUMBER), _fields({"atom": _ANY, "delete": _ANY})),
        "native_kl_max": _or_none(NUMBER), "cosine_median": NUMBER,
        "heads": _mapping(TEXT, _fields({
            "n": COUNT, "mean": RATE, "sd": _or_none(NUMBER), "heads": _mapping(TEXT, RATE),
        })),
        "tests": _mapping(
            _one_of(*(f"{read}/{native}/{scale}" for read in READS for native in NATIVES for scale in SCALES)),
            _mapping(_one_of(*METRICS), _mapping(_one_of(*DIRECTIONS), _TEST)),
        ),
        "settings": _fields({
            "horizon": COUNT, "conditions": _list(_CONDITION), "seed": INTEGER, "resamples": COUNT,
            "reads": _list(_one_of(*READS)), "scales": _list(_one_of(*SCALES)), "rule": _one_of(*RULES),
            "selection": _or_none(_fields({"tokens": COUNT, "min_selected": COUNT})),
            "sites": _mapping(SITE, _fields(
                {"kind": TEXT, "F": COUNT, "k": COUNT, "K": COUNT, "V": COUNT},
                {
                    "metrics": _or_none(_fields({}, {"fvu": _or_none(NUMBER)})), "chosen_of": _or_none(COUNT),
                    "target": _one_of("state", "write"), "write": _one_of("new", "whole"),
                },
            )),
        }),
        "versions": _mapping(TEXT, TEXT),
    },
    {
        "model": TEXT, "writes": _WRITES, "closed_loop": _CLOSED_LOOP, "atoms": _mapping(SITE, _mapping(TEXT, _ABOUT)),
        "sites": _mapping(SITE, _fields({
            "n": COUNT, "features": COUNT, "rate": RATE, "ci95": _PAIR, "ties": COUNT,
            "kl_median": _both(_mapping(_CONDITION, NUMBER), _fields({"atom": _ANY, "delete": _ANY})),
        })),
    },
)  # fmt: skip


def check_run(summary: Mapping, table: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError, naming the entry or column, for a summary or table of other types than a run's."""
    _SUMMARY(summary, "summary.json")
    head, settings = summary["headline"], summary["settings"]
    try:
        for scale in (head["scale"], *settings["scales"]):
            headline(summary, scale)
    except KeyError as error:
        raise ValueError(f"run: summary.json.tests: expected the headline's, got none for {error}") from error
    n = summary["n"]
    for name in ("layer", "head", "feature", "passage", "context_at"):
        _column(table, name, n, "iu")
    for name in ("activation", "cosine"):
        _column(table, name, n, "iuf")
    for name in ("atom", "delete"):
        if name not in settings["conditions"]:
            raise ValueError(f"run: summary.json.settings.conditions: expected {name} among them, got none")
    for condition in curves(summary):
        _column(table, curve(head, condition), n, "iuf", settings["horizon"] + 1)
    if settings["horizon"] < 1:
        raise ValueError(f"run: summary.json.settings.horizon: expected at least 1, got {settings['horizon']}")
    for name, good, what in (
        ("document", lambda x: isinstance(x, str), "text"),
        ("context", lambda x: isinstance(x, (list, tuple)) and all(isinstance(y, str) for y in x), "lists of text"),
    ):
        if name not in table or len(table[name]) != n or not all(map(good, table[name])):
            raise ValueError(f"run: firings.parquet: {name}: expected {n} entries of {what}")
    at = table["context_at"]
    if any(not 0 <= int(i) < len(tokens) for i, tokens in zip(at, table["context"], strict=True)):
        raise ValueError("run: firings.parquet: context_at: expected positions inside their context")


def headline(summary: Mapping, scale: str | None = None) -> Mapping:
    """The statistics of the headline's reading, at its own or another scale."""
    head = summary["headline"]
    variant = f"{head['read']}/{head['native']}/{scale or head['scale']}"
    return summary["tests"][variant][head["horizon"]][head["direction"]]


def curves(summary: Mapping) -> list[str]:
    """The conditions that the headline's reading has columns of."""
    matched = summary["headline"]["scale"] == "matched"
    left_out = {"native", "scaled"} if matched else {"native"}
    return [c for c in summary["settings"]["conditions"] if c not in left_out]


def curve(head: Mapping, condition: str) -> str:
    """The column of a condition's KLs, `[n, horizon + 1]`, in the headline's reading."""
    if condition in WHOLE:
        return f"{head['direction']}:{head['read']}.{condition}"
    middle = "" if condition in PLAIN else f"{head['scale']}."
    return f"{head['direction']}:{head['read']}.{head['native']}.{middle}{condition}"


def _column(table: Mapping[str, np.ndarray], name: str, n: int, kinds: str, width: int | None = None) -> None:
    shape = (n,) if width is None else (n, width)
    column = table.get(name)
    if column is None or column.shape != shape or column.dtype.kind not in kinds:
        got = "none" if column is None else f"shape {column.shape} of {column.dtype}"
        raise ValueError(f"run: firings.parquet: {name}: expected numbers of shape {shape}, got {got}")
    if column.dtype.kind == "f" and not np.isfinite(column).all():
        raise ValueError(f"run: firings.parquet: {name}: expected finite numbers, got a NaN or infinity")
