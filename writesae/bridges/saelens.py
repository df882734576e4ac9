"""SAELens knows our dictionaries once this is imported, as the architecture `writesae_bilinear`. Needs sae-lens, the
extra `saelens`.

    import sae_lens, writesae.bridges.saelens
    sae = sae_lens.SAE.load_from_disk("exported")              # of `writesae export saelens`
    sae = writesae.bridges.saelens.to_saelens(ours)            # in memory

Every kind of dictionary is there under that one name. It works on states (or writes) as vectors `[..., K*V]`,
row-major, since that is what SAELens knows, and its codes are `[..., F]`, zeros included: F numbers for the k of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..sae import SAE
from ..sae.sae import SparseCodes
from ..sae.saelens_layout import ARCHITECTURE, FIELDS, configuration
from ..untrusted import is_integer, shown

try:
    import sae_lens
except ImportError as error:
    raise ImportError(f"sae-lens is needed (pip install 'writesae[saelens]'): {error}") from error

__all__ = ["WriteSAE", "WriteSAEConfig", "from_saelens", "to_saelens"]

_DENSE = ("standard", "topk", "jumprelu")  # of SAELens, that a flat dictionary is the same function as


@dataclass
class WriteSAEConfig(sae_lens.SAEConfig):
    """SAELens' configuration of one of our dictionaries: `d_in` is K*V, `d_sae` is F; the rest as in `writesae.SAE`."""

    K: int = 1
    V: int = 1
    k: int = 1
    kind: str = "bilinear"
    r: int = 1
    sparsity: str = "topk"
    target: str = "state"
    centred: bool = True
    layer: int | None = None
    head: int | None = None

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self):
        super().__post_init__()
        if self.d_in != self.K * self.V:
            raise ValueError(f"d_in: expected K * V = {self.K * self.V}, got {self.d_in}")
        for name, value in (("normalize_activations", "none"), ("reshape_activations", "none")):
            if getattr(self, name) != value:
                raise ValueError(f"{name}: expected {value!r}, got {getattr(self, name)!r}: states are as they are")


class WriteSAE(sae_lens.SAE[WriteSAEConfig]):
    """One of our dictionaries as SAELens has them; `ours` is the `writesae.SAE` that does the work.

    `W_enc [K*V, F]`, `W_dec [F, K*V]`, `b_dec [K*V]` (mean and bias) are made from the factors when they are asked for:
    they can be read, not set, and take F*K*V numbers each.
    """

    cfg: WriteSAEConfig

    def initialize_weights(self) -> None:
        c, meta = self.cfg, self.cfg.metadata
        options = {name: getattr(c, name) for name in FIELDS}
        ours = SAE(
            F=c.d_sae, model=meta.model_name, training=meta.training, metrics=meta.metrics,
            empty=self.device.type == "meta", **options,
        )  # fmt: skip
        self.ours = ours.to(device=self.device, dtype=self.dtype)

    @property
    def W_enc(self) -> Tensor:
        return self.ours.encoder_matrix().T

    @property
    def W_dec(self) -> Tensor:
        return self.ours.atom_matrix()

    @property
    def b_enc(self) -> Tensor:
        return self.ours.b_enc

    @property
    def b_dec(self) -> Tensor:
        return (self.ours.bias + self.ours.mean).flatten()

    def encode(self, x: Tensor) -> Tensor:
        """Codes `[..., F]` of vectors `[..., K*V]`."""
        X = self.hook_sae_input(x.to(self.dtype))
        if X.shape[-1] != self.cfg.d_in:
            raise ValueError(f"x: expected [..., K*V = {self.cfg.d_in}], got shape {tuple(x.shape)}")
        X = X.unflatten(-1, (self.cfg.K, self.cfg.V))
        if self.ours.sparsity == "pursuit":  # of factors: the rows of X, beside the unit vectors
            left = torch.eye(self.cfg.K, dtype=X.dtype, device=X.device).expand(*X.shape[:-1], -1)
            codes = self.ours.encode_writes(left, X)
        else:
            codes = self.ours._chosen(self.hook_sae_acts_pre(self.ours.preactivations(X)), self.ours.k)
        dense = codes.values.new_zeros(*X.shape[:-2], self.cfg.d_sae)
        return self.hook_sae_acts_post(dense.scatter_add(-1, codes.indices, codes.values))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Vectors `[..., K*V]` from codes `[..., F]`."""
        most = max(int((feature_acts != 0).sum(-1).max()) if feature_acts.numel() else 0, 1)
        indices = feature_acts.detach().abs().topk(most, dim=-1).indices
        X = self.ours.decode(SparseCodes(feature_acts.gather(-1, indices), indices))
        return self.hook_sae_recons(X.flatten(-2))

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        for name in list(state_dict):
            state_dict[name.removeprefix("ours.")] = state_dict.pop(name).contiguous()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        for name in list(state_dict):
            state_dict[f"ours.{name}"] = state_dict.pop(name)

    def fold_and_get_W_dec_norm(self) -> Tensor:
        raise NotImplementedError("which atoms fire depends on their norms: writesae dictionaries are not folded")

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        raise NotImplementedError("writesae dictionaries act on states as they are, without a scaling factor")

    def fold_activation_whitening(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("writesae dictionaries act on states as they are, without whitening")


def _register() -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY

    if ARCHITECTURE not in SAE_CLASS_REGISTRY:  # or this module was loaded twice
        sae_lens.register_sae_class(ARCHITECTURE, WriteSAE, WriteSAEConfig)


_register()


def to_saelens(sae: SAE) -> WriteSAE:
    """A dictionary as SAELens has them; its tensors are those of `sae`, not copies."""
    config = WriteSAEConfig.from_dict(configuration(sae))
    made_on, config.device = str(sae.b_enc.device), "meta"
    made = WriteSAE(config)
    made.ours = sae
    made.setup()
    config.device, made.device = made_on, sae.b_enc.device
    return made


def from_saelens(
    sae: sae_lens.SAE, K: int | None = None, V: int | None = None, layer: int | None = None, head: int | None = None
) -> SAE:
    """One of our dictionaries of one of SAELens'.

    Args:
        sae: of the architecture `writesae_bilinear`, whose `writesae.SAE` is returned, not a copy; or a standard, topk
            or jumprelu one that was trained on the states of one head as vectors, row-major (index k V + v): it becomes
            one of kind "flat", the same function, with copied tensors. Its atoms are dense, so that it can encode and
            reconstruct, and none of them can stand in for a write.
        K, V: key and value size of that head.
        layer, head: the head.

    Raises:
        ValueError: another architecture; K and V missing or of another product than d_in; vectors that SAELens
            normalises first.
    """
    architecture = sae.cfg.architecture()
    if architecture == ARCHITECTURE:
        if (K, V, layer, head) != (None, None, None, None):
            raise ValueError(f"K, V, layer, head: expected none, {ARCHITECTURE} has its own")
        return sae.ours
    if architecture not in _DENSE:
        raise ValueError(f"sae: expected the architecture {ARCHITECTURE}, {', '.join(_DENSE)}, got {architecture}")
    c = sae.cfg
    if K is None or V is None or not is_integer(K, 1) or not is_integer(V, 1) or K * V != c.d_in:
        raise ValueError(f"K, V: expected sizes whose product is d_in={c.d_in}, got {shown(K)} and {shown(V)}")
    for name, value in (("normalize_activations", "none"), ("reshape_activations", "none")):
        if getattr(c, name) != value:
            raise ValueError(f"sae: {name}: expected {value!r}, got {getattr(c, name)!r}: states are as they are")
    topk = architecture == "topk"
    made = SAE(
        K, V, c.d_sae, k=c.k if topk else c.d_sae, kind="flat", sparsity="topk" if topk else "threshold",
        layer=layer, head=head, model=c.metadata.model_name, centred=bool(c.apply_b_dec_to_input),
        training={"saelens": {"architecture": architecture}}, empty=True,
    )  # fmt: skip
    norms = sae.W_dec.norm(dim=-1) if topk and c.rescale_acts_by_decoder_norm else torch.ones_like(sae.b_enc)
    b_dec = sae.b_dec.view(K, V)
    tensors = {
        "W_enc": sae.W_enc.T * norms[:, None], "b_enc": sae.b_enc * norms, "W_dec": sae.W_dec / norms[:, None],
        "mean": b_dec if c.apply_b_dec_to_input else torch.zeros_like(b_dec),
        "bias": torch.zeros_like(b_dec) if c.apply_b_dec_to_input else b_dec,
    }  # fmt: skip
    if not topk:  # SAELens' ReLU comes before its threshold
        tensors["threshold"] = sae.threshold.relu() if architecture == "jumprelu" else torch.zeros_like(sae.b_enc)
    tensors = {name: x.detach().clone().contiguous() for name, x in tensors.items()}
    made.load_state_dict({name: tensors.get(name, x) for name, x in made.state_dict().items()}, assign=True)
    for name, p in made.named_parameters():
        assert isinstance(p, nn.Parameter) and p.device.type != "meta", name
    return made
