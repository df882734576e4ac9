"""The readers' metric: errors of a memory as the model's own later queries see them.

What token t leaves in the memory, E, changes the output of token s > t by `E^T r_s`, `r_s = (prod_{t < j <= s}
alpha_j (I - beta_j k_j k_j^T)) q_s` (key side only). So the expected squared change, over all later tokens, is
`tr E^T M E`, M the second moment of the readers. Few directions hold most of it: an error elsewhere nobody reads. With
the root R of M, `tr E^T M E = |R E|^2`: a dictionary learns in this metric by learning from keys times R.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..models.binding import Binding
from ..models.quiet import quiet
from ..ops.rule import RuleCall, RuleOutput
from .sae import SAE

_FLOOR = 1e-3  # of the mean eigenvalue, added to all: directions that nobody read in the text seen may be read yet
_FOLLOWED = 32  # later tokens at least that a write must have to count


@torch.no_grad()
@quiet()
def reader_moments(model, ids: Tensor, layers: Iterable[int], batch: int = 16) -> dict[int, Tensor]:
    """Second moment of the readers of every head: for a token's write, the sum over all later tokens of its passage of
    `r_s r_s^T`, averaged over the tokens that at least 32 others follow.

    Args:
        model: causal language model in evaluation mode, see `attach`.
        ids: `[N, T]` tokens of passages, T > 32.
        layers: of it, with a recurrent state of one write a token under a scalar or channel gate.
        batch: passages in one forward pass.

    Returns:
        {layer: `[H, K, K]` float32, on the layer's device}.

    Raises:
        ValueError: passages too short; a layer of another kind, or with an element gate or two writes a token.
    """
    from ..models import Stopped, intercept, stopping_after
    from ..models import layers as find_layers
    from ..models.sites import device_of

    if ids.ndim != 2 or not len(ids) or ids.shape[1] <= _FOLLOWED:
        raise ValueError(f"ids: expected [N, T] of more than {_FOLLOWED} tokens, got shape {tuple(ids.shape)}")
    layers = sorted(set(layers))
    total: dict[int, Tensor] = {}

    def watching(layer: int, binding: Binding):
        def handler(call: RuleCall, output_final_state: bool) -> RuleOutput:
            out = call.run(return_writes=True, output_final_state=output_final_state)
            found = _moments(binding.queries(call).float(), out.writes)
            total[layer] = found if layer not in total else total[layer] + found
            return out

        return handler

    device = device_of(model.get_input_embeddings())
    calls = {site.layer_index: watching(site.layer_index, site.binding) for site in find_layers(model)}
    missing = [layer for layer in layers if layer not in calls]
    if missing:
        raise ValueError(f"layers: expected layers with a recurrent state, {sorted(calls)}, got {missing}")
    calls = {layer: calls[layer] for layer in layers}
    with intercept(model, private=True, calls=calls), stopping_after(model, layers[-1]):
        for part in ids.split(batch):
            try:
                model(input_ids=part.long().to(device), use_cache=False)
            except Stopped:
                pass
    return {layer: (x / (len(ids) * (ids.shape[1] - _FOLLOWED))).float() for layer, x in total.items()}


def _moments(q: Tensor, writes) -> Tensor:
    """`[H, K, K]` float64: sums over the tokens that count. q `[B, T, Hk, K]` as it reads.

    Backwards: what the tokens from t on see of the memory before t is `A_t^T (q_t q_t^T + R_t) A_t`, R_t what those
    after t see, `A_t = (I - beta_t k_t k_t^T) Diag(alpha_t)`, without the erase where the rule has none.
    """
    if writes.gate == "element" or writes.transition == "low rank":
        raise ValueError(f"readers: expected one write a token under a scalar or channel gate, got {writes!r}")
    B, T, H, K, _ = writes.shape
    q = q[:, :, writes.left_head(torch.arange(H, device=q.device))]  # the queries' heads are the keys'
    keys = writes.rank_one("readers")[0].float()
    alpha = writes.decay.float().exp()
    alpha = alpha[..., None] if writes.gate == "scalar" else alpha  # [B, T, H, 1 or K]
    seen = q.new_zeros(B, H, K, K)
    total = torch.zeros(H, K, K, dtype=torch.float64, device=q.device)
    for t in range(T - 1, -1, -1):
        if t < T - _FOLLOWED:
            total += seen.sum(0)
        seen = seen + q[:, t, :, :, None] * q[:, t, :, None]
        if writes.beta is not None:
            k, b = keys[:, t], writes.beta[:, t, :, None].float()
            on = b * (seen @ k[..., None])[..., 0]  # [B, H, K]
            twice = (b * (on * k).sum(-1, keepdim=True))[..., None]
            cross = on[..., :, None] * k[..., None, :]
            seen = seen - cross - cross.mT + twice * k[..., :, None] * k[..., None, :]
        seen = seen * alpha[:, t, :, :, None] * alpha[:, t, :, None, :]
    return total


def roots(moments: Mapping[int, Tensor], sites: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
    """{site: symmetric root `[K, K]` of its head's moment}, of trace K before a small floor is added."""
    found = {}
    for layer, head in sites:
        M = moments[layer][head].double().cpu()
        K = len(M)
        if not float(M.trace()) > 0:
            raise ValueError(f"metric: nothing that site ({layer}, {head}) writes is ever read in this text")
        values, vectors = torch.linalg.eigh(M / M.trace() * K + _FLOOR * torch.eye(K, dtype=M.dtype))
        found[layer, head] = (vectors * values.clamp_min(0).sqrt() @ vectors.T).float()
    return found


@torch.no_grad()
def seen_through(sae: SAE, root: Tensor) -> SAE:
    """The same dictionary for keys multiplied by `root` (`[K, K]`, symmetric, invertible): a copy that fires alike.

    Raises:
        ValueError: a kind without factors on both sides.
    """
    if not (sae.bilinear_encoder and sae.rank_one_atoms) or (sae.kind == "bilinear_tied" and sae.metric is None):
        raise ValueError(f"sae: expected encoder and atoms of factors of their own, got kind {sae.kind}")
    out = copy.deepcopy(sae)
    root = root.double().to(sae.mean.device)
    inverse = torch.linalg.inv(root)
    if out.metric is None:
        out.v_enc.copy_(out.v_enc.double() @ inverse)
    else:
        metric = inverse @ out.metric.double() @ inverse
        out.metric.copy_((metric + metric.T) / 2)
    out.v_dec.copy_(out.v_dec.double() @ root)
    for x in (out.mean, out.bias):
        x.copy_(root @ x.double())
    return out
