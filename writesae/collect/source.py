"""Where firings come from: a model with dictionaries attached. Anything with the same three members will do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..firings import Firings
from ..models.grid import check_activations
from ..models.identity import config_digest, model_name, require_same_model, weights_digest
from ..text.tokens import check_ids


@dataclass(frozen=True)
class Site:
    """A layer and head, its dictionary's features, and the most that fire a token (None: no fixed number)."""

    layer: int
    head: int
    features: int
    k: int | None


class Source(Protocol):
    """What `collect` asks of a model. Used as a context manager around the whole run.

    `fingerprint`: digests of everything that decides its firings, compared on resuming.
    """

    sites: list[Site]
    fingerprint: dict

    def __enter__(self): ...
    def __exit__(self, *error): ...
    def firings(self, tokens: Tensor, mask: Tensor) -> Firings:
        """Firings of one batch: tokens, mask `[B, T]` int64, padded right; `row` of a firing is the batch row."""

    # A source may have `names`, a dictionary that the manifest keeps for its readers. It may also have
    # `begin(tokens, mask)`, which returns a function that returns the firings. One that sets `asynchronous` (a model on
    # a device) is given the next batch before the last one's firings are asked for.


def begin(source: Source, tokens: Tensor, mask: Tensor) -> Callable[[], Firings]:
    """Begins a batch of a source; the firings are what the returned function returns."""
    if hasattr(source, "begin"):
        return source.begin(tokens, mask)
    found = source.firings(tokens, mask)
    return lambda: found


class ModelSource:
    """A Hugging Face model with one dictionary a site.

    Args:
        model: any model `writesae.attach` knows, in eval mode.
        dictionaries: {(layer, head): SAE}.
        accelerate: run the model's recurrences on this package's own op.
        any_model: also with dictionaries that name another model.
        name: what the model was loaded as, default what it says itself.
        digest: `models.identity.loaded_digest` of the model, where its files are known; otherwise its weights are read.
        activations: "exact", or "packed": rounded, see `attach`. A model on a device then sends 4 bytes a firing to the
            host in place of 6, the firings of a batch in one copy.

    Raises:
        ValueError: no dictionary, one made for another model, or unknown or impossible `activations`.
    """

    def __init__(
        self,
        model,
        dictionaries: Mapping[tuple[int, int], object],
        accelerate: bool = False,
        any_model: bool = False,
        name: str | None = None,
        digest: str | None = None,
        activations: str = "exact",
    ):
        if not dictionaries:
            raise ValueError("sae: expected at least one dictionary, got none")
        require_same_model(model, dictionaries, any_model, name)
        self.model = model
        self.dictionaries = dict(sorted(dictionaries.items()))
        for sae in self.dictionaries.values():
            check_activations(activations, sae.F)
        self.accelerate, self.any_model, self.activations = accelerate, any_model, activations
        # On the CPU a batch is done when `begin` returns: a second one would only be held in memory.
        self.asynchronous = any(p.device.type != "cpu" for p in model.parameters())
        self.sites = [Site(layer, head, sae.F, sae.k) for (layer, head), sae in self.dictionaries.items()]
        self.fingerprint = {
            "model": digest or weights_digest(model),
            "config": config_digest(model),
            **{f"dictionary {layer}:{head}": weights_digest(sae) for (layer, head), sae in self.dictionaries.items()},
            "accelerate": accelerate,
            **(
                {} if activations == "exact" else {"activations": activations}
            ),  # as of stores made before there was any
        }
        self.names = {
            "model": name or model_name(model),
            "revision": getattr(getattr(model, "config", None), "_commit_hash", None),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "dictionaries": {f"{layer}:{head}": sae.model for (layer, head), sae in self.dictionaries.items()},
        }
        self._stack = ExitStack()
        self._tap = None

    def __enter__(self):
        from ..models import attach, stopping_after

        self.model.eval()
        self._stack.enter_context(torch.inference_mode())
        hooks = attach(
            self.model, self.dictionaries, accelerate=self.accelerate, any_model=self.any_model, record_writes=False,
            activations=self.activations,
        )  # fmt: skip
        self._tap = self._stack.enter_context(hooks)
        self._stack.enter_context(stopping_after(self.model, max(layer for layer, _ in self.dictionaries)))
        return self

    def __exit__(self, *error):
        self._tap = None
        return self._stack.__exit__(*error)

    def firings(self, tokens: Tensor, mask: Tensor) -> Firings:
        """See `Source`."""
        return self.begin(tokens, mask)()

    def begin(self, tokens: Tensor, mask: Tensor) -> Callable[[], Firings]:
        """See `Source`."""
        from ..models import Stopped

        # The trunk alone: logits are not needed, and a large vocabulary makes them the dearest part.
        trunk = getattr(self.model, "base_model", self.model)
        device = next(self.model.parameters()).device
        check_ids(tokens, self.model)
        with suppress(Stopped):
            trunk(
                input_ids=tokens.to(device, non_blocking=True), attention_mask=mask.to(device, non_blocking=True),
                use_cache=False,
            )  # fmt: skip
        return self._tap.take(mask)
