"""Our own folder of a dictionary, `cfg.json` + `sae.safetensors`, and the door to every other file of one.

No file runs code, and none is believed: the configuration's types and sizes are checked against the header of the
weights before a tensor is read, and every tensor's values before it becomes part of a dictionary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..files import whole_file, write_text
from ..untrusted import first_line, is_integer, is_number, read_json, safetensors_file, shown
from .published import assign, load_published
from .sae import SAE

__all__ = ["CONFIG", "FORMAT", "WEIGHTS", "load", "load_published", "save"]

FORMAT = 1
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
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


def load(path_or_repo: str | Path, subfolder: str | None = None, revision: str | None = None) -> SAE:
    """See `SAE.from_pretrained`."""
    path = Path(path_or_repo).expanduser()
    if path.is_file():
        return load_published(path)
    if not path.is_dir():
        path = _download(str(path_or_repo), subfolder, revision)
    folder = path / subfolder if subfolder else path
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            hint = f"; it does hold {', '.join(_sites(folder))}" if _sites(folder) else ""
            raise FileNotFoundError(f"{folder}: no {name} there, so this is not a saved dictionary{hint}")
    return _load_folder(folder)


def _sites(folder: Path) -> list[str]:
    return sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))[:8] if folder.is_dir() else []


def _download(name: str, subfolder: str | None, revision: str | None) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(("/", ".pt")):
        raise FileNotFoundError(f"{name}: no such folder or file (a Hugging Face repository would be owner/name)")
    from huggingface_hub import snapshot_download

    patterns = [f"{subfolder}/*" if subfolder else "*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # whatever the hub or the network says, the user asked for a dictionary
        raise FileNotFoundError(f"{name}: not a local folder, and not to be had from the hub: {error}") from error


def _load_folder(folder: Path) -> SAE:
    where = folder / CONFIG
    config = read_json(where)
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
    with safetensors_file(folder / WEIGHTS) as (header, get):
        return fill(sae, header, get, folder / WEIGHTS, getattr(torch, config["dtype"]))


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
    of_writes = {"mean", "bias", *(["b_enc"] if sae.sparsity == "pursuit" else [])} if sae.target == "write" else ()
    for name in of_writes:
        if name in tensors and bool(tensors[name].any()):
            raise ValueError(f"{source}: {name}: expected zeros of a {sae.sparsity} dictionary of writes, got others")
    return assign(sae, tensors, source)
