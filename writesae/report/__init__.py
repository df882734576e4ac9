"""Reports: plain data (a run's folder, or dicts and numpy columns) to pictures and one page. Never loads a model."""

from . import audit, paper, plots, recovered
from .html import build
from .load import load_run

__all__ = ["audit", "build", "load_run", "paper", "plots", "recovered"]
