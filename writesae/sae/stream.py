"""Where training data come from: text to passages of tokens, passages to the writes of a hooked model.

A stream is anything with `len(stream)` passages, `stream.length` tokens each, and `stream.writes(rows)`, a pure
function from passage numbers to batches of `{layer: Writes}`, in order; being pure makes a run resumable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.identity import config_digest, weights_digest
from ..text import Corpus
from ..text.passages import Passage, passages
from ..text.tokens import check_ids, tokenizing
from ..writes import Writes
from .resume import tokens_digest

if TYPE_CHECKING:
    from ..models import Tap

_PIECE = 1 << 14  # tokens of a document handed over at once; they are joined again


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
        if length < 1:
            raise ValueError(f"length: expected >= 1, got {length}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens: expected >= 1, got {max_tokens}")
        tokenize, first = tokenizing(tokenizer, bos)
        pieces: tuple[list, list] = ([], [])
        documents = [0, 0]
        with tqdm(desc="tokens", unit=" tokens", unit_scale=True, disable=not progress, leave=False) as bar:
            for event in passages(corpus, tokenize, _PIECE, first, max_tokens):
                if isinstance(event, Passage):
                    if event.row == 0:
                        part = int(one_in > 0 and sum(documents) % one_in == 0)
                        documents[part] += 1
                    pieces[part].append(torch.from_numpy(event.tokens))
                    bar.update(len(event.tokens))
        if one_in and sum(documents) < 2:
            raise ValueError("validation: the corpus is a single document, so none can be held out; name --validation")
        found = []
        for tokens, n in zip(pieces[: 1 + (one_in > 0)], documents, strict=False):
            stream = torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int32)
            if len(stream) < length:
                raise ValueError(
                    f"corpus: {n} documents with {len(stream)} tokens in all, but one passage takes {length}"
                )
            rows = len(stream) // length
            found.append(cls(stream[: rows * length].view(rows, length)))
        return tuple(found)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        """Tokens of a passage."""
        return self.ids.shape[1]


class ModelStream:
    """Writes of some layers of a hooked model over passages. A context manager: hooks are on inside it only.

    Args:
        model: any model `writesae.attach` supports, in eval mode.
        passages: its tokens.
        sites: (layer, head) pairs; only their layers' writes are kept, and layers above the last are not run.
        batch: passages in one forward pass.

    Raises:
        ValueError: a site the model does not have (from attach); a token that it does not embed.
    """

    def __init__(self, model: nn.Module, passages: Passages, sites: Sequence[tuple[int, int]], batch: int = 16):
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
        return {
            "weights": weights_digest(model), "model_config": config_digest(model),
            "tokens": tokens_digest(self.passages.ids),
        }  # fmt: skip

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
            with torch.no_grad(), contextlib.suppress(Stopped):
                self.model(input_ids=self.passages.ids[part].long().to(device), use_cache=False)
            yield {layer: self._tap.writes[layer] for layer in {layer for layer, _ in self.sites}}
