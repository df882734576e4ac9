"""A write rule, as all around it sees it: `Rule`, one call of it (`RuleCall`) and what it answers (`RuleOutput`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .._arguments import sizes_repr
from ..edits import Edits
from ..writes import Writes
from ._dispatch import Limits


@dataclass(frozen=True, repr=False)
class RuleOutput:
    """What every rule returns.

    Attributes:
        o: `[B, T, H, V]` in v's dtype (`[B, T, V]` of a rule whose inputs have no head axis).
        final_state: `[N, H, K, V]`, or None where it was not asked for.
        writes: the `Writes`, or None.
        snapshots: `[P, H, K, V]`, `[N, P, H, K, V]` for a list of positions, or None.
        first_nonfinite: `[B]` int64 on o's device: as `t H + h`, the first token t and head h of each row of the batch
            (packed sequences are one row) whose increments, `writes.right`, hold a NaN or infinity, -1 for none. Found
            by kernels without the pass over them that `ops.first_nonfinite` takes. None without writes.
    """

    o: Tensor
    final_state: Tensor | None
    writes: Writes | None
    snapshots: Tensor | None
    first_nonfinite: Tensor | None = None

    __repr__ = sizes_repr


@dataclass(frozen=True, repr=False)
class RuleStepOutput:
    """What every rule's step, of one token a row, returns; it updates the state in place.

    Attributes:
        o: `[B, H, V]` in v's dtype.
        left: `[B, Hk, K]` key side of the token's write, float32 (float64 for float64 inputs), or None.
        right: `[B, H, V]` value side, the same.
        first_nonfinite: `[B]` int64, the first head of each row whose increment holds a NaN or infinity, -1 for none;
            None without writes.
    """

    o: Tensor
    left: Tensor | None
    right: Tensor | None
    first_nonfinite: Tensor | None = None

    __repr__ = sizes_repr


@dataclass(frozen=True)
class Rule:
    """A write rule, as dispatch, models, tests and docs see it.

    Attributes:
        name: of the operator, and the stem of its files.
        gates: kinds of gate it takes, of "scalar" (a head), "channel" (a key channel) and "element".
        transition: what a token does to the old state beside the gate: "none", "delta" (erase what k reads) or "low
            rank".
        arguments: names of the tensors it runs on, in order.
        run: the public function.
        limits: {"cpu" or "cuda": what its kernel there takes}; the reference takes everything, the host twin what CUDA
            does. `_dispatch.kernel_error(name, backend)` says what of it is usable here, `can_run` for which tensors.
    """

    name: str
    gates: tuple[str, ...]
    transition: str
    arguments: tuple[str, ...]
    run: Callable[..., RuleOutput] = field(repr=False)
    limits: Mapping[str, Limits] = field(default_factory=dict, repr=False, hash=False)


@dataclass(frozen=True)
class RuleCall:
    """One call of a rule, made where its arguments are known and run where they are not: by models, engine and tests.

    Attributes:
        rule: the rule.
        inputs: its tensors by name.
        options: further keywords of the rule (`scale`, `use_qk_l2norm`, ...).
        initial_state: `[N, H, K, V]` or None.
        cu_seqlens: `[N + 1]` offsets of packed sequences, or None.
    """

    rule: Rule
    inputs: Mapping[str, Tensor | None]
    options: Mapping[str, Any] = field(default_factory=dict)
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def run(
        self,
        edits: Edits | None = None,
        snapshots: Tensor | Sequence[int] | None = None,
        return_writes: bool = False,
        output_final_state: bool = False,
        backend: str | None = None,
    ) -> RuleOutput:
        """Runs it; arguments and errors as of the rule's public function."""
        return self.rule.run(
            **self.inputs, **self.options, initial_state=self.initial_state, cu_seqlens=self.cu_seqlens, edits=edits,
            snapshots=snapshots, return_writes=return_writes, output_final_state=output_final_state, backend=backend,
        )  # fmt: skip
