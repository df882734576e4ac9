"""The rank-1 writes of matrix-state language models, encoded, collected and edited inside a fast forward pass."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # what `__getattr__` finds, for type checkers
    from . import atoms, collect, experiments, models, ops, report, sae
    from .collect import Store
    from .default import load_default
    from .edits import Edits
    from .experiments.audit import audit
    from .firings import Firings
    from .models.attach import attach
    from .models.run_with_sae import run_with_sae
    from .policies import Amplify, Clamp, Erase, Install, Policy, Scale
    from .sae import SAE, push_to_hub
    from .writes import Writes

__all__ = [
    "SAE",
    "Amplify",
    "Clamp",
    "Edits",
    "Erase",
    "Firings",
    "Install",
    "Policy",
    "Scale",
    "Store",
    "Writes",
    "__version__",
    "atoms",
    "attach",
    "audit",
    "collect",
    "experiments",
    "load_default",
    "models",
    "ops",
    "push_to_hub",
    "report",
    "run_with_sae",
    "sae",
]

# Where a name is defined; every other public name is a module of its own.
_HOME = {
    "Writes": "writesae.writes",
    "Firings": "writesae.firings",
    "Edits": "writesae.edits",
    "SAE": "writesae.sae",
    "push_to_hub": "writesae.sae",
    "attach": "writesae.models",
    "audit": "writesae.experiments.audit",
    "run_with_sae": "writesae.models",
    "load_default": "writesae.default",
    "Store": "writesae.collect",
    **dict.fromkeys(("Amplify", "Clamp", "Erase", "Install", "Policy", "Scale"), "writesae.policies"),
}


def __getattr__(name: str):
    """Public names load on first use, so that `import writesae` needs neither transformers nor a compiled library."""
    if name not in __all__:
        raise AttributeError(f"module 'writesae' has no attribute {name!r}")
    home = _HOME.get(name)
    value = import_module(f"writesae.{name}") if home is None else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
