"""`attach` to the model inside TransformerLens' bridge. Needs TransformerLens 4 only where somebody has made one.

    bridge = TransformerBridge.boot_transformers(name)
    with writesae.bridges.transformer_lens.attach(bridge, {(5, 3): sae}) as tap:
        logits, cache = bridge.run_with_cache(ids, use_cache=False)

A bridge keeps the model of transformers, and puts a component of its own around each of its modules. Around Mamba's
layers it calls them, and there `attach` sees what it always sees. A gated delta rule layer it computes itself, by
another path, of which `attach` sees nothing: that is refused, unless the model's own layer may run in its stead.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..models import attach as plain_attach
from ..models.sites import layers
from ..models.tap import Tap

_CACHES = ("cache", "past_key_values", "cache_params")  # as transformers calls them: the first since 5.24
_OWN_FORWARD = "GatedDeltaNetBridge"  # TransformerLens' component that computes a layer itself


@contextlib.contextmanager
def attach(
    bridge: Any, sites: Mapping[tuple[int, int], object], *, own_layers: bool = False, **options: Any
) -> Iterator[Tap]:
    """Within the context, hooked layers of the model inside a `TransformerBridge` run on our op, as by
    `writesae.attach`, when the bridge or the model itself is called. Whole sequences only (but for a Mamba model's own
    `generate`): what TransformerLens' components make of a cache is wrong since transformers 5.24 renamed it. So
    generate with `use_past_kv_cache=False`, or with a model without a bridge.

    Args:
        bridge: a `TransformerBridge`.
        sites, options: as of `writesae.attach`.
        own_layers: where the bridge computes a layer itself (the gated delta rule's, or another with `eager_scan` on),
            run the model's own instead: of the component's hooks there only hook_in and hook_out fire. It is so for
            all threads, until the context ends.

    Yields:
        `Tap`.

    Raises:
        ValueError: no bridge (a `HookedTransformer` has no recurrent layers at all), a hooked layer that the bridge
            computes itself, or what `writesae.attach` raises; from a call within: one with a cache.
    """
    model = getattr(bridge, "original_model", None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"bridge: expected a TransformerBridge (boot_transformers), got {type(bridge).__name__}: there is no model "
            "of transformers in it to attach to, and TransformerLens' own have no recurrent layers"
        )
    hooked = {layer for layer, _ in sites} | set(options.get("edits") or ())
    hooked |= {layer for policy in options.get("policies") or () for layer, _ in getattr(policy, "sites", None) or ()}
    around = _around(model)
    of_layer = {site.layer_index: around.get(id(site.module)) for site in layers(model)}
    every = options.get("accelerate", False)
    taken = [x for layer, x in of_layer.items() if x is not None and _computes(x) and (every or layer in hooked)]
    if taken and not own_layers:
        numbers = ", ".join(str(layer) for layer, x in of_layer.items() if any(x is y for y in taken))
        raise ValueError(
            f"sites: layer {numbers} is computed by TransformerLens' {type(taken[0]).__name__} and not by the model: "
            "expected own_layers=True, which runs the model's own layer there (hook_in and hook_out alone fire in it), "
            "or writesae.attach on a model without a bridge around it"
        )
    with contextlib.ExitStack() as stack:
        for component in taken:
            stack.enter_context(_calling_its_own(component))
        count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
        whole = len(of_layer) == count and not any(x is not None and _computes(x) for x in of_layer.values())
        refuse = _refuse_unknown_cache if whole else _refuse_cache
        stack.callback(model.register_forward_pre_hook(refuse, with_kwargs=True).remove)
        yield stack.enter_context(plain_attach(model, sites, **options))


def _refuse_cache(model: nn.Module, args: tuple, kwargs: dict) -> None:
    for name in _CACHES:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: expected none inside TransformerLens' bridge, got a {type(kwargs[name]).__name__}: generate "
                "with use_past_kv_cache=False (use_cache=False of the model), or with a model without a bridge"
            )


def _refuse_unknown_cache(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """For models whose layers all are called as they are."""
    known = inspect.signature(type(model).forward).parameters
    _refuse_cache(model, args, {name: x for name, x in kwargs.items() if name not in known})


def _around(model: nn.Module) -> dict[int, nn.Module]:
    """{id of a module: the component of TransformerLens around it}."""
    found = {}
    for component in model.modules():
        inner = component._modules.get("_original_component")
        if inner is not None:
            found[id(inner)] = component
    return found


def _computes(component: nn.Module) -> bool:
    """Whether a component of TransformerLens computes what its layer would."""
    kinds = {kind.__name__ for kind in type(component).__mro__}
    return _OWN_FORWARD in kinds or bool(component.__dict__.get("eager_scan", False))


@contextlib.contextmanager
def _calling_its_own(component: Any) -> Iterator[None]:
    """Has a component call the layer it is around, between its hook_in and its hook_out."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = component.hook_in(kwargs["hidden_states"])
        else:
            args = (component.hook_in(args[0]), *args[1:])
        output = component._modules["_original_component"](*args, **kwargs)
        if isinstance(output, torch.Tensor):
            return component.hook_out(output)
        return (component.hook_out(output[0]), *output[1:])

    component.__dict__["forward"] = forward  # not by setattr, which the component passes on to the layer
    try:
        yield
    finally:
        component.__dict__.pop("forward", None)
