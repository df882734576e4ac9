"""Hooks into transformers models: `attach`, `load`, `stopping_after`, and the seam under them, `hf_gated_delta`."""

from . import hf_gated_delta
from .attach import attach
from .load import load
from .model_call import Stopped
from .stopping import stopping_after
from .tap import Tap

__all__ = ["Stopped", "Tap", "attach", "hf_gated_delta", "load", "stopping_after"]
