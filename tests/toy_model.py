"""A model that nobody has heard of: its layers keep a memory by functions of this file, in ways of their own."""

from __future__ import annotations

import torch
from torch import nn

H, HK, K, V = 4, 2, 5, 3


def remember_many(query, key, value, keep, rate, state=None, want_state=False, erase=True):
    """Whole sequences: query, key `[B, T, HK, K]`, value `[B, T, H, V]`, keep (0 to 1) and rate `[B, T, H]`, state
    `[B, H, V, K]`; what the key reads is erased first, or not."""
    B, T = value.shape[:2]
    state = value.new_zeros(B, H, V, K) if state is None else state.clone()
    out = []
    for t in range(T):
        out.append(remember_one(state, query[:, t], key[:, t], value[:, t], keep[:, t], rate[:, t], erase))
    out = torch.stack(out, 1)
    return (out, state) if want_state else out


def remember_one(state, query, key, value, keep, rate, erase=True):
    """One token, without the axis T; changes the state in place."""
    query, key = (x.repeat_interleave(H // HK, 1) for x in (query, key))
    faded = keep[..., None, None] * state
    new = rate[..., None] * (value - erase * (faded @ key[..., None])[..., 0])
    state.copy_(faded + new[..., None] * key[:, :, None])
    return (state @ query[..., None])[..., 0]


def remember_at_once(layer, x):
    """All of a layer in one go, where there is nothing to remember; None: not this time."""
    query, key, value, keep, rate = layer.project(x)
    query, key = (y.repeat_interleave(H // HK, 2) for y in (query, key))
    state, out = value.new_zeros(len(x), H, V, K), []
    for t in range(x.shape[1]):
        state = keep[:, t, :, None, None] * state
        new = rate[:, t, :, None] * (value[:, t] - layer.erase * (state @ key[:, t, ..., None])[..., 0])
        state = state + new[..., None] * key[:, t, :, None]
        out.append((state @ query[:, t, ..., None])[..., 0])
    return layer.out_proj(torch.stack(out, 1).flatten(2))


class Memory(nn.Module):
    def __init__(self, number: int, erase: bool):
        super().__init__()
        self.erase = erase
        self.number, self.heads, self.key_heads, self.key_size, self.value_size = number, H, HK, K, V
        self.fast = True
        self.in_proj = nn.Linear(8, 2 * HK * K + H * (V + 2), bias=False)
        self.out_proj = nn.Linear(H * V, 8, bias=False)

    def project(self, x):
        query, key, value, gates = self.in_proj(x).split([HK * K, HK * K, H * V, 2 * H], -1)
        query, key = (nn.functional.normalize(x.unflatten(-1, (HK, K)), dim=-1) for x in (query, key))
        return query, key, value.unflatten(-1, (H, V)), *gates.sigmoid().chunk(2, -1)

    def forward(self, hidden_states, attention_mask=None, cache=None):
        if cache is None and self.fast and (out := remember_at_once(self, hidden_states)) is not None:
            return out
        given = self.project(hidden_states)
        if cache is None:
            out = remember_many(*given, erase=self.erase)
        elif self.number in cache.states and hidden_states.shape[1] == 1:
            out = remember_one(cache.states[self.number], *(x[:, 0] for x in given), erase=self.erase)[:, None]
        else:
            state = cache.states.get(self.number)
            out, cache.states[self.number] = remember_many(*given, state, want_state=True, erase=self.erase)
        return self.out_proj(out.flatten(2))


class Cache:
    def __init__(self):
        self.states, self.length = {}, 0

    def get_seq_length(self):
        return self.length


class Block(nn.Module):
    def __init__(self, number: int, erase: bool):
        super().__init__()
        self.memory = Memory(number, erase)

    def forward(self, hidden_states, attention_mask=None, cache=None, **others):
        return hidden_states + self.memory(hidden_states, attention_mask, cache)


class Model(nn.Module):
    def __init__(self, erase: bool = True, blocks: int = 2):
        super().__init__()
        self.embedding, self.head = nn.Embedding(31, 8), nn.Linear(8, 31, bias=False)
        self.blocks, self.norm = nn.ModuleList(Block(i, erase) for i in range(blocks)), nn.LayerNorm(8)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=False, logits_to_keep=0):
        if use_cache and cache is None:
            cache = Cache()
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, attention_mask, cache)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return {"logits": self.head(self.norm(x[:, -logits_to_keep:])), "cache": cache}
