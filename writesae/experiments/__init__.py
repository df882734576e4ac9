"""Experiments on a model's memory: the replacement test, the engine that runs its forks, its statistics."""

from . import conditions, engine, replace, statistics
from .engine import ForkEngine, Places
from .replace import Passage, passages_of, run_replacement
from .result import ReplacementResult

__all__ = [
    "ForkEngine", "Passage", "Places", "ReplacementResult", "conditions", "engine", "passages_of", "replace",
    "run_replacement", "statistics",
]  # fmt: skip
