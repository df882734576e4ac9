"""`load`: a language model and its tokenizer, from the package, a folder or a repository; safetensors only."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from ..untrusted import first_line, read_json
from .folder import ALLOW, Held, check_folder, no_larger_than, tokenizer_code
from .quiet import quiet

_DEFAULT = Path(__file__).parent.parent / "default" / "model"
_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors")
_VOCABULARY = 2**28  # bytes of JSON
# Kinds of model of flash-linear-attention that layers are attached to, as its configurations call them.
_OF_FLA = ("delta_net", "gated_deltanet", "gla", "hgrn2", "kda", "retnet", "rwkv7")
_PIECE = 2**22  # values looked at together


def load(
    path: str | os.PathLike = "default", dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
):  # fmt: skip
    """Loads `(model, tokenizer)`, the model in eval mode.

    No code of the folder runs and nobody is asked, unless `trust_remote_code`. What the configuration describes may
    not be larger than the weight files, every weight of the model must be in them, and all must be finite.

    Args:
        path: "default" (the small model shipped inside the package), a folder, or a repository name on the Hub. Of a
            multi-modal checkpoint the text model is loaded.
        dtype: of the parameters.
        trust_remote_code: allow Python files that come with the model to run.

    Raises:
        ValueError: no such folder; a folder without config.json or weights; weights that need unpickling; a model or
            tokenizer that needs its own code; a damaged file, by name.
    """
    folder = _folder(path, trust_remote_code)
    held = check_folder(folder, trust_remote_code)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": not trust_remote_code}
    with quiet():
        model = _model(folder, held, dtype, options)
    import transformers
    from transformers import AutoTokenizer

    name = tokenizer_code(folder)
    if name is not None and not trust_remote_code and not hasattr(transformers, name):
        where = folder / "tokenizer_config.json"
        raise ValueError(f"{where}: the tokenizer {name[:200]} comes with its own code, {ALLOW}")
    try:
        with _named(folder, "the tokenizer (tokenizer.json, tokenizer_config.json, ...)"):
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except ValueError:
        if (folder / "tokenizer.json").exists():
            read_json(folder / "tokenizer.json", _VOCABULARY, strict=False)  # torn, it says so by name
        raise
    return model.eval(), tokenizer


def _model(folder: Path, held: Held, dtype: torch.dtype, options: dict):
    from transformers import AutoConfig, AutoModelForCausalLM

    _make_known(folder)
    with _named(folder, "config.json"):
        config = (_shadowed(folder) or AutoConfig).from_pretrained(folder, **options)
    with _named(folder, "config.json"), no_larger_than(held, folder / "config.json"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=options["trust_remote_code"])
    with _named(folder, "the model"):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    for name, what in (("missing_keys", "without"), ("mismatched_keys", "of another shape:")):
        if wrong := sorted(map(str, found.get(name) or ())):
            raise ValueError(f"{folder}: the weights are {what} {wrong[0][:200]} and {len(wrong) - 1} more")
    for name, x in model.named_parameters():
        if x.device.type != "meta" and x.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for piece in x.detach().reshape(-1).split(_PIECE):
                if not bool(torch.isfinite(piece).all()):
                    raise ValueError(f"{folder}: {name}: expected finite weights, got a NaN or infinity as {dtype}")
    return model


def _make_known(folder: Path) -> None:
    """Imports flash-linear-attention, which tells transformers of its models, for a folder of another kind than those
    that transformers knows, if it is installed.

    Raises:
        ValueError: the model is of one of its classes, and it is not installed.
    """
    from transformers import CONFIG_MAPPING

    config = read_json(folder / "config.json", strict=False)
    kind = config.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if find_spec("fla") is not None:
        importlib.import_module("fla.models")
    elif kind in _OF_FLA and not config.get("auto_map"):
        raise ValueError(
            f"{folder}: config.json: a {kind} model is of flash-linear-attention, which is not installed: "
            "pip install flash-linear-attention==0.6.0"
        )


def _shadowed(folder: Path):
    """transformers' own class of a configuration, where flash-linear-attention, once imported, has put one of its own
    under the same name (Mamba, Mamba-2); else None."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config = read_json(folder / "config.json", strict=False)
    kind = config.get("model_type")
    own = getattr(transformers, str(CONFIG_MAPPING_NAMES.get(kind)), None)
    return None if own is None or config.get("auto_map") or CONFIG_MAPPING[kind] is own else own


@contextmanager
def _named(folder: Path, what: str) -> Iterator[None]:
    """Whatever transformers makes of a stranger's file becomes a ValueError that names the folder and the file."""
    try:
        yield
    except Exception as error:
        text = first_line(error)
        if "trust_remote_code" in str(error):
            text = f"it comes with code of its own, {ALLOW}"
        elif isinstance(error, ValueError) and str(folder) in text:
            raise
        raise ValueError(f"{folder}: {what} cannot be loaded: {text}") from error


def _folder(path: str | os.PathLike, trust_remote_code: bool) -> Path:
    """Where the files are, downloaded if they have to be."""
    where = _DEFAULT if str(path) == "default" else Path(path).expanduser()
    if not (where.exists() or str(path) == "default" or _looks_like_path(path)):
        from huggingface_hub import snapshot_download

        files = [*_FILES, *(["*.py"] if trust_remote_code else [])]
        try:
            where = Path(snapshot_download(str(path), allow_patterns=files, ignore_patterns=["*/*"]))
        except Exception as error:  # whatever the hub or the network says, the user asked for a model
            raise ValueError(
                f"path: expected a model folder, a repository name or 'default', got {str(path)!r}: no such folder, "
                f"and not to be had from the hub: {first_line(error)}"
            ) from error
    if not where.is_dir():
        raise ValueError(f"path: expected a model folder, a repository name or 'default', got {str(path)!r}")
    if not (where / "config.json").exists():
        raise ValueError(f"path: expected a model folder with config.json, got {str(where)!r} without one")
    return where


def _looks_like_path(path) -> bool:
    text = str(path)
    return isinstance(path, os.PathLike) or text.startswith((".", "~", os.sep)) or text.count("/") > 1
