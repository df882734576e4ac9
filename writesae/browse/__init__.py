"""Looking at features: a local web page over a store and its dictionaries, or the same as files to host anywhere."""

from .links import link

__all__ = ["link"]
