"""The seam under attach: `layers`, `intercept`, `intercept_conv`, `causal_conv`."""

from __future__ import annotations

import pytest
import torch
from tiny_models import families, tiny_model, tokens

from writesae.models import attach, hf_gated_delta, patch
from writesae.ops import gated_delta_rule


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield
    assert hf_gated_delta.running() is None and not patch.entries and not patch.patches


@pytest.mark.parametrize("family", families())
def test_a_suffix_runs_alone_with_its_left_context(family):
    """What a fork needs: states and convolution inputs of one pass, and the layer re-run from the middle, uncached."""
    model = tiny_model(family)
    sites = hf_gated_delta.layers(model)
    assert [s.layer_index for s in sites] == [0, 1, 3]
    site = sites[2]
    assert (site.num_k_heads, site.num_v_heads, site.K, site.V, site.conv_kernel_size) == (2, 4, 8, 6, 4)
    seen, hidden, cut = {}, {}, 5

    def rule(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm, cu_seqlens):
        assert q.shape[2] == k.shape[2] == 2 and initial_state is None and cu_seqlens is None
        out = gated_delta_rule(q, k, v, g, beta, use_qk_l2norm=use_qk_l2norm, snapshots=[cut - 1])
        seen["state"] = out.snapshots[:, 0]
        return out.o, out.final_state

    def conv(x, weight, bias, activation, *, cu_seqlens, channels):
        seen[str(channels)] = x
        return NotImplemented

    def keep(module, args, kwargs, output):
        hidden["in"], hidden["out"] = args[0] if args else kwargs["hidden_states"], output

    handle = site.module.register_forward_hook(keep, with_kwargs=True)
    with hf_gated_delta.intercept(model, {3: rule}, {3: conv}):
        model(tokens(2, 9), use_cache=False)
    handle.remove()
    assert sum(x.shape[1] for name, x in seen.items() if name != "state") == 2 * 2 * 8 + 4 * 6

    def resumed(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm, cu_seqlens):
        out = gated_delta_rule(q, k, v, g, beta, use_qk_l2norm=use_qk_l2norm, initial_state=seen["state"])
        return out.o, out.final_state

    def with_left(x, weight, bias, activation, *, cu_seqlens, channels):
        return hf_gated_delta.causal_conv(x, weight, bias, activation, left=seen[str(channels)][:, :, cut - 3 : cut])

    with hf_gated_delta.intercept(model, {3: resumed}, {3: with_left}):
        suffix = site.module(hidden_states=hidden["in"][:, cut:])
    assert torch.allclose(suffix, hidden["out"][:, cut:], atol=1e-5)


def test_not_implemented_falls_through_and_the_latest_goes_first():
    model, order = tiny_model(), []

    def rule(name):
        def decline(*args):
            order.append((name, hf_gated_delta.running().site.layer_index))
            return NotImplemented

        return decline

    x = tokens(1, 5)
    plain = model(x).logits
    with hf_gated_delta.intercept(model, {0: rule("outer")}), hf_gated_delta.intercept(model, {0: rule("inner")}):
        assert torch.equal(model(x).logits, plain)
        with attach(model, {(0, 0): None}) as tap:
            model(x)
        assert tap.calls == {0: 1}
    assert order == [("inner", 0), ("outer", 0)]


def test_causal_conv_packed_and_left():
    x, weight, bias = torch.randn(1, 5, 11), torch.randn(5, 4), torch.randn(5)
    cu = torch.tensor([0, 2, 3, 11])
    packed = hf_gated_delta.causal_conv(x, weight, bias, "silu", cu_seqlens=cu)
    alone = [hf_gated_delta.causal_conv(x[:, :, a:b], weight, bias, "silu") for a, b in ((0, 2), (2, 3), (3, 11))]
    assert torch.allclose(packed, torch.cat(alone, -1), atol=1e-6)
    whole = hf_gated_delta.causal_conv(x, weight, bias, None)
    for L in (1, 3, 6):
        part = hf_gated_delta.causal_conv(x[:, :, L:], weight, bias, None, left=x[:, :, max(0, L - 3) : L])
        assert torch.allclose(part, whole[:, :, L:], atol=1e-6)


def test_intercept_refuses_other_layers():
    with pytest.raises(ValueError, match="got layer 2, which is a full-attention layer"):
        with hf_gated_delta.intercept(tiny_model(), {2: print}):
            pass
    with pytest.raises(ValueError, match="got layer 9, which Qwen3_5ForCausalLM does not have"):
        with hf_gated_delta.intercept_conv(tiny_model(), {9: print}):
            pass
