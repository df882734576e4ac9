"""What policies cost while decoding: a full-size random Qwen3.5-0.8B, hooked with and without them.

After a prompt of 32 tokens, 20 tokens are decoded one by one from a cache. The arms take turns within every round and
differ in the policies alone; times are of the process, and the ratio is the median over the rounds. One feature of
every dictionary can never fire, another fires at every token. Before anything is timed, an arm that edits has to leave
states that differ from those of the arm that does not, and an arm that never acts the same ones.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator

import torch

import writesae

from ..models.arguments import cache_of, given_cache
from .bench_model import LAYER, QWEN3_5, RandomDictionary
from .case import Case, Disagree, Options, Row
from .timing import ratio_row

PROMPT, TOKENS = 32, 20
NEVER, ALWAYS = 0, 1  # features


class Dictionary(RandomDictionary):
    """Atoms as the encoder, and biases by which two features fire never and always."""

    def __init__(self, K: int, V: int, seed: int):
        super().__init__(K, V, seed)
        self.b = torch.zeros(self.F)
        self.b[NEVER], self.b[ALWAYS] = -1e6, 1e3

    def encoder(self):
        return self.v, self.w, self.b

    def atoms(self):
        return self.v, self.w


def dictionaries(sites) -> dict[tuple[int, int], Dictionary]:
    return {(ell, h): Dictionary(QWEN3_5.K, QWEN3_5.V, QWEN3_5.heads * ell + h) for ell, h in sites}


ARMS = {
    "never acts": (lambda: writesae.Scale([NEVER], 2.0), 1.03),
    "adds an atom at every token": (lambda: writesae.Scale([ALWAYS], 1 + 1e-6), 1.15),
    "deletes the write at every token": (lambda: writesae.Erase([ALWAYS]), 1.15),
}
SITES = {
    "one site": [(LAYER, 4)],
    "all heads": [(ell, h) for ell in QWEN3_5.layers for h in range(QWEN3_5.heads)],
}


class Decoding:
    """One arm: a cache of its own, gone on from with its policies attached."""

    def __init__(self, model, ids, saes, policy):
        self.model, self.saes, self.policies = model, saes, [] if policy is None else [policy]
        self.seconds: list[float] = []
        with self._attached():
            out = model(ids, use_cache=True, logits_to_keep=1)
        self.cache, self.token = cache_of(out), out.logits[:, -1:].argmax(-1)

    def _attached(self):
        return writesae.attach(
            self.model, self.saes, policies=self.policies, accelerate=True, self_test=False, any_model=True
        )

    def round(self) -> None:
        with self._attached() as tap:
            start = time.process_time()
            for _ in range(TOKENS):
                out = self.model(self.token, **given_cache(self.model, self.cache), use_cache=True)
                self.token = out.logits[:, -1:].argmax(-1)
            if not len(tap.firings):
                raise Disagree("no feature fired")
            self.seconds.append(time.process_time() - start)


def check(model, ids, saes) -> None:
    """Raises `Disagree` unless policies do what the arm is called for."""
    logits, reports = [], []
    for policy in (None, *(make() for make, _ in ARMS.values())):
        arm = Decoding(model, ids[:, :4], saes, policy)
        with arm._attached() as tap:
            for _ in range(3):
                out = model(arm.token * 0 + 7, **given_cache(model, arm.cache), use_cache=True)
            logits.append(out.logits)
            reports.append(tap.policies[0].total if policy is not None else 0)
    if not torch.equal(logits[0], logits[1]) or any(torch.equal(logits[0], x) for x in logits[2:]):
        raise Disagree("policies: expected logits as without by the one that never acts, and others by the rest")
    if reports != [0, 0, 3 * len(saes), 3 * len(saes)]:
        raise Disagree(f"policies: expected to act never and at {3 * len(saes)} tokens, got {reports}")


def measure(options: Options) -> Iterator[Row]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "policies: .* never acted")  # as it is meant to
        yield from rows(options)


def rows(options: Options) -> Iterator[Row]:
    model = QWEN3_5.random(torch.float32)
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    for name, sites in SITES.items():
        saes = dictionaries(sites)
        check(model, ids, saes)
        arms = [Decoding(model, ids, saes, None), *(Decoding(model, ids, saes, make()) for make, _ in ARMS.values())]
        for _ in range(options.rounds(5) + 1):  # the first round warms up
            for arm in arms:
                arm.round()
        hooked, *others = (arm.seconds[1:] for arm in arms)
        for (what, (_, target)), seconds in zip(ARMS.items(), others, strict=True):
            yield ratio_row(f"decoding, {name}: a policy that {what}", HOOKED, "x time", seconds, hooked, target)
        if options.quick:
            return


HOOKED = "hooked without policies"
CASES = [Case("policy", "policies while decoding", measure, HOOKED, ("float32", "copy"))]
