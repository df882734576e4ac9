"""`Corpus` and passages: the same documents in the same order, from wherever reading starts."""

import hashlib
import json
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_source import words

from writesae.text.corpus import Corpus
from writesae.text.passages import Cursor, DocumentEnd, Passage, passages


def texts(corpus, **place) -> list[tuple[int, str, bytes]]:
    return [(d.number, d.source, d.open().read()) for d in corpus.documents(**place)]


@pytest.fixture
def folder(tmp_path):
    """Text, JSONL and Parquet together, in nested folders, with things to leave out."""
    root = tmp_path / "corpus"
    (root / "b" / "deep").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "b" / "deep" / "z.txt").write_text("zet")
    (root / "b" / "a.md").write_text("markdown ü")
    (root / "empty.txt").write_text("")
    (root / "0.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "n": 2}\n{"text": ""}\n')
    pq.write_table(
        pa.table({"text": ["p0", "p1", None, "p3", "p4"], "n": range(5)}), root / "t.parquet", row_group_size=2
    )
    (root / ".git" / "config").write_text("hidden")
    (root / "image.png").write_bytes(b"\x89PNG\0")
    (root / "latin.txt").write_bytes("für".encode("latin-1"))
    return root


def test_folder(folder):
    corpus = Corpus.from_path(folder)
    assert texts(corpus) == [
        (0, "0.jsonl:1", b"one"),
        (1, "0.jsonl:3", b"two"),
        (2, "0.jsonl:4", b""),
        (3, "b/a.md", "markdown ü".encode()),
        (4, "b/deep/z.txt", b"zet"),
        (5, "empty.txt", b""),
        (6, "t.parquet:0", b"p0"),
        (7, "t.parquet:1", b"p1"),
        (8, "t.parquet:2", b""),
        (9, "t.parquet:3", b"p3"),
        (10, "t.parquet:4", b"p4"),
    ]
    assert list(map(str, corpus.skipped)) == [
        ".git: hidden", "image.png: binary (holds a zero byte)", "latin.txt: not UTF-8 (byte 0xfc at 1)"
    ]  # fmt: skip
    assert corpus.left_out() == {"binary": 1, "empty": 2, "hidden": 1, "not UTF-8": 1, "null text": 1}
    texts(corpus)
    assert corpus.left_out()["empty"] == 2  # read again, counted once


def test_reading_starts_anywhere(folder):
    corpus = Corpus.from_path(folder)
    whole = texts(corpus)
    for document in corpus.documents():
        assert texts(corpus, place=document.place, number=document.number) == whole[document.number :]


@pytest.mark.parametrize("name", ["image.png", "latin.txt"])
def test_a_file_that_is_not_text(folder, name):
    with pytest.raises(ValueError, match=f"corpus: expected text, got .*{name}: (binary|not UTF-8)"):
        Corpus.from_path(folder / name)


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        Corpus.from_path(tmp_path / "missing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="empty folder"):
        Corpus.from_path(tmp_path / "folder")
    for i in range(3):
        (tmp_path / "folder" / f"{i}.bin").write_bytes(b"\0" * 10)
    with pytest.raises(ValueError, match=r"got 3 files and no text among them, such as 0.bin: binary"):
        Corpus.from_path(tmp_path / "folder")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="corpus: expected text, got 1 empty files"):
        Corpus.from_path(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="at least one file"):
        Corpus.from_files([])


def test_fields(folder, tmp_path):
    with pytest.raises(ValueError, match=r"field: expected a column of t.parquet, got 'body' \(its columns: text, n\)"):
        Corpus.from_path(folder / "t.parquet", "body")
    with pytest.raises(ValueError, match="field: expected a column of text, got 'n' of int64"):
        Corpus.from_path(folder / "t.parquet", "n")
    (tmp_path / "x.jsonl").write_text('{"body": "fine"}\n{"title": "not"}\n')
    with pytest.raises(ValueError, match="field: expected text in 'body' at x.jsonl:2, got title"):
        texts(Corpus.from_path(tmp_path / "x.jsonl", "body"))
    (tmp_path / "y.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match="y.jsonl:2 is not JSON"):
        texts(Corpus.from_path(tmp_path / "y.jsonl"))
    (tmp_path / "z.jsonl").write_text('{"text": "\\ud800"}\n')
    with pytest.raises(ValueError, match="z.jsonl:1 is not valid text"):
        texts(Corpus.from_path(tmp_path / "z.jsonl"))
    (tmp_path / "not.parquet").write_text("text")
    with pytest.raises(ValueError, match="not a Parquet file"):
        Corpus.from_path(tmp_path / "not.parquet")


def test_fingerprint_sees_changes(folder):
    before = Corpus.from_path(folder).fingerprint()
    assert Corpus.from_path(folder).fingerprint() == before
    (folder / "b" / "a.md").write_text("Markdown ü")
    assert Corpus.from_path(folder).fingerprint()["sha256"] != before["sha256"]


def test_digest_is_of_every_byte(tmp_path):
    """The middle of a large file, past both ends that a glance would take; under an unchanged size and time too."""
    data = bytearray(b"words and " * 40_000)
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt").write_text("b")
    corpus, pieces = Corpus.from_path(tmp_path), []
    before, identities = corpus.digest(pieces.append), corpus.identities()
    assert before["a.txt"] == hashlib.sha256(data).hexdigest() and sum(pieces) == len(data) + 1
    assert [(i.name, i.size) for i in identities] == [("a.txt", 400_000), ("b.txt", 1)]
    data[200_000] ^= 1
    (tmp_path / "a.txt").write_bytes(data)
    after = Corpus.from_path(tmp_path).digest()
    assert after["a.txt"] != before["a.txt"] and after["b.txt"] == before["b.txt"]
    with pytest.raises(ValueError, match="corpus: a.txt changed while it was read"):
        identities[0].sha256()


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "many"])
def test_sample_estimates_the_size(tmp_path, kind):
    rng = random.Random(0)
    records = ["".join(rng.choice("abc \n") for _ in range(rng.randint(50, 150))) for _ in range(500)]
    size = sum(map(len, records))
    if kind == "text":
        (tmp_path / "a.txt").write_text("".join(records))
    elif kind == "many":
        for i, record in enumerate(records[:100]):
            (tmp_path / f"{i}.txt").write_text(record)
        size = sum(map(len, records[:100]))
    elif kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": 123456, "text": r}) + "\n" for r in records))
    else:
        pq.write_table(pa.table({"text": records, "other": [r[::-1] for r in records]}), tmp_path / "a.parquet")
    sampled, total = Corpus.from_path(tmp_path).sample()
    assert sampled and abs(total - size) < 0.15 * size


def make(corpus, context, start=None, **options):
    return list(passages(corpus, words, context, start=start, **options))


@pytest.mark.parametrize("context", [1, 7, 64])
@pytest.mark.parametrize("bos", [None, 5])
@pytest.mark.parametrize("max_tokens", [None, 100, 128, 257])
def test_going_on_behind_any_passage(tmp_path, monkeypatch, context, bos, max_tokens):
    """Blocks of 50 bytes, so that passages span blocks and blocks end at lines, spaces and inside words."""
    monkeypatch.setattr("writesae.text.passages.BLOCK", 50)
    rng = random.Random(2)
    for i, (size, letters) in enumerate(((130, "ab \n"), (0, "a"), (64, "äö€𝄞"), (57, "ab c"), (1, "x"), (49, "q\n"))):
        (tmp_path / f"{i}.txt").write_bytes("".join(rng.choice(letters) for _ in range(size)).encode())
    corpus = Corpus.from_path(tmp_path)
    whole = make(corpus, context, bos=bos, max_tokens=max_tokens)
    total = 0
    for i, event in enumerate(whole):
        if not isinstance(event, Passage):
            continue
        total += len(event.tokens)
        assert event.after.tokens == total
        start = Cursor.from_json(json.loads(json.dumps(event.after.to_json())))
        rest = make(corpus, context, start, bos=bos, max_tokens=max_tokens)
        assert len(rest) == len(whole) - i - 1
        for a, b in zip(rest, whole[i + 1 :], strict=True):
            if isinstance(a, Passage):
                assert (a.document, a.row, a.after) == (b.document, b.row, b.after)
                assert (a.tokens == b.tokens).all()
            else:
                assert a == b
    assert max_tokens is None or total == max_tokens
    if max_tokens is None:
        for end in (e for e in whole if isinstance(e, DocumentEnd)):
            data = (tmp_path / end.source).read_bytes()
            ids = [t for e in whole if isinstance(e, Passage) and e.document == end.document for t in e.tokens.tolist()]
            assert ids == ([bos] if bos is not None and data else []) + words(data.decode())
            assert end.sha256 == hashlib.sha256(data).hexdigest() and end.tokens == len(ids)


def test_text_that_is_not_utf8_far_inside(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a line\n" * 20_000 + b"\xff\n")
    corpus = Corpus.from_path(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="got byte 0xff at 140000 of a.txt"):
        make(corpus, 512)


def test_datasets_package(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(5)))
    corpus = Corpus.from_dataset(str(tmp_path), "body")
    assert [t for _, _, t in texts(corpus)] == [f"text {i}".encode() for i in range(5)]
    assert [n for n, _, _ in texts(corpus, place=(0, 0, 3), number=3)] == [3, 4]
    assert corpus.sample()[1] is None
    with pytest.raises(ValueError, match=r"field: expected a column of text in dataset .*\(its columns: body\)"):
        Corpus.from_dataset(str(tmp_path), "text")


def test_without_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install writesae\[datasets\]"):
        Corpus.from_dataset("anything")


def test_large_files_are_streamed(tmp_path):
    """40 MB of one file, 40 MB of records: the memory that reading takes does not follow."""
    line = b"some words of a line that goes on for a while and then ends\n"
    (tmp_path / "a.txt").write_bytes(line * (40_000_000 // len(line)))
    with open(tmp_path / "b.jsonl", "wb") as file:
        record = json.dumps({"text": "word " * 200}).encode() + b"\n"
        for _ in range(40_000_000 // len(record)):
            file.write(record)
    script = (
        "import resource, sys\nfrom writesae.text.corpus import Corpus\n"
        "from writesae.text.passages import passages\n"
        "corpus = Corpus.from_path(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "n = sum(1 for _ in passages(corpus, lambda text: [1] * (len(text) // 4), 512))\n"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    passages_made, grown = map(int, done.stdout.split())
    assert passages_made > 38_000 and grown < 20_000  # kB
