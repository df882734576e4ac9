"""`ToHost`: results of a device on their way to the host, without making the host wait for the device."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_streams: dict[torch.device, torch.cuda.Stream] = {}
_lock = threading.Lock()


class ToHost:
    """Copies of device tensors, started now and waited for by `get`: one copy for all tensors of a device.

    On CUDA it runs on a stream of its own into pinned memory, beside whatever the model computes next.

    Attributes:
        nbytes: size of all of them.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.nbytes = sum(x.nbytes for x in tensors)
        devices: dict[torch.device, list[int]] = {}
        for i, x in enumerate(tensors):
            devices.setdefault(x.device, []).append(i)
        self._parcels = [(_Parcel([tensors[i] for i in numbers]), numbers) for numbers in devices.values()]
        self._host: list[Tensor] | None = None

    @property
    def arrived(self) -> bool:
        """Whether `get` would not wait."""
        return all(parcel.event is None or parcel.event.query() for parcel, _ in self._parcels)

    def get(self) -> list[Tensor]:
        """The tensors on the CPU, in the order given."""
        if self._host is None:
            found: dict[int, Tensor] = {}
            for parcel, numbers in self._parcels:
                found.update(zip(numbers, parcel.get(), strict=True))
            self._host = [found[i] for i in range(len(found))]
            self._parcels = []
        return self._host


class _Parcel:
    """Tensors of one device, in one piece of memory."""

    def __init__(self, tensors: list[Tensor]):
        # The widest elements first, so that each stands where its size divides the offset.
        self._order = sorted(range(len(tensors)), key=lambda i: (-tensors[i].element_size(), str(tensors[i].dtype)))
        self._of = [(x.dtype, x.shape) for x in tensors]
        self.event = None
        device, whole = tensors[0].device, _joined([tensors[i] for i in self._order])
        if device.type != "cuda":
            self._host = whole.to("cpu", non_blocking=True)
            return
        with _lock:
            stream = _streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._host = torch.empty(whole.shape, dtype=torch.uint8, pin_memory=True)
            self._host.copy_(whole, non_blocking=True)
            whole.record_stream(stream)
            self.event = stream.record_event()

    def get(self) -> list[Tensor]:
        if self.event is not None:
            self.event.synchronize()
        found: dict[int, Tensor] = {}
        start = 0
        for i in self._order:
            dtype, shape = self._of[i]
            stop = start + shape.numel() * dtype.itemsize
            found[i] = self._host[start:stop].view(dtype).view(shape)
            start = stop
        return [found[i] for i in range(len(found))]


def _joined(tensors: list[Tensor]) -> Tensor:
    """Their bytes, one after the other: a launch for each dtype, none for a single tensor."""
    if len(tensors) == 1:
        return tensors[0].contiguous().flatten().view(torch.uint8)
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for x in tensors:
        kinds.setdefault(x.dtype, []).append(x.flatten())
    whole = torch.empty(sum(x.nbytes for x in tensors), dtype=torch.uint8, device=tensors[0].device)
    start = 0
    for dtype, members in kinds.items():
        stop = start + sum(x.nbytes for x in members)
        torch.cat(members, out=whole[start:stop].view(dtype))
        start = stop
    return whole
