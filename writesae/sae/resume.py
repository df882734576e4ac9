"""What a training run is pinned to, and the file it goes on from.

A checkpoint is one file of plain tensors and numbers (`torch.load(path, weights_only=True)` reads it) whose last line
is the digest of all before it: torch's own reader does not notice a changed value.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..files import sha256, whole_file

_MARK = b"\nwritesae training checkpoint, sha256 "
_LAST = len(_MARK) + 64 + 1

# ---- what a run is pinned to --------------------------------------------------------------------------------------


def tokens_digest(ids: Tensor) -> str:
    """sha256 of passages' shape and token ids `[N, length]`."""
    digest = hashlib.sha256(repr((tuple(ids.shape), ids.dtype)).encode())
    digest.update(ids.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def refuse_other(path: Path, mine: Mapping, theirs: Mapping) -> None:
    """Raises ValueError, naming what differs, unless the checkpoint `path` is of a run pinned to the same. Its length
    may be another."""
    was, now = theirs.get("config"), mine["config"]
    was = was if isinstance(was, dict) else {}
    differs = [f"{n} was {was.get(n)!r} and is {now[n]!r}" for n in now if n != "steps" and now[n] != was.get(n)]
    differs += [n for n in mine if n != "config" and mine[n] != theirs.get(n)]
    if differs or set(mine) != set(theirs) or set(was) != set(now) or not isinstance(was["steps"], int):
        raise ValueError(f"{path}: the checkpoint is of another run: {', '.join(differs) or 'what it names'} differs")


# ---- files --------------------------------------------------------------------------------------------------------


def write_checkpoint(path: Path, content: dict) -> None:
    """Writes a checkpoint, whole or not at all."""
    with whole_file(path) as temporary:
        torch.save(content, temporary)
        last = _MARK + sha256(temporary).encode() + b"\n"
        with open(temporary, "ab") as file:
            file.write(last)


def read_checkpoint(path: Path) -> dict:
    """What `write_checkpoint` wrote, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged, foreign or code-carrying file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint to resume from")
    size = path.stat().st_size - _LAST
    with open(path, "rb") as file:
        file.seek(max(size, 0))
        last = file.read()
    if size < 0 or not last.startswith(_MARK):
        raise ValueError(f"{path}: not a training checkpoint: it has no digest at its end (cut short, or not ours)")
    if last != _MARK + sha256(path, size=size).encode() + b"\n":
        raise ValueError(f"{path}: not a training checkpoint: it is damaged, its content and its digest disagree")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign or code-carrying file, whatever torch makes of it
        raise ValueError(f"{path}: not a training checkpoint: {str(error).splitlines()[0]}") from error
    kinds = {"identity": dict, "done": int, "history": list, "lengths": list, "place": dict, "trainers": list}
    if not isinstance(saved, dict) or any(not isinstance(saved.get(n), kind) for n, kind in kinds.items()):
        raise ValueError(f"{path}: not a training checkpoint: expected {', '.join(kinds)} in it")
    return saved


# ---- what is in them ----------------------------------------------------------------------------------------------


def on_cpu(x):
    """The same nest of dictionaries, lists and tensors, with the tensors on the CPU."""
    if isinstance(x, dict):
        return {name: on_cpu(value) for name, value in x.items()}
    if isinstance(x, list):
        return [on_cpu(value) for value in x]
    return x.cpu() if isinstance(x, Tensor) else x


def check_like(name: str, x, like) -> None:
    """Raises ValueError unless x has the names, shapes and dtypes of `like`, and finite numbers."""
    if isinstance(like, dict):
        if not isinstance(x, dict) or list(x) != list(like):
            raise ValueError(f"{name}: expected {', '.join(like)}, got {x if not isinstance(x, dict) else list(x)}")
        for key, value in like.items():
            check_like(f"{name} {key}", x[key], value)
    elif isinstance(like, Tensor):
        if not isinstance(x, Tensor) or x.shape != like.shape or x.dtype != like.dtype:
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected {like.dtype} {tuple(like.shape)}, got {got}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: NaN or infinity")
    elif type(x) is not type(like) or not math.isfinite(x):
        raise ValueError(f"{name}: expected a finite {type(like).__name__}, got {x!r}")
