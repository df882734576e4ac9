"""Published dictionaries: `best.pt` files of the paper's own code (arXiv 2605.12770), checked before they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..untrusted import is_integer, is_number, read_json, shown
from .sae import SAE
from .torch_file import Stored, TorchFile

_KEY_SIDE, _VALUE_SIDE = ("V_dec", "V", "V_enc"), ("W_dec", "W", "W_enc")
_GATE = {"b_gate", "b_mag", "r_mag"}
_ANYWHERE = {"steps_since_active", "b_enc", "log_threshold", "threshold"} | _GATE
_LAYOUTS = {
    "bilinear": {"V_enc", "W_enc", "V_dec", "W_dec", "bias"},
    "bilinear_tied": {"V_dec", "W_dec", "bias", "b_enc"},
    "bilinear_flat": {"V_enc", "W_enc", "b_enc", "decoder.weight", "decoder.bias"},
    "matrix": {"encoder.weight", "encoder.bias", "V", "W", "bias"},
    "flat": {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"},
}
_PUBLISHED = set().union(*_LAYOUTS.values()) | _ANYWHERE
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PIECE = 2**22  # values looked at together


def load_published(
    path: str | Path,
    K: int | None = None,
    V: int | None = None,
    layer: int | None = None,
    head: int | None = None,
    threshold: float | None = None,
) -> SAE:
    """Loads a `best.pt` of the paper's own code (arXiv 2605.12770): `model_state_dict`, `config`, and counters.

    The atoms keep the norms they were saved with and nothing is centred, so codes are the publisher's. JumpReLU
    becomes a threshold dictionary. So does Gated, with its hard gate (`gate > 0`); the paper's code trains Gated with
    a sigmoid of width 0.1 in the gate's place, whose codes are never exactly zero. BatchTopK needs the threshold that
    its training estimated. A `config.json` beside the file, as on the hub, must not contradict it.

    Args:
        path: the file.
        K, V: sizes of the head; needed where the file does not say (flat dictionaries), else checked against it. Of a
            flat dictionary only K * V can be checked: its two sizes are believed.
        layer, head: the site, default from the file's config.
        threshold: of a BatchTopK dictionary, >= 0, default the file's own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that needs unpickling, an unknown layout, tensors that are not floating or not finite, a
            negative threshold, or sizes that contradict each other.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    for name, value in (("K", K), ("V", V), ("layer", layer), ("head", head)):
        if value is not None and not is_integer(value, 1 if name in "KV" else 0):
            raise ValueError(f"{name}: expected an integer >= {1 if name in 'KV' else 0}, got {shown(value)}")
    with TorchFile(path) as file:
        content = file.content
        if not isinstance(content, dict) or not isinstance(content.get("model_state_dict"), dict):
            raise ValueError(f"{path}: expected a dict with model_state_dict, got {type(content).__name__}")
        state, config = content["model_state_dict"], _config(content, path)
        kind = _layout(state, path)
        F, K, V, r = _sizes(state, kind, K, V, config, path)
        k = config.get("k")
        if k is not None and k > F:
            raise ValueError(f"{path}: config: k: expected at most the {F} atoms of the file, got {k}")
        threshold = _threshold(file, state, config, threshold)
        sites = (config.get(n) if x is None else x for n, x in (("layer", layer), ("head", head)))
        record = {n: content[n] for n in ("epoch", "step", "val_mse") if is_number(content.get(n))}
        sparsity = "topk" if threshold is None and not {"log_threshold", "b_gate"} & set(state) else "threshold"
        try:
            sae = SAE(
                K, V, F, min(32, F) if k is None else k, kind, r, sparsity, *sites, None, False, record, empty=True
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return assign(sae, _tensors(file, state, sae, threshold), path)


def assign(sae: SAE, tensors: dict[str, Tensor], source: Path) -> SAE:
    """Gives an empty dictionary its tensors, of the right shapes; frozen, in evaluation mode.

    Raises:
        ValueError: naming the file and the first tensor with a NaN or infinity, or a negative threshold.
    """
    for name, x in tensors.items():
        check_finite(x, f"{source}: {name}")
        if name == "threshold" and bool((x < 0).any()):
            raise ValueError(f"{source}: threshold: expected values >= 0, got {float(x.min()):.3g}")
    sae.load_state_dict(tensors, assign=True)
    return sae.eval().requires_grad_(False)


def check_finite(x: Tensor, name: str) -> None:
    """Raises ValueError for a NaN or infinity, in little memory."""
    for piece in x.reshape(-1).split(_PIECE):
        if not bool(torch.isfinite(piece).all()):
            raise ValueError(f"{name}: expected finite values, got a NaN or infinity")


def _config(content: Mapping, path: Path) -> dict[str, Any]:
    """The file's configuration, its types checked; `config.json` beside the file may add nothing and deny nothing."""
    config = content.get("config")
    if config is None:
        config = {}
    if not isinstance(config, dict):
        raise ValueError(f"{path}: config: expected a dict, got {type(config).__name__}")
    beside = path.with_name("config.json")
    there = read_json(beside) if beside.exists() else {}
    for source, found in ((path, config), (beside, there)):
        for name in ("d_k", "d_v", "k", "layer", "head"):
            least = 0 if name in ("layer", "head") else 1
            if (value := found.get(name)) is not None and not is_integer(value, least):
                raise ValueError(f"{source}: config: {name}: expected an integer >= {least}, got {shown(value)}")
        if not isinstance(found.get("use_batchtopk", False), (bool, type(None))):
            raise ValueError(f"{source}: config: use_batchtopk: expected true or false")
    for name in ("d_k", "d_v", "k", "layer", "head", "use_batchtopk"):
        mine, theirs = config.get(name), there.get(name)
        if mine is not None and theirs is not None and mine != theirs:
            raise ValueError(f"{path}: config: {name}: {mine}, but {theirs} in the config.json beside it")
    return config


def _layout(state: dict, path: Path) -> str:
    if unknown := sorted({str(name) for name in state} - _PUBLISHED):
        raise ValueError(f"{path}: unknown tensors {shown(', '.join(unknown))[1:-1]}")
    for name, x in state.items():
        if not isinstance(x, Stored):
            raise ValueError(f"{path}: {name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in _FLOATING and name != "steps_since_active":
            raise ValueError(f"{path}: {name}: expected a floating dtype, got {x.dtype}")
    names = set(state)
    for kind, needed in _LAYOUTS.items():
        if not needed <= names or (kind == "bilinear" and "b_enc" not in names and not names >= _GATE):
            continue
        if left_over := sorted(names - needed - _ANYWHERE):
            raise ValueError(f"{path}: tensors {', '.join(left_over)} do not belong to a {kind} dictionary")
        if names & _GATE and (kind not in ("bilinear", "bilinear_flat") or not names >= _GATE):
            raise ValueError(f"{path}: expected all of {', '.join(sorted(_GATE))} of a bilinear encoder, or none")
        if len(names & {"b_gate", "log_threshold", "threshold"}) > 1:
            raise ValueError(f"{path}: expected one of b_gate, log_threshold and threshold, got more")
        return kind
    raise ValueError(f"{path}: no known layout has exactly the tensors {', '.join(sorted(names))}")


def _sizes(state: dict, kind: str, K: int | None, V: int | None, config: dict, path: Path) -> tuple[int, int, int, int]:
    """(F, K, V, r), every tensor's shape and every size given checked against them."""
    first = next(state[n] for n in ("b_enc", "b_mag", "encoder.bias") if n in state)
    F = first.shape[0] if first.ndim else 0
    given = {"K": {"d_k": config.get("d_k"), "K": K}, "V": {"d_v": config.get("d_v"), "V": V}}
    r, found = 1, {}
    for size, names in (("K", _KEY_SIDE), ("V", _VALUE_SIDE)):
        factors = [(n, state[n]) for n in names if n in state]
        for name, x in factors:
            if x.ndim not in (2, 3):
                raise ValueError(f"{path}: {name}: expected shape (F, r, {size}), got {x.shape}")
            r = x.shape[1] if x.ndim == 3 else 1
        told = {what: x for what, x in given[size].items() if x is not None}
        found[size] = factors[0][1].shape[-1] if factors else next(reversed(told.values()), None)
        if found[size] is None:
            raise ValueError(f"{path}: a {kind} dictionary does not say its head's sizes: pass K and V")
        for what, x in told.items():
            if x != found[size]:
                holder = factors[0][0] if factors else "the other"
                raise ValueError(f"{path}: {what}: {x}, but {holder} says {size} = {found[size]} (K and V swapped?)")
    K, V = found["K"], found["V"]
    rows = {"b_enc", "encoder.bias", "log_threshold", *_GATE}
    for name, x in sorted(state.items()):
        if name in _KEY_SIDE or name in _VALUE_SIDE:
            size = K if name in _KEY_SIDE else V
            good, expected = x.shape in ((F, r, size), *([(F, size)] if r == 1 else [])), f"({F}, {r}, {size})"
        elif name in rows:
            good, expected = x.shape == (F,), f"({F},)"
        elif name == "encoder.weight":
            good, expected = x.shape == (F, K * V), f"({F}, K*V = {K * V})"
        elif name == "decoder.weight":
            good, expected = x.shape == (K * V, F), f"(K*V = {K * V}, {F})"
        elif name == "decoder.bias":
            if x.numel() != K * V:
                raise ValueError(f"{path}: decoder.bias: expected K*V = {K * V} entries, got {x.numel()}")
            good, expected = x.ndim == 1 or x.shape == (K, V), f"({K}, {V})"
        elif name == "bias":
            good, expected = x.shape == (K, V), f"({K}, {V})"
        elif name == "threshold":
            good, expected = x.shape in ((), (1,), (F,)), f"() or ({F},)"
        else:
            continue
        if not good:
            raise ValueError(f"{path}: {name}: expected shape {expected}, got {x.shape}")
    return F, K, V, r


def _threshold(file: TorchFile, state: dict, config: dict, given: float | None) -> Tensor | float | None:
    """Of a BatchTopK dictionary; None for another."""
    path = file.path
    if not config.get("use_batchtopk"):
        if given is not None or "threshold" in state:
            what = "threshold" if given is not None else f"{path}: threshold"
            raise ValueError(f"{what}: only a BatchTopK dictionary has one, and config has no use_batchtopk")
        return None
    if {"log_threshold", "b_gate"} & set(state):
        raise ValueError(f"{path}: config: use_batchtopk contradicts the file's log_threshold or b_gate")
    if given is None and "threshold" in state:
        return file.read(state["threshold"])
    source = "threshold" if given is not None else f"{path}: config: threshold"
    given = config.get("threshold") if given is None else given
    if given is None:
        raise ValueError(f"{path}: a BatchTopK dictionary without its threshold: pass threshold=")
    if not is_number(given) or given < 0:
        raise ValueError(f"{source}: expected a finite number >= 0, got {shown(given)}")
    return float(given)


def _tensors(file: TorchFile, state: dict, sae: SAE, threshold: Tensor | float | None) -> dict[str, Tensor]:
    """Of the dictionary, float32; each read, cast and checked before the next."""
    F, r, K, V = sae.F, sae.r, sae.K, sae.V

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        x = file.read(state[name]).float()
        check_finite(x, f"{file.path}: {name}")
        return x.reshape(shape)

    out: dict[str, Tensor] = {"mean": torch.zeros(K, V)}
    if sae.kind in ("bilinear", "bilinear_flat"):
        out.update(v_enc=read("V_enc", (F, r, K)), w_enc=read("W_enc", (F, r, V)))
    elif sae.kind in ("matrix", "flat"):
        out["W_enc"] = read("encoder.weight", (F, K * V))
    if sae.rank_one_atoms:
        key, value = ("V", "W") if sae.kind == "matrix" else ("V_dec", "W_dec")
        out.update(v_dec=read(key, (F, r, K)), w_dec=read(value, (F, r, V)), bias=read("bias", (K, V)))
    else:
        out.update(W_dec=read("decoder.weight", (K * V, F)).T, bias=read("decoder.bias", (K, V)))
    if "b_gate" in state:
        # mag = e^r x + b_mag and gate = x + b_gate > 0: one pre-activation e^r x + b_mag above b_mag - e^r b_gate.
        gain, mag = read("r_mag", (F,)).exp(), read("b_mag", (F,))
        out["b_enc"], out["threshold"] = mag, (mag - gain * read("b_gate", (F,))).clamp_min(0)
        out["v_enc"] *= gain[:, None, None]
    else:
        out["b_enc"] = read("b_enc" if "b_enc" in state else "encoder.bias", (F,))
    if "log_threshold" in state:
        out["threshold"] = read("log_threshold", (F,)).exp()
    elif threshold is not None:
        out["threshold"] = torch.as_tensor(threshold, dtype=torch.float32).reshape(-1).expand(F)
    return {name: x.contiguous() for name, x in out.items()}
