"""Where transformers models run the gated delta rule, and how to stand in for it: `layers`, `intercept`, `running`.

Layers are found by the function they call, not by class name. Since transformers 5.15 a layer's forward calls functions
of its own modelling file (`torch_chunk_gated_delta_rule`, ...), shared by every model of that file; before, it calls
attributes of the layer. Either way one dispatching shim stands in for each function, from the first `intercept` to the
last: it asks which layer is running on this thread, and calls the original for a layer nobody intercepts.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList

from . import generation, patch
from .arguments import RULE, rule_call
from .model_call import ModelCall, model_body
from .patch import Owner

RULES = ("chunk_gated_delta_rule", "recurrent_gated_delta_rule")
_CONV = "causal_conv1d_fn"

RuleHandler = Callable[..., tuple[Tensor, Tensor | None]]
ConvHandler = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class LayerSite:
    """One gated-delta layer of a model.

    Attributes:
        layer_index: the layer's number in its model (linear and full-attention layers counted together).
        module: the module whose forward calls the rule (for instance `Qwen3_5GatedDeltaNet`).
        block: the decoder layer that holds it.
        num_k_heads, num_v_heads: key heads and value heads (H = num_v_heads).
        K, V: key and value size of one head's state `[K, V]`.
        conv_kernel_size: width of the causal convolution before the rule.
        norm: gated RMSNorm after the rule, called as `norm(o [*, V], gate [*, V])`.
        out_proj: linear map of the normed heads `[..., H * V]` to the residual stream.
    """

    layer_index: int
    module: nn.Module
    block: nn.Module
    num_k_heads: int
    num_v_heads: int
    K: int
    V: int
    conv_kernel_size: int
    norm: nn.Module
    out_proj: nn.Module
    path: str


# ---- finding layers -------------------------------------------------------------------------------------------


@functools.cache
def _global_names(function) -> frozenset[str]:
    """Names that a function looks up in its module's globals."""
    code = getattr(function, "__code__", None)
    if code is None:
        return frozenset()
    return frozenset(i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))


def _is_rule(name: str) -> bool:
    return name.endswith(RULES)


def _global_targets(module: nn.Module) -> tuple[dict, list[str]]:
    """(globals, names) of the rule and convolution functions that the module's forward looks up there."""
    function = patch.forward_of(module)
    space = getattr(function, "__globals__", {})
    names = sorted(n for n in _global_names(function) if callable(space.get(n)) and (_is_rule(n) or n == _CONV))
    return (space, names) if any(_is_rule(n) for n in names) else (space, [])


def _attribute_targets(module: nn.Module) -> list[str]:
    """Names of the module's own attributes that hold the rule and the convolution (transformers before 5.15)."""
    own = module.__dict__
    if not all(callable(own.get(name)) for name in RULES):
        return []
    return [*RULES, *([_CONV] if _CONV in own else [])]


def targets(module: nn.Module) -> tuple[dict, list[str]]:
    """(namespace, names) of the functions that the module's forward calls: its file's, or its own attributes."""
    own = _attribute_targets(module)
    return (module.__dict__, own) if own else _global_targets(module)


def steps(site: LayerSite) -> list[Callable]:
    """What the layer calls for one token on a cache, without anything that stands in for it."""
    space, names = targets(site.module)
    found = []
    for name in names:
        if name.endswith(RULES[1]):
            standing = patch.patches.get((id(space), name))
            found.append(space[name] if standing is None else standing.original)
    return found


def _has(module: nn.Module, *names: str):
    for name in names:
        found = getattr(module, name, None)
        if found is not None:
            return found
    raise ValueError(f"model: {type(module).__name__} calls the gated delta rule but has none of {', '.join(names)}")


def layers(model: nn.Module) -> list[LayerSite]:
    """The model's gated-delta layers in order, wherever they are nested.

    Raises:
        ValueError: a layer number occurs twice (two text stacks in one model; pass one of them).
    """
    found: dict[int, LayerSite] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if not targets(module)[1]:
            continue
        index = _has(module, "layer_idx")
        if index in found:
            raise ValueError(
                f"model: expected one stack of layers, got layer {index} at {found[index].path} and at {path}; "
                "pass the sub-model you mean"
            )
        found[index] = LayerSite(
            index, module, modules[path.rpartition(".")[0]], _has(module, "num_k_heads"), _has(module, "num_v_heads"),
            _has(module, "head_k_dim"), _has(module, "head_v_dim"), _has(module, "conv_kernel_size"),
            _has(module, "norm", "o_norm"), _has(module, "out_proj", "o_proj"), path,
        )  # fmt: skip
    return [found[i] for i in sorted(found)]


def enclosing(model: nn.Module, path: str) -> list[nn.Module]:
    """The models around a layer, outermost first: everything above the list that holds its block."""
    chain, at = [model], model
    parts = path.split(".")
    for part in parts:
        at = getattr(at, part)
        chain.append(at)
    last = max((i for i, m in enumerate(chain) if isinstance(m, nn.ModuleList)), default=len(chain) - 1)
    return [m for m in chain[:last] if not isinstance(m, (nn.ModuleList, nn.ModuleDict))]


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes: where its weights are, or (weights that are brought when they are used) will be.

    Raises:
        ValueError: nobody brings them.
    """
    for part in module.modules():  # accelerate's hook
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    tensors = (*module.parameters(), *module.buffers())
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta":
        raise ValueError("model: expected weights, got parameters on the meta device without a hook that loads them")
    return device


# ---- what is running on this thread ---------------------------------------------------------------------------


class _Local(threading.local):
    def __init__(self):
        self.frames: list[Frame] = []


_local = _Local()


@dataclass(eq=False)
class Frame:
    """One forward call of an intercepted layer, on this thread.

    Attributes:
        site: the layer.
        call: the model's forward call around it, None when the layer was called on its own.
        cache: the cache handed to the layer, or None.
        layer_mask: `[B, T]` mask handed to the layer, or None.
        hidden: `[B, T, hidden]` what the layer was given.
        original: calls the function that a handler stands in for, as the layer called it.
    """

    site: LayerSite
    call: ModelCall | None
    cache: object
    layer_mask: Tensor | None
    hidden: Tensor
    rules: tuple[RuleHandler, ...]
    convs: tuple[ConvHandler, ...]
    original: Callable = field(default=None, repr=False)

    @functools.cached_property
    def cu_seqlens(self) -> Tensor | None:
        """`[N + 1]` int64 offsets of the packed sequences of this call, or None."""
        if self.call is None:
            return None
        return self.call.cu_seqlens(self.hidden.shape[:2], self.cache)

    @functools.cached_property
    def start(self) -> int:
        """Column of the first token of this call: tokens (pads too) that the cache held before."""
        return 0 if self.call is None else self.call.start(self.cache)

    @functools.cached_property
    def first_row(self) -> int:
        """Number of this call's first row; see `ModelCall.first_row`."""
        return 0 if self.call is None else self.call.first_row(self.hidden.shape[0])

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """`[B, T]` bool, False at pads and at what `generate` feeds past a row's end; None when all are real tokens."""
        real = None if self.layer_mask is None or self.layer_mask.ndim != 2 else self.layer_mask.bool()
        if self.call is None:
            return real
        known = self.call.real_tokens(self.hidden.shape[:2], self.start, self.hidden.device)
        return known if real is None else real if known is None else real & known.to(real.device)


def running() -> Frame | None:
    """The intercepted layer that is running on this thread; for handlers."""
    return _local.frames[-1] if _local.frames else None


# ---- shims ----------------------------------------------------------------------------------------------------


def _rule_shim(original):
    @functools.wraps(original)
    def gated_delta_rule(*args, **kwargs):
        frame = running()
        if frame is None or not frame.rules:
            return original(*args, **kwargs)
        given = rule_call(args, kwargs)
        q, k, v, g, beta = (given[name] for name in RULE)
        heads, keys = frame.site.num_v_heads, frame.site.num_k_heads
        if keys != heads and k.shape[2] == heads:  # already repeated to value heads: undo, as views
            q, k = q[:, :, :: heads // keys], k[:, :, :: heads // keys]
        frame.original = functools.partial(original, *args, **kwargs)
        for handler in frame.rules:
            result = handler(
                q, k, v, g, beta, given.get("initial_state"), bool(given.get("output_final_state")),
                bool(given.get("use_qk_l2norm_in_kernel")), frame.cu_seqlens,
            )  # fmt: skip
            if result is not NotImplemented:
                return result
        return original(*args, **kwargs)

    return gated_delta_rule


def _conv_shim(original):
    def causal_conv1d_fn(*args, **kwargs):
        frame = running()
        names = ("hidden_states", "weight", "bias", "activation")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x = given["x"] if "x" in given else given["hidden_states"]
        if frame is not None:
            plain = functools.partial(causal_conv, x, given["weight"], given.get("bias"), given.get("activation"))
            frame.original = plain if original is None else functools.partial(original, *args, **kwargs)
            y = _conv(frame, x, given["weight"], given.get("bias"), given.get("activation"), slice(None))
            if y is not None:
                return y
            return frame.original()
        if original is None:
            return causal_conv(x, given["weight"], given.get("bias"), given.get("activation"))
        return original(*args, **kwargs)

    return causal_conv1d_fn if original is None else functools.wraps(original)(causal_conv1d_fn)


def _conv(frame: Frame, x, weight, bias, activation, channels: slice) -> Tensor | None:
    """What the frame's convolution handlers, or the packed convolution, make of x; None: leave it to the model."""
    cu_seqlens = frame.cu_seqlens
    for handler in frame.convs:
        y = handler(x, weight, bias, activation, cu_seqlens=cu_seqlens, channels=channels)
        if y is not NotImplemented:
            return y
    return None if cu_seqlens is None else causal_conv(x, weight, bias, activation, cu_seqlens=cu_seqlens)


def causal_conv(
    x: Tensor,  # [B, D, T]
    weight: Tensor,  # [D, W]
    bias: Tensor | None = None,  # [D]
    activation: str | None = None,
    left: Tensor | None = None,  # [B, D, L]
    cu_seqlens: Tensor | None = None,  # [N + 1]
) -> Tensor:
    """Depthwise causal convolution and activation, `[B, D, T]`, as the layers make it before the rule.

    Args:
        left: inputs before the first column (L of any size; W - 1 are enough); zeros when None.
        cu_seqlens: offsets of packed sequences (B = 1), which then do not see each other.
    """
    D, W = weight.shape
    T = x.shape[-1]
    if cu_seqlens is None:
        wide = x if left is None else torch.cat([left.to(x), x], -1)
        y = nn.functional.conv1d(wide.to(weight.dtype), weight[:, None], bias, padding=W - 1, groups=D)
        y = y[:, :, : wide.shape[-1]][:, :, -T:]
    else:
        at = torch.arange(T, device=x.device)
        cu = cu_seqlens.to(x.device)
        place = at - cu[torch.searchsorted(cu, at, right=True) - 1]  # position inside its own sequence
        wide = nn.functional.pad(x.to(weight.dtype), (W - 1, 0))
        y = sum(wide[:, :, W - 1 - s : W - 1 - s + T] * (weight[:, W - 1 - s, None] * (place >= s)) for s in range(W))
        y = y if bias is None else y + bias[:, None]
    if activation is not None:
        from transformers.activations import ACT2FN

        y = ACT2FN[activation](y)
    return y.to(x.dtype)


def _short_convs(module: nn.Module) -> list[nn.Module]:
    """Convolutions that are modules with a forward of their own (OLMo-Hybrid before transformers 5.15), q, k, v."""
    return [m for m in module.children() if isinstance(m, nn.Conv1d) and type(m).forward is not nn.Conv1d.forward]


# ---- installing -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Handlers:
    """What one owner has for one layer."""

    site: LayerSite
    rule: RuleHandler | None
    conv: ConvHandler | None


def _layer_body(entry, call, args, kwargs):
    serving = entry.serving()
    if not serving:
        return call(*args, **kwargs)
    given = entry.reader(args, kwargs)
    frame = Frame(
        serving[0].site, ModelCall.current(), given.get("cache"), given.get("attention_mask"), given["hidden_states"],
        tuple(h.rule for h in serving if h.rule is not None), tuple(h.conv for h in serving if h.conv is not None),
    )  # fmt: skip
    depth = len(_local.frames)
    try:
        try:
            _local.frames.append(frame)
            return call(*args, **kwargs)
        finally:
            del _local.frames[depth:]
    finally:  # again, should an interrupt have hit the line above
        del _local.frames[depth:]


def _short_conv_body(entry, call, args, kwargs):
    frame, serving = running(), entry.serving()
    given = entry.reader.named(args, kwargs)
    x, cache, cached = given["hidden_states"], given.get("cache"), bool(given.get("use_precomputed"))
    if frame is None or not serving or (cached and x.shape[1] == 1):
        return call(*args, **kwargs)
    columns, conv = x.transpose(1, 2), entry.module
    wide = torch.cat([cache, columns], -1) if cached else columns
    weight = conv.weight[:, 0]
    frame.original = functools.partial(causal_conv, wide, weight, conv.bias, "silu")
    y = _conv(frame, wide, weight, conv.bias, "silu", serving[0])
    if y is None:
        return call(*args, **kwargs)
    kept = nn.functional.pad(wide, (conv.weight.shape[-1] - 1 - wide.shape[-1], 0))
    return y[:, :, -x.shape[1] :].transpose(1, 2), kept


def _stand_in_for_functions(owner: Owner, module: nn.Module) -> None:
    """Puts shims in the place of what the module's forward calls."""
    space, names = targets(module)
    for name in names:
        make = _rule_shim if _is_rule(name) else _conv_shim
        if space is module.__dict__:
            owner.patch(type(module), name, functools.partial(_attribute, name, functools.cache(make)))
        else:
            owner.patch(space, name, make)


def _attribute(name: str, make: Callable, original) -> patch.Attribute:
    return patch.Attribute(name, make, lambda module: running() is not None and running().site.module is module)


def install(
    owner: Owner,
    model: nn.Module,
    sites: Sequence[LayerSite],
    rules: Mapping[int, RuleHandler],
    convs: Mapping[int, ConvHandler],
) -> None:
    """Puts everything in place that `intercept` needs, for `owner.close()` to take away; `sites`: `layers(model)`."""
    by_index = {site.layer_index: site for site in sites}
    for index in (*rules, *convs):
        require_layer(model, by_index, index)
    with patch.lock:
        owner.mark(site.module for site in sites)
        for index in sorted({*rules, *convs}):
            _install_layer(owner, model, by_index[index], rules.get(index), convs.get(index))


def _install_layer(owner: Owner, model, site: LayerSite, rule, conv) -> None:
    around = enclosing(model, site.path)
    for i, module in enumerate(around):
        owner.join(module, "forward", model_body, tuple(around[:i]))
        if callable(getattr(type(module), "generate", None)):
            owner.join(module, "generate", generation.generate_body, tuple(around[:i]))
            owner.patch(StoppingCriteriaList, "__call__", generation.listen_to_criteria)
            owner.patch(LogitsProcessorList, "__call__", generation.listen_to_processors)
    _stand_in_for_functions(owner, site.module)
    start = 0
    for child in _short_convs(site.module):
        channels = slice(start, start := start + child.in_channels)
        owner.join(child, "forward", _short_conv_body, channels)
    owner.join(site.module, "forward", _layer_body, _Handlers(site, rule, conv))
    patch.entries[id(site.module)].reader.require("hidden_states", "cache", "attention_mask")


@contextlib.contextmanager
def intercept(
    model: nn.Module,
    rules: Mapping[int, RuleHandler] | None = None,
    convs: Mapping[int, ConvHandler] | None = None,
    private: bool = False,
) -> Iterator[list[LayerSite]]:
    """Within the context, layer l's recurrence calls `rules[l]` and its convolution `convs[l]` in the original's place.

    Args:
        model: any model with gated-delta layers (`layers(model)`), or a sub-model of it.
        rules: `{layer_index: fn}` with `fn(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm,
            cu_seqlens) -> (o, final_state)`. q, k `[B, T, Hk, K]` (true key heads, before normalisation and scaling),
            v `[B, T, H, V]`, g (log-decay) and beta `[B, T, H]`, initial_state `[N, H, K, V]` or None, cu_seqlens
            `[N + 1]` int64 or None; o `[B, T, H, V]` in v's dtype, final_state `[N, H, K, V]` or None.
        convs: `{layer_index: fn}` with `fn(x, weight, bias, activation, *, cu_seqlens, channels) -> y`: x `[B, D, T']`
            before the convolution, weight `[D, W]`; y `[B, D, T']` after convolution and activation (`causal_conv`
            makes it, with a left context of your own). With a filled cache x carries the cached columns on its left.
            Called once a layer and forward, except for OLMo-Hybrid before transformers 5.15, where q, k and v are
            convolved apart: three calls, `channels` the slice each is of [q, k, v] (otherwise `slice(None)`). Not
            called in the one-token decode step with a cache.
        private: serve calls of this thread only.

    A function may return NotImplemented to leave the call to the one installed before it, and in the end to the model.
    The latest installed goes first. `running()` tells a function which layer and call it serves. Handlers see the calls
    of this thread, and those of threads that have never intercepted this model themselves; nothing is stored on the
    model, whose copies are free of all this. Everything is put back on exit, whatever the exit.

    Yields:
        `layers(model)`.

    Raises:
        ValueError: a layer that is not a gated-delta layer of the model, or whose forward cannot be read.
    """
    owner, sites = Owner(private=private), layers(model)
    try:
        try:
            install(owner, model, sites, rules or {}, convs or {})
            yield sites
        finally:
            owner.close()
    finally:  # again, should an interrupt have hit the first
        owner.close()


def intercept_conv(model: nn.Module, convs: Mapping[int, ConvHandler]):
    """`intercept` for convolutions alone: see there."""
    return intercept(model, convs=convs)


def require_layer(model: nn.Module, by_index: Mapping[int, LayerSite], index: int) -> LayerSite:
    """The site of a layer number, or a ValueError that says what that layer is instead."""
    if index in by_index:
        return by_index[index]
    name = type(model).__name__
    if not by_index:
        raise ValueError(
            f"model: expected a model with gated-delta layers (Qwen3-Next, Qwen3.5, OLMo-Hybrid, ...), got {name}, "
            "which calls the gated delta rule nowhere"
        )
    some = next(iter(by_index.values()))
    stack = functools.reduce(getattr, [p for p in some.path.split(".")[:-2] if p], model)
    if isinstance(index, int) and isinstance(stack, nn.ModuleList) and 0 <= index < len(stack):
        what = f"layer {index}, which is a full-attention layer without a recurrent state"
    else:
        what = f"layer {index!r}, which {name} does not have"
    raise ValueError(f"layer: expected one of the gated-delta layers {sorted(by_index)}, got {what}")
