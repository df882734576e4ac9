"""`TrainConfig`: how a dictionary is trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from .sae import BILINEAR, KINDS, RANK_ONE, TARGETS
from .sparsity import SPARSITIES

INITS = ("writes", "states", "random")
PATHS = ("auto", "dense", "factored")
METRICS = ("frobenius", "readers")
_DENSE_UP_TO = 4096  # K * V: below it, states of sampled tokens cost less than activations of all tokens


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the paper's (arXiv 2605.12770) but for batch, steps and initialisation.

    Attributes:
        kind, F, k, r: of the dictionary, see `SAE`.
        sparsity: "topk", "batchtopk", "jumprelu" or "gated", see `sparsity.py`; all but top k train by the dense path,
            fire k atoms on average and end as dictionaries with a threshold. Of writes also "pursuit".
        target: what is learnt from, "state" (as in the paper) or "write", see `SAE`; the latter by the dense path.
        metric: errors are measured as entries of the matrix ("frobenius"), or as what the model's later queries read of
            them ("readers": keys times the root of the readers' second moment, see `readers.py`).
        balance: of writes: a write's squared error counts by its norm to the power of -balance; 0 is the plain squared
            error, 2 lets all writes count alike.
        also_k: of pursuit: the error with so many atoms counts as much as that with k, so that one dictionary serves
            both; 0: it does not.
        penalty: weight of the sparsity penalty at the start ("jumprelu", "gated"), at most 10.
        steps: optimiser steps.
        states: states in a step's loss.
        passages: passages those states come from; 0 for all of the block (dense path), or as few as hold them
            (factored path, whose cost goes with whole passages).
        block: passages held as writes at a time.
        uses: times a block's tokens are drawn from, on average, before the next block (dense path).
        lr, lr_end, warmup: Adam's learning rate, cosine from lr to lr_end, linear warm-up steps.
        aux, k_aux: weight of the auxiliary loss, and dead atoms it uses.
        dead_after: steps without firing after which an atom is dead.
        resample_every, resample_until: dead atoms are replaced every so many steps, up to that fraction of the run.
        normalize_every: decoder factors to unit norm every so many steps.
        centred: subtract the mean training state (a dictionary of writes has none).
        init: atoms start from native "writes", from singular vectors of "states", or "random".
        path: "dense" forms the sampled states, "factored" encodes whole passages without (under other gates than one a
            head the loss forms those of a block of tokens), "auto" chooses by the gate and the size of the head.
        prepare: passages of the initial pass that estimates mean, scale and initial atoms.
        seed: of everything.
        text_seed: of which text each step sees, where that is not `seed`: dictionaries of several seeds can then be
            trained in one pass, see `variants.py`.

    Raises:
        ValueError: a value out of range, naming it.
    """

    kind: str = "bilinear"
    F: int = 2048
    k: int = 32
    r: int = 1
    sparsity: str = "topk"
    target: str = "state"
    metric: str = "frobenius"
    balance: float = 1.0
    also_k: int = 0
    penalty: float = 1e-2
    steps: int = 10000
    states: int = 256
    passages: int = 0
    block: int = 256
    uses: float = 1.0
    lr: float = 3e-4
    lr_end: float = 3e-5
    warmup: int = 50
    aux: float = 1e-2
    k_aux: int = 256
    dead_after: int = 100
    resample_every: int = 250
    resample_until: float = 0.8
    normalize_every: int = 100
    centred: bool = True
    init: str = "writes"
    path: str = "auto"
    prepare: int = 256
    seed: int = 0
    text_seed: int | None = None

    def __post_init__(self):
        for name, allowed in (("kind", KINDS), ("init", INITS), ("path", PATHS),
                              ("sparsity", (*SPARSITIES, "pursuit")), ("target", TARGETS),
                              ("metric", METRICS)):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("F", "k", "r", "steps", "states", "block", "k_aux", "dead_after", "resample_every",
                     "normalize_every", "prepare"):  # fmt: skip
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)!r}")
        for name in ("lr", "lr_end", "uses", "penalty"):
            if not getattr(self, name) > 0 or not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: expected a finite number > 0, got {getattr(self, name)!r}")
        for name in ("aux", "warmup", "passages", "resample_until", "seed", "balance", "also_k"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected >= 0, got {getattr(self, name)!r}")
        if self.text_seed is not None and not self.text_seed >= 0:
            raise ValueError(f"text_seed: expected >= 0, got {self.text_seed!r}")
        if self.penalty > 10:
            raise ValueError(f"penalty: expected at most 10, got {self.penalty}")
        if self.k > self.F:
            raise ValueError(f"k: expected k <= F={self.F}, got {self.k}")
        if self.passages > self.block:
            raise ValueError(f"passages: expected at most block={self.block}, got {self.passages}")
        if self.sparsity == "gated" and self.kind == "bilinear_tied":
            raise ValueError("sparsity: gated scales the encoder apart from the atoms, which kind bilinear_tied shares")
        if self.sparsity == "pursuit" and (self.target != "write" or self.kind != "bilinear_tied"):
            raise ValueError(
                f"sparsity: pursuit codes writes by their atoms, expected target write and kind bilinear_tied, got "
                f"target {self.target} and kind {self.kind}"
            )
        if self.also_k and (self.sparsity != "pursuit" or self.also_k >= self.k):
            raise ValueError(f"also_k: expected less than k={self.k}, of sparsity pursuit, got {self.also_k}")
        if self.metric == "readers" and not (self.kind in BILINEAR and self.kind in RANK_ONE):
            raise ValueError(f"metric: readers weighs the key side of factors, which kind {self.kind} has not")
        if self.metric == "readers" and self.kind == "bilinear_tied" and self.sparsity != "pursuit":
            raise ValueError("metric: readers makes encoder and atoms differ, which kind bilinear_tied shares")
        if self.path == "factored" and self.target == "write":
            raise ValueError("path: dictionaries of writes train by path dense only")
        if self.path == "factored" and self.sparsity != "topk":
            raise ValueError(f"path: sparsity {self.sparsity} trains by path dense only")
        factored = self.kind in BILINEAR and self.kind in RANK_ONE
        if self.path == "factored" and not factored:
            raise ValueError(f"path: kind {self.kind} has a dense encoder or dense atoms: it trains by path dense only")

    def resolved_path(self, K: int, V: int, gate: str = "scalar") -> str:
        """ "dense" or "factored" for a head of this size and gate."""
        if self.path != "auto" or self.target == "write":
            return "dense" if self.path == "auto" else self.path
        factored = self.kind in BILINEAR and self.kind in RANK_ONE and self.sparsity == "topk"
        # Under an element gate encoding goes over all states, in the readers' metric other gates leave no writes.
        factored &= gate == "scalar" or (gate == "channel" and self.metric == "frobenius")
        return "factored" if factored and K * V > _DENSE_UP_TO else "dense"

    @property
    def drawn_by(self) -> int:
        """Seed of which text each step sees."""
        return self.seed if self.text_seed is None else self.text_seed

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.lr_end + (self.lr - self.lr_end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def record(self) -> dict:
        """As checkpoints and result files keep it: `{name: number, string or None}`."""
        return asdict(self)
