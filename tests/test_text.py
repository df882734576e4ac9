"""One reader of text: every kind of file, what is left out and why, where reading goes on, and bad files by name."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_source import words

from writesae.text import Corpus
from writesae.text.passages import Cursor, Passage, passages


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {"": lambda data: data, ".gz": gzip.compress, ".zst": zst}
RECORDS = [{"text": "eins ä"}, {"text": "zwei", "n": [{}]}, {"text": ""}, {"text": None}, {"text": "drei\n"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def parquet(column: pa.Array, **options) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": column, "n": range(len(column))}), sink, **options)
    return sink.getvalue().to_pybytes()


def texts(corpus: Corpus, **place) -> list[str]:
    return [document.open().read().decode() for document in corpus.documents(**place)]


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", LINES.encode()),
        ("a.NDJSON", LINES.encode()),
        ("lines.json", LINES.encode()),
        ("array.json", json.dumps(RECORDS).encode()),
        ("pretty.json", json.dumps(RECORDS, indent=2, ensure_ascii=False).encode()),
        ("strings.json", json.dumps([record["text"] for record in RECORDS]).encode()),
        ("a.parquet", parquet(pa.array([record["text"] for record in RECORDS]))),
        ("mark.jsonl", LINES.encode("utf-8-sig")),
        ("mark.json", json.dumps(RECORDS).encode("utf-8-sig")),
        ("wide.jsonl", LINES.encode("utf-16")),
        ("wide.json", json.dumps(RECORDS).encode("utf-32")),
    ],
)
def test_records_of_every_kind(tmp_path, name, content, ending):
    path = tmp_path / (name + ending)
    path.write_bytes(PACK[ending](content))
    corpus = Corpus.from_path(path)
    assert texts(corpus) == ["eins ä", "zwei", "", "", "drei\n"]
    assert corpus.left_out() == {"empty": 1, "null text": 1}
    for document in corpus.documents():
        assert texts(corpus, place=document.place, number=document.number) == texts(corpus)[document.number :]
    sampled, size = corpus.sample()
    assert b"".join(sampled).decode() == "eins äzweidrei\n" and size == 16
    assert corpus.left_out() == {"empty": 1, "null text": 1}  # however often it is read


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_of_every_encoding_that_names_itself(tmp_path, encoding, ending):
    path = tmp_path / ("prose.md" + ending)
    path.write_bytes(PACK[ending]("Prosa über Ω\n".encode(encoding)))
    assert texts(Corpus.from_path(path)) == ["Prosa über Ω\n"]
    assert texts(Corpus.from_path(tmp_path)) == ["Prosa über Ω\n"]


PLAIN = {"compression": "none", "use_dictionary": False, "write_statistics": False}
STRINGS = {
    "string": pa.array(["p", None, "q"]),
    "large": pa.array(["p", None, "q"], pa.large_string()),
    "view": pa.array(["p", None, "q"], pa.string_view()),
    "dictionary": pa.array(["p", None, "q"]).dictionary_encode(),
    "bytes": pa.array([b"p", None, b"q"]),
}


@pytest.mark.parametrize("kind", STRINGS)
def test_strings_of_parquet(tmp_path, kind):
    (tmp_path / "a.parquet").write_bytes(parquet(STRINGS[kind], row_group_size=2))
    corpus = Corpus.from_path(tmp_path)
    assert texts(corpus) == ["p", "", "q"] and corpus.left_out() == {"null text": 1}
    assert texts(corpus, place=(0, 0, 2)) == ["q"]


def test_a_single_object(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"text": "alone", "n": 1}, indent=1))
    assert texts(Corpus.from_path(tmp_path / "one.json")) == ["alone"]


@pytest.mark.parametrize("kind", ["a.txt", "a.txt.gz", "a.txt.zst", "u16.txt", "a.json", "a.jsonl.zst", "a.parquet.gz"])
def test_going_on_behind_any_passage(tmp_path, monkeypatch, kind):
    """Blocks of 50 bytes: what is packed is read again from its start, up to the place."""
    monkeypatch.setattr("writesae.text.passages.BLOCK", 50)
    rows = [("a word and ä\n" * n) for n in (9, 0, 1, 4)]
    whole = "".join(rows)
    data = {
        "txt": whole.encode("utf-16" if kind == "u16.txt" else "utf-8"), "json": json.dumps(rows).encode(),
        "jsonl": "".join(json.dumps({"text": row}) + "\n" for row in rows).encode(),
        "parquet": parquet(pa.array(rows), row_group_size=3),
    }  # fmt: skip
    path = tmp_path / kind
    path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](data[kind.split(".")[1]]))
    corpus = Corpus.from_path(path)
    events = list(passages(corpus, words, 7, 5))
    found = [event for event in events if isinstance(event, Passage)]
    assert [t for p in found for t in p.tokens.tolist() if t != 5] == [t for t in words(whole) if t != 5]
    for i, event in enumerate(events):
        if isinstance(event, Passage):
            start = Cursor.from_json(json.loads(json.dumps(event.after.to_json())))
            rest = list(passages(corpus, words, 7, 5, start=start))
            assert [(e.document, getattr(e, "row", None)) for e in rest] == [
                (e.document, getattr(e, "row", None)) for e in events[i + 1 :]
            ]
            tokens = [e.tokens.tolist() for e in rest if isinstance(e, Passage)]
            assert tokens == [e.tokens.tolist() for e in events[i + 1 :] if isinstance(e, Passage)]


def test_a_folder_with_links(tmp_path):
    """Files and folders that links lead to are read, once; circles, dead ends and repetitions are cut and counted."""
    root, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (root / "b" / "c", root / ".git", elsewhere / "deep", elsewhere / ".cache"):
        folder.mkdir(parents=True)
    (root / "b" / "c" / "1.txt").write_text("one")
    (elsewhere / "2.txt").write_text("two")
    (elsewhere / "deep" / "3.txt").write_text("three")
    (elsewhere / ".cache" / "x.txt").write_text("hidden")
    (tmp_path / "4.txt").write_text("four")
    (root / ".git" / "config").write_text("hidden")
    (root / ".env").write_text("hidden")
    (root / "a-shards").symlink_to(elsewhere)
    (root / "4.txt").symlink_to("../4.txt")
    (root / "5.txt").symlink_to(root / "b" / "c" / "1.txt")
    (root / "again").symlink_to("b")
    (root / "b" / "up").symlink_to("..")
    (root / "b" / "self").symlink_to("self")
    (elsewhere / "deep" / "back").symlink_to(root)
    (root / "gone").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    corpus = Corpus.from_path(root)
    assert [(name, text) for (_, name, _), text in zip(corpus.files, texts(corpus), strict=True)] == [
        ("4.txt", "four"), ("a-shards/2.txt", "two"), ("a-shards/deep/3.txt", "three"), ("b/c/1.txt", "one")
    ]  # fmt: skip
    assert corpus.left_out() == {"dangling link": 1, "hidden": 3, "loop": 3, "no file": 1, "read already": 2}
    assert "gone: dangling link (to nowhere)" in map(str, corpus.skipped)


def test_the_name_with_an_ending_says_how_to_read(tmp_path):
    """A cache of the Hub: files under their digests, links with the names they were given."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "x").mkdir(parents=True)
    (tmp_path / "blobs" / "3f2a").write_text('{"text": "a record"}\n')
    (tmp_path / "snapshots" / "x" / "train.jsonl").symlink_to("../../blobs/3f2a")
    (tmp_path / "snapshots" / "x" / "again.jsonl").symlink_to("../../blobs/3f2a")
    corpus = Corpus.from_path(tmp_path)
    assert texts(corpus) == ["a record"] and [name for _, name, _ in corpus.files] == ["snapshots/x/again.jsonl"]
    assert corpus.left_out() == {"read already": 2}


def test_many_links_to_one_folder_do_not_multiply(tmp_path):
    """Ten folders with two links each to the next: read once, not 2 ** 10 times."""
    for i in range(10):
        (tmp_path / f"f{i}").mkdir()
    (tmp_path / "f9" / "a.txt").write_text("once")
    for i in range(9):
        for link in "xy":
            (tmp_path / f"f{i}" / link).symlink_to(tmp_path / f"f{i + 1}")
    assert texts(Corpus.from_path(tmp_path / "f0")) == ["once"]
    assert texts(Corpus.from_path(tmp_path)) == ["once"]


def test_json_files_of_a_folder_that_are_no_records(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for name, content in {"package.json": '{"name": "x"}', "numbers.json": "[1, 2]", "odd.json": "// comment\n{}",
                          "deep.json": "[" * 200_000}.items():  # fmt: skip
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"expected text, got .*{name}: (JSON without text in 'text'|not JSON)"):
            Corpus.from_path(tmp_path / name)
    corpus = Corpus.from_path(tmp_path)
    assert texts(corpus) == ["text"]
    assert corpus.left_out() == {"JSON without text in 'text'": 2, "not JSON": 2}


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]


LONG = "".join(json.dumps({"text": f"text {i * 7919} of many"}) + "\n" for i in range(9000)).encode()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl.gz", gzip.compress(LONG)[:-3000], "a.jsonl.gz is damaged"),
        ("a.jsonl.zst", zst(LONG)[:-2000], "a.jsonl.zst is damaged"),
        ("a.txt.gz", b"text", "a.txt.gz is damaged: Not a gzipped file"),
        ("a.txt.zst", b"text", "a.txt.zst is damaged"),
        ("a.parquet", parquet(STRINGS["string"])[:-9], "a.parquet: damaged"),
        ("a.parquet", b"", "a.parquet: not a Parquet file"),
        ("a.parquet", parquet(pa.array(["pqr", "x"]), **PLAIN).replace(b"pqr", b"p\xffr"), "a.parquet holds text that"),
        ("a.parquet", parquet(pa.array([f"{i * 7919}" for i in range(5000)]))[:1000] + b"\0" * 3000
         + parquet(pa.array([f"{i * 7919}" for i in range(5000)]))[4000:], "a.parquet"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": ' + b"[" * 200_000, "a.jsonl:1 is JSON nested too deeply"),
        ("a.jsonl", b'["text"]\n', "field: expected text in 'text' at a.jsonl:1, got list"),
        ("a.jsonl", b'{"text": 5}\n', "field: expected text in 'text' at a.jsonl:1, got int"),
        ("a.json", b'["a", {"text": "b"', "a.json:2 is not JSON"),
        ("a.json", b'["a", ' + b"[" * 200_000, "a.json:2 is JSON nested too deeply"),
        ("a.json", b'["a" "b"]', "a.json is not a JSON array: expected ',' at byte 5, got '\"'"),
        ("a.json", b'["a"', "a.json is not a JSON array: expected ',' at byte 4, got the end of the file"),
        ("a.json", b'["a"] more', "a.json is not a JSON array: it goes on behind its end, byte 6"),
        ("a.json", b'["a", "\\ud800"]', "a.json:2 is not valid text"),
        ("a.txt", "text".encode("utf-16") * 30_000 + b"\0", "a.txt is not UTF-16-LE as its first bytes say"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    """Also in a folder beside sound files, wherever the damage is met."""
    (tmp_path / "0.txt").write_text("sound")
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=".") as raised:
            list(passages(Corpus.from_path(path), words, 512))
        assert message in str(raised.value)


def test_records_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("writesae.text.records.LIMIT", 100_000)
    for name, content in (("a.jsonl", json.dumps({"text": "x" * 100_001})), ("b.json", json.dumps(["x" * 300_000])),
                          ("c.json", json.dumps({"text": "x" * 100_001}, indent=1))):  # fmt: skip
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name}.*(larger|more) than 0 MiB"):
            texts(Corpus.from_path(tmp_path / name))


def test_names_that_are_not_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"f\xff.txt")).write_text("text")
    corpus = Corpus.from_path(tmp_path)
    assert texts(corpus) == ["text"] and corpus.files[0][1] == "f\\udcff.txt"
    corpus.files[0][1].encode()


def test_several_names_make_one_corpus(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(folder)
    corpus = Corpus.from_names([tmp_path / "b", tmp_path / "a" / "x.txt"])
    assert texts(corpus) == ["b", "a"] and len({name for _, name, _ in corpus.files}) == 2
    with pytest.raises(ValueError, match="corpus: expected a dataset alone"):
        (tmp_path / "a" / "d.jsonl").write_text('{"text": "r"}')
        Corpus.from_names([tmp_path / "a", f"dataset:{tmp_path / 'a'}"])


def test_a_text_is_read_as_from_a_file(tmp_path):
    text = "some words\n" * 40_000
    (tmp_path / "a.txt").write_text(text)
    held = list(passages(Corpus.from_texts([("a.txt", text), ("b", "")]), words, 512))
    read = list(passages(Corpus.from_path(tmp_path), words, 512))
    assert len(held) == len(read) + 1
    for a, b in zip(held, read, strict=False):
        assert (a.tokens.tolist() == b.tokens.tolist()) if isinstance(a, Passage) else a == b


def test_a_dataset_in_a_folder(tmp_path):
    """Files that the package finds, and what its save_to_disk wrote; the digest changes when a file does."""
    import datasets

    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "test.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    corpus = Corpus.from_name(f"dataset:{tmp_path / 'files'}@test")
    assert texts(corpus) == ["a", ""] and corpus.left_out() == {"null text": 1}
    before = corpus.digest()
    (tmp_path / "files" / "test.jsonl").write_text('{"text": "b"}\n{"text": null}\n')
    assert before.keys() == corpus.digest().keys() and before != corpus.digest()
    one = datasets.Dataset.from_dict({"body": ["x", "y"]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "two")
    assert texts(Corpus.from_dataset(str(tmp_path / "one"), "body")) == ["x", "y"]
    assert texts(Corpus.from_dataset(str(tmp_path / "two"), "body", "test")) == ["y"]
    with pytest.raises(ValueError, match="two .dev., record 0: expected one of its splits train, test, got dev"):
        Corpus.from_dataset(str(tmp_path / "two"), "body", "dev")


OFFLINE = """
import json, sys
from pathlib import Path
from datasets import Features, Value
from datasets.arrow_writer import ArrowWriter
from writesae.text import Corpus
home = Path(sys.argv[1]) / "some___thing" / "default" / "0.0.0" / "abc"
home.mkdir(parents=True)
features = Features({"text": Value("string")})
with ArrowWriter(path=str(home / "thing-train.arrow"), features=features) as writer:
    for i in range(5):
        writer.write({"text": f"text {i}" if i else None})
    n, size = writer.finalize()
split = {"name": "train", "num_bytes": size, "num_examples": n, "dataset_name": "thing"}
info = {"builder_name": "parquet", "dataset_name": "thing", "config_name": "default", "features": features.to_dict(),
        "splits": {"train": split}, "version": "0.0.0"}
(home / "dataset_info.json").write_text(json.dumps(info))
corpus = Corpus.from_name("dataset:some/thing")
print([d.open().read().decode() for d in corpus.documents()], corpus.left_out())
print([d.open().read().decode() for d in corpus.documents((0, 0, 3), 3)], corpus.digest())
for name in ("dataset:other/thing", "dataset:some/thing@nosplit", "dataset:/no/such/folder"):
    try:
        Corpus.from_name(name)
    except ValueError as error:
        print(error)
"""


def test_a_dataset_offline(tmp_path):
    """The local copy is read; without one the error says what to do, at once."""
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=100
    )
    assert done.returncode == 0, done.stderr
    whole, rest, missing, split, folder = done.stdout.splitlines()
    assert whole == "['', 'text 1', 'text 2', 'text 3', 'text 4'] {'null text': 1}"
    assert rest == "['text 3', 'text 4'] {'some/thing:train': 'abc'}"
    assert missing.startswith("dataset: other/thing (train) is out of reach, and there is no local copy of it")
    assert split.startswith("dataset: cannot read some/thing (nosplit), record 0: ") and "train" in split
    assert folder.startswith("dataset: cannot read /no/such/folder (train)")
