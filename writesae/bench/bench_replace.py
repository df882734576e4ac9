"""Forks a second of the replacement test's engine, against decoding with a cache copied for each condition.

Both sides test the same firings under the same conditions and end with the same KLs, or there is no ratio. The peer is
the plain way to do it in transformers: prefill up to and with the token once a firing, then for every condition copy
the cache, change its state, and decode the rest one token at a time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator

import numpy as np
import torch

from ..experiments.conditions import BASELINE, NATIVES, SCALES, arm, deltas, replacements
from ..experiments.divergence import kl_pair
from ..experiments.engine import ForkEngine, Places
from ..experiments.nulls import Fired
from ..models import load
from ..models.arguments import cache_of, given_cache
from .case import Case, Disagree, Options, Row
from .timing import ratio_row


def make_places(passages: int, each: int, tokens: int, horizon: int, head: int, seed: int) -> Places:
    draw = np.random.default_rng(seed)
    at = [np.sort(draw.choice(np.arange(1, tokens - horizon), each, replace=False)) for _ in range(passages)]
    row = torch.arange(passages).repeat_interleave(each)
    return Places(row, torch.from_numpy(np.concatenate(at)), torch.full((len(row),), head))


CONDITIONS = ("native", "atom", "delete", "random")


def engine_side(engine, ids, places, fired, seed):
    """({arm: [n, L] KL}, the clean pass, changes of the output by arm, seconds)."""
    start = time.perf_counter()
    clean = engine.clean(ids, torch.full((len(ids),), ids.shape[1]), lambda writes: places)
    changes = deltas(clean, fired, NATIVES, SCALES, CONDITIONS, seed)
    found = engine.divergences(clean, engine.run(clean, changes), BASELINE)
    return {name: pair[0] for name, pair in found.items()}, clean, changes, time.perf_counter() - start


def state_changes(clean, fired, seed) -> dict[str, torch.Tensor | None]:
    """`{arm: [n, K, V]}` what each arm adds to the state."""

    def matrix(factors):
        if factors is None:
            return 0.0
        left, right = (x[:, None] if x.ndim == 2 else x for x in factors)
        return torch.einsum("nrk,nrv->nkv", left, right)

    found = replacements(clean, fired, NATIVES, SCALES, CONDITIONS, seed)
    return {BASELINE: None} | {arm(*name): matrix(R) - matrix(N) for name, (R, N) in found.items()}


@torch.no_grad()
def peer_side(model, layer, ids, places, changes, which, horizon):
    """KLs of the firings in `which` from the next token on, and seconds, by decoding with a cache for every condition.

    The prefix and the token are run once; then the cache is copied, its state changed, and the rest decoded.
    """
    start = time.perf_counter()
    kl = {name: [] for name in changes if name != BASELINE}
    for i in which:
        row, t, head = int(places.row[i]), int(places.position[i]), int(places.head[i])
        prefix = cache_of(model(ids[row : row + 1, : t + 1], use_cache=True, logits_to_keep=1))
        logits = {}
        for name, change in changes.items():
            cache, steps = copy.deepcopy(prefix), []
            if change is not None:
                states = cache.layers[layer].recurrent_states
                states = states if isinstance(states, torch.Tensor) else states[0]  # by what it holds, since 5.24
                states[0, head] += change[i]
            for s in range(t + 1, t + horizon + 1):
                token = ids[row : row + 1, s : s + 1]
                steps.append(model(token, **given_cache(model, cache), use_cache=True).logits[0, 0])
            logits[name] = torch.stack(steps)
        base = logits.pop(BASELINE)
        for name, (forward, _) in kl_pair(base, logits).items():
            kl[name].append(forward)
    return {name: torch.stack(x) for name, x in kl.items()}, time.perf_counter() - start


def replacement(options: Options) -> Iterator[Row]:
    layer, head, horizon, seed = 5, 3, 8, 0
    passages, each, tokens, peer_firings = (2, 4, 64, 2) if options.quick else (16, 8, 256, 3)
    model, _ = load("default")
    engine = ForkEngine(model, layer, horizon, "after")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (passages, tokens), generator=generator)
    places = make_places(passages, each, tokens, horizon, head, seed)
    n, site = len(places), engine.site
    unit = torch.nn.functional.normalize
    fired = Fired(
        unit(torch.randn(n, 1, site.K, generator=generator), dim=-1),
        unit(torch.randn(n, 1, site.V, generator=generator), dim=-1), torch.ones(n), [str(i) for i in range(n)],
    )  # fmt: skip
    _, clean, _, _ = engine_side(engine, ids, places, fired, seed)
    changes = state_changes(clean, fired, seed)
    ours, theirs, worst = [], [], 0.0
    for r in range(options.rounds(7)):
        kl, _, _, seconds = engine_side(engine, ids, places, fired, seed)
        ours.append(seconds / (n * len(changes)))
        which = [(r * peer_firings + j) * 37 % n for j in range(peer_firings)]
        peer, seconds = peer_side(model, layer, ids, places, changes, which, horizon)
        theirs.append(seconds / (len(which) * len(changes)))
        for name in peer:
            difference = (peer[name] - kl[name][which]).abs()
            worst = max(worst, float((difference / (1e-8 + 1e-2 * kl[name][which])).max()))
    if not worst <= 1:
        raise Disagree(f"KLs differ by {worst:.1f} times what is allowed (1e-8 + 1 %)")
    name = f"replacement test, forks a second ({n * len(changes)} forks, horizon {horizon}, embedded model)"
    row = ratio_row(name, DECODING, "x faster", ours, theirs, target=30, aim=200)
    row.note = f"{1 / row.seconds:.0f} a second against {1 / row.peer_seconds:.1f}"
    yield row


DECODING = "token-by-token decoding, a cache copy a condition"
CASES = [Case("replace", "replacement test, forks a second", replacement, DECODING)]
