"""A family that nobody has heard of, attached to by a table alone: `models.binding`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import toy_model
from toy_model import HK, H, K, V

from writesae import Edits
from writesae.experiments.engine import ForkEngine, Places, read
from writesae.models import attach, binding, hf_gated_delta, intercept, layers, self_test, sites
from writesae.models.binding import Binding, Recurrence
from writesae.ops import gated_delta_rule
from writesae.ops.rule import Rule, RuleCall
from writesae.ops.ssd import RULE as SSD

# ---- the table ------------------------------------------------------------------------------------------------

ARGUMENTS = ("query", "key", "value", "keep", "rate")
NAMES = ("reads", "writes", "content", "fade", "force")  # of the rule's inputs, like no other rule's


def run(reads, writes, content, fade, force, **options):
    return gated_delta_rule(reads, writes, content, fade, force, scale=1.0, **options)


RULE = Rule("toy", ("scalar",), "delta", NAMES, run)


def transposed(state):
    return None if state is None else state.transpose(-1, -2)


def bind_many(site, given):
    inputs = dict(zip(NAMES, (given[name] for name in ARGUMENTS), strict=True))
    inputs["fade"] = inputs["fade"].log()
    return RuleCall(site.binding.rule, inputs, initial_state=transposed(given.get("state")))


def answer_many(given, output):
    return (output.o, transposed(output.final_state)) if given.get("want_state") else output.o


def with_time(given):
    return {**given, **{name: given[name][:, None] for name in ARGUMENTS}}


def bind_one(site, given):
    return bind_many(site, with_time(given))


def answer_one(given, output):
    given["state"].copy_(transposed(output.final_state))
    return output.o[:, 0]


def step_one(given, state):
    return (transposed(state).contiguous(), *(given[name][:, -1] for name in ARGUMENTS)), {"erase": given["erase"]}


MANY = Recurrence("remember_many", ARGUMENTS, bind_many, answer_many, asks_state="want_state", optional=("state",))
ONE = Recurrence(
    "remember_one", ("state", *ARGUMENTS), bind_one, answer_one, asks_state=None, step=step_one,
    parts=lambda given, returned: (returned, given["state"]),
)  # fmt: skip
TOY = Binding(
    name="toy memory", kind="toy", models=("Toy",), rule=RULE, recurrences=(MANY, ONE), home=("toy_model",),
    layer={
        "layer_index": ("number",), "num_k_heads": ("key_heads",), "num_v_heads": ("heads",), "K": ("key_size",),
        "V": ("value_size",), "out_proj": ("out_proj",),
    },
    value="content", strength="force", queries=lambda call: call.inputs["reads"],
    bypasses={"remember_at_once": lambda layer, x: None},
)  # fmt: skip


def bind_additive(site, given):
    """Without erase: S = exp(dt A) S + B (dt x)^T."""
    query, key, value, keep, rate = (given[name] for name in ARGUMENTS)
    dt = -keep.log()
    inputs = {"x": rate[..., None] * value / dt[..., None], "dt": dt, "A": -dt.new_ones(H), "B": key, "C": query}
    return RuleCall(site.binding.rule, inputs, initial_state=transposed(given.get("state")))


def bind_additive_one(site, given):
    return bind_additive(site, with_time(given))


ADDITIVE = replace(
    TOY, rule=SSD, recurrences=(replace(MANY, bind=bind_additive), replace(ONE, bind=bind_additive_one)), value="x",
    strength="dt", queries=lambda call: call.inputs["C"],
)  # fmt: skip


# ---- models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch):
    """Has the toy's layers found by a table."""

    def use(wanted: Binding):
        monkeypatch.setattr(sites, "bindings", [*binding.bindings, wanted])
        self_test._passed.clear()

    return use


@pytest.fixture(params=[TOY, ADDITIVE], ids=["delta", "additive"])
def model(request, table):
    """A random model of either kind of layers, bound."""
    table(request.param)
    return random_model(erase=request.param is TOY)


def random_model(erase: bool = True):
    made = toy_model.Model(erase).eval()
    for parameter in made.parameters():
        parameter.data.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    return made


def ids(rows=2, length=9):
    return torch.randint(0, 31, (rows, length), generator=torch.Generator().manual_seed(1))


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def own_states(model, text):
    """`[B, T, H, K, V]` of the first layer, token by token, by the model alone."""
    cache, found = toy_model.Cache(), []
    for t in range(text.shape[1]):
        model(text[:, t : t + 1], cache=cache)
        found.append(cache.states[0].transpose(-1, -2).clone())
    return torch.stack(found, 1)


# ---- what attach does with it ---------------------------------------------------------------------------------


def test_layers_are_found_by_the_table(model):
    found = layers(model)
    assert [(s.layer_index, s.path) for s in found] == [(0, "blocks.0.memory"), (1, "blocks.1.memory")]
    site = found[0]
    assert (site.num_k_heads, site.num_v_heads, site.K, site.V, site.conv_kernel_size) == (HK, H, K, V, 1)
    assert site.binding in (TOY, ADDITIVE) and site.norm is None and site.out_proj is model.blocks[0].memory.out_proj
    message = r"expected a model with gated-delta layers \(.*\) or toy layers \(Toy, ...\), got Linear, which calls"
    with pytest.raises(ValueError, match=message):
        with attach(torch.nn.Linear(1, 1), {(0, 0): None}):
            pass
    with pytest.raises(ValueError, match=r"expected one of the toy layers \[0, 1\], got layer 2, which Model does not"):
        with attach(model, {(2, 0): None}):
            pass


@torch.no_grad()
def test_writes_are_those_of_the_models_own_states(model):
    text = ids()
    plain, states = model(text)["logits"], own_states(model, text)
    with attach(model, {(0, 1): None}) as tap:
        close(model(text)["logits"], plain)
        close(tap.writes[0].states(range(9)), states)
        out = model(text[:, :4], use_cache=True)
        out = model(text[:, 4:7], cache=out["cache"])
        close(tap.writes[0].states(range(3)), states[:, 4:7])
        for t in (7, 8):
            out = model(text[:, t : t + 1], cache=out["cache"])
            close(out["logits"], plain[:, t : t + 1])
            close(tap.writes[0].states([0]), states[:, t : t + 1])
        assert tap.starts[0] == 8 and tap.calls == {0: 5}
    assert toy_model.remember_many.__name__ == "remember_many" and not hasattr(toy_model.remember_many, "__wrapped__")


@torch.no_grad()
def test_an_edit_is_what_it_does_to_the_models_own_state(model):
    text, t = ids(), 4
    left, right = torch.randn(1, K), torch.randn(1, V)
    cache = toy_model.Cache()
    model(text[:, : t + 1], cache=cache)
    cache.states[0][1, 2] += 2 * right[0][:, None] * left[0]
    expected = model(text[:, t + 1 :], cache=cache)["logits"]
    plan = {0: Edits([1], [t], [2], 2 * left, right, when="after")}
    plain = model(text)["logits"]
    with attach(model, {}, edits=plan) as tap:
        edited = model(text)["logits"]
    close(edited[:, t + 1 :], expected)
    close(edited[:, : t + 1], plain[:, : t + 1])
    assert (edited - plain).abs().max() > 1e-2 and tap.applied[0].all()


def test_gradients_of_writes(model):
    """Of an increment: as of an edit that adds to it."""
    text, (b, t, h) = ids(), (1, 3, 2)
    with attach(model, {(0, 0): None}, accelerate=True, write_gradients=True) as tap:
        model(text)["logits"][:, -1].square().sum().backward()
    right = torch.zeros(1, V, requires_grad=True)
    plan = {0: Edits([b], [t], [h], tap.writes[0].left[b, t, None, h // 2, 0].detach(), right)}
    with attach(model, {}, edits=plan, accelerate=True):
        model(text)["logits"][:, -1].square().sum().backward()
    close(tap.write_gradients[0][b, t, h], right.grad[0])
    assert right.grad.abs().max() > 1e-3


@torch.no_grad()
def test_handlers_of_both_kinds(table):
    table(TOY)
    model, text, seen = random_model(), ids(), []
    plain = model(text)["logits"]

    def by_arguments(reads, writes, content, fade, force, initial_state, output_final_state, cu_seqlens):
        seen.append((content.shape, initial_state, output_final_state, cu_seqlens))
        out = run(reads, writes, content, fade, force)
        return out.o, out.final_state

    def by_call(call, output_final_state):
        seen.append(call.rule.name)
        out = call.run()
        return replace(out, o=0 * out.o)

    with intercept(model, {0: by_arguments}):
        close(model(text)["logits"], plain)
    assert seen == [((2, 9, H, V), None, False, None)]
    with intercept(model, calls={1: by_call}):
        without = model(text)["logits"]
    close(without, model.head(model.norm(model.blocks[0](model.embedding(text)))))
    assert seen[1:] == ["toy"]
    with pytest.raises(ValueError, match=r"calls: expected layers that are not in rules, got layers \[0\] in both"):
        with intercept(model, {0: by_arguments}, calls={0: by_call}):
            pass


@pytest.mark.usefixtures("one_thread")
@torch.no_grad()
def test_forks_know_no_rule(model):
    text, places = ids(1, 12), Places(torch.tensor([0, 0]), torch.tensor([2, 6]), torch.tensor([3, 1]))
    engine = ForkEngine(model, 0, 3)
    clean = engine.clean(text, torch.tensor([12]), lambda writes: places)
    native = read(clean, clean.left, clean.right)
    hidden = engine.run(clean, {"baseline": None, "delete": -native})
    logits = {name: engine.logits(x) for name, x in hidden.items()}
    plain = model(text)["logits"]
    with attach(model, {}, edits={0: Edits.delete([0, 1], [2, 6], [3, 1], K, V)}):
        deleted = model(text.expand(2, -1))["logits"]
    for i, t in enumerate((2, 6)):
        close(logits["baseline"][i], plain[0, t : t + 4])
        close(logits["delete"][i], deleted[i, t : t + 4])
    assert (logits["delete"] - logits["baseline"]).abs().max() > 1e-2
    *_, value, _, rate = model.blocks[0].memory.project(model.embedding(text))
    written = rate[..., None] * value
    close(clean.outer_right, torch.stack([written[0, 2, 3], written[0, 6, 1]]))


# ---- tables that are wrong ------------------------------------------------------------------------------------


def wrongly_faded(site, given):
    call = bind_many(site, given)
    return replace(call, inputs={**call.inputs, "fade": given["keep"] - 1})  # log, nearly


WRONG = {
    "bind": (MANY, {"bind": wrongly_faded}, "the output of the toy memory of layer 0 differs"),
    "answer": (
        MANY,
        {"answer": lambda given, out: (out.o, -transposed(out.final_state))},
        "the state of the toy memory",
    ),
    "layout": (MANY, {"answer": lambda given, out: (out.o, out.final_state)}, r"the state of the toy memory .* is \(2"),
    "step": (
        ONE, {"step": lambda given, state: (step_one(given, state)[0], {"erased": True})},
        "the one-token rule of layer 0 cannot be called with 6 positions and erased: got an unexpected keyword",
    ),
    "in place": (ONE, {"answer": lambda given, out: out.o[:, 0]}, "the state of the one-token rule of layer 0 differs"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_self_test_catches_a_wrong_table(table, name):
    of, change, message = WRONG[name]
    table(replace(TOY, recurrences=tuple(replace(r, **change) if r is of else r for r in TOY.recurrences)))
    with pytest.raises(RuntimeError, match=f"attach: self-test failed: {message}"):
        with attach(random_model(), {(0, 0): None}):
            pass


def test_a_bypass_that_is_not_in_the_table_is_found_out(table):
    table(replace(TOY, bypasses={}))
    with pytest.raises(RuntimeError, match=r"layers \[0\] ran without calling the toy memory where their class does"):
        with attach(random_model(), {(0, 0): None}):
            pass


@torch.no_grad()
def test_a_flag_of_the_layer_is_a_bypass_too(table):
    table(replace(TOY, bypasses={"fast": False}))
    model, text = random_model(), ids()
    plain = model(text)["logits"]
    with attach(model, {(1, 0): None}) as tap:
        close(model(text)["logits"], plain)
        assert tap.calls == {1: 1} and model.blocks[1].memory.fast
    assert "fast" not in toy_model.Memory.__dict__


def test_a_table_takes_layers_of_its_home_with_all_they_need(table):
    table(replace(TOY, home=("other_model", "toy_models")))
    model = random_model()
    assert layers(model) == []
    table(replace(TOY, layer={**TOY.layer, "V": ("value_size_", "v_size")}))
    with pytest.raises(ValueError, match="Memory calls the toy memory but has none of value_size_, v_size"):
        layers(model)
    assert hf_gated_delta.BINDING in binding.bindings and TOY not in binding.bindings
