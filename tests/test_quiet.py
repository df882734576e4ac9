"""`quiet`: transformers' false alarms are silent in our own calls, and nothing else is, nowhere else and no longer."""

from __future__ import annotations

import logging
import sys
import threading

import pytest
import torch
import transformers
from tiny_models import tiny_model

import writesae
from writesae.models import load
from writesae.models.quiet import FALSE_ALARMS, _inside, quiet

ALARM = "`chunk_gated_delta_rule` is falling back to its reference PyTorch implementation because it is much slower"
EARLIER = "The fast path is not available because one of the required library is not installed."


@pytest.fixture
def said():
    """Messages that transformers' loggers write, none remembered from other tests."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    root = logging.getLogger("transformers")
    root.addHandler(handler)
    logging.Logger.warning_once.cache_clear()
    yield found
    root.removeHandler(handler)


def log(message):
    transformers.utils.logging.get_logger("transformers.some.module").warning_once(message)


def test_only_the_false_alarms_are_silent_and_they_are_not_used_up(said):
    before = logging.Logger.warning_once
    with quiet():
        with quiet():
            log(ALARM), log(EARLIER), log("another message")
        log(ALARM)
    assert said == ["another message"]
    assert logging.Logger.warning_once is before
    log(ALARM), log(EARLIER)
    assert said[1:] == [ALARM, EARLIER]


def test_other_threads_are_heard(said):
    with quiet():
        thread = threading.Thread(target=log, args=[ALARM])
        thread.start()
        thread.join()
    assert said == [ALARM]


def test_nothing_is_left_after_an_error(said):
    before = logging.Logger.warning_once
    with pytest.raises(KeyboardInterrupt), quiet():
        raise KeyboardInterrupt
    assert logging.Logger.warning_once is before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_is_left_wherever_an_interrupt_comes(said):
    """At every line of the module in turn, then with the context ended as usual."""
    before, file = logging.Logger.warning_once, quiet.__wrapped__.__code__.co_filename

    def run(nth: int) -> bool:
        """Whether the nth line was reached."""
        left = nth

        def trace(frame, event, argument):
            nonlocal left
            if frame.f_code.co_filename != file:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            with quiet():
                log(ALARM)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        return left <= 0

    lines = 0
    while run(lines + 1):
        lines += 1
        assert logging.Logger.warning_once is before and not _inside, f"line {lines}"
    assert lines > 15 and said == []


def test_many_threads(said):
    before = logging.Logger.warning_once

    def work():
        for _ in range(300):
            with quiet():
                log(ALARM)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [] and logging.Logger.warning_once is before


@torch.no_grad()
def test_an_attached_model_raises_no_false_alarm(said):
    model = tiny_model()
    ids = torch.randint(3, 90, (1, 9))
    said.clear()  # before 5.23 it is said when the plain model is made
    with writesae.attach(model, {(0, 1): None}) as tap:
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert tap.calls and not [x for x in said if FALSE_ALARMS.search(x)]


def test_loading_raises_no_false_alarm(said):
    load("default")
    assert not [x for x in said if FALSE_ALARMS.search(x)]


def test_a_plain_model_is_still_warned_of(said):
    """What is silenced exists: without it, this file proves nothing."""
    model = tiny_model()
    with torch.no_grad():
        with writesae.attach(model, {(0, 1): None}):
            model(torch.tensor([[5, 6, 7]]))
        model(torch.tensor([[5, 6, 7]]))
    assert [x for x in said if FALSE_ALARMS.search(x)]


def test_a_text_that_is_cut_into_passages_is_not_called_too_long(said):
    from writesae.experiments import passages_of
    from writesae.sae import Passages

    tokenizer = writesae.load_default().tokenizer
    tokenizer.model_max_length = 16
    texts = [("a", "for name in names:\n    print(name)\n" * 20)]
    assert len(Passages.from_texts(texts, tokenizer, 16)) > 3 and len(passages_of(texts, tokenizer, 16)) > 3
    assert said == []
    tokenizer(texts[0][1])  # in the user's own call it is as it was
    assert len(said) == 1 and "longer than the specified maximum" in said[0]
