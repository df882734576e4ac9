"""A source of firings that needs no model: features and activations are a hash of the tokens seen so far."""

import numpy as np
import torch

from writesae.collect.source import Site
from writesae.firings import Firings


def words(text: str) -> list[int]:
    """One token a character."""
    return [ord(c) % 997 for c in text]


class FakeSource:
    """k firings a token and site; activations repeat, so that ties happen."""

    def __init__(self, sites=((1, 0), (1, 3), (4, 2)), features=64, k=4, delay=0.0):
        self.sites = [Site(layer, head, features + head, k) for layer, head in sites]
        self.fingerprint = {"model": f"fake {features} {k}"}
        self.delay = delay
        self.calls = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def firings(self, tokens, mask):
        self.calls += 1
        if self.delay:
            import time

            time.sleep(self.delay)
        past = torch.cumsum(tokens * mask, 1).numpy()
        rows, positions = np.nonzero(mask.numpy())
        parts = []
        for s, site in enumerate(self.sites):
            for j in range(site.k):
                seen = past[rows, positions] * (s + 3) + j * 17 + tokens.numpy()[rows, positions] * 5
                # One residue a j, so that no feature fires twice on a token.
                feature = (seen % (site.features // site.k)) * site.k + j
                activation = ((seen * 2654435761) % 4096 + 1) / 64.0
                layer, head = np.full(len(rows), site.layer), np.full(len(rows), site.head)
                columns = (rows, positions, layer, head, feature, activation)
                parts.append(Firings(*(torch.from_numpy(np.ascontiguousarray(c)) for c in columns)))
        return Firings.cat(parts)
