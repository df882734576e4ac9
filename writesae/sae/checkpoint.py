"""Files of dictionaries: our own folder (`cfg.json` + `sae.safetensors`), and published `best.pt` checkpoints.

Neither ever runs code from a file: safetensors holds tensors only, and `.pt` files load with `weights_only=True`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import __version__
from .sae import SAE

FORMAT = 1
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_KEYS = {
    "format", "writesae_version", "kind", "d_sae", "k", "K", "V", "r", "sparsity", "layer", "head", "model", "centred",
    "dtype", "training", "metrics",
}  # fmt: skip
_OPTIONAL = {"training", "metrics", "model"}


def save(sae: SAE, folder: str | Path) -> None:
    """Writes a dictionary; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT, "writesae_version": __version__, "kind": sae.kind, "d_sae": sae.F, "k": sae.k, "K": sae.K,
        "V": sae.V, "r": sae.r, "sparsity": sae.sparsity, "layer": sae.layer, "head": sae.head, "model": sae.model,
        "centred": sae.centred, "dtype": str(sae.b_enc.dtype).removeprefix("torch."), "training": sae.training_record,
        "metrics": sae.metrics,
    }  # fmt: skip
    tensors = {name: x.detach().contiguous() for name, x in sae.state_dict().items()}
    partial = folder / (WEIGHTS + ".partial")
    save_file(tensors, partial)
    partial.replace(folder / WEIGHTS)
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(config, indent=2) + "\n")
    partial.replace(folder / CONFIG)


def load(path_or_repo: str | Path, subfolder: str | None = None, revision: str | None = None) -> SAE:
    """See `SAE.from_pretrained`."""
    path = Path(path_or_repo).expanduser()
    if path.is_file():
        return load_published(path)
    if not path.is_dir():
        path = _download(str(path_or_repo), subfolder, revision)
    folder = path / subfolder if subfolder else path
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
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
    try:
        config = json.loads((folder / CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG}: not JSON: {error}") from error
    if not isinstance(config, dict) or "format" not in config:
        raise ValueError(f"{folder / CONFIG}: not a writesae dictionary (no key format)")
    if config["format"] != FORMAT:
        raise ValueError(
            f"{folder / CONFIG}: format {config['format']} (written by writesae {config.get('writesae_version')}), "
            f"but writesae {__version__} reads format {FORMAT}"
        )
    if unknown := sorted(set(config) - _KEYS):
        raise ValueError(f"{folder / CONFIG}: unknown keys {', '.join(unknown)}")
    if missing := sorted(_KEYS - _OPTIONAL - set(config)):
        raise ValueError(f"{folder / CONFIG}: missing keys {', '.join(missing)}")
    if config["dtype"] not in ("float32", "float64", "bfloat16", "float16"):
        raise ValueError(f"{folder / CONFIG}: dtype: expected a floating dtype, got {config['dtype']!r}")
    try:
        sae = SAE(
            config["K"], config["V"], config["d_sae"], config["k"], config["kind"], config["r"], config["sparsity"],
            config["layer"], config["head"], config.get("model"), config["centred"], config.get("training"),
            config.get("metrics"),
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: not a readable safetensors file: {error}") from error
    return _fill(sae.to(getattr(torch, config["dtype"])), tensors, folder / WEIGHTS)


def _fill(sae: SAE, tensors: dict[str, Tensor], source: Path) -> SAE:
    """Puts tensors into a dictionary, refusing what does not fit by name."""
    own = sae.state_dict()
    if unknown := sorted(set(tensors) - set(own)):
        raise ValueError(f"{source}: unknown tensors {', '.join(unknown)} for kind {sae.kind}")
    if missing := sorted(set(own) - set(tensors)):
        raise ValueError(f"{source}: missing tensors {', '.join(missing)} for kind {sae.kind}")
    for name, x in tensors.items():
        if x.shape != own[name].shape:
            raise ValueError(f"{source}: {name}: expected shape {tuple(own[name].shape)}, got {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{source}: {name}: expected finite values, got a NaN or infinity")
    sae.load_state_dict(tensors)
    return sae.eval().requires_grad_(False)


# ---- published checkpoints ------------------------------------------------------------------------------------------

_PUBLISHED = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", "V", "W", "bias", "V_enc", "W_enc",
              "b_enc", "V_dec", "W_dec", "b_gate", "b_mag", "r_mag", "log_threshold", "threshold",
              "steps_since_active"}  # fmt: skip


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
    its training estimated.

    Args:
        path: the file.
        K, V: sizes of the head, where the file does not say (flat dictionaries).
        layer, head: the site, default from the file's config.
        threshold: of a BatchTopK dictionary, default the file's own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that needs unpickling, an unknown layout, or sizes that contradict each other.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn, foreign or code-carrying file: torch has many ways of saying so
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: refused: it is not a checkpoint of plain tensors and numbers. Loading it would mean unpickling, "
            f"which can run any code the file carries ({cause})"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model_state_dict"), dict):
        raise ValueError(f"{path}: expected a dict with model_state_dict, got {type(content).__name__}")
    state, config = content["model_state_dict"], content.get("config") or {}
    if unknown := sorted(set(state) - _PUBLISHED):
        raise ValueError(f"{path}: unknown tensors {', '.join(unknown)}")
    state = {
        name: x[:, None] if name in ("V", "W", "V_enc", "W_enc", "V_dec", "W_dec") and x.ndim == 2 else x
        for name, x in state.items()
    }  # older files have no rank axis
    kind = _published_kind(state, path)
    F = len(state.get("b_enc", state.get("b_mag", state.get("encoder.bias"))))
    factors = [state[n] for n in ("V_dec", "V", "V_enc") if n in state], [
        state[n] for n in ("W_dec", "W", "W_enc") if n in state
    ]
    K = factors[0][0].shape[-1] if factors[0] else K if K is not None else config.get("d_k")
    V = factors[1][0].shape[-1] if factors[1] else V if V is not None else config.get("d_v")
    if K is None or V is None:
        raise ValueError(f"{path}: a {kind} dictionary does not say its head's sizes: pass K and V")
    r = factors[0][0].shape[1] if factors[0] else 1
    b_enc = state.get("b_enc", state.get("encoder.bias"))
    tensors, cut = {}, None
    if kind in ("bilinear", "bilinear_flat"):
        tensors.update(v_enc=state["V_enc"], w_enc=state["W_enc"])
    elif kind in ("matrix", "flat"):
        tensors["W_enc"] = state["encoder.weight"]
    if "log_threshold" in state:
        cut = state["log_threshold"].exp()
    elif "b_gate" in state:
        # mag = e^r x + b_mag and gate = x + b_gate > 0: one pre-activation e^r x + b_mag above b_mag - e^r b_gate.
        gain = state["r_mag"].exp()
        b_enc, cut = state["b_mag"], (state["b_mag"] - gain * state["b_gate"]).clamp_min(0)
        tensors["v_enc"] = tensors["v_enc"] * gain[:, None, None]
    elif config.get("use_batchtopk"):
        threshold = state.get("threshold", config.get("threshold")) if threshold is None else threshold
        if threshold is None:
            raise ValueError(f"{path}: a BatchTopK dictionary without its threshold: pass threshold=")
        cut = torch.as_tensor(threshold, dtype=torch.float32).expand(F).clone()
    if kind in ("bilinear", "bilinear_tied"):
        tensors.update(v_dec=state["V_dec"], w_dec=state["W_dec"], bias=state["bias"])
    elif kind == "matrix":
        tensors.update(v_dec=state["V"], w_dec=state["W"], bias=state["bias"])
    else:
        tensors.update(W_dec=state["decoder.weight"].T, bias=state["decoder.bias"].reshape(-1))
        if tensors["bias"].numel() != K * V:
            raise ValueError(f"{path}: decoder.bias: expected K*V = {K * V} entries, got {tensors['bias'].numel()}")
        tensors["bias"] = tensors["bias"].view(K, V)
    tensors.update(b_enc=b_enc, mean=torch.zeros(K, V))
    if cut is not None:
        tensors["threshold"] = cut
    tensors = {name: x.float().contiguous() for name, x in tensors.items()}
    layer, head = (config.get(n) if x is None else x for n, x in (("layer", layer), ("head", head)))
    record = {n: content[n] for n in ("epoch", "step", "val_mse") if isinstance(content.get(n), (int, float))}
    k = min(int(config.get("k", 32)), F)
    sae = SAE(int(K), int(V), F, k, kind, r, "topk" if cut is None else "threshold", layer, head, None, False, record)
    return _fill(sae, tensors, path)


def _published_kind(state: dict, path: Path) -> str:
    layouts = {
        "bilinear": {"V_enc", "W_enc", "V_dec", "W_dec", "bias"},
        "bilinear_tied": {"V_dec", "W_dec", "bias", "b_enc"},
        "bilinear_flat": {"V_enc", "W_enc", "b_enc", "decoder.weight", "decoder.bias"},
        "matrix": {"encoder.weight", "encoder.bias", "V", "W", "bias"},
        "flat": {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"},
    }
    for kind, needed in layouts.items():
        if needed <= set(state):
            if kind == "bilinear" and "b_enc" not in state and not {"b_gate", "b_mag", "r_mag"} <= set(state):
                continue
            return kind
    raise ValueError(f"{path}: no known layout has exactly the tensors {', '.join(sorted(state))}")
