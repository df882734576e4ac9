"""mamba-ssm's own Triton code without a GPU, beside our tables and stand-ins: `python mamba_ssm_oracle.py`.

Triton interprets its kernels, as for flash-linear-attention (`fla_oracle.py`). A process of its own, because Triton
reads TRITON_INTERPRET when it is imported. Mamba-1's whole sequences are CUDA code, which nothing here can run.
"""

from __future__ import annotations

import contextlib
import os
import sys
from types import SimpleNamespace

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from fla_oracle import NoDriver  # noqa: E402
from triton.runtime import driver  # noqa: E402

from writesae.models import mamba_ssm, mamba_ssm_cpu  # noqa: E402
from writesae.testing import check_close  # noqa: E402

B, T, H, G, K, V = 1, 12, 4, 2, 16, 16


def normal(*size: int) -> torch.Tensor:
    return torch.randn(*size)


def by_table(binding, name: str, args: tuple, kwargs: dict):
    """A function's call, run by its family's rule."""
    recurrence = binding.recurrence(name)
    given = recurrence.read(args, kwargs)
    call = recurrence.bind(SimpleNamespace(binding=binding), given)
    return recurrence.answer(given, call.run(output_final_state=True))


def sequences() -> None:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    args = (normal(B, T, H, V), normal(B, T, H), -torch.rand(H) - 0.1, normal(B, T, G, K), normal(B, T, G, K))
    options = dict(
        D=normal(H, V), z=normal(B, T, H, V), dt_bias=normal(H), dt_softplus=True, dt_limit=(0.1, 0.8),
        return_final_states=True,
    )  # fmt: skip
    theirs = mamba_chunk_scan_combined(*args, chunk_size=16, **options)
    ours = by_table(mamba_ssm.MAMBA2, "mamba_chunk_scan_combined", args, options)
    instead = mamba_ssm_cpu.FUNCTIONS["mamba_chunk_scan_combined"](*args, chunk_size=5, **options)
    for part, a, b, c in zip(("output", "state"), theirs, ours, instead, strict=True):
        check_close(f"Mamba-2's {part}", b, a)
        check_close(f"Mamba-2's {part}, stood in for", c, a)


def steps() -> None:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    def a_head(x):
        return x[..., None].expand(*x.shape, V)

    of_heads = (
        normal(B, H, V, K), normal(B, H, V), a_head(normal(B, H)),
        (-torch.rand(H) - 0.1)[:, None, None].expand(H, V, K), normal(B, G, K), normal(B, G, K), a_head(normal(H)),
    )  # fmt: skip
    of_channels = (
        normal(2, V, K), normal(2, V), normal(2, V), -torch.rand(V, K) - 0.1, normal(2, K), normal(2, K), normal(V),
    )  # fmt: skip
    for binding, (state, *args), bias in (
        (mamba_ssm.MAMBA2, of_heads, a_head(normal(H))), (mamba_ssm.MAMBA, of_channels, normal(V)),
    ):  # fmt: skip
        options = dict(z=normal(*args[0].shape), dt_bias=bias, dt_softplus=True)
        states = [state.clone() for _ in range(3)]
        theirs = selective_state_update(states[0], *args, **options)
        ours = by_table(binding, "selective_state_update", (states[1], *args), options)
        instead = mamba_ssm_cpu.FUNCTIONS["selective_state_update"](states[2], *args, **options)
        for what, y, after in (("", ours, states[1]), (", stood in for", instead, states[2])):
            check_close(f"{binding.kind}'s step{what}", y, theirs)
            check_close(f"{binding.kind}'s state after a step{what}", after, states[0])


def norms() -> None:
    from mamba_ssm.ops.triton import layer_norm, layernorm_gated

    x, residual, weight = normal(2, 5, 32), normal(2, 5, 32), normal(32)
    for is_rms in (True, False):
        theirs = layer_norm.layer_norm_fn(
            x, weight, None, residual=residual, eps=1e-5, prenorm=True, residual_in_fp32=True, is_rms_norm=is_rms
        )
        ours = mamba_ssm_cpu._norm(
            layer_norm, x, weight, None, residual, None, None, None, 1e-5, 0.0, None, True, True, is_rms, False
        )
        for part, a, b in zip(("norm", "residual"), theirs, ours, strict=True):
            check_close(part, b, a)
    for before in (True, False):
        theirs = layernorm_gated.rmsnorm_fn(x, weight, None, residual, 1e-5, 16, before)
        ours = mamba_ssm_cpu._gated_norm(layernorm_gated, x, weight, None, residual, 1e-5, 16, before, True)
        check_close("gated norm", ours, theirs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    driver.set_active(NoDriver())
    torch.cuda.device = contextlib.nullcontext  # which the package enters around its kernels
    mamba_ssm.import_library()
    with torch.no_grad():
        for check in (steps, norms, sequences):
            check()
            print(f"{check.__name__}: the same", flush=True)
    sys.exit(0)
