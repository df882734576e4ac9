"""`run_with_sae`: a model whose queries read, at some sites, the reconstruction of the state in the state's place.

Letters: B row, T position, K key size, V value size, F atoms, k codes a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import encode
from ..ops.rule import RuleCall, RuleOutput
from ..writes import Writes
from . import seam
from .arguments import without_cache
from .attach import check_sites, found_layers
from .frame import Frame, running
from .identity import require_same_model
from .tap import DENSE_KINDS

_BLOCK = 128  # states held at a time of dictionaries that are not made of factors
_TERMS = 1 << 16  # atoms read at a time


@dataclass(frozen=True)
class SAERun:
    """What `run_with_sae` returns.

    Attributes:
        logits: `[B, T, vocabulary]`.
        loss: mean cross-entropy of the next token, in nats, over the real ones; NaN where there are none.
    """

    logits: Tensor
    loss: float


@torch.no_grad()
def run_with_sae(
    model: nn.Module,
    saes: Mapping[tuple[int, int], Any],
    input_ids: Tensor,
    error_term: bool = False,
    *,
    attention_mask: Tensor | None = None,
    any_model: bool = False,
    backend: str | None = None,
) -> SAERun:
    """Runs a batch with every state of some sites read through its reconstruction.

        plain = model(input_ids).logits
        run = writesae.run_with_sae(model, {(9, 4): sae}, input_ids)

    Only reads go through it: the output of token t is `Ŝ_t^T q_t`, with `Ŝ_t = mean + bias + sum_i a_i A_i` and a the
    codes of the state S_t, and the recurrence goes on with S_t itself. So no error of an earlier token is carried on
    within a layer; the layers above see the changed outputs, and their states are those of that. No state is formed
    where encoder and atoms are factors: `o_t = sum_i a_i (v_i . q_t) w_i + (mean + bias)^T q_t`.

    Args:
        model: as of `attach`. Called without a cache.
        saes: `{(layer, head): dictionary}` of states.
        input_ids: `[B, T]` int64.
        error_term: add what the reconstruction misses, `(S_t - Ŝ_t)^T q_t`: the plain model's output again.
        attention_mask: `[B, T]`, 0 at pads.
        any_model: also with dictionaries that name another model than this one.
        backend: of the rule and of `ops.encode`, see there.

    Raises:
        ValueError: what `attach` refuses of model and sites; a site without dictionary, one of writes, or one that has
            no atoms to read.

    Source: Young, *WriteSAE*, arXiv 2605.12770.
    """
    found = found_layers(model)
    by_layer = check_sites(model, found, saes)
    if not by_layer:
        raise ValueError("saes: expected at least one {(layer, head): dictionary}, got none")
    require_same_model(model, saes, any_model)
    handlers = {}
    for layer, heads in by_layer.items():
        for head, sae in heads.items():
            _check(sae, (layer, head))
        handlers[layer] = _Handler(heads, error_term, backend)
    mask = {} if attention_mask is None else {"attention_mask": attention_mask}
    with seam.intercept(model, calls=handlers):
        logits = model(input_ids, **mask, **without_cache(model)).logits
    missed = [layer for layer, handler in handlers.items() if not handler.calls]
    if missed:
        raise ValueError(f"saes: expected layers that run, got layer {missed[0]}, which never did")
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    counted = real[:, 1:] & real[:, :-1]
    wanted = input_ids[:, 1:][counted].to(logits.device)
    return SAERun(logits, float(nn.functional.cross_entropy(logits[:, :-1][counted].float(), wanted)))


def _check(sae, at: tuple[int, int]) -> None:
    if sae is None:
        raise ValueError(f"saes[{at}]: expected a dictionary, got None")
    if getattr(sae, "target", "state") != "state":
        raise ValueError(f"saes[{at}]: expected a dictionary of states, got one of {sae.target}s")
    wanted = ("decode", "encode") if _needs_states(sae) else ("encoder", "atoms", "mean", "bias")
    missing = [name for name in wanted if not hasattr(sae, name)]
    if missing:
        raise ValueError(f"saes[{at}]: expected a dictionary with {', '.join(missing)}, got {type(sae).__name__}")


def _needs_states(sae) -> bool:
    return sae.kind in DENSE_KINDS or not getattr(sae, "rank_one_atoms", True)


class _Handler:
    """Stands in for the rule of one layer."""

    def __init__(self, saes: Mapping[int, Any], error_term: bool, backend: str | None):
        self.saes, self.error_term, self.backend, self.calls = saes, error_term, backend, 0

    def __call__(self, call: RuleCall, output_final_state: bool) -> RuleOutput:
        self.calls += 1
        frame = running()
        assert frame is not None
        mine = self.saes if frame.head is None else {0: self.saes[frame.head]} if frame.head in self.saes else {}
        out = call.run(return_writes=bool(mine), output_final_state=output_final_state, backend=self.backend)
        if not mine:
            return out
        writes = out.writes
        assert writes is not None
        queries = _queries(frame, call)
        # What goes past the state (Mamba's D) stays as it is.
        of_state = self._without_skip(call)
        o = out.o.clone()
        by_head = o if o.ndim == 4 else o[:, :, None]  # a view, of rules without an axis of heads
        for head, sae in mine.items():
            q = queries[:, :, writes.left_head(head)]
            read = read_through(
                writes, q, sae, head, backend=self.backend
            ).double()  # what is far off adds up to what it was
            plain = by_head[:, :, head].to(read)
            exact = plain if of_state is None else of_state[:, :, head].to(read)
            error = exact - read if self.error_term else 0
            by_head[:, :, head] = (read + error + (plain - exact)).to(o)
        return replace(out, o=o)

    def _without_skip(self, call: RuleCall) -> Tensor | None:
        """`[B, T, H, V]` of the rule alone; None where that is all there is."""
        if call.inputs.get("D") is None:
            return None
        o = replace(call, inputs={**call.inputs, "D": None}).run(backend=self.backend).o
        return o if o.ndim == 4 else o[:, :, None]


def _queries(frame: Frame, call: RuleCall) -> Tensor:
    """`[B, T, Hk, K]` as they are used, in float32 at least."""
    halves = (torch.bfloat16, torch.float16)
    inputs = {name: x.float() if x is not None and x.dtype in halves else x for name, x in call.inputs.items()}
    return frame.site.binding.queries(replace(call, inputs=inputs))


def read_through(writes: Writes, q: Tensor, sae, head: int, k: int | None = None, backend: str | None = None) -> Tensor:
    """`[B, T, V]`: what queries q `[B, T, K]`, as they are used, read of the reconstructions of one head's states.

    Without states where encoder and atoms are factors: `sum_i a_i (v_i . q) w_i + (mean + bias)^T q`. Otherwise states
    are formed a few at a time. k: atoms a state, of dictionaries of factors; None is the dictionary's own.
    """
    if _needs_states(sae):
        if k is not None:
            raise ValueError(f"k: expected None for a dictionary that needs whole states, got {k}")
        return read_states(writes, q, head, lambda states: sae.decode(sae.encode(states.to(sae.mean))))
    dtype = getattr(sae, "compute_dtype", torch.float32)
    v, w, b = (x.detach().to(q.device, dtype) for x in sae.encoder())
    threshold = None if sae.threshold is None else sae.threshold[None].to(b)
    many = sae.k if k is None else k
    codes = encode(
        writes.to(b), v[None], w[None], b[None], k=many, threshold=threshold, heads=[head], backend=backend
    )  # fmt: skip
    B, T, _ = q.shape
    reads = q.to(codes.values).flatten(0, 1)  # [n, K]
    o = reads @ (sae.mean + sae.bias).detach().to(reads)
    count = codes.values.shape[-1] if codes.offsets is None else codes.offsets.diff()
    token = torch.arange(B * T, device=q.device).repeat_interleave(count)
    values, indices = codes.values.flatten(), codes.indices.flatten()
    v_dec, w_dec = (x.detach().to(reads) for x in sae.atoms())
    for part in torch.arange(len(token), device=q.device).split(_TERMS):
        at = indices[part]
        strength = torch.einsum("nrk,nk->nr", v_dec[at], reads[token[part]]) * values[part, None]
        o.index_add_(0, token[part], torch.einsum("nr,nrv->nv", strength, w_dec[at]))
    return o.view(B, T, -1)


def read_states(writes: Writes, q: Tensor, head: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`[B, T, V]`: what queries q `[B, T, K]` read of one head's states, changed `[n, K, V]` at a time."""
    one = writes.head(head)
    if writes.cu_seqlens is None:
        places = [(n, t) for n in range(q.shape[0]) for t in range(q.shape[1])]
    else:
        places = [(n, t) for n, _, start, stop in writes.sequences() for t in range(stop - start)]
    found, reads = [], q.flatten(0, 1)
    for lo in range(0, len(places), _BLOCK):
        states = change(one.states(torch.tensor(places[lo : lo + _BLOCK]))[:, 0])
        found.append(torch.einsum("nkv,nk->nv", states.to(reads), reads[lo : lo + _BLOCK]))
    return torch.cat(found).view(*q.shape[:2], -1)
