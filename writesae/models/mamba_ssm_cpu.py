"""mamba-ssm where its kernels cannot run: on a CPU, by torch functions in their places.

`import_library` imports the package though its CUDA extension was not built. `on_cpu` is a context in which its models
run on a CPU, attached or not; `attach` does the same for a model that lies on one. What stands in are the package's own
definitions in torch, which its tests hold its kernels against, called where tensors are on a CPU and only there: what
lies on a GPU runs as ever.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._dispatch import say_once
from . import patch, seam
from .binding import bindings
from .patch import Owner

EXTENSION = "selective_scan_cuda"
_MODULES = (
    "mamba_ssm.modules.mamba2", "mamba_ssm.modules.mamba_simple", "mamba_ssm.models.mixer_seq_simple",
    "mamba_ssm.utils.generation",
)  # fmt: skip


def import_library() -> ModuleType:
    """The package `mamba_ssm` with all that its language models need, imported with or without its CUDA extension.

    Call it before anything else imports `mamba_ssm` on a machine where that was not built, and where `import mamba_ssm`
    alone fails: for the time of the import, an empty module stands in its place. A `causal_conv1d` without its own
    extension the package does without by itself.

    Raises:
        ImportError: the package is not installed, or cannot be imported for another reason.
    """
    if "mamba_ssm" not in sys.modules and importlib.util.find_spec("mamba_ssm") is None:
        raise ImportError("mamba_ssm: expected the package to be installed; see docs/models-mamba-ssm.md for how")
    missing = EXTENSION not in sys.modules and importlib.util.find_spec(EXTENSION) is None
    if "mamba_ssm" not in sys.modules and not torch.cuda.is_available():
        _bind_transformers()
    if missing:
        sys.modules[EXTENSION] = ModuleType(EXTENSION)
    try:
        for name in _MODULES:
            importlib.import_module(name)
    finally:
        if missing:
            del sys.modules[EXTENSION]
    if missing:
        say_once(f"mamba_ssm: imported without its CUDA extension {EXTENSION}: its kernels for Mamba-1 cannot run")
    return sys.modules["mamba_ssm"]


def _bind_transformers() -> None:
    """Imports the modelling files of transformers that take this package's kernels wherever it can be imported: before
    it can, so that they take torch's, which run here."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    for file in sorted(models.glob("*/modeling_*.py")):
        if '"mamba_ssm"' in file.read_text(encoding="utf-8"):
            importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Within the context, models of mamba-ssm that lie on a CPU run, by torch functions in its kernels' places; says so
    once. Not needed around `attach`, which does it itself. Everything is put back at the end.

    Raises:
        ImportError: as `import_library`.
    """
    import_library()
    with Owner() as owner, owner:
        with patch.lock:
            _stand_in(owner)
        yield


def install(owner: Owner, layers: list[nn.Module]) -> bool:
    """Puts in place what has to stand in while a model is intercepted: for one on a CPU all of it, and then answers
    True. Under `patch.lock`."""
    generation = sys.modules.get("mamba_ssm.utils.generation")
    if generation is not None:
        owner.patch(vars(generation), "update_graph_cache", _refuse_graphs)
    ours = [layer for layer in layers if type(layer).__module__.startswith("mamba_ssm.")]
    if not any(_lies_on_cpu(layer) for layer in ours):
        return False
    import_library()
    _stand_in(owner)
    return True


def _refuse_graphs(original: Any) -> Any:
    def update_graph_cache(model, *args, **kwargs):
        for module in model.modules():
            entry = patch.entry_of(module)
            if entry is not None and entry.serving():
                raise ValueError(
                    "cg: expected False while attached, got True: a CUDA graph replays kernels, and nothing of it "
                    "could be recorded or edited"
                )
        return original(model, *args, **kwargs)

    return update_graph_cache


# ---- what is put in place --------------------------------------------------------------------------------------------


def _stand_in(owner: Owner) -> None:
    say_once(
        "mamba_ssm: its kernels run on GPUs alone; on this CPU the recurrences of layers that nobody is attached to, "
        "the short convolutions and the norms are those of its own definitions in torch, which are slow"
    )
    for name, layer in (("mamba_ssm.modules.mamba2", "Mamba2"), ("mamba_ssm.modules.mamba_simple", "Mamba")):
        space = vars(sys.modules[name])
        binding = next(b for b in bindings if name in b.home)
        for recurrence in binding.recurrences:
            owner.patch(space, recurrence.name, seam.shim(binding, recurrence.name))
        # Mamba-1 takes a missing convolution for a sign of what else is missing, and needs none.
        if layer == "Mamba2" or space["causal_conv1d_fn"] is not None:
            owner.patch(space, "causal_conv1d_fn", seam.shim(binding, "causal_conv1d_fn"))
        if space["causal_conv1d_update"] is not None:
            owner.patch(space, "causal_conv1d_update", functools.partial(binding.usable, "causal_conv1d_update"))
        flag = next(name for name, value in binding.bypasses.items() if value is False)
        owner.patch(space[layer], flag, seam.attribute(flag, lambda own: False, also=_lies_on_cpu))
    if not torch.cuda.is_available():
        owner.patch(vars(sys.modules["mamba_ssm.utils.generation"]), "torch", _WithoutEvents)
    norms = sys.modules["mamba_ssm.ops.triton.layer_norm"], sys.modules["mamba_ssm.ops.triton.layernorm_gated"]
    for module, apply in zip(norms, (_norm, _gated_norm), strict=True):
        owner.patch(vars(module), "LayerNormFn", _Applied.of(module, apply))


def _lies_on_cpu(module: nn.Module) -> bool:
    return next(module.parameters()).device.type == "cpu"


class _Applied:
    """Stands in for a `torch.autograd.Function` of which `apply` alone is used."""

    def __init__(self, original: Any, module: ModuleType, instead):
        self.original, self.module, self.instead = original, module, instead

    @classmethod
    def of(cls, module: ModuleType, instead):
        return lambda original: cls(original, module, instead)

    def __getattr__(self, name: str):
        return getattr(self.original, name)

    def apply(self, x: Tensor, *args):
        return self.instead(self.module, x, *args) if x.device.type == "cpu" else self.original.apply(x, *args)


class _WithoutEvents:
    """Stands in for `torch` where a `generate` makes CUDA events, also when it does not time itself."""

    def __init__(self, original: Any):
        self._torch, self.cuda = original, self

    def __getattr__(self, name: str):
        return getattr(self._torch, name)

    def Event(self, enable_timing: bool = False) -> None:
        if enable_timing:
            raise ValueError("enable_timing: expected False on a CPU, got True, which times by CUDA events")


def _norm(
    module, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, is_rms,
    return_dropout_mask,
):  # fmt: skip
    """The norm before a layer, with the sum of the residual stream."""
    if x1 is not None or weight1 is not None or rowscale is not None or return_dropout_mask:
        raise ValueError(
            "mamba_ssm: expected a norm of one input on a CPU, got x1, weight1, rowscale or a dropout mask"
        )
    reference = module.rms_norm_ref if is_rms else module.layer_norm_ref
    y, total = reference(
        x, weight, bias, residual=residual, eps=eps, dropout_p=dropout_p, prenorm=True, upcast=True
    )  # fmt: skip
    kept = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    return (y, total.to(kept)) if prenorm else y


def _gated_norm(module, x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True, is_rms_norm=False):
    if not is_rms_norm:
        raise ValueError("mamba_ssm: expected a gated RMS norm on a CPU, got a layer norm")
    return module.rms_norm_ref(x, weight, bias, z, eps, group_size, norm_before_gate)


# ---- the functions, by the names under which layers look them up -----------------------------------------------------


def _chunk_scan(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """`mamba_chunk_scan_combined` by `ssd_minimal_discrete`, with what the kernels do around it."""
    from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete

    if return_varlen_states:
        raise ValueError("mamba_ssm: return_varlen_states: expected False on a CPU, got True")
    if seq_idx is not None:
        if len(seq_idx) != 1 or initial_states is not None or return_final_states:
            raise ValueError("mamba_ssm: expected packed sequences in one row and without states on a CPU")
        cuts = [0, *((seq_idx[0, 1:] != seq_idx[0, :-1]).nonzero().flatten() + 1).tolist(), x.shape[1]]
        parts = [
            _chunk_scan(
                *(y[:, a:b] for y in (x, dt)), A, *(y[:, a:b] for y in (B, C)), chunk_size, D,
                None if z is None else z[:, a:b], dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
            )
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]  # fmt: skip
        return torch.cat(parts, 1)
    (T, H), G = x.shape[1:3], B.shape[2]
    steps = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    steps = (F.softplus(steps) if dt_softplus else steps).clamp(*dt_limit)
    B, C = (y.float().repeat_interleave(H // G, 2) for y in (B, C))
    given = (x.float() * steps[..., None], A.float() * steps, B, C)
    chunk = min(chunk_size, T)
    given = (F.pad(y, (*(0, 0) * (y.ndim - 2), 0, -T % chunk)) for y in given)  # tokens that decay and write nothing
    before = None if initial_states is None else initial_states.float()[:, None]
    y, final = ssd_minimal_discrete(*given, chunk, before)
    y = y[:, :T]
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]).float() * x.float()
    if z is not None:
        y = y * F.silu(z.float())
    y = y.to(x.dtype)
    return (y, final) if return_final_states else y


def _selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def _state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update_ref

    if state_batch_indices is not None:
        raise ValueError("mamba_ssm: state_batch_indices: expected None on a CPU, got a tensor")
    half = x.dtype
    x, dt, B, C = (y.float() for y in (x, dt, B, C))
    now = state.float()
    y = selective_state_update_ref(
        now, x, dt, A, B, C, *(None if v is None else v.float() for v in (D, z, dt_bias)), dt_softplus
    )
    state.copy_(now)
    return y.to(half)


def _conv(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # fmt: skip
    """`causal_conv1d_fn`. Its package may not be installed."""
    if initial_states is not None or return_final_states:
        raise ValueError("causal_conv1d_fn: expected no initial or final states on a CPU, got some")
    D, W = weight.shape
    x_, w = x.to(weight.dtype), weight[:, None]
    if seq_idx is None:
        y = F.conv1d(x_, w, bias, padding=W - 1, groups=D)[..., : x.shape[-1]]
    else:
        wide, index = F.pad(x_, (W - 1, 0)), F.pad(seq_idx, (W - 1, 0), value=-1)
        same = index.unfold(1, W, 1) == seq_idx[..., None]
        y = ((wide.unfold(2, W, 1) * same[:, None]) * w).sum(-1)
        y = y if bias is None else y + bias[:, None]
    return (y if activation is None else F.silu(y)).to(x.dtype)


def _conv_step(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None):
    """`causal_conv1d_update` for one token."""
    if x.ndim != 2 or cache_seqlens is not None or conv_state_indices is not None:
        raise ValueError(
            "causal_conv1d_update: expected one token a row and its own states on a CPU, got something else"
        )
    conv_state.copy_(torch.cat([conv_state[..., 1:], x[..., None].to(conv_state.dtype)], -1))
    y = (conv_state * weight).sum(-1)
    y = y if bias is None else y + bias
    return (y if activation is None else F.silu(y)).to(x.dtype)


FUNCTIONS: dict[str, Callable] = {
    "mamba_chunk_scan_combined": _chunk_scan,
    "selective_scan_fn": _selective_scan,
    "selective_state_update": _state_update,
    "causal_conv1d_fn": _conv,
    "causal_conv1d_update": _conv_step,
}
