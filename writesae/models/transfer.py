"""`ToHost`: results of a device on their way to the host, without making the host wait for the device."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_streams: dict[torch.device, torch.cuda.Stream] = {}
_lock = threading.Lock()


class ToHost:
    """Copies of device tensors, started now and waited for by `get`.

    On CUDA they run on a stream of their own into pinned memory, beside whatever the model computes next.

    Attributes:
        nbytes: size of all of them.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.nbytes = sum(x.nbytes for x in tensors)
        self._event = None
        if not tensors or tensors[0].device.type != "cuda":
            self._host = [x.to("cpu", non_blocking=True) for x in tensors]
            return
        device = tensors[0].device
        with _lock:
            stream = _streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._host = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
            for to, x in zip(self._host, tensors, strict=True):
                to.copy_(x, non_blocking=True)
                x.record_stream(stream)
            self._event = stream.record_event()

    @property
    def arrived(self) -> bool:
        """Whether `get` would not wait."""
        return self._event is None or self._event.query()

    def get(self) -> list[Tensor]:
        """The tensors on the CPU, in the order given."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
