"""Forks a second of the replacement test's engine, against decoding with a cache copied for each condition.

    python bench/bench_replace.py --model default --layer 4 --head 1

Both sides test the same firings under the same conditions and end with the same KLs; the ratio is printed only when
they agree. The peer is the plain way to do it in transformers: prefill up to the token once a firing, then for every
condition copy the cache, run the token with the state patched, and decode the rest one token at a time. Rounds are
interleaved, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import copy
import json
import time

import numpy as np
import torch

from writesae.experiments.conditions import BASELINE, DEFAULT_CONDITIONS, NATIVES, SCALES, Fired, deltas
from writesae.experiments.divergence import kl_pair
from writesae.experiments.engine import ForkEngine, Places
from writesae.models import load
from writesae.models.hf_gated_delta import intercept
from writesae.ops import gated_delta_rule


def make_places(passages: int, each: int, tokens: int, horizon: int, head: int, seed: int) -> Places:
    draw = np.random.default_rng(seed)
    at = [np.sort(draw.choice(np.arange(1, tokens - horizon), each, replace=False)) for _ in range(passages)]
    row = torch.arange(passages).repeat_interleave(each)
    return Places(row, torch.from_numpy(np.concatenate(at)), torch.full((len(row),), head))


def engine_side(engine, ids, places, fired, seed):
    """({arm: [n, L] KL}, patched states' changes E [n, K, V] by arm, seconds)."""
    start = time.perf_counter()
    clean = engine.clean(ids, torch.full((len(ids),), ids.shape[1]), lambda writes: places)
    changes = deltas(clean, fired, NATIVES, SCALES, DEFAULT_CONDITIONS, seed)
    found = engine.divergences(clean, engine.run(clean, changes), BASELINE)
    return {name: pair[0] for name, pair in found.items()}, clean, changes, time.perf_counter() - start


def state_changes(clean, fired, seed) -> dict[str, torch.Tensor]:
    """`{arm: [n, K, V]}` what each arm adds to the state: read off `deltas` with every key direction as reader."""
    n, K = clean.left.shape
    probe = copy.copy(clean)
    object.__setattr__(probe, "reader", torch.eye(K).expand(n, K, K))
    return deltas(probe, fired, NATIVES, SCALES, DEFAULT_CONDITIONS, seed)


@torch.no_grad()
def peer_side(model, layer, ids, places, changes, which, horizon):
    """KLs of the firings in `which`, and seconds, by decoding with a cache copy for every condition."""
    start = time.perf_counter()
    patch: dict = {"change": None}

    def rule(q, k, v, g, beta, initial_state, output_final_state, l2norm, cu_seqlens):
        if patch["change"] is None:
            return NotImplemented
        out = gated_delta_rule(
            q, k, v, g, beta, initial_state=initial_state, output_final_state=True, use_qk_l2norm=l2norm
        )
        q = q[0, 0, patch["head"] // (v.shape[2] // q.shape[2])].float()
        q = q * torch.rsqrt((q * q).sum() + 1e-6) * q.shape[-1] ** -0.5
        out.o[0, 0, patch["head"]] += (q @ patch["change"]).to(out.o)
        out.final_state[0, patch["head"]] += patch["change"]
        return out.o, out.final_state

    kl = {name: [] for name in changes if name != BASELINE}
    with intercept(model, {layer: rule}):
        for i in which:
            row, t, patch["head"] = int(places.row[i]), int(places.position[i]), int(places.head[i])
            prefix = model(ids[row : row + 1, :t], use_cache=True, logits_to_keep=1).past_key_values
            logits = {}
            for name, change in changes.items():
                cache, steps = copy.deepcopy(prefix), []
                for s in range(t, t + horizon + 1):
                    patch["change"] = change[i] if change is not None and s == t else None
                    token = ids[row : row + 1, s : s + 1]
                    steps.append(model(token, past_key_values=cache, use_cache=True).logits[0, 0])
                patch["change"] = None
                logits[name] = torch.stack(steps)
            base = logits.pop(BASELINE)
            for name, (forward, _) in kl_pair(base, logits).items():
                kl[name].append(forward)
    return {name: torch.stack(x) for name, x in kl.items()}, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--layer", type=int, default=4)
    parser.add_argument("--head", type=int, default=1)
    parser.add_argument("--passages", type=int, default=16)
    parser.add_argument("--each", type=int, default=8, help="firings a passage")
    parser.add_argument("--tokens", type=int, default=256, help="tokens a passage")
    parser.add_argument("--horizon", type=int, default=8)
    parser.add_argument("--peer-firings", type=int, default=3, help="firings the peer decodes a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, _ = load(args.model)
    engine = ForkEngine(model, args.layer, args.horizon)
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(3, model.config.vocab_size, (args.passages, args.tokens), generator=generator)
    places = make_places(args.passages, args.each, args.tokens, args.horizon, args.head, args.seed)
    n, site = len(places), engine.site
    unit = torch.nn.functional.normalize
    fired = Fired(
        unit(torch.randn(n, 1, site.K, generator=generator), dim=-1),
        unit(torch.randn(n, 1, site.V, generator=generator), dim=-1), torch.ones(n), [str(i) for i in range(n)],
    )  # fmt: skip
    _, clean, _, _ = engine_side(engine, ids, places, fired, args.seed)
    changes = state_changes(clean, fired, args.seed)
    ours, theirs, worst = [], [], 0.0
    for r in range(args.rounds):
        kl, _, _, seconds = engine_side(engine, ids, places, fired, args.seed)
        ours.append(n * len(changes) / seconds)
        which = [(r * args.peer_firings + j) * 37 % n for j in range(args.peer_firings)]
        peer, seconds = peer_side(model, args.layer, ids, places, changes, which, args.horizon)
        theirs.append(len(which) * len(changes) / seconds)
        for name in peer:
            difference = (peer[name] - kl[name][which]).abs()
            worst = max(worst, float((difference / (1e-8 + 1e-2 * kl[name][which])).max()))
    agree = worst <= 1
    print(json.dumps({
        "forks": n * len(changes), "conditions": len(changes), "horizon": args.horizon, "tokens": args.tokens,
        "threads": args.threads, "engine_forks_per_second": float(np.median(ours)),
        "peer_forks_per_second": float(np.median(theirs)),
        "ratio": float(np.median(ours) / np.median(theirs)) if agree else None,
        "worst_difference_over_tolerance": worst,
    }, indent=2))  # fmt: skip
    if not agree:
        raise SystemExit("the two sides disagree: no ratio")


if __name__ == "__main__":
    main()
