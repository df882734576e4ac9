"""What `attach` tries before it is trusted: every function it stands in for, beside the model's own, on a few tokens.

The comparison is made where the functions meet: on the inputs that the running model hands to its recurrence (and to
its short convolution), ours and its own are called side by side. So nothing that comes after can blow up a rounding (an
expert chosen otherwise, eight bits), and no setting of the model has to be changed for it: not its training mode, not
its heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops import gated_delta_rule
from . import hf_gated_delta, hf_norms, patch
from .arguments import RULE, rule_call
from .hf_gated_delta import LayerSite
from .model_call import text_config

# Largest |ours - the model's| of a result over its largest value that is let pass, by the dtype that runs. Measured
# over tiny random models of every family, eager and under autocast: at most TOLERANCE_MEASURED in float32, one rounding
# in half precision. Under autocast the model's own products are the coarse ones.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}

_passed: set = set()  # kinds of models already tried in this process


def self_test(
    model: nn.Module,
    every: Sequence[LayerSite],
    sites: Sequence[LayerSite],
    rule: Callable,
    rule_version: object,
    conv: Callable | None,
    norms: bool,
) -> None:
    """Runs two rows of seven random tokens, and compares. A kind of model tried before is let pass.

    Args:
        every: `layers(model)`.
        sites: those of them to try.
        rule: `rule(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm, cu_seqlens)`, giving
            (o, final_state).
        rule_version: what tells one rule from another for the kind.
        conv: stands in for the short convolution, if anything does; `norms`: whether norms are stood in for.

    Raises:
        RuntimeError: a layer that never called its recurrence, or results that differ.
    """
    if not sites:
        return
    kind = _kind(model, sites, rule_version, conv is not None, norms)
    if kind is not None and kind in _passed:
        return
    trial = _Trial(rule, conv, {site.layer_index for site in sites})
    owner = patch.Owner(alone=True)
    layers = [site.layer_index for site in sites]
    try:
        try:
            convs = {} if conv is None else dict.fromkeys(layers, trial.conv)
            # Every layer of the model runs on ours meanwhile, which is faster; compared are those to be tried.
            rules = dict.fromkeys((site.layer_index for site in every), trial.rule)
            hf_gated_delta.install(owner, model, every, rules, convs)
            if norms:
                hf_norms.install(owner, model, trial.norm)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                _run(_innermost(model, sites))
        finally:
            owner.close()
    finally:  # again, should an interrupt have hit the first
        owner.close()
    bypassed = [i for i in layers if i not in trial.ran]
    if bypassed:
        raise RuntimeError(
            f"attach: self-test failed: layers {bypassed} ran without calling the gated delta rule where their class "
            "does; has something (a hub kernel, another hook) replaced their forward?"
        )
    if kind is not None:
        _passed.add(kind)


class _Trial:
    """Stands in for every function tried, and compares where such a function is met for the first time."""

    def __init__(self, rule: Callable, conv: Callable | None, layers: set[int]):
        self._rule, self._conv, self._layers = rule, conv, layers
        self.ran: set[int] = set()
        self._met: set[tuple] = set()

    def _first(self, *kind) -> bool:
        new = kind not in self._met
        self._met.add(kind)
        return new

    def rule(self, q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm, cu_seqlens):
        frame = hf_gated_delta.running()
        site, settings = frame.site, {"use_qk_l2norm_in_kernel": use_qk_l2norm}
        self.ran.add(site.layer_index)
        o, state = self._rule(q, k, v, g, beta, initial_state, True, use_qk_l2norm, cu_seqlens)
        sizes = (type(site.module), site.K, site.V, site.num_k_heads, site.num_v_heads)
        if site.layer_index in self._layers and self._first(*sizes):
            given = rule_call(frame.original.args, frame.original.keywords)
            inputs = [given[name] for name in RULE]
            self._both("gated delta rule", site, frame.original.func, inputs, (o, state), settings, None)
            # And what the layer calls for one token, on what a cache would hold by now.
            step = [x[:, -1:] for x in inputs]
            ours = self._rule(*(x[:, -1:] for x in (q, k, v, g, beta)), state.clone(), True, use_qk_l2norm, None)
            for original in hf_gated_delta.steps(site):
                self._both("one-token rule", site, original, step, ours, settings, state)
        return o, state if output_final_state else None

    def _both(self, what: str, site: LayerSite, original: Callable, inputs, ours, settings: dict, state) -> None:
        """Compares with what the model's own function makes of the same."""
        q, k, v, g, beta = inputs
        held = None if state is None else state.clone()  # it may work in place
        try:
            theirs = original(q, k, v, g=g, beta=beta, initial_state=held, output_final_state=True, **settings)
        except Exception:  # bound to a kernel that cannot run here, say: then against the definition
            q, k, v_wide, g, beta = (x.double() for x in inputs)
            held = None if state is None else state.double()
            l2norm = settings["use_qk_l2norm_in_kernel"]
            out = gated_delta_rule(
                q, k, v_wide, g, beta, initial_state=held, output_final_state=True, use_qk_l2norm=l2norm,
                backend="reference",
            )  # fmt: skip
            theirs = out.o, out.final_state
        for part, a, b in zip(("output", "state"), ours, theirs, strict=True):
            _compare(f"the {part} of the {what} of layer {site.layer_index}", a, b, v.dtype)

    def conv(self, x, weight, bias, activation, *, cu_seqlens, channels):
        frame = hf_gated_delta.running()
        ours = self._conv(x, weight, bias, activation, cu_seqlens=cu_seqlens, channels=channels)
        if ours is not NotImplemented and self._first("conv", weight.shape, activation):
            _compare(f"the short convolution of layer {frame.site.layer_index}", ours, frame.original(), x.dtype)
        return ours

    def norm(self, module: nn.Module, ours: Tensor, theirs: Tensor) -> None:
        if self._first("norm", type(module), module.weight.shape):
            _compare(f"a {type(module).__name__}", ours, theirs, ours.dtype)


def _compare(what: str, ours: Tensor | None, theirs: Tensor | None, runs: torch.dtype) -> None:
    """Raises RuntimeError unless two results are one; `runs`: the dtype of what they were made from."""
    if ours is None or theirs is None:
        if ours is not theirs:
            raise RuntimeError(f"attach: self-test failed: {what} is missing on one side")
        return
    if ours.shape != theirs.shape:
        raise RuntimeError(
            f"attach: self-test failed: {what} is {tuple(ours.shape)} on our op, {tuple(theirs.shape)} in the model"
        )
    if not torch.isfinite(theirs).all():
        return  # the model itself is broken; check_finite says where, on the first real call
    if torch.is_autocast_enabled(theirs.device.type):
        runs = torch.get_autocast_dtype(theirs.device.type)
    limit = TOLERANCE.get(runs, 0.05)
    off = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30))
    if not off <= limit:
        raise RuntimeError(
            f"attach: self-test failed: {what} differs on our op from the model's own by {off:.1e} of the largest "
            f"(allowed for {runs}: {limit:.0e})"
        )


def _innermost(model: nn.Module, sites: Sequence[LayerSite]) -> nn.Module:
    """The model right around the layers: no head, no wrapper, nothing put in front."""
    around = hf_gated_delta.enclosing(model, sites[0].path)
    if not around or not callable(getattr(around[-1], "get_input_embeddings", None)):
        raise ValueError(
            f"model: expected a model that takes input_ids around the layers, got {type(model).__name__}, which the "
            "self-test cannot run; attach to the model it belongs to, or pass self_test=False"
        )
    return around[-1]


def _run(model) -> None:
    """A forward pass of a few tokens."""
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    size = getattr(embedding, "num_embeddings", None) or text_config(model).vocab_size
    ids = torch.randint(0, size, (2, 7), generator=generator)
    ids = ids.to(hf_gated_delta.device_of(embedding))
    model(input_ids=ids, use_cache=False)


def _kind(model: nn.Module, sites: Sequence[LayerSite], rule_version, conv: bool, norms: bool):
    """What a passed test speaks for: models of the same classes, sizes, dtypes, devices and settings, unless something
    has replaced a forward on some instance."""
    modules = list(model.modules())
    if any("forward" in m.__dict__ or "__call__" in m.__dict__ for m in modules):
        return None
    config = getattr(model, "config", None)
    where = frozenset((p.dtype, p.device) for p in model.parameters())
    autocast = tuple(
        torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in {d.type for _, d in where}
    )
    return (
        tuple((type(m), patch.forward_of(m)) for m in modules), str(getattr(config, "__dict__", None)), where, autocast,
        tuple((s.layer_index, s.K, s.V, s.num_k_heads, s.num_v_heads, s.path) for s in sites),
        tuple(_functions(s.module) for s in sites), rule_version, conv, norms and hf_norms.Norm.__call__,
    )  # fmt: skip


def _functions(module: nn.Module) -> tuple:
    """The functions that a layer would call by itself."""
    space, names = hf_gated_delta.targets(module)
    standing = ((patch.patches.get((id(space), name)), space.get(name)) for name in names)
    return tuple(now if here is None else here.original for here, now in standing)
