"""`Binding`: the table by which a family of models is attached to. All else in this package knows no family.

To add a family, write one file `models/NAME.py` that holds its table, in this order:

1. **Find the functions.** Open the layer's forward and note what runs its recurrence: usually one function for whole
   sequences and one for a single token on a cache. They must be looked up by name when the layer runs, in the globals
   of the layer's file or in attributes of the layer. Whatever does all in one call and goes past them is a bypass.
   A recurrence that is written out in the forward has none: `inline` (`hf_minimax.py`).
2. **Choose the rule** in `writesae.ops` that computes the same, up to names, layouts and what is done before and after.
   Where its gate is not one a head, say so (`gate`).
3. **Write `bind(site, given) -> RuleCall`** for each function: `given` are its arguments by name, the answer is the
   same call in the rule's terms. Tensors `[B, T, H, ...]` (T = 1 for one token), states `[N, H, K, V]`, key heads as
   they are and not repeated to value heads, gates as the rule wants them (softplus, bias, clamp done). Views rather
   than copies.
4. **Write `answer(given, output)`**: what the function would have returned, from the rule's `RuleOutput`: dtype,
   layout, gates that the function applies itself. A function that changes a state in place does so here.
5. **Write `step(given, state) -> (args, kwargs)`** for the one-token function: how the layer would call it for the last
   token of `given` (arguments of the function for whole sequences) on a cache that holds `state [N, H, K, V]`. The
   self-test calls it so, and compares.
6. **Name the sizes**: which attributes of the layer hold its number, heads, K, V, norm, output map.
7. **Name value, strength and queries** in the call: a token writes `strength * (value - what is erased)`, and `queries`
   are what reads the state, normalised and scaled.
8. **Register**: `BINDING = register(Binding(...))`, and import the file in `models/__init__.py`.
9. **Test**: a tiny random model of the family in `models/tiny.py`, listed in its `every`: `writesae info --models`
   tries it. Attach runs its self-test at first: it holds each function beside the model's own on the same inputs, so a
   wrong table is refused and not recorded.

`hf_gated_delta.py` is such a table, and `tests/test_binding.py` has the smallest one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..ops.rule import Rule, RuleCall, RuleOutput
from .arguments import rule_call
from .patch import Owner

Given = Mapping[str, Any]  # arguments of one call by name


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerSite:
    """One layer with a recurrent state, of one model.

    Attributes:
        layer_index: the layer's number in its model (linear and full-attention layers counted together).
        module: the module whose forward calls the rule (for instance `Qwen3_5GatedDeltaNet`).
        block: the decoder layer that holds it.
        num_k_heads, num_v_heads: key heads and value heads (H = num_v_heads).
        K, V: key and value size of one head's state `[K, V]`.
        conv_kernel_size: width of the causal convolution before the rule, 1 where there is none.
        norm: norm after the rule, of a head's output `[*, V]` or of all heads' `[*, H * V]`, or None.
        out_proj: linear map of the normed heads `[..., H * V]` to the residual stream, or None.
        path: the module's name in its model.
        binding: the table of its family.
    """

    layer_index: int
    module: nn.Module
    block: nn.Module
    num_k_heads: int
    num_v_heads: int
    K: int
    V: int
    conv_kernel_size: int = 1
    norm: nn.Module | None = None
    out_proj: nn.Module | None = None
    path: str
    binding: Binding = field(repr=False)


_DEFAULTS = ("conv_kernel_size", "norm", "out_proj")  # fields of `LayerSite` that have one


def _as_pair(given: Given, returned: Any) -> tuple[Tensor, Tensor | None]:
    return returned if isinstance(returned, tuple) else (returned, None)


@dataclass(frozen=True, eq=False)
class Recurrence:
    """One function by which layers of a family run their recurrence, and how to run a rule in its place.

    Attributes:
        name: what the name ends with by which layers look it up.
        arguments: names of the arguments it cannot do without, in the order in which it takes them.
        optional: those that may follow by position, in order.
        bind: `bind(site, given)`, the same call in the terms of the rule. Without the offsets of a packed batch, which
            are put in (a call that has some of its own keeps them).
        answer: `answer(given, output)`, what the function returns; `output.final_state` is there if it was asked for.
        asks_state: name of the argument that asks for the final state; None where there always is one (a function that
            changes it in place).
        step: `step(given, state)`, see above; None for functions of whole sequences.
        parts: `parts(given, returned)`, (output, final state or None) in what it returned or changed; for comparisons.
        known: further arguments that are understood, by name.
        changes: arguments by which it computes something that `bind` does not know of: refused unless None or False.
    """

    name: str
    arguments: tuple[str, ...]
    bind: Callable[[LayerSite, Given], RuleCall]
    answer: Callable[[Given, RuleOutput], Any]
    asks_state: str | None = "output_final_state"
    step: Callable[[Given, Tensor], tuple[tuple, dict]] | None = None
    parts: Callable[[Given, Any], tuple[Tensor, Tensor | None]] = _as_pair
    optional: tuple[str, ...] = ()
    known: frozenset[str] = frozenset()
    changes: frozenset[str] = frozenset()

    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name. Raises ValueError where it cannot be read."""
        return rule_call(args, kwargs, self.arguments, self.optional, self.known, self.changes)

    def wants_state(self, given: Given) -> bool:
        return self.asks_state is None or bool(given.get(self.asks_state))

    def asking(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of a call that asks for the final state, whatever they were."""
        return dict(kwargs) if self.asks_state is None else {**kwargs, self.asks_state: True}


@dataclass(frozen=True, eq=False)
class Binding:
    """A family of models: its functions, the rule that stands in for them, and where its layers keep their sizes.

    Attributes:
        name: of what the layers compute, in errors: "gated delta rule".
        kind: of its layers, in errors: "gated-delta" layers.
        models: some models of the family, in errors.
        rule: what runs in the functions' place. `bind` makes its calls of `site.binding.rule`.
        recurrences: the functions. A layer of the family calls at least one; one that keeps functions in attributes of
            its own has all of them.
        layer: fields of `LayerSite` (all but module, block, path and binding): the layer's attributes that hold them,
            the first that is there, or a function of the layer, or the value itself (also as the last of them).
        value, strength: names of rule inputs. A token writes `strength [B, T, H] * (value [B, T, H, V] - what is
            erased)`; strength None is 1. Of a rule without an axis of heads both are `[B, T, V]`.
        queries: `queries(call)`, `[B, T, Hk, K]`: what reads the states, normalised and scaled, in the dtype given.
        gate: kind of gate of its calls, one of `rule.gates`.
        one_head_a_call: a layer calls the functions once for each of its value heads, in order, with that head alone.
        inline: classes of layers that have the recurrence written out in their forward. The forward itself is the one
            of `recurrences` then, for whole sequences and for one token: `bind` and `answer` do what it does around the
            rule, and the self-test compares forwards.
        home: prefixes of the modules (files) in which its layers are defined; () is any.
        methods: methods of a layer, forward first, whose globals are looked through for the functions.
        roles: arguments of a layer's forward that have to be found (`arguments.NAMES`).
        convs: names of functions for the short convolution before the rule, called as `causal_conv1d_fn(x, weight,
            bias, activation)`.
        conv_modules: children of a layer that do it, where they are modules with a forward `(hidden_states, cache,
            use_precomputed) -> (y, kept)` of their own.
        bypasses: names that would go past the functions, of globals or of the layer's attributes, with what stands
            there while the layer is intercepted (a function that answers None, a flag that is False).
        origin: prefixes of the modules in which the functions are defined. A layer that no known library defines (code
            that comes with a model) is of the family if it calls one of those, by whatever name.
        on_cpu: names of functions that run on GPUs alone, with the same in torch, called where tensors are on a CPU.
        stand_ins: `stand_ins(owner, layers)`, for layers whose own code cannot run on every machine: where it cannot,
            has owner put in place what they need beside their functions, and answers True. Then all layers run on the
            rule, whoever is intercepted.
        erases_apart: a token makes two writes, what is new and an erase of its own; "the write" of a test is the new.
        looks_back: `looks_back(owner, blocks)` has owner put `looking_back`'s shims in the place of what reads earlier
            tokens in the model's decoder blocks, beside what this table names and attention.
    """

    name: str
    kind: str
    models: tuple[str, ...]
    rule: Rule
    recurrences: tuple[Recurrence, ...]
    layer: Mapping[str, Any]
    value: str
    queries: Callable[[RuleCall], Tensor]
    strength: str | None = None
    gate: str = "scalar"
    one_head_a_call: bool = False
    inline: tuple[str, ...] = ()
    home: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("forward",)
    roles: tuple[str, ...] = ("hidden_states", "cache", "attention_mask")
    convs: tuple[str, ...] = ()
    conv_modules: Callable[[nn.Module], list[nn.Conv1d]] = lambda module: []
    bypasses: Mapping[str, Any] = field(default_factory=dict)
    origin: tuple[str, ...] = ("transformers.models.",)
    on_cpu: Mapping[str, Callable] = field(default_factory=dict)
    stand_ins: Callable[[Owner, list[nn.Module]], bool] | None = None
    erases_apart: bool = False
    looks_back: Callable[[Owner, nn.ModuleList], None] | None = None

    def recurrence(self, name: str) -> Recurrence | None:
        """The function that layers look up by this name."""
        return next((r for r in self.recurrences if name.endswith(r.name)), None)

    def stands_in_for(self, name: str) -> bool:
        """Whether it is the name of a recurrence, a short convolution or a bypass of the family."""
        return self.recurrence(name) is not None or name in self.convs or name in self.bypasses

    def identified(self, function: Any) -> str | None:
        """The family's name of a function that is defined in `origin`, whatever a layer calls it; None of others."""
        if not callable(function):
            return None
        function = inspect.unwrap(function)
        name, home = getattr(function, "__name__", None), getattr(function, "__module__", None)
        if not isinstance(name, str) or not isinstance(home, str) or not home.startswith(self.origin):
            return None
        return name if self.stands_in_for(name) else None

    def known_as(self, name: str, function: Any) -> str:
        """The family's name of a function that a layer looks up by `name`."""
        return name if self.stands_in_for(name) else self.identified(function) or name

    def usable(self, name: str, original: Any) -> Any:
        """The function of this name (some releases have None), which on a CPU goes by `on_cpu`."""
        instead = self.on_cpu.get(name)
        if instead is None:
            return original

        def either(*args, **kwargs):
            tensor = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            on_cpu = original is None or tensor.device.type == "cpu"
            return (instead if on_cpu else original)(*args, **kwargs)

        return either if original is None else functools.wraps(original)(either)

    def index(self, module: nn.Module) -> int:
        """A layer's number in its model."""
        return self._of(module, "layer_index")

    def site(self, module: nn.Module, block: nn.Module, path: str, whole: bool = True) -> LayerSite:
        """Raises ValueError for a layer without one of the attributes; not `whole`: without one that has no default."""
        names = [name for name in self.layer if whole or name not in _DEFAULTS or self._has(module, name)]
        sizes = {name: self._of(module, name) for name in names}
        if "conv_kernel_size" not in sizes:
            widths = (x.kernel_size[0] for x in module.modules() if isinstance(x, nn.Conv1d))
            sizes["conv_kernel_size"] = max(widths, default=1)
        return LayerSite(module=module, block=block, path=path, binding=self, **sizes)

    def _has(self, module: nn.Module, name: str) -> bool:
        where = self.layer[name]
        return not isinstance(where, tuple) or any(hasattr(module, x) for x in where if isinstance(x, str))

    def _of(self, module: nn.Module, name: str) -> Any:
        where = self.layer[name]
        if not isinstance(where, tuple):
            return where(module) if callable(where) else where
        for attribute in where:
            found = getattr(module, attribute, None) if isinstance(attribute, str) else attribute
            if found is not None:
                return found
        raise ValueError(f"model: {type(module).__name__} calls the {self.name} but has none of {', '.join(where)}")

    def factors(self, call: RuleCall) -> tuple[Tensor, Tensor | None]:
        """Value `[B, T, H, V]` and strength `[B, T, H]` of what each token writes (without heads: both `[B, T, V]`)."""
        value = call.inputs[self.value]
        assert value is not None
        return value, None if self.strength is None else call.inputs[self.strength]

    def size(self, call: RuleCall) -> tuple[int, int]:
        """Rows and columns of a call."""
        value, _ = self.factors(call)
        return value.shape[0], value.shape[1]


bindings: list[Binding] = []  # of all families; where two fit a layer, the first


def register(binding: Binding) -> Binding:
    """Has layers of this family found from now on."""
    bindings.append(binding)
    return binding
