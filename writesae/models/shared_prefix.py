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
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import patch
from .arguments import NAMES, Reader
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


# ---- passes ---------------------------------------------------------------------------------------------------


class Pass:
    """What one run of a model's blocks does differently. This one: nothing.

    Attributes:
        at: number of the block that is running, or None.
    """

    at: int | None = None

    def block(self, index: int, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs a block's forward."""
        self.at = index
        try:
            return call(*args, **kwargs)
        finally:
            self.at = None

    def attention(self, found: Callable) -> Callable:
        """What runs in the place of the model's attention function `found`."""
        return found


class Watch(Pass):
    """A clean pass, of which forks are made.

    Attributes:
        first: block whose input is kept.
        input: `[P, T, ...]` its input.
        output: `[P, T, ...]` of the last block.
        keys, values: {block from `first` on: what its attention was given}.
        tuples: {block: length of the tuple that its forward returns}, of those that return one.
    """

    def __init__(self, first: int, blocks: int):
        self.first, self.last = first, blocks - 1
        self.tuples: dict[int, int] = {}
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def block(self, index: int, call: Callable, args: tuple, kwargs: dict) -> Any:
        if index == self.first:
            self.input = _hidden(args, kwargs)
        out = super().block(index, call, args, kwargs)
        if isinstance(out, tuple):
            self.tuples[index] = len(out)
        if index == self.last:
            self.output = out[0] if isinstance(out, tuple) else out
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


class Fork(Pass):
    """Blocks `first` and up on forks.

    Args:
        first: the first block that runs, with `hidden` as its input.
        prefixes: {block: `Prefix` of its attention}.
        tuples: blocks whose forward returns a tuple, with its length.
    """

    def __init__(self, first: int, hidden: Tensor, prefixes: Mapping[int, Prefix], tuples: Mapping[int, int]):
        self.first, self.hidden, self.prefixes, self.tuples = first, hidden, prefixes, tuples
        self.output: Tensor | None = None

    def block(self, index: int, call: Callable, args: tuple, kwargs: dict) -> Any:
        if index < self.first:
            length = self.tuples.get(index)
            # The last block skipped hands the forks on (there may be no other to do so).
            x = self.hidden if index == self.first - 1 else _hidden(args, kwargs)
            return x if length is None else (x, *[None] * (length - 1))
        if index == self.first:
            args, kwargs = _with_hidden(args, kwargs, self.hidden)
        out = super().block(index, call, args, kwargs)
        self.output = out[0] if isinstance(out, tuple) else out
        return out

    def attention(self, found: Callable) -> Callable:
        if self.at is None or self.at not in self.prefixes:
            raise ValueError(f"model: attention of block {self.at} ran in a fork and not in the clean pass")
        return functools.partial(shared_prefix_attention, shared_prefix=self.prefixes[self.at])


class _Local(threading.local):
    def __init__(self):
        self.passes: list[Pass] = []


_local = _Local()


def _hidden(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(kwargs[name] for name in NAMES["hidden_states"] if name in kwargs)


def _with_hidden(args: tuple, kwargs: dict, x: Tensor) -> tuple[tuple, dict]:
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(name for name in NAMES["hidden_states"] if name in kwargs): x}


def _block(entry, call, args, kwargs):
    """Stands in for a block's forward."""
    serving = entry.serving()
    if not serving or not _local.passes:
        return call(*args, **kwargs)
    return _local.passes[-1].block(serving[0], call, args, kwargs)


def _interface(original):
    """Stands in for `AttentionInterface.get_interface`: which attention a module is to use."""

    def get_interface(self, *args, **kwargs):
        found = original(self, *args, **kwargs)
        return _local.passes[-1].attention(found) if _local.passes else found

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
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise ValueError(f"model: expected an output embedding, got {type(model).__name__}")
        self.vocabulary = head.weight.shape[0]
        self._takes_positions = "position_ids" in Reader(self.body.forward, type(self.body).__name__).parameters
        self._tuples: dict[int, int] = {}

    @contextlib.contextmanager
    def during(self, run: Pass) -> Iterator[None]:
        """Within, the model's calls on this thread go by `run`."""
        with patch.Owner(private=True) as owner, owner:
            with patch.lock:
                owner.patch(type(ALL_ATTENTION_FUNCTIONS), "get_interface", _interface)
                for i, block in enumerate(self.blocks):
                    owner.join(block, "forward", _block, i)
            depth = len(_local.passes)
            try:
                _local.passes.append(run)
                yield
            finally:
                del _local.passes[depth:]

    def watch(self, input_ids: Tensor, first: int) -> Watch:
        """Runs the body on passages `[P, T]`, and keeps what forks from block `first` on need."""
        watch = Watch(first, len(self.blocks))
        with self.during(watch):
            self.body(input_ids=input_ids, use_cache=False)
        self._tuples = watch.tuples
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
    ) -> Tensor:
        """Blocks `first` and up on forks, `[n, L, ...]`: what the last block returns. `hidden` goes into the first."""
        run = Fork(first, hidden, prefixes, self._tuples)
        more = {"position_ids": position_ids} if self._takes_positions else {}
        with self.during(run):
            self.body(input_ids=input_ids, use_cache=False, **more)
        assert run.output is not None
        return run.output

    def logits(self, hidden: Tensor) -> Tensor:
        """`[m, vocabulary]` logits of what the last block returned for m tokens, `[m, ...]`: final norm, output map and
        what else the model does there."""
        run = Fork(len(self.blocks), hidden[:, None], {}, self._tuples)
        ids = torch.zeros(len(hidden), 1, dtype=torch.int64, device=self.model.get_input_embeddings().weight.device)
        with self.during(run):  # one token a row: no mask of m x m
            return self.model(input_ids=ids, use_cache=False)["logits"][:, 0]
