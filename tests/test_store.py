"""`Store`: the same answers as from a plain list of firings, and from any Parquet reader."""

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_source import FakeSource, words

from writesae.collect import Corpus, Store, build_index, collect, files
from writesae.collect import finish as finish_module
from writesae.collect import shard as shard_module
from writesae.collect.source import Site
from writesae.collect.verify import verify


class Tokenizer:
    """One token a character, with a beginning-of-text token."""

    bos_token_id = 7

    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": words(text)}

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, the texts)."""
    root = tmp_path_factory.mktemp("store")
    rng = random.Random(3)
    texts = ["".join(rng.choice("abcdefghij \n") for _ in range(n)) for n in (500, 0, 31, 90, 700, 64)]
    (root / "text").mkdir()
    for i, text in enumerate(texts):
        (root / "text" / f"{i}.txt").write_text(text)
    collect(
        Corpus.from_path(root / "text"), Tokenizer(), FakeSource(), root / "out", n=20, context=32, shard_passages=7
    )  # fmt: skip
    return root / "out", texts


@pytest.fixture(scope="module")
def firings(made):
    """All firings as dictionaries, from the shards by plain pyarrow."""
    found = []
    for path in sorted((made[0] / "firings").iterdir()):
        found += pq.read_table(path).to_pylist()
    return found


def by_place(f):
    return f["document"], f["row"], f["position"]


def test_columns_are_what_any_reader_sees(made):
    table = pq.read_table(made[0] / "firings")
    assert table.schema.names == ["document", "row", "position", "layer", "head", "feature", "activation"]
    assert table.schema.field("activation").type == pa.float32()
    metadata = pq.ParquetFile(made[0] / "firings" / "part-000000.parquet").metadata
    assert metadata.row_group(0).column(5).statistics.has_min_max
    assert metadata.row_group(0).column(5).compression == "ZSTD"
    for file in sorted((made[0] / "firings").iterdir()):
        rows = pq.read_table(file).to_pylist()
        assert rows == sorted(rows, key=lambda f: (f["layer"], f["head"], f["feature"], by_place(f)))


@pytest.mark.parametrize("n", [1, 20, 33, 10_000])
def test_top_is_exact(made, firings, n):
    store = Store(made[0])
    for layer, head, feature in ((1, 0, 0), (1, 3, 17), (4, 2, 63)):
        here = [f for f in firings if (f["layer"], f["head"], f["feature"]) == (layer, head, feature)]
        assert here or feature == 63
        expected = sorted(here, key=lambda f: (-f["activation"], by_place(f)))[:n]
        assert store.top(layer, head, feature, n).to_pylist() == expected


def test_at(made, firings):
    store = Store(made[0])
    for document, row, position in ((0, 0, 0), (0, 3, 31), (2, 0, 31), (4, 21, 20), (5, 2, 0)):
        expected = [f for f in firings if by_place(f) == (document, row, position)]
        expected.sort(key=lambda f: (f["layer"], f["head"], -f["activation"], f["feature"]))
        assert len(expected) == 12
        assert store.at(document, position, row=row).to_pylist() == expected
        assert store.at(document, row * 32 + position).to_pylist() == expected


@pytest.mark.parametrize(
    "place, named",
    [((9, 0), "document: expected one of the 6"), ((0, 501), "position: expected a token of document 0"),
     ((1, 0), "position"), ((0, -1), "position"), ((0, 32, 0), "position"), ((0, 0, 16), "position")],
)  # fmt: skip
def test_at_places_that_are_not(made, place, named):
    with pytest.raises(ValueError, match=named):
        Store(made[0]).at(*place)


def test_counts(made, firings):
    store = Store(made[0])
    table = store.counts(1, 3)
    assert table["feature"].to_pylist() == list(range(67))
    for row in table.to_pylist():
        here = [f["activation"] for f in firings if (f["layer"], f["head"], f["feature"]) == (1, 3, row["feature"])]
        assert row["count"] == len(here)
        assert row["sum"] == pytest.approx(sum(here), rel=1e-12) and row["max"] == max(here, default=0)
    assert store.counts().num_rows == 64 + 67 + 66
    assert sum(store.counts()["count"].to_pylist()) == len(firings) == store.summary()["firings"]


def test_firings_by_site_and_feature(made, firings):
    store = Store(made[0])
    for wanted in ({}, {"layer": 1}, {"layer": 4, "head": 2}, {"layer": 1, "head": 0, "feature": 5}):
        expected = [f for f in firings if all(f[name] == value for name, value in wanted.items())]
        tables = list(store.firings(**wanted, batch=100))
        assert [f for t in tables for f in t.to_pylist()] == expected
        assert max(map(len, tables)) <= 100


def test_firings_of_a_document(made, firings, tmp_path):
    store = Store(made[0])
    for document in range(6):
        expected = [f for f in firings if f["document"] == document]
        assert [f for t in store.firings(document=document) for f in t.to_pylist()] == expected
    some = [f for t in store.firings(1, 0, document=4) for f in t.to_pylist()]
    assert some == [f for f in firings if (f["document"], f["layer"], f["head"]) == (4, 1, 0)] and some
    with pytest.raises(ValueError, match="document: expected one of the 6 collected, got 6"):
        list(store.firings(document=6))


def test_a_rare_feature_comes_from_the_index_alone(made, firings, tmp_path):
    count = {row["feature"]: row["count"] for row in Store(made[0]).counts(1, 3).to_pylist()}
    rare = min((f for f in count if count[f]), key=count.get)
    often = max(count, key=count.get)
    assert 0 < count[rare] < count[often]
    collect(Corpus.from_path(made[0].parent / "text"), Tokenizer(), FakeSource(), tmp_path / "store", context=32,
            n=count[rare] + 1, shard_passages=7)  # fmt: skip
    shutil.rmtree(tmp_path / "store" / "firings")
    store = Store(tmp_path / "store")
    expected = [f for f in firings if (f["layer"], f["head"], f["feature"]) == (1, 3, rare)]
    assert [f for t in store.firings(1, 3, rare, batch=3) for f in t.to_pylist()] == expected
    with pytest.raises(ValueError, match="firings/part-000000.parquet is missing"):
        list(store.firings(1, 3, often))


def test_only_what_is_read_is_compared(made, firings, tmp_path, monkeypatch):
    """With blocks and row groups so small that the tables have many."""
    for where in ("writesae.files", "writesae.collect.marks"):
        monkeypatch.setattr(f"{where}.COMPARED", 256)
    monkeypatch.setattr(files, "ROW_GROUP", 64)
    monkeypatch.setattr(files, "DOCUMENT_ROWS", 2)
    out = tmp_path / "out"
    collect(Corpus.from_path(made[0].parent / "text"), Tokenizer(), FakeSource(), out, n=20, context=32,
            shard_passages=1000)  # fmt: skip
    assert verify(out).sound and Store(out).documents.equals(Store(made[0]).documents)
    path = out / "firings" / "part-000000.parquet"
    file = pq.ParquetFile(path)
    assert file.num_row_groups > 20 and len(json.loads((out / "done/part-000000.json").read_text())["files"][
        "firings/part-000000.parquet"]["blocks"]) > 20  # fmt: skip
    column = file.metadata.row_group(0).column(6)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    store = Store(out)
    last = [f for f in firings if (f["layer"], f["head"], f["feature"]) == (4, 2, 62)]
    assert [f for t in store.firings(4, 2, 62) for f in t.to_pylist()] == last and len(last) > 20
    for question in (lambda: list(store.firings()), lambda: store.at(0, 3), lambda: store.top(1, 0, 0, 10**6)):
        with pytest.raises(ValueError, match=f"{path} is damaged: its content and its digest disagree"):
            question()
    assert verify(out).damaged == {"firings/part-000000.parquet": "its content and its digest disagree"}
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{path} is damaged: expected {len(data)} bytes, got {len(data) - 1}"):
        next(Store(out).firings())
    for document in range(6):
        assert np.array_equal(store.tokens(document), Store(made[0]).tokens(document))


def test_tokens_and_documents(made):
    store, texts = Store(made[0]), made[1]
    for i, text in enumerate(texts):
        assert store.tokens(i).tolist() == ([7, *words(text)] if text else [])
    assert store.documents["source"].to_pylist() == [f"{i}.txt" for i in range(6)]
    assert not list((made[0] / "documents").iterdir())
    assert pq.read_table(made[0] / "documents.parquet").equals(store.documents)
    assert store.documents["tokens"].to_pylist() == [len(t) + bool(t) for t in texts]
    with pytest.raises(ValueError, match="document: expected one of the 6"):
        store.tokens(6)


def test_contexts(made):
    store, texts = Store(made[0]), made[1]
    contexts = store.contexts(1, 0, 5, n=30, width=6, tokenizer=Tokenizer())
    assert len(contexts) == 30
    for c, f in zip(contexts, store.top(1, 0, 5, 30).to_pylist(), strict=True):
        assert (c.document, c.row, c.position, c.activation) == (*by_place(f), f["activation"])
        text = "\x07" + texts[c.document]
        at = c.row * 32 + c.position
        low = max(at - 6, c.row * 32)
        assert (c.before, c.token) == (text[low:at], text[at])
        assert c.after == text[at + 1 : min(at + 7, c.row * 32 + 32)]
        assert c.tokens[c.at] == ord(c.token) and c.source == f"{c.document}.txt"
    plain = store.contexts(1, 0, 5, n=1)[0]
    assert plain.before is None and len(plain.tokens)


def test_reading_a_little(made, tmp_path, monkeypatch):
    """The same tokens from row groups that cut passages; and documents merged a few at a time."""
    monkeypatch.setitem(shard_module.ROWS, "tokens", 13)
    monkeypatch.setattr(files, "ROW_GROUP", 4)
    collect(
        Corpus.from_path(made[0].parent / "text"), Tokenizer(), FakeSource(), tmp_path / "out", n=20, context=32,
        shard_passages=7,
    )  # fmt: skip
    store, expected = Store(tmp_path / "out"), Store(made[0])
    assert pq.ParquetFile(tmp_path / "out" / "tokens" / "part-000000.parquet").num_row_groups > 10
    assert store.documents.equals(expected.documents)
    for document in range(6):
        assert np.array_equal(store.tokens(document), expected.tokens(document))
    for a, b in zip(store.contexts(1, 0, 5, 30), expected.contexts(1, 0, 5, 30), strict=True):
        assert np.array_equal(a.tokens, b.tokens) and (a.document, a.row, a.at) == (b.document, b.row, b.at)


def test_index_in_small_ranges_is_the_same(made, tmp_path, monkeypatch):
    store = Store(made[0])
    counts = store.counts()["count"].to_numpy()
    monkeypatch.setattr(finish_module, "_HELD", 60)
    monkeypatch.setattr(finish_module, "INDEX_ROWS", 11)
    sites = [Site(*site) for site in store.manifest["sites"]]
    build_index(tmp_path, sorted((made[0] / "firings").iterdir()), sites, counts, 20)
    for file in sorted((made[0] / "index").iterdir()):
        assert pq.read_table(tmp_path / "index" / file.name).equals(pq.read_table(file))
        assert pq.ParquetFile(tmp_path / "index" / file.name).num_row_groups > 10


def test_wrong_questions(made):
    store = Store(made[0])
    for question in (store.top, store.contexts):
        with pytest.raises(ValueError, match=r"expected a site of this collection \(1:0, 1:3, 4:2\), got 1:2"):
            question(1, 2, 0)
        with pytest.raises(ValueError, match="expected 0 <= feature < 64, got 64"):
            question(1, 0, 64)
    with pytest.raises(ValueError, match="expected a site"):
        store.counts(2)
    with pytest.raises(ValueError, match="expected a site"):
        list(store.firings(layer=2))


def test_folders_that_are_none(made, tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="expected a folder made by `writesae collect`"):
            Store(path)
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="another format"):
        Store(tmp_path)


def test_top_and_reservoir_modes(made, tmp_path):
    corpus = Corpus.from_path(made[0].parent / "text")
    for mode in ("top", "reservoir"):
        collect(corpus, Tokenizer(), FakeSource(), tmp_path / mode, mode=mode, n=8, context=32, shard_passages=7)
    full, top, reservoir = Store(made[0]), Store(tmp_path / "top"), Store(tmp_path / "reservoir")
    assert top.top(1, 0, 5, 8).equals(full.top(1, 0, 5, 8))
    with pytest.raises(ValueError, match="n: expected at most 8"):
        top.top(1, 0, 5, 9)
    with pytest.raises(ValueError, match="a reservoir is a random sample"):
        reservoir.top(1, 0, 5, 8)
    kept = next(top.firings(1, 0, 5)).to_pylist()[0]
    assert kept in top.at(kept["document"], kept["position"], row=kept["row"]).to_pylist()
    assert len(pa.concat_tables(reservoir.firings(1, 0, 5))) == 8


def test_unfinished_collections(made, tmp_path):
    class Failing(FakeSource):
        def firings(self, tokens, mask):
            if self.calls == 3:
                raise KeyError
            return super().firings(tokens, mask)

    corpus = Corpus.from_path(made[0].parent / "text")
    for mode in ("all", "top"):
        with pytest.raises(KeyError):
            collect(corpus, Tokenizer(), Failing(), tmp_path / mode, mode=mode, context=32, shard_passages=7, batch=8)
    with pytest.raises(ValueError, match="is not finished, and mode top"):
        Store(tmp_path / "top")
    store = Store(tmp_path / "all")
    done = store.summary()
    assert done["shards"] in (2, 3) and not done["complete"]
    assert store.documents["source"].to_pylist() == [f"{i}.txt" for i in range(done["documents"])]
    assert len(store.top(1, 0, 5, 10_000)) == sum(len(t) for t in store.firings(1, 0, 5)) > 0
    with pytest.raises(ValueError, match="counts: .*is not finished"):
        store.counts()


def test_store_loads_without_torch(made):
    script = (
        "import sys\nsys.modules['torch'] = sys.modules['pandas'] = None\n"
        "from writesae.collect import Store\n"
        f"store = Store({str(made[0])!r})\nprint(len(store.top(1, 0, 5, 3)), store.at(0, 3).num_rows)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=made[0].parents[0])
    assert done.stdout.split() == ["3", "12"], done.stderr


def test_activations_are_exact(tmp_path):
    class Wild(FakeSource):
        def firings(self, tokens, mask):
            f = super().firings(tokens, mask)
            bits = np.random.default_rng(len(f)).integers(1, 0x7F7FFFFF, len(f)).astype(np.uint32)
            f.activation.copy_(__import__("torch").from_numpy(bits.view(np.float32)))
            seen.append(bits)
            return f

    seen: list = []
    (tmp_path / "a.txt").write_text("some text " * 30)
    collect(Corpus.from_path(tmp_path / "a.txt"), words, Wild(), tmp_path / "out", context=64)
    stored = np.concatenate([t["activation"].to_numpy() for t in Store(tmp_path / "out").firings()])
    assert np.array_equal(np.sort(stored.view(np.uint32)), np.sort(np.concatenate(seen)))
