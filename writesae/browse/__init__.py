"""The feature browser: a store, its dictionaries and its model as pages."""

from .atlas import Atlas, FeaturePage
from .links import link
from .sample import sample_store
from .table import FeatureTable

__all__ = ["Atlas", "FeaturePage", "FeatureTable", "link", "sample_store"]
