"""Experiments on a model's memory: the replacement test, its engine and statistics; the loss recovered, closed loop."""

from . import conditions, engine, nulls, recovered, recovered_rule, replace, sites, statistics
from .engine import ForkEngine, Places
from .recovered import run_recovered
from .recovered_result import RecoveredResult
from .replace import Passage, passages_of, run_replacement
from .result import ReplacementResult

__all__ = [
    "ForkEngine", "Passage", "Places", "RecoveredResult", "ReplacementResult", "conditions", "engine", "nulls",
    "passages_of", "recovered", "recovered_rule", "replace", "run_recovered", "run_replacement", "sites", "statistics",
]  # fmt: skip
