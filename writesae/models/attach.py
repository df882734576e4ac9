"""`attach`: runs a transformers model's recurrent layers on our ops, to record, encode and edit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..edits import Edits
from ..ops import causal_conv
from ..ops._dispatch import can_run
from ..ops._transforms import torch_func_acts, transformed
from ..ops.causal_conv import ACTIVATIONS as CONV_ACTIVATIONS
from ..ops.encode import check_precision
from ..ops.rule import RuleCall, RuleOutput
from ..policies import Policy
from . import hf_norms, seam
from .binding import LayerSite
from .frame import Frame, Recorded, running
from .grid import check_activations
from .identity import require_same_model
from .patch import Owner
from .planned_edits import check_edits
from .policy_sites import check_policies
from .policy_walk import Player, walk
from .quiet import quiet
from .self_test import self_test as run_self_test
from .sites import layers, require_layer
from .tap import DENSE_KINDS, Tap


@contextlib.contextmanager
def attach(
    model: nn.Module,
    sites: Mapping[tuple[int, int], object],
    edits: Mapping[int, Edits] | None = None,
    accelerate: bool = False,
    *,
    policies: Sequence[Policy] | None = None,
    any_model: bool = False,
    strict: bool = False,
    self_test: bool = True,
    check_finite: bool = True,
    record_writes: bool = True,
    write_gradients: bool = False,
    backend: str | None = None,
    precision: str = "fp32",
    activations: str = "exact",
) -> Iterator[Tap]:
    """Within the context, hooked layers run on our op: their writes are recorded, encoded and edited as the model runs.

        with writesae.attach(model, {(9, 4): sae}) as tap:
            model(**batch)                      # or model.generate(...), any number of times
        tap.firings, tap.writes[9], tap.calls

    Prefill, cached decoding, chunked continuation and `generate` (greedy, sampling, beams) work as without; so do
    padded batches, where nothing fires on a pad or on the pads that `generate` feeds to a finished row. Packed batches
    (one row, use_cache=False, no attention_mask, position_ids that restart, with or without cu_seq_lens_q) are kept
    apart in every recurrent layer of the model, hooked or not. Several attaches may be nested: each records, and the
    edits of all apply, outer ones first.

    An attach serves the calls of its own thread, and of threads that have never attached to this model themselves (a
    pool of workers); threads that each attach see each their own calls. Nothing is stored on the model: a copy, a
    pickle or an average of it is an ordinary model. A call that ends in an exception leaves nothing in the tap (but for
    `models.Stopped`, and a tracer's early stop). Where `generate` guides by a second text (`guidance_scale`), the rows
    of that text come behind those of the first, and of `edits` only those of row -1 apply to it.

    With gradients on, `loss.backward()` goes through hooked layers as through the plain model, in training mode too,
    and on into left and right of edits that require it. `tap.writes` is then part of the graph: codes that `ops.encode`
    makes of it send gradients into the model (the activations in `tap.firings` are numbers only). For attribution:

        with writesae.attach(model, {(9, 4): None}, write_gradients=True) as tap:
            model(**batch).logits[0, -1, token].backward()
        effect = (tap.writes[9].rank_one("effect")[1] * tap.write_gradients[9]).sum(-1)     # [B, T, H], of every write

    Args:
        model: a transformers model (or inner text model) with layers of a family that is known: the gated delta rule,
            Kimi's, Mamba-2, Mamba-1, Lightning Attention.
        sites: `{(layer, head): dictionary}`; head is a value head. None in place of a dictionary: writes only. May be
            empty with `edits` or `accelerate`.
        edits: `{layer: Edits}`; row is the row of the batch (with beams: of batch x beams; of a packed batch: the
            sequence), position the column in that row as fed, cached columns counted. An edit after the read leaves
            that column's output and codes as they are, and shows from the next column on.
        policies: `writesae.Policy`s, which look at every token of their sites and edit the state: closed loop, exactly
            as if the model were run token by token, in a prompt too. All of a token see it before any of them has
            acted. On a device each hooked call then waits for its codes.
        accelerate: run all the model's recurrent layers on our op, not only the hooked ones, and, on a CPU where no
            gradient is asked, on our kernels the short convolution before it and the model's RMS norms.
        any_model: also with dictionaries that name another model than this one.
        strict: raise, instead of warning, where an edit's position never came or a policy never acted; see
            `tap.applied` and `tap.policies`.
        self_test: first run a few tokens, and compare every function stood in for with the model's own, on the same
            inputs. Leaves the random state, the model and `tap.calls` alone. Costs a short forward pass, once for every
            kind of model in a process.
        check_finite: raise at the first NaN or infinity written into a state of a hooked layer. On a device, where
            looking at once would stop it, when the tap is next asked for firings, cleared, or the context ends.
        record_writes: keep the `Writes` of the latest call of every hooked layer.
        write_gradients: let every backward pass fill `tap.write_gradients`.
        backend: of the rule (`ops.gated_delta_rule`, `ops.ssd`) and of `ops.encode`; None is the kernel of the model's
            device.
        precision: of the products of `ops.encode`, "fp32" or "bf16"; see there. The model's own numbers stay as they
            are. No matter to dictionaries with a dense encoder.
        activations: "exact", or "packed": rounded, so that feature and activation of a firing share 4 bytes where a
            device holds them and where they cross to the host, in place of 6. Relative error up to 2^-14 with
            dictionaries of up to 2,048 features, twice that with every doubling; no more than 65,536 features. The same
            on a CPU, and for dictionaries that are not top-k.

    Yields:
        `Tap`, good after the context too.

    Raises:
        ValueError: before anything runs, for a model without such layers, a layer or head it does not have, a
            full-attention layer, a dictionary or edit of other sizes than the head, a dictionary of another model, a
            policy that cannot act on one of its sites;
            while running, for a NaN in a state, an edit of a row that the batch does not have, a call that cannot be
            read, or a cache of recurrent layers alone (it does not count its columns) that was filled before attaching;
            at the end, for a site that never ran or (`strict`) an edit whose position never came or a policy that
            never acted.
        RuntimeError: the self-test failed; the model is compiled; a hooked model recomputes its layers in the backward
            (gradient checkpointing).

    Source: Young, *WriteSAE*, arXiv 2605.12770.
    """
    check_precision(precision)
    check_activations(activations)
    found = found_layers(model)
    by_layer, edits = check_sites(model, found, sites), check_edits(model, found, edits)
    if not by_layer and not edits and not accelerate:
        raise ValueError("sites: expected at least one (layer, head), or edits, or accelerate=True; got none")
    acting = check_policies(policies, sites)
    require_same_model(model, sites, any_model)
    options = {"record_writes": record_writes, "backend": backend, "precision": precision, "activations": activations}
    tap = Tap(by_layer, edits, options)
    tap.prepare(found, model, acting)
    hooked = {*by_layer, *edits}
    conv = _Convolution(backend) if accelerate else None
    norms = accelerate and backend in (None, "cpu")
    if self_test:
        tested = [s for i, s in found.items() if accelerate or i in hooked]
        with quiet():
            run_self_test(model, list(found.values()), tested, backend, conv, norms)
    handlers = {i: _Handler(tap, i in hooked, accelerate, check_finite, write_gradients, backend) for i in found}
    with Owner() as owner, owner:
        convs = {} if conv is None else dict.fromkeys(found, conv)
        seam.install(owner, model, list(found.values()), handlers, convs)
        if norms:
            hf_norms.install(owner, model)
        with quiet():
            yield tap
    tap.require_everything_ran(strict)


# ---- the stand-in for one layer's recurrence ------------------------------------------------------------------


class _Handler:
    """One attach's stand-in for one layer. The latest attach's runs, on behalf of every attach on that layer."""

    def __init__(self, tap: Tap, records: bool, accelerate: bool, check_finite: bool, watches: bool, backend):
        self.tap, self.records, self.accelerate = tap, records, accelerate
        self.check_finite, self.watches, self.backend = check_finite, watches, backend

    def __call__(self, call: RuleCall, output_final_state: bool) -> RuleOutput:
        frame = running()
        assert frame is not None
        if torch._C._current_graph_task_id() != -1:  # in a backward pass: the model's call is over, and unknown
            raise RuntimeError(
                f"attach: layer {frame.site.layer_index} is recomputed in the backward pass; switch gradient "
                "checkpointing off (model.gradient_checkpointing_disable()) while attached"
            )
        every = [h for h in frame.rules if isinstance(h, _Handler)]
        recording = [h for h in every if h.records]
        if recording and torch_func_acts():
            raise RuntimeError(
                f"attach: layer {frame.site.layer_index} runs under torch.func (jvp, grad, vmap), where what it would "
                "record are a transform's wrappers, not numbers; use torch.autograd (backward, forward_ad), or attach "
                "without sites and edits (accelerate=True)"
            )
        if not recording and call.cu_seqlens is None and not any(h.accelerate for h in every):
            return NotImplemented
        edits = None
        if recording:
            B, T = frame.site.binding.size(call)
            lengths = [T] * B if call.cu_seqlens is None else call.cu_seqlens.cpu().diff().tolist()
            planned = (h.tap.edits_of_call(frame, lengths) for h in reversed(recording))
            applying = [e for e in planned if e is not None]
            edits = Edits.cat(applying) if applying else None
            if edits is not None and frame.head is not None:
                edits = edits._of_heads([frame.head])
        watching = [h.tap for h in recording if h.watches] if torch.is_grad_enabled() else []
        if watching:
            call = _watched(call, frame, watching)
        players = [x for h in reversed(recording) if (x := Player.of(h.tap, frame)) is not None]
        walked = walk(frame, call, players, edits, self.backend) if players else None
        edits = edits if walked is None else walked.edits
        if walked is not None and walked.output is not None:
            out, codes = walked.output, walked.codes
            out = out if output_final_state else replace(out, final_state=None)
        else:
            codes = {}
            out = call.run(
                edits=edits, return_writes=bool(recording), output_final_state=output_final_state, backend=self.backend
            )
        if recording:
            assert out.writes is not None
            first = out.first_nonfinite if any(h.check_finite for h in recording) else None
            found = frame.all_heads(Recorded(out.writes, call.initial_state, out.final_state, first))
            if found is not None:
                self._record(frame, recording, found, codes)
        for player in players:
            player.note(frame, call)
        return out

    @staticmethod
    def _record(frame: Frame, recording: list[_Handler], found: Recorded, codes) -> None:
        writes, initial, final, first = found
        checking = next((h for h in recording if h.check_finite), None)
        if checking is not None:
            assert first is not None  # rules that return writes say it
            checking.tap.check_finite(frame, writes, first)
        for handler in recording:
            handler.tap.record(frame, writes, initial, final, codes.get(handler.tap) if frame.head is None else None)


class _Convolution:
    """Stand-in for one layer's short convolution on a CPU. Its result lies as the recurrence reads it; the layer's own
    lies transposed, and q, k and v would be copied."""

    def __init__(self, backend: str | None):
        self.backend = backend

    def __call__(self, x, weight, bias, activation, *, cu_seqlens, channels):
        gradient = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, weight, bias))
        gradient = gradient or transformed(x, weight, bias)
        known = weight.dtype == x.dtype and activation in CONV_ACTIVATIONS
        tensors = {"x": x, "weight": weight, "bias": bias}
        if gradient or not known or self.backend not in (None, "cpu") or not can_run("cpu", "causal_conv", tensors):
            return NotImplemented  # the layer's own does as well
        return causal_conv(x.transpose(1, 2), weight, bias, activation, cu_seqlens, "cpu").transpose(1, 2)


def _watched(call: RuleCall, frame: Frame, taps: list[Tap]) -> RuleCall:
    """The same call, with a value whose gradient tells the taps that of the increments, u = beta (v - what is read)."""
    binding, layer, H = frame.site.binding, frame.site.layer_index, frame.site.num_v_heads
    head, heads = frame.head, frame.gradients  # not the frame: the graph holds the hook, and would hold itself
    value, strength = binding.factors(call)
    value = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value.view_as(value)
    if not value.requires_grad:
        value = value.detach().requires_grad_()
    if strength is not None:
        strength = strength.detach().to(value.dtype)
        strength = strength if strength.ndim == value.ndim else strength[..., None]

    def note(gradient: Tensor) -> None:
        found = gradient.detach()
        if strength is not None:
            found = torch.where(strength == 0, 0, found / strength)
        found = found if found.ndim == 4 else found[:, :, None]
        if head is not None:  # the others have calls, and gradients, of their own
            heads[head] = found
            if len(heads) < H:
                return
            found = torch.cat([heads.pop(i) for i in sorted(heads)], 2)
        for tap in taps:
            tap.write_gradients[layer] = found

    value.register_hook(note)
    return replace(call, inputs={**call.inputs, binding.value: value})


# ---- checks before any work -----------------------------------------------------------------------------------


def found_layers(model: nn.Module) -> dict[int, LayerSite]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch module, got {type(model).__name__}")
    compiled = (m for m in model.modules() if getattr(m, "_compiled_call_impl", None) is not None)
    if hasattr(model, "_orig_mod") or next(compiled, None) is not None:
        raise RuntimeError(
            "model: a model compiled with torch.compile cannot be attached to, because its trace bypasses the hooks; "
            "attach to the uncompiled model"
        )
    for module in model.modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ValueError(
                f"model: expected one copy, got nn.DataParallel over {len(module.device_ids)} devices, which runs "
                "copies that nothing is attached to; attach to model.module, or use one device"
            )
    found = {site.layer_index: site for site in layers(model)}
    if not found:
        require_layer(model, found, -1)
    return found


def check_sites(model, found: dict[int, LayerSite], sites) -> dict[int, dict[int, object]]:
    if not isinstance(sites, Mapping):
        raise ValueError(f"sites: expected {{(layer, head): dictionary or None}}, got {type(sites).__name__}")
    by_layer: dict[int, dict[int, object]] = {}
    for key, sae in sites.items():
        if not isinstance(key, tuple) or len(key) != 2 or not all(type(x) is int for x in key):
            raise ValueError(f"sites: expected keys (layer, head) of two integers, got {key!r}")
        layer, head = key
        site = require_layer(model, found, layer)
        if not 0 <= head < site.num_v_heads:
            raise ValueError(
                f"head: expected 0 <= head < {site.num_v_heads} (value heads of layer {layer}), got {head}"
            )
        by_layer.setdefault(layer, {})[head] = sae
        if sae is not None:
            _check_dictionary(sae, site, head)
    return by_layer


def _check_dictionary(sae, site: LayerSite, head: int) -> None:
    where = f"sites[({site.layer_index}, {head})]"
    wanted = ("kind", "K", "V", "k", "threshold", "encode" if getattr(sae, "kind", None) in DENSE_KINDS else "encoder")
    missing = [name for name in wanted if not hasattr(sae, name)]
    if missing:
        raise ValueError(f"{where}: expected a dictionary (writesae.SAE) or None, got {type(sae).__name__}")
    if (sae.K, sae.V) != (site.K, site.V):
        raise ValueError(
            f"{where}: expected a dictionary for states of K={site.K}, V={site.V}, got one for K={sae.K}, V={sae.V}"
        )
