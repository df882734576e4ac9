"""The operators: write rules with their writes, snapshots and edits, and the encoder of writes."""

from .causal_conv import causal_conv
from .dplr import RULE as _dplr
from .dplr import dplr, dplr_step
from .encode import Codes, activations, encode
from .gated_delta_rule import RULE as _delta
from .gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from .loss import factored_loss
from .nonfinite import first_nonfinite
from .pursuit import pursuit
from .rms_norm import rms_norm
from .rule import Rule, RuleCall, RuleOutput, RuleStepOutput
from .sae_training import Step, training_loss
from .selective_scan import RULE as _selective
from .selective_scan import selective_scan, selective_scan_step
from .ssd import RULE as _ssd
from .ssd import ssd, ssd_step

RULES: dict[str, Rule] = {rule.name: rule for rule in (_delta, _ssd, _dplr, _selective)}

__all__ = [
    "Codes",
    "RULES",
    "Rule",
    "RuleCall",
    "RuleOutput",
    "RuleStepOutput",
    "Step",
    "activations",
    "causal_conv",
    "dplr",
    "dplr_step",
    "encode",
    "factored_loss",
    "first_nonfinite",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "pursuit",
    "rms_norm",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
    "training_loss",
]
