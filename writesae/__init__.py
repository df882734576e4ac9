"""The rank-1 writes of matrix-state language models, encoded, collected and edited inside a fast forward pass."""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "Writes": "writesae.writes",
    "Firings": "writesae.firings",
    "Edits": "writesae.edits",
    "SAE": "writesae.sae",
    "attach": "writesae.models",
    "Store": "writesae.collect",
    "ops": None,
    "models": None,
    "sae": None,
    "collect": None,
    "experiments": None,
    "report": None,
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    """Public names load on first use, so that `import writesae` needs neither transformers nor a compiled library."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'writesae' has no attribute {name!r}")
    home = _PUBLIC[name]
    value = import_module(f"writesae.{name}") if home is None else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_PUBLIC])
