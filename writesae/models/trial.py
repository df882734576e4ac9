"""A tiny random model of each class, attached to: what `writesae info --models` says of it.

Each is tried in four ways. Logits, of a batch of two, are its own (and attach's self-test passes). Greedy `generate` of
a batch padded on the left chooses its own tokens. A write deleted as planned changes the logits as taking it out of the
state between two halves of the recurrence does. Firings of a random dictionary are those of the states rebuilt from the
writes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..edits import Edits
from ..ops.rule import RuleCall, RuleOutput
from . import mamba_ssm, versions
from .attach import attach
from .binding import LayerSite
from .frame import running
from .quiet import quiet
from .seam import intercept
from .sites import layers
from .tiny import Tiny, every

TRIED = {"fla": ("0.6.0",), "mamba-ssm": ("2.3.2.post1",)}  # releases that their tests run with
PACKAGES = {"transformers": "transformers", "fla": "flash-linear-attention", "mamba-ssm": "mamba-ssm"}
_T, _AT = 11, 5  # columns, and the one whose write is deleted
_CLOSE = 1e-4  # of the largest logit or activation


@dataclass(frozen=True)
class Tried:
    """What was found of one class.

    Attributes:
        model: its name; family: the tiny model's.
        library, release: the package it comes from, as installed; releases: those its tests run with.
        layers: kind of its recurrent layers; rule, gate: what runs in their functions' place.
        checks: {check: None where it passed, "refused: ..." where the combination is refused by name, else what is
            wrong}.
    """

    model: str
    family: str
    library: str
    release: str | None
    releases: tuple[str, ...]
    layers: str
    rule: str
    gate: str
    checks: dict[str, str | None]

    @property
    def passed(self) -> bool:
        return all(found is None or found.startswith("refused: ") for found in self.checks.values())


def trials() -> Iterator[Tried]:
    """Tries one class after the other, those of libraries that are installed."""
    for tiny in every():
        with quiet(), warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield _try(tiny)


def _try(tiny: Tiny) -> Tried:
    model = tiny.make()
    sites = layers(model)
    site, binding = sites[-1], sites[-1].binding
    trial = _Trial(model, site, tiny.library)
    checks = {
        "logits": trial.logits, "generate": trial.generate, "edits": trial.edits, "firings": trial.firings,
    }  # fmt: skip
    return Tried(
        type(model).__name__, tiny.family, tiny.library, versions.installed(PACKAGES[tiny.library]),
        TRIED.get(tiny.library, versions.TESTED), binding.kind, binding.rule.name, binding.gate,
        {name: _said(check) for name, check in checks.items()},
    )  # fmt: skip


def _said(check: Callable[[], None]) -> str | None:
    try:
        check()
    except _Refused as error:
        return f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return None


class _Refused(Exception):
    """A combination that the package refuses by name."""


class _Trial:
    def __init__(self, model: Any, site: LayerSite, library: str):
        self.model, self.site, self.library = model, site, library
        self.layer, self.head = site.layer_index, site.num_v_heads - 1
        self.text = torch.randint(3, 60, (2, _T), generator=torch.Generator().manual_seed(0))
        self.runs = library != "mamba-ssm" and self._runs()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """The model by itself; on our references where it cannot run (it calls kernels for GPUs on a CPU)."""
        if self.library == "mamba-ssm":
            with mamba_ssm.on_cpu():
                yield
        elif self.runs:
            yield
        else:
            with attach(self.model, {}, accelerate=True, backend="reference", self_test=False):
                yield

    def _runs(self) -> bool:
        try:
            self.run()
        except RuntimeError:
            return False
        return True

    def run(self) -> Tensor:
        return self.model(self.text).logits

    def logits(self) -> None:
        with self.alone():
            plain = self.run()
        with attach(self.model, {(self.layer, self.head): None}):
            _same("logits", self.run(), plain)

    def generate(self) -> None:
        given: dict[str, Any] = {"max_length": _T + 4}
        if self.library != "mamba-ssm":  # which knows no padding
            mask = torch.ones_like(self.text)
            mask[0, :3] = 0
            given = {
                "attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0,
            }  # fmt: skip
        with self.alone():
            plain = self.model.generate(self.text, **given)
        with attach(self.model, {(self.layer, self.head): None}):
            ours = self.model.generate(self.text, **given)
        if not torch.equal(ours, plain):
            raise AssertionError(f"generate: {int((ours != plain).sum())} tokens of {plain.numel()} are others")

    def edits(self) -> None:
        K, V = self.site.K, self.site.V
        with attach(self.model, {(self.layer, self.head): None}) as tap:
            plain = self.run()
            left, right = tap.writes[self.layer].native(1, _AT, self.head)
        planned = Edits.delete(1, _AT, self.head, K=K, V=V, when="after")
        with attach(self.model, {(self.layer, self.head): None}, edits={self.layer: planned}):
            edited = self.run()
        taken = left.reshape(-1, K).mT @ right.reshape(-1, V)
        with self.alone(), intercept(self.model, calls={self.layer: self._without(taken)}):
            recomputed = self.run()
        _same("logits under an edit", edited, recomputed)
        if not (edited - plain)[1, _AT + 1 :].abs().max() > 1e-6:
            raise AssertionError("edits: a deleted write changed no logit")

    def _without(self, taken: Tensor) -> Callable[[RuleCall, bool], RuleOutput]:
        """Runs a recurrence in two halves, with a matrix taken out of the state in between."""

        def handler(call: RuleCall, wants_state: bool) -> RuleOutput:
            frame = running()
            assert frame is not None
            head = getattr(frame, "head", None)  # of a layer that calls its function once a head

            def half(columns: slice, state: Tensor | None) -> RuleOutput:
                inputs = {
                    name: x[:, columns] if x is not None and x.ndim >= 3 and x.shape[1] == _T else x
                    for name, x in call.inputs.items()
                }
                return replace(call, inputs=inputs, initial_state=state).run(output_final_state=True)

            first = half(slice(_AT + 1), call.initial_state)
            assert first.final_state is not None
            state = first.final_state.clone()
            if head is None or head == self.head:
                state[1, self.head if head is None else 0] -= taken.to(state.dtype)
            second = half(slice(_AT + 1, None), state)
            return RuleOutput(torch.cat([first.o, second.o], 1), second.final_state, None, None)

        return handler

    def firings(self) -> None:
        sae = _Dictionary(self.site.K, self.site.V)
        try:
            with attach(self.model, {(self.layer, self.head): sae}) as tap:
                self.run()
        except ValueError as error:
            raise _Refused(error) from None
        states = tap.writes[self.layer].states(range(_T))[:, :, self.head].float()
        v_enc, w_enc, b_enc = sae.encoder()
        pre = torch.einsum("frk,btkv,frv->btf", v_enc, states, w_enc) + b_enc
        top = pre.topk(sae.k)
        expected = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        found, ours = tap.firings, torch.zeros_like(pre)
        ours[found.row.long(), found.position.long(), found.feature.long()] = found.activation
        if not len(found):
            raise AssertionError("firings: none")
        _same("firings", ours, expected)


class _Dictionary:
    """A random dictionary of states, as attach reads them."""

    kind, k, threshold, sparsity, target = "bilinear", 3, None, "topk", "state"

    def __init__(self, K: int, V: int, F: int = 12):
        self.K, self.V = K, V
        generator = torch.Generator().manual_seed(1)
        self._parts = (
            torch.randn(F, 1, K, generator=generator), torch.randn(F, 1, V, generator=generator), torch.zeros(F),
        )  # fmt: skip

    def encoder(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._parts


def _same(what: str, ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise AssertionError(f"{what}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
    off = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
    if not off <= _CLOSE:
        raise AssertionError(f"{what}: differ by {off:.1e} of the largest (allowed {_CLOSE:.0e})")
