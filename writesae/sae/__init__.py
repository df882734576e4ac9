"""Dictionaries of a head's state: the SAE itself, its training from streamed writes, its evaluation, its files."""

from .checkpoint import load_published
from .evaluate import evaluate, fvu
from .hub import available, load_set, push_to_hub
from .pools import Pools
from .sae import KINDS, SAE, SparseCodes
from .stream import ModelStream, Passages
from .threshold import estimate_threshold
from .train import TrainConfig, Trainer

__all__ = [
    "KINDS",
    "SAE",
    "ModelStream",
    "Passages",
    "Pools",
    "SparseCodes",
    "TrainConfig",
    "Trainer",
    "available",
    "estimate_threshold",
    "evaluate",
    "fvu",
    "load_published",
    "load_set",
    "push_to_hub",
]
