"""Where a model has layers with a recurrent state: `layers`. They are found by the functions they call, in the tables
of all registered families, not by class name.

In classes of known libraries the functions go by the names under which they are looked up, since these bind what can
run. In any other class (code that comes with a model) they are found by what they are, whatever it calls them.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType, ModuleType

import torch
from torch import nn

from . import patch
from .binding import Binding, LayerSite, Recurrence, bindings

_LIBRARIES = ("transformers.", "fla.", "mamba_ssm.", "torch.")  # prefixes of modules, but that of remote code


def is_of_library(kind: type) -> bool:
    """Whether a class is defined in a library whose names are known, rather than in code that comes with a model."""
    return kind.__module__.startswith(_LIBRARIES)


@functools.cache
def _called(function: Callable, binding: Binding) -> tuple[str, ...]:
    """Names that a function looks up in its globals and that the family stands in for."""
    code = getattr(function, "__code__", None)
    if code is None:
        return ()
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return tuple(sorted(name for name in names if binding.stands_in_for(name)))


def _of_globals(module: nn.Module, binding: Binding) -> list[tuple[dict, str]]:
    found: dict[tuple[int, str], tuple[dict, str]] = {}
    for method in binding.methods:
        if not hasattr(type(module), method):
            continue
        function = patch.forward_of(module, method)
        space = getattr(function, "__globals__", {})
        for name in _called(function, binding):
            if callable(space.get(name)):
                found[id(space), name] = space, name
    return list(found.values()) if any(binding.recurrence(name) for _, name in found) else []


def _of_attributes(module: nn.Module, binding: Binding) -> list[tuple[dict, str]]:
    own = module.__dict__
    if not all(callable(own.get(recurrence.name)) for recurrence in binding.recurrences):
        return []
    return [(own, recurrence.name) for recurrence in binding.recurrences] + [
        (own, name) for name in binding.convs if name in own
    ]


@functools.lru_cache(1024)
def _names_in(kind: type) -> tuple[tuple[dict, tuple[str, ...]], ...]:
    """What the methods of a class look up, and functions of its own file that they call: (globals, name and the
    attributes taken of it) each."""
    found: dict[tuple, tuple[dict, tuple[str, ...]]] = {}
    bases = [base for base in kind.__mro__ if not base.__module__.startswith("torch.")]
    waiting = [method for base in bases for method in vars(base).values()]
    looked: set[int] = set()
    while waiting:
        method = waiting.pop()
        method = inspect.unwrap(method) if callable(method) else None
        if not isinstance(method, FunctionType) or id(method) in looked:
            continue
        looked.add(id(method))
        space = method.__globals__
        chain: tuple[str, ...] = ()
        for i in dis.get_instructions(method):
            if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                chain = (i.argval,)
                helper = space.get(i.argval)
                if getattr(helper, "__module__", None) == kind.__module__:
                    waiting.append(helper)
            else:
                chain = (*chain, i.argval) if chain and i.opname in ("LOAD_ATTR", "LOAD_METHOD") else ()
            if chain:
                found[id(space), chain] = space, chain
    return tuple(found.values())


def functions_of(module: nn.Module) -> list[tuple[dict, str]]:
    """(namespace, name) of the functions that the methods of a module's class can call: of their globals, of modules
    among those, and of its own attributes."""
    found = {}
    for space, chain in _names_in(type(module)):  # type: ignore[arg-type]
        where, name = space, chain[0]
        for attribute in chain[1:]:
            if isinstance(where.get(name), ModuleType):
                where, name = vars(where[name]), attribute
        if callable(where.get(name)):
            found[id(where), name] = where, name
    own = module.__dict__
    return [*found.values(), *((own, name) for name, x in own.items() if isinstance(x, FunctionType))]


def _by_identity(module: nn.Module, binding: Binding) -> list[tuple[dict, str]]:
    """The family's functions among those that a module of unknown code can call, if one of whole sequences is there."""
    known = [(space, name, binding.identified(space[name])) for space, name in functions_of(module)]
    found = [(space, name) for space, name, identity in known if identity is not None]
    recurrences = [binding.recurrence(identity) for _, _, identity in known if identity is not None]
    return found if any(r is not None and r.step is None for r in recurrences) else []


def targets_of(module: nn.Module) -> tuple[Binding | None, list[tuple[dict, str]]]:
    """The family of a module, or None, and the functions that its forward calls: (namespace, name) of each, in the
    globals of its file or among its own attributes."""
    if not is_of_library(type(module)):
        for binding in bindings:
            found = _by_identity(module, binding)
            if found:
                return binding, found
    for binding in bindings:
        if binding.home and not type(module).__module__.startswith(binding.home):
            continue
        if binding.inline:
            if patch.forward_of(module).__qualname__.partition(".")[0] in binding.inline:
                return binding, []
            continue
        found = _of_attributes(module, binding) or _of_globals(module, binding)
        if found:
            own = module.__dict__
            flags = [(own, name) for name in binding.bypasses if name in own]
            return binding, [*found, *(flag for flag in flags if flag not in found)]
    return None, []


def unpatched(space: dict, name: str):
    """What stands under a name when nobody stands in for it."""
    standing = patch.patches.get((id(space), name))
    return space.get(name) if standing is None else standing.original


def targets(module: nn.Module) -> list[tuple[dict, str]]:
    """(namespace, name) of the functions that a module's forward calls and its family stands in for."""
    return targets_of(module)[1]


def known_as(binding: Binding, space: dict, name: str) -> str:
    """The family's name of a function that a layer looks up by `name` in `space`."""
    return binding.known_as(name, unpatched(space, name))


def steps(site: LayerSite) -> list[tuple[Recurrence, Callable]]:
    """What the layer calls for one token on a cache, without anything that stands in for it."""
    if site.binding.inline:
        forward = functools.partial(patch.forward_of(site.module), site.module)
        return [(recurrence, forward) for recurrence in site.binding.recurrences]
    found = []
    for space, name in targets(site.module):
        known = known_as(site.binding, space, name)
        recurrence = site.binding.recurrence(known)
        if recurrence is not None and recurrence.step is not None:
            found.append((recurrence, site.binding.usable(known, unpatched(space, name))))
    return found


def _block(modules: Mapping[str, nn.Module], path: str) -> nn.Module:
    """The decoder layer that holds a module: the one of a list, however deep the module lies in it (Zamba's)."""
    inside = path.split(".")[:-1]
    for i in range(len(inside), 0, -1):
        if isinstance(modules[".".join(inside[: i - 1])], nn.ModuleList):
            return modules[".".join(inside[:i])]
    return modules[".".join(inside)]


def layers(model: nn.Module) -> list[LayerSite]:
    """The model's layers with a recurrent state, in order, wherever they are nested.

    Raises:
        ValueError: a layer number occurs twice (two text stacks in one model; pass one of them).
    """
    found: dict[int, LayerSite] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        binding, _ = targets_of(module)
        if binding is None:
            continue
        try:
            index = binding.index(module)
            site = binding.site(module, _block(modules, path), path, whole=is_of_library(type(module)))
        except ValueError as error:
            if is_of_library(type(module)):
                raise
            raise ValueError(
                f"{error}; {path} is taken for one of the {binding.kind} layers because it calls "
                f"{', '.join(name for _, name in targets(module))}"
            ) from None
        if index in found:
            raise ValueError(
                f"model: expected one stack of layers, got layer {index} at {found[index].path} and at {path}; "
                "pass the sub-model you mean"
            )
        found[index] = site
    return [found[i] for i in sorted(found)]


_SHORT = "whose short convolutions keep the last few tokens and no state"
_VECTOR = "whose recurrence keeps a number a channel and no matrix"
_WRITTEN_OUT = "whose recurrence is written out in its forward before transformers 5.15"
_WHY_NOT = {  # family of transformers: why its layers are not attached to
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3", "inkling", "inkling2", "inkling2_loop"), _SHORT),
    **dict.fromkeys(("recurrent_gemma", "rwkv"), _VECTOR),
    "zaya": "whose attention keeps the last few tokens of its convolutions and a delayed value beside keys and values, "
    "and no state",
    "xlstm": "whose mLSTM divides its matrix by a sum of its own (a normaliser and a running maximum), which no rule "
    "here computes",
    **dict.fromkeys(
        ("mamba", "falcon_mamba", "jamba", "zamba", "mamba2", "bamba", "nemotron_h", "granitemoehybrid", "falcon_h1",
         "zamba2"), _WRITTEN_OUT,
    ),
}  # fmt: skip


_ORIGINS = ("fla.ops.", "mamba_ssm.ops.")  # prefixes of modules that define recurrences


def _recurrences_of(module: nn.Module) -> list[str]:
    """Functions of known libraries' operators that a module can call, by where they are defined and its own name."""
    found = []
    for space, name in functions_of(module):
        function = inspect.unwrap(unpatched(space, name))
        home = getattr(function, "__module__", None)
        if isinstance(home, str) and home.startswith(_ORIGINS) and isinstance(function, FunctionType):
            own = function.__name__
            found.append(f"{home}.{own}" + (f" (as {name})" if name != own else ""))
    return found


def _why_not(model: nn.Module) -> str:
    """What is said of a model without layers to attach to."""
    for module in model.modules():
        found = _recurrences_of(module)
        if found:
            known = {r.name for b in bindings for r in b.recurrences if r.step is None}
            return (
                f"whose {type(module).__name__} calls {', '.join(found[:4])}, of which none is one that runs whole "
                f"sequences and is known here ({', '.join(sorted(known))})"
            )
    for module in model.modules():
        place = type(module).__module__.split(".")
        if place[:2] == ["transformers", "models"] and place[2] in _WHY_NOT:
            return _WHY_NOT[place[2]]
    return f"which calls {' or '.join(f'the {b.name}' for b in bindings)} nowhere"


def require_layer(model: nn.Module, by_index: Mapping[int, LayerSite], index: int) -> LayerSite:
    """The site of a layer number, or a ValueError that says what that layer is instead."""
    if index in by_index:
        return by_index[index]
    name = type(model).__name__
    if not by_index:
        kinds = " or ".join(f"{b.kind} layers ({', '.join(b.models)}, ...)" for b in bindings)
        raise ValueError(f"model: expected a model with {kinds}, got {name}, {_why_not(model)}")
    some = next(iter(by_index.values()))
    stack = functools.reduce(getattr, [p for p in some.path.split(".")[:-2] if p], model)
    if isinstance(index, int) and isinstance(stack, nn.ModuleList) and 0 <= index < len(stack):
        what = f"layer {index}, which is a full-attention layer without a recurrent state"
    else:
        what = f"layer {index!r}, which {name} does not have"
    kinds = " or ".join(dict.fromkeys(site.binding.kind for site in by_index.values()))
    raise ValueError(f"layer: expected one of the {kinds} layers {sorted(by_index)}, got {what}")


def enclosing(model: nn.Module, path: str) -> list[nn.Module]:
    """The models around a layer, outermost first: everything above the list that holds its block."""
    chain, at = [model], model
    parts = path.split(".")
    for part in parts:
        at = getattr(at, part)
        chain.append(at)
    last = max((i for i, m in enumerate(chain) if isinstance(m, nn.ModuleList)), default=len(chain) - 1)
    return [m for m in chain[:last] if not isinstance(m, (nn.ModuleList, nn.ModuleDict))]


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes: where its weights are, or (weights that are brought when they are used) will be.

    Raises:
        ValueError: nobody brings them.
    """
    for part in module.modules():  # accelerate's hook
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    tensors = (*module.parameters(), *module.buffers())
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta":
        raise ValueError("model: expected weights, got parameters on the meta device without a hook that loads them")
    return device
