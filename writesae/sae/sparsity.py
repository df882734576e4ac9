"""How a dictionary in training chooses the atoms that fire, beside exact top k.

| sparsity | fires | code | exported as |
|---|---|---|---|
| `topk` | the k largest pre-activations of a state, if > 0 | pre-activation | top k |
| `batchtopk` | the k P largest of a batch of P states, if > 0 | pre-activation | mean threshold of the last steps |
| `jumprelu` | those over a learnt threshold of the atom | pre-activation | that threshold |
| `gated` | those whose gate is open: z + b_gate > 0 | relu(e^r z + b) | encoder and threshold that do the same |

z is the pre-activation without bias. BatchTopK: Bussmann et al., arXiv 2412.06410. JumpReLU: Rajamanoharan et al.,
arXiv 2407.14435, whose thresholds are trained by a rectangle kernel. Gated: Rajamanoharan et al., arXiv 2404.16014. The
penalties of the last two are weighed so that k atoms fire on average: the weight rises while more do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .sae import SAE

SPARSITIES = ("topk", "batchtopk", "jumprelu", "gated")
_KEEP = 0.9  # of the mean threshold of BatchTopK, a step
_FOLLOW = 0.05  # power of L0 / k by which the penalty's weight changes a step
_WEIGHTS = 1e-4, 10.0  # its range: beyond, nothing but the penalty (or none of it) counts
_WIDTHS = 0.5, 0.05  # of the rectangle kernel, as a share of the threshold: first, last

Values = Callable[[Tensor], Tensor]  # indices [P, j] to z [P, j] with gradients


class Jump(torch.autograd.Function):
    """`x` where over `threshold`, else 0, and whether it is; a rectangle of `width` around it gives its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, threshold: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, threshold, width)
        fires = (x > threshold).to(x.dtype)
        return x * fires, fires

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_fires):
        x, threshold, width = ctx.saved_tensors
        near = ((x - threshold).abs() < width / 2).to(x.dtype) / width
        return grad * (x > threshold), -near * (threshold * grad + grad_fires), None


def packed(on: Tensor) -> tuple[Tensor, Tensor]:
    """Where a mask `[P, F]` is true: indices `[P, j]`, rising, padded with others, and which are no padding."""
    most = max(int(on.sum(1).max()), 1)
    indices = (~on).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]
    return indices, on.gather(1, indices)


def level_of(pre: Tensor, k: int) -> Tensor:
    """The threshold, > 0, over which k of the pre-activations `[P, F]` of a state lie on average."""
    return pre.flatten().topk(min(k * len(pre), pre.numel()), sorted=False).values.amin().clamp_min(1e-6)


class Sparsity(nn.Module):
    """State and rule of one sparsity other than top k.

    Args:
        kind: "batchtopk", "jumprelu" or "gated".
        level: the threshold to start from, a scalar tensor.
        F, k: atoms, and how many of them to aim at.
        penalty: weight of the penalty at the start.
    """

    def __init__(self, kind: str, level: Tensor, F: int, k: int, penalty: float):
        super().__init__()
        self.kind, self.k = kind, k
        self.register_buffer("weight", torch.full_like(level, penalty))
        if kind == "batchtopk":
            self.register_buffer("level", level)
        elif kind == "jumprelu":
            self.log_threshold = nn.Parameter(level.log().expand(F).clone())
        else:
            self.b_gate, self.r_mag = nn.Parameter(-level.expand(F).clone()), nn.Parameter(level.new_zeros(F))

    def codes(self, z: Tensor, values: Values, bias: Tensor, done: float):
        """Codes of a batch.

        Args:
            z: `[P, F]` pre-activations without bias; read only.
            values: of chosen atoms, with gradients.
            bias: `[F]`, of the encoder.
            done: share of the training done, 0 to 1.

        Returns:
            values `[P, j]` and indices `[P, j]`, the penalty (a scalar), and the codes that an auxiliary reconstruction
            by frozen atoms is asked of (gated), or None.
        """
        at = lambda x, indices: x.gather(0, indices.flatten()).view_as(indices)  # noqa: E731
        if self.kind == "batchtopk":
            pre = (z + bias).detach()
            level = level_of(pre, self.k)
            indices, on = packed(pre >= level)
            with torch.no_grad():
                self.level.lerp_(level, 1 - _KEEP)
            return (values(indices) + at(bias, indices)).relu() * on, indices, z.new_zeros(()), None
        if self.kind == "jumprelu":
            wide, narrow = _WIDTHS
            share = narrow + (wide - narrow) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
            threshold = self.log_threshold.exp()
            indices, on = packed((z + bias).detach() > threshold.detach() * (1 - share / 2))
            limit = at(threshold, indices)
            made, fires = Jump.apply(values(indices) + at(bias, indices), limit, share * limit.detach())
            penalty = (fires * on).sum(1).mean() / self.k
            return made * on, indices, self._weighed(penalty, penalty), None
        indices, on = packed((z + self.b_gate).detach() > 0)
        z_at = values(indices)
        gate = (z_at + at(self.b_gate, indices)).relu() * on
        made = (at(self.r_mag.exp(), indices) * z_at + at(bias, indices)).relu() * on
        return made, indices, self._weighed(gate.sum(1).mean(), (made > 0).sum(1).to(z.dtype).mean() / self.k), gate

    def _weighed(self, penalty: Tensor, ratio: Tensor) -> Tensor:
        weighed = self.weight * penalty
        with torch.no_grad():
            self.weight = (self.weight * ratio.detach().clamp(0.25, 4) ** _FOLLOW).clamp(*_WEIGHTS)
        return weighed

    @torch.no_grad()
    def revive(self, at: Tensor) -> None:
        """Gives replaced atoms `at [n]` the mean threshold."""
        for p in self.parameters():
            p[at] = p.mean()

    @torch.no_grad()
    def fold_into(self, sae: SAE) -> None:
        """Sets encoder and threshold of a threshold dictionary, so that it fires as this one."""
        if self.kind == "batchtopk":
            sae.threshold.copy_(self.level.expand(sae.F))
        elif self.kind == "jumprelu":
            sae.threshold.copy_(self.log_threshold.exp())
        else:
            gain = self.r_mag.exp().to(sae.b_enc.device)
            encoder = sae.v_enc if sae.bilinear_encoder else sae.W_enc
            encoder.mul_(gain.view(-1, *[1] * (encoder.ndim - 1)))
            sae.threshold.copy_((sae.b_enc - gain * self.b_gate.to(gain)).clamp_min(0))
