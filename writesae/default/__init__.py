"""The embedded default: a small language model, one dictionary, and the split of the standard library behind both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..sae import SAE

FOLDER = Path(__file__).parent
_FOLDERS = {"state": "sae", "write": "writes"}


class Default(NamedTuple):
    """What `load_default` returns; unpacks as `model, tokenizer, saes`.

    Attributes:
        model: the language model, of transformers, float32, in eval mode.
        tokenizer: its tokenizer, of transformers.
        saes: `{(layer, head): dictionary}`, as `attach` takes it.
    """

    model: Any
    tokenizer: Any
    saes: dict[tuple[int, int], SAE]


def load_default(target: str = "state") -> Default:
    """The small language model inside the package, its tokenizer and its dictionaries. Nothing is downloaded.

        model, tokenizer, saes = writesae.load_default()

    Args:
        target: the dictionary of "state" (one), or those of "write" (of the heads with the longest memory).

    Raises:
        ValueError: another target.
    """
    from ..models import load

    model, tokenizer = load("default")
    return Default(model, tokenizer, load_dictionaries(target))


def load_dictionaries(target: str = "state") -> dict[tuple[int, int], SAE]:
    """{(layer, head): dictionary} of the embedded ones, see `dictionaries`."""
    from ..sae import SAE

    return {site: SAE.from_pretrained(path) for site, path in dictionaries(target).items()}


def dictionaries(target: str = "state") -> dict[tuple[int, int], Path]:
    """{(layer, head): folder} of the embedded dictionaries of states, or of writes."""
    if target not in _FOLDERS:
        raise ValueError(f"target: expected one of {', '.join(_FOLDERS)}, got {target!r}")
    found = {}
    for path in sorted((FOLDER / _FOLDERS[target]).glob("L*H*")):
        layer, head = path.name[1:].split("H")
        found[int(layer), int(head)] = path
    return found


def families() -> dict[str, Path]:
    """{family: folder} of the small trained models on other write rules, for `writesae.models.load(folder)`.

    Stacks of recurrent layers alone, trained on the same text with the same tokenizer as the default model, each for
    about half an hour: stand-ins to run a method on, not models to draw conclusions from. `training.json` in each
    folder says how well it does beside counts of one and two tokens.
    """
    return {path.parent.name: path.parent for path in sorted((FOLDER / "families").glob("*/config.json"))}
