"""A training step from writes against the best dense step on stored states: states a second, bytes stored, same loss.

Both steps use the same tokens and the same optimiser, and there is no ratio unless loss and gradients agree. The dense
peer has its states ready in memory, encodes by one matrix product, and already has this package's sparse backward (the
gradient of the atoms that fired only); a dense backward is timed beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from ..ops import encode
from ..sae.block import Block
from ..sae.site import Batch, SiteTrainer, TrainConfig
from ..writes import Writes
from .case import Case, Disagree, Options, Row
from .timing import ratio_row


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


def training_step(options: Options) -> Iterator[Row]:
    B, T, K, V, F, k = (1, 64, 32, 64, 256, 8) if options.quick else (4, 256, 128, 128, 2048, 32)
    g = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    # Correlated keys and weak decay: states that remember, as trained heads' do.
    left = unit(torch.randn(B, T, 1, 1, K, generator=g) + 0.7 * torch.randn(1, 1, 1, 1, K, generator=g), dim=-1)
    right = torch.randn(B, T, 1, 1, V, generator=g)
    block = Block([Writes(-0.1 * torch.rand(B, T, 1, generator=g), left, right)], 0)
    stored = StoredStates(block)
    order = torch.arange(B * T)
    # Random atoms: drawn from so few writes, some would be the same, and which of two equal atoms fires is anyone's.
    config = TrainConfig(F=F, k=k, init="random")
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
    sets = encode(block.writes(torch.arange(B), site.scale), v[None], w[None], b[None], k=k).indices[:, :, 0]
    X = (stored.stored.flatten(0, 1) - site.sae.mean) * site.scale
    pre = X.flatten(1) @ torch.einsum("frk,frv->fkv", v, w).flatten(1).T + site.sae.b_enc
    differ = int((sets.flatten(0, 1).sort().values != pre.topk(k).indices.sort().values).any(1).sum())
    allowed = 1e-4 + 2 * (differ / (B * T * k)) ** 0.5
    for name in sites:
        off = float((grads[name] - grads[dense]).norm() / grads[dense].norm())
        if abs(losses[name] - losses[dense]) > 1e-5 * losses[dense] or off > allowed:
            raise Disagree(
                f"{name}: loss {losses[name]} against {losses[dense]}, gradient off by {off:.1e} (allowed "
                f"{allowed:.1e}): not the same step"
            )
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.rounds(5) + 1):  # interleaved; the first round warms up
        for name, step in steps.items():
            began = time.perf_counter()
            step(repeat)
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    held = {"writes, no states": sum(x.nbytes for x in (block.decay, block.left, block.right))}
    held["writes, states rebuilt"] = block.nbytes
    held["stored states"] = held[dense] = stored.stored.nbytes
    size = f"K = {K}, V = {V}, F = {F:,}, k = {k}"
    for name, peer, targets in (
        ("writes, no states", "stored states", {"target": 20, "aim": 50}), ("writes, no states", dense, {}),
        ("writes, states rebuilt", "stored states", {}),
    ):  # fmt: skip
        row = ratio_row(
            f"training step, {size}: from {name}", f"a dense step, {peer}", "x faster", seconds[name], seconds[peer],
            **targets,
        )  # fmt: skip
        row.note = f"{B * T / row.seconds:,.0f} states a second against {B * T / row.peer_seconds:,.0f}"
        yield row
    less = held["stored states"] / held["writes, no states"]
    yield Row(f"training, {size}: storage a state", "stored states", less, "x less", None if options.quick else 64)


CASES = [Case("training", "training step from writes", training_step, "a dense step, stored states")]
