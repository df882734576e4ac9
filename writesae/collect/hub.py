"""Stores in dataset repositories of the Hugging Face hub: put there with a card, and brought back.

A repository holds the store's files as they are, so that a downloaded one verifies, and README.md, the card, whose
`configs` name the tables for the hub's viewer and `datasets.load_dataset`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import __version__
from ..untrusted import shown
from .files import numbers
from .verify import CARD

if TYPE_CHECKING:
    from .store import Store

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_OWN = (".lock", ".finish", *CARD)  # in a store's folder and not of the store
_LOG = ("firings/*.parquet", "units/*/firings/*.parquet")
_TABLES = (
    "manifest.json", "summary.json", "plan.json", "documents.parquet", "features.parquet", "done/*.json",
    "index/*.parquet", "tokens/*.parquet", "tokenizer/*", "units/*/documents.parquet", "units/*/features.parquet",
    "units/*/tokens/*.parquet",
)  # fmt: skip
_SHOWN_SITES = 400  # rows of the card's table


def push(
    store: Store,
    repo: str,
    *,
    license: str,
    base_model: str | None = None,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    replace: bool = False,
) -> str:
    """See `Store.push_to_hub`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

    from ..sae.repository import is_repository, told

    if not isinstance(repo, str) or not is_repository(repo):
        raise ValueError(f"repo: expected owner/name, got {shown(repo)}")
    names, text = prepare(store, repo, license=license, base_model=base_model)
    api, branch = HfApi(), revision or "main"
    with told(repo, revision, sending=True):
        api.create_repo(repo, private=private, exist_ok=True, repo_type="dataset")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True, repo_type="dataset")
        try:
            info = api.dataset_info(repo, revision=branch)
        except errors.RevisionNotFoundError:
            info = None
    there = {x.rfilename for x in (info.siblings if info else None) or ()} - set(CARD)
    if there and not replace:
        raise ValueError(
            f"repo: {repo} holds {len(there)} other files ({', '.join(sorted(there)[:4])}): name another repository or "
            "revision, or say replace=True, which takes them away"
        )
    operations: list = [CommitOperationDelete(name) for name in sorted(there - set(names))]
    for name in names:  # of a store that lies elsewhere the tables are fetched
        path = store.path / name
        operations.append(CommitOperationAdd(name, str(path if path.exists() else store.file(name))))
    operations.append(CommitOperationAdd(CARD[0], text.encode()))
    with told(repo, revision, sending=True):
        done = api.create_commit(
            repo, operations, commit_message=message or f"Upload {store.summary()['firings']:,} firings",
            revision=branch, repo_type="dataset", parent_commit=None if info is None else info.sha,
        )  # fmt: skip
    return str(done.commit_url)


def fetch(repo: str, revision: str | None, firings: bool, progress: bool) -> Path:
    """The folder of a snapshot, see `Store.from_pretrained`."""
    from huggingface_hub import snapshot_download

    from ..sae.repository import NoBar, is_repository, told

    if not isinstance(repo, str) or not is_repository(repo):
        raise ValueError(f"repo: expected a folder, or a repository such as owner/name, got {shown(repo)}")
    with told(repo, revision):
        return Path(
            snapshot_download(
                repo, revision=revision, repo_type="dataset", allow_patterns=[*_TABLES, *(_LOG if firings else ())],
                tqdm_class=None if progress else NoBar,
            )
        )  # fmt: skip


def prepare(store: Store, repo: str, *, license: str, base_model: str | None = None) -> tuple[list[str], str]:
    """(names of the files, the card) that `push` uploads; nothing is sent.

    Raises:
        ValueError: an unfinished or unsound store, or a bad argument.
    """
    from ..sae.repository import is_repository

    if not isinstance(license, str) or not _LICENSE.fullmatch(license):
        raise ValueError(f"license: expected an identifier of the hub such as apache-2.0, got {shown(license)}")
    if base_model is not None and not is_repository(base_model):
        raise ValueError(f"base_model: expected a repository such as owner/name, got {shown(base_model)}")
    if store.where.remote:
        raise ValueError(f"path: expected a store in a folder, got {store}: copy it into one first")
    if not store.complete:
        raise ValueError(f"path: {store} is not finished: run its `writesae collect` again before it is uploaded")
    found = store.verify()
    if not found.sound:
        raise ValueError(f"path: {store} is not sound: {'; '.join(found.lines()[:3])}")
    names = [name for name in store.where.names() if name not in _OWN]
    return names, card_of(store, repo, license, base_model)


# ---- the card --------------------------------------------------------------------------------------------------------


def card_of(store: Store, repo: str, license: str, base_model: str | None = None) -> str:
    """The text of a card."""
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from ..sae.repository import is_repository

    made = Environment(  # of Markdown: `_cell` escapes what a table would take for its own
        loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    summary, content = store.summary(), store.manifest
    named = content.get("named") if isinstance(content.get("named"), dict) else {}
    said = named.get("model")
    model = base_model or (said if isinstance(said, str) and is_repository(said) else None)
    tables = _tables(store)
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": path}], **({"default": True} if not at else {})}
        for at, (name, path, _) in enumerate(tables)
    ]
    head = {
        "license": license, "pretty_name": f"Firings: {repo.partition('/')[2]}",
        "tags": ["sparse-autoencoder", "interpretability", "recurrent-state", "writesae"],
        "size_categories": [_size_category(summary["firings"])], "configs": configs,
    }  # fmt: skip
    rounded = store.activations == "packed"
    widest = max(site[2] for site in content["sites"])
    bound = f"2^-{25 - max(1, (widest - 1).bit_length())}"
    corpus = content["corpus"] if isinstance(content.get("corpus"), dict) else {}
    tokenizer = content.get("tokenizer") if isinstance(content.get("tokenizer"), dict) else {}
    source = content.get("source") if isinstance(content.get("source"), dict) else {}
    facts = [
        ("model", model or "of a local folder" if said != "default" else "the small model inside the package writesae"),
        ("revision", named.get("revision") or "not known"),
        ("weights, SHA-256 of", source.get("model")),
        ("precision", named.get("dtype")),
        ("tokenizer, SHA-256 of", tokenizer.get("sha256")),
        ("text, SHA-256 of", corpus.get("sha256")),
        ("kept", {"all": "all firings", "top": f"the {content['n']:,} largest of a feature",
                  "reservoir": f"a uniform sample of {content['n']:,} of a feature"}[store.mode]),
        ("activations", f"rounded, relative error at most {bound}" if rounded else "exact (float32)"),
        ("bytes a firing", f"{summary['bytes_per_firing']:.2f}"),
    ]  # fmt: skip
    sites, example = _sites(store)
    return made.get_template("store.md.j2").render(
        head=yaml.safe_dump(head, sort_keys=False, allow_unicode=True), repo=repo, license=license, model=model,
        revision=_cell(named.get("revision")) if named.get("revision") else "", version=__version__,
        shown_model="the small one inside the package writesae" if said == "default" else "of a local folder",
        facts=[(name, _cell(value)) for name, value in facts if value is not None], sites=sites, tables=tables,
        firings=summary["firings"], tokens=summary["tokens"], documents=summary["documents"], context=store.context,
        rounded=f" (rounded, by at most {bound} of it)" if rounded else "", example=example,
        has_log=store.mode == "all", log=tables[0][1], token_files=dict((x[0], x[1]) for x in tables)["tokens"],
    )  # fmt: skip


def _tables(store: Store) -> list[tuple[str, str, str]]:
    """(configuration, files, what they hold), the first shown first."""
    inside = "units/*/" if "unit" in store.manifest else ""
    n = f"{store.manifest['n']:,}"
    kept = f"the {n} firings with the largest activations of a feature, by (feature, -activation)"
    if store.mode == "reservoir":
        kept = f"a uniform sample of {n} firings of a feature, by (feature, -activation)"
    log = ("firings", f"{inside}firings/*.parquet", "all firings; in a file by (layer, head, feature, place)")
    return [
        *([log] if store.mode == "all" else []),
        ("index", "index/*.parquet", kept),
        ("features", "features.parquet", "count, sum and max of the activations of every feature, over all firings"),
        ("tokens", f"{inside}tokens/*.parquet", "every token, in order"),
        ("documents", "documents.parquet", "every document: source, SHA-256, tokens, passages"),
    ]


def _sites(store: Store) -> tuple[list[list[str]], tuple[int, int, int]]:
    """(rows of the card's table; layer, head and feature that fired most)."""
    rows = []
    counts = store.counts()
    columns = {name: numbers(counts[name]) for name in ("layer", "head", "feature", "count")}
    most = int(np.argmax(columns["count"]))
    for layer, head, features, k in store.manifest["sites"]:
        here = columns["count"][(columns["layer"] == layer) & (columns["head"] == head)]
        cells = (layer, head, features, k or "varies", int(here.sum()), int((here > 0).sum()))
        rows.append([f"{x:,}" if isinstance(x, int) else x for x in cells])
    if len(rows) > _SHOWN_SITES:
        rows = [*rows[:_SHOWN_SITES], [f"and {len(rows) - _SHOWN_SITES:,} more", *[""] * 5]]
    return rows, (int(columns["layer"][most]), int(columns["head"][most]), int(columns["feature"][most]))


def _size_category(rows: int) -> str:
    """As the hub says how large a dataset is."""
    steps = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    at = next((i for i in range(len(steps)) if rows < 10 ** (3 + i)), None)
    if at is None:
        return "n>1T"
    return "n<1K" if at == 0 else f"{steps[at - 1]}<n<{steps[at]}"


def _cell(value) -> str:
    """One cell of a Markdown table."""
    text = " ".join(str(value).split())[:200]
    for mark in "\\`|*_[]":
        text = text.replace(mark, "\\" + mark)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
