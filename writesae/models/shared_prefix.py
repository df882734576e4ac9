"""Running the upper part of a model again for many short forks that share their passages' prefixes.

A fork is a few tokens of a passage from position t on. Its attention reads the passage's keys and values before t,
which all forks of that passage share: they are read in place, never copied a fork.

The model runs itself: its own forward calls its blocks, norm and output map as it always does. While a `Pass` stands
in, blocks below the first one wanted hand on what they are given, that one takes the forks' hidden states, and what
attention computes is the pass's affair. So nothing here knows what a family calls its parts, how it calls its blocks,
or by what it scales its logits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import looking_back, patch
from .arguments import NAMES, Reader, without_cache
from .sites import layers


@dataclass(frozen=True)
class Prefix:
    """Keys and values of P passages at one full-attention layer, and which fork reads how much of them.

    Attributes:
        key, value: `[P, Hkv, T, D]`, `[P, Hkv, T, Dv]`, as attention is given them: after rotary embedding, latents
            expanded.
        passage: `[n]` int64, rising: the passage of each fork.
        start: `[n]` int64: a fork sees its passage's columns below `start`, then its own tokens causally.
    """

    key: Tensor
    value: Tensor
    passage: Tensor
    start: Tensor


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,  # [n, Hq, L, D]
    key: Tensor,  # [n, Hkv, L, D]
    value: Tensor,  # [n, Hkv, L, Dv]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    shared_prefix: Prefix,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of forks on their passage's prefix and on themselves, in one softmax. Returns `[n, L, Hq, Dv]`, None.

    Raises:
        ValueError: a sliding window, or other keys and values than the prefix has.
    """
    if kwargs.get("sliding_window") is not None:
        raise ValueError("model: full attention expected above the edited layer, got a sliding window")
    n, Hq, L, D = query.shape
    Hkv, Dv = key.shape[1], value.shape[3]
    for name, x, own in (("keys", shared_prefix.key, key), ("values", shared_prefix.value, value)):
        if (x.shape[1], x.shape[3]) != (own.shape[1], own.shape[3]):
            raise ValueError(
                f"model: expected {name} of {own.shape[1]} heads of {own.shape[3]} in the prefix, as "
                f"{type(module).__name__} has them, got {x.shape[1]} of {x.shape[3]}"
            )
    scaling = D**-0.5 if scaling is None else scaling
    grouped = query.reshape(n, Hkv, Hq // Hkv, L, D)  # query heads of one key head side by side
    later = torch.ones(L, L, dtype=torch.bool, device=query.device).triu(1)
    own = torch.matmul(grouped.flatten(2, 3), key.transpose(2, 3)).view(n, Hkv, -1, L, L) * scaling
    own = own.masked_fill(later, float("-inf"))
    out = value.new_empty(*grouped.shape[:-1], Dv)
    passages, counts = torch.unique_consecutive(shared_prefix.passage, return_counts=True)
    lo = 0
    for p, count in zip(passages.cpu().tolist(), counts.cpu().tolist(), strict=True):
        hi = lo + count
        start = shared_prefix.start[lo:hi]
        seen = int(start.max())
        past_key, past_value = shared_prefix.key[p, :, :seen], shared_prefix.value[p, :, :seen]  # [Hkv, seen, D]
        q = grouped[lo:hi].transpose(0, 1).reshape(Hkv, -1, D)  # all forks of the passage in one product
        past = torch.matmul(q, past_key.transpose(1, 2)).view(Hkv, count, -1, L, seen).transpose(0, 1) * scaling
        hidden = torch.arange(seen, device=query.device) >= start[:, None]  # [count, seen]
        past = past.masked_fill(hidden[:, None, None, None], float("-inf"))
        weight = torch.softmax(torch.cat([past, own[lo:hi]], -1), -1, dtype=torch.float32).to(query.dtype)
        mixed = weight[..., :seen].transpose(0, 1).reshape(Hkv, -1, seen)
        mixed = torch.matmul(mixed, past_value).view(Hkv, count, -1, L, Dv).transpose(0, 1)
        mixed_own = torch.matmul(weight[..., seen:].flatten(2, 3), value[lo:hi]).view_as(mixed)
        out[lo:hi] = mixed + mixed_own
        lo = hi
    return out.view(n, Hq, L, Dv).transpose(1, 2).contiguous(), None


# ---- what a block hands on --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Streams:
    """How what a block returns is kept as one tensor: of a tuple, all tensors of tokens side by side, hidden states
    first (others: a residual that is not added yet, values of the first block that all blocks mix in).

    Attributes:
        length: of the tuple, None where the block returns a tensor.
        more: (place in the tuple, shape of a token, dtype) of the others.
        token: shape of a token's hidden states, and their dtype.
    """

    length: int | None
    more: tuple[tuple[int, torch.Size, torch.dtype], ...]
    token: tuple[torch.Size, torch.dtype]

    @classmethod
    def of(cls, out: Any) -> Streams:
        hidden = out[0] if isinstance(out, tuple) else out
        rest = out[1:] if isinstance(out, tuple) else ()
        more = tuple(
            (i, x.shape[2:], x.dtype)
            for i, x in enumerate(rest, 1)
            if isinstance(x, Tensor) and x.ndim > 2 and x.shape[:2] == hidden.shape[:2]
        )
        return cls(len(out) if isinstance(out, tuple) else None, more, (hidden.shape[2:], hidden.dtype))

    def joined(self, hidden: Tensor, out: Any) -> Tensor:
        """`[n, T, ...]`: hidden states, and beside them what else `out` has of every token."""
        if not self.more:
            return hidden
        return torch.cat([hidden.flatten(2), *(out[i].flatten(2) for i, _, _ in self.more)], -1)

    def apart(self, joined: Tensor) -> Any:
        """What the block would return."""
        if self.length is None:
            return joined
        out: list[Tensor | None] = [joined, *[None] * (self.length - 1)]
        if self.more:
            sizes = [self.token[0].numel(), *(shape.numel() for _, shape, _ in self.more)]
            parts = joined.split(sizes, -1)
            for part, (i, shape, dtype) in zip(parts, ((0, *self.token), *self.more), strict=True):
                out[i] = part.unflatten(-1, shape).to(dtype)
        return tuple(out)


# ---- passes ---------------------------------------------------------------------------------------------------


class Pass:
    """What one run of a model's blocks does differently. This one: nothing.

    Attributes:
        at: number of the block that is running, or None.
        looked: how often something in it has looked back.
    """

    at: int | None = None
    looked: int = 0

    def block(self, index: int, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs a block's forward."""
        self.at, self.looked = index, 0
        try:
            return call(*args, **kwargs)
        finally:
            self.at = None

    def attention(self, found: Callable) -> Callable:
        """What runs in the place of the model's attention function `found`."""
        return found

    def look_back(self, call: Callable[[Tensor], Any], x: Tensor, width: int) -> Any:
        """Runs what reads `width` tokens to the left of each in x `[B, T, D]`, see `looking_back`."""
        return call(x)


class Watch(Pass):
    """A clean pass, of which forks are made.

    Attributes:
        first: block whose input is kept.
        input: `[P, T, ...]` its input, with what else it is handed of every token.
        output: `[P, T, ...]` of the last block, likewise.
        keys, values: {block from `first` on: what its attention was given}.
        left: {block from `first` on: (x `[P, T, D]`, width) of all that looks back in it, in order}.
        streams: {block: how what it returns is kept}.
    """

    def __init__(self, first: int, blocks: int):
        self.first, self.last = first, blocks - 1
        self.streams: dict[int, Streams] = {}
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.left: dict[int, list[tuple[Tensor, int]]] = {}
        self._handed: Any = None

    def block(self, index: int, call: Callable, args: tuple, kwargs: dict) -> Any:
        if index == self.first:
            self.input = _hidden(args, kwargs)
            if index:
                self.input = self.streams[index - 1].joined(self.input, self._handed)
            self._handed = None
        out = super().block(index, call, args, kwargs)
        self.streams[index] = Streams.of(out)
        if index == self.first - 1:
            self._handed = out
        if index == self.last:
            self.output = self.streams[index].joined(out[0] if isinstance(out, tuple) else out, out)
        return out

    def attention(self, found: Callable) -> Callable:
        def attend(module, query, key, value, *args, **kwargs):
            if self.at is not None and self.at >= self.first:
                if self.at in self.keys:
                    raise ValueError(
                        f"model: expected one attention in a block, got a second of block {self.at} "
                        f"({type(module).__name__}); forks cannot tell their prefixes apart"
                    )
                self.keys[self.at], self.values[self.at] = key, value
            return found(module, query, key, value, *args, **kwargs)

        return attend

    def look_back(self, call: Callable[[Tensor], Any], x: Tensor, width: int) -> Any:
        if self.at is not None and self.at >= self.first:
            self.left.setdefault(self.at, []).append((x, width))
        return call(x)


class Fork(Pass):
    """Blocks `first` and up on forks.

    Args:
        first: the first block that runs, with `hidden` as its input.
        prefixes: {block: `Prefix` of its attention}.
        left: {block: the tokens before the forks, `[n, width, D]`, of all that looks back in it}.
        streams: {block: how what it returns is kept}.
    """

    def __init__(
        self,
        first: int,
        hidden: Tensor,
        prefixes: Mapping[int, Prefix],
        left: Mapping[int, Sequence[Tensor]],
        streams: Mapping[int, Streams],
    ):
        self.first, self.hidden, self.prefixes, self.left, self.streams = first, hidden, prefixes, left, streams
        self.output: Tensor | None = None

    def block(self, index: int, call: Callable, args: tuple, kwargs: dict) -> Any:
        if index < self.first:
            streams = self.streams[index]
            if index == self.first - 1:  # the last block skipped hands the forks on (there may be no other to do so)
                return streams.apart(self.hidden)
            x = _hidden(args, kwargs)
            return x if streams.length is None else (x, *[None] * (streams.length - 1))
        if index == self.first:
            hidden = self.streams[index - 1].apart(self.hidden) if index else self.hidden
            args, kwargs = _with_hidden(args, kwargs, hidden[0] if isinstance(hidden, tuple) else hidden)
        out = super().block(index, call, args, kwargs)
        if index == len(self.streams) - 1:
            self.output = self.streams[index].joined(out[0] if isinstance(out, tuple) else out, out)
        return out

    def attention(self, found: Callable) -> Callable:
        if self.at is None or self.at not in self.prefixes:
            raise ValueError(f"model: attention of block {self.at} ran in a fork and not in the clean pass")
        return functools.partial(shared_prefix_attention, shared_prefix=self.prefixes[self.at])

    def look_back(self, call: Callable[[Tensor], Any], x: Tensor, width: int) -> Any:
        if self.at is None:  # nothing before the blocks or after them does, in the clean pass
            raise ValueError("model: expected nothing outside of its blocks that reads earlier tokens, got some")
        left = self.left[self.at][self.looked]
        self.looked += 1
        out = call(torch.cat([left.to(x), x], 1))
        return (out[0][:, width:], *out[1:]) if isinstance(out, tuple) else out[:, width:]


def _hidden(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(kwargs[name] for name in NAMES["hidden_states"] if name in kwargs)


def _with_hidden(args: tuple, kwargs: dict, x: Tensor) -> tuple[tuple, dict]:
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(name for name in NAMES["hidden_states"] if name in kwargs): x}


def _block(entry, call, args, kwargs):
    """Stands in for a block's forward."""
    serving, run = entry.serving(), looking_back.running()
    if not serving or run is None:
        return call(*args, **kwargs)
    return run.block(serving[0], call, args, kwargs)


def _interface(original):
    """Stands in for `AttentionInterface.get_interface`: which attention a module is to use."""

    def get_interface(self, *args, **kwargs):
        found, run = original(self, *args, **kwargs), looking_back.running()
        return found if run is None else run.attention(found)

    return get_interface


# ---- the stack ------------------------------------------------------------------------------------------------


class Stack:
    """The decoder blocks of a causal language model with recurrent layers, and the model around them.

    Attributes:
        model: the model.
        sites: {block: `LayerSite`} of its recurrent layers.
        blocks: its decoder blocks in order.
        body: the module that runs them, from tokens to final hidden states.
        vocabulary: entries of its output embedding.
        device: of its input embedding.
    """

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.sites = {site.layer_index: site for site in layers(model)}
        if not self.sites:
            raise ValueError(f"model: expected a model with recurrent layers, got {type(model).__name__}")
        parts = next(iter(self.sites.values())).path.split(".")
        at = max(i for i in range(len(parts)) if isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList))
        blocks = model.get_submodule(".".join(parts[:at]))
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks
        self.body: Any = model.get_submodule(".".join(parts[: at - 1]))
        head = getattr(model, "get_output_embeddings", lambda: getattr(model, "lm_head", None))()
        if head is None:
            raise ValueError(f"model: expected an output embedding, got {type(model).__name__}")
        self.vocabulary = head.weight.shape[0]
        self.device = next(m.weight.device for m in self.body.modules() if isinstance(m, nn.Embedding))
        self._takes_positions = "position_ids" in Reader(self.body.forward, type(self.body).__name__).parameters
        self._without_cache = without_cache(self.body)
        self._streams: dict[int, Streams] = {}

    @contextlib.contextmanager
    def during(self, run: Pass) -> Iterator[None]:
        """Within, the model's calls on this thread go by `run`."""
        with patch.Owner(private=True) as owner, owner:
            with patch.lock:
                owner.patch(type(ALL_ATTENTION_FUNCTIONS), "get_interface", _interface)
                for i, block in enumerate(self.blocks):
                    owner.join(block, "forward", _block, i)
                for binding in dict.fromkeys(site.binding for site in self.sites.values()):
                    if binding.stand_ins is not None:
                        binding.stand_ins(owner, [x.module for x in self.sites.values() if x.binding is binding])
                    if binding.looks_back is not None:
                        binding.looks_back(owner, self.blocks)
            with looking_back.served_by(run):
                yield

    def watch(self, input_ids: Tensor, first: int) -> Watch:
        """Runs the body on passages `[P, T]`, and keeps what forks from block `first` on need."""
        watch = Watch(first, len(self.blocks))
        with self.during(watch):
            self.body(input_ids=input_ids, **self._without_cache)
        self._streams = watch.streams
        return watch

    def last(self, input_ids: Tensor) -> Tensor:
        """What the last block returns for passages `[P, T]`, `[P, T, ...]`: see `logits`."""
        output = self.watch(input_ids, len(self.blocks)).output  # of no block are input, keys and values kept
        assert output is not None
        return output

    def fork(
        self,
        input_ids: Tensor,  # [n, L]
        position_ids: Tensor,  # [n, L]
        hidden: Tensor,  # [n, L, ...]
        first: int,
        prefixes: Mapping[int, Prefix],
        left: Mapping[int, Sequence[Tensor]],
    ) -> Tensor:
        """Blocks `first` and up on forks, `[n, L, ...]`: what the last block returns. `hidden` goes into the first."""
        run = Fork(first, hidden, prefixes, left, self._streams)
        more = {"position_ids": position_ids} if self._takes_positions else {}
        with self.during(run):
            self.body(input_ids=input_ids, **self._without_cache, **more)
        assert run.output is not None
        return run.output

    def logits(self, hidden: Tensor) -> Tensor:
        """`[m, vocabulary]` logits of what the last block returned for m tokens, `[m, ...]`: final norm, output map and
        what else the model does there."""
        run = Fork(len(self.blocks), hidden[:, None], {}, {}, self._streams)
        ids = torch.zeros(len(hidden), 1, dtype=torch.int64, device=self.device)
        with self.during(run):  # one token a row: no mask of m x m
            out = self.model(input_ids=ids, **self._without_cache)
        return (out["logits"] if isinstance(out, Mapping) else out.logits)[:, 0]  # mamba-ssm answers with a tuple
