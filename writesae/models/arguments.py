"""The arguments of models, layers and recurrences, read by their role: the one place that knows each release's names.

transformers renamed what holds the past twice (`past_key_values` in models and `cache_params` in linear layers up to
5.23, `cache` in both since 5.24, which still takes the old names); more will follow. What cannot be read is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping

import transformers
from torch import Tensor

from ..ops._dispatch import say_once
from .versions import TESTED

# role -> the names it goes by, the newest of transformers first, then those of mamba-ssm
NAMES = {
    "cache": ("cache", "past_key_values", "cache_params", "inference_params"),
    "attention_mask": ("attention_mask",),
    "position_ids": ("position_ids",),
    "hidden_states": ("hidden_states", "u", "x"),
    "cu_seq_lens": ("cu_seq_lens_q", "cu_seqlens"),
    "seq_idx": ("seq_idx",),
}
_CACHE_METHODS = ("get_seq_length", "update_recurrent_state", "has_previous_state")
_CACHE_COLUMNS = "seqlen_offset"  # of mamba-ssm's InferenceParams: how many columns it holds


class Reader:
    """Reads calls of one function by the roles of their arguments.

    Args:
        function: the function; its signature says what positions mean.
        where: its name in errors.
    """

    def __init__(self, function: Callable, where: str):
        self.where = where
        kinds = inspect.signature(function).parameters
        self.parameters = tuple(kinds)
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._positional = tuple(name for name, p in kinds.items() if p.kind in positional)

    def require(self, *roles: str) -> None:
        """Raises ValueError unless the function takes an argument of each of these roles by a name known here."""
        for role in roles:
            if not any(name in self.parameters for name in NAMES[role]):
                raise ValueError(
                    f"model: expected a forward of {self.where} that takes {' or '.join(NAMES[role])}, got "
                    f"({', '.join(self.parameters)}) from transformers {transformers.__version__} (tested: "
                    f"{', '.join(TESTED)}); nothing could be recorded rightly"
                )

    def name_of(self, role: str) -> str:
        """The name by which the function takes a role: the newest that its signature knows."""
        return next((name for name in NAMES[role] if name in self.parameters), NAMES[role][0])

    def handed_on(self, kwargs: dict) -> dict:
        """The same, with a cache given under a name newer than the function knows under its own name for it.

        A forward with **kwargs drops it else: flash-linear-attention 0.6 takes past_key_values, and `generate` of
        transformers 5.24 hands over `cache`, so that every token is decoded from that token alone. Says so once.
        """
        own = self.name_of("cache")
        for name in NAMES["cache"][: NAMES["cache"].index(own)]:
            if kwargs.get(name) is not None and kwargs.get(own) is None and own in self.parameters:
                say_once(
                    f"attach: transformers {transformers.__version__} hands its cache to {self.where} as {name!r}, "
                    f"which takes it as {own!r} and would leave it out; while attached it is handed on. Without, "
                    "cached decoding of this model is wrong: use a release of transformers that fits it"
                )
                kwargs = {**{key: value for key, value in kwargs.items() if key != name}, own: kwargs[name]}
        return kwargs

    def named(self, args: tuple, kwargs: dict) -> dict:
        """All that was given, by name; more positions than the signature has are left out (the call will fail)."""
        return {**dict(zip(self._positional, args, strict=False)), **kwargs}

    def __call__(self, args: tuple, kwargs: dict) -> dict:
        """`{role: value}` of what was given and is not None.

        Raises:
            ValueError: a cache under a name unknown here.
        """
        given = self.named(args, kwargs)
        found = {}
        for role, names in NAMES.items():
            for name in names:
                if given.get(name) is not None:
                    found[role] = given[name]
                    break
        for name, value in given.items():
            if name not in NAMES["cache"] and _is_cache(value):
                raise ValueError(
                    f"model: expected the cache of {self.where} as {', '.join(NAMES['cache'])}, got it as {name!r} "
                    f"(transformers {transformers.__version__}; tested: {', '.join(TESTED)})"
                )
        cache = found.get("cache")
        if cache is not None and not _is_cache(cache):
            raise ValueError(
                f"model: expected a transformers Cache for {self.where}, got {type(cache).__name__}, of which the "
                "columns it holds cannot be read"
            )
        return found


def cache_of(output):
    """The cache in a model's output, whatever its release calls it, or None."""
    return next((output[name] for name in NAMES["cache"] if name in output), None)


def given_cache(model, cache) -> dict:
    """The argument that hands a model a cache, `{name: cache}`, by the name of its release."""
    return {Reader(model.forward, type(model).__name__).name_of("cache"): cache}


def without_cache(model) -> dict:
    """The argument by which a model is told not to make a cache; nothing for one that uses what it is given alone."""
    parameters = Reader(model.forward, type(model).__name__).parameters
    return {} if "inference_params" in parameters else {"use_cache": False}


def _is_cache(value) -> bool:
    if value is None or isinstance(value, (Tensor, bool, int, float, str, list, tuple, dict)):
        return False
    return hasattr(value, _CACHE_COLUMNS) or any(callable(getattr(value, name, None)) for name in _CACHE_METHODS)


def rule_call(
    args: tuple,
    kwargs: Mapping,
    names: tuple[str, ...],
    optional: tuple[str, ...],
    known: Collection[str],
    changes: Collection[str],
) -> dict:
    """The arguments of one call of a recurrence by name.

    Args:
        args, kwargs: what it was called with.
        names: what has to be given, in the order in which the recurrence takes it; `optional`: what may follow them.
        known: what else is understood; `changes`: what is not and changes what is computed.

    Raises:
        ValueError: one is missing, or one is given that changes what is computed and is not known.
    """
    given = {**dict(zip(names + optional, args, strict=False)), **kwargs}
    missing = [name for name in names if given.get(name) is None]
    if missing or len(args) > len(names) + len(optional):
        raise ValueError(
            f"model: expected the recurrence to be called with {', '.join(names)} and then by name, got "
            + (f"no {', '.join(missing)}" if missing else f"{len(args)} positions")
            + f" (transformers {transformers.__version__}; tested: {', '.join(TESTED)})"
        )
    for name, value in given.items():
        if name in changes and value is not None and value is not False:
            understood = ", ".join(sorted({*names, *optional, *known}))
            raise ValueError(
                f"model: expected a recurrence called with {understood}, got {name}, which changes what it computes "
                f"(transformers {transformers.__version__}; tested: {', '.join(TESTED)})"
            )
    return given
