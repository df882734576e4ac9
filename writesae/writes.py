"""`Writes`: one layer's memory trace in factored form, and what can be asked of it without storing states.

Every supported write rule is, per head,

    S_t = decay_t o S_{t-1} + sum_r left_{t,r} right_{t,r}^T          S_t in R^{K x V}

so (decay, left, right) carry the whole trajectory at 1/64 of its size (K = V = 128). How heads and writes lie in them
is known here alone: others ask `head`, `heads`, `native`, `rank_one`, `left_head` or `left_of_heads`. Method: J. Young,
*WriteSAE: Sparse Autoencoders for Recurrent State*, arXiv 2605.12770.

Letters: B row, T position, H value head, Hl key (left) head, R writes a token, K key size, V value size, N sequences
(N = B, or the number of packed sequences when `cu_seqlens` is given, where B = 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ._arguments import check_floats, check_integers, check_type, integers, said, unreadable
from ._autocast import without_autocast
from .edits import AFTER, Edits

_FORGET = -1e4  # a log-decay whose exp is 0, and whose sums over a chunk stay finite
_WRITES = ("new", "erase", "total")

_Head = TypeVar("_Head", int, Tensor)


def joined(parts: Sequence[Tensor | None], axis: int) -> Tensor | None:
    """The tensors among them as one; None where there are none."""
    some = [part for part in parts if part is not None]
    return torch.cat(some, axis) if some else None


@dataclass(frozen=True, repr=False)
class Writes:
    """The rank-1 writes of one layer over a batch, as the forward pass made them.

    Attributes:
        decay: log-decay. `[B, T, H]` (scalar gate), `[B, T, H, K]` (channel gate), or `[B, T, H, V]` together with
            `decay_matrix` (element gate: log-decay of entry (n, c) is `decay[..., c] * decay_matrix[h, n, c]`).
        left: `[B, T, Hl, R, K]` key side as used (after normalisation). Value head h reads left head h // (H / Hl).
        right: `[B, T, H, R, V]` value side: the actual increment, erase already inside. R = 1, but for rules with a
            low-rank transition that make two writes a token: first the erase, then the new one.
        beta: `[B, T, H]` erase strength of a delta rule (`S -= beta k k^T (decay S)`, k the left factor), None for
            other rules.
        erase: for general low-rank transitions, `(read, write)`, each `[B, T, H, K]`: the transition applied to a
            perturbation is `Diag(e^decay) + write read^T`. None for other rules.
        decay_matrix: `[H, K, V]`, element gate only.
        initial_state: `[N, H, K, V]` state before the first token, None means zero.
        cu_seqlens: `[N + 1]` int64 offsets of packed sequences (then B = 1), or None.
        edits: additions made to the states beyond the writes (all of kind "add", before or after their token reads), or
            None.
    """

    decay: Tensor
    left: Tensor
    right: Tensor
    beta: Tensor | None = None
    erase: tuple[Tensor, Tensor] | None = None
    decay_matrix: Tensor | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    edits: Edits | None = None

    def __post_init__(self):
        left, right, decay = self.left, self.right, self.decay
        for name, x in (("decay", decay), ("left", left), ("right", right)):
            if not isinstance(x, Tensor):
                raise ValueError(f"{name}: expected a tensor, got {said(x)}")
        if left.ndim != 5:
            raise ValueError(f"left: expected [B, T, Hl, R, K] (5 dimensions), got shape {tuple(left.shape)}")
        if right.ndim != 5:
            raise ValueError(f"right: expected [B, T, H, R, V] (5 dimensions), got shape {tuple(right.shape)}")
        B, T, Hl, R, K = left.shape
        H, V = right.shape[2], right.shape[4]
        if right.shape[:2] != (B, T) or right.shape[3] != R or H % Hl:
            raise ValueError(
                f"right: expected [B={B}, T={T}, H a multiple of Hl={Hl}, R={R}, V], got shape {tuple(right.shape)}"
            )
        last = V if self.decay_matrix is not None else K
        if tuple(decay.shape) not in ((B, T, H), (B, T, H, last)):
            raise ValueError(
                f"decay: expected [B={B}, T={T}, H={H}] or [B, T, H, {last}], got shape {tuple(decay.shape)}"
            )
        if self.decay_matrix is not None and (decay.ndim != 4 or tuple(self.decay_matrix.shape) != (H, K, V)):
            raise ValueError(
                f"decay_matrix: expected [H={H}, K={K}, V={V}] with a [B, T, H, V] decay, got shape "
                f"{tuple(self.decay_matrix.shape)} and decay {tuple(decay.shape)}"
            )
        if self.beta is not None and (self.erase is not None or tuple(self.beta.shape) != (B, T, H)):
            other = "" if self.erase is None else " beside an erase, of which there may be one"
            raise ValueError(f"beta: expected [B={B}, T={T}, H={H}], got shape {tuple(self.beta.shape)}{other}")
        if self.erase is not None and [tuple(x.shape) for x in self.erase] != [(B, T, H, K)] * 2:
            got = ", ".join(str(tuple(x.shape)) for x in self.erase)
            raise ValueError(f"erase: expected (read, write), each [B={B}, T={T}, H={H}, K={K}], got shapes {got}")

    def __repr__(self) -> str:
        B, T, H, K, V = self.shape
        Hl, R = self.left.shape[2:4]
        dtype = str(self.right.dtype).removeprefix("torch.")
        more = [f"{self.gate} gate", f"transition {self.transition}", dtype]
        if self.cu_seqlens is not None:
            more.append(f"{self.num_sequences} packed sequences")
        if self.initial_state is not None:
            more.append("an initial state")
        if self.edits is not None:
            more.append(f"{len(self.edits)} edits")
        sizes = f"B={B}, T={T}, H={H}, Hl={Hl}, R={R}, K={K}, V={V}"
        return f"Writes({sizes}; {', '.join(more)}; {self.nbytes / 1e6:.1f} MB)"

    # ---- shape ------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, T, H, K, V)."""
        B, T, H, _, V = self.right.shape
        return B, T, H, self.left.shape[-1], V

    @property
    def gate(self) -> str:
        """What a decay is of: "scalar" (a head), "channel" (a key channel) or "element"."""
        return "element" if self.decay_matrix is not None else "scalar" if self.decay.ndim == 3 else "channel"

    @property
    def transition(self) -> str:
        """What a token does to the state beside the gate: "none", "delta" (erase what k reads) or "low rank"."""
        return "delta" if self.beta is not None else "none" if self.erase is None else "low rank"

    @property
    def num_sequences(self) -> int:
        """N: rows, or sequences packed into one."""
        return self.right.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def nbytes(self) -> int:
        """Bytes held by the three factors."""
        return sum(x.numel() * x.element_size() for x in (self.decay, self.left, self.right))

    def memoryless(self) -> Writes:
        """The same writes in a memory that holds one at a time: each state is the write of its own token. Where a token
        makes two (R = 2 of a low-rank transition), the new one, as in `native`.

        For codes of writes instead of states. A memory that forgets everything has a scalar gate, whatever the rule's.
        Initial state and edits are no writes, and left out.
        """
        dtype = torch.promote_types(self.decay.dtype, torch.float32)
        decay = torch.full_like(self.right[..., 0, 0], _FORGET, dtype=dtype)
        left, right = self.left, self.right
        if (right.shape[3], self.transition) == (2, "low rank"):
            left, right = left[..., 1:, :], right[..., 1:, :]
        return Writes(decay, left, right, cu_seqlens=self.cu_seqlens)

    def sequences(self) -> Iterator[tuple[int, int, int, int]]:
        """Yields (sequence, batch row, first token, one past the last token)."""
        B, T = self.right.shape[:2]
        if self.cu_seqlens is None:
            for b in range(B):
                yield b, b, 0, T
        else:
            bounds = self.cu_seqlens.cpu().tolist()
            for n in range(len(bounds) - 1):
                yield n, 0, bounds[n], bounds[n + 1]

    def to(self, *args, **kwargs) -> Writes:
        """Moves or casts every floating tensor, like `Tensor.to`."""

        def cast(x):
            return x.to(*args, **kwargs) if isinstance(x, Tensor) and x.is_floating_point() else x

        return replace(
            self,
            decay=cast(self.decay), left=cast(self.left), right=cast(self.right), beta=cast(self.beta),
            erase=None if self.erase is None else tuple(cast(x) for x in self.erase),
            decay_matrix=cast(self.decay_matrix), initial_state=cast(self.initial_state),
            edits=None if self.edits is None else replace(
                self.edits, left=cast(self.edits.left), right=cast(self.edits.right)
            ),
        )  # fmt: skip

    # ---- heads and writes -------------------------------------------------------------------------------------

    def left_head(self, head: _Head) -> _Head:
        """The left (key) head that a value head reads: of a number, or of each of an int tensor.

        Raises:
            ValueError: a number that is no value head. Tensors are not looked at.
        """
        H, Hl = self.right.shape[2], self.left.shape[2]
        if isinstance(head, Tensor):
            return head // (H // Hl)
        found = integers("head", head)
        if len(found) != 1 or not 0 <= found[0] < H:
            raise ValueError(f"head: expected 0 <= head < H={H}, got {head}")
        return found[0] // (H // Hl)

    def left_of_heads(self, row: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """`[B, t, H, R, K]` left factors of every value head at tokens start..stop-1; of one batch row `[t, H, R, K]`.

        A view where every value head has a left head of its own.
        """
        group = self.right.shape[2] // self.left.shape[2]
        left = self.left[:, start:stop] if row is None else self.left[row, start:stop]
        return left if group == 1 else left.repeat_interleave(group, dim=-3)

    def head(self, head: int) -> Writes:
        """The writes of one value head, as views: H = Hl = 1, its edits kept as edits of head 0.

        Raises:
            ValueError: no such head.
        """
        key = self.left_head(head)
        return self._of(slice(head, head + 1), slice(key, key + 1), [head])

    def heads(self, heads: Sequence[int]) -> Writes:
        """The writes of the listed value heads, copied, in that order: H = Hl = how many, edits renumbered alike.

        Raises:
            ValueError: no such head.
        """
        listed = integers("heads", heads)
        lefts = [self.left_head(head) for head in listed]
        at, key = (torch.tensor(x, dtype=torch.int64, device=self.right.device) for x in (listed, lefts))
        return self._of(at, key, listed)

    @classmethod
    def of_heads(cls, parts: Sequence[Writes]) -> Writes:
        """The writes of all heads of several parts, in order, edits renumbered alike: what `head` takes apart.

        Args:
            parts: of one layer and the same tokens, at least one, each with as many value heads a left head.
        """
        if len(parts) == 1:
            return parts[0]
        edits, first = [], 0
        for part in parts:
            if part.edits is not None:
                edits.append(part.edits._with(head=part.edits.head + first))
            first += part.shape[2]
        erase = [part.erase for part in parts if part.erase is not None]
        return cls(
            torch.cat([part.decay for part in parts], 2), torch.cat([part.left for part in parts], 2),
            torch.cat([part.right for part in parts], 2), beta=joined([part.beta for part in parts], 2),
            erase=(torch.cat([x[0] for x in erase], 2), torch.cat([x[1] for x in erase], 2)) if erase else None,
            decay_matrix=joined([part.decay_matrix for part in parts], 0),
            initial_state=joined([part.initial_state for part in parts], 1), cu_seqlens=parts[0].cu_seqlens,
            edits=Edits.cat(edits) if edits else None,
        )  # fmt: skip

    def tokens(self, row: int, start: int, stop: int) -> Writes:
        """Tokens start..stop-1 of one batch row, as views: B = 1, without initial state, offsets and edits."""
        at, t = slice(row, row + 1), slice(start, stop)
        return Writes(
            self.decay[at, t], self.left[at, t], self.right[at, t], None if self.beta is None else self.beta[at, t],
            None if self.erase is None else (self.erase[0][at, t], self.erase[1][at, t]), self.decay_matrix,
        )  # fmt: skip

    def _of(self, at: slice | Tensor, key: slice | Tensor, listed: list[int]) -> Writes:
        return Writes(
            self.decay[:, :, at], self.left[:, :, key], self.right[:, :, at],
            beta=None if self.beta is None else self.beta[:, :, at],
            erase=None if self.erase is None else (self.erase[0][:, :, at], self.erase[1][:, :, at]),
            decay_matrix=None if self.decay_matrix is None else self.decay_matrix[at],
            initial_state=None if self.initial_state is None else self.initial_state[:, at],
            cu_seqlens=self.cu_seqlens, edits=None if self.edits is None else self.edits._of_heads(listed),
        )  # fmt: skip

    def rank_one(self, what: str) -> tuple[Tensor, Tensor]:
        """(left `[B, T, H, K]` of every value head, right `[B, T, H, V]`), of writes that are one a token.

        Args:
            what: who asks, for the refusal.
        Raises:
            ValueError: R > 1: which of them is meant is for the caller to say, see `native`.
        """
        self._require_rank_one(what)
        return self.left_of_heads().squeeze(3), self.right.squeeze(3)

    def native(
        self, row: int | Tensor, position: int | Tensor, head: int | Tensor, write: str = "new"
    ) -> tuple[Tensor, Tensor]:
        """Factors of the writes that the model itself made at some places.

        Args:
            row: batch row, or the sequence of a packed batch.
            position: inside that row.
            head: value head. All three: numbers or int tensors, which broadcast to one shape `[...]`.
            write: which, where a token makes two (R = 2 of a low-rank transition): "new", what it brings in, "erase",
                what it takes away, or "total" for both. At R = 1 the new one is all, the erase is inside.
        Returns:
            (left `[..., K]`, right `[..., V]`); of "total" (`[..., R, K]`, `[..., R, V]`).
        Raises:
            ValueError: a place out of range, an unknown write, or one that these writes do not tell apart.
        """
        if write not in _WRITES:
            raise ValueError(f"write: expected one of {', '.join(_WRITES)}, got {write!r}")
        R = self.right.shape[3]
        if write == "erase" and (R, self.transition) != (2, "low rank"):
            raise ValueError(f"write: expected new or total, got erase, which is no write of its own in {self!r}")
        if write == "new" and R > 1 and (R, self.transition) != (2, "low rank"):
            raise ValueError(f"write: expected total, got new, and which of R={R} is new is not known in {self!r}")
        batch, token, head = self._places(row, position, head)
        left, right = self.left[batch, token, self.left_head(head)], self.right[batch, token, head]
        if write == "total":
            return left, right
        which = 0 if write == "erase" else R - 1
        return left[..., which, :], right[..., which, :]

    def _places(self, row, position, head, of: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """(batch row, token, head), checked: tensors of one shape on the writes' device."""
        _, T, H, _, _ = self.shape
        given = {"row": row, "position": position, "head": head}
        index = [_index(of + name, x, self.right.device) for name, x in given.items()]
        try:
            row, position, head = torch.broadcast_tensors(*index)
        except RuntimeError:
            shapes = ", ".join(str(tuple(x.shape)) for x in index)
            raise ValueError(f"row, position, head: expected shapes that broadcast, got {shapes}") from None
        _check_range(f"{of}row", row, self.num_sequences, "rows" if self.cu_seqlens is None else "packed sequences")
        _check_range(f"{of}head", head, H, "value heads")
        if self.cu_seqlens is None:
            _check_range(f"{of}position", position, T, "tokens")
            return row, position, head
        offsets = self.cu_seqlens.to(row.device)
        start = offsets[row]
        _check_range(f"{of}position", position, offsets[row + 1] - start, "tokens of that sequence")
        return torch.zeros_like(row), start + position, head

    # ---- helpers on one sequence ------------------------------------------------------------------------------

    def _start(self, n: int) -> Tensor:
        """`[H, K, V]`: state of sequence n before its first token."""
        _, _, H, K, V = self.shape
        return self.right.new_zeros(H, K, V) if self.initial_state is None else self.initial_state[n].to(self.right)

    def _element_decay(self, decay: Tensor) -> Tensor:
        """`[..., H]`, `[..., H, K]` or `[..., H, V]` log-decay to a factor that broadcasts on `[..., H, K, V]`."""
        if self.decay_matrix is not None:
            return (decay[..., None, :] * self.decay_matrix).exp()
        return decay.exp()[..., None] if self.gate == "channel" else decay.exp()[..., None, None]

    def _resolve(self, positions) -> list[tuple[int, int]]:
        """Positions argument to a list of (sequence, position)."""
        lengths = [stop - start for _, _, start, stop in self.sequences()]
        if isinstance(positions, Tensor) and positions.ndim == 2:
            check_integers("positions", positions, "[P, 2]")
            if positions.shape[1] != 2:
                raise ValueError(f"positions: expected [P, 2] of (row, position), got shape {tuple(positions.shape)}")
            pairs = [tuple(p) for p in positions.tolist()]
        else:
            flat = integers("positions", positions)
            pairs = [(n, t) for n in range(len(lengths)) for t in flat]
        for n, t in pairs:
            if not 0 <= n < len(lengths) or not 0 <= t < lengths[n]:
                raise ValueError(
                    f"positions: expected rows below {len(lengths)} and positions inside their row, got "
                    f"row {n}, position {t}"
                )
        return pairs

    # ---- questions --------------------------------------------------------------------------------------------

    @without_autocast
    def states(self, positions: Tensor | Sequence[int], read: bool = False) -> Tensor:
        """States after the writes at the listed positions, only.

        Args:
            positions: `[P, 2]` int tensor of (row, position), or a list of positions taken in every row.
            read: as the queries of those tokens read them, before edits after the read; else what the next tokens meet.
                Codes are of states as they were read.
        Returns:
            `[P, H, K, V]`, or `[N, P, H, K, V]` for a list of positions; dtype of `right`.
        """
        _, _, H, K, V = self.shape
        out = self._states_at(self._resolve(positions), read)
        if isinstance(positions, Tensor) and positions.ndim == 2:
            return out
        return out.reshape(self.num_sequences, -1, H, K, V)

    def _states_at(self, pairs: list[tuple[int, int]], read: bool = False) -> Tensor:
        """`[P, H, K, V]` at (sequence, position)."""
        if self.edits is not None and self.edits.needs_clean_pass:
            raise ValueError('writes: expected edits of kind "add" only; the recurrence resolves delete and replace')
        _, _, H, K, V = self.shape
        wanted: dict[int, dict[int, list[int]]] = {}
        for i, (n, t) in enumerate(pairs):
            wanted.setdefault(n, {}).setdefault(t, []).append(i)
        found: dict[int, Tensor] = {}
        for n, b, start, _ in self.sequences():
            if n not in wanted:
                continue
            additions = _additions_by_position(self.edits, n)
            state = self._start(n)
            stops = sorted(set(wanted[n]) | set(additions))
            at = start
            for t in stops:
                # Between two stops the gates are pure products: fold the whole stretch into one weighted sum.
                state = self._advance(state, b, at, start + t + 1)
                at = start + t + 1
                seen = None
                for late, head, left, right in additions.get(t, ()):
                    seen = state if late and seen is None else seen
                    state = state.clone()
                    state[head] += torch.outer(left.to(state), right.to(state))
                for i in wanted[n].get(t, ()):
                    found[i] = seen if read and seen is not None else state
        return torch.stack([found[i] for i in range(len(pairs))]) if found else self.right.new_zeros(0, H, K, V)

    def _advance(self, state: Tensor, b: int, start: int, stop: int) -> Tensor:
        """State `[H, K, V]` at `start` carried through the writes `start..stop-1` of row b."""
        for lo in range(start, stop, 256):
            hi = min(lo + 256, stop)
            left, right, decay = self.left_of_heads(b, lo, hi), self.right[b, lo:hi], self.decay[b, lo:hi]
            if self.gate == "element":
                for t in range(hi - lo):
                    state = self._element_decay(decay[t]) * state + torch.einsum("hrk,hrv->hkv", left[t], right[t])
                continue
            total = decay.sum(0)
            # exp of (sum of what follows), never a quotient of products: strong decay underflows to 0, not 0/0.
            # Summed over later tokens only, not subtracted: a closed gate (-inf) must not become NaN.
            after = torch.cat((decay[1:], torch.zeros_like(decay[:1]))).flip(0).cumsum(0).flip(0)
            weight = after.exp()[..., None] if self.gate == "scalar" else after.exp()  # [t, H, 1 or K]
            written = torch.einsum("thrk,thrv->hkv", left * weight[:, :, None], right)
            state = self._element_decay(total) * state + written
        return state

    @without_autocast
    def norms(self) -> Tensor:
        """Frobenius norm of the state after every token, `[B, T, H]`, without storing states.

        Uses ||S_t||^2 = a^2 ||S_{t-1}||^2 + 2 a sum_r left^T S_{t-1} right + ||N_t||^2, chunk by chunk, where the gate
        is scalar. No such recurrence holds for other gates: of them every state is formed, one at a time.

        Raises:
            ValueError: writes with edits.
        """
        if self.edits is not None and len(self.edits):
            raise ValueError("norms: not defined for writes with edits; take norms of states(positions) instead")
        B, T, H, K, V = self.shape
        out = self.right.new_zeros(B, T, H)
        chunk = 64
        for n, b, start, stop in self.sequences():
            state = self._start(n)
            for t in range(start, stop) if self.gate != "scalar" else ():
                state = self._advance(state, b, t, t + 1)
                out[b, t] = state.flatten(1).norm(dim=1)
            if self.gate != "scalar":
                continue
            square = state.square().sum((1, 2))
            for lo in range(start, stop, chunk):
                hi = min(lo + chunk, stop)
                left = self.left_of_heads(b, lo, hi).permute(1, 0, 2, 3)  # [H, t, R, K]
                right = self.right[b, lo:hi].permute(1, 0, 2, 3)  # [H, t, R, V]
                decay = self.decay[b, lo:hi]
                cum = decay.T.cumsum(1)  # [H, t]
                past = torch.ones(hi - lo, hi - lo, dtype=torch.bool, device=cum.device).tril(-1)
                gram = torch.einsum("htrk,hsqk->htsrq", left, left) * torch.einsum("htrv,hsqv->htsrq", right, right)
                gram = gram.sum((3, 4))  # <N_t, N_s>
                # Between s and t the sum over s+1..t, again never a difference of cumulative sums.
                spans = decay.T[:, :, None].expand(-1, -1, hi - lo).tril(-1).cumsum(1)
                pair = spans.masked_fill(~past, -torch.inf).exp()
                cross = (gram * pair).sum(2) + cum.exp() * torch.einsum("htrk,hkv,htrv->ht", left, state, right)
                own = gram.diagonal(dim1=1, dim2=2)
                gained = (2 * cross + own)[:, :, None]
                squares = ((pair * pair) @ gained + gained)[..., 0] + (2 * cum).exp() * square[:, None]
                out[b, lo:hi] = squares.T.clamp_min(0).sqrt()
                state = self._advance(state, b, lo, hi)
                square = state.square().sum((1, 2))  # re-anchor: the recurrence alone would drift
        return out

    @without_autocast
    def cosine(self, atom: tuple[Tensor, Tensor]) -> Tensor:
        """Signed cosine of an atom and each native write: cos(v, left) * cos(w, right).

        Args:
            atom: `(v [K], w [V])`, or `(v [H, K], w [H, V])` for one atom a head.
        Returns:
            `[B, T, H, R]`; 0 where a write is zero.
        """
        if not isinstance(atom, (tuple, list)) or len(atom) != 2:
            raise ValueError(f"atom: expected a pair (v, w), got {said(atom)}")
        v, w = atom
        check_floats(**{"writes.right": self.right, "atom[0]": v, "atom[1]": w})
        _, _, H, K, V = self.shape
        if tuple(v.shape) not in ((K,), (H, K)) or tuple(w.shape) not in ((V,), (H, V)):
            got = f"{tuple(v.shape)}, {tuple(w.shape)}"
            raise ValueError(f"atom: expected v [K={K}] or [H={H}, K] and w [V={V}] or [H, V], got {got}")
        unit = torch.nn.functional.normalize
        left = self.left_of_heads()
        v, w = unit(v.to(left), dim=-1), unit(w.to(left), dim=-1)
        v, w = v.expand(H, K)[:, None], w.expand(H, V)[:, None]
        return (unit(left, dim=-1) * v).sum(-1) * (unit(self.right, dim=-1) * w).sum(-1)

    @without_autocast
    def propagate(self, edit: Edits, length: int | None = None) -> Tensor:
        """Key side of each edit's perturbation as its token and later ones read it.

        An addition `p q^T` made at token t stays rank 1 for ever: at token s >= t it is `p_s q^T`, and it changes that
        token's output by `(p_s . q_s) q`. Of one made after the read p_t is 0, since token t has not read it. Exact
        under teacher forcing, where the layer's own later inputs do not depend on its output.

        Args:
            edit: additions (`kind` "add" only), E of them.
            length: positions to follow, counted from the edit's own; None means to the end of the longest row.
        Returns:
            `[E, length, K]`: p_t, p_{t+1}, ...; zero past the end of the row. dtype of `right`.
        Raises:
            ValueError: edits of another kind, or out of range; an element gate, under which no perturbation stays rank
                1; a delta rule with more than one write a token.
        """
        check_type("edit", edit, Edits)
        if edit.needs_clean_pass:
            raise ValueError('edit: propagate takes kind "add" only; resolve delete and replace into additions first')
        if self.gate == "element":
            raise ValueError("propagate: an element gate does not keep a rank-1 perturbation at rank 1")
        if self.beta is not None:
            self._require_rank_one("propagate")
        batch, token, h = self._places(edit.row, edit.position, edit.head, "edit.")
        spans = [(start, stop) for _, _, start, stop in self.sequences()]
        if length is None:
            length = max((stop - start for start, stop in spans), default=0)
        out = self.right.new_zeros(len(edit), length, self.shape[3])
        if not len(edit) or not length:
            return out
        key, end = self.left_head(h), torch.tensor([stop for _, stop in spans])[edit.row].to(token.device)
        p = edit.left.to(self.right)
        out[:, 0] = p * (edit.when != AFTER).to(p)[:, None]
        for step in range(1, length):
            token = token + 1
            alive = token < end
            if not bool(alive.any()):
                break
            at = token.clamp(max=self.right.shape[1] - 1)
            decay = self.decay[batch, at, h].exp()
            decayed = p * (decay if decay.ndim == 2 else decay[:, None])
            if self.beta is not None:
                k = self.left[batch, at, key].squeeze(1)
                p = decayed - self.beta[batch, at, h][:, None].to(p) * k * (k * decayed).sum(1, keepdim=True)
            elif self.erase is not None:
                read, write = (x[batch, at, h] for x in self.erase)
                p = decayed + write * (read * p).sum(1, keepdim=True)
            else:
                p = decayed
            p = p * alive[:, None]
            out[:, step] = p
        return out

    def _require_rank_one(self, what: str) -> None:
        R = self.right.shape[3]
        if R != 1:
            raise ValueError(f"{what}: expected one write a token (R = 1), got R={R}; `native` tells them apart")


def _index(name: str, x, device: torch.device) -> Tensor:
    """int64, on the device; a number is `[]`."""
    if not isinstance(x, Tensor):
        found = integers(name, x)
        return torch.tensor(found if hasattr(x, "__iter__") else found[0], dtype=torch.int64, device=device)
    check_integers(name, x, "[...]")
    return x.to(device, torch.int64)


def _check_range(name: str, x: Tensor, size: int | Tensor, what: str) -> None:
    """Raises ValueError unless 0 <= x < size. Waits for a device, where an index out of range would end the process."""
    if unreadable(x) is not None:
        return
    bad = (x < 0) | (x >= size)
    if bool(bad.any()):
        limit = int(size[bad][0]) if isinstance(size, Tensor) else size
        raise ValueError(f"{name}: expected 0 <= {name.split('.')[-1]} < {limit} ({what}), got {int(x[bad][0])}")


def _additions_by_position(edits: Edits | None, row: int) -> dict[int, list[tuple[bool, int, Tensor, Tensor]]]:
    """{position: [(whether after the read, head, left, right), ...]} of one row's additions, those before first."""
    found: dict[int, list[tuple[bool, int, Tensor, Tensor]]] = {}
    if edits is not None:
        mine = (edits.row == row) | (edits.row < 0)
        for i in sorted(mine.nonzero().flatten().tolist(), key=lambda i: int(edits.when[i])):
            entry = (bool(edits.when[i] == AFTER), int(edits.head[i]), edits.left[i], edits.right[i])
            found.setdefault(int(edits.position[i]), []).append(entry)
    return found
