"""Where training data come from: text to passages of tokens, passages to the writes of a hooked model.

A stream is anything with `len(stream)` passages, `stream.length` tokens each, and `stream.writes(rows)`, a pure
function from passage numbers to batches of `{layer: Writes}`, in order; being pure makes a run resumable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..writes import Writes


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
    def from_texts(
        cls, texts: Iterable[tuple[str, str]], tokenizer, length: int = 256, progress: bool = False
    ) -> Passages:
        """Tokenizes (document id, text) pairs; each document begins with the tokenizer's first special token, if any.

        Raises:
            ValueError: fewer tokens in all than one passage.
        """
        if length < 1:
            raise ValueError(f"length: expected >= 1, got {length}")
        mark = next((x for x in (tokenizer.bos_token_id, tokenizer.eos_token_id) if x is not None), None)
        silent = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}  # no "too long": it is cut
        pieces, documents = [], 0
        for _, text in tqdm(texts, "tokens", unit=" documents", disable=not progress, leave=False):
            ids = tokenizer(text, add_special_tokens=False, **silent)["input_ids"]
            pieces.append(torch.tensor(ids if mark is None else [mark, *ids], dtype=torch.int32))
            documents += 1
        stream = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)
        if len(stream) < length:
            raise ValueError(
                f"corpus: {documents} documents with {len(stream)} tokens in all, but one passage takes {length}"
            )
        rows = len(stream) // length
        return cls(stream[: rows * length].view(rows, length))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        return self.ids.shape[1]


class ModelStream:
    """Writes of some layers of a hooked model over passages. A context manager: hooks are on inside it only.

    Args:
        model: any model `writesae.attach` supports, in eval mode.
        passages: its tokens.
        sites: (layer, head) pairs; only their layers' writes are kept, and layers above the last are not run.
        batch: passages in one forward pass.

    Raises:
        ValueError: a site the model does not have (from attach).
    """

    def __init__(self, model: nn.Module, passages: Passages, sites: Sequence[tuple[int, int]], batch: int = 16):
        self.model, self.passages, self.batch = model, passages, batch
        self.sites = [(int(layer), int(head)) for layer, head in sites]
        self._tap = None

    def __len__(self) -> int:
        return len(self.passages)

    @property
    def length(self) -> int:
        return self.passages.length

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

    def writes(self, rows: Sequence[int]) -> Iterator[dict[int, Writes]]:
        """Yields `{layer: Writes}` of the passages in order, `batch` at a time."""
        if self._tap is None:
            raise RuntimeError("ModelStream: use it inside `with stream:`, which puts the hooks on")
        from ..models import Stopped

        rows = torch.as_tensor(rows)
        device = next(self.model.parameters()).device
        for part in rows.split(self.batch):
            self._tap.clear()
            with torch.no_grad(), contextlib.suppress(Stopped):
                self.model(input_ids=self.passages.ids[part].long().to(device), use_cache=False)
            yield {layer: self._tap.writes[layer] for layer in {layer for layer, _ in self.sites}}
