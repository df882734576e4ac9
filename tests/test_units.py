"""Several workers on one folder: whatever they are, and however they die, the tables are those of one."""

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from damage import Tokenizer, tables
from fake_source import FakeSource, words
from test_collect import Driver, everything, text  # noqa: F401  (fixtures)
from test_collect import assert_same as same_tables

from writesae import ranks
from writesae.cli import main
from writesae.collect import Corpus, Store, collect, distribute, files, plan, run, units
from writesae.collect.verify import verify
from writesae.text import passages as text_passages
from writesae.text.passages import DocumentEnd, passages

SETTINGS = {"context": 32, "batch": 4, "shard_passages": 6, "unit": 100, "n": 6}
MODES = ("all", "top", "reservoir")


@pytest.fixture(scope="module")
def driver():
    driver = Driver()
    yield driver
    driver.process.stdin.close()
    driver.process.wait(30)


def assert_same(folder, expected) -> None:
    same_tables(folder, expected)
    found = verify(folder)
    assert found.sound and found.complete and not found.left_over, found


def make(folder, out, source=None, **settings) -> dict:
    return collect(Corpus.from_path(folder), words, source or FakeSource(), out, **{**SETTINGS, **settings})


@pytest.mark.parametrize("limit", [None, 1, 431, 463, 500, 10_000])
@pytest.mark.parametrize("mode", MODES)
def test_units_hold_what_one_process_does(text, tmp_path, mode, limit):  # noqa: F811
    make(text, tmp_path / "one", mode=mode, max_tokens=limit, unit=None)
    summary = make(text, tmp_path / "units", mode=mode, max_tokens=limit)
    assert summary["units"] == (4 if limit in (None, 10_000) else 1 if limit == 1 else 2)
    one, several = Store(tmp_path / "one"), Store(tmp_path / "units")
    expected = {name: x for name, x in one.summary().items() if name in ("documents", "tokens", "firings", "kept")}
    assert {name: summary[name] for name in expected} == expected
    here, there = tables(tmp_path / "units"), tables(tmp_path / "one")
    shared = [name for name in there if name.split("/")[0] in ("documents.parquet", "features.parquet", "index")]
    assert len(shared) == 5
    for name in shared:
        assert here[name].equals(there[name]), name
    assert everything(one) == everything(several)
    for document in one.documents["document"].to_pylist():
        assert one.tokens(document).tolist() == several.tokens(document).tolist()
        if len(one.tokens(document)) > 3:
            assert one.at(document, 3).equals(several.at(document, 3))
    if mode != "reservoir":
        assert [c.tokens.tolist() for c in one.contexts(1, 3, 7, 5)] == [
            c.tokens.tolist() for c in several.contexts(1, 3, 7, 5)
        ]
    if mode == "all":
        assert one.top(4, 2, 9, 1000).equals(several.top(4, 2, 9, 1000))
    assert_same(tmp_path / "units", here)


def test_the_plan_covers_the_corpus_once(text, tmp_path):  # noqa: F811
    corpus = Corpus.from_path(text)
    for size in (1, 33, 100, 10**6):
        found = plan.cut(corpus, size, "m")
        assert [unit.number for unit in found] == list(range(len(found)))
        numbers = [
            d.number
            for u in found
            for d in plan.Range(corpus, u.start, u.documents).documents(u.start.place, u.start.document)
        ]
        assert numbers == list(range(8))
        assert all(unit.tokens is None for unit in found)
    assert len(plan.cut(corpus, 10**6, "m")) == 1
    assert len({unit.name for m in "mn" for unit in plan.cut(corpus, 100, m)}) == 2 * len(plan.cut(corpus, 100, "m"))


def test_a_unit_reads_records_from_its_own_on(tmp_path):
    """Of files with many documents, plain and packed ones."""
    lines = [json.dumps({"text": "ab" * (i % 7), "n": i}) for i in range(50)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("\n".join(lines[:20]))
    (tmp_path / "text" / "b.jsonl").write_text("\n".join(lines[20:]))
    corpus = Corpus.from_path(tmp_path / "text")
    whole = [e for e in passages(corpus, words, 4) if isinstance(e, DocumentEnd)]
    units_of = plan.cut(corpus, 40, "m")
    assert len(units_of) > 5
    parts = [
        (e.document, e.source, e.sha256, e.tokens)
        for unit in units_of
        for e in passages(plan.Range(corpus, unit.start, unit.documents), words, 4, start=unit.start)
        if isinstance(e, DocumentEnd)
    ]
    assert parts == [(e.document, e.source, e.sha256, e.tokens) for e in whole]


def _worker(folder, out, rank, world_size, mode, delay, answers) -> None:
    summary = make(folder, out, FakeSource(delay=delay), mode=mode, rank=rank, world_size=world_size)
    answers.put((rank, summary["complete"]))


def spawn(folder, out, world_size, mode="all", delay=0.0):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(target=_worker, args=(folder, out, rank, world_size, mode, delay, answers))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes, answers


@pytest.mark.parametrize("mode", MODES)
def test_three_workers_at_once(text, tmp_path, mode):  # noqa: F811
    make(text, tmp_path / "one", mode=mode)
    processes, answers = spawn(text, tmp_path / "out", 3, mode, 0.01)
    assert sorted(answers.get(timeout=60) for _ in processes) == [(0, True), (1, True), (2, True)]
    for process in processes:
        process.join(30)
    assert_same(tmp_path / "out", tables(tmp_path / "one"))


def test_what_a_dead_worker_left_is_done_by_the_others(text, tmp_path):  # noqa: F811
    """The survivors end the collection without it, and the worker that comes back has nothing to do."""
    make(text, tmp_path / "one")
    processes, answers = spawn(text, tmp_path / "out", 2, delay=0.05)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "out").glob("units/*/done/part-*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    processes[0].kill()
    processes[0].join(30)
    assert processes[0].exitcode == -signal.SIGKILL
    assert answers.get(timeout=60) == (1, True)
    processes[1].join(30)
    assert_same(tmp_path / "out", tables(tmp_path / "one"))
    source = FakeSource()
    assert make(text, tmp_path / "out", source, rank=0, world_size=2)["complete"] and source.calls == 0


@pytest.mark.parametrize("mode, every", [("all", 29), ("top", 61)])
def test_death_at_any_file_call_changes_nothing(text, tmp_path, driver, mode, every):  # noqa: F811
    settings = {**SETTINGS, "mode": mode}
    whole = driver.run(text, tmp_path / "whole", -1, **settings)
    assert whole["status"] == 0 and whole["calls"] > 150
    expected = tables(tmp_path / "whole")
    for crash in range(1, whole["calls"] + 1, every):
        out = tmp_path / f"crash-{crash}"
        assert driver.run(text, out, crash, **settings)["status"] == 57, crash
        assert driver.run(text, out, -1, **settings)["status"] == 0, crash
        assert_same(out, expected)


def test_many_deaths_of_two_workers(text, tmp_path, driver):  # noqa: F811
    driver.run(text, tmp_path / "whole", -1, **SETTINGS)
    rng, deaths = random.Random(5), 0
    while driver.run(text, tmp_path / "out", rng.randint(20, 90), **SETTINGS, rank=rng.randrange(2), world_size=2)[
        "status"
    ]:
        deaths += 1
        assert deaths < 100
    assert deaths > 2
    assert_same(tmp_path / "out", tables(tmp_path / "whole"))


def test_two_workers_on_one_unit(text, tmp_path, monkeypatch):  # noqa: F811
    """On machines that do not see one another's locks: the first one's counts, wholly, and the other's is removed."""

    class Other(FakeSource):
        def __init__(self):
            super().__init__()
            self.fingerprint["model"] = FakeSource().fingerprint["model"]

        def firings(self, tokens, mask):
            if not self.calls:  # while this one is at its first unit, another machine does them all
                self.calls = 1
                with monkeypatch.context() as patch:
                    patch.setattr(units, "machine", lambda: "00000000")
                    patch.setattr(files, "_lock", lambda *args, **more: True)
                    make(text, tmp_path / "out", rank=1, world_size=2)
            return super().firings(tokens, mask)

    make(text, tmp_path / "one")
    assert make(text, tmp_path / "out", Other(), rank=0, world_size=2)["complete"]
    folders = [path.name for path in (tmp_path / "out" / "units").iterdir()]
    assert len(folders) == 4 and all(name.endswith("-00000000") for name in folders)
    assert_same(tmp_path / "out", tables(tmp_path / "one"))


def test_a_late_second_is_the_loser(text, tmp_path, monkeypatch):  # noqa: F811
    """Both ended the unit, and their firings differ in a bit, as two kinds of machine may: no mixture stands."""
    corpus = Corpus.from_path(text)
    out = tmp_path / "out"
    make(text, tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr(distribute, "work", lambda worker, found, stop: bool(worker.do(found[0], stop)) and False)
        make(text, out)
        marker = (out / "done" / "unit-000000.json").read_bytes()
        patch.setattr(units, "machine", lambda: "00000000")
        patch.setattr(units.Worker, "done", lambda self, unit: False)
        make(text, out)
    assert (out / "done" / "unit-000000.json").read_bytes() == marker
    assert not list((out / "units").glob("*-00000000"))
    collect(corpus, words, FakeSource(), out, **SETTINGS)
    assert_same(out, tables(tmp_path / "one"))


def test_an_interrupted_worker_says_how_far_it_came(text, tmp_path):  # noqa: F811
    class Interrupting(FakeSource):
        def firings(self, tokens, mask):
            if self.calls == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return super().firings(tokens, mask)

    assert threading.current_thread() is threading.main_thread()
    summary = make(text, tmp_path / "out", Interrupting(), rank=0, world_size=2)
    assert not summary["complete"] and summary["units"] == 4 and 0 < summary["units_done"] < 4
    store = Store(tmp_path / "out")
    assert not store.complete and store.summary()["tokens"] == summary["tokens"]
    one = make(text, tmp_path / "one") and Store(tmp_path / "one")
    for document in store.documents["document"].to_pylist():
        assert store.tokens(document).tolist() == one.tokens(document).tolist()
    assert everything(store) < everything(one)
    found = verify(tmp_path / "out")
    assert found.sound and not found.complete
    assert make(text, tmp_path / "out", rank=1, world_size=2)["complete"]
    assert_same(tmp_path / "out", tables(tmp_path / "one"))


def test_what_another_worker_is_writing_is_left_alone(text, tmp_path):  # noqa: F811
    settings = {**run.DEFAULTS, **SETTINGS}
    with run.opened(Corpus.from_path(text), Tokenizer(), FakeSource(), tmp_path / "out", settings, True) as job:
        run.keep_tokenizer(job)
        temporary = tmp_path / "out" / "tokenizer" / "vocabulary.txt.123.tmp"
        temporary.touch()
        (tmp_path / "out" / "tokenizer" / "stray").touch()
        (tmp_path / "out" / "done" / "tokenizer.json").unlink()
        run.keep_tokenizer(job)
    assert sorted(path.name for path in temporary.parent.iterdir()) == ["vocabulary.txt", temporary.name]


@pytest.mark.parametrize("mode", ["all", "top"])
def test_damage_is_named_and_made_again(text, tmp_path, mode):  # noqa: F811
    """Any file of a finished collection; where firings stand in mode all, the index is made again without the model."""
    out = tmp_path / "out"
    make(text, out, mode=mode)
    expected = tables(out)
    names = [p for p in sorted(out.rglob("*")) if p.is_file() and p.stat().st_size and p.name != ".lock"]
    for path in names if mode == "all" else names[::4]:
        data = path.read_bytes()
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
        name = path.relative_to(out).as_posix()
        found = verify(out)
        assert name in found.damaged, name
        source = FakeSource()
        make(text, out, source, mode=mode)
        assert_same(out, expected)
        if mode == "all" and not name.startswith(("units/", "done/unit-")):
            assert source.calls == 0, name
        if not path.exists():  # a unit made again bears the same name
            raise AssertionError(name)
    gone = next((out / "units").glob("000000-*/tokens/part-000000.parquet"))
    gone.unlink()
    assert verify(out).missing == [gone.relative_to(out).as_posix()]
    with pytest.raises(ValueError, match="missing"):
        Store(out).tokens(0)


def test_one_process_and_several_do_not_mix(text, tmp_path):  # noqa: F811
    make(text, tmp_path / "one", unit=None)
    with pytest.raises(ValueError, match="holds a collection of one process"):
        make(text, tmp_path / "one", unit=None, rank=0, world_size=2)
    with pytest.raises(ValueError, match="unit is None there, 100 here"):
        make(text, tmp_path / "one")
    make(text, tmp_path / "units")
    assert make(text, tmp_path / "units", unit=None)["units"] == 4  # one process goes on with what several began
    with pytest.raises(ValueError, match="unit is 100 there, 99 here"):
        make(text, tmp_path / "units", unit=99)
    for rank, size in ((2, 2), (-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="rank: expected 0 <= rank < world_size"):
            make(text, tmp_path / "other", rank=rank, world_size=size)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "more, named",
    [
        (["--rank", "1"], "expected both or neither, got 1 and None"),
        (
            ["--distributed", "--rank", "1", "--world-size", "2"],
            "distributed: expected it, or --rank and --world-size, got both",
        ),
        (["--unit", "much"], "--unit"),
    ],
)
def test_refusals_of_the_command(tmp_path, capsys, more, named):
    try:
        status = main(["collect", "stdlib:test", "--out", str(tmp_path / "out"), *more])
    except SystemExit as error:
        status = error.code
    assert status == 2 and named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_line_counts_all_workers(text, tmp_path):  # noqa: F811
    """Finished units by their marker, others by the shards that stand."""
    out = tmp_path / "out"
    make(text, out)
    content = json.loads((out / "manifest.json").read_text())
    assert content["unit"] == 100
    from writesae.files import sha256

    digest = sha256(out / "manifest.json")
    assert distribute.Overview(out, digest).look() == (1267, 4, 0)
    (out / "done" / "unit-000001.json").unlink()
    assert distribute.Overview(out, digest).look()[1:] == (3, 1)


def test_what_an_engine_says_stays_out_of_the_answer(tmp_path, monkeypatch, capsys):
    """Ray tells of nodes that died on the standard output, where the summary is."""
    from writesae.collect import on_ray

    def noisy(*arguments, **options):
        print("(raylet) a node died")
        return {"complete": True, "units": 1}

    monkeypatch.setattr(on_ray, "collect_on_ray", noisy)
    assert main(["collect", "stdlib:test", "--out", str(tmp_path / "out"), "--engine", "ray"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["units"] == 1 and "raylet" in said.err


def test_a_launcher_starts_two(tmp_path, monkeypatch, capsys):
    """As srun starts the line of docs/collecting.md: one is this process, the other the command."""
    out = tmp_path / "out"
    line = ["collect", "stdlib:test", "--max-tokens", "3000", "--unit", "3kB", "--context", "128", "--distributed",
            "--yes", "--out", str(out)]  # fmt: skip
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    other = subprocess.Popen([sys.executable, "-m", "writesae.cli", *line], stdout=subprocess.PIPE, text=True)
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert main(line) == 0
    here, there = json.loads(capsys.readouterr().out), json.loads(other.communicate(timeout=300)[0])
    assert other.returncode == 0 and here["complete"] and here["units"] == there["units"] == 2
    assert here["tokens"] == there["tokens"] == Store(out).summary()["tokens"] == 3000
    assert verify(out).sound


def test_a_process_takes_its_own_gpu(monkeypatch):
    taken: list[int] = []
    for name in ranks.LOCAL:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert ranks.take_gpu() is None
    monkeypatch.setenv("RANK", "14")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "6")
    args = argparse.Namespace(distributed=True, rank=None, world_size=None, device="cuda")
    assert ranks.place(args) == (14, 16) and taken == [2]
    args.device = "cpu"
    assert ranks.place(args) == (14, 16) and taken == [2]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert ranks.take_gpu() is None


# ---- a document cut into units ---------------------------------------------------------------------------------------


@pytest.fixture
def long(tmp_path, monkeypatch):
    """Documents of which two are cut: blocks of 64 bytes stand for those of 256 KiB."""
    monkeypatch.setattr(text_passages, "BLOCK", 64)
    folder = tmp_path / "text"
    folder.mkdir()
    rng = random.Random(2)
    for i, size in enumerate((40, 1500, 90, 30, 900, 10)):
        (folder / f"{i}.txt").write_text("".join(rng.choice("abcdefg hij\n") for _ in range(size)))
    return folder


@pytest.mark.parametrize("limit", [None, 700, 1540])
def test_a_long_document_is_cut_between_passages(long, tmp_path, limit):
    """What is left is what one process leaves: rows, first passages, digests of documents."""
    make(long, tmp_path / "one", max_tokens=limit, unit=None)
    summary = make(long, tmp_path / "units", max_tokens=limit)
    assert summary["units"] > (15 if limit is None else 4)
    one, several = Store(tmp_path / "one"), Store(tmp_path / "units")
    assert everything(one) == everything(several) and one.documents.equals(several.documents)
    assert summary["tokens"] == one.summary()["tokens"]
    for document in one.documents["document"].to_pylist():
        assert one.tokens(document).tolist() == several.tokens(document).tolist()
        last = len(one.tokens(document)) - 1
        assert one.at(document, last).equals(several.at(document, last))
    assert_same(tmp_path / "units", tables(tmp_path / "units"))


def test_workers_share_one_document(long, tmp_path):
    for path in sorted(long.iterdir()):
        if path.name != "1.txt":
            path.unlink()
    make(long, tmp_path / "one")
    processes, answers = spawn(long, tmp_path / "out", 3, delay=0.01)
    assert sorted(answers.get(timeout=60) for _ in processes) == [(0, True), (1, True), (2, True)]
    for process in processes:
        process.join(30)
    assert_same(tmp_path / "out", tables(tmp_path / "one"))
    assert Store(tmp_path / "out").summary()["units"] > 8


def test_a_document_of_which_a_part_is_missing_is_not_shown(long, tmp_path):
    out = tmp_path / "out"
    make(long, out)
    whole = Store(out).documents.to_pylist()
    made = plan.read(out, Store(out)._manifest_digest)
    middle = next(u.number for u in made if u.start.row and u.goes_on and u.start.document == 1)
    (out / "done" / f"unit-{middle:06d}.json").unlink()
    (out / "summary.json").unlink()
    store = Store(out)
    assert [d["document"] for d in store.documents.to_pylist()] == [0, 2, 3, 4, 5]
    for document in (0, 2, 3, 5):
        assert len(store.tokens(document)) == whole[document]["tokens"]


def test_packed_documents_are_whole(tmp_path, monkeypatch):
    import gzip

    monkeypatch.setattr(text_passages, "BLOCK", 64)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt.gz").write_bytes(gzip.compress(random.Random(1).randbytes(2000).hex().encode()))
    assert make(tmp_path / "text", tmp_path / "out")["units"] == 1


def test_a_plan_of_another_release_is_not_mixed_with_this_one(long, tmp_path):
    """A damaged plan is made again; units done by one that cut elsewhere are done again, whoever is asked."""
    out = tmp_path / "out"
    make(long, tmp_path / "one")
    with pytest.MonkeyPatch.context() as patch:
        cut = plan.cut
        patch.setattr(plan, "cut", lambda corpus, size, manifest, read, limit: cut(corpus, size, manifest))
        patch.setattr(distribute, "end", lambda worker, began: {})
        make(long, out)
    before = len(list((out / "done").glob("unit-*.json")))
    (out / "plan.json").write_text("{}")
    source = FakeSource()
    assert make(long, out, source, rank=1, world_size=2)["units"] > before
    assert source.calls > 0
    assert_same(out, tables(tmp_path / "one"))


def test_more_workers_than_units(text, tmp_path, capsys):  # noqa: F811
    make(text, tmp_path / "out", rank=0, world_size=7, progress=True)
    said = capsys.readouterr().err
    assert "3 of 7 workers will find nothing to do: the corpus is 4 units" in said
    make(text, tmp_path / "few", rank=0, world_size=4, progress=True)
    assert "nothing to do" not in capsys.readouterr().err


# ---- the corpus's digests --------------------------------------------------------------------------------------------


def test_workers_digest_a_corpus_once(text, tmp_path, monkeypatch):  # noqa: F811
    """By size and times, whatever machine they are on; a file that shows other times is read again."""
    from writesae import files as whole_files
    from writesae.collect import shared_digests

    monkeypatch.setattr(whole_files, "_RACY_SECONDS", -60.0)
    monkeypatch.setattr(shared_digests, "_GROUP", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read: list[str] = []
    digest = whole_files.sha256
    monkeypatch.setattr(whole_files, "sha256", lambda path, *rest: read.append(path.name) or digest(path, *rest))
    named = [(path, path.name) for path in sorted(text.iterdir())]
    expected = {name: digest(path) for path, name in named}
    told: list[int] = []
    assert shared_digests.shared_digests(tmp_path / "out", named, told.append) == expected
    assert sorted(read) == [name for _, name in named] and sum(told) == sum(p.stat().st_size for p, _ in named)
    assert len(list((tmp_path / "out" / ".corpus").glob("*.json"))) > 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of another machine"))
    read.clear()
    assert shared_digests.shared_digests(tmp_path / "out", named, told.append) == expected and not read
    (text / "1.txt").write_text("a" * 31)
    expected["1.txt"] = digest(text / "1.txt")
    assert shared_digests.shared_digests(tmp_path / "out", named, told.append) == expected and read == ["1.txt"]
    (tmp_path / "out" / ".corpus" / "000000.json").write_text("{}")
    assert shared_digests.shared_digests(tmp_path / "out", named, told.append) == expected


def test_a_collection_that_died_at_its_digests_goes_on(text, tmp_path):  # noqa: F811
    (tmp_path / "out" / ".corpus").mkdir(parents=True)
    (tmp_path / "out" / ".corpus" / "000000.lock").touch()
    assert make(text, tmp_path / "out")["complete"]
    with pytest.raises(ValueError, match="seed is 0 there, 1 here"):
        make(text, tmp_path / "out", seed=1)
    assert not (tmp_path / "out" / ".corpus").exists() and not (tmp_path / "out" / ".plan").exists()
    assert verify(tmp_path / "out").sound
