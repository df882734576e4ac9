"""A training step from writes against the best dense step on stored states: states a second, bytes stored, same loss.

All steps work on the same tokens with the same optimiser, and there is no ratio unless loss and gradients agree. The
peer is the strongest dense step found: states centred and scaled in memory, all pre-activations by one product with the
F x KV encoder, then gradients by hand for the atoms that fired only, in slices that stay in cache, without autograd.
Beside it stand the package's own dense path and the textbook step, whose gradients are dense products by autograd.
Ours and the peer are timed at two batch sizes, and each enters the ratio with the better one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from ..ops import encode
from ..sae.block import Block
from ..sae.site import Batch, SiteTrainer, TrainConfig
from ..writes import Writes
from .case import Case, Disagree, Options, Row
from .timing import interleaved, median_and_spread, ratio_row

SLICE = 64  # states of the peer's sparse part at a time


class StoredStates:
    """What the package's dense step needs of a block, from states held in memory."""

    def __init__(self, block: Block):
        N, T, K, V = self.shape = block.shape
        order = torch.arange(N * T)
        self.stored = torch.cat([block.states(p // T, p % T) for p in order.split(512)]).view(N, T, K, V)

    def states(self, rows, positions):
        return self.stored[rows, positions]


def _unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _block(passages: int, length: int, K: int, V: int) -> Block:
    """Correlated keys and weak decay: states that remember, as trained heads' do."""
    g = torch.Generator().manual_seed(0)
    left = _unit(torch.randn(passages, length, 1, 1, K, generator=g) + 0.7 * torch.randn(1, 1, 1, 1, K, generator=g))
    right = torch.randn(passages, length, 1, 1, V, generator=g)
    return Block([Writes(-0.1 * torch.rand(passages, length, 1, generator=g), left, right)], 0)


def textbook(site: SiteTrainer, X: torch.Tensor) -> torch.Tensor:
    """The loss as a formula, `X [P, K, V]` centred and scaled; every gradient a dense product, as autograd makes it."""
    sae = site.sae
    encoder = torch.einsum("frk,frv->fkv", sae.v_enc, sae.w_enc).flatten(1)
    pre = X.flatten(1) @ encoder.T + sae.b_enc
    values, indices = pre.topk(sae.k)
    codes = torch.zeros_like(pre).scatter(1, indices, values.relu())
    atoms = torch.einsum("frk,frv->fkv", _unit(sae.v_dec), _unit(sae.w_dec)).flatten(1)
    return (codes @ atoms + sae.bias.flatten() - X.flatten(1)).square().sum(1).mean()


class ByHand:
    """The peer. `gradients()` fills `.grad` of the parameters and returns the loss of `X [P, K, V]`."""

    def __init__(self, site: SiteTrainer, X: torch.Tensor):
        self.site, self.X = site, X
        self.encoder = X.new_empty(site.sae.F, X[0].numel())
        self.pre = X.new_empty(len(X), site.sae.F)

    @torch.no_grad()
    def gradients(self) -> torch.Tensor:
        sae, X = self.site.sae, self.X
        P, (F, K, V), k = len(X), (sae.F, sae.K, sae.V), sae.k
        v_enc, w_enc = sae.v_enc[:, 0], sae.w_enc[:, 0]
        torch.mul(v_enc[:, :, None], w_enc[:, None, :], out=self.encoder.view(F, K, V))
        torch.addmm(sae.b_enc, X.view(P, -1), self.encoder.T, out=self.pre)
        values, indices = self.pre.topk(k, sorted=False)
        values.relu_()
        with torch.enable_grad():
            v_dec, w_dec = _unit(sae.v_dec[:, 0]), _unit(sae.w_dec[:, 0])
        grads = [torch.zeros_like(x) for x in (v_enc, w_enc, v_dec, w_dec)]
        d_b, d_bias, loss = torch.zeros_like(sae.b_enc), torch.zeros_like(sae.bias), X.new_zeros(())
        for at in range(0, P, SLICE):
            x, a, i = (y[at : at + SLICE] for y in (X, values, indices))
            flat, n = i.reshape(-1), len(x)
            v, w = v_dec.index_select(0, flat).view(n, k, K), w_dec.index_select(0, flat).view(n, k, V)
            error = torch.baddbmm(x, (v * a[:, :, None]).transpose(1, 2), w, beta=-1).add_(sae.bias)
            loss += error.square().sum()
            d_bias += error.sum(0)
            of_v, of_w = torch.bmm(w, error.transpose(1, 2)), torch.bmm(v, error)
            slope = (of_v * v).sum(2) * (a > 0)
            d_b.index_add_(0, flat, slope.view(-1))
            grads[2].index_add_(0, flat, of_v.mul_(a[:, :, None]).view(-1, K))
            grads[3].index_add_(0, flat, of_w.mul_(a[:, :, None]).view(-1, V))
            v, w = v_enc.index_select(0, flat).view(n, k, K), w_enc.index_select(0, flat).view(n, k, V)
            of_v, of_w = torch.bmm(w, x.transpose(1, 2)), torch.bmm(v, x)
            grads[0].index_add_(0, flat, of_v.mul_(slope[:, :, None]).view(-1, K))
            grads[1].index_add_(0, flat, of_w.mul_(slope[:, :, None]).view(-1, V))
        sae.v_enc.grad, sae.w_enc.grad = (x.mul_(2 / P)[:, None] for x in grads[:2])
        sae.b_enc.grad, sae.bias.grad = d_b * (2 / P), d_bias * (2 / P)
        torch.autograd.backward([v_dec, w_dec], [x.mul_(2 / P) for x in grads[2:]])
        return loss / P

    def step(self) -> None:
        self.site.optimizer.zero_grad(set_to_none=True)
        self.gradients()
        self.site.optimizer.step()


class Setting:
    """All steps over the same passages, each with its own copy of the same dictionary."""

    def __init__(self, passages: int, length: int, K: int, V: int, F: int, k: int):
        self.block = _block(passages, length, K, V)
        self.stored = StoredStates(self.block)
        self.states = passages * length
        order = torch.arange(self.states)
        rows, positions = order // length, order % length
        # Random atoms: drawn from so few writes, some would be the same, and which of two equal atoms fires is
        # anyone's.
        config = TrainConfig(F=F, k=k, init="random")
        self.sites = {
            name: SiteTrainer(0, 0, TrainConfig(**(config.record() | {"path": path})), self.block)
            for name, path in (("writes", "factored"), ("by hand", "dense"), ("dense path", "dense"))
        }
        self.batches = {"writes": Batch(self.block, rows, positions), "dense path": Batch(self.stored, rows, positions)}
        site = self.sites["by hand"]
        self.X = (self.stored.stored.flatten(0, 1) - site.sae.mean).mul_(site.scale)
        self.by_hand = ByHand(site, self.X)

    def step(self, name: str) -> None:
        self.sites[name].step(0, self.batches[name])

    def textbook_step(self) -> None:
        site = self.sites["by hand"]
        site.optimizer.zero_grad(set_to_none=True)
        textbook(site, self.X).backward()
        site.optimizer.step()

    def check(self) -> None:
        """Loss and gradients of every step against the textbook's; raises `Disagree`.

        In float32 a near-tie at the cut may fall either way, and each such state moves the gradient: how many there
        are is counted, and they are all the difference allowed.
        """
        site = self.sites["writes"]
        k, v, w, b = site.sae.k, *(x.detach() for x in site._factors() + (site.sae.b_enc,))
        shifted = b - torch.einsum("frk,kv,frv->f", v, site.sae.mean * site.scale, w)
        writes = self.block.writes(torch.arange(self.block.shape[0]), site.scale)
        sets = encode(writes, v[None], w[None], shifted[None], k=k).indices[:, :, 0].flatten(0, 1).sort().values
        pre = self.X.flatten(1) @ torch.einsum("frk,frv->fkv", v, w).flatten(1).T + b
        differ = int((sets != pre.topk(k).indices.sort().values).any(1).sum())
        allowed = 1e-4 + 2 * (differ / (self.states * k)) ** 0.5

        def gradient(name, run):
            self.sites[name].optimizer.zero_grad(set_to_none=True)
            loss = run()
            if loss.requires_grad:
                loss.backward()
            return float(loss.detach()), torch.cat([p.grad.flatten() for p in self.sites[name].sae.parameters()])

        loss, exact = gradient("by hand", lambda: textbook(self.sites["by hand"], self.X))
        runs = {name: lambda name=name: self.sites[name].losses(self.batches[name]).main for name in self.batches}
        for name, run in {**runs, "by hand": self.by_hand.gradients}.items():
            mine, grad = gradient(name, run)
            off = float((grad - exact).norm() / exact.norm())
            if not abs(mine - loss) <= 1e-5 * loss or not off <= allowed:
                raise Disagree(
                    f"{name}: loss {mine} against {loss}, gradient off by {off:.1e} (allowed {allowed:.1e}): not the "
                    "same step"
                )


def training_step(options: Options) -> Iterator[Row]:
    length, *sizes = (64, 32, 64, 256, 8) if options.quick else (256, 128, 128, 2048, 32)
    K, V, F, k = sizes
    settings = [Setting(passages, length, *sizes) for passages in ((1, 2) if options.quick else (4, 16))]
    for setting in settings:
        setting.check()
    runs = [run for s in settings for run in (lambda s=s: s.step("writes"), s.by_hand.step)]
    taken = interleaved(runs, options.rounds(7))
    a_state = [[t / s.states for t in x] for x, s in zip(taken, [s for s in settings for _ in range(2)], strict=True)]
    ours, theirs = (min(range(first, 4, 2), key=lambda i: statistics.median(a_state[i])) for first in (0, 1))
    size = f"K = {K}, V = {V}, F = {F:,}, k = {k}"
    row = ratio_row(
        f"training step, {size}: states a second", "a dense step by hand on stored states", "x faster", a_state[ours],
        a_state[theirs], target=None if options.quick else 20, aim=None if options.quick else 50,
    )  # fmt: skip
    row.note = (
        f"{1 / row.seconds:,.0f} states a second, {settings[ours // 2].states:,} a step, against "
        f"{1 / row.peer_seconds:,.0f}, {settings[theirs // 2].states:,} a step"
    )
    # Encoding alone needs this much; what follows it depends on which atoms fire.
    yield row.does(2 * (K + V) * F, "GFLOP/s", "float32")
    for i, rates in enumerate([[1 / t for t in x] for x in a_state]):
        rate, spread = median_and_spread(rates)
        what = ("from writes", "dense, by hand")[i % 2]
        name = f"training step, {what}, {settings[i // 2].states:,} states a step"
        yield Row(name, "", rate, "states/s", spread=spread)
    small = settings[0]
    others = [lambda: small.step("dense path"), small.textbook_step]
    slower = interleaved([lambda: small.step("writes"), *others], options.rounds(3))
    for peer, seconds in zip(("the package's dense path", "textbook autograd"), slower[1:], strict=True):
        yield ratio_row(f"training step, {small.states:,} states a step", peer, "x faster", slower[0], seconds)
    held = sum(x.nbytes for x in (small.block.decay, small.block.left, small.block.right))
    less = small.stored.stored.nbytes / held
    note = f"{held / small.states:,.0f} bytes a state: K + V numbers and the decay"
    target = None if options.quick else 64
    yield Row(f"training, {size}: storage a state", "stored states", less, "x less", target, note=note)


CASES = [Case("training", "training step from writes", training_step, "a dense step, stored states")]
