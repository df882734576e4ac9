"""What one forward call of a whole model says about its columns: pads, packed sequences, past length, finished rows.

The recurrence sees none of this: masks reach a layer only when something is padded and never while decoding. So the
forwards of the models around an intercepted layer are listened to, and the call in progress on this thread is asked
here. Of several models around a layer, the innermost says what is fed: prompt tuning, for one, puts columns in front.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from . import generation
from .columns import columns_held, note_columns

# Models (`config.model_type`) that make their attention masks without position_ids.
_MIXES_WHATEVER = ("granitemoehybrid",)
# Models, by the module that defines them, that take position_ids for `generate`'s sake and read none.
_READ_NO_POSITIONS = ("mamba_ssm.",)


class Stopped(Exception):
    """The last layer wanted has run: raised through a model's forward to end it early, on purpose."""


class _Local(threading.local):
    def __init__(self):
        self.calls: list[ModelCall] = []


_local = _Local()


class ModelCall:
    """One forward call of a model on one thread, filled in from the outermost forward inwards."""

    def __init__(self, root: nn.Module):
        self.root = root
        self.models = [root]
        self.attention_mask = self.position_ids = None
        self.cache = self.cu_seq_lens = self.seq_idx = None
        self._past: int | None = None
        self._fed: tuple | None = None
        self._packed: tuple[Tensor | None] | None = None
        self._generation: tuple[generation.Generation | None] | None = None
        self._stop = 0
        self._real: dict[tuple, tuple[Tensor | None, Tensor | None]] = {}  # what `real_tokens` has answered
        self.pending: dict = {}  # of whoever records: what to `keep` or `undo` at the end

    @staticmethod
    def current() -> ModelCall | None:
        return _local.calls[-1] if _local.calls else None

    def fill(self, module: nn.Module, given: dict) -> None:
        """What one of the models around the layers was given, by role."""
        if module is not self.root:
            self.models.append(module)
        for role in ("position_ids", "cu_seq_lens", "seq_idx"):
            if getattr(self, role) is None and role in given:
                setattr(self, role, given[role])
        mask = given.get("attention_mask")
        if self.attention_mask is None or _by_column(mask) is not None:
            self.attention_mask = mask
            self._real.clear()
        if self.cache is None and "cache" in given:
            self.cache = given["cache"]
            self._past = columns_held(self.cache)  # now, before any attention layer of this call has grown it

    @property
    def generation(self) -> generation.Generation | None:
        """The `generate` that makes this call, if one does."""
        if self._generation is None:
            self._generation = (generation.running(self.models),)
        return self._generation[0]

    # ---- columns ----------------------------------------------------------------------------------------------

    def start(self, cache) -> int:
        """Columns the cache held before this call; this call's first column is that one. Raises ValueError where nobody
        knows."""
        if self.cache is None:  # no cache, or one made inside this very call
            self.cache, self._past = cache, 0
        if self._past is None:
            raise ValueError(
                "cache: expected one that was empty or filled while attached, got one of recurrent layers alone, which "
                "does not say how many columns it holds, filled or changed while nothing was attached; attach before "
                "the first call"
            )
        return self._past

    def feed(self, cache, T: int) -> None:
        """A layer is given T columns with this cache."""
        if cache is not None:
            self._fed = cache, T

    def first_row(self, B: int) -> int:
        """Row number of this call's first row: 0, but for what guidance feeds beside the text, which comes after it."""
        generating = self.generation
        if generating is None:
            return 0
        if not generating.processing:
            generating.rows = B
        return generating.rows if generating.processing and generating.rows else 0

    def real_tokens(
        self,
        shape: tuple[int, int],
        start: int,
        device: torch.device,
        once: bool = True,
        layer_mask: Tensor | None = None,
    ) -> Tensor | None:
        """`[B, T]` bool: neither a pad, nor fed to a row that `generate` has ended, nor (`once`) fed by it before; None
        when nothing says so. Worked out once for all layers on a device that are given one mask.

        Args:
            layer_mask: `[B, T]`, or of cached columns too: what the layer itself was given.
        """
        asked = shape, start, device, once, id(layer_mask)
        if asked not in self._real:
            real = None if layer_mask is None else fed_columns(layer_mask, shape[1])
            known = self._real_tokens(shape, start, device, once)
            found = known if real is None else real if known is None else real & known.to(real.device)
            self._real[asked] = found, layer_mask  # which keeps its id from being another's
        return self._real[asked][0]

    def _real_tokens(self, shape: tuple[int, int], start: int, device: torch.device, once: bool) -> Tensor | None:
        B, T = shape
        real = self._unmasked(B, T, start)
        generating = self.generation
        if generating is None:
            return real
        self.first_row(B)
        self._stop = start + T
        at = torch.arange(T, device=device)
        ended = generating.ended()
        again = generating.repeated(start, T) if once else 0
        if ended is not None and len(ended) == B:  # the last column alone is a token chosen since
            last = at == T - 1
            going = ~(ended.to(device)[:, None] & last)
            real = going if real is None else real.to(device) & going
        if again:
            fresh = (at >= again).expand(B, T)
            real = fresh if real is None else real.to(device) & fresh
        return real

    def _unmasked(self, B: int, T: int, start: int) -> Tensor | None:
        """`[B, T]` bool of a two-dimensional mask over the columns held and fed, or fed alone."""
        mask = _by_column(self.attention_mask)
        if mask is None:
            return None
        rows, columns = mask.shape
        if rows != B or (columns != T and columns < start + T):
            raise ValueError(
                f"attention_mask: expected [{B}, {T}] (the columns of this call) or [{B}, {start + T}] (with the "
                f"{start} held by the cache), got {tuple(mask.shape)}; what is padding cannot be told"
            )
        return (mask if columns == T else mask[:, start : start + T]) != 0  # a copy, which outlives the call

    # ---- packed sequences -------------------------------------------------------------------------------------

    def cu_seqlens(self, shape: tuple[int, int], cache) -> Tensor | None:
        """`[N + 1]` int64 offsets when this call is a packed batch of N > 1 sequences, else None."""
        if self._packed is None:
            self._packed = (self._find_packed(shape, cache),)
        return self._packed[0]

    def _find_packed(self, shape, cache) -> Tensor | None:
        B, T = shape
        stated = offsets(self.cu_seq_lens, self.seq_idx, T)
        positions = self._restarts(B, T)
        if stated is None and positions is None:
            return None
        if B != 1:
            raise ValueError(f"packed batch: expected one row that holds all sequences, got {B} rows")
        if cache is not None:
            raise ValueError("packed batch: expected use_cache=False and no cache (past_key_values), got a cache")
        if getattr(text_config(self.root), "ple_layer_ids", None):
            raise ValueError(
                f"packed batch: {type(self.root).__name__} reads n-grams across sequences in its per-layer embeddings, "
                "which nothing here can keep apart; feed the sequences as rows of a padded batch"
            )
        if self._mixes_in_attention() and getattr(text_config(self.root), "model_type", None) in _MIXES_WHATEVER:
            raise ValueError(
                f"packed batch: the full-attention layers of {type(self.root).__name__} mix the sequences whatever "
                "position_ids say; feed the sequences as rows of a padded batch"
            )
        if getattr(text_config(self.root), "index_kpool", None):
            raise ValueError(
                f"packed batch: {type(self.root).__name__} pools and looks up keys across sequences in its indexer, "
                "which nothing here can keep apart; feed the sequences as rows of a padded batch"
            )
        if (
            stated is not None
            and self._mixes_in_attention()
            and not (positions is not None and torch.equal(positions.cpu(), stated.cpu()))
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
        if type(self.root).__module__.startswith(_READ_NO_POSITIONS):
            return None
        if self.cache is not None and self._past != 0:
            return None
        if positions.ndim == 3:  # text, then temporal, height and width
            if positions.shape[0] != 4:
                return None
            positions = positions[0]
        if positions.shape[-1] != T:  # the caller's; a model in between has put columns in front and dropped them
            return None
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
        if type(config).__module__.startswith("fla."):
            return False  # every layer of flash-linear-attention goes by cu_seqlens
        flash = "flash" in (getattr(config, "_attn_implementation", None) or "")
        return not flash and has_attention(self.root)

    # ---- its end ----------------------------------------------------------------------------------------------

    def close(self, error: BaseException | None) -> None:
        """The forward has returned, or failed: then what it recorded is taken back, unless somebody meant it to end."""
        keep = error is None or _on_purpose(error)
        pending, self.pending = self.pending, {}
        for part in pending.values():
            (part.keep if keep else part.undo)()
        if keep and self._fed is not None:
            cache, T = self._fed
            past = 0 if self.cache is None else self._past  # 0: made inside this call
            if past is not None:
                note_columns(cache, past + T)
        if keep and self._stop and self.generation is not None:
            self.generation.recorded(self._stop)


def fed_columns(mask: Tensor, T: int) -> Tensor:
    """`[B, T]` bool of a mask `[B, columns]` that may be of cached columns, too."""
    return mask[:, -T:] != 0  # a copy, which outlives the call


def _by_column(mask) -> Tensor | None:
    """The two-dimensional mask in what a model was given, or None."""
    if isinstance(mask, dict):
        mask = mask.get("linear_attention")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _on_purpose(error: BaseException) -> bool:
    """Whether an exception ends a forward on purpose once what is wanted has run: ours, or a tracer's."""
    return isinstance(error, Stopped) or (
        type(error).__name__ == "EarlyStopException" and type(error).__module__.partition(".")[0] == "nnsight"
    )


def text_config(model: nn.Module):
    """The text part of a model's config, or None."""
    text = getattr(getattr(model, "config", None), "get_text_config", None)
    return None if text is None else text()


def has_attention(model: nn.Module) -> bool:
    """Whether some layer is not linear."""
    if type(model).__module__.startswith("mamba_ssm."):  # whose configuration may be missing, and is of its own kind
        return any(type(m).__module__ == "mamba_ssm.modules.mha" for m in model.modules())
    types = getattr(text_config(model), "layer_types", None)
    return types is None or any(t != "linear_attention" for t in types)


def offsets(cu_seq_lens: Tensor | None, seq_idx: Tensor | None, T: int) -> Tensor | None:
    """`[N + 1]` int64 offsets of N > 1 packed sequences, from offsets or from an index `[1, T]` a token; else None.

    Raises:
        ValueError: they do not fit one row of T tokens.
    """
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


def model_body(entry, call, args, kwargs):
    """Runs a model's forward: a new call, or the inner part of the call of a model around it."""
    kwargs = entry.reader.handed_on(kwargs)
    current, given = ModelCall.current(), entry.reader(args, kwargs)
    outer = entry.members.values()
    if current is not None and any(current.root is m for chain in tuple(outer) for m in chain):
        current.fill(entry.module, given)
        return call(*args, **kwargs)
    depth, error = len(_local.calls), None
    new = ModelCall(entry.module)
    new.fill(entry.module, given)
    try:
        try:
            _local.calls.append(new)
            return call(*args, **kwargs)
        except BaseException as raised:
            error = raised
            raise
        finally:
            del _local.calls[depth:]
            new.close(error)
    finally:
        del _local.calls[depth:]
