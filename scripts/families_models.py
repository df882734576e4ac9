"""Small models of every family of write rules, untrained: what `train_default_model.py --family NAME` trains.

Stacks of recurrent layers alone, so that nothing but their states carries text forward. All have the embedded model's
vocabulary; key and value sizes differ where the family lets them (Kimi Linear, RWKV-7 and Mamba-1 do
not: there K = V, and a state of one channel), and key heads are shared where the family shares them.

RWKV-7, DeltaNet and GLA are flash-linear-attention's own classes, and need it (`pip install
flash-linear-attention==0.6.0`); where there is no GPU, torch stands in for its Triton kernels.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from writesae.models import intercept, layers
from writesae.ops.rule import RuleCall, RuleOutput

VOCAB = 4096
_COMMON = dict(
    vocab_size=VOCAB, hidden_size=192, bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.02,
    tie_word_embeddings=True,
)  # fmt: skip


def _qwen3_5() -> transformers.PretrainedConfig:
    """Three gated delta-rule layers, one full-attention layer, and again; two value heads share a key head."""
    return transformers.Qwen3_5TextConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=8,
        layer_types=["full_attention" if i % 4 == 3 else "linear_attention" for i in range(8)], num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32,
        linear_value_head_dim=64, linear_conv_kernel_dim=4, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def _mamba2() -> transformers.PretrainedConfig:
    """Six layers of six heads, K = 32 and V = 64; three heads share a key."""
    return transformers.Mamba2Config(
        **_COMMON, num_hidden_layers=6, num_heads=6, head_dim=64, state_size=32, n_groups=2, expand=2, chunk_size=64
    )


def _kda() -> transformers.PretrainedConfig:
    """Kimi Linear without full attention and experts: four layers of six heads, K = V = 32."""
    return transformers.KimiLinearConfig(
        **_COMMON, num_hidden_layers=4, intermediate_size=384, linear_num_heads=6, linear_head_dim=32,
        layer_types=["linear_attention"] * 4, mlp_layer_types=["dense"] * 4, max_position_embeddings=4096,
        use_cache=False,  # transformers counts the columns of a cache by its attention layers
        # Of layers that are not there:
        num_attention_heads=6, num_key_value_heads=6, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
        v_head_dim=32, moe_intermediate_size=32, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip


def _mamba() -> transformers.PretrainedConfig:
    """Mamba-1: six layers of 384 channels with 16 states each."""
    return transformers.MambaConfig(**_COMMON, num_hidden_layers=6, state_size=16, expand=2)


def _fla(name: str, **sizes) -> transformers.PretrainedConfig:
    """A configuration of flash-linear-attention, whose models transformers knows from then on.

    Raises:
        ValueError: it is not installed.
    """
    if find_spec("fla") is None:
        raise ValueError(f"--family: {name} needs flash-linear-attention: pip install flash-linear-attention==0.6.0")
    of_fla = importlib.import_module("fla.models")
    return getattr(of_fla, f"{name}Config")(**_COMMON, num_hidden_layers=4, max_position_embeddings=4096, **sizes)


def _rwkv7() -> transformers.PretrainedConfig:
    """Four layers of six heads, K = V = 32: flash-linear-attention cannot draw the weights of others."""
    return _fla(
        "RWKV7", head_dim=32, intermediate_size=768, decay_low_rank_dim=32, a_low_rank_dim=32, gate_low_rank_dim=32,
        v_low_rank_dim=16, use_l2warp=False,
    )  # fmt: skip


def _deltanet() -> transformers.PretrainedConfig:
    """Four layers of six heads, K = 32 and V = 64."""
    return _fla("DeltaNet", num_heads=6, expand_k=1.0, expand_v=2.0, intermediate_size=384)


def _gla() -> transformers.PretrainedConfig:
    """Four layers of six heads, K = 32 and V = 64; two heads share a key and a value. Without a short convolution."""
    return _fla("GLA", num_heads=6, num_kv_heads=3, expand_k=1.0, expand_v=2.0, intermediate_size=384)


FAMILIES = {
    "qwen3_5": _qwen3_5, "mamba2": _mamba2, "kda": _kda, "mamba": _mamba, "rwkv7": _rwkv7, "deltanet": _deltanet,
    "gla": _gla,
}  # fmt: skip
OUTPUT_MAPS = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "ffn.value.weight")


def build_model(family: str) -> nn.Module:
    """The untrained causal language model, with decay rates spread as Mamba-2 spreads them (half-lives of 1 to 700
    tokens; RWKV-7 spreads its own so, DeltaNet has none). Output maps are zero, so that the first step sees the
    embedding alone."""
    config = FAMILIES[family]()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "According to Bo")  # of fla, about its RWKV-7
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(OUTPUT_MAPS):
                p.zero_()
            elif name.endswith("embeddings.weight") and family == "rwkv7":  # its own has no room for a tied output map
                p.normal_(0, config.initializer_range)
            elif name.endswith(("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight")):  # as torch draws them
                p.uniform_(-(p.shape[-1] ** -0.5), p.shape[-1] ** -0.5)
            elif name.endswith("gk_proj.1.bias"):  # log decay logsigmoid(bias) / 16
                half_life = torch.empty_like(p).uniform_(0, math.log(700)).exp().clamp_min(2)
                fade = (-16 * math.log(2) / half_life).exp()
                p.copy_(torch.log(fade / (1 - fade)))
            elif name.endswith("A_log") and family != "mamba":  # there: a spread over states, of the model's own
                p.uniform_(1, 16).log_()
            elif name.endswith("dt_bias"):
                dt = torch.empty_like(p).uniform_(math.log(1e-3), math.log(1e-1)).exp()
                p.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    return model


def fast_conv(x, weight, bias=None, activation=None, **_):
    """Causal depthwise convolution and SiLU as a sum of shifted products: x `[B, D, T]`, weight `[D, width]`."""
    width, T = weight.shape[-1], x.shape[-1]
    padded, weight = F.pad(x, (width - 1, 0)), weight.to(x.dtype)
    y = sum(padded[..., i : i + T] * weight[:, i, None] for i in range(width))
    return F.silu(y if bias is None else y + bias.to(x.dtype)[:, None])


def _rule(call: RuleCall, output_final_state: bool) -> RuleOutput:
    """The recurrence on our kernels, forward and backward, in float32 under autocast too."""
    with torch.autocast("cpu", enabled=False):
        inputs = {name: x if x is None else x.float() for name, x in call.inputs.items()}  # dtypes may be mixed there
        return replace(call, inputs=inputs).run(output_final_state=output_final_state)


def _walk(call: RuleCall, output_final_state: bool) -> RuleOutput:
    """The recurrence token by token in torch, differentiated by it."""
    return call.run(output_final_state=output_final_state, backend="reference")


@contextlib.contextmanager
def our_kernels(model: nn.Module) -> Iterator[None]:
    """Within, every recurrent layer of the model runs on our kernel for its rule, forward and backward."""
    every = [site.layer_index for site in layers(model)]
    with intercept(model, calls=dict.fromkeys(every, _rule), convs=dict.fromkeys(every, fast_conv)):
        yield


def _own_recurrence(model: nn.Module):
    """Within, it runs as transformers has it in torch; of flash-linear-attention, token by token."""
    every = layers(model)
    if every[0].binding.stand_ins is None:
        return contextlib.nullcontext()
    return intercept(model, calls=dict.fromkeys([site.layer_index for site in every], _walk))


def loss_and_gradient(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss on tokens `[B, T]` and the gradient of all parameters in one row."""
    model.zero_grad()
    hidden = model.base_model(ids[:, :-1], use_cache=False).last_hidden_state
    loss = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def check_kernels(model: nn.Module) -> None:
    """Raises RuntimeError unless loss and gradients on our kernels are those of transformers' own recurrence, or of a
    walk token by token where that is flash-linear-attention's."""
    ids = torch.randint(VOCAB, (2, 129), generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng():
        probe = type(model)(model.config)  # its output maps are not zero, as the model's are
        for name, p in probe.named_parameters():
            if name.endswith(OUTPUT_MAPS):  # some are zero from the first
                torch.nn.init.normal_(p, std=0.02)
        with _own_recurrence(probe):
            loss, gradient = loss_and_gradient(probe, ids)
        with our_kernels(probe):
            fast_loss, fast_gradient = loss_and_gradient(probe, ids)
    report(loss, gradient, fast_loss, fast_gradient)


def report(loss, gradient, fast_loss, fast_gradient) -> None:
    """Prints by how much fast operators differ; raises RuntimeError where they do not compute the same."""
    error, difference = (fast_gradient - gradient).norm() / gradient.norm(), abs(fast_loss - loss)
    print(f"fast operators: loss differs by {difference:.1e}, gradient by {error:.1e} (relative)", flush=True)
    if not (difference <= 1e-4 and error <= 1e-4):
        raise RuntimeError("the fast operators disagree with transformers' own")
