"""Tiny random models of every family that is attached to: K != V, grouped heads, linear and full layers mixed, where
the family has it. `writesae info --models` tries them (`trial.py`), and tests are made of them.

A new family adds its models to `every`, each with one line.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

VOCAB = 97
_LAYERS = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]


def _common(layer_types, heads, key_heads, K, V):
    return dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=len(layer_types), layer_types=list(layer_types),
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=48, linear_num_key_heads=key_heads,
        linear_num_value_heads=heads, linear_key_head_dim=K, linear_value_head_dim=V, linear_conv_kernel_dim=4,
        max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip


_MOE = dict(
    moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    decoder_sparse_step=1, mlp_only_layers=[],
)  # fmt: skip

_QWEN4 = dict(
    hc_count=2, hc_lowrank=8, ple_layer_ids=[1], ple_embed_dim=16, heads_per_ngram=2, ngram_vocab_size_base=101,
    make_ngram_vocab_size_divisible_by=8, split_ngram_parts=1, indexer_n_heads=2, indexer_kv_heads=1,
    indexer_head_dim=16, indexer_budget=64, indexer_compress_ratio=2,
)  # fmt: skip


def families() -> list[str]:
    """Families this transformers has."""
    known = ["qwen3_5", "qwen3_next", "olmo_hybrid", "qwen3_5_moe", "qwen4_exp"]
    return [f for f in known if importlib.util.find_spec(f"transformers.models.{f}") is not None]


def tiny_model(
    family="qwen3_5", layer_types=_LAYERS, heads=4, key_heads=2, K=8, V=6, seed=0, dtype=torch.float32, **overrides
):
    """A random model in eval mode; the gates are spread so that states neither vanish nor saturate."""
    import transformers

    common = {**_common(layer_types, heads, key_heads, K, V), **overrides}
    if family == "qwen3_5":
        config, name = transformers.Qwen3_5TextConfig(**common), "Qwen3_5ForCausalLM"
    elif family == "qwen3_5_moe":
        config, name = transformers.Qwen3_5MoeTextConfig(**common, **_MOE), "Qwen3_5MoeForCausalLM"
    elif family == "qwen3_next":
        config, name = transformers.Qwen3NextConfig(**common, **_MOE), "Qwen3NextForCausalLM"
    elif family == "olmo_hybrid":
        common.pop("head_dim")
        config, name = transformers.OlmoHybridConfig(**common), "OlmoHybridForCausalLM"
    elif family == "qwen4_exp":
        experts = {k: v for k, v in _MOE.items() if k not in ("decoder_sparse_step", "mlp_only_layers")}
        common.pop("intermediate_size")
        config, name = transformers.Qwen4ExpTextConfig(**{**experts, **_QWEN4, **common}), "Qwen4ExpForCausalLM"
    else:
        raise ValueError(f"family: unknown {family!r}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, name)(config).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("A_log"):
                parameter.data.uniform_(-4.0, -1.0)
            elif parameter.ndim >= 2:
                parameter.data.normal_(0.0, 0.25 if "conv" in parameter_name else parameter.shape[-1] ** -0.5)
    return model.to(dtype)


# ---- Mamba-2 ---------------------------------------------------------------------------------------------------

_ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2)
_MAMBA = dict(
    mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=2, mamba_expand=2, mamba_chunk_size=8,
)  # fmt: skip
_MAMBA2 = {
    "mamba2": ("Mamba2", dict(num_heads=4, head_dim=16, state_size=8, n_groups=2, expand=2, chunk_size=8)),
    "bamba": ("Bamba", dict(**_ATTENTION, **_MAMBA, attn_layer_indices=[1])),
    "nemotron_h": (
        "NemotronH",
        dict(
            **_ATTENTION, head_dim=8, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=2, expand=2,
            chunk_size=8, layers_block_type=["mamba", "attention", "mlp"], n_routed_experts=4, moe_intermediate_size=16,
            moe_shared_expert_intermediate_size=16,
        ),
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        dict(
            **_ATTENTION, **_MAMBA, layer_types=["mamba", "attention", "mamba"], num_local_experts=0,
            shared_intermediate_size=32,
        ),
    ),
    "falcon_h1": ("FalconH1", dict(**_ATTENTION, **_MAMBA, head_dim=8, mamba_d_ssm=64)),
    "zamba2": (
        "Zamba2",
        dict(
            num_attention_heads=4, num_key_value_heads=4, attention_head_dim=16, mamba_headdim=16, mamba_d_state=8,
            mamba_ngroups=2, n_mamba_heads=4, mamba_expand=2, chunk_size=8,
            layers_block_type=["mamba", "hybrid", "mamba"], num_mem_blocks=1, use_shared_attention_adapter=False,
        ),
    ),
}  # fmt: skip


def mamba2_families() -> list[str]:
    """Families on Mamba-2's rule that this transformers has with functions to stand in for (since 5.15)."""
    try:
        from transformers.models.mamba2 import modeling_mamba2
    except ImportError:
        return []
    return list(_MAMBA2) if hasattr(modeling_mamba2, "mamba2_chunk_scan") else []


def tiny_mamba2(family="mamba2", seed=0, dtype=torch.float32, **overrides):
    """A random model in eval mode of four heads in two groups with K=8, V=16 whose states are felt in the logits."""
    name, sizes = _MAMBA2[family]
    return _spread(name, {**sizes, **overrides}, seed).to(dtype)


# ---- Mamba-1 ---------------------------------------------------------------------------------------------------

_MAMBA1 = {
    "mamba": ("Mamba", dict(state_size=4, expand=2, num_hidden_layers=2)),
    "falcon_mamba": ("FalconMamba", dict(state_size=4, expand=2, num_hidden_layers=2)),
    "jamba": (
        "Jamba",
        dict(
            **_ATTENTION, mamba_d_state=4, mamba_expand=2, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1,
            expert_layer_period=2, expert_layer_offset=1, num_experts=2,
        ),
    ),
    "zamba": (
        "Zamba",
        dict(
            num_attention_heads=4, num_key_value_heads=4, attention_head_dim=16, mamba_d_state=4, mamba_expand=2,
            n_mamba_heads=2, layers_block_type=["mamba", "hybrid", "mamba"],
        ),
    ),
}  # fmt: skip


def mamba_families() -> list[str]:
    """Families on Mamba-1's rule that this transformers has with functions to stand in for (since 5.15)."""
    try:
        from transformers.models.mamba import modeling_mamba
    except ImportError:
        return []
    return list(_MAMBA1) if hasattr(modeling_mamba, "mamba_selective_scan") else []


def tiny_mamba(family="mamba", seed=0, dtype=torch.float32, **overrides):
    """A random model in eval mode with K=4, V=48 or 64 (of Zamba two heads of V=32) and states felt in the logits."""
    name, sizes = _MAMBA1[family]
    return _spread(name, {**sizes, **overrides}, seed).to(dtype)


def _spread(name: str, sizes: dict, seed: int):
    """A model of a small vocabulary and width, with numbers that keep states from vanishing and saturating."""
    import transformers

    common = dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, intermediate_size=48, pad_token_id=0, bos_token_id=2,
        eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, f"{name}Config")(**{**common, **sizes})
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        _draw(model)
    return model


def _draw(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.uniform_(-3.0, -1.0)
        elif name.endswith(("dt_bias", "dt_proj.bias", "dt_proj_bias")):
            parameter.data.uniform_(-1.0, 1.0)
        elif name.endswith(".D"):
            parameter.data.uniform_(0.2, 1.0)
        elif parameter.ndim >= 2:
            parameter.data.normal_(0.0, 0.4 if "conv" in name else parameter.shape[-1] ** -0.5)


# ---- Lightning Attention ---------------------------------------------------------------------------------------


def tiny_minimax(seed=0, dtype=torch.float32, **overrides):
    """A random model in eval mode: three heads of K = V = 8, blocks of four tokens, full attention in the middle."""
    sizes = dict(
        num_attention_heads=3, num_key_value_heads=1, head_dim=8, block_size=4, num_local_experts=4,
        num_experts_per_tok=2, layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    return _spread("MiniMax", {**sizes, **overrides}, seed).to(dtype)


# ---- Kimi Delta Attention --------------------------------------------------------------------------------------

_MLA = dict(
    num_attention_heads=3, num_key_value_heads=3, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, v_head_dim=8,
    n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
    mlp_layer_types=["dense", "sparse", "dense"],
)  # fmt: skip
_KDA = {
    "kimi_linear": (
        "KimiLinear",
        dict(linear_num_heads=3, linear_head_dim=8, num_local_experts=4, qk_rope_head_dim=4, first_k_dense_replace=1),
    ),
    "bailing_hybrid": (
        "BailingHybrid", dict(head_dim=8, short_conv_kernel_size=4, num_local_experts=4, qk_rope_head_dim=4),
    ),
    "glm5_next": (
        "Glm5Next",
        dict(
            linear_num_heads=3, linear_head_dim=8, n_routed_experts=4, qk_rope_head_dim=0, hc_mult=2, index_topk=64,
            index_head_dim=8, index_n_heads=2, index_kpool=2,
        ),
    ),
}  # fmt: skip


_VISION = dict(
    depth=1, hidden_size=16, num_heads=2, out_hidden_size=32, intermediate_size=16, projection_intermediate_size=16
)


def kda_families() -> list[str]:
    """Families with Kimi Delta Attention that this transformers has."""
    return [f for f in _KDA if importlib.util.find_spec(f"transformers.models.{f}") is not None]


def tiny_kda(family="kimi_linear", seed=0, dtype=torch.float32, **overrides):
    """A random model in eval mode (of GLM with its vision tower): K = V = 8, three heads, the last of three layers full
    attention. The gates are spread, over channels too."""
    import transformers

    name, sizes = _KDA[family]
    common = dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, intermediate_size=48, pad_token_id=0, bos_token_id=2,
        eos_token_id=1, layer_types=["linear_attention", "linear_attention", "full_attention"],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = {**common, **_MLA, **sizes, **overrides}
        if family == "glm5_next":
            ids = ("image", "video", "image_start", "image_end", "video_start", "video_end")
            marks = {f"{name}_token_id": VOCAB + i for i, name in enumerate(ids)}
            config = transformers.Glm5NextConfig(text_config=text, vision_config=_VISION, **marks)
            model = transformers.Glm5NextForConditionalGeneration(config).eval()
        else:
            config = getattr(transformers, f"{name}Config")(**text)
            model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("A_log"):  # after a softplus, or in a sigmoid times a lower bound
                parameter.data.uniform_(*((-3.0, -1.0) if family == "kimi_linear" else (0.0, 0.5)))
            elif parameter_name.endswith("dt_bias"):
                parameter.data.uniform_(-4.0, 0.0)
            elif parameter.ndim >= 2:
                parameter.data.normal_(0.0, 0.4 if "conv" in parameter_name else parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def tokens(rows: int, length: int, seed: int = 0):
    """`[rows, length]` int64 ordinary tokens (no pad, no end)."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- flash-linear-attention ------------------------------------------------------------------------------------

# Where a family's name and sizes are not the common ones. Heads differ from key heads and K from V where they can.
_FLA: dict[str, tuple[str, dict]] = {
    "gated_deltanet": ("GatedDeltaNet", dict(num_heads=2, num_v_heads=4, head_dim=16, expand_v=1.5)),
    "deltanet": ("DeltaNet", dict(num_heads=2, expand_k=0.5)),
    "kda": ("KDA", dict(num_heads=2, num_v_heads=4, head_dim=16, expand_v=1.5)),
    "gla": ("GLA", dict(num_heads=4, num_kv_heads=2, expand_k=0.5)),
    "hgrn2": ("HGRN2", dict(expand_ratio=16)),
    "retnet": ("RetNet", dict(num_heads=2)),
    "rwkv7": ("RWKV7", dict(head_dim=16)),
}


def fla_families() -> list[str]:
    """Families of flash-linear-attention, if it is installed."""
    return list(_FLA) if importlib.util.find_spec("fla") is not None else []


def tiny_fla(family: str, seed: int = 0, dtype=torch.float32, **overrides):
    """A random model in eval mode whose states are felt in the logits."""
    import fla.models

    name, sizes = _FLA[family]
    common = dict(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=32, pad_token_id=0, bos_token_id=2,
        eos_token_id=1, max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = getattr(fla.models, f"{name}Config")(**{**common, **sizes, **overrides})
        model = getattr(fla.models, f"{name}ForCausalLM")(config).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("A_log"):
                parameter.data.uniform_(-4.0, -1.0)
            elif parameter_name.endswith("dt_bias"):
                parameter.data.uniform_(-1.0, 1.0)
            elif parameter.ndim >= 2 and "x_" not in parameter_name:
                parameter.data.normal_(0.0, 0.4 if "conv" in parameter_name else parameter.shape[-1] ** -0.5)
    return model.to(dtype)


# ---- mamba-ssm -------------------------------------------------------------------------------------------------


def mamba_ssm_layers() -> list[str]:
    """Kinds of layers of mamba-ssm, if it is installed."""
    return ["Mamba2", "Mamba1"] if importlib.util.find_spec("mamba_ssm") is not None else []


def tiny_mamba_ssm(layer="Mamba2", seed=0, dtype=torch.float32, attention=(), **settings):
    """A random `MambaLMHeadModel` of three layers in eval mode with K=8, V=16 (Mamba2: four heads in two groups) or 64,
    whose states are felt in the logits. settings: of its layers; attention: which layers are that instead."""
    from . import mamba_ssm

    mamba_ssm.import_library()
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    more = {"headdim": 16, "ngroups": 2, "chunk_size": 8} if layer == "Mamba2" else {}
    config = MambaConfig(
        d_model=32, n_layer=3, vocab_size=VOCAB, ssm_cfg={"layer": layer, "d_state": 8, **more, **settings},
        attn_layer_idx=list(attention), attn_cfg={"num_heads": 4, "causal": True},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MambaLMHeadModel(config).eval()
        _draw(model)
    return model.to(dtype)


# ---- all of them -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """A tiny model of one class.

    Attributes:
        family: its name, for messages.
        library: the package that it comes from.
        make: makes it.
    """

    family: str
    library: str
    make: Callable[[], nn.Module]


def every() -> list[Tiny]:
    """One of each class that is attached to, as far as its library is installed and has it."""
    sources: list[tuple[str, Callable[..., nn.Module], list[str]]] = [
        ("transformers", tiny_model, families()),
        ("transformers", tiny_kda, kda_families()),
        ("transformers", tiny_mamba2, mamba2_families()),
        ("transformers", tiny_mamba, mamba_families()),
        ("fla", tiny_fla, fla_families()),
        ("mamba-ssm", tiny_mamba_ssm, mamba_ssm_layers()),
    ]
    found = [Tiny(name, library, functools.partial(make, name)) for library, make, names in sources for name in names]
    if importlib.util.find_spec("transformers.models.minimax") is not None:
        found.append(Tiny("minimax", "transformers", tiny_minimax))
    return found


def absent() -> dict[str, list[str]]:
    """{library: families of it} of libraries that are not installed, or are without what these need."""
    return {
        library: names
        for library, names, have in (
            ("transformers", [*_MAMBA2, *_MAMBA1], [*mamba2_families(), *mamba_families()]),
            ("transformers", list(_KDA), kda_families()),
            ("fla", list(_FLA), fla_families()),
            ("mamba-ssm", ["Mamba2", "Mamba1"], mamba_ssm_layers()),
        )
        if not have
    }
