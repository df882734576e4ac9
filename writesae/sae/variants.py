"""Several dictionaries a site from one pass of the model: which settings may differ, and what each is called."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from .config import TrainConfig

# What the passes of a model and the data of a step depend on is the same for all.
SHARED = ("steps", "states", "passages", "block", "uses", "prepare", "text_seed", "target", "metric")
_FIELDS = {f.name: f for f in fields(TrainConfig)}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")


def check_variants(configs: Mapping[str, TrainConfig]) -> dict[str, TrainConfig]:
    """The same, if they can be trained in one pass.

    Raises:
        ValueError: none; a name that no folder should have; a setting that differs and has to be shared.
    """
    if not configs:
        raise ValueError("variants: expected at least one, got none")
    first = next(iter(configs.values()))
    for name, config in configs.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"variants: expected names of letters, digits and _ . + -, got {name!r}")
        for shared in SHARED:
            one, other = getattr(first, shared), getattr(config, shared)
            if one != other:
                raise ValueError(f"variants: expected one {shared} for all, got {one!r} and {other!r} ({name})")
        if config.drawn_by != first.drawn_by:
            raise ValueError(
                f"text_seed: variants of several seeds see the same text, so expected one, got {first.drawn_by} and "
                f"{config.drawn_by} ({name})"
            )
    return dict(configs)


def combined(base: TrainConfig, lists: Mapping[str, Sequence]) -> dict[str, TrainConfig]:
    """Every combination of the lists' values over `base`; named by the settings that have several, such as k16-F2048.

    With several seeds the text is drawn by `base.text_seed`, or the first of them.

    Raises:
        ValueError: a setting that has to be shared, a value twice, and what `TrainConfig` raises.
    """
    several = {name: list(values) for name, values in lists.items() if len(values) > 1}
    single = {name: values[0] for name, values in lists.items() if len(values) == 1}
    for name, values in several.items():
        if len(set(values)) < len(values):
            raise ValueError(f"{name}: expected different values, got {', '.join(map(str, values))}")
    choices = [dict(zip(several, values, strict=True)) for values in itertools.product(*several.values())]
    return _variants(replace(base, **single), choices)


def named(base: TrainConfig, texts: Sequence[str]) -> dict[str, TrainConfig]:
    """Variants written as "k=16,F=2048" over `base`.

    Raises:
        ValueError: what is no such text; a setting there is none of, or that has to be shared; two of one name.
    """
    choices = []
    for text in texts:
        choice = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name not in _FIELDS or name in SHARED or not value:
                known = ", ".join(n for n in _FIELDS if n not in SHARED)
                raise ValueError(f"variant: expected NAME=VALUE,... of {known}, got {text!r}")
            choice[name] = _value(name, value, text)
        choices.append(choice)
    return _variants(base, choices)


def _variants(base: TrainConfig, choices: list[dict]) -> dict[str, TrainConfig]:
    if base.text_seed is None:
        base = replace(base, text_seed=next((c["seed"] for c in choices if "seed" in c), None))
    found: dict[str, TrainConfig] = {}
    for choice in choices:
        name = "-".join(f"{x}{'_' if isinstance(value, str) else ''}{value}" for x, value in choice.items())
        if name in found:
            raise ValueError(f"variant: expected each once, got {name} twice")
        found[name] = replace(base, **choice)
    return found if set(found) == {""} else check_variants(found)


def _value(name: str, text: str, whole: str):
    default = getattr(TrainConfig, name)
    kind: type = type(default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"variant: {name}: expected {kind.__name__}, got {text!r} in {whole!r}") from None
