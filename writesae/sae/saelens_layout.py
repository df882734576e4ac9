"""SAELens' folder of a dictionary, `cfg.json` + `sae_weights.safetensors`, of the architecture `writesae_bilinear`.

Written and read without SAELens, which reads the same folder once `writesae.bridges.saelens` is imported. The tensors
are those of our own folder, under the same names. SAELens (6.x; source: its `saes/sae.py` and
`loading/pretrained_sae_loaders.py`) keeps beside them a flat configuration and free `metadata`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from .. import __version__
from ..files import whole_file, write_text
from ..untrusted import is_integer, shown

if TYPE_CHECKING:
    from .sae import SAE

ARCHITECTURE = "writesae_bilinear"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYOUT = "6.54.12"  # the release of SAELens whose layout this is: it rewrites configurations that say less than 6
FIELDS = ("K", "V", "k", "kind", "r", "sparsity", "target", "centred", "layer", "head")  # ours, in its configuration
# What SAELens would do to a vector before our encoder sees it, and what it must be for this not to happen.
_LEFT_ALONE = {"normalize_activations": "none", "reshape_activations": "none", "apply_b_dec_to_input": False}


def configuration(sae: SAE) -> dict[str, Any]:
    """What SAELens keeps of a dictionary in `cfg.json`."""
    return {
        "architecture": ARCHITECTURE, "d_in": sae.K * sae.V, "d_sae": sae.F,
        "dtype": str(sae.b_enc.dtype).removeprefix("torch."), "device": "cpu", **_LEFT_ALONE,
        **{name: getattr(sae, name) for name in FIELDS},
        "metadata": {
            "sae_lens_version": LAYOUT, "model_name": sae.model, "writesae_version": __version__,
            "training": sae.training_record, "metrics": sae.metrics,
        },
    }  # fmt: skip


def save(sae: SAE, folder: str | Path) -> None:
    """Writes a dictionary as SAELens keeps one; each file appears whole or not at all, and never through a link."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(configuration(sae), indent=2, allow_nan=False) + "\n"
    tensors = {name: x.detach().contiguous() for name, x in sae.state_dict().items()}
    with whole_file(folder / WEIGHTS) as path:
        save_file(tensors, path)
    write_text(folder / CONFIG, text)


def is_saelens(config: dict) -> bool:
    """Whether a folder's `cfg.json` is SAELens' rather than ours."""
    return "architecture" in config and "format" not in config


def own_configuration(where: Path, config: dict, number: int) -> dict:
    """The configuration of our own folder, format `number`, that says the same.

    Raises:
        ValueError: another architecture, or one whose vectors SAELens changes before the encoder; names the file.
    """
    architecture = config["architecture"]
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"{where}: architecture: expected {ARCHITECTURE}, got {shown(architecture)}: a dictionary of SAELens over "
            "vectors, which does not say what matrix [K, V] they are; load it with sae_lens, and if they are the "
            "states of a head, writesae.bridges.saelens.from_saelens(sae, K=..., V=...) makes a flat one of it"
        )
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{where}: metadata: expected an object, got {shown(metadata)}")
    if missing := sorted({"d_in", "d_sae", *FIELDS} - set(config)):
        raise ValueError(f"{where}: missing keys {', '.join(missing)}")
    for name, value in _LEFT_ALONE.items():
        if config.get(name, value) != value:
            raise ValueError(f"{where}: {name}: expected {shown(value)}, got {shown(config[name])}")
    sizes = [config[name] for name in ("K", "V", "d_in")]
    if all(is_integer(x, 1) for x in sizes) and sizes[0] * sizes[1] != sizes[2]:
        raise ValueError(f"{where}: d_in: expected K * V = {sizes[0] * sizes[1]}, got {sizes[2]}")
    dtype = config.get("dtype", "float32")
    return {
        "format": number, "writesae_version": metadata.get("writesae_version") or __version__,
        "d_sae": config["d_sae"], "model": metadata.get("model_name"),
        "training": metadata.get("training"), "metrics": metadata.get("metrics"),
        "dtype": dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype,
        **{name: config[name] for name in FIELDS},
    }  # fmt: skip
