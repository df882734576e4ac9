"""Hooks into transformers models: `attach` (record, encode, edit), `load`, and the seam under them, `hf_gated_delta`."""

from . import hf_gated_delta

__all__ = ["hf_gated_delta"]
