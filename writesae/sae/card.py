"""The card of a set of dictionaries: README.md of its repository, with the fields that the hub reads above it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from .. import __version__
from ..files import sha256
from ..untrusted import is_number
from .sae import SAE

CARD = "README.md"
# Heading, name among the metrics, format.
_COLUMNS = (
    ("FVU", "fvu", "{:.4f}"), ("L0", "l0", "{:.1f}"), ("atoms alive", "alive", "{:,}"),
    ("cosine to native writes", "cosine_median", "{:.3f}"), ("win rate", "win_rate", "{:.1%}"),
    ("held-out", "states", "{:,}"),
)  # fmt: skip


@cache
def _template():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(  # of Markdown: `_text` escapes what a table would take for its own
        loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return made.get_template("card.md.j2")


def card_of(
    repo: str,
    saes: Sequence[tuple[str, SAE]],
    weights: Mapping[str, Path],
    digests: Mapping[str, str],
    license: str,
    base_model: str,
    base_model_revision: str | None,
    datasets: Sequence[str],
) -> str:
    """The text of a card.

    Args:
        repo: owner/name.
        saes: (folder in the repository, dictionary), by configuration alone.
        weights: {folder: its weights' file}. digests: {what: sha256} that training was pinned to.
        license, base_model, base_model_revision, datasets: as of `push_to_hub`; base_model may be "default".
    """
    import yaml

    saes = sorted(saes, key=lambda x: (x[1].layer is None, x[1].layer, x[1].head or 0, x[0]))
    head: dict = {"license": license, "library_name": "writesae"}
    if base_model != "default":
        head["base_model"] = base_model
        if base_model_revision is not None:
            head["base_model_revision"] = base_model_revision
    if datasets:
        head["datasets"] = list(datasets)
    head["tags"] = ["sparse-autoencoder", "interpretability", "recurrent-state", "writesae"]
    sites = [None if None in (sae.layer, sae.head) else (sae.layer, sae.head) for _, sae in saes]
    columns = [c for c in _COLUMNS if any(is_number(sae.metrics.get(c[1])) for _, sae in saes)]
    rows = []
    for name, sae in saes:
        cells = [name or ".", f"{sae.target}s", sae.kind, f"{sae.F:,}", str(sae.k), f"{sae.K} x {sae.V}"]
        for _, key, form in columns:
            value = sae.metrics.get(key)
            cells.append(form.format(value) if is_number(value) else "")
        rows.append([_text(cell) for cell in cells])
    return _template().render(
        head=yaml.safe_dump(head, sort_keys=False, allow_unicode=True), repo=repo, rows=rows,
        columns=["dictionary", "of", "kind", "atoms", "active", "head", *(c[0] for c in columns)],
        base_model=base_model, base_model_revision=base_model_revision, digests=dict(digests),
        files={f"{name}/" if name else "": sha256(path) for name, path in weights.items()}, datasets=list(datasets),
        first=saes[0][0], site=(saes[0][1].layer or 0, saes[0][1].head or 0),
        a_set=None not in sites and len(set(sites)) == len(sites),
        training=_training(saes), version=__version__, license=license,
    )  # fmt: skip


def _training(saes: Sequence[tuple[str, SAE]]) -> dict[str, str]:
    """Settings and counts that all dictionaries share."""
    records = [sae.training_record for _, sae in saes]
    shared = {}
    for name, value in records[0].items():
        plain = isinstance(value, (str, bool)) or is_number(value)
        if plain and all(record.get(name) == value for record in records):
            shared[name] = _text(f"{value:g}" if isinstance(value, float) else str(value))
    return shared


def _text(text: str) -> str:
    """One line of a table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())[:200]
