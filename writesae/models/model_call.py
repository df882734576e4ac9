"""What one forward call of a whole model says about its columns: pads, packed sequences, past length, finished rows.

The recurrence sees none of this: masks reach a layer only when something is padded and never while decoding. So the
forwards of the models around an intercepted layer are wrapped, and the innermost call on this thread is asked here.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_FIELDS = {
    "input_ids": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids",
    "past_key_values": "cache", "cu_seq_lens_q": "cu_seq_lens", "seq_idx": "seq_idx",
}  # fmt: skip


class _Local(threading.local):
    def __init__(self):
        self.calls: list[ModelCall] = []
        self.generating: list[tuple[list[int], int | None]] = []


@dataclass
class _Rows:
    """What was fed last to the rows of one cache."""

    next_start: int
    last: Tensor | None  # [B] tokens, or None when they were not a decode step
    finished: Tensor  # [B] bool


_local = _Local()
_lock = threading.Lock()
_rows: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # cache -> _Rows


class ModelCall:
    """One forward call of a model on one thread, filled in from the outermost forward inwards."""

    def __init__(self, root: nn.Module):
        self.root = root
        self.input_ids = self.attention_mask = self.position_ids = None
        self.cache = self.cu_seq_lens = self.seq_idx = None
        self._past: int | None = None
        self._packed: tuple[Tensor | None] | None = None
        self._finished: tuple[Tensor | None] | None = None

    @staticmethod
    def current() -> ModelCall | None:
        return _local.calls[-1] if _local.calls else None

    def fill(self, given: dict) -> None:
        for name, field in _FIELDS.items():
            if getattr(self, field) is None and given.get(name) is not None:
                setattr(self, field, given[name])
        if self.cache is not None and self._past is None:
            # Now, before any attention layer of this call has grown it.
            self._past = int(self.cache.get_seq_length())

    # ---- columns ----------------------------------------------------------------------------------------------

    def start(self, cache) -> int:
        """Columns the cache held before this call; this call's first column is that one."""
        if self.cache is None:  # no cache, or one made inside this very call
            self.cache, self._past = cache, 0
        return self._past

    def _mask2d(self) -> Tensor | None:
        mask = self.attention_mask
        if isinstance(mask, dict):
            mask = mask.get("linear_attention")
        return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def real_tokens(self, shape: tuple[int, int], start: int) -> Tensor | None:
        """`[B, T]` bool: neither a pad nor fed to a row that generation has finished; None when nothing says so."""
        B, T = shape
        mask = self._mask2d()
        real = None if mask is None else mask[:, -T:].bool()
        if self._finished is None:
            self._finished = (self._update_finished(B, T, start),)
        finished = self._finished[0]
        if finished is None:
            return real
        going = ~finished[:, None]
        return going if real is None else real & going

    def _update_finished(self, B: int, T: int, start: int) -> Tensor | None:
        """`[B]` rows that only get pads now: in a decode step, the pad token after an end token that was decoded."""
        if self.cache is None or self.input_ids is None:
            return None
        ids = self.input_ids
        decoding = T == 1 and start > 0
        with _lock:
            before = _rows.get(self.cache)
            finished = torch.zeros(B, dtype=torch.bool, device=ids.device)
            if decoding and before is not None and before.next_start == start and len(before.finished) == B:
                ends, pad = self._special_tokens()
                finished = before.finished
                if before.last is not None and ends and pad is not None:
                    ended = torch.isin(before.last, torch.tensor(ends, device=ids.device))
                    finished = finished | (ended & (ids[:, 0] == pad))
            _rows[self.cache] = _Rows(start + T, ids[:, 0].clone() if decoding else None, finished)
        return finished if decoding else None

    def _special_tokens(self) -> tuple[list[int], int | None]:
        """(end tokens, pad token), of the `generate` in progress or of the model's generation config."""
        if _local.generating:
            return _local.generating[-1]
        return special_tokens(getattr(self.root, "generation_config", None), {})

    # ---- packed sequences -------------------------------------------------------------------------------------

    def cu_seqlens(self, shape: tuple[int, int], cache) -> Tensor | None:
        """`[N + 1]` int64 offsets when this call is a packed batch of N > 1 sequences, else None."""
        if self._packed is None:
            self._packed = (self._find_packed(shape, cache),)
        return self._packed[0]

    def _find_packed(self, shape, cache) -> Tensor | None:
        B, T = shape
        stated = _offsets(self.cu_seq_lens, self.seq_idx, T)
        positions = self._restarts(B, T)
        if stated is None and positions is None:
            return None
        if B != 1:
            raise ValueError(f"packed batch: expected one row that holds all sequences, got {B} rows")
        if cache is not None:
            raise ValueError("packed batch: expected use_cache=False and no past_key_values, got a cache")
        if getattr(text_config(self.root), "ple_layer_ids", None):
            raise ValueError(
                f"packed batch: {type(self.root).__name__} reads n-grams across sequences in its per-layer embeddings, "
                "which nothing here can keep apart; feed the sequences as rows of a padded batch"
            )
        if stated is not None and self._mixes_in_attention() and not (
            positions is not None and torch.equal(positions.cpu(), stated.cpu())
        ):
            raise ValueError(
                "packed batch: expected position_ids that restart at every sequence and attention_mask=None, without "
                "which the full-attention layers mix the sequences; got "
                + ("an attention_mask" if self.attention_mask is not None else "position_ids that do not match")
            )
        return stated if stated is not None else positions

    def _restarts(self, B: int, T: int) -> Tensor | None:
        """Offsets read off position_ids, where transformers' own attention masks read them too."""
        positions = self.position_ids
        if positions is None or self.attention_mask is not None:
            return None
        if self.cache is not None and self._past != 0:
            return None
        if positions.ndim == 3:  # text, then temporal, height and width
            if positions.shape[0] != 4:
                return None
            positions = positions[0]
        jumps = (positions[:, 1:] - positions[:, :-1]) != 1
        if not bool(jumps.any()):
            return None
        if B != 1:
            raise ValueError(
                f"position_ids: jumps inside a row mean packed sequences, which need one row, got {B} rows (for padded "
                "rows pass the attention_mask)"
            )
        cuts = jumps[0].nonzero().flatten() + 1
        return torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), T)])

    def _mixes_in_attention(self) -> bool:
        """Whether the model has attention layers that tell packed sequences apart by position_ids only."""
        config = text_config(self.root)
        flash = "flash" in (getattr(config, "_attn_implementation", None) or "")
        return not flash and has_attention(self.root)


def text_config(model: nn.Module):
    """The text part of a model's config, or None."""
    config = getattr(model, "config", None)
    return None if config is None else config.get_text_config()


def has_attention(model: nn.Module) -> bool:
    """Whether some layer is not linear. Without one, transformers' caches cannot be used."""
    types = getattr(text_config(model), "layer_types", None)
    return types is None or any(t != "linear_attention" for t in types)


def _offsets(cu_seq_lens: Tensor | None, seq_idx: Tensor | None, T: int) -> Tensor | None:
    if cu_seq_lens is not None:
        offsets = cu_seq_lens.reshape(-1).long()
        if len(offsets) < 2 or int(offsets[0]) != 0 or int(offsets[-1]) != T or bool((offsets.diff() < 0).any()):
            raise ValueError(f"cu_seq_lens_q: expected offsets rising from 0 to {T}, got {offsets.tolist()[:8]}")
    elif seq_idx is not None:
        row = seq_idx.reshape(-1)
        if len(row) != T:
            raise ValueError(f"seq_idx: expected one index for each of {T} tokens, got shape {tuple(seq_idx.shape)}")
        cuts = (row[1:] != row[:-1]).nonzero().flatten() + 1
        offsets = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), T)])
    else:
        return None
    return offsets if len(offsets) > 2 else None


def special_tokens(config, given: dict) -> tuple[list[int], int | None]:
    """(end tokens, pad token) of a generation config, overridden by the arguments of a `generate` call."""
    config = given.get("generation_config") or config
    end, pad = (
        given[name] if given.get(name) is not None else getattr(config, name, None)
        for name in ("eos_token_id", "pad_token_id")
    )
    ends = [] if end is None else torch.as_tensor(end).reshape(-1).tolist()
    if pad is None and ends:
        pad = ends[0]  # what generate pads with then
    return ends, None if pad is None else int(pad)


@contextlib.contextmanager
def enter_call(module: nn.Module, outer: tuple[nn.Module, ...], given: dict) -> Iterator[None]:
    """A model's forward begins: a new call, or the inner part of the call of a model around it."""
    call = ModelCall.current()
    if call is not None and call.root in outer:
        call.fill(given)
        yield
        return
    call = ModelCall(module)
    call.fill(given)
    _local.calls.append(call)
    try:
        yield
    finally:
        _local.calls.pop()


@contextlib.contextmanager
def enter_generate(module: nn.Module, given: dict) -> Iterator[None]:
    """`generate` begins: its own end and pad tokens hold until it returns."""
    _local.generating.append(special_tokens(getattr(module, "generation_config", None), given))
    try:
        yield
    finally:
        _local.generating.pop()
