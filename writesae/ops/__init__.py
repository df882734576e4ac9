"""The operators: write rules with their writes, snapshots and edits, and the encoder of writes."""

from .gated_delta_rule import GatedDeltaRuleOutput, gated_delta_rule

__all__ = ["GatedDeltaRuleOutput", "gated_delta_rule"]
