"""`Writes`: one layer's memory trace in factored form, and what can be asked of it without storing states.

Every supported write rule is, per head,

    S_t = decay_t o S_{t-1} + sum_r left_{t,r} right_{t,r}^T          S_t in R^{K x V}

so (decay, left, right) carry the whole trajectory at 1/64 of its size (K = V = 128). Method: J. Young, *WriteSAE:
Sparse Autoencoders for Recurrent State*, arXiv 2605.12770.

Letters: B row, T position, H value head, Hl key (left) head, R writes a token, K key size, V value size, N sequences
(N = B, or the number of packed sequences when `cu_seqlens` is given, where B = 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._arguments import check_floats, check_integers, check_type, integers, said
from ._autocast import without_autocast
from .edits import AFTER, Edits

_FORGET = -1e4  # a log-decay whose exp is 0, and whose sums over a chunk stay finite


@dataclass(frozen=True, repr=False)
class Writes:
    """The rank-1 writes of one layer over a batch, as the forward pass made them.

    Attributes:
        decay: log-decay. `[B, T, H]` (scalar gate), `[B, T, H, K]` (channel gate), or `[B, T, H, V]` together with
            `decay_matrix` (element gate: log-decay of entry (n, c) is `decay[..., c] * decay_matrix[h, n, c]`).
        left: `[B, T, Hl, R, K]` key side as used (after normalisation). Value head h reads left head h // (H / Hl).
        right: `[B, T, H, R, V]` value side: the actual increment, erase already inside.
        beta: `[B, T, H]` erase strength of a delta rule (`S -= beta k k^T (decay S)`), None for additive rules.
        erase: for general low-rank transitions, `(read, write)`, each `[B, T, H, K]`: the transition applied to a
            perturbation is `Diag(e^decay) + write read^T`. None for additive and delta rules.
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

    def __repr__(self) -> str:
        B, T, H, K, V = self.shape
        Hl, R = self.left.shape[2:4]
        gate = "element" if self.decay_matrix is not None else "channel" if self.decay.ndim == 4 else "scalar"
        rule = "delta" if self.beta is not None else "low-rank" if self.erase is not None else "additive"
        more = [f"{gate} gate", f"{rule} rule", str(self.right.dtype).removeprefix("torch.")]
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
    def num_sequences(self) -> int:
        """N: rows, or sequences packed into one."""
        return self.right.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def nbytes(self) -> int:
        """Bytes held by the three factors."""
        return sum(x.numel() * x.element_size() for x in (self.decay, self.left, self.right))

    def memoryless(self) -> Writes:
        """The same writes in a memory that holds one at a time: each state is the write of its own token.

        For codes of writes instead of states. Initial state and edits are no writes, and left out.

        Raises:
            ValueError: a channel or element gate.
        """
        if self.decay.ndim != 3:
            raise ValueError(f"writes: expected a scalar gate (decay [B, T, H]), got decay {tuple(self.decay.shape)}")
        decay = torch.full_like(self.decay, _FORGET, dtype=torch.promote_types(self.decay.dtype, torch.float32))
        return replace(self, decay=decay, beta=None, erase=None, initial_state=None, edits=None)

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

    # ---- helpers on one sequence ------------------------------------------------------------------------------

    def _start(self, n: int) -> Tensor:
        """`[H, K, V]`: state of sequence n before its first token."""
        _, _, H, K, V = self.shape
        return self.right.new_zeros(H, K, V) if self.initial_state is None else self.initial_state[n].to(self.right)

    def _left_of_heads(self, b: int, start: int, stop: int) -> Tensor:
        """`[t, H, R, K]`: left factors repeated to value heads."""
        group = self.right.shape[2] // self.left.shape[2]
        return self.left[b, start:stop].repeat_interleave(group, dim=1)

    def _element_decay(self, decay: Tensor) -> Tensor:
        """`[..., H]`, `[..., H, K]` or `[..., H, V]` log-decay to a factor that broadcasts on `[..., H, K, V]`."""
        if self.decay_matrix is not None:
            return (decay[..., None, :] * self.decay_matrix).exp()
        if decay.ndim == self.decay.ndim - 2 and self.decay.ndim == 4:
            return decay.exp()[..., None]
        return decay.exp()[..., None, None]

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
            left, right, decay = self._left_of_heads(b, lo, hi), self.right[b, lo:hi], self.decay[b, lo:hi]
            if self.decay_matrix is not None:
                for t in range(hi - lo):
                    state = self._element_decay(decay[t]) * state + torch.einsum("hrk,hrv->hkv", left[t], right[t])
                continue
            total = decay.sum(0)
            # exp of (sum of what follows), never a quotient of products: strong decay underflows to 0, not 0/0.
            # Summed over later tokens only, not subtracted: a closed gate (-inf) must not become NaN.
            after = torch.cat((decay[1:], torch.zeros_like(decay[:1]))).flip(0).cumsum(0).flip(0)
            weight = after.exp()[..., None] if decay.ndim == 2 else after.exp()  # [t, H, 1 or K]
            written = torch.einsum("thrk,thrv->hkv", left * weight[:, :, None], right)
            state = self._element_decay(total) * state + written
        return state

    @without_autocast
    def norms(self) -> Tensor:
        """Frobenius norm of the state after every token, `[B, T, H]`, without storing states.

        Scalar gates only. Uses ||S_t||^2 = a^2 ||S_{t-1}||^2 + 2 a sum_r left^T S_{t-1} right + ||N_t||^2, chunk by
        chunk.
        """
        self._require_scalar("norms")
        if self.edits is not None and len(self.edits):
            raise ValueError("norms: not defined for writes with edits; take norms of states(positions) instead")
        B, T, H, K, V = self.shape
        out = self.right.new_zeros(B, T, H)
        chunk = 64
        for n, b, start, stop in self.sequences():
            state = self._start(n)
            square = state.square().sum((1, 2))
            for lo in range(start, stop, chunk):
                hi = min(lo + chunk, stop)
                left = self._left_of_heads(b, lo, hi).permute(1, 0, 2, 3)  # [H, t, R, K]
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
        if v.shape[-1] != K or w.shape[-1] != V:
            got = f"{tuple(v.shape)}, {tuple(w.shape)}"
            raise ValueError(f"atom: expected v [..., K={K}] and w [..., V={V}], got {got}")
        unit = torch.nn.functional.normalize
        left = self.left.repeat_interleave(H // self.left.shape[2], dim=2)
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
        """
        check_type("edit", edit, Edits)
        if edit.needs_clean_pass:
            raise ValueError('edit: propagate takes kind "add" only; resolve delete and replace into additions first')
        if self.decay_matrix is not None:
            raise ValueError("propagate: an element gate does not keep a rank-1 perturbation at rank 1")
        spans = {n: (b, start, stop) for n, b, start, stop in self.sequences()}
        _, _, H, K, _ = self.shape
        group = H // self.left.shape[2]
        if length is None:
            length = max((stop - start for _, start, stop in spans.values()), default=0)
        out = self.right.new_zeros(len(edit), length, K)
        if not len(edit) or not length:
            return out
        row, position, head = edit.row.tolist(), edit.position.tolist(), edit.head.tolist()
        for n, t, h in zip(row, position, head, strict=True):
            if n not in spans or not 0 <= t < spans[n][2] - spans[n][1] or not 0 <= h < H:
                raise ValueError(f"edit: out of range: row {n}, position {t}, head {h} for shape {self.shape}")
        device = self.right.device
        batch = torch.tensor([spans[n][0] for n in row], device=device)
        token = torch.tensor([spans[n][1] + t for n, t in zip(row, position, strict=True)], device=device)
        end = torch.tensor([spans[n][2] for n in row], device=device)
        h = torch.tensor(head, device=device)
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
                k = self.left[batch, at, h // group, 0]
                p = decayed - self.beta[batch, at, h][:, None].to(p) * k * (k * decayed).sum(1, keepdim=True)
            elif self.erase is not None:
                read, write = (x[batch, at, h] for x in self.erase)
                p = decayed + write * (read * p).sum(1, keepdim=True)
            else:
                p = decayed
            p = p * alive[:, None]
            out[:, step] = p
        return out

    def _require_scalar(self, what: str):
        if self.decay.ndim != 3:
            raise ValueError(f"{what}: expected a scalar gate (decay [B, T, H]), got decay {tuple(self.decay.shape)}")


def _additions_by_position(edits: Edits | None, row: int) -> dict[int, list[tuple[bool, int, Tensor, Tensor]]]:
    """{position: [(whether after the read, head, left, right), ...]} of one row's additions, those before first."""
    found: dict[int, list[tuple[bool, int, Tensor, Tensor]]] = {}
    if edits is not None:
        for i in sorted((edits.row == row).nonzero().flatten().tolist(), key=lambda i: int(edits.when[i])):
            entry = (bool(edits.when[i] == AFTER), int(edits.head[i]), edits.left[i], edits.right[i])
            found.setdefault(int(edits.position[i]), []).append(entry)
    return found
