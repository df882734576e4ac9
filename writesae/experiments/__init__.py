"""Experiments on a model's memory: the replacement test, the engine that runs its forks, its statistics."""

from . import conditions, engine, nulls, replace, sites, statistics
from .engine import ForkEngine, Places
from .replace import Passage, passages_of, run_replacement
from .result import ReplacementResult

__all__ = [
    "ForkEngine", "Passage", "Places", "ReplacementResult", "conditions", "engine", "nulls", "passages_of",
    "replace", "run_replacement", "sites", "statistics",
]  # fmt: skip
