"""What flash-linear-attention's own Triton code makes of tiny models, without a GPU: `python fla_oracle.py OUT`.

Triton interprets its kernels (TRITON_INTERPRET=1), under a driver that does nothing but be there. A process of its own,
because Triton reads the variable when it is imported.
"""

from __future__ import annotations

import builtins
import os
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.driver import DriverBase  # noqa: E402
from triton.runtime import driver  # noqa: E402


class NoDriver(DriverBase):
    """Answers what Triton's autotuner asks."""

    def __init__(self):
        pass

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_benchmarker(self):
        return lambda kernel, quantiles=None, **kwargs: [0.0] * len(quantiles or (1, 1, 1))

    def get_device_interface(self):
        return torch.cpu

    def get_empty_cache_for_benchmark(self):
        return None

    def clear_cache(self, cache):
        pass

    def get_current_device(self):
        return 0


class _Counter(int):
    """A loop counter: kernels call `.to(tl.int64)` on theirs, which are plain numbers when interpreted."""

    def to(self, dtype, *args, **kwargs):
        return self


def _range(*bounds, **kwargs):
    bounds = (int(getattr(x, "handle", x).data.item()) if hasattr(x, "handle") else int(x) for x in bounds)
    return (_Counter(i) for i in builtins.range(*bounds))


def setup() -> None:
    """Makes fla run interpreted in this process. Imports it."""
    driver.set_active(NoDriver())
    import fla.layers
    import fla.models  # noqa: F401

    for name, module in tuple(sys.modules.items()):
        if name.startswith("fla.") and module is not None:
            vars(module).setdefault("range", _range)


@torch.no_grad()
def outputs(model) -> dict[str, torch.Tensor]:
    """Logits and states: of one row, of more tokens than one chunk, of a padded batch, and of a token after it."""
    from tiny_fla import padded, tokens

    text, mask = padded()
    found = {"one row": model(tokens(1, 4)).logits}
    if type(model).__name__ != "DeltaNetForCausalLM":  # whose function for many tokens takes no float32
        found["chunks"] = model(tokens(1, 66)).logits
    out = model(text[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    found["padded"] = out.logits[mask[:, :-1].bool()]
    found["state"] = out.past_key_values[1]["recurrent_state"].clone()
    out = model(text[:, -1:], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
    return {**found, "step": out.logits, "last state": out.past_key_values[1]["recurrent_state"]}


def gradients(family: str) -> dict[str, torch.Tensor]:
    """Of every parameter, in training mode. Not of Kimi Delta Attention, which takes a quarter of a minute."""
    from tiny_fla import tiny_fla, tokens

    if family == "kda":
        return {}
    model = tiny_fla(family).train()
    model(tokens(1, 4), use_cache=False).logits.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@torch.no_grad()
def attached(family: str) -> dict[str, torch.Tensor]:
    """Logits with our op in the place of every function, after attach has held each beside fla's own, on its inputs.
    Layers in training mode call the function for many tokens."""
    from tiny_fla import tiny_fla, tokens

    from writesae.models import attach, self_test

    def definition(call):
        raise AssertionError("fla's own function could not run, so nothing was compared")

    self_test._double = definition
    model, found = tiny_fla(family), {}
    for training in (False, True):
        with attach(model.train(training), {(0, 0): None, (1, 0): None}):
            found["training" if training else "one row"] = model(tokens(1, 4), use_cache=False).logits
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    setup()
    from tiny_fla import FAMILIES, tiny_fla

    found = {
        family: {"own": outputs(tiny_fla(family)), "attached": attached(family), "gradients": gradients(family)}
        for family in sys.argv[2:] or FAMILIES
    }
    torch.save(found, sys.argv[1])
