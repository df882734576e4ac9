"""What the operators' tests run on: every instruction set of the CPU kernels, the CUDA kernels' host twin where one was
given (`pytest --twin PATH`), and the GPU where there is one.

The twin also runs as what it otherwise only stands for: "twin-truncating" cuts off the sums of matrix products as an
H100 does, "twin-ampere" as an A100 does, with its shared memory and its rounding to tf32, and "twin-rtx" has the shared
memory of a consumer's card. They are left out unless named.

A test that takes the fixture `target` runs once on each of FEW, `each_target` on each of ALL, `device_target` on each
of DEVICES; others go through them themselves, so that the reference is computed once. `pytest --targets twin,cuda`
leaves only those.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace

import host_twin
import torch

from writesae import testing
from writesae._library import backends, cpu_isa
from writesae.edits import Edits

# The twin run as what it otherwise only stands for.
MACHINES: dict[str, dict[str, int]] = {"twin-truncating": {}, "twin-ampere": host_twin.A100, "twin-rtx": host_twin.RTX}
TRUNCATING = ("twin-truncating", "twin-ampere")


@dataclass(frozen=True)
class Target:
    """name: "avx512", …, "twin", "twin-reverse", one of MACHINES, "cuda" or "reference". kind: "cpu", "twin", "cuda" or
    "reference", the backend to ask for."""

    name: str
    kind: str

    @property
    def device(self) -> str:
        return "cuda" if self.kind == "cuda" else "cpu"

    @contextmanager
    def in_use(self):
        """Within it, the backend `kind` runs this target; what tests move to it with `put` lies on its device."""
        if self.kind == "cpu":
            with testing.cpu_isa(self.name):
                yield
        elif self.kind == "twin":
            how = {"reverse": self.name == "twin-reverse", "truncating": self.name in TRUNCATING}
            with host_twin.set_to(**how, **MACHINES.get(self.name, {})):
                yield
        else:
            yield

    def put(self, x):
        """The same with its tensors on the target's device; see `moved`."""
        return x if self.device == "cpu" else moved(x, self.device)


def moved(x, device: str):
    """Tensors, and those in dicts and in the package's dataclasses, on a device. Edits stay with the host."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {name: moved(value, device) for name, value in x.items()}
    if is_dataclass(x) and not isinstance(x, Edits):
        return replace(x, **{field.name: moved(getattr(x, field.name), device) for field in fields(x)})
    return x


def to_cpu(x):
    return moved(x, "cpu")


ALL: list[Target] = []
FEW: list[Target] = []  # the best instruction set of the CPU, and all that is not the CPU
DEVICES: list[Target] = []  # all that is not the CPU
REFERENCE: list[Target] = []  # the package's own reference, in none of the others: for tests that know better


def setup(twin: str | None, names: str | None) -> None:
    """Fills ALL and FEW in place. Raises where a target was asked for that is not there."""
    found = [Target(name, "cpu") for name in cpu_isa().get("supported", "").split(",") if name]
    if twin:
        host_twin.load(twin)
        found += [Target(name, "twin") for name in ("twin", "twin-reverse", *MACHINES)]
    if backends()["cuda"] is None:
        found.append(Target("cuda", "cuda"))
    reference = Target("reference", "reference")
    wanted = names.split(",") if names else ["reference", *(x.kind for x in found)]
    missing = set(wanted) - {x.kind for x in found} - {x.name for x in found} - {"reference"}
    if missing:
        raise ValueError(f"--targets: {', '.join(sorted(missing))} not here (found {', '.join(x.name for x in found)})")
    ALL[:] = [x for x in found if x.name in wanted or (x.kind in wanted and x.name not in MACHINES)]
    cpu = [x for x in ALL if x.kind == "cpu"][:1]
    DEVICES[:] = [x for x in ALL if x.kind != "cpu"]
    FEW[:] = cpu + DEVICES
    REFERENCE[:] = [reference] if "reference" in wanted else []
