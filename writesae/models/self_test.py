"""What `attach` tries before it is trusted: every function it stands in for, beside the model's own, on a few tokens.

The comparison is made where the functions meet: on the inputs that the running model hands to its recurrence (and to
its short convolution), ours and its own are called side by side. So nothing that comes after can blow up a rounding (an
expert chosen otherwise, eight bits), and no setting of the model has to be changed for it: not its training mode, not
its heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..ops.rule import RuleCall, RuleOutput
from . import hf_norms, patch, seam
from .arguments import without_cache
from .binding import LayerSite, Recurrence
from .fla_stand_ins import runnable
from .frame import Met, running
from .model_call import text_config
from .sites import device_of, enclosing, steps, targets, unpatched

# Largest |ours - the model's| of a result over its largest value that is let pass, by the dtype that runs. Measured
# over tiny random models of every family, eager and under autocast: at most TOLERANCE_MEASURED in float32, one rounding
# in half precision. Under autocast the model's own products are the coarse ones.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}

_passed: set = set()  # kinds of models already tried in this process


def self_test(
    model: nn.Module,
    every: Sequence[LayerSite],
    sites: Sequence[LayerSite],
    backend: str | None,
    conv: Callable | None,
    norms: bool,
) -> None:
    """Runs two rows of seven random tokens, and compares. A kind of model tried before is let pass.

    Args:
        every: `layers(model)`.
        sites: those of them to try.
        backend: of the rules.
        conv: stands in for the short convolution, if anything does; `norms`: whether norms are stood in for.

    Raises:
        RuntimeError: a layer that never called its recurrence, or results that differ.
    """
    if not sites:
        return
    kind = _kind(model, sites, backend, conv is not None, norms)
    if kind is not None and kind in _passed:
        return
    trial = _Trial(backend, conv, {site.layer_index for site in sites})
    layers = [site.layer_index for site in sites]
    with patch.Owner(alone=True) as owner, owner:
        convs = {} if conv is None else dict.fromkeys(layers, trial.conv)
        # Every layer of the model runs on ours meanwhile, which is faster; compared are those to be tried.
        rules = dict.fromkeys((site.layer_index for site in every), trial.rule)
        seam.install(owner, model, every, rules, convs)
        if norms:
            hf_norms.install(owner, model, trial.norm)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            _run(_innermost(model, sites))
    bypassed = [site for site in sites if site.layer_index not in trial.ran]
    if bypassed:
        names = " or ".join(dict.fromkeys(f"the {site.binding.name}" for site in bypassed))
        raise RuntimeError(
            f"attach: self-test failed: layers {[site.layer_index for site in bypassed]} ran without calling {names} "
            "where their class does; has something (a hub kernel, another hook) replaced their forward?"
        )
    if kind is not None:
        _passed.add(kind)


class _Trial:
    """Stands in for every function tried, and compares where such a function is met for the first time."""

    def __init__(self, backend: str | None, conv: Callable | None, layers: set[int]):
        self._backend, self._conv, self._layers = backend, conv, layers
        self.ran: set[int] = set()
        self._met: set[tuple] = set()

    def _first(self, *kind) -> bool:
        new = kind not in self._met
        self._met.add(kind)
        return new

    def rule(self, call: RuleCall, output_final_state: bool) -> RuleOutput:
        frame = running()
        assert frame is not None and frame.met is not None
        site, met = frame.site, frame.met
        self.ran.add(site.layer_index)
        ours = call.run(output_final_state=True, backend=self._backend)
        sizes = (type(site.module), site.K, site.V, site.num_k_heads, site.num_v_heads, frame.head)
        if site.layer_index in self._layers and self._first(*sizes):
            self._both(site.binding.name, site, met, call, ours, lambda: (met.args, met.kwargs))
            assert ours.final_state is not None
            # And what the layer calls for one token, on what a cache would hold by now.
            for recurrence, original in steps(site):
                self._step(site, met, recurrence, runnable(original), ours.final_state)
        return ours if output_final_state else replace(ours, final_state=None)

    def _step(self, site: LayerSite, met: Met, recurrence: Recurrence, original: Callable, state: Tensor) -> None:
        make = recurrence.step
        assert make is not None

        def arguments() -> tuple[tuple, dict]:
            return make(met.given, state.clone())  # it may work in place

        args, kwargs = arguments()
        step = Met(recurrence, original, args, kwargs, recurrence.read(args, kwargs))
        call = recurrence.bind(site, step.given)
        ours = call.run(output_final_state=True, backend=self._backend)
        self._both("one-token rule", site, step, call, ours, arguments)

    def _both(
        self, what: str, site: LayerSite, met: Met, call: RuleCall, ours: RuleOutput, arguments: Callable
    ) -> None:
        """Compares with what the model's own function makes of the same; `arguments` makes them anew."""
        recurrence = met.recurrence
        args, kwargs = arguments()
        kwargs = recurrence.asking(kwargs)
        where = f"the {what} of layer {site.layer_index}"
        _require_callable(where, met.original, args, kwargs)
        try:
            returned = met.original(*args, **kwargs)
        except Exception:  # bound to a kernel that cannot run here, say: then against the definition
            out = _double(call).run(output_final_state=True, backend="reference")
            mine, theirs = (ours.o, ours.final_state), (out.o, out.final_state)
        else:
            theirs = recurrence.parts(recurrence.read(args, kwargs), returned)
            given = recurrence.read(met.args, recurrence.asking(met.kwargs))
            mine = recurrence.parts(given, recurrence.answer(given, ours))
        # The coarsest dtype given: the rule may have been handed more than the model works with.
        dtypes = [recurrence.read(args, kwargs)[name].dtype for name in recurrence.arguments]
        runs = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        for part, a, b in zip(("output", "state"), mine, theirs, strict=True):
            _compare(f"the {part} of {where}", a, b, runs)

    def conv(self, x, weight, bias, activation, *, cu_seqlens, channels):
        frame = running()
        assert frame is not None and frame.own_conv is not None
        ours = self._conv(x, weight, bias, activation, cu_seqlens=cu_seqlens, channels=channels)
        if ours is not NotImplemented and self._first("conv", weight.shape, activation):
            _compare(f"the short convolution of layer {frame.site.layer_index}", ours, frame.own_conv(), x.dtype)
        return ours

    def norm(self, module: nn.Module, ours: Tensor, theirs: Tensor) -> None:
        if self._first("norm", type(module), module.weight.shape):
            _compare(f"a {type(module).__name__}", ours, theirs, ours.dtype)


def _require_callable(where: str, original: Callable, args: tuple, kwargs: dict) -> None:
    """Raises RuntimeError for arguments that a function cannot take, as far as it says what it takes."""
    try:
        inspect.signature(original).bind(*args, **kwargs)
    except TypeError as error:
        raise RuntimeError(
            f"attach: self-test failed: {where} cannot be called with {len(args)} positions and {', '.join(kwargs)}: "
            f"{error}"
        ) from None
    except ValueError:  # it does not say
        pass


def _double(call: RuleCall) -> RuleCall:
    """The same call in float64."""
    inputs = {name: None if x is None else x.double() for name, x in call.inputs.items()}
    state = call.initial_state
    return replace(call, inputs=inputs, initial_state=None if state is None else state.double())


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
    around = enclosing(model, sites[0].path)
    if not around or _embedding(around[-1]) is None:
        raise ValueError(
            f"model: expected a model that takes input_ids around the layers, got {type(model).__name__}, which the "
            "self-test cannot run; attach to the model it belongs to, or pass self_test=False"
        )
    return around[-1]


def _embedding(model) -> nn.Module | None:
    """What a model looks its input_ids up in; None of something else."""
    if callable(getattr(model, "get_input_embeddings", None)):
        return model.get_input_embeddings()
    own = getattr(model, "embedding", None)  # mamba-ssm's models
    return own if isinstance(own, nn.Embedding) else None


def _run(model) -> None:
    """A forward pass of a few tokens."""
    embedding = _embedding(model)
    assert embedding is not None
    generator = torch.Generator().manual_seed(0)
    size = getattr(embedding, "num_embeddings", None) or text_config(model).vocab_size
    ids = torch.randint(0, size, (2, 7), generator=generator)
    ids = ids.to(device_of(embedding))
    model(input_ids=ids, **without_cache(model))


def _kind(model: nn.Module, sites: Sequence[LayerSite], backend: str | None, conv: bool, norms: bool):
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
        tuple(_functions(s) for s in sites), backend, conv, norms and hf_norms.Norm.__call__,
    )  # fmt: skip


def _functions(site: LayerSite) -> tuple:
    """The functions that a layer would call by itself, and what would run in their place."""
    return (site.binding, site.binding.rule.run, *(unpatched(space, name) for space, name in targets(site.module)))
