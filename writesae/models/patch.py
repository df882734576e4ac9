"""Standing in for functions while somebody needs it, with nothing stored on a model.

A name is replaced in a *class* or in a module's globals, never on an instance; whose call it is, is looked up in a
registry by the module's identity. So a copy, a pickle or an average of a hooked model is a model like any other, and
other models of its class run as they are. Everything one attach has put in place belongs to its `Owner`; `close` takes
it away and may be called again, also after an interrupt in the middle of an earlier call: every step of it, and of
putting in place, can be repeated.

Which owners serve a call depends on the thread that makes it: see `Entry.serving`.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from types import MethodType

import torch
from torch import nn
from torch._C._dynamo import eval_frame

from .arguments import Reader

lock = threading.RLock()
patches: dict[tuple[int, str], Patch] = {}  # (id of the class or globals, name) -> what stands there
entries: dict[int, Entry] = {}  # id(module) -> what is known of it


class _Local(threading.local):
    def __init__(self):
        self.attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules this thread has hooked itself


_local = _Local()


class Owner:
    """What one attach has put in place, and takes away again:

        with Owner() as owner, owner:

    Entered twice, so that it is closed twice: should an interrupt hit the first `close`, the second does it all.

    Args:
        private: it serves calls of its own thread only.
        alone: private, and calls of its thread see nothing else (for self-tests).
    """

    def __init__(self, private: bool = False, alone: bool = False):
        self.thread, self.private, self.alone = threading.get_ident(), private or alone, alone
        self._patches: list[Patch] = []
        self._entries: list[Entry] = []

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def patch(self, space, name: str, make: Callable) -> None:
        """Puts `make(original)` in the place of `name` in a class or a dictionary of globals. Under `lock`."""
        key = (id(space), name)
        standing = patches.get(key)
        patch = standing or Patch(space, name, make)
        self._patches.append(patch)  # before anything is done, so that `close` finds it
        patches[key] = patch
        patch.owners.add(self)
        if standing is None:  # else it is there, or under a wrapper of somebody's
            patch.put()

    def join(self, module: nn.Module, name: str, body: Callable, member: object) -> None:
        """Has calls of `module.name(...)` run `body(entry, call, args, kwargs)`, where `call(*args, **kwargs)` is the
        original. `member` is what `entry.serving()` lists for this owner. Under `lock`."""
        entry = entries.get(id(module)) or Entry(module)
        self._entries.append(entry)
        entries[id(module)] = entry
        entry.bodies[name] = body
        entry.members[self] = member
        kind = type(module)
        # An instance's own forward (accelerate's, say) goes by its class's; the call goes by that of neither.
        where = "__call__" if name in module.__dict__ and name == "forward" else name
        entry.names[where] = name
        self.patch(kind, where, functools.partial(_method, kind, where))

    def mark(self, modules) -> None:
        """From now on, this thread's calls of these modules are its own affair."""
        for module in modules:
            _local.attached.add(module)

    def close(self) -> None:
        """Takes everything away. Safe to repeat."""
        with lock:
            for entry in self._entries:
                entry.members.pop(self, None)
                if not entry.members and entries.get(id(entry.module)) is entry:
                    del entries[id(entry.module)]
            for patch in self._patches:
                patch.owners.discard(self)
                if not patch.owners:
                    patch.take_away()


class Patch:
    """One name of a class or of a module's globals, replaced while it has owners."""

    def __init__(self, space, name: str, make: Callable):
        self.space, self.name = space, name
        self.is_class = isinstance(space, type)
        self.inherited = self.is_class and name not in space.__dict__
        self.original = getattr(space, name, None) if self.is_class else space[name]
        self.shim = make(self.original)
        self.owners: set[Owner] = set()

    def _now(self):
        return (self.space.__dict__ if self.is_class else self.space).get(self.name)

    def put(self) -> None:
        if self.is_class:
            setattr(self.space, self.name, self.shim)
        else:
            self.space[self.name] = self.shim

    def take_away(self) -> None:
        # Where somebody has put a wrapper of their own around the shim, it stays, and only passes calls on.
        if self._now() is self.shim:
            if not self.is_class:
                self.space[self.name] = self.original
            elif self.inherited:
                delattr(self.space, self.name)
            else:
                setattr(self.space, self.name, self.original)
        key = (id(self.space), self.name)
        if patches.get(key) is self:
            del patches[key]


def mine(space, name: str) -> bool:
    """Whether an owner of this thread has put what stands in the place of this name."""
    standing = patches.get((id(space), name))
    here = threading.get_ident()
    return standing is not None and any(owner.thread == here for owner in tuple(standing.owners))


class Entry:
    """A module whose calls somebody wants to stand in for.

    Attributes:
        bodies: {method: what runs in its place}.
        members: {owner: what it has to say about this module}, in the order of joining.
        names: {name patched in the class: the method it stands for}.
        reader: reads the arguments of `forward` by their role.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.bodies: dict[str, Callable] = {}
        self.names: dict[str, str] = {}
        self.members: dict[Owner, object] = {}

    @functools.cached_property
    def reader(self) -> Reader:
        # Of the class: an instance's own forward takes whatever it wraps takes.
        return Reader(MethodType(forward_of(self.module), self.module), type(self.module).__name__)

    def serving(self) -> list:
        """Members of the owners that serve a call on this thread, the latest first.

        Calls of a thread that has hooked this module itself are served by that thread's owners alone. Calls of any
        other thread are served by all owners: somebody attached on their behalf.
        """
        mine, others = [], []
        here = threading.get_ident()
        for owner, member in reversed(tuple(self.members.items())):
            if owner.thread != here:
                if not owner.private:
                    others.append(member)
            elif owner.alone:
                return [member]
            else:
                mine.append(member)
        return mine if mine or self.module in _local.attached else others


def entry_of(module: nn.Module) -> Entry | None:
    """What is known of a module, if anything."""
    entry = entries.get(id(module))
    return entry if entry is not None and entry.module is module else None


def _method(kind: type, where: str, original: Callable) -> Callable:
    """Stands in for a method of a class."""

    @functools.wraps(original)
    def shim(self, *args, **kwargs):
        entry = entries.get(id(self))
        # A subclass that calls super() comes by here too: only the method of the module's own class counts.
        if entry is None or entry.module is not self or type(self) is not kind or where not in entry.names:
            return original(self, *args, **kwargs)
        refuse_tracing()
        return entry.bodies[entry.names[where]](entry, MethodType(original, self), args, kwargs)

    return shim


class Attribute:
    """Stands in, on a class, for a function that its instances keep in an attribute of their own: for those of which
    `active(instance)` holds, `make(function)` is found in its place."""

    def __init__(self, name: str, make: Callable, active: Callable):
        self.name, self.make, self.active = name, make, active

    def __get__(self, instance, owner=None):
        if instance is None:
            return self
        try:
            own = instance.__dict__[self.name]
        except KeyError:
            raise AttributeError(self.name) from None
        return self.make(own) if self.active(instance) else own

    def __set__(self, instance, value):
        instance.__dict__[self.name] = value

    def __delete__(self, instance):
        del instance.__dict__[self.name]


def refuse_tracing() -> None:
    # The second: whether torch.compile gave up on a frame around this and would go on with the pieces inside.
    if torch.compiler.is_compiling() or callable(eval_frame.get_eval_frame_callback()):
        raise RuntimeError(
            "writesae: an attached model cannot be traced by torch.compile or torch.export; run it eagerly"
        )


def forward_of(module: nn.Module, method: str = "forward") -> Callable:
    """The module's class's own forward (or another method), under every wrapper that names what it wraps, or
    (transformers before 5.15) takes anything and keeps one function to call."""
    function = inspect.unwrap(getattr(type(module), method))
    code = getattr(function, "__code__", None)
    if code is not None and code.co_argcount == 1 and code.co_flags & inspect.CO_VARARGS:
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        held = [f for f in held if inspect.isfunction(f) and f.__name__ == method]
        if len(held) == 1:
            return inspect.unwrap(held[0])
    return function
