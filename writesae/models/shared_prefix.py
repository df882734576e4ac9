"""Running the upper part of a model again for many short forks that share their passages' prefixes.

A fork is a few tokens of a passage from position t on. Its full-attention layers read the passage's keys and values
before t, which all forks of that passage share: they are read in place, never copied a fork.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import patch
from .sites import layers


@dataclass(frozen=True)
class Prefix:
    """Keys and values of P passages at one full-attention layer, and which fork reads how much of them.

    Attributes:
        key, value: `[P, Hkv, T, D]`, after rotary embedding.
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
    value: Tensor,  # [n, Hkv, L, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    shared_prefix: Prefix | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of forks on their passage's prefix and on themselves, in one softmax. Returns `[n, L, Hq, D]`, None."""
    if shared_prefix is None:
        raise ValueError(f"model: {type(module).__name__} did not hand its shared_prefix on to its attention function")
    if kwargs.get("sliding_window") is not None:
        raise ValueError("model: full attention expected above the edited layer, got a sliding window")
    n, Hq, L, D = query.shape
    Hkv = key.shape[1]
    for name, x in (("keys", shared_prefix.key), ("values", shared_prefix.value)):
        if (x.shape[1], x.shape[3]) != (Hkv, D) or value.shape[3] != D:
            raise ValueError(
                f"model: expected full attention that caches its {name} as it reads them, {Hkv} heads of {D}, got "
                f"{x.shape[1]} of {x.shape[3]} from {type(module).__name__} (latent attention), above "
                "the edited layer; forks cannot share a prefix there"
            )
    scaling = D**-0.5 if scaling is None else scaling
    grouped = query.reshape(n, Hkv, Hq // Hkv, L, D)  # query heads of one key head side by side
    later = torch.ones(L, L, dtype=torch.bool, device=query.device).triu(1)
    own = torch.matmul(grouped.flatten(2, 3), key.transpose(2, 3)).view(n, Hkv, -1, L, L) * scaling
    own = own.masked_fill(later, float("-inf"))
    out = torch.empty_like(grouped)
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
        mixed = torch.matmul(mixed, past_value).view(Hkv, count, -1, L, D).transpose(0, 1)
        mixed_own = torch.matmul(weight[..., seen:].flatten(2, 3), value[lo:hi]).view_as(mixed)
        out[lo:hi] = mixed + mixed_own
        lo = hi
    return out.view(n, Hq, L, D).transpose(1, 2).contiguous(), None


def _interface(original):
    """Stands in for `AttentionInterface.get_interface`: which attention a module is to use."""

    def get_interface(self, *args, **kwargs):
        mine = patch.mine(type(ALL_ATTENTION_FUNCTIONS), "get_interface")
        return shared_prefix_attention if mine else original(self, *args, **kwargs)

    return get_interface


class Stack:
    """The decoder blocks of a causal language model with gated-delta layers, and what follows them.

    Attributes:
        model: the model.
        sites: {layer: `LayerSite`} of its gated-delta layers.
        blocks: its decoder blocks in order.
        norm, head: final norm and output embedding.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.sites = {site.layer_index: site for site in layers(model)}
        if not self.sites:
            raise ValueError(f"model: expected a model with gated-delta layers, got {type(model).__name__}")
        parts = next(iter(self.sites.values())).path.split(".")
        at = max(i for i in range(len(parts)) if isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList))
        blocks = model.get_submodule(".".join(parts[:at]))
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks
        self.norm: Any = getattr(model.get_submodule(".".join(parts[: at - 1])), "norm", None)
        self.head: Any = model.get_output_embeddings()  # type: ignore[operator]
        if self.norm is None or self.head is None:
            raise ValueError(f"model: expected a final norm and an output embedding, got {type(model).__name__}")

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Within, the full-attention blocks take a `shared_prefix` on this thread."""
        with patch.Owner(private=True) as owner, owner:
            with patch.lock:
                owner.patch(type(ALL_ATTENTION_FUNCTIONS), "get_interface", _interface)
            yield

    def run(
        self,
        x: Tensor,  # [n, L, hidden]
        first: int,
        position_ids: Tensor,  # [n, L]
        position_embeddings: dict[int, tuple[Tensor, Tensor] | None],  # a block: (cos, sin) [n, L, D]
        prefixes: dict[int, Prefix],
    ) -> Tensor:
        """Blocks `first` and up and the final norm on forks, `[n, L, hidden]`. Within `sharing()`."""
        for i in range(first, len(self.blocks)):
            extra = {} if i in self.sites else {"shared_prefix": prefixes[i]}
            x = self.blocks[i](
                x, position_embeddings=position_embeddings[i], attention_mask=None, position_ids=position_ids,
                use_cache=False, **extra,
            )  # fmt: skip
            x = x[0] if isinstance(x, tuple) else x
        return self.norm(x)

    @contextlib.contextmanager
    def watching(self, wanted: Sequence[int], seen: dict[int, dict]) -> Iterator[None]:
        """Within, `seen[layer]` gets inputs and keyword arguments of the wanted blocks' latest call on this thread."""

        def watch(entry, call, args, kwargs):
            for i in entry.serving()[:1]:
                hidden = args[0] if args else kwargs["hidden_states"]
                seen[i] = {"input": hidden, "position_embeddings": kwargs.get("position_embeddings")}
            return call(*args, **kwargs)

        with patch.Owner(private=True) as owner, owner:
            with patch.lock:
                for i in wanted:
                    owner.join(self.blocks[i], "forward", watch, i)
            yield
