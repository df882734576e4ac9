"""Decoding by hand, for the tests of hooked families: a model on its own cache, token by token."""

import sys

import torch

from writesae.models import layers
from writesae.models.arguments import cache_of, given_cache


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def functions(model):
    """The file in which the model's layers look up their functions."""
    return sys.modules[type(layers(model)[0].module).__module__]


def go_on(model, text, start, cache=None):
    """Runs columns from `start` on, on a cache that holds those before. (Some do not count: positions are given.)"""
    past = {} if cache is None else given_cache(model, cache)
    at = torch.arange(start, start + text.shape[1]).expand(len(text), -1)
    return model(text, use_cache=True, position_ids=at, **past)


@torch.no_grad()
def states_by_token(model, text, layer, state_of):
    """`[B, T, H, K, V]`, token by token, by the model alone; `state_of(cache, layer)`: `[B, H, K, V]`."""
    cache, found = None, []
    for t in range(text.shape[1]):
        cache = cache_of(go_on(model, text[:, t : t + 1], t, cache))
        found.append(state_of(cache, layer))
    return torch.stack(found, 1)
