"""`load`: a language model and its tokenizer, from the package, a folder or a repository; safetensors only."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .quiet import quiet

_DEFAULT = Path(__file__).parent.parent / "default" / "model"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load(path: str | os.PathLike = "default", dtype: torch.dtype = torch.float32):
    """Loads `(model, tokenizer)`, the model in eval mode.

    Args:
        path: "default" (the small model shipped inside the package), a folder, or a repository name on the Hub. Of a
            multi-modal checkpoint the text model is loaded.
        dtype: of the parameters.

    Raises:
        ValueError: no such folder; a folder without config.json or weights; weights that need unpickling.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = _DEFAULT if str(path) == "default" else Path(path).expanduser()
    if where.exists() or str(path) == "default" or _looks_like_path(path):
        _check_folder(where, path)
        source = str(where)
    else:
        source = str(path)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(source)


def _looks_like_path(path) -> bool:
    text = str(path)
    return isinstance(path, os.PathLike) or text.startswith((".", "~", os.sep)) or text.count("/") > 1


def _check_folder(folder: Path, given) -> None:
    if not folder.is_dir():
        raise ValueError(f"path: expected a model folder, a repository name or 'default', got {str(given)!r}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"path: expected a model folder with config.json, got {str(folder)!r} without one")
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(f.name for pattern in _PICKLED for f in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"path: expected weights in safetensors, got {pickled[0]} in {str(folder)!r}, which needs unpickling and "
            "may run code; convert it where it is trusted (save_pretrained writes safetensors)"
        )
    raise ValueError(f"path: expected *.safetensors weights in {str(folder)!r}, got none")
