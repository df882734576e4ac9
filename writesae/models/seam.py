"""Standing in for the functions by which layers run their recurrence: `intercept`. Knows no family: see `binding`.

One dispatching shim stands in for each function, from the first `intercept` to the last: it asks which layer is running
on this thread, and calls the original for a layer nobody intercepts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..ops.rule import RuleCall, RuleOutput
from . import generation, patch, short_conv
from .binding import Binding, LayerSite, Recurrence
from .fla_stand_ins import runnable
from .frame import Frame, Met, running
from .model_call import ModelCall, model_body
from .patch import Owner
from .sites import enclosing, is_of_library, known_as, layers, require_layer, targets

RuleHandler = Callable[..., tuple[Tensor, Tensor | None]]
CallHandler = Callable[[RuleCall, bool], RuleOutput]
ConvHandler = Callable[..., Tensor]


@contextlib.contextmanager
def intercept(
    model: nn.Module,
    rules: Mapping[int, RuleHandler] | None = None,
    convs: Mapping[int, ConvHandler] | None = None,
    private: bool = False,
    *,
    calls: Mapping[int, CallHandler] | None = None,
) -> Iterator[list[LayerSite]]:
    """Within the context, layer l's recurrence calls `rules[l]` and its convolution `convs[l]` in the original's place.

    Args:
        model: any model with layers of a registered family (`layers(model)`), or a sub-model of it.
        rules: `{layer_index: fn}` with `fn(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm,
            cu_seqlens) -> (o, final_state)`. q, k `[B, T, Hk, K]` (true key heads, before normalisation and scaling),
            v `[B, T, H, V]`, g (log-decay) and beta `[B, T, H]`, initial_state `[N, H, K, V]` or None, cu_seqlens
            `[N + 1]` int64 or None; o `[B, T, H, V]` in v's dtype, final_state `[N, H, K, V]` or None. So for layers on
            the gated delta rule; of another rule, its own inputs in order and its own options.
        convs: `{layer_index: fn}` with `fn(x, weight, bias, activation, *, cu_seqlens, channels) -> y`: x `[B, D, T']`
            before the convolution, weight `[D, W]`; y `[B, D, T']` after convolution and activation (`causal_conv`
            makes it, with a left context of your own). With a filled cache x carries the cached columns on its left.
            Called once a layer and forward, except for OLMo-Hybrid before transformers 5.15, where q, k and v are
            convolved apart: three calls, `channels` the slice each is of [q, k, v] (otherwise `slice(None)`). Not
            called in the one-token decode step with a cache.
        private: serve calls of this thread only.
        calls: as `rules`, for whatever rule: `{layer_index: fn}` with `fn(call, output_final_state) -> output`, a
            `RuleCall` and a `RuleOutput`, of which o and final_state are used. A layer is in one of the two. Zamba's
            layers call once a head, in order: `running().head`.

    A function may return NotImplemented to leave the call to the one installed before it, and in the end to the model.
    The latest installed goes first. `running()` tells a function which layer and call it serves. Handlers see the calls
    of this thread, and those of threads that have never intercepted this model themselves; nothing is stored on the
    model, whose copies are free of all this. Everything is put back on exit, whatever the exit.

    Yields:
        `layers(model)`.

    Raises:
        ValueError: a layer that is not one of them, or whose forward cannot be read.
    """
    rules, calls = rules or {}, calls or {}
    twice = sorted({*rules} & {*calls})
    if twice:
        raise ValueError(f"calls: expected layers that are not in rules, got layers {twice} in both")
    sites, handlers = layers(model), {**{i: _by_arguments(fn) for i, fn in rules.items()}, **calls}
    with Owner(private=private) as owner, owner:
        install(owner, model, sites, handlers, convs or {})
        yield sites


def intercept_conv(model: nn.Module, convs: Mapping[int, ConvHandler]):
    """`intercept(model, convs=convs)`, for convolutions alone: see there."""
    return intercept(model, convs=convs)


def _by_arguments(fn: RuleHandler) -> CallHandler:
    """A function of a rule's arguments as one of a `RuleCall`."""

    def handler(call: RuleCall, output_final_state: bool) -> RuleOutput:
        found = fn(
            *call.inputs.values(), call.initial_state, output_final_state, *call.options.values(), call.cu_seqlens
        )
        return found if found is NotImplemented else RuleOutput(*found, None, None)

    return handler


# ---- installing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Handlers:
    """What one owner has for one layer."""

    site: LayerSite
    rule: CallHandler | None
    conv: ConvHandler | None
    helpless: bool  # the layer's own functions cannot run on this machine


def install(
    owner: Owner,
    model: nn.Module,
    sites: Sequence[LayerSite],
    rules: Mapping[int, CallHandler],
    convs: Mapping[int, ConvHandler],
) -> None:
    """Puts everything in place that `intercept` needs, for `owner.close()` to take away; `sites`: `layers(model)`."""
    by_index = {site.layer_index: site for site in sites}
    for index in (*rules, *convs):
        require_layer(model, by_index, index)
    with patch.lock:
        owner.mark(site.module for site in sites)
        helpless = set()
        for family in dict.fromkeys(site.binding for site in sites):
            of_it = [site.module for site in sites if site.binding is family]
            if family.stand_ins is not None and family.stand_ins(owner, of_it):
                helpless.add(family)
        for index, site in sorted(by_index.items()):
            if index in rules or index in convs or site.binding in helpless:
                handlers = _Handlers(site, rules.get(index), convs.get(index), site.binding in helpless)
                _install_layer(owner, model, handlers)


def _install_layer(owner: Owner, model: nn.Module, handlers: _Handlers) -> None:
    site = handlers.site
    around = enclosing(model, site.path)
    for i, module in enumerate(around):
        owner.join(module, "forward", model_body, tuple(around[:i]))
        if callable(getattr(type(module), "generate", None)):
            owner.join(module, "generate", generation.generate_body, tuple(around[:i]))
            owner.patch(StoppingCriteriaList, "__call__", generation.listen_to_criteria)
            owner.patch(LogitsProcessorList, "__call__", generation.listen_to_processors)
    for space, name in targets(site.module):
        make = shim(site.binding, known_as(site.binding, space, name))
        if space is site.module.__dict__:
            owner.patch(type(site.module), name, attribute(name, functools.cache(make)))
        else:
            owner.patch(space, name, make)
    start = 0
    for child in site.binding.conv_modules(site.module):
        channels = slice(start, start := start + child.in_channels)
        owner.join(child, "forward", short_conv.module_body, channels)
    owner.join(site.module, "forward", _layer_body, handlers)
    roles = site.binding.roles if is_of_library(type(site.module)) else ("hidden_states",)
    patch.entries[id(site.module)].reader.require(*roles)


def attribute(name: str, make: Callable, also: Callable[[nn.Module], bool] = lambda module: False) -> Callable:
    """What puts `make(own)` in the place of an attribute of instances: of one that is intercepted, while it runs, and
    of those of which `also(instance)` holds."""

    def active(module: nn.Module) -> bool:
        frame = running()
        return (frame is not None and frame.site.module is module) or also(module)

    return lambda original: patch.Attribute(name, make, active)


# ---- what runs in the place of the original -------------------------------------------------------------------


def _layer_body(entry, call, args, kwargs):
    serving = entry.serving()
    if not serving:
        return call(*args, **kwargs)
    given = entry.reader(args, kwargs)
    frame = Frame(
        serving[0].site, ModelCall.current(), given.get("cache"), given.get("attention_mask"), given["hidden_states"],
        tuple(h.rule for h in serving if h.rule is not None), tuple(h.conv for h in serving if h.conv is not None),
        helpless=serving[0].helpless,
    )  # fmt: skip
    if frame.call is not None:
        frame.call.feed(frame.cache, frame.hidden.shape[1])
    if frame.site.binding.inline:
        call = _rule_shim(frame.site.binding.recurrences[0], call)
    output = frame.run(call, args, kwargs)
    if not frame.ran and any(getattr(rule, "records", False) for rule in frame.rules):
        site = frame.site
        raise RuntimeError(
            f"model: expected layer {site.layer_index} ({type(site.module).__name__}) to call the {site.binding.name}, "
            "got a forward that went past it; nothing of it was recorded or edited"
        )
    return output


def shim(binding: Binding, name: str) -> Callable[[Any], Any]:
    """Makes what stands in for a family's function of this name, given the original."""
    recurrence = binding.recurrence(name)
    if recurrence is not None:
        return lambda original: _rule_shim(recurrence, binding.usable(name, original))
    if name in binding.bypasses:
        return functools.partial(_bypass_shim, binding.bypasses[name])
    return lambda original: short_conv.function_shim(binding.usable(name, original))


def _rule_shim(recurrence: Recurrence, original: Callable) -> Callable:
    original = runnable(original)

    @functools.wraps(original)
    def stand_in(*args, **kwargs):
        frame = running()
        # Met already: an original that is called in a stand-in's course, and calls others of the functions itself.
        if frame is None or not (frame.rules or frame.helpless) or frame.met is not None:
            return original(*args, **kwargs)
        given = recurrence.read(args, kwargs)
        frame.met, frame.ran = Met(recurrence, original, args, kwargs, given), True
        try:
            call, wants_state = frame.bind(recurrence, given), recurrence.wants_state(given)
            for handler in frame.rules:
                output = handler(call, wants_state)
                if output is not NotImplemented:
                    return recurrence.answer(given, output)
            if frame.helpless:
                return recurrence.answer(given, call.run(output_final_state=wants_state))
            return original(*args, **kwargs)
        finally:
            frame.met = None

    return stand_in


def _bypass_shim(instead: Any, original: Any) -> Any:
    if not callable(original):  # an attribute of the layer, which is asked for only while it is intercepted
        return instead

    @functools.wraps(original)
    def stand_in(*args, **kwargs):
        frame = running()
        return (original if frame is None else instead)(*args, **kwargs)

    return stand_in
