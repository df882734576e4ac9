"""Published dictionaries: `best.pt` files of the paper's own code (arXiv 2605.12770), checked before they are read.

They are published as `writesae/<model>/L9_H4/best.pt` with `config.json` beside it; a folder's name may be all that
says the site. Their codes are the publisher's, but for two kinds: BatchTopK, whose codes depend on the batch, and
Gated, whose gate is never quite closed (see `load_published`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..untrusted import is_integer, is_number, read_json, shown
from .sae import SAE
from .torch_file import Stored, TorchFile

BEST, BESIDE = "best.pt", "config.json"
_LEAST = {"d_k": 1, "d_v": 1, "d_in": 1, "n_features": 1, "rank": 1, "k": 1, "layer": 0, "head": 0}
_SAID = (*_LEAST, "use_batchtopk", "sae_type")  # of a configuration, what is used; integers and their least
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
# A configuration's sae_type -> the layout and the sparsity's own tensor that must be there.
_TYPES = {
    "flat": ("flat", None), "rank1": ("matrix", None), "bilinear": ("bilinear", None),
    "bilinear_tied": ("bilinear_tied", None), "bilinear_flat": ("bilinear_flat", None),
    "bilinear_gated": ("bilinear", "b_gate"), "bilinear_jumprelu": ("bilinear", "log_threshold"),
}  # fmt: skip
_OWN = {"b_gate", "log_threshold"}  # of Gated and JumpReLU
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
    batchtopk: str | float | None = None,
) -> SAE:
    """Loads a `best.pt` of the paper's own code (arXiv 2605.12770): `model_state_dict`, `config`, and counters.

    The atoms keep the norms they were saved with and nothing is centred, so codes are the publisher's. JumpReLU
    becomes a threshold dictionary. So does Gated, with its hard gate (`gate > 0`); the paper's code trains Gated with
    a sigmoid of width 0.1 in the gate's place, whose codes are never exactly zero. A BatchTopK file holds no threshold,
    since the publisher's codes are the k P largest of whatever batch of P states they are computed in: how it chooses
    here must be said, and is kept as `training_record["published"]["batchtopk"]`.

    What the file's configuration does not say is taken from the `config.json` beside it, as on the hub, and layer and
    head from a folder named such as L9_H4. None of the three may contradict another. The paper's code trains on the
    state after the last token of each sequence only; this package's dictionaries see those after every token.

    Args:
        path: the file.
        K, V: sizes of the head; needed where the file does not say (flat dictionaries), else checked against it. Of a
            flat dictionary only K * V can be checked: its two sizes are believed.
        layer, head: the site, in place of what is said there.
        threshold: the same as a number for `batchtopk`.
        batchtopk: of a BatchTopK dictionary, "topk" for the k largest of each state, or a threshold >= 0. To estimate
            one, load with "topk" and call `estimate_threshold`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that needs unpickling, an unknown layout, tensors that are not floating or not finite, a
            negative threshold, a top-k dictionary without its k, a BatchTopK dictionary without `batchtopk`,
            `batchtopk` for another, or sizes or sites that contradict each other.
    """
    for name, value in (("K", K), ("V", V), ("layer", layer), ("head", head)):
        if value is not None and not is_integer(value, 1 if name in "KV" else 0):
            raise ValueError(f"{name}: expected an integer >= {1 if name in 'KV' else 0}, got {shown(value)}")
    if threshold is not None and batchtopk is not None:
        raise ValueError("threshold: expected threshold or batchtopk, got both")
    if batchtopk is not None and batchtopk != "topk" and not (is_number(batchtopk) and batchtopk >= 0):
        raise ValueError(f"batchtopk: expected 'topk' or a finite threshold >= 0, got {shown(batchtopk)}")
    if threshold is not None and not (is_number(threshold) and threshold >= 0):
        raise ValueError(f"threshold: expected a finite number >= 0, got {shown(threshold)}")
    with _opened(path) as (file, content, state, config):
        path = file.path
        kind = _layout(state, config, path)
        F, K, V, r = _sizes(state, kind, K, V, config, path)
        k = config["k"]
        if k is not None and k > F:
            raise ValueError(f"{path}: config: k: expected at most the {F} atoms of the file, got {k}")
        if k is None and not _OWN & set(state):
            raise ValueError(
                f"{path}: config: k: expected the number of active atoms, which neither the file nor a {BESIDE} says"
            )
        threshold, how = _threshold(file, state, config, threshold if batchtopk is None else batchtopk)
        record = {n: content[n] for n in ("epoch", "step", "val_mse") if is_number(content.get(n))}
        if how is not None:
            record["published"] = {"batchtopk": how}
        sparsity = "topk" if threshold is None and not _OWN & set(state) else "threshold"
        layer, head = _site(config, path, layer, head)
        try:
            sae = SAE(
                K, V, F, min(32, F) if k is None else k, kind, r, sparsity, layer, head, None, False, record, empty=True
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return assign(sae, _tensors(file, state, sae, threshold), path)


def is_batchtopk(path: str | Path) -> bool:
    """Whether a file, or a folder with a `best.pt`, is a published BatchTopK dictionary. A folder without is none.

    Raises:
        FileNotFoundError, ValueError: as `load_published`.
    """
    path = Path(path)
    if path.is_dir():
        path = path / BEST
        if not os.path.lexists(path):
            return False
    with _opened(path) as (_, _, state, config):
        return _batchtopk(state, config)


def site_of(folder: Path) -> tuple[int, int] | None:
    """(layer, head) of a folder named such as L9_H4 or L9H4, or None."""
    found = re.fullmatch("L([0-9]{1,9})_?H([0-9]{1,9})", os.path.basename(os.path.abspath(folder)))
    return None if found is None else (int(found[1]), int(found[2]))


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


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[TorchFile, dict, dict, dict[str, Any]]]:
    """(file, its content, model_state_dict, configuration)."""
    path = Path(path)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path}: no such file")
    with TorchFile(path) as file:
        content = file.content
        if not isinstance(content, dict) or not isinstance(content.get("model_state_dict"), dict):
            raise ValueError(f"{path}: expected a dict with model_state_dict, got {type(content).__name__}")
        yield file, content, content["model_state_dict"], _config(content, path)


def _config(content: Mapping, path: Path) -> dict[str, Any]:
    """What the file's configuration and the `config.json` beside it say, its types checked."""
    config = content.get("config")
    if config is None:
        config = {}
    if not isinstance(config, dict):
        raise ValueError(f"{path}: config: expected a dict, got {type(config).__name__}")
    beside = path.with_name(BESIDE)
    there = read_json(beside) if os.path.lexists(beside) else {}
    for source, found in ((path, config), (beside, there)):
        for name, least in _LEAST.items():
            if (value := found.get(name)) is not None and not is_integer(value, least):
                raise ValueError(f"{source}: config: {name}: expected an integer >= {least}, got {shown(value)}")
        if not isinstance(found.get("use_batchtopk", False), (bool, type(None))):
            raise ValueError(f"{source}: config: use_batchtopk: expected true or false")
        if not isinstance(found.get("sae_type", ""), (str, type(None))):
            raise ValueError(f"{source}: config: sae_type: expected text, got {shown(found['sae_type'])}")
    out = {name: config.get(name) for name in (*_SAID, "threshold")}
    for name in _SAID:
        mine, theirs = config.get(name), there.get(name)
        if mine is not None and theirs is not None and mine != theirs:
            raise ValueError(f"{path}: config: {name}: {shown(mine)}, but {shown(theirs)} in the {BESIDE} beside it")
        out[name] = theirs if mine is None else mine
    return out


def _site(config: dict, path: Path, *given: int | None) -> list[int | None]:
    """(layer, head): given, or as the configuration or the folder's name says."""
    named, found = site_of(path.parent) or (None, None), []
    for name, value, at in zip(("layer", "head"), given, named, strict=True):
        said = config[name]
        if value is None and None not in (said, at) and said != at:
            raise ValueError(
                f"{path}: config: {name}: {said}, but its folder's name says {at}; load_published(path, layer=, head=) "
                "says which"
            )
        found.append(next((x for x in (value, said, at) if x is not None), None))
    return found


def _batchtopk(state: dict, config: dict) -> bool:
    """The publisher's JumpReLU and Gated keep the flag too, and do not look at it."""
    return bool(config["use_batchtopk"]) and not _OWN & set(state)


def _layout(state: dict, config: dict, path: Path) -> str:
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
        found = kind, next(iter(names & _OWN), None)
        if _TYPES.get(config["sae_type"], found) != found:
            tensors = f"a {kind} dictionary" + (f" with {found[1]}" if found[1] else "")
            raise ValueError(f"{path}: config: sae_type: {config['sae_type']}, but its tensors are those of {tensors}")
        return kind
    raise ValueError(f"{path}: no known layout has exactly the tensors {', '.join(sorted(names))}")


def _sizes(state: dict, kind: str, K: int | None, V: int | None, config: dict, path: Path) -> tuple[int, int, int, int]:
    """(F, K, V, r), every tensor's shape and every size given checked against them."""
    first = next(state[n] for n in ("b_enc", "b_mag", "encoder.bias") if n in state)
    F = first.shape[0] if first.ndim else 0
    given = {"K": {"d_k": config["d_k"], "K": K}, "V": {"d_v": config["d_v"], "V": V}}
    r, factored, found = 1, False, {}
    for size, names in (("K", _KEY_SIDE), ("V", _VALUE_SIDE)):
        factors = [(n, state[n]) for n in names if n in state]
        for name, x in factors:
            if x.ndim not in (2, 3):
                raise ValueError(f"{path}: {name}: expected shape (F, r, {size}), got {x.shape}")
            r, factored = x.shape[1] if x.ndim == 3 else 1, True
        told = {what: x for what, x in given[size].items() if x is not None}
        found[size] = factors[0][1].shape[-1] if factors else next(reversed(told.values()), None)
        if found[size] is None:
            raise ValueError(f"{path}: a {kind} dictionary does not say its head's sizes: pass K and V")
        for what, x in told.items():
            if x != found[size]:
                holder = factors[0][0] if factors else "the other"
                raise ValueError(f"{path}: {what}: {x}, but {holder} says {size} = {found[size]} (K and V swapped?)")
    K, V = found["K"], found["V"]
    for name, x in (("n_features", F), ("d_in", K * V), ("rank", r if factored else None)):
        if None not in (config[name], x) and config[name] != x:
            raise ValueError(f"{path}: config: {name}: {config[name]}, but its tensors say {x}")
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


def _threshold(
    file: TorchFile, state: dict, config: dict, given: str | float | None
) -> tuple[Tensor | float | None, str | None]:
    """(threshold, how atoms are chosen) of a BatchTopK dictionary, the threshold None for top k; else (None, None)."""
    path = file.path
    if not _batchtopk(state, config):
        if given is not None:
            raise ValueError(f"batchtopk: expected None, {path} is no BatchTopK dictionary; got {shown(given)}")
        if "threshold" in state:
            raise ValueError(f"{path}: threshold: only a BatchTopK dictionary has one, and config has no use_batchtopk")
        return None, None
    if given == "topk":
        return None, f"plain top-k, k = {config['k']}"
    if given is not None:
        return float(given), "threshold given"
    if "threshold" in state:
        return file.read(state["threshold"]), "threshold of the checkpoint"
    own = config["threshold"]
    if own is None:
        raise ValueError(
            f"{path}: a BatchTopK dictionary without a threshold, so how it chooses atoms must be said (batchtopk=, "
            f'--batchtopk): "topk" for the k = {config["k"]} largest of each state, or a number for a threshold; '
            "estimate_threshold finds one, given states and the dictionary loaded as topk"
        )
    if not is_number(own) or own < 0:
        raise ValueError(f"{path}: config: threshold: expected a finite number >= 0, got {shown(own)}")
    return float(own), "threshold of the checkpoint"


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
