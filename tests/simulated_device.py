"""Two devices made of CPU memory, to test code for GPUs where there is none.

Inside `SimulatedDevice`, tensors made on or moved to a device "simulated:0" or "simulated:1" are wrappers that say so
and compute on the CPU. An operation that mixes them, or one with CPU tensors, fails as it would on a GPU, and
everything that makes the host wait for the device (a value read back, a size that depends on data, a blocking copy) is
written down with the line that asked for it. What a GPU would be told to do (kernels, copies) is counted. torch's
"cuda" cannot be had without a build for it, so the device is torch's one for backends in Python; the process is marked
by it, so tests use it in a process of their own.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import writesae


class _Module(_DummyBackendModule):
    def get_rng_state(self, device=None):
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state, device=None):
        pass


_setup_privateuseone_for_python_backend("simulated", _Module())
DEVICES = torch.device("simulated", 0), torch.device("simulated", 1)
_aten = torch.ops.aten
_PACKAGE = str(Path(writesae.__file__).parent)

# Operations whose result on the host, or whose output size, depends on data of the device.
_WAITS = {
    _aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default,
    _aten._unique2.default, _aten.unique_dim.default, _aten.unique_consecutive.default,
    _aten.repeat_interleave.Tensor,
}  # fmt: skip
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
# Operations that compute nothing, beside those whose result is a view of their input.
_FREE = {
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
    _aten.new_empty_strided.default, _aten._unsafe_view.default, _aten._local_scalar_dense.default, _aten.equal.default,
}  # fmt: skip
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class OnDevice(Tensor):
    """A tensor of a simulated device; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device):
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=device,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self):
        return f"OnDevice({self.inner!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: a tensor of the simulated device is used outside of it")


def _is_device(device) -> bool:
    return device is not None and torch.device(device).type == DEVICES[0].type


def _numbered(device) -> torch.device:
    return DEVICES[torch.device(device).index or 0]


def _is_view(func) -> bool:
    """Whether its result is another look at its input's memory."""
    found = func._schema.returns
    return bool(found) and all(x.alias_info is not None and not x.alias_info.is_write for x in found)


class SimulatedDevice(TorchDispatchMode):
    """The devices, while active.

    Attributes:
        waits: `Counter` of (operation, "file:line in function") that made the host wait.
        launches: `Counter` of (operation, "file:line in function") that a GPU would be given to do: one for each
            operation that computes or copies on the device, which is the least it can be; views and memory are free. An
            operator of this package counts one too: how many kernels it has is not seen here.
        to_host: bytes copied to the host, and `copies_to_host` in how many copies.
    """

    def __init__(self):
        super().__init__()
        self.waits: Counter = Counter()
        self.launches: Counter = Counter()
        self.to_host = self.copies_to_host = 0
        self._before: list[bool] = []

    def __enter__(self):
        self._before.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) then moves its tensor where we see it
        return super().__enter__()

    def __exit__(self, *exception):
        torch._C._set_only_lift_cpu_tensors(self._before.pop())
        return super().__exit__(*exception)

    def move(self, x, index: int = 0):
        """A tensor on a device, or a module with all its parameters and buffers there (in place)."""
        if isinstance(x, Tensor):
            return x if isinstance(x, OnDevice) else OnDevice(x.detach().clone(), DEVICES[index])
        for module in x.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(self.move(p, index), requires_grad=p.requires_grad)
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = self.move(b, index)
        return x

    def forget(self) -> None:
        """Counts from 0."""
        self.waits.clear()
        self.launches.clear()
        self.to_host = self.copies_to_host = 0

    def _wait(self, what: str) -> None:
        self.waits[what, self._place()] += 1

    @staticmethod
    def _place() -> str:
        """The line of this package that asks, or "elsewhere"."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if "/torch/" not in name and name != __file__:
                here = name.startswith(_PACKAGE)
                return f"{Path(name).name}:{frame.f_lineno} {frame.f_code.co_name}" if here else "elsewhere"
            frame = frame.f_back
        return "elsewhere"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func._can_decompose():  # in inference mode composite operations arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        ours = [x for x in tensors if isinstance(x, OnDevice)]
        target = kwargs.get("device")
        if not ours and not _is_device(target):
            return func(*args, **kwargs)
        if target is not None and not _is_device(target) and ours and func not in _COPIES:
            raise RuntimeError(f"{func}: device={target} with an input on {ours[0].device}")
        self._check_mixed(func, args, tensors, ours)
        to_host = self._note_waits(func, args, kwargs, ours, target)
        unwrap = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
        inner_args, inner_kwargs = unwrap
        where = ours[0].device if ours else None
        if _is_device(inner_kwargs.get("device")):
            where = _numbered(inner_kwargs["device"])
            inner_kwargs["device"] = torch.device("cpu")
        inner_kwargs.pop("pin_memory", None)
        if func is _aten.histc.default and not inner_args[0].is_floating_point():  # a GPU has it for integers
            inner_args = (inner_args[0].float(), *inner_args[1:])
        if func not in _FREE and not _is_view(func):
            self.launches[str(func), self._place()] += 1
        out = func(*inner_args, **inner_kwargs)
        if func in _COPIES and func is not _aten.copy_.default:
            if out is tree_flatten(inner_args)[0][0]:
                out = out.clone()
        if to_host:
            if func in _COPIES:
                self.to_host += out.nbytes
                self.copies_to_host += 1
            return out
        # An in-place operation returns the tensor it was given.
        known = {id(x.inner): x for x in ours}
        return tree_map(
            lambda x: (known[id(x)] if id(x) in known else OnDevice(x, where)) if isinstance(x, Tensor) else x, out
        )

    def _check_mixed(self, func, args, tensors, ours) -> None:
        if func in _COPIES or not ours:
            return
        for x in tensors:
            if x.device == ours[0].device or x.ndim == 0 and not isinstance(x, OnDevice):
                continue
            if func in _INDEXING and x is not args[0] and not isinstance(x, OnDevice):
                self._wait(f"{func} with an index on the CPU")
                continue
            raise RuntimeError(
                f"{func}: expected all tensors on one device, found {ours[0].device} {tuple(ours[0].shape)} and "
                f"{x.device} {tuple(x.shape)}"
            )

    def _note_waits(self, func, args, kwargs, ours, target) -> bool:
        """Whether the result lies on the host."""
        if func in _WAITS and ours:
            self._wait(str(func))
            return func in (_aten._local_scalar_dense.default, _aten.equal.default)
        if func in _INDEXING and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_flatten(args[1])[0]
        ):
            self._wait(f"{func} by a mask")
        if func is _aten._to_copy.default:
            source_on_device = isinstance(args[0], OnDevice)
            moves = target is not None and _is_device(target) != source_on_device
            if moves and not kwargs.get("non_blocking"):
                self._wait("copy to the host" if source_on_device else "blocking copy to the device")
            return target is not None and not _is_device(target)
        if func is _aten.copy_.default:
            non_blocking = len(args) > 2 and args[2] or kwargs.get("non_blocking")
            if isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice) and not non_blocking:
                self._wait("blocking copy")
            return not isinstance(args[0], OnDevice)
        return False
