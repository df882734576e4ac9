"""Collection: text to firings on disk, and the store that answers questions about them.

The store needs nothing but pyarrow, so that reading firings works where no model can run; the collecting side loads on
first use.
"""

from importlib import import_module

from .store import Context, Store

_LATER = {
    "collect": "collect.run",
    "collect_on_ray": "collect.on_ray",
    "Corpus": "text.corpus",
    "ModelSource": "collect.source",
    "Site": "collect.source",
    "build_index": "collect.finish",
    "merge": "collect.merging",
}

__all__ = ["Context", "Store", *_LATER]


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module 'writesae.collect' has no attribute {name!r}")
    value = getattr(import_module(f"writesae.{_LATER[name]}"), name)
    globals()[name] = value
    return value
