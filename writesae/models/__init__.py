"""Hooks into transformers models: `attach`, `load`, `stopping_after`; and the seam under them, `layers`, `intercept`,
`running`, with a table a family of models (`Binding`, `fla`, `hf_gated_delta`, `hf_kda`, `hf_mamba`, `hf_mamba2`,
`hf_minimax`, `mamba_ssm`)."""

# fla before hf_gated_delta, which takes layers of any file that call a function of its names.
from . import fla, hf_gated_delta, hf_kda, hf_mamba, hf_mamba2, hf_minimax, mamba_ssm
from .attach import attach
from .binding import Binding, LayerSite
from .frame import running
from .load import load
from .model_call import Stopped
from .run_with_sae import SAERun, run_with_sae
from .seam import intercept, intercept_conv
from .sites import layers
from .stopping import stopping_after
from .tap import Tap

__all__ = [
    "Binding", "LayerSite", "SAERun", "Stopped", "Tap", "attach", "fla", "hf_gated_delta", "hf_kda", "hf_mamba",
    "hf_mamba2", "hf_minimax", "intercept", "intercept_conv", "layers", "load", "mamba_ssm", "run_with_sae", "running",
    "stopping_after",
]  # fmt: skip
