"""The fork engine: many one-place edits of a model's memory, each followed for a few tokens.

A fork is (passage, position t, head, edit). Under teacher forcing the edited layer's own later q, k, v, gates do not
depend on its output, so what an edit E of its state changes there is known exactly from the clean pass:

    delta o_s = E^T r_s,    r_s = (prod_{t < j <= s} alpha_j (I - beta_j k_j k_j^T)) q_s        (key side only)

`r_s` is how token s reads the memory of token t; it serves every edit of that place. Made before token t reads its
state, the edit changes o_t, too; made after (the paper's procedure: the cache is patched), delta o_t is zero and the
first position that can differ is t + 1: `unread`. Under a gate for every entry (Mamba-1) no vector says how a token
reads; there the layer's recurrence runs on the addition alone, from t on, and what comes out is delta o.

The layer's own module then turns o + delta o into its output, and only the blocks above it run, on positions t..t+H,
from the clean pass's states, convolution inputs, keys and values before t. Prefixes are shared by the forks of a
passage, and all of it by all edits of a place. Every edit, and the baseline without one, is run in a batch of the same
layout, so equal inputs give equal bits.

Method: J. Young, *WriteSAE: Sparse Autoencoders for Recurrent State*, arXiv 2605.12770.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.model_call import has_attention, text_config
from ..models.seam import intercept
from ..models.shared_prefix import Prefix, Stack, Watch
from ..models.short_conv import causal_conv
from ..ops.rule import RuleCall, RuleOutput
from ..writes import Writes
from .divergence import kl_pair


@dataclass(frozen=True)
class Places:
    """Where forks begin: n places, sorted by passage. `row [n]`, `position [n]`, `head [n]`, all int64."""

    row: Tensor
    position: Tensor
    head: Tensor

    def __len__(self) -> int:
        return len(self.row)

    def to(self, device) -> Places:
        return Places(*(x.to(device, non_blocking=True) for x in (self.row, self.position, self.head)))


@dataclass(frozen=True)
class Later:
    """How the tokens of n forks read whatever was in the state, under any gate: their recurrence, with nothing written.

    Attributes:
        call: of tokens t + 1..t + horizon, `[n, horizon, ...]`, the values zero.
        query: `[n, K]`: reads the state after token t.
        head: `[n]` whose state is meant; heads: how many the layer has.
    """

    call: RuleCall
    query: Tensor
    head: Tensor
    heads: int

    def read(self, matrix: Tensor) -> Tensor:
        """`[n, horizon + 1, V]`: what tokens t..t + horizon read of an addition `[n, K, V]` made to the state at t."""
        n, K, V = matrix.shape
        forks = torch.arange(n, device=matrix.device)
        state = matrix.new_zeros(n, self.heads, K, V)
        state[forks, self.head] = matrix
        o = replace(self.call, initial_state=state).run().o.view(n, -1, self.heads, V)
        return torch.cat([(self.query[:, None] @ matrix), o[forks, :, self.head]], 1)


@dataclass(frozen=True)
class Clean:
    """What the forks of a batch of passages need of its clean pass. n forks of L tokens, from t + first to t + horizon.

    Attributes:
        places: the forks' places.
        first: 0, or 1 where all edits are made after token t has read its state, so that it need not run again.
        valid: `[n, L]` bool, False past the end of the passage.
        layer_input: `[n, L, hidden]` input of the edited block.
        o: `[n, L, H, V]` clean output of its recurrence, float32 (float64 for a float64 model).
        reader: `[n, L, K]` r_s of each fork's head; None under an element gate.
        later: under an element gate, what runs in its place; else None.
        left, right: `[n, K]`, `[n, V]`: the native write, k_t and u_t.
        outer_right: `[n, V]` beta_t v_t, so that k_t outer_right^T is the write without its erase.
        writes: the edited layer's whole trace.
        input_ids, position_ids: `[n, L]`.
        output: `[n, L, ...]` of the last block, as the clean pass has it.
        states, conv_left: {layer: of every fork, before its first token}.
        prefixes: {block: of its attention}.
        earlier: {block: tokens before the forks, `[n, width, D]`, of all that reads such beside rule and attention}.
    """

    places: Places
    first: int
    valid: Tensor
    layer_input: Tensor
    o: Tensor
    reader: Tensor | None
    later: Later | None
    left: Tensor
    right: Tensor
    outer_right: Tensor
    writes: Writes
    input_ids: Tensor
    position_ids: Tensor
    output: Tensor
    states: dict[int, Tensor]
    conv_left: dict[int, Tensor]
    prefixes: dict[int, Prefix]
    earlier: dict[int, list[Tensor]]


class ForkEngine:
    """Forks of one layer of a model.

    Args:
        model: a causal language model in evaluation mode.
        layer: the recurrent layer whose state is edited.
        horizon: tokens followed after the edited one.
        read: "before": forks begin at token t, and edits may be made before or after it reads its state; "after": they
            begin at t + 1, for edits made after.
    """

    def __init__(self, model, layer: int, horizon: int = 8, read: str = "before"):
        if read not in ("before", "after"):
            raise ValueError(f"read: expected before or after, got {read!r}")
        if horizon < (read == "after"):
            raise ValueError(f"horizon: expected {int(read == 'after')} or more tokens, got {horizon}")
        if model.training:
            raise ValueError("model: expected evaluation mode (model.eval()), got training mode")
        self.stack = Stack(model)
        with intercept(model, calls={layer: _leave}):
            pass  # raises, saying what the layer is, when it is not a recurrent layer
        self.model, self.layer, self.first = model, layer, int(read == "after")
        self.horizon, self.length = horizon, horizon + 1 - self.first
        self.site = self.stack.sites[layer]
        if self.site.binding.gate == "element" and self.site.num_v_heads > 1:
            raise ValueError(f"layer: expected one head under a gate for every entry, got {self.site.num_v_heads}")
        self.linear = [i for i in self.stack.sites if i > layer]

    @property
    def write(self) -> str:
        """Which of a token's writes the native one is: "new" where an erase is a write of its own (RWKV-7), which
        stays; else "whole"."""
        return "new" if self.site.binding.erases_apart else "whole"

    def bytes_a_fork(self, tokens: int, edits: int = 1) -> int:
        """Rough memory of one fork under `edits` edits, in a batch of passages of `tokens` tokens."""
        sites, L = self.stack.sites, self.length
        state = sum(sites[i].num_v_heads * sites[i].K * sites[i].V for i in self.linear)
        config = text_config(self.model)
        hidden = next(m.embedding_dim for m in self.stack.body.modules() if isinstance(m, torch.nn.Embedding))
        scores = getattr(config, "num_attention_heads", 0) * L * (tokens + L) if has_attention(self.model) else 0
        matrix = 3 * self.site.K * self.site.V if self.site.binding.gate == "element" else 0  # of an addition
        wide = 16 * L * max(hidden, getattr(config, "intermediate_size", 0) or 0)
        kept = edits * L * (hidden + self.site.V)  # every edit's change and final hidden states
        return 4 * (2 * state + 3 * scores + wide + 4 * L * self.site.num_v_heads * self.site.V + matrix + kept)

    # ---- clean pass -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def clean(
        self,
        input_ids: Tensor,  # [P, T]
        lengths: Tensor,  # [P]
        choose: Callable[[Writes], Places],
    ) -> Clean:
        """Runs passages once, right-padded to T, and keeps what forks at the chosen places need.

        Args:
            input_ids: tokens; columns from `lengths` on are padding of any value.
            lengths: real tokens of each passage, on the CPU.
            choose: called in the middle of the pass with the edited layer's `Writes`; returns the places, on the CPU.

        Everything kept lies on the device of the layer it belongs to.
        """
        input_ids = input_ids.to(self.stack.device)
        linear = self.linear
        keep: dict = {"x": {i: [] for i in (self.layer, *linear)}, "states": {}}

        def site_rule(call: RuleCall, output_final_state: bool) -> RuleOutput:
            call = _widened(call)
            out = call.run(output_final_state=output_final_state, return_writes=True)
            assert out.writes is not None
            places = choose(out.writes)
            self._check(places, lengths)
            keep.update(o=out.o, writes=out.writes, call=call, places=places.to(out.o.device))
            before = torch.stack([places.row, places.position + self.first - 1], 1)
            keep["before"], keep["of"] = torch.unique(before.clamp_min(0), dim=0, return_inverse=True)
            return out

        def rule(i):
            def handler(call: RuleCall, output_final_state: bool) -> RuleOutput:
                out = call.run(output_final_state=output_final_state, snapshots=keep["before"])
                keep["states"][i] = out.snapshots
                return out

            return handler

        def conv(i):
            def handler(x, weight, bias, activation, *, cu_seqlens, channels):
                keep["x"][i].append(x)
                return NotImplemented  # the model convolves for itself

            return handler

        below = {i: _run for i in self.stack.sites if i < self.layer}
        calls = below | {i: rule(i) for i in linear} | {self.layer: site_rule}
        with intercept(self.model, convs={i: conv(i) for i in keep["x"]}, private=True, calls=calls):
            watch = self.stack.watch(input_ids, self.layer)
        return self._gather(keep, watch, input_ids, lengths)

    def _check(self, places: Places, lengths: Tensor) -> None:
        for name, column, limit in (
            ("row", places.row, len(lengths)),
            ("position", places.position, lengths[places.row.clamp(0, len(lengths) - 1)]),
            ("head", places.head, self.site.num_v_heads),
        ):
            bad = ((column < 0) | (column >= limit)).nonzero().flatten()
            if len(bad):
                limit = int(limit[bad[0]]) if isinstance(limit, Tensor) else limit
                raise ValueError(f"places.{name}: expected 0 <= {name} < {limit}, got {int(column[bad[0]])}")
        if bool((places.row.diff() < 0).any()):
            raise ValueError("places.row: expected places sorted by passage")

    def _gather(self, keep: dict, watch: Watch, input_ids: Tensor, lengths: Tensor) -> Clean:
        places, writes, T = keep["places"], keep["writes"], input_ids.shape[1]
        row, head = places.row, places.head
        start = places.position + self.first
        every = places.position[:, None] + torch.arange(self.horizon + 1, device=row.device)  # [n, horizon + 1]
        at = position_ids = every[:, self.first :]  # [n, L]
        valid = at < lengths.to(row.device, non_blocking=True)[row][:, None]
        at, every = at.clamp_max(T - 1), every.clamp_max(T - 1)
        rows = row[:, None]

        def of(x: Tensor) -> Tensor:  # [P, T, ...] -> [n, L, ...]
            return x[rows.to(x.device), at.to(x.device)]

        def before(x: Tensor, width: int) -> Tensor:  # [P, T, D] -> [n, width, D], zeros before the text
            x = torch.nn.functional.pad(x, (0, 0, width, 0))  # column j is token j - width
            columns = start.to(x.device)[:, None] + torch.arange(width, device=x.device)
            return x[rows.to(x.device), columns]

        states, conv_left = {}, {}
        for i, inputs in keep["x"].items():
            if i != self.layer:
                state = keep["states"][i]
                states[i] = state[keep["of"].to(state.device)] * (start > 0).to(state.device)[:, None, None, None]
            if not inputs:  # a layer without a short convolution
                continue
            width = self.stack.sites[i].conv_kernel_size - 1
            conv_left[i] = before(torch.cat(inputs, 1)[..., -T:].transpose(1, 2), width).transpose(1, 2)
        earlier = {i: [before(x, width) for x, width in found] for i, found in watch.left.items()}
        prefixes = {
            i: Prefix(keys, watch.values[i], row.to(keys.device), start.to(keys.device))
            for i, keys in watch.keys.items()
        }
        heads = head[:, None]
        k, u = writes.native(row, places.position, head)
        # The queries' heads are the keys'.
        queries = self.site.binding.queries(keep["call"])[rows, every, writes.left_head(heads)]
        r = later = None
        if writes.gate == "element":
            later = self._later(keep["call"], queries, rows, every, head)
        else:
            keys, _ = writes.native(rows, every, heads)  # [n, horizon + 1, K]
            r = reader(
                queries, keys, writes.decay[rows, every, heads],
                None if writes.beta is None else writes.beta[rows, every, heads],
                None if writes.erase is None else tuple(x[rows, every, heads] for x in writes.erase),
            )[:, self.first :]  # fmt: skip
        assert watch.input is not None and watch.output is not None
        o = keep["o"].view(*keep["o"].shape[:2], self.site.num_v_heads, self.site.V)
        return Clean(
            places, self.first, valid, of(watch.input), of(o), r, later, k, u,
            self._outer(keep["call"], writes, places, u), writes, of(input_ids),
            position_ids.to(input_ids.device), of(watch.output), states, conv_left, prefixes, earlier,
        )  # fmt: skip

    def _outer(self, call: RuleCall, writes: Writes, places: Places, right: Tensor) -> Tensor:
        """`[n, V]`: the value side of the write without its erase."""
        if writes.transition != "delta":
            return right  # nothing is erased, or by a write of its own
        value, strength = self.site.binding.factors(call)
        outer = value[places.row, places.position, places.head]
        return outer if strength is None else strength[places.row, places.position, places.head][:, None] * outer

    def _later(self, call: RuleCall, queries: Tensor, rows: Tensor, every: Tensor, head: Tensor) -> Later:
        after = every[:, 1:]
        inputs = {
            # Of tokens are the inputs of three axes and more; a rate a head or channel has fewer.
            name: x if x is None or x.ndim < 3 else x[rows, after]
            for name, x in call.inputs.items()
        }
        value = self.site.binding.value
        given = inputs[value]
        assert given is not None
        inputs[value] = torch.zeros_like(given)
        return Later(replace(call, inputs=inputs, initial_state=None), queries[:, 0], head, self.site.num_v_heads)

    # ---- forks ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, clean: Clean, deltas: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Final hidden states of every fork under every change of the edited head's output.

        Args:
            clean: the clean pass.
            deltas: {name: `[n, L, V]` change of the head's output, or None for no change}.
        Returns:
            {name: `[n, L, ...]`}, what the last block returns: see `logits`.
        Raises:
            RuntimeError: forks without a change are not what the clean pass had there, so that this model's blocks do
                something else that forks do not know of.
        """
        forks = torch.arange(len(clean.places), device=clean.o.device)
        changed: dict[str, Tensor] = {}

        def site_rule(call: RuleCall, output_final_state: bool) -> RuleOutput:
            value, _ = self.site.binding.factors(call)
            o, site = changed["o"], self.site
            # Some families ask for a state in every call; no token comes after these.
            final = o.new_zeros(len(o), site.num_v_heads, site.K, site.V) if output_final_state else None
            return RuleOutput(o.view(value.shape), final, None, None)

        def rule(i):
            def handler(call: RuleCall, output_final_state: bool) -> RuleOutput:
                return replace(call, initial_state=clean.states[i]).run(output_final_state=output_final_state)

            return handler

        def conv(i):
            def handler(x, weight, bias, activation, *, cu_seqlens, channels):
                return causal_conv(x, weight, bias, activation, left=clean.conv_left[i][:, channels])

            return handler

        out, calls = {}, {i: rule(i) for i in self.linear} | {self.layer: site_rule}
        with intercept(self.model, convs={i: conv(i) for i in clean.conv_left}, private=True, calls=calls):
            for name, delta in deltas.items():
                o = clean.o.clone()
                if delta is not None:
                    o[forks, :, clean.places.head] += delta
                changed["o"] = o
                out[name] = self.stack.fork(
                    clean.input_ids, clean.position_ids, clean.layer_input, self.layer, clean.prefixes, clean.earlier
                )
                if delta is None:
                    self._require_same(out[name], clean)
        return out

    def _require_same(self, found: Tensor, clean: Clean) -> None:
        valid = clean.valid.to(found.device)
        expected = clean.output.to(found)[valid]
        error = float((found[valid] - expected).norm() / expected.norm().clamp_min(1e-30))
        limit = max(1e-3, 4 * torch.finfo(found.dtype).eps ** 0.5)  # rounding differs with the shapes of products
        if not error <= limit:
            raise RuntimeError(
                f"model: forks of {type(self.model).__name__} without a change differ from its clean pass by "
                f"{error:.1e} (relative; at most {limit:.1e}): its blocks read more of a passage than forks give them"
            )

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, L, vocabulary]` logits of what `run` returns, `[n, L, ...]`."""
        return self.stack.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

    @torch.no_grad()
    def divergences(
        self, clean: Clean, hidden: Mapping[str, Tensor], baseline: str, memory: int = 2**28
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """KL against the baseline in both directions, `{name: (forward [n, L], reverse [n, L])}`, NaN past the end.

        Logits are made a slice of tokens at a time, so that about `memory` bytes of them exist at once.
        """
        names = [name for name in hidden if name != baseline]
        n, L = clean.valid.shape
        flat = {name: x.flatten(0, 1) for name, x in hidden.items()}
        # One product a condition and slice: the same shapes for all, so equal rows give equal logits.
        step = max(1, memory // (self.stack.vocabulary * 8 * 5))
        out = {name: clean.valid.new_full((2, n * L), float("nan"), dtype=torch.float64) for name in names}
        for lo in range(0, n * L, step):
            base = self.stack.logits(flat[baseline][lo : lo + step])
            pairs = kl_pair(base, ((name, self.stack.logits(flat[name][lo : lo + step])) for name in names))
            for name, pair in pairs.items():
                out[name][:, lo : lo + step] = torch.stack(pair)  # moves it when the head lies elsewhere
        missing = ~clean.valid
        return {
            name: tuple(x.view(n, L).masked_fill(missing, float("nan")) for x in pair) for name, pair in out.items()
        }


def _leave(call: RuleCall, output_final_state: bool) -> RuleOutput:
    return NotImplemented


def _run(call: RuleCall, output_final_state: bool) -> RuleOutput:
    return call.run(output_final_state=output_final_state)


def _widened(call: RuleCall) -> RuleCall:
    """The same call in float32 (float64 for a float64 model)."""
    given = {name: x for name, x in call.inputs.items() if x is not None}
    wide = torch.float64 if any(x.dtype == torch.float64 for x in given.values()) else torch.float32
    return replace(call, inputs={**call.inputs, **{name: x.to(wide) for name, x in given.items()}})


def reader(
    q: Tensor,  # [n, L, K]
    k: Tensor,  # [n, L, K]
    decay: Tensor,  # [n, L], of a channel gate [n, L, K]
    beta: Tensor | None = None,  # [n, L]
    erase: tuple[Tensor, Tensor] | None = None,  # read and write [n, L, K]
) -> Tensor:
    """`[n, L, K]`: how token t + s reads an addition made to the state after token t (the transposed propagator on q).

    q scaled and normalised as used; column 0 is token t itself, whose own gates act before the addition. beta and erase
    as in `Writes`.
    """
    out = q.clone()
    gate = decay.exp().reshape(*decay.shape[:2], -1)
    for j in range(q.shape[1] - 1, 0, -1):
        tail = out[:, j:]  # every later token's reading passes back through the gates of token j
        now = tail
        if beta is not None:
            now = now - beta[:, j, None, None] * (tail @ k[:, j, :, None]) * k[:, j, None]
        now = gate[:, j, None] * now
        if erase is not None:
            read, write = (x[:, j] for x in erase)
            now = now + (tail @ write[:, :, None]) * read[:, None]
        out[:, j:] = now
    return out


def read(clean: Clean, left: Tensor, right: Tensor) -> Tensor:
    """`[n, L, V]`: change of the head's output when `left [n, K] right [n, V]^T` is added to each fork's state at t.

    Equal factors give equal bits, so a write taken out and put back cancels.
    """
    if clean.later is not None:
        return read_matrix(clean, left[:, :, None] * right[:, None])
    assert clean.reader is not None
    return (clean.reader * left[:, None]).sum(-1, keepdim=True) * right[:, None]


def unread(clean: Clean, delta: Tensor) -> Tensor:
    """`[n, L, V]`: the change of the output if the state is changed after token t has read it, so that o_t is clean."""
    if clean.first:
        return delta  # of later tokens only
    out = delta.clone()
    out[:, 0] = 0
    return out


def read_matrix(clean: Clean, matrix: Tensor) -> Tensor:
    """`[n, L, V]`: `read` for a full `[n, K, V]` addition."""
    if clean.later is not None:
        return clean.later.read(matrix.to(clean.o))[:, clean.first :]
    assert clean.reader is not None
    return clean.reader @ matrix
