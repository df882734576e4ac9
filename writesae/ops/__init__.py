"""The operators: write rules with their writes, snapshots and edits, and the encoder of writes."""

from .encode import Codes, activations, encode
from .gated_delta_rule import GatedDeltaRuleOutput, gated_delta_rule
from .loss import factored_loss

__all__ = ["Codes", "GatedDeltaRuleOutput", "activations", "encode", "factored_loss", "gated_delta_rule"]
