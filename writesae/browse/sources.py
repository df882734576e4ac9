"""Which dictionaries, model and vocabulary belong to a store, found without loading torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..collect.store import Store
from ..untrusted import first_line, is_integer, read_json
from . import words
from .words import Words

_BEST = "best.pt"
_PUBLISHED = re.compile(r"L(\d{1,6})_H(\d{1,6})")


def text(x) -> str | None:
    return x if isinstance(x, str) else None


def count(x) -> int:
    """A number that a summary should hold; 0 where a damaged one holds something else."""
    return x if is_integer(x) else 0


def mapping(x) -> Mapping:
    return x if isinstance(x, Mapping) else {}


def files(folder: Path) -> list[Path]:
    names = ("cfg.json", "sae.safetensors", "config.json", _BEST)
    return [folder / name for name in names if (folder / name).is_file()] if folder.is_dir() else [folder]


def model_files(model: str | None) -> list[Path]:
    """Files that decide a model's weights; none of one that is not on this machine."""
    from ..default import FOLDER

    if model is None:
        return []
    folder = FOLDER / "model" if model == "default" else Path(model).expanduser()
    return sorted(path for ending in ("config.json", "*.safetensors") for path in folder.glob(ending) if path.is_file())


def model(store: Store, model) -> str | None:
    """The model for promoted tokens: the one given, or the store's if its files are here."""
    if model is not None:
        return str(model)
    named = text(mapping(store.manifest.get("named")).get("model"))
    if named == "default" or (named and "\0" not in named and (Path(named).expanduser() / "config.json").is_file()):
        return named
    return None


def dictionaries(store: Store, sae, notes: list[str]) -> dict[tuple[int, int], Path]:
    """{(layer, head): folder} of the store's sites."""
    from ..default import dictionaries as embedded

    sites = set(store.sites)
    if sae is None:
        source = mapping(store.manifest.get("source"))
        if text(mapping(store.manifest.get("named")).get("model")) == "default":
            for target in ("state", "write"):
                found = embedded(target)
                if sites <= set(found) and _all_own(store, {site: found[site] for site in sites}, source):
                    return {site: found[site] for site in store.sites}
        notes.append("atoms: no dictionaries were given (--sae)")
        return {}
    if str(sae) in ("default", "default-writes"):
        given = embedded("state" if str(sae) == "default" else "write")
    else:
        given = _inside(Path(sae))
    found = {site: given[site] for site in store.sites if site in given}
    if not found:
        some = ", ".join(f"{a}:{b}" for a, b in list(given)[:8]) or "none"
        raise ValueError(f"sae: expected dictionaries of the store's sites in {sae}, got those of {some}")
    missing = [site for site in store.sites if site not in found]
    if missing:
        notes.append(f"atoms: no dictionary of {len(missing)} sites, the first {missing[0][0]}:{missing[0][1]}")
    return found


def _all_own(store: Store, found: Mapping[tuple[int, int], Path], source: Mapping) -> bool:
    """Whether these are what the store was collected with, by what their configuration says."""
    for (layer, head), folder in found.items():
        size = store.features_of(layer, head)
        if f"dictionary {layer}:{head}" not in source or read_json(folder / "cfg.json").get("d_sae") != size:
            return False
    return True


def _inside(folder: Path) -> dict[tuple[int, int], Path]:
    """Dictionaries of a folder: it holds one, or a folder each."""
    if not folder.exists():
        raise ValueError(f"sae: expected a dictionary or a folder of them, got {folder}, which is not there")
    own = (folder / "cfg.json").is_file() or (folder / _BEST).is_file()
    found: dict[tuple[int, int], Path] = {}
    for path in [folder] if own else sorted(x for x in folder.iterdir() if x.is_dir()):
        if (path / "cfg.json").is_file():
            config = read_json(path / "cfg.json")
            layer, head = config.get("layer"), config.get("head")
        elif (path / _BEST).is_file():
            match = _PUBLISHED.fullmatch(path.name)
            layer, head = (int(match[1]), int(match[2])) if match else (None, None)
        else:
            continue
        if layer is None or head is None or not (is_integer(layer) and is_integer(head)):
            raise ValueError(f"sae: {path} does not say its layer and head")
        if (layer, head) in found:
            raise ValueError(f"sae: expected one dictionary a site, got two of {layer}:{head}")
        found[layer, head] = path
    return found


def load(path: Path, site: tuple[int, int], F: int):
    from ..sae import SAE

    try:
        sae = SAE.from_pretrained(path)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"sae: {first_line(error)}") from error
    if sae.F != F:
        raise ValueError(f"sae: expected {F} features at {site[0]}:{site[1]}, as the store has, got {sae.F} in {path}")
    return sae.eval()


def require_own(store: Store, sae, site: tuple[int, int]) -> None:
    """Raises ValueError for a dictionary other than the one whose firings the store holds."""
    from ..models.identity import weights_digest

    known = mapping(store.manifest.get("source")).get(f"dictionary {site[0]}:{site[1]}")
    if known is not None and known != weights_digest(sae):
        raise ValueError(
            f"sae: expected the dictionary of {site[0]}:{site[1]} that the store was collected with, got another"
        )


def vocabulary(store: Store) -> Words:
    """Of the store's own tokenizer; of none, ids are shown as numbers."""
    names = store.tokenizer_files()
    if "tokenizer/tokenizer.json" in names:
        made = words.from_file(store.file("tokenizer/tokenizer.json"))
        if made is not None:
            return made
        config = read_json(store.file("tokenizer/tokenizer.json"), 2**28, strict=False)
        size = len(mapping(mapping(config.get("model")).get("vocab"))) + len(config.get("added_tokens") or [])
        return words.by_decoding(store.tokenizer(), size)
    return Words([])
