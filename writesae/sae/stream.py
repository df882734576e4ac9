"""Where training data come from: text to passages of tokens, passages to the writes of a hooked model.

A stream is anything with `len(stream)` passages, `stream.length` tokens each, and `stream.writes(rows)`, a pure
function from passage numbers to batches of `{layer: Writes}`, in order; being pure makes a run resumable. One that does
not hold all its text also has `stream.pool(number)`, `stream.state()` and `stream.restore(state)`, as `Pools` has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models.identity import config_digest, weights_digest
from ..progress import tqdm
from ..text import Corpus
from ..text.tokens import check_ids
from ..writes import Writes
from .pools import SINGLE, Pools, check_reading, pieces, refuse_short
from .resume import tokens_digest

if TYPE_CHECKING:
    from ..models import Tap


class Passages:
    """Rows of tokens, all of one length, cut from documents joined end to end.

    Attributes:
        ids: `[N, length]` int32 tokens. 4 bytes a token are held for the whole corpus.
    """

    def __init__(self, ids: Tensor):
        if ids.ndim != 2 or not len(ids) or ids.is_floating_point():
            raise ValueError(f"ids: expected int [N, length] with N >= 1, got {ids.dtype} of shape {tuple(ids.shape)}")
        self.ids = ids.to(torch.int32)

    @classmethod
    def from_corpus(
        cls,
        corpus: Corpus,
        tokenizer,
        length: int = 256,
        *,
        bos: bool = True,
        max_tokens: int | None = None,
        progress: bool = False,
    ) -> Passages:
        """Tokenizes a corpus. What stands before a document is said at `text.tokens.first_token`.

        Args:
            corpus, tokenizer: what is read, and how.
            length: tokens of a passage.
            bos: put that token before every document.
            max_tokens: read no more than these.
            progress: show a bar.

        Raises:
            ValueError: fewer tokens in all than one passage, and what reading and `first_token` raise.
        """
        return cls._split(corpus, tokenizer, length, 0, bos, max_tokens, progress)[0]

    @classmethod
    def split(
        cls,
        corpus: Corpus,
        tokenizer,
        length: int = 256,
        *,
        one_in: int = 20,
        bos: bool = True,
        max_tokens: int | None = None,
        progress: bool = False,
    ) -> tuple[Passages, Passages]:
        """(training, held-out) passages of a corpus; one in `one_in` of its documents with text is held out.

        Raises:
            ValueError: a single document, and what `from_corpus` raises.
        """
        training, held_out = cls._split(corpus, tokenizer, length, one_in, bos, max_tokens, progress)
        return training, held_out

    @classmethod
    def from_texts(
        cls, texts: Iterable[tuple[str, str]], tokenizer, length: int = 256, progress: bool = False
    ) -> Passages:
        """`from_corpus` of (document id, text) pairs."""
        return cls.from_corpus(Corpus.from_texts(texts), tokenizer, length, progress=progress)

    @classmethod
    def _split(cls, corpus, tokenizer, length, one_in, bos, max_tokens, progress) -> tuple[Passages, ...]:
        check_reading(length, max_tokens)
        parts: tuple[list, list] = ([], [])
        documents = 0
        with tqdm(desc="tokens", unit=" tokens", unit_scale=True, disable=not progress, leave=False) as bar:
            for piece in pieces(corpus, tokenizer, one_in, bos, max_tokens):
                documents = piece.documents
                parts[piece.held_out].append(torch.from_numpy(piece.tokens))
                bar.update(len(piece.tokens))
        if one_in and documents < 2:
            raise ValueError(SINGLE)
        out = -(-documents // one_in) if one_in else 0
        found = []
        for tokens, n in zip(parts[: 1 + (one_in > 0)], (documents - out, out), strict=False):
            stream = torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int32)
            refuse_short(len(stream), n, length)
            rows = len(stream) // length
            found.append(cls(stream[: rows * length].view(rows, length)))
        return tuple(found)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        """Tokens of a passage."""
        return self.ids.shape[1]

    def pool(self, number: int) -> range:
        """All passages are pool 0."""
        return range(0 if number else len(self.ids))

    def take(self, rows: Tensor) -> Tensor:
        """`[n, length]` tokens of passages `[n]`."""
        return self.ids[rows]

    @property
    def total(self) -> int | None:
        """Passages of the whole corpus."""
        return len(self.ids)

    def digests(self) -> dict[str, str]:
        """What a resumed run must find again."""
        return {"tokens": tokens_digest(self.ids)}

    def state(self) -> dict:
        """Nothing: all is held."""
        return {}

    def restore(self, state: dict) -> None:
        """Nothing to do."""


class ModelStream:
    """Writes of some layers of a hooked model over passages. A context manager: hooks are on inside it only.

    Args:
        model: any model `writesae.attach` supports, in eval mode.
        passages: its tokens, all of them or a pool at a time.
        sites: (layer, head) pairs; only their layers' writes are kept, and layers above the last are not run.
        batch: passages in one forward pass.

    Raises:
        ValueError: a site the model does not have (from attach); a token that it does not embed.
    """

    def __init__(self, model: nn.Module, passages: Passages | Pools, sites: Sequence[tuple[int, int]], batch: int = 16):
        check_ids(passages.ids, model)
        self.model, self.passages, self.batch = model, passages, batch
        self.sites = [(int(layer), int(head)) for layer, head in sites]
        self._tap: Tap | None = None

    def __len__(self) -> int:
        return len(self.passages)

    @property
    def length(self) -> int:
        """Tokens of a passage."""
        return self.passages.length

    def digests(self) -> dict[str, str | None]:
        """sha256 of the model's weights and configuration and of the tokens: what a resumed run must find again."""
        model = self.model
        return {"weights": weights_digest(model), "model_config": config_digest(model), **self.passages.digests()}

    def pool(self, number: int) -> range:
        """The passages of a pool, see `Pools.pool`."""
        return self.passages.pool(number)

    @property
    def total(self) -> int | None:
        """Passages of the whole corpus, where that is known yet."""
        return self.passages.total

    def state(self) -> dict:
        """Where the text is, see `Pools.state`."""
        return self.passages.state()

    def restore(self, state: dict) -> None:
        """Goes on from `state()`."""
        self.passages.restore(state)

    def __enter__(self) -> ModelStream:
        from ..models import attach, stopping_after

        self._open = contextlib.ExitStack()
        try:
            sites = {site: None for site in self.sites}
            self._tap = self._open.enter_context(attach(self.model, sites, accelerate=True))
            self._open.enter_context(stopping_after(self.model, max(layer for layer, _ in self.sites)))
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._tap = None
        self._open.__exit__(*error)

    def writes(self, rows: Sequence[int] | Tensor) -> Iterator[dict[int, Writes]]:
        """Yields `{layer: Writes}` of the passages in order, `batch` at a time."""
        if self._tap is None:
            raise RuntimeError("ModelStream: use it inside `with stream:`, which puts the hooks on")
        from ..models import Stopped, hf_gated_delta

        rows = torch.as_tensor(rows)
        device = hf_gated_delta.device_of(self.model.get_input_embeddings())
        for part in rows.split(self.batch):
            self._tap.clear()
            ids = self.passages.take(part)
            check_ids(ids, self.model)  # those of a later pool are seen here first
            with torch.no_grad(), contextlib.suppress(Stopped):
                self.model(input_ids=ids.long().to(device), use_cache=False)
            yield {layer: self._tap.writes[layer] for layer in {layer for layer, _ in self.sites}}
