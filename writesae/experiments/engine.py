"""The fork engine: many one-place edits of a model's memory, each followed for a few tokens.

A fork is (passage, position t, head, edit). Under teacher forcing the edited layer's own later q, k, v, gates do not
depend on its output, so what an edit E of its state changes there is known exactly from the clean pass:

    delta o_s = E^T r_s,    r_s = (prod_{t < j <= s} alpha_j (I - beta_j k_j k_j^T)) q_s        (key side only)

`r_s` is how token s reads the memory of token t; it serves every edit of that place. Made before token t reads its
state, the edit changes o_t, too; made after (the paper's procedure: the cache is patched), delta o_t is zero and the
first position that can differ is t + 1: `unread`. The layer's own module then turns o + delta o into its output, and
only the blocks above it run, on positions t..t+H, from the clean pass's states, convolution inputs, keys and values
before t. Prefixes are shared by the forks of a passage, and all of it by all edits of a place. Every edit, and the
baseline without one, is run in a batch of the same layout, so equal inputs give equal bits.

Method: J. Young, *WriteSAE: Sparse Autoencoders for Recurrent State*, arXiv 2605.12770.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.arguments import cache_of
from ..models.seam import intercept
from ..models.shared_prefix import Prefix, Stack
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
class Clean:
    """What the forks of a batch of passages need of its clean pass. n forks of L tokens, from t + first to t + horizon.

    Attributes:
        places: the forks' places.
        first: 0, or 1 where all edits are made after token t has read its state, so that it need not run again.
        valid: `[n, L]` bool, False past the end of the passage.
        layer_input: `[n, L, hidden]` input of the edited block.
        o: `[n, L, H, V]` clean output of its recurrence, float32 (float64 for a float64 model).
        reader: `[n, L, K]` r_s of each fork's head.
        left, right: `[n, K]`, `[n, V]`: the native write, k_t and u_t.
        outer_right: `[n, V]` beta_t v_t, so that k_t outer_right^T is the write without its erase.
        writes: the edited layer's whole trace.
    """

    places: Places
    first: int
    valid: Tensor
    layer_input: Tensor
    o: Tensor
    reader: Tensor
    left: Tensor
    right: Tensor
    outer_right: Tensor
    writes: Writes
    position_ids: Tensor
    position_embeddings: dict[int, tuple[Tensor, Tensor] | None]
    states: dict[int, Tensor]
    conv_left: dict[int, Tensor]
    prefixes: dict[int, Prefix]


class ForkEngine:
    """Forks of one layer of a model.

    Args:
        model: a causal language model in evaluation mode.
        layer: the gated-delta layer whose state is edited.
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
            pass  # raises, saying what the layer is, when it is not a gated-delta layer
        self.model, self.layer, self.first = model, layer, int(read == "after")
        self.horizon, self.length = horizon, horizon + 1 - self.first
        self.site = self.stack.sites[layer]
        rule = self.site.binding.rule
        if "element" in rule.gates:
            raise ValueError(
                f"layer: expected a gate that fades a state by heads or key channels, got layer {layer}, whose "
                f"{rule.name} fades every entry by itself, so that no vector says how a token reads it"
            )
        self.above = [i for i in range(layer + 1, len(self.stack.blocks))]
        self.linear = [i for i in self.above if i in self.stack.sites]
        self.full = [i for i in self.above if i not in self.stack.sites]

    def bytes_a_fork(self, tokens: int, edits: int = 1) -> int:
        """Rough memory of one fork under `edits` edits, in a batch of passages of `tokens` tokens."""
        sites, L = self.stack.sites, self.length
        state = sum(sites[i].num_v_heads * sites[i].K * sites[i].V for i in self.linear)
        config = self.model.config.get_text_config()
        scores = config.num_attention_heads * L * (tokens + L) if self.full else 0
        wide = 16 * L * max(config.hidden_size, getattr(config, "intermediate_size", 0) or 0)
        kept = edits * L * (config.hidden_size + self.site.V)  # every edit's change and final hidden states
        return 4 * (2 * state + 3 * scores + wide + 4 * L * self.site.num_v_heads * self.site.V + kept)

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
        input_ids = input_ids.to(self.model.get_input_embeddings().weight.device)
        keep: dict = {"x": {i: [] for i in self.linear}, "states": {}}

        def site_rule(call: RuleCall, output_final_state: bool) -> RuleOutput:
            call = _widened(call)
            out = call.run(output_final_state=output_final_state, return_writes=True)
            assert out.writes is not None
            places = choose(out.writes)
            self._check(places, lengths)
            binding = self.site.binding
            value, strength = binding.factors(call)
            keep.update(o=out.o, writes=out.writes, q=binding.queries(call), places=places.to(value.device))
            keep.update(value=value, strength=strength)
            before = torch.stack([places.row, places.position + self.first - 1], 1)
            keep["before"], keep["of"] = torch.unique(before.clamp_min(0), dim=0, return_inverse=True)
            return out

        def rule(i):
            def handler(call: RuleCall, output_final_state: bool) -> RuleOutput:
                out = call.run(
                    output_final_state=output_final_state, snapshots=keep["before"] if i in keep["x"] else None
                )
                if i in keep["x"]:
                    keep["states"][i] = out.snapshots
                return out

            return handler

        def conv(i):
            def handler(x, weight, bias, activation, *, cu_seqlens, channels):
                keep["x"][i].append(x)
                return NotImplemented  # the model convolves for itself

            return handler

        calls = {i: rule(i) for i in self.stack.sites if i != self.layer} | {self.layer: site_rule}
        seen: dict[int, dict] = {}
        with (
            intercept(self.model, convs={i: conv(i) for i in self.linear}, private=True, calls=calls),
            self.stack.watching([self.layer, *self.above], seen),
        ):
            cache = cache_of(self.model(input_ids=input_ids, use_cache=True, logits_to_keep=1))
        return self._gather(keep, seen, cache, lengths, input_ids.shape[1])

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

    def _gather(self, keep: dict, seen: dict, cache, lengths: Tensor, T: int) -> Clean:
        places, writes = keep["places"], keep["writes"]
        row, head = places.row, places.head
        start = places.position + self.first
        every = places.position[:, None] + torch.arange(self.horizon + 1, device=row.device)  # [n, horizon + 1]
        at = every[:, self.first :]  # [n, L]
        valid = at < lengths.to(row.device, non_blocking=True)[row][:, None]
        at, every = at.clamp_max(T - 1), every.clamp_max(T - 1)
        rows = row[:, None]

        def rotary(pair):
            if pair is None:
                return None
            return tuple(x[rows.to(x.device) if len(x) > 1 else 0, at.to(x.device)] for x in pair)

        states, conv_left = {}, {}
        for i in self.linear:
            state = keep["states"][i]
            states[i] = state[keep["of"].to(state.device)] * (start > 0).to(state.device)[:, None, None, None]
            if not keep["x"][i]:  # a layer without a short convolution
                continue
            width = self.stack.sites[i].conv_kernel_size - 1
            x = torch.nn.functional.pad(torch.cat(keep["x"][i], 1)[..., -T:], (width, 0))  # column j is token j - width
            columns = start.to(x.device)[:, None] + torch.arange(width, device=x.device)
            conv_left[i] = x.transpose(1, 2)[row.to(x.device)[:, None], columns].transpose(1, 2)
        prefixes = {}
        for i in self.full:
            keys, values = _keys_and_values(cache, i)
            prefixes[i] = Prefix(keys, values, row.to(keys.device), start.to(keys.device))
        t, heads = places.position, head[:, None]
        left, right = writes.native(row, t, head)
        keys, _ = writes.native(rows, every, heads)  # [n, horizon + 1, K]
        outer = keep["value"][row, t, head]
        if keep["strength"] is not None:
            outer = keep["strength"][row, t, head][:, None] * outer
        return Clean(
            places, self.first, valid, seen[self.layer]["input"][rows, at], keep["o"][rows, at],
            reader(
                keep["q"][rows, every, writes.left_head(heads)], keys,  # the queries' heads are the keys'
                writes.decay[rows, every, heads],
                None if writes.beta is None else writes.beta[rows, every, heads],
                None if writes.erase is None else tuple(x[rows, every, heads] for x in writes.erase),
            )[:, self.first :],
            left, right, outer, writes,
            at, {i: rotary(seen[i]["position_embeddings"]) for i in seen}, states, conv_left, prefixes,
        )  # fmt: skip

    # ---- forks ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, clean: Clean, deltas: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Final hidden states of every fork under every change of the edited head's output.

        Args:
            clean: the clean pass.
            deltas: {name: `[n, L, V]` change of the head's output, or None for no change}.
        Returns:
            {name: `[n, L, hidden]`}, after the final norm.
        """
        forks = torch.arange(len(clean.places), device=clean.o.device)
        changed: dict[str, Tensor] = {}

        def site_rule(call: RuleCall, output_final_state: bool) -> RuleOutput:
            return RuleOutput(changed["o"], None, None, None)

        def rule(i):
            def handler(call: RuleCall, output_final_state: bool) -> RuleOutput:
                return replace(call, initial_state=clean.states[i]).run()

            return handler

        def conv(i):
            def handler(x, weight, bias, activation, *, cu_seqlens, channels):
                return causal_conv(x, weight, bias, activation, left=clean.conv_left[i][:, channels])

            return handler

        out, calls = {}, {i: rule(i) for i in self.linear} | {self.layer: site_rule}
        with (
            intercept(self.model, convs={i: conv(i) for i in self.linear}, private=True, calls=calls),
            self.stack.sharing(),
        ):
            for name, delta in deltas.items():
                o = clean.o
                if delta is not None:
                    o = o.clone()
                    o[forks, :, clean.places.head] += delta
                changed["o"] = o
                out[name] = self.stack.run(
                    clean.layer_input, self.layer, clean.position_ids, clean.position_embeddings, clean.prefixes
                )
        return out

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., vocabulary]` logits of final hidden states."""
        return self.stack.head(hidden)

    @torch.no_grad()
    def divergences(
        self, clean: Clean, hidden: Mapping[str, Tensor], baseline: str, memory: int = 2**28
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """KL against the baseline in both directions, `{name: (forward [n, L], reverse [n, L])}`, NaN past the end.

        Logits are made a slice of tokens at a time, so that about `memory` bytes of them exist at once.
        """
        names = [name for name in hidden if name != baseline]
        n, L = clean.valid.shape
        flat = {name: x.reshape(n * L, -1) for name, x in hidden.items()}
        # One product a condition and slice: the same shapes for all, so equal rows give equal logits.
        step = max(1, memory // (self.stack.head.weight.shape[0] * 8 * 5))
        out = {name: clean.valid.new_full((2, n * L), float("nan"), dtype=torch.float64) for name in names}
        for lo in range(0, n * L, step):
            base = self.logits(flat[baseline][lo : lo + step])
            pairs = kl_pair(base, ((name, self.logits(flat[name][lo : lo + step])) for name in names))
            for name, pair in pairs.items():
                out[name][:, lo : lo + step] = torch.stack(pair)  # moves it when the head lies elsewhere
        missing = ~clean.valid
        return {
            name: tuple(x.view(n, L).masked_fill(missing, float("nan")) for x in pair) for name, pair in out.items()
        }


def _keys_and_values(cache, layer: int) -> tuple[Tensor, Tensor]:
    """A full-attention layer's cached keys and values; OLMo-Hybrid had a cache of its own before transformers 5.15."""
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]


def _leave(call: RuleCall, output_final_state: bool) -> RuleOutput:
    return NotImplemented


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

    Elementwise products and row sums only: equal factors give equal bits, so a write taken out and put back cancels.
    """
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
    return clean.reader @ matrix
