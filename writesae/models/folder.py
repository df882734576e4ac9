"""What a model's folder must hold before transformers sees it: nothing in it is believed, and none of its code runs.

A configuration says how much memory a model takes, and transformers takes it at its word. Here the sizes that it
implies are held against the weights that are there, first by its counts, then by a model built without memory.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..untrusted import is_integer, read_json, safetensors_file, shown

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATING = {"F64", "F32", "F16", "BF16"}
_READ = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_LARGE = 64 * 2**20
# Counts that a configuration or a model loops over; others only size tensors.
_COUNT = re.compile(r"((num|n)_.*(layers?|blocks?|stages?|labels)|depth|layers)$")
_FETCHED = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


@dataclass(frozen=True)
class Held:
    """What the weight files of a folder hold."""

    tensors: int
    elements: int
    quantized: bool


def check_folder(folder: Path, trust_remote_code: bool) -> Held:
    """Checks every file that loading reads, but the tokenizer's own vocabulary.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    config = read_json(folder / "config.json", strict=False)
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{folder / 'config.json'}: model_type: expected text, got {shown(config.get('model_type'))}")
    for name in _READ:
        if (folder / name).exists():
            read_json(folder / name, _LARGE, strict=False)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder / 'adapter_config.json'}: an adapter of another model, which it would fetch; merge the two where "
            "they are trusted (merge_and_unload, save_pretrained) and load the result"
        )
    held = _weights(folder, isinstance(config.get("quantization_config"), dict))
    _check_config(config, folder / "config.json", held, trust_remote_code)
    return held


def _weights(folder: Path, quantized: bool) -> Held:
    files: dict[str, set[str] | None] = {WEIGHTS: None}
    if not (folder / WEIGHTS).exists():
        if not (folder / INDEX).exists():
            _refuse_without_weights(folder)
        files = {**_shards(folder)}
    tensors = elements = 0
    for file, promised in files.items():
        with safetensors_file(folder / file) as (header, _):
            if promised is not None and (missing := sorted(promised - set(header))):
                raise ValueError(f"{folder / file}: without {shown(missing[0])}, which {INDEX} says is there")
            for name, (dtype, shape) in header.items():
                if dtype not in _FLOATING and len(shape) > 1 and not quantized:
                    raise ValueError(f"{folder / file}: {name[:200]}: expected floating weights, got dtype {dtype}")
                elements += math.prod(shape)
            tensors += len(header)
    return Held(tensors, elements, quantized)


def _shards(folder: Path) -> dict[str, set[str]]:
    """{file: tensors that the index says it holds}."""
    where = folder / INDEX
    index = read_json(where, _LARGE, strict=False).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{where}: weight_map: expected {{tensor: file}}, got {shown(index)}")
    files: dict[str, set[str]] = {}
    for tensor, file in index.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
            name = tensor[:200]
            raise ValueError(f"{where}: {name}: expected a *.safetensors file of this folder, got {shown(file)}")
        files.setdefault(file, set()).add(tensor)
    if missing := sorted(file for file in files if not (folder / file).exists()):
        raise ValueError(f"{where}: {len(missing)} of its {len(files)} files are missing, such as {shown(missing[0])}")
    return files


def _refuse_without_weights(folder: Path) -> None:
    pickled = sorted(f.name for pattern in _PICKLED for f in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"path: expected weights in safetensors, got {pickled[0]} in {str(folder)!r}, which needs unpickling and "
            "may run code; convert it where it is trusted (save_pretrained writes safetensors)"
        )
    others = sorted(f.name for f in folder.glob("*.safetensors"))
    got = f"{others[0]}, but neither {WEIGHTS} nor {INDEX}" if others else "none"
    raise ValueError(f"path: expected *.safetensors weights in {str(folder)!r}, got {got}")


def _check_config(config: dict | list, where: Path, held: Held, trust_remote_code: bool, key: str = "") -> None:
    for key, value in config.items() if isinstance(config, dict) else ((key, x) for x in config):
        name = key[:200]
        if is_integer(value, most=10**40):
            most = max(held.tensors, 1000) if _COUNT.search(key) else 2**40
            if value > most:
                tensors = f"weights of {held.tensors:,} tensors"
                raise ValueError(f"{where}: {name}: {value:,} is more than {tensors} can hold")
        elif isinstance(value, (dict, list)):
            _check_config(value, where, held, trust_remote_code, key)
        if key in _FETCHED and "/" in str(value) and not trust_remote_code:
            raise ValueError(f"{where}: {name}: {shown(value)} is code to be fetched, {ALLOW}")
        if key == "transformers_weights":
            raise ValueError(f"{where}: {name}: weights under another name than {WEIGHTS} are not read")


def tokenizer_code(folder: Path) -> str | None:
    """Name of a tokenizer that says it comes with code, which would otherwise be passed over for a general one."""
    where = folder / "tokenizer_config.json"
    config = read_json(where, _LARGE, strict=False) if where.exists() else {}
    found = config.get("auto_map")
    if not found or (isinstance(found, dict) and "AutoTokenizer" not in found):
        return None
    return str(config.get("tokenizer_class"))


ALLOW = "which runs only with trust_remote_code=True (--trust-remote-code)"


@contextmanager
def no_larger_than(held: Held, where: Path) -> Iterator[None]:
    """Inside, building modules on the meta device stops with ValueError once they outgrow the weights there are."""
    # An unembedding is made before it is tied to the embedding; a packed weight holds up to 16 values an element.
    # Buffers, such as masks of all positions, are in no file.
    most = {
        "elements": (32 if held.quantized else 2) * held.elements + 10**7,
        "modules": 100 * held.tensors + 10_000,
        "elements of buffers": 2 * held.elements + 4 * 10**7,
    }
    thread, found = threading.get_ident(), dict.fromkeys(most, 0)

    def grown(kind: str, by: int) -> None:
        if threading.get_ident() == thread:
            found[kind] += by
            if found[kind] > most[kind]:
                raise ValueError(
                    f"{where}: describes a model of {found[kind]:,} {kind} or more, but its weight files hold "
                    f"{held.tensors:,} tensors of {held.elements:,} elements in all"
                )

    def size(x) -> int:
        return x.numel() if isinstance(x, torch.Tensor) else 0

    hooks = torch.nn.modules.module
    handles = [
        hooks.register_module_parameter_registration_hook(lambda m, name, x: grown("elements", size(x))),
        hooks.register_module_buffer_registration_hook(lambda m, name, x: grown("elements of buffers", size(x))),
        hooks.register_module_module_registration_hook(lambda m, name, child: grown("modules", 1)),
    ]
    try:
        with torch.device("meta"):
            yield
    finally:
        for handle in handles:
            handle.remove()
