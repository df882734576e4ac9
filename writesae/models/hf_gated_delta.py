"""Where transformers models run the gated delta rule, and how to stand in for it: `layers`, `intercept`, `running`.

Layers are found by the function they call, not by class name. Since transformers 5.15 a layer's forward calls functions
of its own modelling file (`torch_chunk_gated_delta_rule`, ...), shared by every model of that file; before, it calls
attributes of the layer. Either way one dispatching shim is installed per function, on the first `intercept`, and taken
away with the last: it asks which layer is running on this thread, and calls the original for a layer nobody intercepts.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame

from .model_call import ModelCall, enter_call, enter_generate

RULES = ("chunk_gated_delta_rule", "recurrent_gated_delta_rule")
_CONV = "causal_conv1d_fn"
_ARGUMENTS = ("query", "key", "value", "g", "beta")

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


def _forward_of(module: nn.Module):
    return inspect.unwrap(type(module).forward)


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
    function = _forward_of(module)
    space = getattr(function, "__globals__", {})
    names = sorted(n for n in _global_names(function) if callable(space.get(n)) and (_is_rule(n) or n == _CONV))
    return (space, names) if any(_is_rule(n) for n in names) else (space, [])


def _attribute_targets(module: nn.Module) -> list[str]:
    """Names of the module's own attributes that hold the rule and the convolution (transformers before 5.15)."""
    own = module.__dict__
    if not all(callable(own.get(name)) for name in RULES):
        return []
    return [*RULES, *([_CONV] if _CONV in own else [])]


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
        if not _attribute_targets(module) and not _global_targets(module)[1]:
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


def _enclosing(model: nn.Module, path: str) -> list[nn.Module]:
    """The models around a layer, outermost first: everything above the list that holds its block."""
    chain, at = [model], model
    parts = path.split(".")
    for part in parts:
        at = getattr(at, part)
        chain.append(at)
    last = max((i for i, m in enumerate(chain) if isinstance(m, nn.ModuleList)), default=len(chain) - 1)
    return [m for m in chain[:last] if not isinstance(m, (nn.ModuleList, nn.ModuleDict))]


# ---- what is running on this thread ---------------------------------------------------------------------------


class _Local(threading.local):
    def __init__(self):
        self.frames: list[Frame] = []
        self.override: tuple[Mapping[nn.Module, RuleHandler], Mapping[nn.Module, ConvHandler], bool] | None = None


_local = _Local()


@dataclass(eq=False)
class Frame:
    """One forward call of an intercepted layer, on this thread.

    Attributes:
        site: the layer.
        call: the model's forward call around it, None when the layer was called on its own.
        cache: the cache handed to the layer, or None.
        layer_mask: `[B, T]` mask handed to the layer, or None.
    """

    site: LayerSite
    call: ModelCall | None
    cache: object
    layer_mask: Tensor | None
    hidden: Tensor
    kwargs: dict
    rules: tuple[RuleHandler, ...]
    convs: tuple[ConvHandler, ...]

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
    def mask(self) -> Tensor | None:
        """`[B, T]` bool, False at pads and at rows that `generate` has finished; None when all are real tokens."""
        real = None if self.layer_mask is None or self.layer_mask.ndim != 2 else self.layer_mask.bool()
        if self.call is None:
            return real
        known = self.call.real_tokens(self.hidden.shape[:2], self.start)
        return known if real is None else real if known is None else real & known


def running() -> Frame | None:
    """The intercepted layer that is running on this thread; for handlers."""
    return _local.frames[-1] if _local.frames else None


@contextlib.contextmanager
def alone(
    rules: Mapping[nn.Module, RuleHandler],
    convs: Mapping[nn.Module, ConvHandler] | None = None,
    norms: bool = False,
) -> Iterator[None]:
    """On this thread, only these handlers (by layer module) run, and what stands in for norms only if `norms` says so,
    whatever else is installed. For self-tests."""
    before, _local.override = _local.override, (rules, convs or {}, norms)
    try:
        yield
    finally:
        _local.override = before


def norms_stand_in() -> bool:
    """Whether what stands in for norms may run on this thread now; see `alone`."""
    return _local.override is None or _local.override[2]


# ---- shims ----------------------------------------------------------------------------------------------------


def _rule_shim(original):
    @functools.wraps(original)
    def gated_delta_rule(*args, **kwargs):
        frame = running()
        if frame is None or not frame.rules:
            return original(*args, **kwargs)
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        q, k, v, g, beta = (given[name] for name in _ARGUMENTS)
        heads, keys = frame.site.num_v_heads, frame.site.num_k_heads
        if keys != heads and k.shape[2] == heads:  # already repeated to value heads: undo, as views
            q, k = q[:, :, :: heads // keys], k[:, :, :: heads // keys]
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
            y = _conv(frame, x, given["weight"], given.get("bias"), given.get("activation"), slice(None))
            if y is not None:
                return y
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

lock = threading.RLock()
_shims: dict[tuple[int, str], list] = {}  # (id of the namespace, name) -> [namespace, original, shim, uses]
_wrapped: dict[tuple[int, str], _Wrapped] = {}  # (id(module), method) -> its replacement


class _Wrapped:
    """A method of one module (`forward`, `generate`), replaced on the instance, put back after the last use."""

    def __init__(self, module: nn.Module, make: Callable, name: str):
        self.module, self.name, self.uses = module, name, 0
        self.rules: tuple[RuleHandler, ...] = ()
        self.convs: tuple[ConvHandler, ...] = ()
        self.outer: tuple[nn.Module, ...] = ()
        self.norm = None  # hf_norms.Norm
        self.own = module.__dict__.get(name)
        self.original = getattr(module, name)
        self.parameters = tuple(inspect.signature(self.original).parameters)
        body = make(self)

        @functools.wraps(self.original)
        def replacement(*args, **kwargs):
            if not self.uses:  # taken away while somebody else's wrapper still holds on to this one
                return self.original(*args, **kwargs)
            if torch.compiler.is_compiling() or _inside_compiled_region():
                raise RuntimeError(
                    "writesae: an attached model cannot be traced by torch.compile or torch.export; run it eagerly"
                )
            return body(args, kwargs)

        self.replacement = replacement
        module.__dict__[name] = replacement

    def given(self, args, kwargs) -> dict:
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def remove(self):
        if self.module.__dict__.get(self.name) is self.replacement:
            if self.own is None:
                del self.module.__dict__[self.name]
            else:
                self.module.__dict__[self.name] = self.own


def _inside_compiled_region() -> bool:
    """Whether torch.compile gave up on a frame around this and would go on with the pieces inside."""
    return callable(eval_frame.get_eval_frame_callback())


def wrapped(module: nn.Module) -> _Wrapped | None:
    """What a module's forward has been replaced by, if anything."""
    return _wrapped.get((id(module), "forward"))


def acquire(stack: contextlib.ExitStack, module: nn.Module, make: Callable, name: str = "forward") -> _Wrapped:
    """Replaces a method by `make(entry)(args, kwargs)` until the stack closes, unless it is replaced already. Under
    `lock`."""
    key = (id(module), name)
    entry = _wrapped.get(key)
    if entry is None:
        entry = _wrapped[key] = _Wrapped(module, make, name)
    entry.uses += 1
    stack.callback(_locked, _release, key)
    return entry


def _release(key: tuple[int, str]) -> None:
    entry = _wrapped[key]
    entry.uses -= 1
    if not entry.uses:
        entry.remove()
        del _wrapped[key]


def _layer_body(site: LayerSite):
    def make(entry: _Wrapped):
        def body(args, kwargs):
            given = entry.given(args, kwargs)
            override = _local.override
            rules, convs = entry.rules, entry.convs
            if override is not None:
                rules, convs = ((by[site.module],) if site.module in by else () for by in override[:2])
            call = ModelCall.current()
            frame = Frame(
                site, call, given.get("cache_params"), given.get("attention_mask"), given["hidden_states"], kwargs,
                rules, convs,
            )  # fmt: skip
            _local.frames.append(frame)
            try:
                return entry.original(*args, **kwargs)
            finally:
                _local.frames.pop()

        return body

    return make


def _model_body(entry: _Wrapped):
    def body(args, kwargs):
        with enter_call(entry.module, entry.outer, entry.given(args, kwargs)):
            return entry.original(*args, **kwargs)

    return body


def _generate_body(entry: _Wrapped):
    def body(args, kwargs):
        with enter_generate(entry.module, entry.given(args, kwargs)):
            return entry.original(*args, **kwargs)

    return body


def _short_conv_body(site: LayerSite, channels: slice):
    def make(entry: _Wrapped):
        def body(args, kwargs):
            frame = running()
            given = entry.given(args, kwargs)
            x, cache, cached = given["hidden_states"], given.get("cache"), bool(given.get("use_precomputed"))
            if frame is None or (cached and x.shape[1] == 1):
                return entry.original(*args, **kwargs)
            columns, conv = x.transpose(1, 2), entry.module
            wide = torch.cat([cache, columns], -1) if cached else columns
            y = _conv(frame, wide, conv.weight[:, 0], conv.bias, "silu", channels)
            if y is None:
                return entry.original(*args, **kwargs)
            kept = nn.functional.pad(wide, (conv.weight.shape[-1] - 1 - wide.shape[-1], 0))
            return y[:, :, -x.shape[1] :].transpose(1, 2), kept

        return body

    return make


def _install_shims(module: nn.Module, step: int) -> None:
    """Counts the shims of one layer up (+1) or down (-1), installing the first and removing the last."""
    names = _attribute_targets(module)
    space = module.__dict__
    if not names:
        space, names = _global_targets(module)
    for name in names:
        key = (id(space), name)
        entry = _shims.get(key)
        if entry is None:
            original = space[name]
            shim = (_rule_shim if _is_rule(name) else _conv_shim)(original)
            entry = _shims[key] = [space, original, shim, 0]
            space[name] = shim
        entry[3] += step
        if not entry[3]:
            if space.get(name) is entry[2]:
                space[name] = entry[1]
            del _shims[key]


@contextlib.contextmanager
def intercept(
    model: nn.Module,
    rules: Mapping[int, RuleHandler] | None = None,
    convs: Mapping[int, ConvHandler] | None = None,
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

    A function may return NotImplemented to leave the call to the one installed before it, and in the end to the model.
    The latest installed goes first. `running()` tells a function which layer and call it serves. Handlers see calls of
    every thread. Everything is put back on exit, whatever the exit.

    Yields:
        `layers(model)`.

    Raises:
        ValueError: a layer that is not a gated-delta layer of the model.
    """
    rules, convs = dict(rules or {}), dict(convs or {})
    sites = layers(model)
    by_index = {site.layer_index: site for site in sites}
    for index in (*rules, *convs):
        require_layer(model, by_index, index)
    with contextlib.ExitStack() as stack:
        with lock:
            for index in sorted({*rules, *convs}):
                _install_layer(stack, model, by_index[index], rules.get(index), convs.get(index))
        yield sites


def _install_layer(stack: contextlib.ExitStack, model, site: LayerSite, rule, conv) -> None:
    enclosing = _enclosing(model, site.path)
    for i, module in enumerate(enclosing):
        entry = acquire(stack, module, _model_body)
        entry.outer = tuple({*entry.outer, *enclosing[:i]})
        if callable(getattr(module, "generate", None)):
            acquire(stack, module, _generate_body, "generate")
    _install_shims(site.module, 1)
    stack.callback(_locked, _install_shims, site.module, -1)
    start = 0
    for child in _short_convs(site.module):
        channels = slice(start, start := start + child.in_channels)
        acquire(stack, child, _short_conv_body(site, channels))
    entry = acquire(stack, site.module, _layer_body(site))
    if rule is not None:
        entry.rules = (rule, *entry.rules)
        stack.callback(_locked, _drop, entry, "rules", rule)
    if conv is not None:
        entry.convs = (conv, *entry.convs)
        stack.callback(_locked, _drop, entry, "convs", conv)


def _drop(entry: _Wrapped, kind: str, handler) -> None:
    kept = list(getattr(entry, kind))
    kept.pop(next(i for i, h in enumerate(kept) if h is handler))
    setattr(entry, kind, tuple(kept))


def _locked(function, *args) -> None:
    with lock:
        function(*args)


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
