"""What a study works with: the model, its dictionaries, the three splits of text, and work that can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..experiments.parts import Parts
from ..experiments.replace import Passage, passages_of
from ..firings import Firings
from ..interrupt import finishing
from ..models.attach import attach
from ..models.identity import require_same_model, weights_digest
from ..progress import tqdm
from ..sae import SAE
from ..text import Corpus
from ..text.tokens import check_vocabulary
from ..writes import Writes

Site = tuple[int, int]
SPLITS = ("train", "validation", "test")
TEXTS = {split: f"stdlib:{split}" for split in SPLITS}


@dataclass(frozen=True)
class Reading:
    """A batch of passages as the plain model reads it.

    Attributes:
        first: number of its first passage among all.
        ids: `[B, T]` tokens.
        firings: of every attached dictionary; `row` counts from `first`.
        writes: {layer: Writes} of its layers.
        logits: `[B, T, vocabulary]`.
    """

    first: int
    ids: torch.Tensor
    firings: Firings
    writes: dict[int, Writes]
    logits: torch.Tensor


class Lab:
    """A model under study.

    Args:
        model, tokenizer: a causal language model in evaluation mode, and its tokenizer.
        saes: {(layer, head): dictionary} of states; writes: the same of writes. Either may be empty.
        texts: {split: corpus name}; what is chosen is chosen on "validation", what is learned on "train", what is
            reported on "test".
        settings: the study's, by name.
        folder: where finished units of work are kept; None keeps none.
        quick: small numbers instead of all.
        seed: of every draw.
        progress: show bars.
        name, field, bos: of the study, of a corpus, and whether a document begins with the first token.

    Attributes (besides): `saes`, `writes` as given.
    """

    def __init__(
        self,
        model,
        tokenizer,
        saes: Mapping[Site, SAE],
        writes: Mapping[Site, SAE] | None = None,
        *,
        texts: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        quick: bool = False,
        seed: int = 0,
        progress: bool = True,
        any_model: bool = False,
        name: str = "",
        field: str = "text",
        bos: bool = True,
    ):
        self.saes, self.writes = dict(sorted(saes.items())), dict(sorted((writes or {}).items()))
        for given in (self.saes, self.writes):
            if given:
                require_same_model(model, given, any_model)
        if model.training:
            raise ValueError("model: expected evaluation mode (model.eval()), got training mode")
        check_vocabulary(tokenizer, model)
        self.model, self.tokenizer = model, tokenizer
        self.texts = {**TEXTS, **(texts or {})}
        self.settings, self.folder, self.quick, self.seed = dict(settings or {}), folder, quick, seed
        self.progress, self.name, self.field, self.bos = progress, name, field, bos
        self._passages: dict[tuple, list[Passage]] = {}

    def __getitem__(self, setting: str) -> Any:
        """The value of a setting of the study."""
        return self.settings[setting]

    def rng(self, *labels: int | str) -> np.random.Generator:
        """A generator that depends on the seed and the labels alone."""
        return np.random.default_rng([self.seed, *(int.from_bytes(str(x).encode(), "big") % 2**63 for x in labels)])

    def text(self, split: str, tokens: int, context: int = 256) -> list[Passage]:
        """About that many tokens of a split, in passages of `context` tokens, from files in an order drawn by the seed.

        Raises:
            ValueError: another split, or one without text.
        """
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        key = (split, tokens, context)
        if key not in self._passages:
            corpus = Corpus.from_name(self.texts[split], self.field, split)
            self._passages[key] = passages_of(
                corpus, self.tokenizer, context, bos=self.bos, max_tokens=tokens, seed=self.seed
            )
        return self._passages[key]

    def whole(self, split: str, passages: int, context: int = 256) -> torch.Tensor:
        """`[passages, context]` int64 tokens of full passages of a split, drawn by the seed; fewer if it runs out."""
        found = [p.tokens for p in self.text(split, 4 * passages * context, context) if len(p.tokens) == context]
        order = self.rng("whole", split).permutation(len(found))[:passages]
        if not len(order):
            raise ValueError(f"{split}: expected passages of {context} tokens, got none")
        return torch.from_numpy(np.stack([found[i] for i in order])).long()

    def read(self, ids: torch.Tensor, sites: Mapping[Site, SAE] | None = None, batch: int = 16) -> Iterator[Reading]:
        """Runs whole passages `[P, T]` through the model, a batch at a time, with dictionaries (`saes`) attached."""
        sites = self.saes if sites is None else sites
        for lo in range(0, len(ids), batch):
            rows = ids[lo : lo + batch].to(next(self.model.parameters()).device)
            with torch.no_grad(), attach(self.model, sites, any_model=True) as tap:
                logits = self.model(input_ids=rows, use_cache=False).logits
            yield Reading(lo, rows, tap.firings, tap.writes, logits)

    @cached_property
    def _parts(self) -> Parts:
        plan = {
            "study": self.name, "model": weights_digest(self.model), "torch": torch.__version__, "seed": self.seed,
            "saes": {f"{layer}:{head}": weights_digest(sae) for (layer, head), sae in self.saes.items()},
            "writes": {f"{layer}:{head}": weights_digest(sae) for (layer, head), sae in self.writes.items()},
            "texts": self.texts, "settings": {key: str(value) for key, value in self.settings.items()}, "bos": self.bos,
        }  # fmt: skip
        return Parts(self.folder, plan)

    def unit(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """One piece of work: columns of equal length (numbers, strings, `[n, L]`), read back where it is done already.

        Ctrl-C waits for a unit's end, so keep them within a minute; floats come back as they were.
        """
        found = self._parts.read(name)
        if found is None:
            with finishing(name, self._parts.kept) as stop:
                found = make()
                self._parts.write(name, found)
            stop.check()
        return found

    def place(self, name: str) -> Path | None:
        """A folder of the study's for what keeps its own files (a replacement test, dictionaries); None keeps none."""
        return None if self._parts.folder is None else self._parts.folder / name

    def units(
        self, keys: Iterable[Any], make: Callable[[Any], dict[str, np.ndarray]], what: str = ""
    ) -> list[dict[str, np.ndarray]]:
        """`unit` for each of several keys, with a bar. A key's text is the unit's name after `what`."""
        every = list(keys)
        found = []
        for key in tqdm(every, desc=f"{self.name} {what}".strip(), disable=not self.progress):
            name = f"{what}-{key}" if what else str(key)
            name = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
            found.append(self.unit(name, lambda key=key: make(key)))  # type: ignore[misc]
        return found
