"""Training one dictionary at one site: its losses by both paths, its optimiser, dead atoms, and export.

Inside training a dictionary acts on s (X - M), with E ||s (X - M)||^2 = 1, so that one learning rate suits states of
any norm and the loss is a fraction of variance. Atoms enter by their directions alone, but for tied ones, whose norm is
the only gain they have: k atoms that overlap and each project fully overshoot many times. `export` gives the same
function on raw states: activations, biases and the error scale by 1/s, and which atoms fire does not change. For a
dictionary of writes X is the write and M is 0. In the readers' metric with root R (`readers.py`) X is R X, and `export`
takes R out of both sides.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import encode, factored_loss, pursuit, training_loss
from ..ops.pursuit import responses
from ..ops.sae_training import atoms_on
from .block import Block
from .config import TrainConfig
from .readers import seen_through
from .resume import check_like, on_cpu
from .sae import SAE
from .sparse import BilinearAt, Decode, exact_topk
from .sparsity import Sparsity, level_of, packed


@dataclass(frozen=True)
class Batch:
    """States of one step: the block they live in, and `[P]` int64 passage and position of each, on its device."""

    block: Block
    rows: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Losses:
    """`main`, `aux` and `penalty` scalars with gradients (the last weighed), `errors [P]` (each state's share of main),
    `fired [F]` bool."""

    main: Tensor
    aux: Tensor
    errors: Tensor
    fired: Tensor
    penalty: Tensor | None = None


def generator(*keys) -> torch.Generator:
    """A generator whose stream depends on the keys alone: data order never depends on where a run was interrupted."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


class SiteTrainer:
    """One dictionary in training, on the device of the preparation data's block; deterministic by `config.seed` and
    site. What is drawn is drawn on the CPU, so that every device sees the same data from the same atoms."""

    def __init__(self, layer: int, head: int, config: TrainConfig, block: Block):
        self.layer, self.head, self.config = layer, head, config
        N, T, K, V = block.shape
        self.path, self.root = config.resolved_path(K, V, block.gate), block.root
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(config.seed, "init", layer, head).initial_seed())
            c = config
            centred, self.pursued = c.centred and c.target == "state", c.sparsity == "pursuit"
            self.sae = SAE(K, V, c.F, c.k, c.kind, c.r, layer=layer, head=head, centred=centred, target=c.target)
        self.device, self.tied = block.device, c.kind == "bilinear_tied" and not self.pursued
        self.sae.to(self.device, block.right.dtype)
        self.scale = 1.0  # s
        self.silent = torch.zeros(config.F, dtype=torch.int64, device=self.device)  # steps since each atom fired
        self.resampled = 0
        self.sparsity: Sparsity | None = None
        self._prepare(block)
        fixed = () if c.target == "state" else ("bias", "b_enc") if self.pursued else ("bias",)
        for name in fixed:
            getattr(self.sae, name).requires_grad_(False)
        groups = [{"params": [p for p in self.sae.parameters() if p.requires_grad], "factor": 1.0}]
        if self.sparsity is not None and list(self.sparsity.parameters()):
            # A threshold is learnt by its logarithm, on which a step of Adam would be a share of `lr` only.
            factor = 10.0 if config.sparsity == "jumprelu" else 1.0
            groups.append({"params": list(self.sparsity.parameters()), "factor": factor})
        self.optimizer = torch.optim.Adam(groups, lr=config.lr, fused=True)

    # ---- start ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _prepare(self, block: Block) -> None:
        """Mean and scale of the states, and initial atoms."""
        N, T, K, V = block.shape
        c = self.config
        draw = generator(c.seed, "prepare", self.layer, self.head)
        picks = torch.randperm(N * T, generator=draw)[:16384].to(self.device).split(1024)
        total = torch.zeros(K, V, dtype=torch.float64, device=self.device)
        for part in picks:
            total += block.examples(part // T, part % T).double().sum(0)
        count = sum(map(len, picks))
        if self.sae.centred:
            self.sae.mean.copy_(total / count)
        square = 0.0
        for part in picks:
            square += float((block.examples(part // T, part % T) - self.sae.mean).double().square().sum())
        if not square > 0:
            raise ValueError(
                f"site ({self.layer}, {self.head}): every training {c.target} is the same, nothing to learn"
            )
        self.scale = (count / square) ** 0.5
        if c.init == "random":
            v, w = _unit(torch.randn(c.F, c.r, K, generator=draw)), _unit(torch.randn(c.F, c.r, V, generator=draw))
        else:
            # Tokens that write much are worth more atoms: draw by the norm of the write.
            norms = block.write_norms().flatten().cpu()
            if c.target == "write":
                norms = norms.pow(1 - c.balance / 2) * (norms > 0)
            writing, wanted = int((norms > 0).sum()), c.F * c.r
            if not writing:
                raise ValueError(f"site ({self.layer}, {self.head}): no token writes anything")
            pick = torch.multinomial(norms.float(), wanted, replacement=wanted > writing, generator=draw)
            rows, positions = (pick // T).to(self.device), (pick % T).to(self.device)
            if c.init == "writes":
                left, right = block.natives(rows, positions)
                v, w = left[:, -1].view(c.F, c.r, K), right[:, -1].view(c.F, c.r, V)
            else:
                v, w = _top_pairs(block.examples(rows[: c.F], positions[: c.F]) - self.sae.mean, c.r)
        v, w = _unit(v.to(self.sae.mean)), _unit(w.to(self.sae.mean))
        every = torch.arange(c.F, device=self.device)
        self._set_atoms(every, v, w, 1.0)
        if self.pursued:
            return
        # Atoms overlap, so k full projections overshoot: start from the one gain that reconstructs best.
        X = self._examples(block, picks[0] // T, picks[0] % T)
        pre = X.flatten(1) @ self.sae.encoder_matrix().T
        if c.sparsity == "topk":
            values, indices = exact_topk(pre, c.k)
        else:
            indices, on = packed(pre >= level_of(pre, c.k))
            values = pre.gather(1, indices) * on
        made = self._decode(values, indices)
        gain = float((made * X).sum() / made.square().sum())
        if gain > 0:
            self._set_atoms(every, v, w, gain)
        if c.sparsity != "topk":
            level = level_of(X.flatten(1) @ self.sae.encoder_matrix().T, c.k)
            self.sparsity = Sparsity(c.sparsity, level, c.F, c.k, c.penalty)

    @torch.no_grad()
    def _set_atoms(self, at: Tensor, v: Tensor, w: Tensor, gain: float, dense: Tensor | None = None) -> None:
        """Atoms `at [n]` from v `[n, r, K]`, w `[n, r, V]` (dense ones from `[n, K*V]`); encoders `gain` times that, or
        tied ones with norms whose product is `gain`."""
        sae = self.sae
        if self.tied:
            v, w = gain**0.25 * v, gain**0.25 * w
        flat = _unit(torch.einsum("frk,frv->fkv", v, w).flatten(1)) if dense is None else dense
        for name, value in (
            ("v_dec", v), ("w_dec", w), ("W_dec", flat), ("v_enc", gain**0.5 * v), ("w_enc", gain**0.5 * w),
            ("W_enc", gain * flat), ("b_enc", flat.new_zeros(len(at))),
        ):  # fmt: skip
            if hasattr(sae, name):
                getattr(sae, name)[at] = value.to(sae.mean)

    # ---- losses -----------------------------------------------------------------------------------------------

    def _factors(self) -> tuple[Tensor, Tensor]:
        sae = self.sae
        return (sae.v_dec, sae.w_dec) if sae.kind == "bilinear_tied" else (sae.v_enc, sae.w_enc)

    def _atoms(self) -> tuple[Tensor, Tensor]:
        sae = self.sae
        return (sae.v_dec, sae.w_dec) if self.tied else (_unit(sae.v_dec), _unit(sae.w_dec))

    def dead(self) -> Tensor:
        """`[F]` bool: silent for `dead_after` steps."""
        return self.silent >= self.config.dead_after

    def _examples(self, block: Block, rows: Tensor, positions: Tensor) -> Tensor:
        """`[P, K, V]` s (X - M)."""
        return (block.examples(rows, positions) - self.sae.mean) * self.scale

    def losses(self, batch: Batch, done: float = 0.0) -> Losses:
        """Reconstruction and auxiliary loss of a batch, by the path in use, after a share `done` of the training. Both
        paths give the same numbers."""
        return self._factored(batch) if self.path == "factored" else self._dense(batch, done)

    def _pursued(self, batch: Batch) -> Losses:
        """Codes by pursuit, and the errors they leave to the atoms, the codes held fixed: as they are least squares,
        that is the gradient."""
        c = self.config
        left, right = batch.block.natives(batch.rows, batch.positions)
        right = right * self.scale
        X, weight = torch.einsum("prk,prv->pkv", left, right), self._weight(left, right)
        v, w = (x.detach() for x in self._atoms())
        main = X.new_zeros(())
        ks = [c.k] if not c.also_k else [c.also_k, c.k]
        for k in ks:
            values, indices = pursuit(left, right, v, w, v, w, k)
            errors = (self._decode(values, indices) - X).square().sum((1, 2)) * weight
            main = main + errors.mean() / len(ks)
        return Losses(main, main.new_zeros(()), errors.detach(), self._fired(values, indices))

    def _weight(self, left: Tensor, right: Tensor) -> Tensor:
        """`[P]` weight of each write's squared error, 1 / norm^balance, of mean 1."""
        norm = (left.norm(dim=-1) * right.norm(dim=-1)).square().sum(-1).sqrt()
        weight = torch.where(norm > 0, norm.clamp_min(1e-6).pow(-self.config.balance), 0.0)
        return weight / (weight * norm.square()).mean().clamp_min(1e-30)

    def _dense(self, batch: Batch, done: float) -> Losses:
        if self.pursued:
            return self._pursued(batch)
        sae, c = self.sae, self.config
        X = self._examples(batch.block, batch.rows, batch.positions)
        weight: Tensor | float = 1.0
        natives = None
        if c.target == "write":
            left, right = batch.block.natives(batch.rows, batch.positions)
            natives = left, right * self.scale
            weight = self._weight(*natives)
        dead = self.dead().nonzero().flatten()
        if sae.bilinear_encoder:
            v, w = self._factors()
            with torch.no_grad():
                if natives is None:
                    pre = X.flatten(1) @ torch.einsum("frk,frv->fkv", v, w).flatten(1).T
                else:
                    pre = responses(v, w, *natives)
        else:
            v = w = None
            pre = X.flatten(1) @ sae.W_enc.T

        def chosen(indices: Tensor, among: Tensor | None = None) -> Tensor:
            here = pre if among is None else pre.index_select(1, among)
            values = here.gather(1, indices)
            if v is None:
                return values
            parts = (v, w) if among is None else (v.index_select(0, among), w.index_select(0, among))
            return BilinearAt.apply(values, indices, X, *parts)

        def codes(among: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
            bias = sae.b_enc if among is None else sae.b_enc.index_select(0, among)
            here = pre if among is None else pre.index_select(1, among)
            with torch.no_grad():
                indices = exact_topk(here + bias, k)[1]
            values = (chosen(indices, among) + bias.gather(0, indices.flatten()).view_as(indices)).relu()
            return values, indices if among is None else among[indices]

        penalty = None
        if self.sparsity is None:
            values, indices = codes(None, c.k)
        else:
            values, indices, penalty, gate = self.sparsity.codes(pre, chosen, sae.b_enc, done)
            if gate is not None:  # what the open gates alone would reconstruct, by atoms that do not follow
                opened = self._decode(gate, indices, frozen=True) + sae.bias.detach()
                penalty = penalty + (opened - X).square().sum((1, 2)).mean()
        made = self._decode(values, indices) + sae.bias
        errors = (made - X).square().sum((1, 2)) * weight
        aux = errors.new_zeros(())
        if len(dead) and c.aux > 0:
            residual = (X - made).detach()
            left_over = (self._decode(*codes(dead, min(c.k_aux, len(dead)))) - residual).square().sum((1, 2))
            aux = (left_over * weight).mean()
        return Losses(errors.mean(), aux, errors.detach(), self._fired(values, indices), penalty)

    def _decode(self, values: Tensor, indices: Tensor, frozen: bool = False) -> Tensor:
        sae = self.sae
        if sae.rank_one_atoms:
            return Decode.apply(values, indices, *(x.detach() if frozen else x for x in self._atoms()))
        dense = values.new_zeros(len(values), sae.F).scatter_add(1, indices, values)
        atoms = _unit(sae.W_dec)
        return (dense @ (atoms.detach() if frozen else atoms)).view(-1, sae.K, sae.V)

    def _factored(self, batch: Batch) -> Losses:
        sae, c = self.sae, self.config
        rows, inverse = batch.rows.unique(return_inverse=True)
        writes = batch.block.writes(rows, self.scale)
        mask = torch.zeros(len(rows), batch.block.shape[1], dtype=torch.bool, device=self.device)
        mask.index_put_((inverse, batch.positions), mask.new_ones(()))
        mean = sae.mean * self.scale
        v, w = self._factors()
        bias = sae.b_enc - atoms_on(mean[None], v[None], w[None])[0]
        (v_dec, w_dec), offset = self._atoms(), mean + sae.bias
        # A state drawn twice weighs twice.
        weight = mean.new_zeros(mask.shape).index_put_(
            (inverse, batch.positions), mean.new_full((), 1 / len(inverse)), accumulate=True
        )
        step = training_loss(
            writes, v[None], w[None], bias[None], v_dec[None], w_dec[None], offset[None], c.k, weight, heads=[0]
        )
        codes, errors = step.codes, step.errors[inverse, batch.positions, 0]
        aux = errors.new_zeros(())
        dead = self.dead().nonzero().flatten()
        if len(dead) and c.aux > 0:
            some = [x.index_select(0, dead)[None] for x in (v, w, bias)]
            extra = encode(writes, *some, k=min(c.k_aux, len(dead)), heads=[0])
            # The residual is what the detached dictionary leaves; the dead atoms stand behind it as atoms F, F + 1, ...
            behind = [torch.cat([x.detach(), x.index_select(0, dead)])[None] for x in (v_dec, w_dec)]
            values = torch.cat([codes.values, extra.values], -1)
            indices = torch.cat([codes.indices, extra.indices + sae.F], -1)
            left = factored_loss(writes, values, indices, *behind, offset.detach()[None], heads=[0], mask=mask)
            aux = left[inverse, batch.positions, 0].mean()
        values, indices = (x[inverse, batch.positions, 0] for x in (codes.values, codes.indices))
        return Losses(step.loss, aux, errors, self._fired(values, indices))

    def _fired(self, values: Tensor, indices: Tensor) -> Tensor:
        counts = torch.zeros(self.sae.F, dtype=torch.int64, device=self.device)
        return counts.index_add_(0, indices.flatten(), (values > 0).flatten().long()) > 0

    # ---- steps ------------------------------------------------------------------------------------------------

    def step(self, step: int, batch: Batch) -> dict[str, float]:
        """One optimiser step and the chores that fall on it. Returns main loss (an FVU), aux loss, and counts."""
        c = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = c.rate(step) * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.losses(batch, step / c.steps)
        loss = losses.main + c.aux * losses.aux
        if losses.penalty is not None:
            loss = loss + losses.penalty
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"site ({self.layer}, {self.head}): the loss is {float(loss)} at step {step}; lower lr")
        loss.backward()
        self.optimizer.step()
        self.silent = torch.where(losses.fired, 0, self.silent + 1)
        dead = int(self.dead().sum())
        if (step + 1) % c.normalize_every == 0 and not self.tied:
            self.sae.normalize_()
        if (step + 1) % c.resample_every == 0 and step + 1 <= c.resample_until * c.steps:
            self.resample(batch, losses.errors, generator(c.seed, "resample", self.layer, self.head, step))
        loss, aux = (float(x.detach()) for x in (losses.main, losses.aux))
        return {"loss": loss, "aux": aux, "dead": dead, "rate": c.rate(step)}

    @torch.no_grad()
    def resample(self, batch: Batch, errors: Tensor, draw: torch.Generator) -> Tensor:
        """Gives dead atoms to the examples with most error, and clears their moments. Returns the atoms replaced."""
        dead = self.dead().nonzero().flatten()
        dead = dead[: int((errors > 0).sum())]
        if not len(dead):
            return dead
        pick = torch.multinomial(errors.cpu(), len(dead), generator=draw).to(self.device)
        X = batch.block.examples(batch.rows[pick], batch.positions[pick]) - self.sae.mean
        v, w = _top_pairs(X, self.sae.r)
        self._set_atoms(dead, v, w, 0.2 * self._alive_gain(), _unit(X.flatten(1)))
        of_atoms = [p for name, p in self.sae.named_parameters() if name != "bias"]
        if self.sparsity is not None:
            self.sparsity.revive(dead)
            of_atoms += self.sparsity.parameters()
        for p in of_atoms:
            if p in self.optimizer.state:
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[p][moment][dead] = 0
        self.silent[dead] = 0
        self.resampled += len(dead)
        return dead

    def _alive_gain(self) -> float:
        """Mean norm of the encoders of atoms that are not dead (of tied ones, of its product with the atom's)."""
        sae, alive = self.sae, ~self.dead()
        if not bool(alive.any()):
            return 1.0
        if sae.bilinear_encoder:
            v, w = self._factors()
            norms = (v[alive].norm(dim=-1) * w[alive].norm(dim=-1)).sum(1)
            return float((norms.square() if self.tied else norms).mean())
        return float(sae.W_enc[alive].norm(dim=1).mean())

    # ---- out and in -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def export(self, inside: bool = False) -> SAE:
        """The dictionary on raw states or writes, unit atoms (in the metric) unless tied; a copy, on the CPU.
        `inside`: on what blocks with this root hold."""
        sae, c = self.sae, self.config
        fixed = "pursuit" if self.pursued else "topk" if self.sparsity is None else "threshold"
        out = SAE(
            sae.K, sae.V, sae.F, sae.k, c.kind, sae.r, fixed, self.layer, self.head, centred=sae.centred,
            target=c.target,
        )  # fmt: skip
        out.to(sae.mean.dtype).load_state_dict(sae.state_dict(), strict=fixed == "topk")
        if self.sparsity is not None:
            self.sparsity.fold_into(out)
            out.threshold.div_(self.scale)
        if not self.tied:
            out.normalize_()
        for name in ("b_enc", "bias"):
            getattr(out, name).div_(self.scale)
        if self.root is not None and not inside:
            out = seen_through(out, torch.linalg.inv(self.root.double().cpu()))
        out.training_record = {**c.record(), "path": self.path, "scale": self.scale, "resampled": self.resampled}
        return out.eval().requires_grad_(False)

    def state(self) -> dict:
        """Everything a resumed run needs, on whatever device, as plain tensors on the CPU and numbers."""
        return on_cpu({
            "sae": dict(self.sae.state_dict()), "sparsity": self._sparsity_state(),
            "optimizer": self.optimizer.state_dict(), "silent": self.silent,
            "scale": self.scale, "resampled": self.resampled,
        })  # fmt: skip

    def _sparsity_state(self) -> dict:
        return {} if self.sparsity is None else dict(self.sparsity.state_dict())

    def restore(self, state: dict) -> None:
        """Goes on from `state()`.

        Raises:
            ValueError, RuntimeError, KeyError: a state of other sizes or dtypes, or that carries a NaN or infinity.
        """
        fresh = self.state()
        for name in ("sae", "sparsity", "silent", "scale", "resampled"):
            check_like(name, state[name], fresh[name])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, moments in state["optimizer"]["state"].items():
            like = {"step": torch.zeros(()), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]}
            check_like(f"optimizer of parameter {i}", moments, like)
        self.sae.load_state_dict(state["sae"])
        if self.sparsity is not None:
            self.sparsity.load_state_dict(state["sparsity"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.silent, self.scale, self.resampled = state["silent"].to(self.device), state["scale"], state["resampled"]


def _top_pairs(X: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Top r singular pairs of states `[n, K, V]`: unit `[n, r, K]` and `[n, r, V]`, signed so that they add up to X."""
    U, _, Vt = torch.linalg.svd(X, full_matrices=False)
    return U[..., :r].transpose(1, 2).contiguous(), Vt[:, :r].contiguous()
