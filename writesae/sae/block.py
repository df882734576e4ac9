"""`Block`: the writes of many passages at one head, from which any state is rebuilt on demand.

Training wants states of unrelated tokens in a batch, a model gives whole passages. A block keeps a few hundred
passages as writes (K + V + 1 numbers a token, not K V), with the state before every 32nd token, and forms the states of
a batch when they are asked for. No trajectory of states is stored.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..writes import Writes

CHUNK = 32


class Block:
    """Writes of one head over N passages of T tokens, float32 (or the writes' own wider dtype), on the writes' device.

    Args:
        writes: batches of passages of one length, unpacked, no edits; concatenated in order. Of any gate.
        head: value head.
        target: what `examples` are, "state" or "write". Of the latter no states can be asked for.
        root: `[K, K]` symmetric; multiplies the key side of all writes and states, or None. See `readers.py`.

    Raises:
        ValueError: writes that cannot be rebuilt this way, or that carry a NaN or infinity.
    """

    def __init__(self, writes: Iterable[Writes], head: int, target: str = "state", root: Tensor | None = None):
        decay: list[Tensor] = []
        left: list[Tensor] = []
        right: list[Tensor] = []
        first: list[Tensor] = []
        self.gate, self.matrix = "scalar", None  # [K, V] decay_matrix, of an element gate
        for part in writes:
            if part.cu_seqlens is not None or (part.edits is not None and len(part.edits)):
                raise ValueError("writes: training needs plain passages, got a packed batch or edits")
            one = part.head(head) if target == "state" else part.head(head).memoryless()
            dtype = torch.promote_types(one.right.dtype, torch.float32)
            for found, x in ((decay, one.decay), (left, one.left), (right, one.right)):
                found.append(x.squeeze(2).to(dtype))
            B, _, _, K, V = one.shape
            self.gate, state = one.gate, one.initial_state
            self.matrix = None if one.decay_matrix is None else one.decay_matrix[0].to(right[-1])
            first.append(right[-1].new_zeros(B, K, V) if state is None else state.squeeze(1).to(dtype))
        self.decay, self.left, self.right = torch.cat(decay), torch.cat(left), torch.cat(right)  # [N,T,*] [N,T,R,*]
        for name in ("decay", "left", "right"):
            bad = ~torch.isfinite(getattr(self, name)).reshape(*self.right.shape[:2], -1)
            if bool(bad.any()):
                row, position = bad.any(2).nonzero()[0].tolist()
                raise ValueError(f"writes: NaN or infinity in {name}: passage {row}, position {position}, head {head}")
        self.first = torch.cat(first)
        self.target, self.root = target, None if root is None else root.to(self.right)
        # A gate of channels does not commute with the root, which then comes last.
        self._folded = self.root is not None and self.gate == "scalar"
        if self.root is not None and self._folded:
            self.left, self.first = self.left @ self.root, self.root @ self.first
        self._starts = bool(self.first.any())
        N, T, R, K = self.left.shape
        self.shape = (N, T, K, self.right.shape[-1])
        self._before = self.first.new_zeros(0)
        if target == "write":
            return
        pad = -T % CHUNK
        pads = self._columns()
        if pad:
            pads = [torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, pad)) for x in pads]
        # [N, chunks, CHUNK, *] and [N, chunks, CHUNK, R, *]
        self._decay, self._left, self._right = (x.unflatten(1, (-1, CHUNK)) for x in pads)
        state, before = self.first, []
        for c in range(self._decay.shape[1]):
            before.append(state)
            state = self._advance(state, self._decay[:, c], self._left[:, c], self._right[:, c])
        self._before = torch.stack(before, 1)  # [N, chunks, K, V]

    def _columns(self):
        decay = self.decay[..., None] if self.gate == "scalar" else self.decay
        return decay, self.left, self.right

    def _advance(self, state: Tensor, decay: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """States `[P, K, V]` after a chunk: decay `[P, CHUNK, 1 or K or V]`, left, right `[P, CHUNK, R, *]`."""
        if self.matrix is not None:
            for t in range(CHUNK):
                state = (decay[:, t, None] * self.matrix).exp() * state + left[:, t].mT @ right[:, t]
            return state
        # Sums of what follows a token, never differences of sums: a gate may be as strong as it likes.
        after = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1).flip(1).cumsum(1).flip(1)
        state = decay.sum(1).exp()[..., None] * state
        return state + (left * after.exp()[:, :, None]).flatten(1, 2).mT @ right.flatten(1, 2)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.right.device

    @property
    def nbytes(self) -> int:
        """Bytes held: the writes and one state in `CHUNK`."""
        return sum(x.numel() * x.element_size() for x in (*self._columns(), self._before))

    def states(self, rows: Tensor, positions: Tensor) -> Tensor:
        """States after the writes at (row, position): two `[P]` int64 tensors, of this device, to `[P, K, V]`."""
        if self.target != "state":
            raise ValueError("target: expected a block of states, got one of writes, which keeps none")
        chunk, offset = positions // CHUNK, positions % CHUNK
        later = torch.arange(CHUNK, device=offset.device) > offset[:, None]
        decay = self._decay[rows, chunk].masked_fill(later[..., None], 0)
        left = self._left[rows, chunk].masked_fill(later[..., None, None], 0)
        found = self._advance(self._before[rows, chunk], decay, left, self._right[rows, chunk])
        return found if self.root is None or self._folded else self.root @ found

    def examples(self, rows: Tensor, positions: Tensor) -> Tensor:
        """`[P, K, V]` of what the target is at (row, position): states, or writes."""
        if self.target == "state":
            return self.states(rows, positions)
        return torch.einsum("prk,prv->pkv", *self.natives(rows, positions))

    def natives(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The writes themselves at (row, position): left `[P, R, K]` and right `[P, R, V]`."""
        left = self.left[rows, positions]
        return left if self.root is None or self._folded else left @ self.root, self.right[rows, positions]

    def write_norms(self) -> Tensor:
        """`[N, T]` Frobenius norm of every token's write (for R = 2, the root of the sum of squares)."""
        left = self.left if self.root is None or self._folded else self.left @ self.root
        return (left.norm(dim=-1) * self.right.norm(dim=-1)).square().sum(-1).sqrt()

    def writes(self, rows: Tensor, scale: float = 1.0) -> Writes:
        """Those passages as `Writes` of one head, with the states multiplied by `scale`.

        Raises:
            ValueError: a root under a gate that does not commute with it.
        """
        if self.root is not None and not self._folded:
            raise ValueError(
                f"root: expected none under the {self.gate} gate of these writes, whose states are no writes"
            )
        return Writes(
            self.decay[rows][:, :, None], self.left[rows][:, :, None], self.right[rows][:, :, None] * scale,
            decay_matrix=None if self.matrix is None else self.matrix[None],
            initial_state=self.first[rows][:, None] * scale if self._starts else None,
        )  # fmt: skip
