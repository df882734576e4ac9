"""flash-linear-attention's Triton helpers in plain torch, for a machine without a GPU, where its own cannot run.

Its layers need more than their recurrence: norms, the short convolution, token shift, and so on, all Triton kernels,
which end in "0 active drivers" on such a machine. While something is attached to one of its models there, these stand
where fla's modules look the helpers up, by their names and with their arguments, differentiable by torch. It is said
once, and undone with the last attach. Where there is a driver nothing of this happens.

transformers, too, binds its own models' functions to fla's wherever fla can be imported: see `runnable`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._dispatch import say_once
from . import looking_back, patch

_FUSED = "_use_fused_qkv_conv"  # of GatedDeltaNet


def missing_driver() -> str | None:
    """Why Triton's kernels cannot run on this machine, or None: they can."""
    from triton.runtime import driver  # fla needs it, so it is there

    try:
        driver.active.get_current_target()
    except RuntimeError as error:
        return str(error)
    return None


def install(owner: patch.Owner, layers: list[nn.Module]) -> bool:
    """Puts the stand-ins in place until `owner` closes, and says so once, if no kernel of fla can run here; else does
    nothing. Answers whether it did. Under `patch.lock`.

    Raises:
        ValueError: a release of fla without one of the helpers.
    """
    why = missing_driver()
    if why is None:
        return False
    say_once(
        f"attach: flash-linear-attention cannot run here ({why.rstrip('.')}): all recurrences of the model run on this "
        f"package's ops, and in torch, slower than on a GPU, its {', '.join(name for _, name in _STAND_INS)}"
    )
    found: dict[int, Callable] = {}
    for (module, name), instead in _STAND_INS.items():
        original = _original(module, name)
        found[id(original)] = found[id(instead)] = instead  # where it stands already, it has one owner more
    for path, space in [(path, vars(module)) for path, module in tuple(sys.modules.items()) if module is not None]:
        if path.startswith("fla."):
            for key, value in tuple(space.items()):
                if id(value) in found:
                    owner.patch(space, key, functools.partial(_instead, found[id(value)]))
    return True


def _instead(stand_in: Callable, original: Callable) -> Callable:
    return stand_in


def look_back(owner: patch.Owner, blocks: nn.ModuleList) -> None:
    """Has owner put shims in the place of token shifts and short convolutions of fla's blocks. Under `patch.lock`."""
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Conv1d):  # ShortConvolution
                owner.join(module, "forward", looking_back.module_body, module.kernel_size[0] - 1)
            space = getattr(patch.forward_of(module), "__globals__", {})
            if "token_shift" in space:  # where a stand-in stands, that is such a shim
                owner.patch(space, "token_shift", functools.partial(looking_back.shim, width=1))
            if hasattr(type(module), _FUSED):
                owner.patch(type(module), _FUSED, _apart)


def _apart(original: Callable) -> Callable:
    """Stands in for the method by which a layer chooses to convolve q, k and v at once, past its modules for it."""

    @functools.wraps(original)
    def fused(self, *args, **kwargs):
        return looking_back.running() is None and original(self, *args, **kwargs)

    return fused


def runnable(function: Callable) -> Callable:
    """A function that transformers has bound to one of fla's, or any other. Where fla's cannot run: the torch function
    it would be without fla, called as then."""
    plain = inspect.unwrap(function)
    if plain is function or _is_flas(plain) or not _calls_fla(function) or missing_driver() is None:
        return function
    names = inspect.signature(plain).parameters

    @functools.wraps(plain)
    def without_fla(*args, **kwargs):
        if kwargs.get("cu_seqlens") is not None:  # which it would leave out
            return function(*args, **kwargs)
        return plain(*args, **{name: value for name, value in kwargs.items() if name in names})

    return without_fla


def _calls_fla(function) -> bool:
    """Whether a wrapper, or one inside it, keeps a function of fla's."""
    while function is not None:
        for cell in getattr(function, "__closure__", None) or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if callable(held) and _is_flas(held):
                return True
        function = getattr(function, "__wrapped__", None)
    return False


def _is_flas(function) -> bool:
    return str(getattr(function, "__module__", "")).startswith("fla.")


def _original(module: str, name: str) -> Callable:
    space = vars(importlib.import_module(module))
    if not callable(space.get(name)):
        raise ValueError(f"model: expected {module}.{name} in flash-linear-attention (tested: 0.6.0), which has none")
    standing = patch.patches.get((id(space), name))
    return space[name] if standing is None or standing.original is None else standing.original


# ---- norms ----------------------------------------------------------------------------------------------------


def _normed(x: Tensor, weight, bias, residual, eps: float, in_fp32: bool, rms: bool, groups: int = 1):
    """x, plus the residual, divided by its root mean square (of each group), `[..., D]`; float32. And that sum, in the
    dtype in which it goes on."""
    wide = x.float() if residual is None else x.float() + residual.float()
    goes_on = x.dtype if residual is None else residual.dtype
    kept = wide if in_fp32 and residual is None else wide.to(goes_on)
    parts = wide.unflatten(-1, (groups, -1))
    if not rms:
        parts = parts - parts.mean(-1, keepdim=True)
    y = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    y = y if weight is None else y * weight.float()
    return (y if bias is None else y + bias.float()), kept


def layer_norm(
    x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False, is_rms_norm=False, num_groups=1
):
    y, kept = _normed(x, weight, bias, residual, eps, residual_in_fp32, is_rms_norm, num_groups)
    return (y.to(x.dtype), kept) if prenorm else y.to(x.dtype)


def rms_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
    return layer_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm=True)


def layer_norm_linear(
    x, norm_weight, norm_bias, linear_weight, linear_bias, residual=None, eps=1e-5, prenorm=False,
    residual_in_fp32=False, is_rms_norm=False, num_groups=1,
):  # fmt: skip
    y, kept = _normed(x, norm_weight, norm_bias, residual, eps, residual_in_fp32, is_rms_norm, num_groups)
    y = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (y, kept) if prenorm else y


def _gated(rms: bool):
    def norm_gated(
        x, g, weight, bias, activation="swish", residual=None, prenorm=False, residual_in_fp32=False, eps=1e-6
    ):
        y, kept = _normed(x, weight, bias, residual, eps, residual_in_fp32, rms)
        gate = torch.sigmoid(g.float()) if activation == "sigmoid" else F.silu(g.float())
        return ((y * gate).to(x.dtype), kept) if prenorm else (y * gate).to(x.dtype)

    return norm_gated


def l2norm(x, eps=1e-6, output_dtype=None):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(output_dtype or x.dtype)


# ---- along the sequence ---------------------------------------------------------------------------------------


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Rows `[B, T, D]`, or the packed sequences of one row, each `[1, t, D]`."""
    return [x] if cu_seqlens is None else list(x.split(cu_seqlens.diff().tolist(), 1))


def _convolved(x: Tensor, weight: Tensor, bias, left: Tensor, activation) -> tuple[Tensor, Tensor]:
    """`[N, T, D]`, and the last W inputs `[N, D, W]`; left: those before."""
    wide = torch.cat([left.to(x.dtype), x.transpose(1, 2)], -1)
    y = F.conv1d(
        wide[..., 1:].float(), weight.float()[:, None], None if bias is None else bias.float(), groups=len(weight)
    )
    y = y if activation is None else F.silu(y)
    return y.transpose(1, 2), wide[..., -left.shape[-1] :].contiguous()


def causal_conv1d(
    x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, activation=None,
    backend="triton", cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, **kwargs,
):  # fmt: skip
    """x `[B, T, D]`, weight `[D, W]`, states `[N, D, W]`."""
    if cp_context is not None:
        raise ValueError("causal_conv1d: expected cp_context=None on a machine without a GPU, got a parallel context")
    rows = _sequences(x, cu_seqlens)
    N = len(x) if cu_seqlens is None else len(rows)
    left = x.new_zeros(N, *weight.shape) if initial_state is None else initial_state
    lefts = [left] if cu_seqlens is None else left.split(1)
    found = [_convolved(row, weight, bias, state, activation) for row, state in zip(rows, lefts, strict=True)]
    y = torch.cat([y for y, _ in found], 1)
    y = (y if residual is None else y + residual.float()).to(x.dtype)
    return y, torch.cat([kept for _, kept in found]) if output_final_state else None


def causal_conv1d_update(x, cache, residual=None, weight=None, bias=None, activation=None):
    """One token a row, `[N, 1, D]`, `[1, N, D]` or `[N, D]`; the cache `[N, D, W]` is changed in place."""
    D = len(weight)
    cache.copy_(torch.cat([cache[..., 1:], x.reshape(-1, D, 1)], -1))
    y = (cache.float() * weight.float()).sum(-1)
    y = y if bias is None else y + bias.float()
    y = (y if activation is None else F.silu(y)).view(x.shape)
    return (y if residual is None else y + residual.float()).to(x.dtype), cache


def token_shift(x, cu_seqlens=None, cache=None, output_cache=False, chunk_indices=None):
    """What came before less what comes, `[B, T, D]`; the cache `[N, D]` (or `[N, 1, D]`) is what came last."""
    rows = _sequences(x, cu_seqlens)
    N = len(x) if cu_seqlens is None else len(rows)
    before = x.new_zeros(N, 1, x.shape[-1]) if cache is None else cache.reshape(N, 1, -1).to(x.dtype)
    befores = [before] if cu_seqlens is None else before.split(1)
    wide = [torch.cat([first, row], 1) for first, row in zip(befores, rows, strict=True)]
    shift = torch.cat([row[:, :-1] - row[:, 1:] for row in wide], 1)
    return (shift, torch.cat([row[:, -1] for row in wide])) if output_cache else shift


def rotary_embedding(
    x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, chunk_indices=None
):
    """x `[B, T, H, D]`, cos and sin `[positions, R / 2]`; what is above R stays."""
    T, half = x.shape[1], cos.shape[-1]
    offsets = torch.as_tensor(seqlen_offsets, device=x.device)
    if cu_seqlens is None:
        at = torch.arange(T, device=x.device) + offsets.reshape(-1, 1)  # [B or 1, T]
    else:
        lengths = cu_seqlens.diff()
        at = torch.arange(T, device=x.device) - cu_seqlens[:-1].repeat_interleave(lengths)
        at = (at + (offsets if offsets.ndim == 0 else offsets.repeat_interleave(lengths)))[None]
    cos, sin = cos[at][:, :, None].float(), sin[at][:, :, None].float()
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    parts = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


# ---- between the tokens' numbers ------------------------------------------------------------------------------


def swish_fwd(x, output_contiguous=False):
    return F.silu(x)


def swish_bwd(x, dy, output_contiguous=False):
    s = torch.sigmoid(x.float())
    return (dy.float() * s * (1 + x.float() * (1 - s))).to(x.dtype)


def swiglu(x, y):
    return (F.silu(x.float()) * y.float()).to(x.dtype)


def swiglu_linear(x, y, weight, bias):
    return F.linear(swiglu(x, y), weight, bias)


def fused_addcmul_rwkv7(hidden_states, delta, *mixes):
    return tuple(None if x is None else torch.addcmul(hidden_states, delta, x) for x in (*mixes, None)[:6])


def fused_k_rwkv7(k, a, ka, cu_seqlens=None, cu_seqlens_cpu=None):
    return k.addcmul(k * (a - 1), ka)


def gate_output_correction(o, r, k, r_k, v, g):
    return (o + ((r * k * r_k).sum(-1, keepdim=True) * v).flatten(-2)) * g


# (module, name) -> what stands wherever fla's modules hold that function, under whatever name
_STAND_INS: dict[tuple[str, str], Callable] = {
    ("fla.modules.norm.layernorm", "layer_norm"): layer_norm,
    ("fla.modules.norm.layernorm", "group_norm"): layer_norm,
    ("fla.modules.norm.layernorm", "rms_norm"): rms_norm,
    ("fla.modules.norm.layernorm", "layer_norm_linear"): layer_norm_linear,
    ("fla.modules.norm.fused_norm_gate", "layer_norm_gated"): _gated(rms=False),
    ("fla.modules.norm.fused_norm_gate", "rms_norm_gated"): _gated(rms=True),
    ("fla.modules.norm.l2norm", "l2norm"): l2norm,
    ("fla.modules.causal_conv1d.ops", "causal_conv1d"): causal_conv1d,
    ("fla.modules.causal_conv1d.ops", "causal_conv1d_update"): causal_conv1d_update,
    ("fla.modules.token_shift", "token_shift"): looking_back.shim(token_shift, 1),
    ("fla.modules.rotary.ops", "rotary_embedding"): rotary_embedding,
    ("fla.modules.activations.ops", "swish_fwd"): swish_fwd,
    ("fla.modules.activations.ops", "swish_bwd"): swish_bwd,
    ("fla.modules.activations.ops", "swiglu"): swiglu,
    ("fla.modules.activations.ops", "swiglu_linear"): swiglu_linear,
    ("fla.ops.rwkv7.fused_addcmul", "fused_addcmul_rwkv7"): fused_addcmul_rwkv7,
    ("fla.ops.rwkv7.fused_k_update", "fused_k_rwkv7"): fused_k_rwkv7,
    ("fla.ops.rwkv7.gate_output_correction", "gate_output_correction"): gate_output_correction,
}
