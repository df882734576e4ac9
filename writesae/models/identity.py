"""Which model this is: digests of its weights, configuration and tokenizer, and whether a dictionary was made for it.

Stores and checkpoints of training keep these digests: what they hash may not change, or none can be gone on with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..files import DigestCache, stamp

_DEFAULT = Path(__file__).parent.parent / "default" / "model"
_BLOCK = 1 << 26  # bytes of a tensor on the host at once
_PROBE = "The quick brown fox; (x1 += 0x3f)\n\tnaïve – 東京 🙂 \u0301 <s> [INST] 1234567890"


def weights_digest(module: torch.nn.Module, progress: Callable[[int], object] | None = None) -> str:
    """sha256 over every entry of the state: names, shapes, dtypes and all values, streamed.

    Args:
        module: on any device, and with weights offloaded by accelerate.
        progress: told the bytes of each block.

    Raises:
        ValueError: a weight without values (on the `meta` device), by name.
    """
    digest = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        _feed(digest, name, _values(module, name, x), progress)
    return digest.hexdigest()


def config_digest(model: torch.nn.Module) -> str | None:
    """sha256 of what a model's configuration says beyond the weights, without where it came from; None without one."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_diff_dict"):
        return None
    content = config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version", "architectures"):
        content.pop(name, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_digest(tokenizer, tokenize: Callable[[str], list[int]]) -> str:
    """sha256 of all that a fast tokenizer is; of others of the vocabulary, if known; and of what a difficult text is.

    Args:
        tokenizer: a Hugging Face tokenizer, or a function from text to token ids.
        tokenize: text to token ids by it, see `text.tokens.tokenizing`.
    """
    digest = hashlib.sha256(json.dumps([int(i) for i in tokenize(_PROBE)]).encode())
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        whole.pop("padding", None), whole.pop("truncation", None)  # settings of the last call
        digest.update(json.dumps(whole, sort_keys=True).encode())
    elif hasattr(tokenizer, "get_vocab"):
        digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()


def _feed(digest, name: str, x, progress) -> None:
    if isinstance(x, (tuple, list)):  # packed weights of quantised layers
        for i, part in enumerate(x):
            _feed(digest, f"{name}.{i}", part, progress)
    elif not isinstance(x, Tensor):
        digest.update(f"{name} {x!r}\n".encode())
    elif x.is_quantized:
        scheme = x.qscheme()
        digest.update(f"{name} {scheme}\n".encode())
        if scheme in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
            _feed(digest, f"{name}.scales", x.q_per_channel_scales(), progress)
            _feed(digest, f"{name}.zeros", x.q_per_channel_zero_points(), progress)
        else:
            digest.update(f"{x.q_scale()!r} {x.q_zero_point()!r}\n".encode())
        _feed(digest, f"{name}.values", x.int_repr(), progress)
    else:
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}\n".encode())
        flat = x.detach().contiguous().reshape(-1)
        for part in flat.split(max(1, _BLOCK // x.element_size())):
            data = part.view(torch.uint8).cpu().numpy()
            digest.update(data)
            if progress is not None:
                progress(data.nbytes)


def _values(module: torch.nn.Module, name: str, x):
    """The values of a state's entry, from where accelerate keeps them if they are offloaded."""
    if not isinstance(x, Tensor) or x.device.type != "meta":
        return x
    owner, _, last = name.rpartition(".")
    weights = getattr(getattr(module.get_submodule(owner), "_hf_hook", None), "weights_map", None)
    if weights is None:
        raise ValueError(f"model: {name} has no values (it is on the meta device), so the model cannot be told apart")
    return weights[last]


def model_files(name) -> list[tuple]:
    """Stamps of the files that `load(name)` reads, taken before it does; empty where they are not on this machine."""
    folder = _DEFAULT if str(name) == "default" else Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(str(name), "config.json")
        except HFValidationError:
            return []
        if not isinstance(found, str):
            return []
        folder = Path(found).parent
    return [stamp(path) for path in sorted(folder.iterdir()) if path.is_file()]


def loaded_digest(module: torch.nn.Module, name, before: list[tuple], progress=None) -> str:
    """`weights_digest` of a model that was just loaded by `name`, read again only where its files have changed.

    Args:
        before: `model_files(name)` from before it was loaded.
    """
    from importlib.metadata import version

    dtypes = sorted({str(p.dtype) for p in module.parameters()})
    what = f"weights {type(module).__name__} {dtypes} {torch.__version__} {version('transformers')}"
    with DigestCache() as cache:
        known = cache.get(before, what) if before else None
        if known is None:
            known = weights_digest(module, progress)
            if before and model_files(name) == before:
                cache.put(before, known, what)
    return known


# ---- a dictionary's model --------------------------------------------------------------------------------------------


def model_name(model) -> str | None:
    """What a model calls itself: "default", a repository, or a folder; None for one made in memory."""
    return shown_name(getattr(getattr(model, "config", None), "_name_or_path", None))


def shown_name(name: str | None) -> str | None:
    """The name of a model or tokenizer, "default" for the embedded one wherever it is installed."""
    return "default" if name and _folder(name) == _DEFAULT.resolve() else name or None


def require_same_model(model, dictionaries: Mapping | Iterable, any_model: bool = False, name: str | None = None):
    """Refuses dictionaries whose configuration names another model than the one that is run.

    A dictionary or a model without a name passes. Folders are compared by where they are, and a folder that is not on
    this machine, or a repository, by its last part.

    Args:
        model: the model, or one wrapped (its `config` is read).
        dictionaries: {(layer, head): dictionary with `model`}, or dictionaries.
        any_model: run them all the same.
        name: what the model was loaded as, default `model_name(model)`.

    Raises:
        ValueError: naming the dictionary and both models.
    """
    here = name or model_name(model)
    if any_model or here is None:
        return
    items = dictionaries.items() if isinstance(dictionaries, Mapping) else ((None, sae) for sae in dictionaries)
    for place, sae in items:
        theirs = getattr(sae, "model", None)
        if theirs and not _same(str(theirs), here):
            site = place or (getattr(sae, "layer", None), getattr(sae, "head", None))
            raise ValueError(
                f"sae: the dictionary for {site[0]}:{site[1]} was made for the model {str(theirs)!r}, got the model "
                f"{here!r} (any_model=True or --any-model runs it all the same)"
            )


def _same(theirs: str, here: str) -> bool:
    if theirs == here:
        return True
    a, b = _folder(theirs), _folder(here)
    if a is not None and b is not None:
        return a == b
    if "default" in (theirs, here):  # and the other is no folder
        return False
    return _last(theirs) == _last(here)


def _folder(name: str) -> Path | None:
    path = _DEFAULT if name == "default" else Path(name).expanduser()
    return path.resolve() if path.is_dir() else None


def _last(name: str) -> str:
    path = Path(name)
    if path.parent.name == "snapshots":  # a repository in the Hub's cache
        return path.parent.parent.name.rpartition("--")[2].lower()
    return path.name.lower()
