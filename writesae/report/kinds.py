"""The kinds of runs that have a report, told apart by what lies in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..untrusted import read_json, shown
from . import audit, collect, html, paper, recovered, train

_LISTED = 8  # names of a folder that an error tells


class Kind(NamedTuple):
    """A kind of run."""

    name: str
    made_of: str  # what of a folder tells it
    is_run: Callable[[Path], bool]
    build: Callable[..., Path]  # (folder, out[, browse]) -> the page
    linked: bool  # whether its page names atoms, and takes `browse`
    beside: bool = False  # whether the folder is checked file by file, so that the page goes to one beside it


def _is_replacement(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("firings.parquet", "parts"))


KINDS = (
    Kind("collect", "manifest.json of a collection", collect.is_run, collect.build, True, True),
    Kind("train", "metrics.json and training.json", train.is_run, train.build, False, True),
    Kind("loss-recovered", 'summary.json with "test": "loss recovered"', recovered.is_run, recovered.build, False),
    Kind("audit", 'summary.json with "test": "audit"', audit.is_run, audit.build, False),
    Kind("paper", "paper.json, or folders with a study's summary.json", paper.is_run, paper.build, False),
    Kind("replace or demo", "summary.json and firings.parquet", _is_replacement, html.build, True),
)


def kind_of(folder: str | Path) -> Kind:
    """The kind of a run's folder.

    Raises:
        ValueError: none of them; says which there are, and what was found.
    """
    path = Path(folder)
    if path.is_dir():
        for kind in KINDS:
            if kind.is_run(path):
                return kind
    known = "; ".join(f"{kind.name} ({kind.made_of})" for kind in KINDS)
    raise ValueError(f"run: expected the folder of a run of {known}; got {path}, {_found(path)}")


def _found(path: Path) -> str:
    if not path.exists():
        return "which is not there"
    if not path.is_dir():
        return "which is a file"
    names = sorted(x.name + "/" * x.is_dir() for x in path.iterdir())
    if not names:
        return "which is empty"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    text = f"which holds {', '.join(shown(name)[1:-1] for name in names[:_LISTED])}{more}"
    if "checkpoint.pt" in names:
        return f"{text}: a training that did not end; `writesae train --resume` goes on"
    if "summary.json" in names:
        try:
            test = read_json(path / "summary.json", 64 * 2**20).get("test")
            text += f"; its summary.json is of {shown(test) if test is not None else 'no test'}"
        except ValueError as error:
            text += f"; {error}"
    return text


def build(folder: str | Path, out: str | Path | None = None, browse: str | None = None) -> Path:
    """Writes the page of a finished run of any kind, and returns its path.

    Args:
        out: folder to write to; None is the run's own, or NAME-report beside a collection and a training.
        browse: where its atoms' pages are, see `links.Links`; None leaves atoms text.

    Raises:
        ValueError: no run of a known kind, values of other types than its kind's, or `browse` where no atom is named.
    """
    kind, path = kind_of(folder), Path(folder)
    if out is None:
        whole = path.resolve()
        out = whole.with_name(f"{whole.name}-report") if kind.beside else path
    if browse is not None and not kind.linked:
        linked = ", ".join(one.name for one in KINDS if one.linked)
        raise ValueError(f"browse: expected a run that names atoms ({linked}), got one of {kind.name}")
    return kind.build(path, Path(out), browse=browse) if kind.linked else kind.build(path, Path(out))
