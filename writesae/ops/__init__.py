"""The operators: write rules with their writes, snapshots and edits, and the encoder of writes."""

from .causal_conv import causal_conv
from .dplr import dplr
from .encode import Codes, activations, encode
from .gated_delta_rule import (
    GatedDeltaRuleStepOutput,
    first_nonfinite,
    gated_delta_rule,
    gated_delta_rule_step,
)
from .loss import factored_loss
from .pursuit import pursuit
from .rms_norm import rms_norm
from .rule import Rule, RuleCall, RuleOutput
from .sae_training import Step, training_loss
from .selective_scan import selective_scan
from .ssd import ssd

__all__ = [
    "Codes",
    "GatedDeltaRuleStepOutput",
    "Rule",
    "RuleCall",
    "RuleOutput",
    "Step",
    "activations",
    "causal_conv",
    "dplr",
    "encode",
    "factored_loss",
    "first_nonfinite",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "pursuit",
    "rms_norm",
    "selective_scan",
    "ssd",
    "training_loss",
]
