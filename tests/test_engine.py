"""The fork engine against the plain way: a whole forward pass with the edit made inside the recurrence."""

import pytest
import torch
from forking import compare_times_of_reading, compare_with_whole_passes, plain, run_engine
from tiny_models import (
    families,
    kda_families,
    mamba2_families,
    mamba_families,
    tiny_kda,
    tiny_mamba,
    tiny_mamba2,
    tiny_minimax,
    tiny_model,
    tokens,
)

from writesae.edits import Edits
from writesae.experiments.divergence import kl_pair
from writesae.experiments.engine import ForkEngine, Later, read, read_matrix, reader
from writesae.ops.dplr import dplr
from writesae.ops.rule import RuleCall
from writesae.ops.selective_scan import RULE
from writesae.writes import Writes

LINEAR, FULL = "linear_attention", "full_attention"


pytestmark = pytest.mark.usefixtures("one_thread")


CASES = [
    ("qwen3_5", [LINEAR, LINEAR, FULL, LINEAR], 0),
    ("qwen3_5", [LINEAR, LINEAR, FULL, LINEAR], 3),  # nothing above it
    ("qwen3_5", [LINEAR, FULL], 0),  # the last layer reads only keys and values
    ("qwen3_next", [LINEAR, LINEAR, FULL], 1),
    ("qwen3_5_moe", [LINEAR, FULL, LINEAR], 0),
    ("olmo_hybrid", [LINEAR, FULL, LINEAR], 0),
]


def made(family, **settings):
    """A tiny model of any family."""
    if family == "minimax":
        return tiny_minimax(**settings)
    every = {tiny_model: families, tiny_mamba2: mamba2_families, tiny_kda: kda_families, tiny_mamba: mamba_families}
    for make, known in every.items():
        if family in known():
            return make(family, **settings)
    pytest.skip(f"this transformers has no {family}")


# Other rules and other stacks: no attention at all, attention beside the recurrence in one block, attention that every
# block shares and that reads the embeddings again, latent attention, blocks without either, several residual streams.
OF_OTHER_RULES = [
    ("mamba2", 0), ("bamba", 0), ("nemotron_h", 0), ("granitemoehybrid", 0), ("falcon_h1", 1), ("zamba2", 1),
    ("kimi_linear", 0), ("glm5_next", 1), ("minimax", 0), ("mamba", 0), ("jamba", 0),
]  # fmt: skip


@pytest.mark.parametrize("family, layer_types, layer", CASES, ids=lambda x: x if isinstance(x, str) else None)
def test_forks_equal_whole_forward_passes(family, layer_types, layer):
    compare_with_whole_passes(made(family, layer_types=layer_types), layer)


@pytest.mark.filterwarnings("ignore:selective_scan. running the slow")
@pytest.mark.parametrize("family, layer", OF_OTHER_RULES)
def test_forks_equal_whole_forward_passes_of_other_rules(family, layer):
    compare_with_whole_passes(made(family), layer)


@pytest.mark.parametrize(
    "family, settings, layer",
    [(f, {"layer_types": types}, layer) for f, types, layer in [CASES[0], *CASES[2:4]]]
    + [("mamba2", {}, 1), ("bamba", {}, 0), ("kimi_linear", {}, 0), ("mamba", {}, 0)],
)
@pytest.mark.filterwarnings("ignore:selective_scan. running the slow")
def test_forks_that_begin_after_the_token_are_the_rest_of_those_that_begin_at_it(family, settings, layer):
    compare_times_of_reading(made(family, **settings), layer)


def test_a_model_whose_blocks_read_more_than_forks_give_them_is_refused():
    """Qwen4's per-layer embeddings read n-grams of tokens before the fork."""
    with pytest.raises(RuntimeError, match="forks of Qwen4Exp.* without a change differ from its clean pass"):
        run_engine(made("qwen4_exp"), 0, [19], [(0, 9, 0)], 4)


def test_divergences_are_those_of_the_logits():
    model = tiny_model()
    engine, clean, _, hidden, _, _ = run_engine(model, 1, [19], [(0, 2, 0), (0, 16, 1)], 5)
    found = engine.divergences(clean, hidden, "baseline", memory=1)  # a token a slice
    log_p = torch.log_softmax(engine.logits(hidden["baseline"]).double(), -1)
    log_q = torch.log_softmax(engine.logits(hidden["delete"]).double(), -1)
    forward, reverse = found["delete"]
    torch.testing.assert_close(forward[0], (log_p.exp() * (log_p - log_q)).sum(-1)[0])
    torch.testing.assert_close(reverse[0], (log_q.exp() * (log_q - log_p)).sum(-1)[0])
    assert forward[1, 3:].isnan().all() and forward[1, :3].isfinite().all()
    assert (found["native"][0][clean.valid] == 0).all() and (found["native"][1][clean.valid] == 0).all()


@pytest.mark.filterwarnings("ignore:gated_delta_rule. running the slow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = tiny_model(dtype=dtype)
    engine, clean, ids, hidden, left, right = run_engine(model, 0, [21], [(0, 5, 2), (0, 12, 0)], 3)
    assert torch.equal(hidden["native"], hidden["baseline"])
    edits = Edits([0, 1], [5, 12], [2, 0], left, right, "replace")
    expected = plain(model, 0, ids[0], edits)
    for i, t in enumerate((5, 12)):
        error = (engine.logits(hidden["replace"])[i] - expected[i, t : t + 4]).abs().max()
        assert error <= {torch.bfloat16: 0.15, torch.float64: 1e-5}[dtype], error


def test_a_matrix_reads_like_its_pieces():
    engine, clean, *_ = run_engine(tiny_model(), 0, [20], [(0, 3, 1), (0, 11, 2)], 6)
    left, right = torch.randn(2, 2, 8), torch.randn(2, 2, 6)
    pieces = sum(read(clean, left[:, r], right[:, r]) for r in range(2))
    torch.testing.assert_close(read_matrix(clean, torch.einsum("nrk,nrv->nkv", left, right)), pieces)
    # The same numbers by the forward propagator of identity 3.
    edit = Edits([0, 0], [3, 11], [1, 2], left[:, 0], right[:, 0])
    p = clean.writes.propagate(edit, engine.length)
    q = clean.reader[:, 0]  # at the token itself the reader is its query
    expected = (p[:, 0] * q).sum(-1, keepdim=True) * right[:, 0]
    torch.testing.assert_close(read(clean, left[:, 0], right[:, 0])[:, 0], expected)


def test_kl_pair():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(7, 33, generator=generator, dtype=torch.float64) * 3
    for scale in (1e-3, 1.0, 40.0, 3000.0):
        other = base + scale * torch.randn(7, 33, generator=generator, dtype=torch.float64)
        log_p, log_q = torch.log_softmax(base, -1), torch.log_softmax(other, -1)
        forward, reverse = kl_pair(base, {"x": other})["x"]
        torch.testing.assert_close(forward, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-7, atol=1e-15)
        torch.testing.assert_close(reverse, (log_q.exp() * (log_q - log_p)).sum(-1), rtol=1e-7, atol=1e-15)
    assert all((x == 0).all() for x in kl_pair(base, {"x": base.clone()})["x"])
    # Tiny shifts keep their digits: KL is then half the variance of the shift under p.
    shift = 1e-7 * torch.randn(7, 33, generator=generator, dtype=torch.float64)
    p = torch.softmax(base, -1)
    variance = (p * shift**2).sum(-1) - (p * shift).sum(-1) ** 2
    torch.testing.assert_close(kl_pair(base, {"x": base + shift})["x"][0], variance / 2, rtol=1e-2, atol=0)


def test_bad_input():
    model = tiny_model()
    with pytest.raises(ValueError, match="full-attention"):
        ForkEngine(model, 2)
    with pytest.raises(ValueError, match="horizon"):
        ForkEngine(model, 0, -1)
    with pytest.raises(ValueError, match="horizon: expected 1 or more"):
        ForkEngine(model, 0, 0, "after")
    with pytest.raises(ValueError, match="read: expected before or after, got 'both'"):
        ForkEngine(model, 0, 2, "both")
    with pytest.raises(ValueError, match="position"):
        run_engine(model, 0, [9, 5], [(1, 5, 0)], 2)
    with pytest.raises(ValueError, match="head"):
        run_engine(model, 0, [9], [(0, 5, 4)], 2)
    with pytest.raises(ValueError, match="sorted"):
        run_engine(model, 0, [9, 9], [(1, 5, 0), (0, 2, 0)], 2)
    model.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        ForkEngine(model, 0)


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    before = model.config._attn_implementation
    expected = model(tokens(1, 12)).logits
    run_engine(model, 0, [12], [(0, 3, 0)], 2)
    assert model.config._attn_implementation == before
    assert torch.equal(model(tokens(1, 12)).logits, expected)


@pytest.mark.parametrize("gate, transition", [(g, t) for g in ("scalar", "channel") for t in ("delta", "none", "low")])
def test_readers_are_the_propagator_from_behind(gate, transition):
    """`p_s . q_s` of an addition carried forward is `p . r_s`, r_s the query carried back."""
    L, K, V = 12, 5, 3
    decay = -torch.rand(1, L, 1, *((K,) if gate == "channel" else ())).double()
    k = torch.nn.functional.normalize(torch.randn(1, L, 1, 1, K).double(), dim=-1)
    beta = torch.rand(1, L, 1).double() if transition == "delta" else None
    erase = tuple(0.5 * torch.randn(1, L, 1, K).double() for _ in range(2)) if transition == "low" else None
    writes = Writes(decay, k, torch.zeros(1, L, 1, 1, V).double(), beta=beta, erase=erase)
    assert writes.gate == gate
    p, q = torch.randn(K).double(), torch.randn(1, L, K).double()
    path = writes.propagate(Edits.add(0, 0, 0, p, torch.zeros(V).double()))
    beta, erase = None if beta is None else beta[:, :, 0], None if erase is None else tuple(x[:, :, 0] for x in erase)
    back = reader(q, k[:, :, 0, 0], decay[:, :, 0], beta, erase)
    torch.testing.assert_close(back @ p, (path * q).sum(-1))


@pytest.mark.filterwarnings("ignore:selective_scan. running the slow")
@pytest.mark.parametrize("when", ["after", "before"])
def test_a_recurrence_run_on_an_addition_alone_says_how_it_is_read(when):
    """Under a gate for every entry, where no reader exists: against the scan with the edit in it."""
    T, V, K, t = 9, 6, 4, 3
    x = {
        "x": torch.randn(1, T, V), "dt": torch.rand(1, T, V), "A": -torch.rand(V, K), "B": torch.randn(1, T, K),
        "C": torch.randn(1, T, K), "D": torch.randn(V),
    }  # fmt: skip
    left, right = torch.randn(K), torch.randn(V)
    edit = Edits([0], [t], [0], left[None], right[None], when=when)
    changed = [RuleCall(RULE, x).run(edits=e, backend="reference").o for e in (None, edit)]
    after = {name: value if value.ndim < 3 else value[:, t + 1 :] for name, value in x.items()}
    call = RuleCall(RULE, {**after, "x": torch.zeros_like(after["x"])})
    found = Later(call, x["C"][:, t], torch.tensor([0]), 1).read(torch.outer(left, right)[None])
    expected = (changed[1] - changed[0])[:, t:]
    assert (expected[:, 0] == 0).all() == (when == "after")
    if when == "after":
        found[:, 0] = 0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:dplr. running the slow")
def test_readers_of_a_low_rank_transition():
    """Against `ops.dplr` with the edit in it."""
    T, K, V, t = 8, 4, 3, 2
    q, k, a, b = (torch.randn(1, T, 1, K, dtype=torch.float64) for _ in range(4))
    v, g = torch.randn(1, T, 1, V, dtype=torch.float64), -torch.rand(1, T, 1, K, dtype=torch.float64)
    left, right = torch.randn(K).double(), torch.randn(V).double()
    edit = Edits([0], [t], [0], left[None], right[None])
    plain = dplr(q, k, v, g, a, b, return_writes=True, backend="reference")
    changed = dplr(q, k, v, g, a, b, edits=edit, backend="reference")
    later = slice(t, T)
    erase = tuple(x[:, later, 0] for x in plain.writes.erase)
    r = reader(q[:, later, 0], k[:, later, 0], plain.writes.decay[:, later, 0], None, erase)
    torch.testing.assert_close((r @ left)[..., None] * right, (changed.o - plain.o)[:, later, 0])
