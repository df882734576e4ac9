"""Stores collected apart, merged: what one collection of all the text holds, and nothing that is not the same."""

import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_source import FakeSource, words

from writesae.cli import main
from writesae.collect import Corpus, Store, collect, merge
from writesae.collect.modes import Columns, Selection, random_priority
from writesae.collect.verify import verify

SETTINGS = {"context": 32, "batch": 4, "shard_passages": 6, "n": 6}
MODES = ("all", "top", "reservoir")
PARTS = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with text/{0,1,2}, text of all (in the order of its parts), and stores of each, the second in units."""
    root = tmp_path_factory.mktemp("merge")
    rng = random.Random(3)
    (root / "text").mkdir()
    for part in range(PARTS):
        (root / "text" / str(part)).mkdir()
        for i, size in enumerate((150, 31, 0, 32, 200)):
            text = "".join(rng.choice("abcdefg hij\n") for _ in range(size))
            (root / "text" / str(part) / f"{i}.txt").write_text(text)
    for mode in MODES:
        for part in range(PARTS):
            make(root / "text" / str(part), root / f"{mode}-{part}", mode=mode, unit=100 if part == 1 else None)
        make(root / "text", root / f"{mode}-whole", mode=mode)
    return root


def make(text, out, **settings) -> dict:
    return collect(Corpus.from_path(text), words, FakeSource(), out, **{**SETTINGS, **settings})


def stores(made, mode) -> list:
    return [made / f"{mode}-{part}" for part in range(PARTS)]


def rows(store) -> list[tuple]:
    return sorted(tuple(row.values()) for table in store.firings() for row in table.to_pylist())


def bytes_of(folder) -> dict:
    return {p.relative_to(folder): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.mark.parametrize("mode", ["all", "top"])
def test_merged_is_one_collection_of_all(made, tmp_path, mode):
    before = [bytes_of(store) for store in stores(made, mode)]
    summary = merge(stores(made, mode), tmp_path / "out")
    assert [bytes_of(store) for store in stores(made, mode)] == before
    here, whole = Store(tmp_path / "out"), Store(made / f"{mode}-whole")
    for name in ("documents", "tokens", "firings", "kept"):
        assert summary[name] == whole.summary()[name]
    assert here.counts().equals(whole.counts())
    assert rows(here) == rows(whole)
    for path in (made / f"{mode}-whole" / "index").iterdir():
        assert pq.read_table(tmp_path / "out" / "index" / path.name).equals(pq.read_table(path))
    columns = ["document", "sha256", "tokens", "passages", "first_passage"]
    assert here.documents.select(columns).equals(whole.documents.select(columns))
    for document in range(len(whole.documents)):
        assert here.tokens(document).tolist() == whole.tokens(document).tolist()
        if len(whole.tokens(document)):
            assert here.at(document, 5).equals(whole.at(document, 5))
    for a, b in zip(here.contexts(1, 3, 7, 5), whole.contexts(1, 3, 7, 5), strict=True):
        assert (a.tokens.tolist(), a.at, a.document, a.activation) == (
            b.tokens.tolist(),
            b.at,
            b.document,
            b.activation,
        )
    found = verify(tmp_path / "out")
    assert found.sound and found.complete and not found.left_over


@pytest.mark.parametrize("mode", MODES)
def test_merging_in_steps_is_merging_at_once(made, tmp_path, mode):
    a, b, c = stores(made, mode)
    merge([a, b, c], tmp_path / "once")
    merge([a, b], tmp_path / "ab")
    merge([tmp_path / "ab", c], tmp_path / "steps")
    once, steps = Store(tmp_path / "once"), Store(tmp_path / "steps")
    assert rows(once) == rows(steps) and once.counts().equals(steps.counts())
    for path in (tmp_path / "once" / "index").iterdir():
        assert pq.read_table(tmp_path / "steps" / "index" / path.name).equals(pq.read_table(path))
    assert verify(tmp_path / "steps").sound


def test_a_merged_sample_is_the_lowest_of_all(made, tmp_path):
    """Of every firing's number, drawn with its own store's salt, the n smallest of a feature: by exhaustion."""
    merge(stores(made, "reservoir"), tmp_path / "out")
    kept: dict = {}
    for document, row, position, layer, head, feature, _ in rows(Store(tmp_path / "out")):
        kept.setdefault((layer, head, feature), set()).add((document, row, position))
    lowest: dict = {}
    sites = Store(tmp_path / "out").manifest["sites"]
    first = dict(zip([tuple(s[:2]) for s in sites], np.cumsum([0, *(s[2] for s in sites)]).tolist(), strict=False))
    documents = 0
    for part in range(PARTS):
        whole, salt = Store(made / f"all-{part}"), Store(made / f"reservoir-{part}").manifest["salt"]
        for document, row, position, layer, head, feature, activation in rows(whole):
            one = [np.array([x]) for x in (first[layer, head] + feature, document, row, position)]
            number = int(random_priority(Columns(*one, np.array([activation])), 0, ((0, salt),))[0])
            lowest.setdefault((layer, head, feature), []).append((number, (documents + document, row, position)))
        documents += len(whole.documents)
    assert kept == {key: {place for _, place in sorted(found)[:6]} for key, found in lowest.items()}


def test_a_merged_sample_is_uniform():
    """Of two corpora of unlike size whose documents bear the same numbers."""
    sizes, drawn = (1500, 500), np.zeros(2000)
    for seed in range(200):
        corpora = tuple((first, hash((seed, first)) & 0xFFFFFFFF) for first in (0, 1500))
        kept = []
        for first, size in zip((0, 1500), sizes, strict=True):
            zero, number = np.zeros(size, np.int32), np.arange(first, first + size, dtype=np.int32)
            selection = Selection(100, 1, "reservoir", 7, corpora)
            selection.add(Columns(zero.astype(np.int64), number, zero, zero, np.ones(size, np.float32)))
            kept.append(selection.kept)
        merged = Selection(100, 1, "reservoir", 7, corpora)
        for part in kept:
            merged.add(part.by_place())
        drawn[merged.kept.document] += 1
    # As test_reservoir_is_uniform: mean 10 draws a cell, chi-squared over 2,000 cells.
    chi = float(((drawn - 10) ** 2 / (10 * 0.95)).sum())
    assert abs(chi - 2000) < 5 * np.sqrt(4000)
    assert abs(drawn[:1500].mean() - drawn[1500:].mean()) < 0.7


@pytest.mark.parametrize("at", range(0, 60, 7))
def test_an_interrupted_merge_goes_on(made, tmp_path, monkeypatch, at):
    merge(stores(made, "all"), tmp_path / "whole")
    calls = [0]
    module = sys.modules[merge.__module__]
    original = module._renumbered

    def fails(*args):
        calls[0] += 1
        if calls[0] == at + 1:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_renumbered", fails)
        try:
            merge(stores(made, "all"), tmp_path / "out")
        except KeyboardInterrupt:
            assert not (tmp_path / "out" / "summary.json").exists()
    merge(stores(made, "all"), tmp_path / "out")
    assert verify(tmp_path / "out").sound
    tables = {name: x for name, x in bytes_of(tmp_path / "whole").items() if name.suffix == ".parquet"}
    assert {name: x for name, x in bytes_of(tmp_path / "out").items() if name.suffix == ".parquet"} == tables


def test_a_damaged_merge_is_made_again(made, tmp_path):
    merge(stores(made, "all"), tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    for name in ("index/layer-1-head-0.parquet", "documents.parquet", "done/unit-000001.json"):
        (tmp_path / "out" / name).write_bytes(b"")
        assert name in verify(tmp_path / "out").damaged
        merge(stores(made, "all"), tmp_path / "out")
        assert verify(tmp_path / "out").sound
    after = bytes_of(tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(after[name] == x for name, x in before.items() if name.suffix == ".parquet")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"context": 31}, "expected the same context in all, got 32 in .* and 31 in"),
        ({"n": 5}, "expected the same n in all, got 6 in .* and 5 in"),
        ({"mode": "top"}, 'expected the same mode in all, got "all" in .* and "top" in'),
        ({"features": 32}, "expected the same sites in all"),
    ],
)
def test_stores_that_differ_are_refused(made, tmp_path, change, named):
    source = FakeSource(features=change.pop("features", 64))
    settings = {**SETTINGS, **change}
    collect(Corpus.from_path(made / "text" / "1"), words, source, tmp_path / "other", **settings)
    with pytest.raises(ValueError, match=named):
        merge([made / "all-0", tmp_path / "other"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_refusals(made, tmp_path):
    a, b, c = stores(made, "all")
    with pytest.raises(ValueError, match="got two of the same"):
        merge([a, b, a], tmp_path / "out")
    with pytest.raises(ValueError, match="expected at least two, got 1"):
        merge([a], tmp_path / "out")
    with pytest.raises(ValueError, match="expected a folder made by `writesae collect`"):
        merge([a, tmp_path / "none"], tmp_path / "out")
    merge([a, b], tmp_path / "ab")
    with pytest.raises(ValueError, match="holds a collection with other arguments"):
        merge([a, c], tmp_path / "ab")
    with pytest.raises(ValueError, match="got two of the same"):
        merge([tmp_path / "ab", b], tmp_path / "out")
    with pytest.raises(ValueError, match="holds a collection with other arguments"):
        make(made / "text" / "0", tmp_path / "ab")
    shutil.copytree(a, tmp_path / "damaged")
    (tmp_path / "damaged" / "firings" / "part-000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="part-000000.parquet is damaged"):
        merge([tmp_path / "damaged", b], tmp_path / "out")
    (tmp_path / "damaged" / "summary.json").unlink()
    with pytest.raises(ValueError, match="expected finished collections"):
        merge([tmp_path / "damaged", b], tmp_path / "other")


def test_the_command(made, tmp_path, capsys):
    assert main(["merge", *map(str, stores(made, "top")), str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 15
    assert main(["merge", str(made / "top-0"), str(made / "all-1"), str(tmp_path / "no")]) == 2
    assert "expected the same mode" in capsys.readouterr().err


@pytest.mark.parametrize("mode", MODES)
def test_units_all_done_are_put_together_without_a_model(made, tmp_path, capsys, monkeypatch, mode):
    from writesae.collect import distribute

    out, text = tmp_path / "out", made / "text" / "1"
    with monkeypatch.context() as patch:
        patch.setattr(distribute, "end", lambda worker, began: {"complete": False})
        make(text, out, mode=mode, unit=100)
    assert not (out / "summary.json").exists()
    assert main(["merge", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["complete"]
    assert rows(Store(out)) == rows(Store(made / f"{mode}-1")) and verify(out).sound
    before = bytes_of(out)
    assert main(["merge", str(out)]) == 0 and bytes_of(out) == before
    (out / "summary.json").unlink()
    (out / "done" / "unit-000001.json").unlink()
    assert main(["merge", str(out)]) == 2
    assert "1 of the 2 units of" in capsys.readouterr().err
    assert main(["merge", str(made / "all-0")]) == 2
    assert "expected two stores or more" in capsys.readouterr().err
