"""A training step from writes against the best dense step on stored states: states a second, bytes stored, same loss.

    python bench/bench_sae_training.py [--K 128 --V 128 -F 2048 -k 32 --passages 4 --length 256 --repeats 5]

Both steps use the same tokens and the same optimiser, and the bench refuses to print a ratio unless loss and gradients
agree. The dense peer has its states ready in memory, encodes by one matrix product, and already has this package's
sparse backward (the gradient of the atoms that fired only); a dense backward is timed beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from writesae.ops import encode
from writesae.sae.block import Block
from writesae.sae.site import Batch, SiteTrainer, TrainConfig
from writesae.writes import Writes


class StoredStates:
    """What the dense step needs of a block, from states held in memory."""

    def __init__(self, block: Block):
        N, T, K, V = self.shape = block.shape
        order = torch.arange(N * T)
        self.stored = torch.cat([block.states(p // T, p % T) for p in order.split(512)]).view(N, T, K, V)

    def states(self, rows, positions):
        return self.stored[rows, positions]


def fully_dense(site: SiteTrainer, batch: Batch) -> torch.Tensor:
    """The textbook step's loss: every gradient a dense product, as autograd makes it."""
    sae = site.sae
    X = (batch.block.states(batch.rows, batch.positions) - sae.mean) * site.scale
    encoder = torch.einsum("frk,frv->fkv", sae.v_enc, sae.w_enc).flatten(1)
    pre = X.flatten(1) @ encoder.T + sae.b_enc
    values, indices = pre.topk(sae.k)
    codes = torch.zeros_like(pre).scatter(1, indices, values.relu())
    unit = torch.nn.functional.normalize
    atoms = torch.einsum("frk,frv->fkv", unit(sae.v_dec, dim=-1), unit(sae.w_dec, dim=-1)).flatten(1)
    return (codes @ atoms + sae.bias.flatten() - X.flatten(1)).square().sum(1).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("K", 128), ("V", 128), ("passages", 4), ("length", 256), ("repeats", 5), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("-F", type=int, default=2048)
    parser.add_argument("-k", type=int, default=32)
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    g = torch.Generator().manual_seed(0)
    B, T, K, V = args.passages, args.length, args.K, args.V
    unit = torch.nn.functional.normalize
    # Correlated keys and weak decay: states that remember, as trained heads' do.
    left = unit(torch.randn(B, T, 1, 1, K, generator=g) + 0.7 * torch.randn(1, 1, 1, 1, K, generator=g), dim=-1)
    right = torch.randn(B, T, 1, 1, V, generator=g)
    block = Block([Writes(-0.1 * torch.rand(B, T, 1, generator=g), left, right)], 0)
    stored = StoredStates(block)
    order = torch.arange(B * T)
    # Random atoms: drawn from so few writes, some would be the same, and which of two equal atoms fires is anyone's.
    config = TrainConfig(F=args.F, k=args.k, init="random")
    sites, batches, steps = {}, {}, {}
    for name, path, where in (
        ("writes, no states", "factored", block), ("writes, states rebuilt", "dense", block),
        ("stored states", "dense", stored), ("stored states, dense backward", "dense", stored),
    ):  # fmt: skip
        sites[name] = SiteTrainer(0, 0, TrainConfig(**(config.record() | {"path": path})), block)
        batches[name] = Batch(where, order // T, order % T)
        steps[name] = lambda step, name=name: sites[name].step(step, batches[name])

    dense = "stored states, dense backward"

    def dense_step(step):
        site = sites[dense]
        site.optimizer.zero_grad(set_to_none=True)
        fully_dense(site, batches[dense]).backward()
        site.optimizer.step()

    steps[dense] = dense_step
    losses, grads = {}, {}
    for name, site in sites.items():
        loss = fully_dense(site, batches[name]) if name == dense else site.losses(batches[name]).main
        loss.backward()
        losses[name] = float(loss.detach())
        grads[name] = torch.cat([p.grad.flatten() for p in site.sae.parameters()])
    # In float32 a near-tie at the cut may fall either way, and each such state moves the gradient: how many there are
    # is counted, and they are all the difference allowed.
    site = sites["writes, no states"]
    v, w, b = (x.detach() for x in site._factors() + (site.sae.b_enc,))
    b = b - torch.einsum("frk,kv,frv->f", v, site.sae.mean * site.scale, w)
    sets = encode(block.writes(torch.arange(B), site.scale), v[None], w[None], b[None], k=args.k).indices[:, :, 0]
    X = (stored.stored.flatten(0, 1) - site.sae.mean) * site.scale
    pre = X.flatten(1) @ torch.einsum("frk,frv->fkv", v, w).flatten(1).T + site.sae.b_enc
    differ = int((sets.flatten(0, 1).sort().values != pre.topk(args.k).indices.sort().values).any(1).sum())
    allowed = 1e-4 + 2 * (differ / (B * T * args.k)) ** 0.5
    print(f"top-{args.k} sets that fall differently in float32: {differ} of {B * T}")
    for name in sites:
        off = float((grads[name] - grads[dense]).norm() / grads[dense].norm())
        if abs(losses[name] - losses[dense]) > 1e-5 * losses[dense] or off > allowed:
            raise SystemExit(
                f"{name}: loss {losses[name]} against {losses[dense]}, gradient off by {off:.1e} (allowed "
                f"{allowed:.1e}): not the same step, so no timings"
            )
        print(f"{name:32s} loss {losses[name]:.6f}, gradient within {off:.1e} of the dense one")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(args.repeats + 1):  # interleaved; the first round warms up
        for name, step in steps.items():
            began = time.perf_counter()
            step(repeat)
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    held = {"writes, no states": sum(x.nbytes for x in (block.decay, block.left, block.right))}
    held["writes, states rebuilt"] = block.nbytes
    held["stored states"] = held[dense] = stored.stored.nbytes
    result = {"K": K, "V": V, "F": args.F, "k": args.k, "states": B * T, "threads": torch.get_num_threads()}
    result["steps"] = {}
    base = statistics.median(seconds["stored states"])
    for name, times in seconds.items():
        middle = statistics.median(times)
        result["steps"][name] = {
            "states_per_second": B * T / middle, "seconds": [round(x, 4) for x in times],
            "bytes_per_state": held[name] / (B * T), "speed_against_stored_states": base / middle,
        }  # fmt: skip
        print(
            f"{name:32s} {B * T / middle:9.0f} states/s ({min(times):.3f} to {max(times):.3f} s), "
            f"{base / middle:5.2f}x, {held[name] / (B * T):8.0f} bytes a state"
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
