"""`Store.sql`: DuckDB's answers are those of the tables, and it reads nothing but the store."""

from __future__ import annotations

import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_source import FakeSource
from test_store import Tokenizer

from writesae.collect import Corpus, Store, collect


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """{mode: folder}; a quote in its name is part of the test."""
    pytest.importorskip("duckdb")
    root = tmp_path_factory.mktemp("it's")
    (root / "text").mkdir()
    for i, n in enumerate((90, 0, 500)):
        (root / "text" / f"{i}.txt").write_text(("abcdefg hij" * 50)[:n])
    for mode in ("all", "top"):
        collect(
            Corpus.from_path(root / "text"), Tokenizer(), FakeSource(), root / mode, n=20, context=32, shard_passages=7,
            mode=mode,
        )  # fmt: skip
    return {mode: root / mode for mode in ("all", "top")}


def test_the_views_are_the_files(stores):
    store, folder = Store(stores["all"]), stores["all"]
    order = "document, row, position, layer, head, feature"
    firings = pq.read_table(folder / "firings").sort_by([(name, "ascending") for name in order.split(", ")])
    found = store.sql(f"SELECT * FROM firings ORDER BY {order}")
    assert found.equals(firings.cast(found.schema)) and len(found) > 100
    assert found.schema.names == firings.schema.names and found.schema.field("activation").type == pa.float32()
    assert store.sql("SELECT * FROM documents ORDER BY document").to_pylist() == store.documents.to_pylist()
    assert store.sql("SELECT count(*) AS n FROM tokens").to_pylist() == [{"n": store.summary()["tokens"]}]
    features = store.sql("SELECT * FROM features ORDER BY layer, head, feature").to_pylist()
    assert features == store.counts().to_pylist()


def test_questions(stores):
    store = Store(stores["all"])
    layer, head = store.sites[0]
    feature = store.sql("SELECT feature FROM firings WHERE layer = ? AND head = ? LIMIT 1", [layer, head])
    feature = feature["feature"][0].as_py()
    query = (
        "SELECT activation FROM Firings WHERE layer = $layer AND head = $head AND feature = $feature "
        "ORDER BY activation DESC, document, row, position LIMIT 5"
    )
    found = store.sql(query, {"layer": layer, "head": head, "feature": feature})
    assert found["activation"].to_pylist() == store.top(layer, head, feature, 5)["activation"].to_pylist()
    counts = store.sql(
        "WITH counted AS (SELECT layer, head, feature, count(*) AS n FROM firings GROUP BY ALL) "
        "SELECT count(*) AS wrong FROM counted JOIN features USING (layer, head, feature) WHERE n <> count"
    )
    assert counts.to_pylist() == [{"wrong": 0}]
    joined = store.sql("SELECT token FROM firings JOIN tokens USING (document, row, position)")
    assert len(joined) == store.summary()["firings"]


def test_of_mode_top_what_was_kept(stores):
    store = Store(stores["top"])
    kept = sum(len(table) for table in store.firings())
    assert store.sql("SELECT count(*) AS n FROM firings").to_pylist() == [{"n": kept}] and kept > 0


def test_a_store_of_several_units(stores, tmp_path):
    collect(
        Corpus.from_path(stores["all"].parent / "text"), Tokenizer(), FakeSource(), tmp_path / "out", n=20, context=32,
        shard_passages=7, unit=50,
    )  # fmt: skip
    assert len(list((tmp_path / "out" / "units").iterdir())) > 1
    joined = "firings JOIN tokens USING (document, row, position) JOIN documents USING (document)"
    query = f"SELECT * FROM {joined} ORDER BY ALL"
    assert Store(tmp_path / "out").sql(query).equals(Store(stores["all"]).sql(query))


def test_only_the_stores_own_files(stores, tmp_path):
    store, here = Store(stores["all"]), pa.table({"x": [1]})
    pq.write_table(here, tmp_path / "other.parquet")
    (tmp_path / "other.csv").write_text("x\n1\n")
    before = {path: path.read_bytes() for path in stores["all"].rglob("*") if path.is_file()}
    for query in (
        f"SELECT * FROM '{tmp_path}/other.parquet'",
        f"SELECT * FROM read_csv('{tmp_path}/other.csv')",
        f"SELECT * FROM read_text('{tmp_path}/other.csv')",
        f"SELECT *, (SELECT count(*) FROM firings) FROM glob('{tmp_path}/*')",
        "SELECT * FROM here",
        "SELECT * FROM nothing",
        "SELECT nothing FROM firings",
        "SELECT 1 +",
        "SELECT * FROM read_parquet('https://example.com/x.parquet')",
        "SELECT * FROM firings WHERE feature = ?",
    ):
        with pytest.raises(ValueError, match="^query: ") as found:
            store.sql(query)
        assert "\n" not in str(found.value)
    part = next((stores["all"] / "firings").iterdir())
    for query in (
        f"COPY (SELECT 1) TO '{str(part).replace(chr(39), 2 * chr(39))}'", "SET enable_external_access = true",
        "CREATE TABLE x AS SELECT 1", "DROP VIEW firings", "ATTACH 'x.db'", "INSTALL httpfs", "SELECT 1; SELECT 2", "",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^query: expected one SELECT, got .*: a store is read-only"):
            store.sql(query)
    with pytest.raises(ValueError, match="query: expected text, got 3"):
        store.sql(3)
    assert before == {path: path.read_bytes() for path in stores["all"].rglob("*") if path.is_file()}


def test_a_damaged_file_is_named_where_it_is_asked_for(stores, tmp_path):
    import shutil

    shutil.copytree(stores["all"], tmp_path / "store")
    path = tmp_path / "store" / "tokens" / "part-000000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    store = Store(tmp_path / "store")
    assert len(store.sql("SELECT * FROM firings LIMIT 1")) == 1
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        store.sql("SELECT count(*) FROM tokens")


def test_an_unfinished_collection(stores, tmp_path):
    import shutil

    shutil.copytree(stores["all"], tmp_path / "store")
    (tmp_path / "store" / "summary.json").unlink()
    store = Store(tmp_path / "store")
    whole = store.sql("SELECT count(*) AS n FROM firings").to_pylist()
    assert whole == [{"n": store.summary()["firings"]}]
    with pytest.raises(
        ValueError, match="query: .*views: firings, tokens, documents; features once the collection is finished"
    ):
        store.sql("SELECT * FROM features")


def test_without_duckdb(stores, monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(ImportError, match=r"duckdb is needed for Store.sql: pip install 'writesae\[sql\]'"):
        Store(stores["all"]).sql("SELECT 1")
