"""Sets of dictionaries in repositories of the Hugging Face hub: what is there, all of them, and how to put them there.

A repository holds a folder a dictionary, such as `L9H4/cfg.json` and `L9H4/sae.safetensors`, and the card README.md.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..progress import tqdm
from ..untrusted import is_number, read_json, shown
from .card import CARD, card_of
from .checkpoint import CONFIG, WEIGHTS, dictionaries, load_folder, most_bytes, read_config, recorded, weights_size
from .output import CHECKPOINT, HISTORY, PLOT, RECORD, rank_folders
from .published import BEST, site_of
from .repository import Repository, is_repository, told
from .sae import SAE

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_MOST = 10_000  # dictionaries of a set


@dataclass(frozen=True)
class Listed:
    """A dictionary of a set, by its configuration alone.

    Attributes:
        folder: where it lies in the set; "" for its top. layer, head, model: what it is of, or None.
        kind, target, sparsity, F, k, K, V: as of `SAE`. bytes: of its weights.
        metrics, training: as saved with it. revision: the repository's commit; None of a local folder.
    """

    folder: str
    layer: int | None
    head: int | None
    model: str | None
    kind: str
    target: str
    sparsity: str
    F: int
    k: int
    K: int
    V: int
    bytes: int
    metrics: dict = field(repr=False)
    training: dict = field(repr=False)
    revision: str | None = None


def available(path_or_repo: str | Path, revision: str | None = None) -> list[Listed]:
    """The dictionaries of a folder or repository, with their metrics. No weights are downloaded.

        for one in writesae.sae.available("owner/repo"):
            print(one.folder, one.metrics["fvu"])

    Published checkpoints (`best.pt`), which keep no metrics, are left out.

    Args:
        path_or_repo: a folder, or a repository such as "owner/repo".
        revision: branch, tag or commit of a repository.
    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: as `SAE.from_pretrained`.
    """
    root, repository = _opened(path_or_repo, revision)
    found = []
    for folder in _folders(root):
        sae, dtype = read_config(folder)
        found.append(
            Listed(
                _name(folder, root), sae.layer, sae.head, sae.model, sae.kind, sae.target, sae.sparsity, sae.F, sae.k,
                sae.K, sae.V, weights_size(sae, dtype), sae.metrics, sae.training_record,
                None if repository is None else repository.commit,
            )
        )  # fmt: skip
    if not found:
        raise FileNotFoundError(f"{path_or_repo}: no dictionaries (folders with {CONFIG}) there")
    return sorted(found, key=lambda x: (x.layer is None, x.layer, x.head or 0, x.folder))


def load_set(
    path_or_repo: str | Path,
    sites: Iterable[tuple[int, int]] | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> dict[tuple[int, int], SAE]:
    """{(layer, head): dictionary} of a folder or repository, as `attach` takes it.

    Args:
        path_or_repo, revision: as of `available`.
        sites: the (layer, head) wanted; the weights of others are not downloaded. None: all.
        progress: show a bar.
    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: as `SAE.from_pretrained`; also a site that is
            not there, two dictionaries of one site, one that does not say its site.
    """
    root, repository = _opened(path_or_repo, revision)
    limits: dict[str, int] = {}
    at: dict[tuple[int, int], Path] = {}
    wanted = None if sites is None else [(int(layer), int(head)) for layer, head in sites]
    for folder in _folders(root):
        sae, dtype = read_config(folder)
        if sae.layer is None or sae.head is None:
            raise ValueError(f"{path_or_repo}: {_name(folder, root) or CONFIG} does not say its layer and head")
        site = sae.layer, sae.head
        if site in at and (wanted is None or site in wanted):
            raise ValueError(
                f"{path_or_repo}: expected one dictionary a site, got {_name(at[site], root)} and "
                f"{_name(folder, root)} for {_site(site)}: load one of them by SAE.from_pretrained with its folder"
            )
        at[site] = folder
        limits[f"{_name(folder, root)}/{WEIGHTS}".lstrip("/")] = most_bytes(sae, dtype)
    if not at or (wanted is not None and not set(wanted) <= set(at)):
        missing = "any" if wanted is None else ", ".join(map(_site, sorted(set(wanted) - set(at))))
        there = ", ".join(map(_site, sorted(at))) or "none"
        raise FileNotFoundError(f"sites: expected dictionaries in {path_or_repo}, got {missing}; it holds {there}")
    chosen = sorted(at) if wanted is None else list(dict.fromkeys(wanted))
    if repository is not None:
        names = [f"{_name(at[site], root)}/{WEIGHTS}".lstrip("/") for site in chosen]
        repository.fetch(*map(glob.escape, names), limits=limits, progress=progress)
    out = {}
    for site in tqdm(chosen, desc="dictionaries", disable=not progress):
        folder = at[site]
        if not (folder / WEIGHTS).exists():
            raise FileNotFoundError(f"{path_or_repo}: no {WEIGHTS} in {_name(folder, root) or 'its top'}")
        sae = load_folder(folder)
        out[site] = sae if repository is None else recorded(sae, repository, _name(folder, root))
    return out


def push_to_hub(
    folder: str | Path,
    repo: str,
    *,
    license: str,
    base_model: str | None = None,
    base_model_revision: str | None = None,
    datasets: Sequence[str] = (),
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    replace: bool = False,
) -> str:
    """Uploads the dictionaries of a folder, as `writesae train` leaves it, with a card; returns the commit's address.

        writesae.push_to_hub("runs/set", "owner/repo", license="apache-2.0", base_model="Qwen/Qwen3.5-0.8B")

    One commit holds it all: no one ever sees half of a set. Checkpoints stay here. Where `base_model` is given, the
    uploaded configurations name it in place of what the model was called here, which may be a path of this machine.

    Args:
        folder: a dictionary (`cfg.json`, `sae.safetensors`), or a folder of such folders.
        repo: owner/name; made if it is not there.
        license: of the dictionaries, an identifier of the hub such as "apache-2.0", "mit" or "cc-by-4.0".
        base_model, base_model_revision: the model's repository and commit. Needed where the dictionaries call it by
            something else than a repository's name.
        datasets: repositories of the text they were trained on.
        private: of a repository that is made; one that is there stays as it is.
        revision: a branch, made if it is not there. None: main.
        message: of the commit.
        replace: take dictionaries that are in the repository and not in the folder away; otherwise they are refused.
    Raises:
        ValueError: an unfinished run, a file that is none of a set, a damaged dictionary, an argument, by name.
        FileNotFoundError, PermissionError, ConnectionError: as `SAE.from_pretrained`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

    if not is_repository(repo):
        raise ValueError(f"repo: expected owner/name, got {shown(repo)}")
    found, text = prepare(
        folder, repo, license=license, base_model=base_model, base_model_revision=base_model_revision,
        datasets=datasets,
    )  # fmt: skip
    api, branch = HfApi(), revision or "main"
    with told(repo, revision, sending=True):
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        try:
            info = api.model_info(repo, revision=branch)
        except errors.RevisionNotFoundError:
            info = None
    there = {x.rfilename for x in (info.siblings if info else None) or ()}
    there = {path for path in there if path.rpartition("/")[2] in (CONFIG, WEIGHTS)}
    mine = {name for name, _, _ in found}
    others = sorted({path.rpartition("/")[0] for path in there} - mine)
    if others and not replace:
        raise ValueError(
            f"repo: {repo} holds {len(others)} other dictionaries, which the new card would not list "
            f"({', '.join(x or 'one at its top' for x in others[:4])}): name another repository or revision, or say "
            "replace=True (--replace), which takes them away"
        )
    operations: list = [CommitOperationDelete(x) for x in sorted(there) if x.rpartition("/")[0] in others]
    for name, config, weights in found:
        prefix = f"{name}/" if name else ""
        operations.append(CommitOperationAdd(f"{prefix}{WEIGHTS}", str(weights)))
        operations.append(CommitOperationAdd(f"{prefix}{CONFIG}", config))
    operations.append(CommitOperationAdd(CARD, text.encode()))
    many = f"{len(found)} dictionar{'y' if len(found) == 1 else 'ies'}"
    with told(repo, revision, sending=True):
        done = api.create_commit(
            repo, operations, commit_message=message or f"Upload {many}", revision=branch,
            parent_commit=None if info is None else info.sha,
        )  # fmt: skip
    return str(done.commit_url)


def prepare(
    folder: str | Path,
    repo: str,
    *,
    license: str,
    base_model: str | None = None,
    base_model_revision: str | None = None,
    datasets: Sequence[str] = (),
) -> tuple[list[tuple[str, bytes, Path]], str]:
    """([(folder in the repository, its cfg.json, weights)], card) that `push_to_hub` uploads; nothing is sent.

    Raises:
        ValueError: as `push_to_hub`.
    """
    folder = Path(folder).expanduser()
    if not isinstance(license, str) or not _LICENSE.fullmatch(license):
        raise ValueError(f"license: expected an identifier of the hub such as apache-2.0, got {shown(license)}")
    for name, value in (("base_model", base_model), *(("datasets", x) for x in datasets)):
        if value is not None and not is_repository(value):
            raise ValueError(f"{name}: expected a repository such as owner/name, got {shown(value)}")
    if base_model_revision is not None and not re.fullmatch(r"[\w./-]{1,200}", base_model_revision):
        raise ValueError(f"base_model_revision: expected a branch, tag or commit, got {shown(base_model_revision)}")
    saes = _checked(folder)
    models = sorted({str(sae.model) for sae in saes.values()})
    if base_model is None:
        if len(models) > 1:
            raise ValueError(f"base_model: the dictionaries name several models ({', '.join(models)}): expected one")
        if models[0] != "default" and not is_repository(models[0]):
            raise ValueError(
                f"base_model: expected the model's repository, since the dictionaries call it {shown(models[0])}"
            )
        base_model = models[0]
    found = []
    for at, sae in saes.items():
        config = read_json(at / CONFIG)
        text = (at / CONFIG).read_bytes()
        if config.get("model") != base_model:
            text = (json.dumps({**config, "model": base_model}, indent=2, allow_nan=False) + "\n").encode()
        found.append((_place(at, folder, sae), text, at / WEIGHTS))
    if len({name for name, _, _ in found}) < len(found):
        raise ValueError(f"folder: {folder} holds two dictionaries of one site")
    listed = [(name, sae) for (name, _, _), sae in zip(found, saes.values(), strict=True)]
    card = card_of(
        repo, listed, {name: weights for name, _, weights in found}, _pinned(folder, saes), license, base_model,
        base_model_revision, datasets,
    )  # fmt: skip
    return found, card


def _checked(folder: Path) -> dict[Path, SAE]:
    """{folder: dictionary, its tensors read and checked} of a finished set, without files that belong to none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: expected a folder of dictionaries, got {folder}, which is not there")
    found: dict[Path, SAE] = {}
    beside = {RECORD, CHECKPOINT, HISTORY, PLOT, CARD}
    runs = [folder, *rank_folders(folder)]
    for path in _places(folder, runs[1:], beside):
        here = {x.name for x in path.iterdir()}
        _refuse_unknown(path, here - {CONFIG, WEIGHTS} - (beside if path == folder else set()))
        if missing := sorted({CONFIG, WEIGHTS} - here):
            raise ValueError(f"folder: {path} is not finished: without {', '.join(missing)}")
        sae = load_folder(path)
        if site_of(path) not in (None, (sae.layer, sae.head)):
            raise ValueError(f"folder: {path} holds the dictionary of {_name_of(sae)}, but its name says another site")
        done, steps = sae.training_record.get("done"), sae.training_record.get("steps")
        if isinstance(done, int) and isinstance(steps, int) and done < steps:
            raise ValueError(f"folder: {path} is not finished: {done} of {steps} steps are done")
        if not all(is_number(x) for x in sae.metrics.values() if isinstance(x, float)):
            raise ValueError(f"folder: {path / CONFIG}: metrics: expected finite numbers: the run diverged")
        found[path] = sae.to("meta")
    for path in (folder, *found):
        for inside in path.iterdir():
            if inside.is_symlink():
                raise ValueError(f"folder: {inside} is a symbolic link: put the file there, or take it away")
    for run in runs:
        if (run / CHECKPOINT).exists() and not (run / RECORD).exists():
            raise ValueError(
                f"folder: {run} is not finished: {CHECKPOINT}, but no {RECORD}; end it with train --resume"
            )
    if (folder / RECORD).exists():
        metrics = read_json(folder / RECORD).get("metrics")
        there = {_name(path, folder) for path in found}
        there |= {f"{_name(path, folder)}/{_name_of(sae)}".lstrip("/") for path, sae in found.items()}
        if lost := sorted(set(metrics if isinstance(metrics, dict) else ()) - there):
            raise ValueError(f"folder: {folder} is not whole: {RECORD} tells of {', '.join(lost[:4])}")
    if not found:
        raise ValueError(f"folder: expected dictionaries in {folder}, got none")
    if len(found) > _MOST:
        raise ValueError(f"folder: expected at most {_MOST:,} dictionaries, got {len(found):,}")
    return found


def _places(folder: Path, ranks: Sequence[Path], beside: set[str]) -> list[Path]:
    """Folders of dictionaries of a run: itself, those in it, or a level further down those of its variants."""
    if (folder / CONFIG).exists() or (folder / WEIGHTS).exists():
        _refuse_unknown(folder, {x.name for x in folder.iterdir() if x.is_dir() and x not in ranks})
        return [folder]
    _refuse_unknown(folder, {x.name for x in folder.iterdir() if not x.is_dir()} - beside)
    out = []
    for path in sorted(x for x in folder.iterdir() if x.is_dir() and x not in ranks):
        below = sorted(x for x in path.iterdir() if x.is_dir())
        if below:
            _refuse_unknown(path, {x.name for x in path.iterdir()} - {x.name for x in below})
        out += below or [path]
    return out


def _pinned(folder: Path, saes: Mapping[Path, SAE]) -> dict[str, str]:
    """{what: sha256} that the run was pinned to (the corpus's tokens, the model's weights, ...); none without a
    checkpoint. A run that was gone on with and has not ended is refused: its checkpoint is ahead of its dictionaries.
    """
    from .resume import read_checkpoint

    pinned: dict[str, str] = {}
    for run in (folder, *rank_folders(folder)):
        if not (run / CHECKPOINT).exists():
            continue
        saved = read_checkpoint(run / CHECKPOINT)
        for path, sae in saes.items():
            done = sae.training_record.get("done")
            if done is not None and done != saved["done"]:
                raise ValueError(
                    f"folder: {path} is not finished: the run went on to step {saved['done']}, its dictionary is of "
                    f"step {shown(done)}; end it with train --resume"
                )
        found = saved["identity"].items()
        pinned |= {name: x for name, x in found if isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x)}
    return pinned


def _refuse_unknown(folder: Path, names: set[str]) -> None:
    if names:
        first = sorted(names)[0]
        hint = " (SAE.from_pretrained(...).save_pretrained(folder) makes safetensors of it)" if first == BEST else ""
        raise ValueError(
            f"folder: expected {CONFIG} and {WEIGHTS} in {folder}, got {shown(first)} too{hint}: take it "
            "away, it would not be uploaded"
        )


def _opened(path_or_repo: str | Path, revision: str | None) -> tuple[Path, Repository | None]:
    """(root of a set with its configurations, the repository if it is one)."""
    path = Path(path_or_repo).expanduser()
    if os.path.lexists(path):
        if revision is not None:
            raise ValueError(f"revision: expected None, {path} is a folder and no repository; got {shown(revision)}")
        return path, None
    repository = Repository(str(path_or_repo), revision)
    return repository.fetch(CONFIG, f"*/{CONFIG}"), repository


def _folders(root: Path) -> list[Path]:
    top = [root] if (root / CONFIG).exists() else []
    return [*top, *(x for x in dictionaries(root, 3, _MOST) if (x / CONFIG).exists())]


def _name(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix().strip(".")


def _place(folder: Path, root: Path, sae: SAE) -> str:
    """Where in a repository a dictionary goes."""
    if folder != root:
        return _name(folder, root)
    return "" if sae.layer is None or sae.head is None else _name_of(sae)


def _name_of(sae: SAE) -> str:
    return f"L{sae.layer}H{sae.head}"


def _site(site: tuple[int, int]) -> str:
    return f"L{site[0]}H{site[1]}"
