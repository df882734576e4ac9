"""Training on a text that is read a pool at a time: every passage once an epoch, in little memory, resumable."""

# ruff: noqa: F811 (fixtures of the other file)

from __future__ import annotations

import argparse
import json

import pytest
import torch
from test_sae_training import (  # noqa: F401
    SMALL,
    command,
    config,
    corpus,
    model,
    model_folder,
    same,
)

from writesae.options import count
from writesae.sae import SAE, ModelStream, Passages, Pools, Trainer
from writesae.text import Corpus

pytestmark = pytest.mark.usefixtures("one_thread")

SITE = (0, 1)


def tokenize(text):
    return [3 + ord(c) % 90 for c in text]


@pytest.fixture
def folder(tmp_path):
    """61 documents of 0 to 1,020 letters, all different, in files and in one file of lines."""
    folder = tmp_path / "text"
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    texts = [
        "".join(chr(97 + x) for x in torch.randint(26, (17 * ((23 * i + 30) % 61),), generator=draw)) for i in range(61)
    ]
    for i, text in enumerate(texts[:30]):
        (folder / f"{i:02}.txt").write_text(text)
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[30:]))
    return folder


def pools(folder, size=20 * 64, **more):
    return Pools(Corpus.from_path(folder), tokenize, 20, size=size, **more)


def every(text: Pools) -> list[torch.Tensor]:
    """The passages of each pool."""
    found = []
    while here := text.pool(len(found)):
        found.append(text.take(torch.arange(here.start, here.stop)).clone())
    return found


# ---- pools ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [20, 39, 640, 20 * 200, 10**6])
@pytest.mark.parametrize("max_tokens", [None, 9013])
def test_pools_are_the_passages_in_their_order(size, max_tokens, folder):
    want = Passages.from_corpus(Corpus.from_path(folder), tokenize, 20, max_tokens=max_tokens)
    text = pools(folder, size, max_tokens=max_tokens)
    assert len(text) == min(len(want), size // 20) and torch.equal(text.ids, want.ids[: len(text)])
    assert text.total == (len(want) if size == 10**6 else None)
    found = every(text)
    assert torch.equal(torch.cat(found), want.ids) and text.total == len(want)
    assert all(len(part) == size // 20 for part in found[:-1]) and len(found[-1])
    assert text.pool(0) == range(len(text)) and torch.equal(text.ids, want.ids[: len(text)])


def test_the_same_documents_are_held_out(folder):
    training, held_out = Passages.split(Corpus.from_path(folder), tokenize, 20)
    whole, parts = pools(folder, 10**6, one_in=20), pools(folder, 640, one_in=20)
    assert torch.equal(whole.held_out, held_out.ids) and torch.equal(whole.ids, training.ids)
    few = len(parts.held_out)
    assert 0 < few < len(held_out) and torch.equal(parts.held_out, held_out.ids[:few])  # those met in the first pool
    assert torch.equal(torch.cat(every(parts)), training.ids)


def test_a_pool_is_read_again_from_where_it_starts(folder):
    text = pools(folder, 640, one_in=20)
    found = every(text)
    for number in (3, 1, len(found) - 1, 0):
        text.pool(number)
        other = pools(folder, 640, one_in=20)
        other.restore(json.loads(json.dumps(text.state())))
        assert torch.equal(other.ids, found[number])
        rest = [other.pool(n) and other.ids.clone() for n in range(number, len(found))]
        assert torch.equal(torch.cat(rest), torch.cat(found[number:]))
    assert other.pool(len(found)) == range(0)


def test_another_text_is_refused(folder):
    """In a later epoch, and on restoring: whatever of it was read before must be the same."""
    text = pools(folder, 640)
    every(text)
    state = text.state()
    file = folder / "more.jsonl"
    file.write_text(file.read_text().replace("z", "y"))
    with pytest.raises(ValueError, match="corpus: expected the text that was read before, got another in pool"):
        every(text)
    with pytest.raises(ValueError, match="got another in pool"):
        pools(folder, 640).restore(state)


@pytest.mark.parametrize(
    "more, message",
    [
        (dict(size=19), "size: expected at least the 20 tokens of a passage, got 19"),
        (dict(max_tokens=0), "max_tokens: expected >= 1, got 0"),
        (dict(max_tokens=5), "corpus: 1 documents with 5 tokens in all, but one passage takes 20"),
        (dict(max_tokens=500, one_in=20), "validation: the corpus is a single document"),
        (dict(max_tokens=515, one_in=20), "corpus: 1 documents with 5 tokens in all, but one passage takes 20"),
    ],
)
def test_texts_too_short_and_wrong_arguments(more, message, folder):
    with pytest.raises(ValueError, match=message):
        pools(folder, **more)


# ---- training -------------------------------------------------------------------------------------------------------


def run(model, text, folder=None, resume=False, until=None, **more):
    with ModelStream(model, text, [SITE]) as stream:
        settings = config(**dict(F=16, steps=60, states=80, block=16, prepare=16) | more)
        trainer = Trainer(stream, [SITE], settings, folder, resume, progress=False)
        trainer.run(until)
        return trainer


def test_every_passage_is_in_a_block_once_an_epoch(model, folder):
    text = pools(folder)
    sizes = [len(part) for part in every(text)]
    blocks = sum(n // 16 for n in sizes)
    with ModelStream(model, text, [SITE]) as stream:
        trainer = Trainer(stream, [SITE], config(F=16, block=16), progress=False)
        rows = [trainer.order.rows(i) for i in range(2 * blocks)]
        again = [trainer.order.rows(i) for i in range(2 * blocks)]
    first, second = torch.cat(rows[:blocks]), torch.cat(rows[blocks:])
    assert len(first.unique()) == len(first) == 16 * blocks > sum(sizes) - 16 and not torch.equal(first, second)
    assert torch.equal(torch.cat(again), torch.cat(rows))
    for part in rows:
        assert len((part // text.size).unique()) == 1  # a block is of one pool


def test_one_pool_trains_as_passages_do(model, folder):
    a = run(model, Passages.from_corpus(Corpus.from_path(folder), tokenize, 20))
    b = run(model, pools(folder, 10**6))
    for (name, x), y in zip(
        a.trainers[SITE].sae.state_dict().items(), b.trainers[SITE].sae.state_dict().values(), strict=True
    ):
        assert torch.equal(x, y), name
    assert a.export()[SITE].training_record == b.export()[SITE].training_record


def test_a_resumed_run_reads_on_where_it_was(model, folder, tmp_path):
    """To the bit, from any pool and in the second epoch; the text is pinned."""

    def train(*where, **more):
        return run(model, pools(folder, max_tokens=9000), *where, steps=160, **more)

    whole = train()
    assert whole.order.state()["epoch"] == 1
    for stop, epoch in (3, 0), (70, 0), (140, 1):
        first = train(tmp_path / str(stop), until=stop)
        assert first.order.state()["epoch"] == epoch and (first.order.state()["at"] > 0) == (stop != 3)
        resumed = train(tmp_path / str(stop), True)
        state, want = resumed.trainers[SITE].state(), whole.trainers[SITE].state()
        assert all(torch.equal(x, want["sae"][name]) for name, x in state["sae"].items())
        assert resumed.history == whole.history
    assert whole.export()[SITE].training_record["passages_in_corpus"] == 450
    assert "passages_in_corpus" not in train(until=9).export()[SITE].training_record
    file = folder / "more.jsonl"
    file.write_text(file.read_text().replace("z", "y"))
    with pytest.raises(ValueError, match="of another run: corpus differs"):
        train(tmp_path / "3", True)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_command_reads_a_pool_at_a_time(model_folder, folder, tmp_path, capsys):
    import writesae.cli  # noqa: F401

    base = ["--model", model_folder, "--corpus", folder, "--max-tokens", "6k", *SMALL, "--site", "0:1"]
    assert command(*base, "--tokens", "1k", "--shuffle", "2k", "--out", tmp_path / "a") == 0
    record = SAE.from_pretrained(tmp_path / "a").training_record
    assert record["steps"] == 1000 // 32 and "passages_in_corpus" not in record
    assert command(*base, "--tokens", "7k", "--shuffle", "2k", "--out", tmp_path / "a", "--resume") == 0
    assert command(*base, "--tokens", "7k", "--shuffle", "2.4k", "--out", tmp_path / "a", "--resume") == 2
    assert "of another run: passages, tokens differs" in capsys.readouterr().err
    record = SAE.from_pretrained(tmp_path / "a").training_record
    assert record["done"] == 7000 // 32 and record["passages_in_corpus"] > 200
    assert command(*base, "--tokens", "1k", "--shuffle", "20", "--out", tmp_path / "b") == 2
    assert "size: expected at least the 24 tokens of a passage, got 20" in capsys.readouterr().err


def test_counts():
    assert [count(x) for x in ("0", "5000", "200k", "100M", "1.5B", "0.1m", " 2T ")] == [
        0, 5000, 200_000, 10**8, 1_500_000_000, 100_000, 2 * 10**12
    ]  # fmt: skip
    for wrong in ("", "k", "1.5", "-3", "1e400k", "nan", "inf", "5GB", "1 000"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number such as 5000, 200k"):
            count(wrong)
