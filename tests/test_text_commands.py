"""Every command reads one corpus the same way: documents, tokens, the first token, what is left out and refused."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

import writesae
from writesae.cli import main
from writesae.collect import Store, command
from writesae.experiments import passages_of
from writesae.experiments.replace import select_tokens
from writesae.text import Corpus, arguments, tokens


def tokenizer(**special) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({"<end>": 0, **{c: i + 1 for i, c in enumerate(alphabet[:255])}}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def with_template(template: str, **special) -> PreTrainedTokenizerFast:
    """Adds tokens of its own around a text."""
    made = tokenizer(**special)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<end>", 0), ("!", 1)]
    )
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/ and a dictionary for its layer 0 head 1; corpus/, where every kind of file and of trouble is."""
    root = tmp_path_factory.mktemp("commands")
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=16, linear_conv_kernel_dim=4, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    Qwen3_5ForCausalLM(config).save_pretrained(root / "model")
    tokenizer(bos_token="<end>").save_pretrained(root / "model")
    writesae.SAE(8, 16, F=24, k=4, layer=0, head=1).save_pretrained(root / "sae")
    corpus = root / "corpus"
    (corpus / ".git").mkdir(parents=True)
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "linked.md").write_text("linked text, " * 9)
    (corpus / "shards").symlink_to(root / "elsewhere")
    (corpus / "round").symlink_to(corpus)
    (corpus / "gone").symlink_to("nowhere")
    (corpus / ".git" / "config").write_text("hidden")
    (corpus / "picture.png").write_bytes(b"\x89PNG\0")
    (corpus / "empty.txt").write_text("")
    (corpus / "a.jsonl").write_text('{"text": "of lines, %s"}\n{"text": ""}\n' % ("line " * 9))
    (corpus / "b.json.gz").write_bytes(gzip.compress(json.dumps([{"text": "of an array " * 5}]).encode()))
    (corpus / "c.txt").write_text("wide text " * 9, encoding="utf-16")
    column = pa.array(["of a table " * 7, None], pa.string_view())
    pq.write_table(pa.table({"text": column}), corpus / "d.parquet")
    return root


LEFT_OUT = {"binary": 1, "dangling link": 1, "empty": 2, "hidden": 1, "loop": 1, "null text": 1}
TEXTS = {
    "a.jsonl:1": "of lines, " + "line " * 9, "b.json.gz:1": "of an array " * 5, "c.txt": "wide text " * 9,
    "d.parquet:0": "of a table " * 7, "shards/linked.md": "linked text, " * 9,
}  # fmt: skip


class Enough(ValueError):
    """The text has been read."""


def read_by(name: str, folder, out, monkeypatch, capsys, *more) -> tuple[list[list[int]], dict, str]:
    """(tokens of each document as the command saw them, what was left out by reason, what the command said)."""
    base = ["--model", str(folder / "model"), "--out", str(out), *map(str, more)]
    corpus = str(folder / "corpus")
    sae = ["--sae", str(folder / "sae")]
    if name == "collect":
        assert main(["collect", corpus, *sae, "--context", "16", *base]) == 0
        store = Store(out)
        documents = [store.tokens(d).tolist() for d in range(store.summary()["documents"])]
        out, err = capsys.readouterr()
        return [d for d in documents if d], json.loads(out)["left_out"], err
    seen, corpora = [], []
    if name == "train":
        monkeypatch.setattr("writesae.sae.train.Trainer", lambda stream, *a, **k: seen.append(stream.passages.ids))
        given = ["train", "--corpus", corpus, "--validation", corpus, "--site", "0:1", "--length", "1", "--quiet"]
    else:

        def caught(model, tokenizer, saes, passages, **options):
            seen.append(passages)
            raise Enough("read")

        monkeypatch.setattr("writesae.experiments.replace.run_replacement", caught)
        given = ["replace", "--corpus", corpus, "--select", "none", "--context", "16", *sae]
    told = arguments.told
    monkeypatch.setattr(arguments, "told", lambda corpus, label="corpus": corpora.append(corpus) or told(corpus, label))
    try:
        main([*given, *base])
    except (Enough, AttributeError):  # AttributeError: there is no Trainer
        pass
    if name == "train":
        flat = torch.cat(seen)[:, 0].tolist()
        starts = [i for i, t in enumerate(flat) if t == 0] or [0]
        documents = [flat[a:b] for a, b in zip(starts, [*starts[1:], len(flat)], strict=True)]
    else:
        rows: dict = {}
        for passage in seen[0]:
            rows.setdefault(passage.document, []).append(passage.tokens)
        assert list(rows) == list(TEXTS)
        documents = [np.concatenate(parts).tolist() for parts in rows.values()]
    return documents, corpora[0].left_out(), capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "collect", "replace"])
def test_every_command_reads_alike(folder, tmp_path, monkeypatch, capsys, name):
    documents, left_out, err = read_by(name, folder, tmp_path / "out", monkeypatch, capsys)
    plain = tokenizer()
    expected = [[0, *plain(text, add_special_tokens=False)["input_ids"]] for text in TEXTS.values()]
    assert documents == expected
    assert left_out == LEFT_OUT
    for said in ("skipped .git: hidden", "skipped gone: dangling link (to nowhere)", "skipped round: loop (",
                 "corpus: 6 files; left out: 1 binary, 1 dangling link, 1 hidden, 1 loop"):  # fmt: skip
        assert said in err
    assert name == "replace" or "corpus: documents without text: 2 empty, 1 null text" in err


@pytest.mark.parametrize("name", ["train", "collect", "replace"])
def test_every_command_can_leave_the_first_token_out(folder, tmp_path, monkeypatch, capsys, name):
    documents, _, _ = read_by(name, folder, tmp_path / "out", monkeypatch, capsys, "--no-bos")
    plain = tokenizer()
    assert sum(documents, []) == [t for x in TEXTS.values() for t in plain(x, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize(
    "made, first",
    [
        (tokenizer(), None),
        (tokenizer(eos_token="<end>"), None),  # an end of text is no beginning
        (tokenizer(bos_token="<end>"), 0),
        (with_template("<end> $A", bos_token="<end>"), 0),
        (with_template("! $A", bos_token="<end>"), 1),  # what it adds, not what it names
        (with_template("! $A <end>"), 1),
        (with_template("$A <end>", eos_token="<end>"), None),
        (with_template("$A <end>", bos_token="!"), 1),
    ],
)
def test_the_first_token(made, first):
    tokenize, found = tokens.tokenizing(made)
    assert found == first and tokens.tokenizing(made, bos=False)[1] is None
    assert tokenize("ab") == made("ab", add_special_tokens=False)["input_ids"]


def test_two_first_tokens_are_refused():
    made = with_template("<end> ! $A")
    with pytest.raises(ValueError, match=r"tokenizer: expected at most one token before a text, got \[0, 1\]"):
        tokens.tokenizing(made)
    assert tokens.tokenizing(made, bos=False)[1] is None


@pytest.fixture(scope="module")
def too_many(folder, tmp_path_factory):
    """The model with a tokenizer that has one token more than the model embeds, though its `len` says nothing of it."""
    root = tmp_path_factory.mktemp("beyond") / "model"
    model, made = writesae.models.load(folder / "model")
    made.add_tokens(AddedToken("<pad>", special=True))
    model.save_pretrained(root)
    made.save_pretrained(root)
    return root


@pytest.mark.parametrize("name", ["train", "collect", "replace"])
def test_a_token_beyond_the_embedding(folder, too_many, tmp_path, capsys, name):
    given = {
        "train": ["--corpus", folder / "corpus", "--site", "0:1"],
        "collect": [folder / "corpus", "--sae", folder / "sae"],
        "replace": ["--corpus", folder / "corpus", "--select", "none", "--sae", folder / "sae"],
    }[name]
    assert main([name, *map(str, given), "--model", str(too_many), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "expected ids below 256, the tokens the model embeds, got 256 of '<pad>' in a vocabulary of 257" in err
    assert not (tmp_path / "out").exists()


def test_ids_of_a_function_beyond_the_embedding(folder):
    """A function in a tokenizer's place has no vocabulary to look at: its ids are looked at, before the model runs."""
    model, _ = writesae.models.load(folder / "model")
    passages = passages_of([("a", "text of some words " * 5)], lambda text: [300] * len(text), 16)
    with pytest.raises(ValueError, match="tokens: expected ids from 0 to 255, which the model embeds, got 300 to 300"):
        writesae.experiments.run_replacement(
            model, None, writesae.SAE.from_pretrained(folder / "sae"), passages, progress=False
        )
    with pytest.raises(ValueError, match="which the model embeds, got 300"):
        rows = writesae.sae.Passages(torch.full((2, 8), 300))
        writesae.sae.ModelStream(model, rows, [(0, 1)])
    source = writesae.collect.ModelSource(model, {(0, 1): writesae.SAE.from_pretrained(folder / "sae")})
    with pytest.raises(ValueError, match="which the model embeds, got 300"), source:
        source.firings(torch.full((1, 8), 300), torch.ones(1, 8, dtype=torch.int64))


def test_selecting_reads_no_more_than_it_is_asked_to(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i:02} " * 100)
    corpus, read = Corpus.from_path(tmp_path), []

    def tokenize(text):
        read.append(text)
        return list(text.encode())

    whole = passages_of(corpus, tokenize, 100)
    assert len(read) == 20 and [p.document for p in whole] == sorted(p.document for p in whole)
    read.clear()
    part = passages_of(corpus, tokenize, 100, max_tokens=1450, seed=3)
    assert len(read) == 2 and sum(len(p.tokens) for p in part) == 1450  # 800 tokens a file
    assert [p.document for p in part] == sorted(p.document for p in part)
    names = {p.document for p in part}
    assert names != {p.document for p in passages_of(corpus, tokenize, 100, max_tokens=1450, seed=4)}
    enough = passages_of(corpus, tokenize, 100, max_tokens=10**6)
    assert [(p.name, p.tokens.tolist()) for p in enough] == [(p.name, p.tokens.tolist()) for p in whole]
    assert select_tokens(80) == 20_000 and select_tokens(1000) == 200_000


def test_replace_bounds_both_texts(folder, tmp_path, monkeypatch):
    seen = {}

    def caught(model, tokenizer, saes, passages, select, **options):
        seen.update(test=sum(len(p.tokens) for p in passages), select=sum(len(p.tokens) for p in select))
        raise Enough("read")

    monkeypatch.setattr("writesae.experiments.replace.run_replacement", caught)
    base = ["replace", "--model", folder / "model", "--sae", folder / "sae", "--corpus", folder / "corpus", "--context",
            "16", "--out", tmp_path / "out"]  # fmt: skip
    assert main([*map(str, base), "--max-tokens", "70"]) == 2
    assert seen == {"test": 70, "select": 200_000}
    assert main([*map(str, base), "--firings", "10", "--select-tokens", "90"]) == 2
    assert seen["select"] == 90 and seen["test"] == sum(len(t) + 1 for t in TEXTS.values())


def test_short_passages_are_selected_on_too(folder):
    """Passages shorter than the longest were dropped; and what pads them counts for nothing."""
    from writesae.experiments.firing import native_writes, survey

    model, made = writesae.models.load(folder / "model")
    saes = {(0, 1): writesae.SAE.from_pretrained(folder / "sae")}
    some = [np.array(made(f"some text {i}" * n)["input_ids"]) for i, n in enumerate((9, 1, 3, 20, 1))]
    counts, tokens_seen = survey(model, saes, some)
    assert tokens_seen == sum(map(len, some)) and counts[0, 1].sum() <= tokens_seen
    one_by_one = [survey(model, saes, [x]) for x in some]
    assert np.array_equal(counts[0, 1], sum(c[0, 1] for c, _ in one_by_one))
    saes = {(0, 1): writesae.SAE(saes[0, 1].K, saes[0, 1].V, 2, 1)}  # a codebook of two writes fits any text
    _, means = native_writes(model, saes, some, 0)
    one_by_one = [native_writes(model, saes, [x], 0)[1][0, 1] * len(x) for x in some]
    torch.testing.assert_close(means[0, 1], sum(one_by_one) / tokens_seen)


@pytest.mark.parametrize("stdin", ["closed", "end of file"])
def test_a_question_that_cannot_be_asked(folder, tmp_path, monkeypatch, capsys, stdin):
    class Terminal:
        def isatty(self):
            return True

    def at_end(prompt):
        raise EOFError

    monkeypatch.setattr(command.sys, "stdin", None if stdin == "closed" else Terminal())
    monkeypatch.setattr("builtins.input", at_end)
    given = ["collect", folder / "corpus", "--model", folder / "model", "--sae", folder / "sae", "--limit", "10"]
    assert main([*map(str, given), "--out", str(tmp_path / "out")]) == 1
    assert "add --yes to collect it all the same" in capsys.readouterr().err
    monkeypatch.setattr(command, "run", lambda args: input("another's question"))
    assert main([*map(str, given), "--out", str(tmp_path / "out")]) == 2
    assert "a question could not be asked: standard input is closed" in capsys.readouterr().err

    def full(args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "run", full)
    assert main([*map(str, given), "--out", str(tmp_path / "out")]) == 1
    assert "writesae collect: [Errno 28] No space left" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "collect", "replace"])
def test_every_command_takes_a_dataset(folder, tmp_path, monkeypatch, capsys, name):
    (tmp_path / "test.jsonl").write_text('{"body": "records of a dataset"}\n' * 3)
    given = {
        "train": ["--validation", folder / "corpus" / "c.txt", "--site", "0:1"],
        "collect": ["--sae", folder / "sae"],
        "replace": ["--select", "none", "--sae", folder / "sae"],
    }[name]
    corpora = []
    told = arguments.told
    monkeypatch.setattr(arguments, "told", lambda corpus, label="corpus": corpora.append(corpus) or told(corpus, label))
    monkeypatch.setattr("writesae.models.load", lambda *a, **k: (_ for _ in ()).throw(Enough("read")))
    base = [name, "--dataset", tmp_path, "--split", "test", "--out", tmp_path / "out", "--model", folder / "model"]
    assert main([*map(str, base), *map(str, given), "--field", "body"]) == 2
    assert [d.open().read() for d in corpora[0].documents()] == [b"records of a dataset"] * 3
    assert main([*map(str, base), *map(str, given)]) == 2
    assert "got 'text' (its columns: body)" in capsys.readouterr().err
    both = ["--corpus"] * (name != "collect") + [str(folder / "corpus")]
    assert main([*map(str, base), *map(str, given), *both]) == 2
    assert "corpus: expected a path or --dataset, got both" in capsys.readouterr().err


def test_the_held_out_part_of_a_corpus(tmp_path):
    """One in 20 of the documents that have text."""
    from writesae.sae import Passages

    for i in range(45):
        (tmp_path / f"{i:02}.txt").write_text(chr(97 + i % 20) * 10 if i != 3 else "")
    training, held_out = Passages.split(Corpus.from_path(tmp_path), lambda text: list(text.encode()), 10)
    assert len(training) == 41 and len(held_out) == 3
    assert bytes(held_out.ids[:, 0].tolist()) == b"abb"
    with pytest.raises(ValueError, match="max_tokens: expected >= 1, got 0"):
        Passages.from_corpus(Corpus.from_path(tmp_path), lambda text: [1], 10, max_tokens=0)


def test_the_replacement_test_says_what_it_held_atoms_against(folder, tmp_path, capsys):
    """Both times of reading and every condition from the command line; the table that it leaves is whole."""
    from writesae.experiments.conditions import CONDITIONS, OF_WRITES

    corpus, out = folder / "corpus", tmp_path / "out"
    base = ["replace", "--model", folder / "model", "--sae", folder / "sae", "--corpus", corpus, "--select", corpus,
            "--train", corpus, "--context", "16", "--firings", "6", "--horizon", "2", "--min-selected", "1", "--native",
            "increment", "--read", "both", "--conditions", "all", "--out", out]  # fmt: skip
    assert main([*map(str, base)]) == 0
    shown = json.loads(capsys.readouterr().out)
    summary = json.loads((out / "summary.json").read_text())
    assert shown["headline"]["read"] == "after" and shown["atom_vs_codebook"] == summary["atom_vs_codebook"]
    kept = [c for c in CONDITIONS if c not in OF_WRITES]  # these dictionaries are of states
    assert summary["settings"]["conditions"] == kept and summary["native_kl_max"] == 0
    assert {(x["site"], x["read"]) for x in summary["table"]} == {("0:1", "after"), ("0:1", "before")}
    assert "untrained codebook" in (out / "report.html").read_text()
    assert main([*map(str, base), "--longest", "1", "--out", str(tmp_path / "other")]) == 2
    assert "longest: expected a dictionary for each of the 1 heads" in capsys.readouterr().err
