"""`SAE`: a dictionary of one head's state, whose atoms can stand in for what the model writes.

Source: J. Young, *WriteSAE: Sparse Autoencoders for Recurrent State*, arXiv 2605.12770. Letters: F atoms, k active, r
rank of an atom, K key size, V value size of the head.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._arguments import sizes
from ..ops.pursuit import pursuit, responses
from ..untrusted import is_integer, shown
from .sparse import Decode, exact_topk

KINDS = ("bilinear", "bilinear_tied", "bilinear_flat", "matrix", "flat")
BILINEAR = ("bilinear", "bilinear_tied", "bilinear_flat")
RANK_ONE = ("bilinear", "bilinear_tied", "matrix")
SPARSITIES = ("topk", "threshold", "pursuit")
TARGETS = ("state", "write")
_LARGEST = 2**59  # entries of a dense dictionary, so that no size in bytes overflows


class SparseCodes(NamedTuple):
    """Codes of states or writes: `values [..., j]` (>= 0, 0 where nothing fired) and int64 `indices [..., j]`.

    Top-k and pursuit dictionaries have j = k, descending. Threshold dictionaries have j = the most that fired in any
    one state of the call, rising index, padded with value 0.
    """

    values: Tensor
    indices: Tensor

    def __repr__(self) -> str:
        return f"SparseCodes(values={sizes(self.values)}, indices={sizes(self.indices)})"


class SAE(nn.Module):
    """A sparse dictionary of X `[K, V]` of one head: its states, or its writes.

    | kind | pre-activation of X - mean | atoms |
    |---|---|---|
    | `bilinear` | `sum_r v_enc^T X w_enc + b_enc` | `sum_r v_dec w_dec^T` |
    | `bilinear_tied` | the decoder's factors | same |
    | `bilinear_flat` | as bilinear | dense `[K, V]` |
    | `matrix` | `W_enc vec(X) + b_enc` | as bilinear |
    | `flat` | `W_enc vec(X) + b_enc` | dense `[K, V]` |

    The reconstruction is `mean + bias + sum_i a_i A_i`. Codes are the top k pre-activations, then ReLU
    (`sparsity="topk"`), or those above a fixed threshold (`sparsity="threshold"`: BatchTopK after training, JumpReLU),
    or found by orthogonal matching pursuit (`sparsity="pursuit"`, see `ops.pursuit`).

    A dictionary of states (`target="state"`, the paper's) has X = S_t. One of writes (`target="write"`) has X the
    increment that token t adds, `k_t u_t^T` (rank R for a rule of R writes a token); a write is nothing but its
    atoms, so mean and bias are 0.

    Args:
        K, V: key and value size of the head.
        F: atoms (`d_sae`).
        k: atoms active at once; for threshold dictionaries the number aimed at in training.
        kind: one of `KINDS`.
        r: rank of an atom and of its encoder.
        sparsity: "topk", "threshold" or "pursuit"; the last of writes, by kind bilinear_tied, b_enc 0. Its encoder is
            `metric` times its atoms, which have unit length in that metric.
        layer, head, model: where the states come from, or None.
        centred: whether `mean` is in use (it is zero otherwise). None: for a dictionary of states.
        training, metrics: plain dictionaries kept in the saved configuration.
        target: "state" or "write".
        empty: leave every tensor on the meta device, without memory, for a loader that puts its own in.

    Attributes (parameters and buffers, float32):
        v_enc `[F, r, K]`, w_enc `[F, r, V]`, or W_enc `[F, K*V]` (row-major: index k V + v); b_enc `[F]`
        v_dec `[F, r, K]`, w_dec `[F, r, V]`, or W_dec `[F, K*V]`; bias `[K, V]`; mean `[K, V]`; threshold `[F]` or None
        metric `[K, K]` of the key side in which pursuit measures errors, `tr E^T M E`, or None

    Raises:
        ValueError: a size or name out of range, naming the argument.
    """

    mean: Tensor
    threshold: Tensor | None
    metric: Tensor | None

    def __init__(
        self,
        K: int,
        V: int,
        F: int,
        k: int = 32,
        kind: str = "bilinear",
        r: int = 1,
        sparsity: str = "topk",
        layer: int | None = None,
        head: int | None = None,
        model: str | None = None,
        centred: bool | None = None,
        training: dict | None = None,
        metrics: dict | None = None,
        *,
        target: str = "state",
        empty: bool = False,
    ):
        super().__init__()
        for name, value in (("K", K), ("V", V), ("F", F), ("k", k), ("r", r)):
            if not is_integer(value, 1):
                raise ValueError(f"{name}: expected an integer >= 1, got {shown(value)}")
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {shown(kind)}")
        if sparsity not in SPARSITIES:
            raise ValueError(f"sparsity: expected one of {', '.join(SPARSITIES)}, got {shown(sparsity)}")
        if target not in TARGETS:
            raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {shown(target)}")
        if sparsity == "pursuit" and (target != "write" or kind != "bilinear_tied"):
            raise ValueError(
                f"sparsity: pursuit codes writes by their atoms, expected target write and kind bilinear_tied, got "
                f"target {target} and kind {kind}"
            )
        if k > F:
            raise ValueError(f"k: expected k <= F={F}, got {k}")
        if r > min(K, V):
            raise ValueError(f"r: expected a rank <= min(K, V) = {min(K, V)}, got {r}")
        if kind == "flat" and r != 1:
            raise ValueError(f"r: kind flat has neither factored encoder nor atoms, expected r = 1, got {r}")
        if F * K * V > _LARGEST:
            raise ValueError(f"F: expected F * K * V <= {_LARGEST:,}, got {F:,} * {K:,} * {V:,}")
        for name, value in (("layer", layer), ("head", head)):
            if value is not None and not is_integer(value):
                raise ValueError(f"{name}: expected an integer >= 0 or None, got {shown(value)}")
        if model is not None and not isinstance(model, str):
            raise ValueError(f"model: expected a name or None, got {shown(model)}")
        centred = target == "state" if centred is None else centred
        if not isinstance(centred, bool):
            raise ValueError(f"centred: expected true or false, got {shown(centred)}")
        if centred and target == "write":
            raise ValueError("centred: a dictionary of writes has no mean, expected false, got true")
        for name, value in (("training", training), ("metrics", metrics)):
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name}: expected a dictionary or None, got {shown(value)}")
        self.K, self.V, self.F, self.k, self.kind, self.r, self.sparsity = K, V, F, k, kind, r, sparsity
        self.layer, self.head, self.model, self.centred, self.target = layer, head, model, centred, target
        self.training_record, self.metrics = dict(training or {}), dict(metrics or {})

        def rows(*shape: int) -> nn.Parameter:  # random unit vectors along the last axis
            if empty:
                return nn.Parameter(torch.empty(shape, device="meta"))
            return nn.Parameter(nn.functional.normalize(torch.randn(shape), dim=-1))

        def zeros(*shape: int) -> Tensor:
            return torch.empty(shape, device="meta") if empty else torch.zeros(shape)

        if self.rank_one_atoms:
            self.v_dec, self.w_dec = rows(F, r, K), rows(F, r, V)
        else:
            self.W_dec = rows(F, K * V)
        if kind in ("bilinear", "bilinear_flat"):
            self.v_enc, self.w_enc = rows(F, r, K), rows(F, r, V)
        elif kind != "bilinear_tied":
            self.W_enc = rows(F, K * V)
        self.b_enc = nn.Parameter(zeros(F))
        self.bias = nn.Parameter(zeros(K, V))
        self.register_buffer("mean", zeros(K, V))
        self.register_buffer("threshold", zeros(F) if sparsity == "threshold" else None)
        identity = torch.eye(K, device="meta" if empty else None)
        self.register_buffer("metric", identity if sparsity == "pursuit" else None)

    # ---- what it is -------------------------------------------------------------------------------------------

    @property
    def d_sae(self) -> int:
        """F, under the name other libraries use."""
        return self.F

    @property
    def bilinear_encoder(self) -> bool:
        """Whether the encoder is factored, so that it runs on writes without states."""
        return self.kind in BILINEAR

    @property
    def rank_one_atoms(self) -> bool:
        """Whether atoms are factored, so that one can be written in a write's stead."""
        return self.kind in RANK_ONE

    @property
    def compute_dtype(self) -> torch.dtype:
        """What codes are computed in, float32 at least: what is encoded may be smaller than a half can be."""
        return torch.promote_types(self.b_enc.dtype, torch.float32)

    def extra_repr(self) -> str:
        sizes = f"K={self.K}, V={self.V}, F={self.F}, k={self.k}, r={self.r}"
        return f"{self.kind}, {sizes}, {self.sparsity} of {self.target}s, site=({self.layer}, {self.head})"

    def encoder(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(v_enc [F, r, K], w_enc [F, r, V], b [F])` acting on raw states or writes: b has the centring folded in.

        `ops.encode(writes, v_enc[None], w_enc[None], b[None], k=sae.k, threshold=sae.threshold, heads=[head])`; for a
        dictionary of writes, `writes.memoryless()`.

        Raises:
            ValueError: a kind with a dense encoder, which cannot run on writes.
        """
        if not self.bilinear_encoder:
            raise ValueError(
                f"kind {self.kind} has a dense encoder, which needs states: use encode(states); the kinds that "
                f"encode from writes are {', '.join(BILINEAR)}"
            )
        v, w = (self.v_dec, self.w_dec) if self.kind == "bilinear_tied" else (self.v_enc, self.w_enc)
        if self.metric is not None:  # and no mean
            v, w, b, metric = (x.to(self.compute_dtype) for x in (v, w, self.b_enc, self.metric))
            return v @ metric, w, b
        return v, w, self.b_enc - torch.einsum("frk,kv,frv->f", v, self.mean, w)

    def atoms(self) -> tuple[Tensor, Tensor]:
        """`(v_dec [F, r, K], w_dec [F, r, V])`.

        Raises:
            ValueError: a kind whose atoms are dense.
        """
        if not self.rank_one_atoms:
            raise ValueError(
                f"kind {self.kind} has dense atoms; the kinds whose atoms are outer products are {', '.join(RANK_ONE)}"
            )
        return self.v_dec, self.w_dec

    # ---- encode, decode ---------------------------------------------------------------------------------------

    def encoder_matrix(self) -> Tensor:
        """`[F, K*V]`: the encoder as one dense matrix on row-major states."""
        if not self.bilinear_encoder:
            return self.W_enc
        v, w, _ = self.encoder()
        return torch.einsum("frk,frv->fkv", v, w).flatten(1)

    def atom_matrix(self) -> Tensor:
        """`[F, K*V]`: the atoms, dense and row-major."""
        if not self.rank_one_atoms:
            return self.W_dec
        return torch.einsum("frk,frv->fkv", self.v_dec, self.w_dec).flatten(1)

    def preactivations(self, X: Tensor) -> Tensor:
        """Raw pre-activations, bias included: `[..., K, V]` to `[..., F]`."""
        centred = self._check(X) - self.mean
        return centred.flatten(-2) @ self.encoder_matrix().to(centred).T + self.b_enc

    def encode(self, X: Tensor) -> SparseCodes:
        """Codes of states, or of writes as matrices.

        Args:
            X: `[..., K, V]` floating (cast to the dictionary's dtype, float32 at least).
        Raises:
            ValueError: a wrong shape or dtype, or a pursuit dictionary, which needs a write's factors.
        """
        if self.sparsity == "pursuit":
            raise ValueError("X: a pursuit dictionary codes factors, expected encode_writes(left, right)")
        return self._chosen(self.preactivations(X), self.k)

    def encode_writes(self, left: Tensor, right: Tensor, k: int | None = None) -> SparseCodes:
        """Codes of writes `sum_r left_r right_r^T`, without forming them where the encoder is factored.

        Args:
            left, right: `[..., R, K]` and `[..., R, V]` floating.
            k: atoms of a write, in place of the dictionary's own k.
        Raises:
            ValueError: a dictionary of states; a wrong shape, dtype or k; a k for one with thresholds.
        """
        if self.target != "write":
            raise ValueError("target: expected a dictionary of writes, got one of states: use encode(states)")
        for name, x, letter, size in (("left", left, "K", self.K), ("right", right, "V", self.V)):
            if x.ndim < 2 or x.shape[-1] != size or not x.is_floating_point():
                raise ValueError(f"{name}: expected floating [..., R, {letter}={size}], got {x.dtype} {tuple(x.shape)}")
        if left.shape[:-1] != right.shape[:-1]:
            raise ValueError(f"right: expected [..., R, V] beside left {tuple(left.shape)}, got {tuple(right.shape)}")
        if k is not None and (not is_integer(k, 1) or k > self.F or self.threshold is not None):
            raise ValueError(f"k: expected an integer, 1 <= k <= F={self.F}, of one without thresholds, got {shown(k)}")
        k = self.k if k is None else k
        dtype = self.compute_dtype
        left, right = left.to(dtype), right.to(dtype)
        if self.sparsity == "pursuit":
            v, w, _ = self.encoder()
            return SparseCodes(*pursuit(left, right, *(x.to(dtype) for x in (v, w, *self.atoms())), k))
        if not self.bilinear_encoder:
            return self._chosen(self.preactivations(torch.einsum("...rk,...rv->...kv", left, right)), k)
        v, w, b = (x.to(dtype) for x in self.encoder())
        lead = left.shape[:-2]
        pre = responses(v, w, left.reshape(-1, *left.shape[-2:]), right.reshape(-1, *right.shape[-2:])) + b
        return self._chosen(pre.view(*lead, self.F), k)

    def _chosen(self, pre: Tensor, k: int) -> SparseCodes:
        """The pre-activations `[..., F]` that fire."""
        if self.threshold is None:
            return SparseCodes(*exact_topk(pre, k))
        fires = pre > self.threshold
        most = max(int(fires.sum(-1).max()) if fires.numel() else 0, 1)
        # Firing atoms first, in rising order: a stable sort of the mask.
        indices = (~fires).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :most]
        return SparseCodes((pre * fires).gather(-1, indices), indices)

    def decode(self, codes: SparseCodes) -> Tensor:
        """States from codes: `[..., j]` values and indices to `[..., K, V]`, mean and bias included."""
        values, indices = codes.values, codes.indices
        shape = indices.shape[:-1]
        values, indices = values.reshape(-1, values.shape[-1]), indices.reshape(-1, indices.shape[-1])
        values = values.to(self.compute_dtype)
        if self.rank_one_atoms:
            sum_ = Decode.apply(values, indices, self.v_dec.to(values), self.w_dec.to(values))
        else:
            dense = values.new_zeros(len(values), self.F).scatter_add(1, indices, values)
            sum_ = (dense @ self.W_dec.to(values)).view(-1, self.K, self.V)
        return (sum_ + self.bias + self.mean).view(*shape, self.K, self.V)

    def forward(self, X: Tensor) -> Tensor:
        """Reconstruction of states `[..., K, V]`."""
        return self.decode(self.encode(X))

    def _check(self, X: Tensor) -> Tensor:
        if X.ndim < 2 or tuple(X.shape[-2:]) != (self.K, self.V):
            raise ValueError(f"X: expected states [..., K={self.K}, V={self.V}], got shape {tuple(X.shape)}")
        if not X.is_floating_point():
            raise ValueError(f"X: expected a floating dtype, got {X.dtype}")
        return X.to(self.compute_dtype)

    @torch.no_grad()
    def normalize_(self) -> SAE:
        """Scales decoder factors to unit norm, in place. The trained function uses their directions only, so a
        dictionary in training is unchanged by it; one whose atom norms carry meaning (a published one) is not."""
        for name in ("v_dec", "w_dec", "W_dec"):
            if hasattr(self, name):
                p = getattr(self, name)
                p.copy_(nn.functional.normalize(p, dim=-1))
        return self

    # ---- files ------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `cfg.json` and `sae.safetensors` into a folder, made if need be."""
        from .checkpoint import save

        save(self, folder)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        subfolder: str | None = None,
        revision: str | None = None,
        batchtopk: str | float | None = None,
    ) -> SAE:
        """Loads a folder written by `save_pretrained`, a checkpoint as the paper's code publishes it, or either from a
        Hugging Face repository.

            SAE.from_pretrained("JackYoung27/writesae-ckpts", subfolder="writesae/qwen0p8b/L9_H4")

        A published checkpoint is `best.pt` with `config.json` beside it; `load_published` says what becomes of it. A
        folder with dictionaries in folders below is refused with their names, also where there is only one.

        Args:
            path_or_repo: "default" (the embedded model's dictionary), a folder, a `.pt` file, or a repository id such
                as "someone/dictionaries".
            subfolder: folder inside it (one folder a site, such as "L9H4"). Of a repository nothing else is
                downloaded, and `training_record["hub"]` says which commit it came from.
            revision: branch, tag or commit of a repository.
            batchtopk: of a published BatchTopK checkpoint, which has no threshold: "topk" for plain top k, with the k
                of its configuration, or a threshold >= 0. `estimate_threshold` finds one from states.
        Raises:
            FileNotFoundError: nothing there, on this machine or the hub.
            PermissionError, ConnectionError: a repository that may not be read; the hub out of reach.
            ValueError: a file of another format, version, kind or size, or one that needs unpickling; a folder with
                both kinds of file; a published BatchTopK checkpoint without `batchtopk`, or `batchtopk` for another.
        """
        from .checkpoint import load

        if str(path_or_repo) == "default":
            from ..default import dictionaries

            path_or_repo = next(iter(dictionaries().values()))
        return load(path_or_repo, subfolder, revision, batchtopk)
