"""`collect`: what is stored, however often the run dies on the way."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import tables
from fake_source import FakeSource, words

from writesae.collect import Corpus, Store, collect
from writesae.collect import files as store_files
from writesae.collect.estimate import batches
from writesae.collect.modes import Columns, Selection, random_priority, top_priority
from writesae.collect.session import shards as shards_of
from writesae.firings import Firings
from writesae.text.passages import Cursor, Passage

SETTINGS = {"context": 32, "batch": 4, "shard_passages": 12}


@pytest.fixture
def text(tmp_path):
    """A folder of documents: several passages, one, exactly one, none, and a binary to skip."""
    folder = tmp_path / "text"
    folder.mkdir()
    rng = random.Random(1)
    for i, size in enumerate((400, 31, 32, 33, 0, 7, 700, 64)):
        (folder / f"{i}.txt").write_text("".join(rng.choice("abcdefg hij\n") for _ in range(size)))
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    return folder


def assert_same(folder, expected) -> None:
    here = tables(folder)
    assert here.keys() == expected.keys()
    for name, table in expected.items():
        assert here[name].equals(table), name


def everything(store: Store) -> set[tuple]:
    return {tuple(row.values()) for table in store.firings() for row in table.to_pylist()}


def expected_firings(folder, context: int) -> list[tuple]:
    """All firings as (document, row, position, layer, head, feature, activation), passage by passage, no batching."""
    import torch

    found = []
    source = FakeSource()
    for document in Corpus.from_path(folder).documents():
        ids = words(document.open().read().decode())
        for row in range(0, len(ids), context):
            part = torch.tensor(ids[row : row + context])[None]
            f = source.firings(part, torch.ones_like(part))
            for values in zip(*(c.tolist() for c in list(f.columns().values())[1:]), strict=True):
                found.append((document.number, row // context, *values))
    return found


def test_all_firings_are_stored_once(text, tmp_path):
    summary = collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **SETTINGS)
    stored = [tuple(row.values()) for table in Store(tmp_path / "out").firings() for row in table.to_pylist()]
    assert sorted(stored) == sorted(expected_firings(text, 32))
    assert summary["complete"] and summary["firings"] == len(stored) == summary["tokens"] * 12
    assert summary["tokens"] == 400 + 31 + 32 + 33 + 7 + 700 + 64
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_batching_and_shard_size_change_nothing(text, tmp_path):
    for name, settings in (("a", {}), ("b", {"batch": 1, "shard_passages": 1}), ("c", {"shard_passages": 1000})):
        collect(Corpus.from_path(text), words, FakeSource(), tmp_path / name, **{**SETTINGS, **settings})
    a, b, c = (everything(Store(tmp_path / name)) for name in "abc")
    assert a == b == c


@pytest.mark.parametrize("mode", ["top", "reservoir"])
def test_selected_firings(text, tmp_path, mode):
    collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "all", **SETTINGS)
    collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", mode=mode, n=5, seed=3, **SETTINGS)
    full, store = Store(tmp_path / "all"), Store(tmp_path / "out")
    assert store.counts().equals(full.counts())
    by_feature: dict = {}
    for f in expected_firings(text, 32):
        by_feature.setdefault(f[3:6], []).append(f)
    stored: dict = {}
    for table in store.firings():
        for row in table.to_pylist():
            stored.setdefault((row["layer"], row["head"], row["feature"]), []).append(tuple(row.values()))
    assert stored.keys() == by_feature.keys()
    for site, found in stored.items():
        assert len(found) == min(5, len(by_feature[site]))
        assert set(found) <= set(by_feature[site])
        if mode == "top":
            assert found == sorted(by_feature[site], key=lambda f: (-f[6], f[:3]))[:5]
    assert not list((tmp_path / "out" / "firings").iterdir())
    if mode == "reservoir":
        again = collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "b", mode=mode, n=5, seed=4, **SETTINGS)
        assert again["kept"] == sum(map(len, stored.values()))
        assert everything(Store(tmp_path / "b")) != everything(store)


def test_reservoir_is_uniform():
    total = 2000
    number = np.arange(total, dtype=np.int32)
    drawn = np.zeros(total)
    for seed in range(200):
        selection = Selection(100, 1, "reservoir", seed)
        for at in range(0, total, 250):
            part = slice(at, at + 250)
            zero = np.zeros(250, np.int32)
            selection.add(Columns(zero.astype(np.int64), number[part], zero, zero, np.ones(250, np.float32)))
        drawn[selection.kept.document] += 1
    # 200 draws at probability 1/20: mean 10, standard deviation 3.08; chi-squared over 2,000 cells.
    chi = float(((drawn - 10) ** 2 / (10 * 0.95)).sum())
    assert abs(chi - total) < 5 * np.sqrt(2 * total)
    assert abs(drawn[:1000].mean() - drawn[1000:].mean()) < 0.7


def test_selection_keeps_the_first_of_equals():
    rng = np.random.default_rng(0)
    key = np.sort(rng.integers(0, 5, 600))
    activation = rng.integers(1, 9, 600).astype(np.float32)
    place = np.arange(600, dtype=np.int32)
    selection, seen = Selection(7, 5), Columns.empty()
    for part in np.array_split(rng.permutation(600), 9):
        part = part[np.lexsort((part, key[part]))]
        met = np.full(len(part), len(seen), np.int32) + np.arange(len(part), dtype=np.int32)
        columns = Columns(key[part], met, place[part], place[part], activation[part])
        selection.add(columns)
        seen = Columns.cat([seen, columns])
    order = np.lexsort((seen.document, -seen.activation, seen.key))
    ranked = seen.take(order)
    rank = np.arange(600) - np.searchsorted(ranked.key, ranked.key)
    best = ranked.take(rank < 7)
    assert np.array_equal(selection.kept.position, best.position)
    assert (np.diff(top_priority(best)[best.key == 0].astype(np.int64)) >= 0).all()
    assert (random_priority(best, 1) < 2**32).all()


class Driver:
    """The forking helper process, see crash_driver.py."""

    def __init__(self):
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
        environment["XDG_CACHE_HOME"] = "/dev/null"  # a cache would be written by some runs and not by others
        self.process = subprocess.Popen(
            [sys.executable, str(here / "crash_driver.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

    def run(self, corpus, out, crash, **settings) -> dict:
        job = {"corpus": str(corpus), "out": str(out), "crash": crash, "collect": {**SETTINGS, **settings}}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def driver():
    driver = Driver()
    yield driver
    driver.process.stdin.close()
    driver.process.wait(30)


@pytest.mark.parametrize("mode, every", [("all", 13), ("top", 47), ("reservoir", 53)])
def test_death_at_any_file_call_changes_nothing(text, tmp_path, driver, mode, every):
    settings = {"mode": mode, "n": 6}
    whole = driver.run(text, tmp_path / "whole", -1, **settings)
    assert whole["status"] == 0 and whole["calls"] > 60
    expected = tables(tmp_path / "whole")
    for crash in range(1, whole["calls"] + 1, every):
        out = tmp_path / f"crash-{crash}"
        assert driver.run(text, out, crash, **settings)["status"] == 57, crash
        assert driver.run(text, out, -1, **settings)["status"] == 0, crash
        assert_same(out, expected)


@pytest.mark.parametrize("mode", ["all", "top"])
def test_death_at_any_file_call_of_the_finishing(text, tmp_path, driver, mode):
    settings = {"mode": mode, "n": 6, "shard_passages": 30}
    whole = driver.run(text, tmp_path / "whole", -1, **settings)
    expected, out = tables(tmp_path / "whole"), tmp_path / "out"
    deaths = range(whole["before"] + 1, whole["calls"] + 1)
    assert len(deaths) > 25
    assert driver.run(text, tmp_path / "ready", deaths[0], **settings)["status"] == 57
    for crash in deaths[::9]:
        shutil.copytree(tmp_path / "ready", out)
        for at in (crash - deaths[0] + 1, 9):  # from all shards done; then once more, early
            driver.run(text, out, at, **settings)
        assert driver.run(text, out, -1, **settings)["status"] == 0, crash
        assert_same(out, expected)
        shutil.rmtree(out)


def test_many_deaths_in_one_collection(text, tmp_path, driver):
    driver.run(text, tmp_path / "whole", -1)
    rng = random.Random(5)
    deaths = 0
    while driver.run(text, tmp_path / "out", rng.randint(20, 60))["status"] != 0:
        deaths += 1
        assert deaths < 100
    assert deaths > 2
    assert_same(tmp_path / "out", tables(tmp_path / "whole"))


def test_kill_from_outside(text, tmp_path):
    """A real SIGKILL at an arbitrary moment, not at a call."""
    here = Path(__file__).parent
    script = (
        "import sys\nfrom fake_source import *\nfrom writesae.collect import *\n"
        "print('go', flush=True)\n"
        f"collect(Corpus.from_path({str(text)!r}), words, FakeSource(delay=0.03), {str(tmp_path / 'out')!r}, "
        "context=32, batch=4, shard_passages=12)\nprint('end', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "go\n"
    time.sleep(0.25)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "whole", **SETTINGS)
    collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **SETTINGS)
    assert_same(tmp_path / "out", tables(tmp_path / "whole"))


def test_interrupt_finishes_the_shard(text, tmp_path):
    class Interrupting(FakeSource):
        def firings(self, tokens, mask):
            if self.calls == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return super().firings(tokens, mask)

    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)  # not Python's own where the tests run in the background
    summary = collect(Corpus.from_path(text), words, Interrupting(), tmp_path / "out", **SETTINGS)
    assert not summary["complete"] and summary["shards"] == 1
    assert Store(tmp_path / "out").summary()["tokens"] == summary["tokens"] > 0
    assert signal.getsignal(signal.SIGINT) is before
    summary = collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **SETTINGS)
    collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "whole", **SETTINGS)
    assert summary["complete"]
    assert_same(tmp_path / "out", tables(tmp_path / "whole"))


def test_interrupt_in_the_last_shard(text, tmp_path):
    """It is finished, the index is not begun, and the same call makes it."""

    class Last(FakeSource):
        def firings(self, tokens, mask):
            os.kill(os.getpid(), signal.SIGINT)
            return super().firings(tokens, mask)

    options = {**SETTINGS, "shard_passages": 10**6, "batch": 10**6}  # one batch, one shard
    summary = collect(Corpus.from_path(text), words, Last(), tmp_path / "out", **options)
    assert not summary["complete"] and summary["shards"] == 1 and not list((tmp_path / "out" / "index").iterdir())
    source = FakeSource()
    summary = collect(Corpus.from_path(text), words, source, tmp_path / "out", **options)
    assert summary["complete"] and source.calls == 0


def test_second_interrupt_stops_at_once(text, tmp_path):
    class Impatient(FakeSource):
        def firings(self, tokens, mask):
            os.kill(os.getpid(), signal.SIGINT)
            return super().firings(tokens, mask)

    with pytest.raises(KeyboardInterrupt):
        collect(Corpus.from_path(text), words, Impatient(), tmp_path / "out", **SETTINGS)
    summary = collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **SETTINGS)
    assert summary["complete"]


def test_finished_collection_is_left_alone(text, tmp_path):
    first = collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **SETTINGS)
    source = FakeSource()
    assert collect(Corpus.from_path(text), words, source, tmp_path / "out", **SETTINGS) == first
    assert source.calls == 0


@pytest.mark.parametrize("limit", [1, 32, 50, 400, 431, 463, 10_000])
def test_max_tokens(text, tmp_path, driver, limit):
    summary = collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", max_tokens=limit, **SETTINGS)
    assert summary["tokens"] == min(limit, 1267)
    expected = [f for f in expected_firings(text, 32)]
    assert everything(Store(tmp_path / "out")) == set(expected[:0]) | _first_tokens(expected, limit)
    # Dying behind the last passage, and going on from there, sees the same end of the corpus.
    assert driver.run(text, tmp_path / "b", 30, max_tokens=limit)["status"] == 57
    assert driver.run(text, tmp_path / "b", -1, max_tokens=limit)["status"] == 0
    assert_same(tmp_path / "b", tables(tmp_path / "out"))


def _first_tokens(expected: list[tuple], limit: int) -> set[tuple]:
    places = sorted({f[:3] for f in expected})[:limit]
    return {f for f in expected if f[:3] in set(places)}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"context": 16}, "context is 32 there, 16 here"),
        ({"mode": "top"}, "mode is 'all' there, 'top' here"),
        ({"n": 7}, "n is 100 there, 7 here"),
        ({"max_tokens": 9}, "max_tokens is None there, 9 here"),
        ({"shard_passages": 5}, "shard_passages is 12 there, 5 here"),
    ],
)
def test_other_arguments_are_refused(text, tmp_path, change, named):
    collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **SETTINGS)
    with pytest.raises(ValueError, match=named):
        collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **{**SETTINGS, **change})


def test_another_model_or_corpus_is_refused(text, tmp_path):
    collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **SETTINGS)
    with pytest.raises(ValueError, match=r"source\.model is 'fake 64 4' there, 'fake 128 4' here"):
        collect(Corpus.from_path(text), words, FakeSource(features=128), tmp_path / "out", **SETTINGS)
    (text / "0.txt").write_text("changed")
    with pytest.raises(ValueError, match=r"corpus\.sha256"):
        collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **SETTINGS)


def test_foreign_folders_are_refused(text, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="thesis.tex and no manifest"):
        collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "foreign", **SETTINGS)
    assert [p.name for p in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="got the file"):
        collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "file", **SETTINGS)
    for name, content in (("torn", "{"), ("other", '{"format": "x"}'), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="manifest"):
            collect(Corpus.from_path(text), words, FakeSource(), tmp_path / name, **SETTINGS)


def test_damaged_shard_is_made_again(text, tmp_path):
    with pytest.raises(KeyError):
        collect(Corpus.from_path(text), words, _Failing(8), tmp_path / "out", **SETTINGS)
    part = tmp_path / "out" / "firings" / "part-000000.parquet"
    part.write_bytes(part.read_bytes()[:-5])
    summary = collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **SETTINGS)
    assert len(summary["repaired"]) == 1 and str(part) in summary["repaired"][0]
    collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "whole", **SETTINGS)
    assert_same(tmp_path / "out", tables(tmp_path / "whole"))


class _Failing(FakeSource):
    """Raises at its nth call."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def firings(self, tokens, mask):
        if self.calls == self.at:
            raise KeyError("model failed")
        return super().firings(tokens, mask)


def test_failing_model_keeps_finished_shards(text, tmp_path):
    with pytest.raises(KeyError, match="model failed"):
        collect(Corpus.from_path(text), words, _Failing(8), tmp_path / "out", **SETTINGS)
    assert not Store(tmp_path / "out").complete
    collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **SETTINGS)
    collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "whole", **SETTINGS)
    assert_same(tmp_path / "out", tables(tmp_path / "whole"))


def test_two_runs_on_one_folder(text, tmp_path):
    (tmp_path / "out").mkdir()
    with store_files.locked(tmp_path / "out"):
        with pytest.raises(ValueError, match=f"another process .pid {os.getpid()}. is collecting"):
            collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **SETTINGS)
    assert collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **SETTINGS)["complete"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_only_a_device_holds_two_batches(text, tmp_path, asynchronous):
    """Batches under way at once: one, and two where the next one is to run while the last one's firings arrive."""

    class Slow(FakeSource):
        held = most = 0

        def begin(self, tokens, mask):
            self.held += 1
            self.most = max(self.most, self.held)

            def firings():
                self.held -= 1
                return self.firings(tokens, mask)

            return firings

    source = Slow()
    source.asynchronous = asynchronous
    collect(Corpus.from_path(text), words, source, tmp_path / "out", **SETTINGS)
    assert (source.held, source.most) == (0, 1 + asynchronous)
    collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "plain", **SETTINGS)
    assert_same(tmp_path / "out", tables(tmp_path / "plain"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(text, tmp_path, monkeypatch, code):
    original, calls = pq.write_table, []

    def full(table, where, **options):
        calls.append(where)
        if len(calls) == 6:
            Path(where).write_bytes(b"half")
            raise OSError(code, os.strerror(code))
        return original(table, where, **options)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="nothing half-written is kept"):
        collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **SETTINGS)
    monkeypatch.undo()
    assert not list((tmp_path / "out").rglob("*.tmp"))
    collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **SETTINGS)
    collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "whole", **SETTINGS)
    assert_same(tmp_path / "out", tables(tmp_path / "whole"))


def test_write_that_the_system_refuses(tmp_path):
    """A real failed write, by a limit on the size of files, in the middle of a Parquet file."""
    script = (
        "import resource, signal, sys\nimport numpy as np, pyarrow as pa\nfrom pathlib import Path\n"
        "from writesae.collect.files import write_table\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "try:\n    write_table(Path(sys.argv[1]), pa.table({'x': np.random.default_rng(0).random(500_000)}))\n"
        "except OSError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x.parquet")], capture_output=True, text=True, env=environment
    )
    assert "nothing half-written is kept" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_errors_of_the_writer_surface(text, tmp_path):
    class Negative(FakeSource):
        def firings(self, tokens, mask):
            f = super().firings(tokens, mask)
            f.activation[3] = float("nan")
            return f

    with pytest.raises(ValueError, match="activation: expected positive finite numbers, got nan at layer 1 head 0"):
        collect(Corpus.from_path(text), words, Negative(), tmp_path / "out", **SETTINGS)


def test_estimate_is_asked_first(text, tmp_path):
    seen = []

    def no(estimate):
        seen.append(estimate)
        return False

    summary = collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", confirm=no, **SETTINGS)
    assert summary["declined"] and not (tmp_path / "out").exists()
    assert seen[0].tokens == 1267 and seen[0].firings_per_token == 12 and seen[0].bytes > 0
    assert "1,267 tokens" in str(seen[0])
    summary = collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", confirm=lambda e: True, **SETTINGS)
    assert summary["complete"]
    # A resumed run is not asked again.
    collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", confirm=no, **SETTINGS)


@pytest.mark.parametrize(
    "settings, named",
    [({"mode": "most"}, "mode: expected one of all, top"), ({"n": 0}, "n: expected"), ({"context": 0}, "context: exp"),
     ({"batch": -1}, "batch: expected"), ({"max_tokens": 0}, "max_tokens: expected")],
)  # fmt: skip
def test_bad_arguments(text, tmp_path, settings, named):
    with pytest.raises(ValueError, match=named):
        collect(Corpus.from_path(text), words, FakeSource(), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_text_without_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("some")
    with pytest.raises(ValueError, match="corpus: expected text, got documents without any"):
        collect(Corpus.from_path(tmp_path / "a.txt"), lambda text: [], FakeSource(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_token_that_never_fires(tmp_path):
    class Silent(FakeSource):
        def firings(self, tokens, mask):
            return Firings.empty()

    (tmp_path / "a.txt").write_text("some text")
    summary = collect(Corpus.from_path(tmp_path / "a.txt"), words, Silent(), tmp_path / "out")
    store = Store(tmp_path / "out")
    assert summary["firings"] == 0 and not everything(store)
    assert len(store.top(1, 0, 0)) == len(store.at(0, 0)) == 0
    assert store.counts()["count"].to_numpy().sum() == 0


def test_shards_close_with_their_last_passage(text):
    from writesae.text.passages import passages

    shards = list(shards_of(passages(Corpus.from_path(text), words, 32), 0, 13))
    assert [len(s.passages) for s in shards] == [13, 13, 13, 3]
    assert [s.last for s in shards] == [False] * 3 + [True]
    assert sum(len(s.ends) for s in shards) == 8


@pytest.mark.parametrize("context", [50, 100, 512])
def test_batches_have_few_lengths(context):
    """Memory grows with the number of different shapes that a model meets, so a long corpus may not bring new ones."""
    rng = np.random.default_rng(0)
    lengths = [context, *rng.integers(1, context + 1, 300).tolist()]
    made = [Passage(0, i, np.arange(n, dtype=np.int32), Cursor()) for i, n in enumerate(lengths)]
    seen, sizes = [], set()
    for rows, tokens, mask in batches(made, 4, context):
        assert tokens.shape == mask.shape and tokens.shape[1] <= context
        assert mask.sum(1).tolist() == [lengths[i] for i in rows]
        for i, row in zip(rows, tokens, strict=True):
            assert row[: lengths[i]].tolist() == made[i].tokens.tolist() and not row[lengths[i] :].any()
        seen += rows.tolist()
        sizes.add(tokens.shape[1])
    assert sorted(seen) == list(range(len(lengths)))
    assert len(sizes) <= -(-context // 64) and all(size % 64 == 0 or size == context for size in sizes)


def test_a_row_group_is_one_page(tmp_path):
    """Otherwise the byte planes of a page share one code table, and a real firing takes 2 % more."""
    n = store_files.ROW_GROUP
    rng = np.random.default_rng(0)
    feature = np.sort(rng.integers(0, 500, n)).astype(np.int32)
    zero, position = np.zeros(n, np.int32), rng.integers(0, 512, n).astype(np.int32)
    activation = np.exp(rng.normal(size=n)).astype(np.float32)
    table = pa.table([zero, zero, position, zero, zero, feature, activation], schema=store_files.FIRINGS)
    store_files.write_table(tmp_path / "whole.parquet", table)
    options = store_files.parquet_options(store_files.FIRINGS)
    if "max_rows_per_page" in options:
        options["max_rows_per_page"] = 20_000
        pq.write_table(table, tmp_path / "pages.parquet", row_group_size=n, **options)
        sizes = [(tmp_path / f"{name}.parquet").stat().st_size for name in ("whole", "pages")]
        assert sizes[0] < sizes[1]
    assert pq.ParquetFile(tmp_path / "whole.parquet").num_row_groups == 1
    assert pq.read_table(tmp_path / "whole.parquet").equals(table)  # to the last bit of every activation
