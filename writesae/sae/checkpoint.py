"""Our own folder of a dictionary, `cfg.json` + `sae.safetensors`, and the door to every other file of one (SAELens'
folder of one of ours goes through the same checks, see `saelens_layout`).

No file runs code, and none is believed: the configuration's types and sizes are checked against the header of the
weights before a tensor is read, and every tensor's values before it becomes part of a dictionary.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..files import whole_file, write_text
from ..untrusted import HEADER_LIMIT, first_line, is_integer, is_number, read_json, safetensors_file, shown
from . import saelens_layout
from .published import BESIDE, BEST, assign, load_published, site_of
from .repository import Repository
from .sae import SAE

__all__ = ["CONFIG", "FORMAT", "WEIGHTS", "dictionaries", "load", "load_published", "save"]

FORMAT = 1
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_LISTED, _ENTRIES = 8, 10_000  # dictionaries that an error names, entries of folders that are looked at
_KEYS = {
    "format", "writesae_version", "kind", "d_sae", "k", "K", "V", "r", "sparsity", "layer", "head", "model", "centred",
    "dtype", "training", "metrics", "target",
}  # fmt: skip
_OPTIONAL = {"training", "metrics", "model", "target"}
_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def save(sae: SAE, folder: str | Path) -> None:
    """Writes a dictionary; each file appears whole or not at all, and never through a link."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT, "writesae_version": __version__, "kind": sae.kind, "d_sae": sae.F, "k": sae.k, "K": sae.K,
        "V": sae.V, "r": sae.r, "sparsity": sae.sparsity, "target": sae.target,
        "layer": sae.layer, "head": sae.head, "model": sae.model, "centred": sae.centred,
        "dtype": str(sae.b_enc.dtype).removeprefix("torch."),
        "training": sae.training_record, "metrics": sae.metrics,
    }  # fmt: skip
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    tensors = {name: x.detach().contiguous() for name, x in sae.state_dict().items()}
    with whole_file(folder / WEIGHTS) as path:
        save_file(tensors, path)
    write_text(folder / CONFIG, text)


def load(
    path_or_repo: str | Path,
    subfolder: str | None = None,
    revision: str | None = None,
    batchtopk: str | float | None = None,
) -> SAE:
    """See `SAE.from_pretrained`."""
    path = Path(path_or_repo).expanduser()
    if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise ValueError(f"subfolder: expected a folder inside {path_or_repo}, got {shown(subfolder)}")
    if os.path.lexists(path) and not path.is_dir():
        if subfolder:
            raise ValueError(f"subfolder: expected none, since {path} is no folder, got {shown(subfolder)}")
        return load_published(path, batchtopk=batchtopk)
    if not path.is_dir():
        repository = Repository(str(path_or_repo), revision)
        return load_of(repository, Path(subfolder or "").as_posix().strip("."), batchtopk)
    if revision is not None:
        raise ValueError(f"revision: expected None, {path} is a folder and no repository; got {shown(revision)}")
    return _load_at(path, subfolder, str(path / subfolder if subfolder else path), batchtopk)


def load_of(repository: Repository, subfolder: str, batchtopk: str | float | None = None) -> SAE:
    """The dictionary in a folder ("" for the top) of a repository; of the others nothing is downloaded.

    Raises:
        FileNotFoundError, ValueError: as `load`; also weights larger than their configuration says.
    """

    def inside(file: str) -> str:
        return f"{subfolder}/{file}" if subfolder else file

    if repository.sizes is not None and not any(inside(x) in repository.sizes for x in (CONFIG, WEIGHTS, BEST)):
        folders = [shown(x)[1:-1] for x in repository.folders(CONFIG, BEST) if x]
        more = "" if len(folders) <= _LISTED else f" and {len(folders) - _LISTED:,} more"
        held = f"it does hold {', '.join(folders[:_LISTED])}{more}: say which as subfolder" if folders else "nor below"
        raise FileNotFoundError(
            f"{repository.name}: no dictionary {f'in {subfolder}' if subfolder else 'there'}; {held}"
        )
    root = repository.fetch(*(glob.escape(inside(x)) for x in (CONFIG, BESIDE)))
    limits = {}
    if (root / inside(CONFIG)).exists():
        empty, dtype = read_config(root / subfolder)
        limits = dict.fromkeys((inside(WEIGHTS), inside(saelens_layout.WEIGHTS)), most_bytes(empty, dtype))
    wanted = (WEIGHTS, saelens_layout.WEIGHTS, BEST)
    root = repository.fetch(*(glob.escape(inside(x)) for x in wanted), limits=limits, progress=True)
    sae = _load_at(root, subfolder, f"{repository.name} ({root / subfolder})", batchtopk)
    return recorded(sae, repository, subfolder)


def recorded(sae: SAE, repository: Repository, folder: str) -> SAE:
    """The dictionary, with where it came from in its record."""
    sae.training_record["hub"] = {"repository": repository.name, "revision": repository.commit, "folder": folder}
    return sae


def _load_at(path: Path, subfolder: str | None, where: str, batchtopk: str | float | None) -> SAE:
    folder = path / subfolder if subfolder else path
    own = [name for name in (CONFIG, _weights(folder)) if os.path.lexists(folder / name)]
    published = os.path.lexists(folder / BEST)
    if own and published:
        raise ValueError(
            f"{where}: holds {own[0]} of one dictionary and {BEST} of another: name the file {folder / BEST}, or take "
            "it away"
        )
    if published:
        return load_published(folder / BEST, batchtopk=batchtopk)
    if not folder.is_dir():
        raise FileNotFoundError(f"{where}: no such folder{_inside(path)}")
    if len(own) < 2:
        missing = f"no {WEIGHTS if CONFIG in own else CONFIG} there" + ("" if own else f" and no {BEST}")
        raise FileNotFoundError(f"{where}: {missing}, so this is not a saved dictionary{_inside(folder)}")
    if batchtopk is not None:
        raise ValueError(f"batchtopk: expected None, {folder} is no published BatchTopK dictionary; got {batchtopk!r}")
    return load_folder(folder)


def dictionaries(folder: Path, depth: int = 1, most: int | None = None) -> list[Path]:
    """Folders of dictionaries, ours and published ones, in a folder, or below it down to a depth; sorted.

    Of folders that cannot be read nothing is found. At `most` so many entries of folders are looked at.
    """
    found, level = [], [folder]
    for _ in range(depth):
        below = []
        for at in level:
            with contextlib.suppress(OSError), os.scandir(at) as inside:
                entries = list(itertools.islice(inside, most))
                most = None if most is None else most - len(entries)
                below += [Path(entry.path) for entry in entries if os.path.isdir(entry.path)]
        found += [path for path in below if _is_dictionary(path)]
        level = below
    return sorted(found)


def _is_dictionary(folder: Path) -> bool:
    """Whether it holds one; of a repository only the configurations may be here."""
    named = (BESIDE,) if site_of(folder) else ()
    return any(os.path.lexists(folder / name) for name in (CONFIG, BEST, *named))


def _inside(folder: Path) -> str:
    """What is there, for an error: dictionaries below, else files."""
    if found := dictionaries(folder, 3, _ENTRIES):
        names = [shown(str(path.relative_to(folder)))[1:-1] for path in found[:_LISTED]]
        more = "" if len(found) <= _LISTED else f" and {len(found) - _LISTED:,} more"
        return f"; it does hold {', '.join(names)}{more}: say which as subfolder"
    with contextlib.suppress(OSError), os.scandir(folder) as inside:
        names = [shown(entry.name)[1:-1] for entry in itertools.islice(inside, _LISTED)]
        return f"; it holds {', '.join(sorted(names)) or 'nothing'}"
    return ""


def read_config(folder: Path) -> tuple[SAE, torch.dtype]:
    """The empty dictionary (`SAE(..., empty=True)`) that a folder's `cfg.json` describes, and the dtype of its weights.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    where = folder / CONFIG
    config = read_json(where)
    if saelens_layout.is_saelens(config):
        config = saelens_layout.own_configuration(where, config, FORMAT)
    if "format" not in config:
        raise ValueError(f"{where}: not a writesae dictionary (no key format)")
    if not is_integer(config["format"]) or config["format"] != FORMAT:
        raise ValueError(
            f"{where}: format {shown(config['format'])} (written by writesae {_plain(config.get('writesae_version'))}),"
            f" but writesae {__version__} reads format {FORMAT}"
        )
    if unknown := sorted(set(config) - _KEYS):
        raise ValueError(f"{where}: unknown keys {shown(', '.join(unknown))[1:-1]}")
    if missing := sorted(_KEYS - _OPTIONAL - set(config)):
        raise ValueError(f"{where}: missing keys {', '.join(missing)}")
    if not isinstance(config["writesae_version"], str):
        raise ValueError(f"{where}: writesae_version: expected text, got {shown(config['writesae_version'])}")
    if not isinstance(config["dtype"], str) or config["dtype"] not in _DTYPES:
        raise ValueError(f"{where}: dtype: expected a floating dtype, got {shown(config['dtype'])}")
    try:
        sae = SAE(
            config["K"], config["V"], config["d_sae"], config["k"], config["kind"], config["r"], config["sparsity"],
            config["layer"], config["head"], config.get("model"), config["centred"], config.get("training"),
            config.get("metrics"), target=config.get("target", "state"), empty=True,
        )  # fmt: skip
        fvu = sae.metrics.get("fvu")
        if fvu is not None and not is_number(fvu):
            raise ValueError(f"metrics: fvu: expected a number, got {shown(fvu)}")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return sae, getattr(torch, config["dtype"])


def weights_size(sae: SAE, dtype: torch.dtype) -> int:
    """Bytes of a dictionary's tensors."""
    return sum(x.numel() for x in sae.state_dict().values()) * dtype.itemsize


def most_bytes(sae: SAE, dtype: torch.dtype) -> int:
    """Of a file of a dictionary's tensors."""
    return weights_size(sae, dtype) + HEADER_LIMIT


def load_folder(folder: Path) -> SAE:
    """A dictionary of our own files, or of SAELens' ones.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    sae, dtype = read_config(folder)
    path = folder / _weights(folder)
    with safetensors_file(path) as (header, get):
        return fill(sae, header, get, path, dtype)


def _weights(folder: Path) -> str:
    """The file of weights: ours, or SAELens' where that is the only one."""
    theirs = os.path.lexists(folder / saelens_layout.WEIGHTS) and not os.path.lexists(folder / WEIGHTS)
    return saelens_layout.WEIGHTS if theirs else WEIGHTS


def _plain(value) -> str:
    return shown(value).strip("'")


def fill(
    sae: SAE,
    header: dict[str, tuple[str, tuple[int, ...]]],
    get: Callable[[str], Tensor],
    source: Path,
    dtype: torch.dtype,
) -> SAE:
    """Puts tensors into an empty dictionary, one at a time, refusing by name what does not fit before reading any."""
    own = sae.state_dict()
    if unknown := sorted(set(header) - set(own)):
        raise ValueError(f"{source}: unknown tensors {shown(', '.join(unknown))[1:-1]} for kind {sae.kind}")
    if missing := sorted(set(own) - set(header)):
        raise ValueError(f"{source}: missing tensors {', '.join(missing)} for kind {sae.kind}")
    expected = _DTYPES[str(dtype).removeprefix("torch.")]
    for name, (stored, shape) in header.items():
        if shape != tuple(own[name].shape):
            raise ValueError(f"{source}: {name}: expected shape {tuple(own[name].shape)}, got {shape}")
        if stored != expected:
            raise ValueError(f"{source}: {name}: expected dtype {dtype} ({expected}, as {CONFIG} says), got {stored}")
    tensors = {}
    for name in header:
        try:
            tensors[name] = get(name).clone()  # of the mapped file, which may change under us
        except RuntimeError as error:
            raise ValueError(f"{source}: {name}: cannot be read: {first_line(error)}") from error
    if sae.metric is not None:
        M = tensors["metric"].double()
        if not bool(torch.isfinite(M).all()) or not torch.equal(M, M.T) or float(torch.linalg.eigvalsh(M)[0]) <= 0:
            raise ValueError(f"{source}: metric: expected a symmetric matrix with eigenvalues > 0, got another")
    of_writes = {"mean", "bias", *(["b_enc"] if sae.sparsity == "pursuit" else [])} if sae.target == "write" else ()
    for name in of_writes:
        if name in tensors and bool(tensors[name].any()):
            raise ValueError(f"{source}: {name}: expected zeros of a {sae.sparsity} dictionary of writes, got others")
    return assign(sae, tensors, source)
