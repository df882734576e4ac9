"""Whose call an attach serves, on which thread; and that nothing of it is on the model, whatever happens."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import sys
import threading

import pytest
import test_attach_calls
import torch
from test_attach import close, dictionaries, module_functions, one_edit, same_firings
from tiny_models import tiny_model, tokens

import writesae
from writesae.models import attach, hf_gated_delta, patch, self_test

model = test_attach_calls.model  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread", "nothing_stays")

# ---- whose call it is -----------------------------------------------------------------------------------------


def test_another_threads_self_test_serves_that_thread_alone(model, monkeypatch):
    """A holds an attach with an edit while B is inside its self-test on the same model."""
    text, run = tokens(1, 6), self_test._run
    edits = {0: one_edit(0, 2, 1)}
    with attach(model, dictionaries(), edits=edits) as tap:
        expected = model(text).logits
    alone = tap.firings
    inside, go_on = threading.Event(), threading.Event()

    def slow(inner):
        inside.set()
        assert go_on.wait(30)
        run(inner)

    monkeypatch.setattr(self_test, "_run", slow)
    self_test._passed.clear()
    failures = []

    def other():
        try:
            with torch.no_grad(), attach(model, {(0, 0): None}) as tap:
                model(text)
            assert tap.calls == {0: 1}
        except BaseException as error:
            failures.append(error)

    with attach(model, dictionaries(), edits=edits, self_test=False) as tap:
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(30)
        assert torch.equal(model(text).logits, expected)
        go_on.set()
        thread.join()
    assert not failures, failures
    same_firings(tap.firings, alone)
    assert tap.calls == {0: 1, 3: 1}


def threads_on_one_model(model, workers: int, rounds: int) -> None:
    """Threads that attach, test, run and detach on one model: every context sees exactly its calls."""
    work = []
    for n in range(workers):
        text, plan = tokens(1, 5 + n, seed=n), {0: one_edit(0, n % 5, n % 4, seed=n)}
        with attach(model, dictionaries(), edits=plan) as tap:
            logits = model(text).logits
        work.append((text, plan, logits, tap.firings))
    failures = []

    def run(n):
        text, plan, logits, firings = work[n]
        try:
            with torch.no_grad():
                for i in range(rounds):
                    if i % 4 == n % 4:
                        self_test._passed.clear()
                    with attach(model, dictionaries(), edits=plan) as tap:
                        for _ in range(1 + i % 2):
                            assert torch.equal(model(text).logits, logits)
                    assert tap.calls == {0: 1 + i % 2, 3: 1 + i % 2}
                    same_firings(tap.firings, writesae.Firings.cat([firings] * (1 + i % 2)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(workers)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failures, failures


def test_threads_that_attach_see_each_their_own_calls(model):
    before = module_functions(model)
    threads_on_one_model(model, 8, 8)
    assert module_functions(model) == before


# ---- nothing on the model -------------------------------------------------------------------------------------


def test_copies_of_an_attached_model_are_free_of_it(model):
    text = tokens(1, 6)
    with attach(model, dictionaries(), accelerate=True) as tap:
        logits = model(text).logits
        tap.clear()
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        copies = [
            copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False),
            torch.optim.swa_utils.AveragedModel(model).module,
        ]  # fmt: skip
        for other in copies:
            close(other(text).logits, logits)
            for parameter in other.parameters():
                parameter.zero_()
            assert float(other(text).logits.abs().max()) == 0
            assert not any("forward" in m.__dict__ or "generate" in m.__dict__ for m in other.modules())
        assert len(tap.firings) == 0 and tap.calls == {0: 1, 3: 1}
        assert torch.equal(model(text).logits, logits)


def test_an_uncopied_model_of_the_class_may_be_compiled(model):
    other, text = tiny_model(seed=3), tokens(1, 5)
    expected = other(text).logits
    with attach(model, dictionaries()) as tap:
        close(torch.compile(other, backend="eager")(text).logits, expected)
        assert tap.calls == {0: 0, 3: 0}
        model(text)


class _Interrupt(BaseException):
    pass


def interrupted(n: int, run) -> bool:
    """Runs, and interrupts at the n-th line that our model code executes. Whether it came so far."""
    files = {m.__file__ for name, m in list(sys.modules.items()) if name.startswith("writesae.models.")}
    left = n

    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise _Interrupt
        return trace

    sys.settrace(trace)
    try:
        run()
    except _Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def interrupt_everywhere(model, accelerate: bool, with_test: bool, step: int) -> int:
    """Interrupts attach and detach at every `step`-th line of ours. Returns at how many."""
    before, text = module_functions(model), tokens(1, 3)

    def run():
        if with_test:
            self_test._passed.clear()
        tap_of = attach(model, {(0, 0): None}, edits={3: one_edit(0, 1, 1)}, accelerate=accelerate, self_test=with_test)
        tap = tap_of.__enter__()
        tap.calls.update({0: 1, 3: 1})
        tap.applied[3][:] = True
        tap_of.__exit__(None, None, None)
        del tap_of

    plain, n = model(text).logits, 1
    said = logging.Logger.warning_once  # what `quiet` stands in for
    while interrupted(n, run):
        assert logging.Logger.warning_once is said, n
        assert not patch.entries and not patch.patches and module_functions(model) == before, n
        assert hf_gated_delta.running() is None
        n += step
    assert torch.equal(model(text).logits, plain)
    return n


def test_an_interrupt_anywhere_leaves_nothing(model):
    assert interrupt_everywhere(model, accelerate=False, with_test=False, step=23) > 400
    assert interrupt_everywhere(model, accelerate=True, with_test=True, step=211) > 2000
