"""Hooks into transformers models: `attach` and `load`, and the seam under them, `hf_gated_delta`."""

from . import hf_gated_delta
from .attach import attach
from .load import load
from .tap import Tap

__all__ = ["Tap", "attach", "hf_gated_delta", "load"]
