"""`writesae bench`: what it keeps, what it refuses, how it goes on, and what it makes of its records."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from writesae.bench import MODULES, command, show
from writesae.bench.case import Case, Disagree, Options, Row, agree, load_cases
from writesae.bench.record import read_records, record
from writesae.bench.timing import flat_rows, floor_row, median_and_spread, ratio_row

TESTS = Path(__file__).parent
FIELDS = {"name": str, "peer": str, "value": float, "unit": str, "target": float, "met": bool, "spread": float}
ROOFLINE = {"rate": float, "rate_unit": str, "ceiling_of": str, "ceiling": float, "share": float}


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in paths if p))
    monkeypatch.syspath_prepend(str(TESTS))


def bench(out: Path, *options: str) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args([*options, "--out", str(out)]), modules=("fake_bench",))


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def test_a_case_is_measured_and_recorded(tmp_path, capsys):
    assert bench(tmp_path, "product", "--repeats", "5") == 0
    found = json.loads((tmp_path / "product.json").read_text())
    assert found["status"] == "measured" and found["case"] == "product" and found["options"]["repeats"] == 5
    assert {"processor", "cores", "torch_threads"} <= found["machine"].keys()
    assert found["versions"]["torch"] and found["date"] and not found["quick"]
    assert found["ceilings"]["float32"]["value"] > 0 and found["ceilings"]["float32"]["unit"] == "GFLOP/s"
    product, optimist = found["rows"]
    for row in found["rows"]:
        for name, kind in FIELDS.items():
            assert name in row and (row[name] is None or isinstance(row[name], (kind, int))), name
    for name, kind in ROOFLINE.items():
        assert isinstance(product[name], kind), name
    assert product["share"] == pytest.approx(product["rate"] / found["ceilings"]["float32"]["value"])
    assert product["rate"] == pytest.approx(2 * 64**3 / product["seconds"] / 1e9)
    assert product["met"] is True and optimist["met"] is False  # a missed target is a result: the status is 0
    assert not (tmp_path / "unfinished.json").exists()
    printed = capsys.readouterr().out
    assert "MISSED" in printed and "| missed" in printed and "fp32 products" in printed


def test_disagreement_failure_and_missing_peers_have_no_number(tmp_path, capsys):
    assert bench(tmp_path, "wrong", "lonely", "broken", "killed", "product") == 1
    before, wrong = rows_of(tmp_path / "wrong.json")
    assert before["value"] == 1.0 and before["met"] is True  # measured before the disagreement
    assert wrong["value"] is None and wrong["met"] is None and "results differ by" in wrong["note"]
    (lonely,) = rows_of(tmp_path / "lonely.json")
    assert lonely["value"] is None and lonely["note"] == "not measured: fast-peer is not installed"
    (broken,) = rows_of(tmp_path / "broken.json")
    assert broken["note"] == "failed: RuntimeError: it broke"
    (killed,) = rows_of(tmp_path / "killed.json")
    assert killed["note"] == "failed: its process ended by signal 9"
    assert rows_of(tmp_path / "product.json")[0]["value"] is not None  # the rest still ran
    printed = capsys.readouterr()
    assert "3 cases failed or disagreed" in printed.err
    table = printed.out[printed.out.index("| figure") :]
    assert "no ratio: wrong: results differ by" in table and "fast-peer is not installed" in table


def test_a_missing_peer_alone_is_no_failure(tmp_path):
    assert bench(tmp_path, "lonely") == 0


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupted_run_goes_on(tmp_path, times):
    """Ctrl-C in the second case: once, it is still measured; twice, it is not. The same command measures the rest."""
    flag = tmp_path / "interrupt"
    flag.write_text(str(times))
    out = tmp_path / "out"
    code = (
        "import signal, sys, argparse; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from writesae.bench import command; p = argparse.ArgumentParser(); command.configure(p)\n"
        "sys.exit(command.run(p.parse_args(sys.argv[1:]), modules=('fake_bench',)))"
    )

    def run(*options):
        return subprocess.run(
            [sys.executable, "-c", code, "product", "interrupted", "later", "--out", str(out), *options],
            capture_output=True, text=True, env={**os.environ, "FAKE_BENCH_INTERRUPT": str(flag)}, timeout=120,
        )  # fmt: skip

    first = run()
    assert first.returncode in (130, -signal.SIGINT) and "KeyboardInterrupt" in first.stderr
    assert "stopping after this case; once more to stop at once" in first.stderr
    assert (out / "unfinished.json").exists() and not (out / "later.json").exists()
    assert (out / "interrupted.json").exists() == (times == 1)
    kept = (out / "product.json").read_bytes()
    second = run()
    assert second.returncode == 0, second.stderr
    assert "product: kept" in second.stdout and ("interrupted: kept" in second.stdout) == (times == 1)
    assert "after the interruption" in second.stdout
    assert (out / "product.json").read_bytes() == kept and not (out / "unfinished.json").exists()
    if times == 2:
        return
    third = run()  # a finished run is not gone on with
    assert third.returncode == 0 and "kept" not in third.stdout
    assert (out / "product.json").read_bytes() != kept


@pytest.mark.parametrize("change", ["options", "fresh", "code"])
def test_an_interrupted_run_of_something_else_is_not_kept(tmp_path, capsys, monkeypatch, change):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("writesae.bench.run._measure", stop)
        bench(tmp_path, "later")
    state = json.loads((tmp_path / "unfinished.json").read_text())
    if change == "code":
        monkeypatch.setattr("writesae.bench.record.source_digest", lambda: "other")
    assert bench(tmp_path, "later", *{"options": ["--repeats", "2"], "fresh": ["--fresh"], "code": []}[change]) == 0
    assert json.loads((tmp_path / "later.json").read_text())["run"] != state["run"]
    assert "going on" not in capsys.readouterr().out


def test_quick_records_have_no_targets_and_stay_out_of_a_readme(tmp_path):
    assert bench(tmp_path, "product", "--quick") == 0
    assert all(row["target"] is None and row["met"] is None for row in rows_of(tmp_path / "product.json"))
    page = tmp_path / "README.md"
    page.write_text(f"{show.START}\n{show.END}\n")
    with pytest.raises(ValueError, match="quick ones of product"):
        bench(tmp_path, "--show", "--readme", str(page))


def test_readme_and_picture_from_records_alone(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "bench" / "results"
    assert bench(out, "product", "lonely") == 0
    (out / "foreign.json").write_text('{"rows": [{"name": "not ours"}]}')
    page = tmp_path / "README.md"
    page.write_text(f"above\n{show.START}\nold\n{show.END}\nbelow\n")
    assert bench(out, "--show", "--readme", str(page)) == 0
    once = page.read_text()
    assert once.startswith("above\n") and once.endswith("\nbelow\n") and "old" not in once and "not ours" not in once
    assert "| a product" in once and "a peer \\| with a bar" in once and "fast-peer is not installed" in once
    assert "(bench/results/bench.png)" in once and (out / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert bench(out, "--show", "--readme", str(page)) == 0
    assert page.read_text() == once


@pytest.mark.parametrize("text", ["nothing", show.START, show.END + show.START, (show.START + show.END) * 2])
def test_readme_without_its_markers_is_left_alone(tmp_path, text):
    page = tmp_path / "README.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="expected <!-- bench: start -->"):
        show.readme(page, [record([Row("a", "b", 1.0, "x faster")], case="a")], None)
    assert page.read_text() == text


def test_a_readme_shows_what_was_asked_for_outrun_or_lacking():
    shown = [Row("asked", "p", 2.0, "x time", 3), Row("outrun", "p", 2.0, "x faster"), Row("lacking", "p", None, "")]
    found = [record([*shown, Row("aside", "the same without", 1.1, "x time")], case="a")]
    for all_rows in (False, True):
        text = show.report(found, all_rows)
        assert [name in text for name in ("asked", "outrun", "lacking", "aside")] == [True] * 3 + [all_rows]


def test_figures_of_two_machines_share_no_table():
    here, there = (record([Row(name, "peer", 2.0, "x faster", 1)], case=name) for name in ("here", "there"))
    there["machine"] = {**there["machine"], "device": "A card"}
    text = show.report([here, there])
    assert text.count("| figure") == 2 and "A card" in text.split("| figure")[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nonsense"], "NAME: expected cases of product, .*, got 'nonsense'"),
        (["--repeats", "0"], "repeats: expected at least 1, got 0"),
        (["product", "--threads", "-1"], "threads: expected at least 1, got -1"),
        (["--show"], "out: expected results of `writesae bench`"),
    ],
)
def test_bad_usage(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        bench(tmp_path, *options)
    assert not list(tmp_path.iterdir())


def test_list(tmp_path, capsys):
    assert bench(tmp_path / "none", "--list") == 0
    assert "the wrong case" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_every_case_of_the_package_is_listed_once():
    cases = load_cases(MODULES)
    assert {"scan", "scan-few-heads", "scan-length", "encode", "encode-states", "encode-memory", "encode-length",
            "model-float32", "model-bfloat16", "collect", "replace", "training", "kda", "encode-ssd",
            "ssd", "dplr"} <= {c.name for c in cases}  # fmt: skip
    assert all(case.title and case.module in MODULES for case in cases)


@pytest.mark.parametrize("name", ["scan", "encode", "encode-memory", "encode-ssd", "kda", "dplr"])
def test_a_real_case_quickly(tmp_path, name):
    parser = argparse.ArgumentParser()
    command.configure(parser)
    assert command.run(parser.parse_args([name, "--quick", "--out", str(tmp_path)])) == 0
    (found,) = read_records(tmp_path)
    assert found["status"] == "measured" and all(row["value"] is not None for row in found["rows"])


def test_verdicts_follow_the_unit():
    assert Row("a", "b", 1.5, "x time", 1.6).met is True and Row("a", "b", 1.7, "x time", 1.6).met is False
    assert Row("a", "b", 3.0, "x faster", 3).met is True and Row("a", "b", 2.9, "x faster", 3).met is False
    assert Row("a", "b", 65.0, "MB", 64).met is False and Row("a", "b", None, "", 3).met is None
    assert Row("a", "b", 99.0, "%", 99.9).met is False


def test_ratios_are_medians_of_pairs():
    """A slow moment that falls on both sides of a round leaves its ratio alone."""
    row = ratio_row("a", "b", "x faster", [1.0, 10.0, 1.0, 1.0, 1.0], [4.0, 40.0, 4.0, 4.0, 4.0], target=3)
    assert row.value == 4.0 and row.spread == 0.0 and row.met is True and row.seconds == 1.0
    assert ratio_row("a", "b", "x time", [1.0], [4.0]).value == 0.25
    with pytest.raises(ValueError, match="unit: expected"):
        ratio_row("a", "b", "faster", [1.0], [1.0])
    assert median_and_spread([1.0, 2.0, 4.0]) == (2.0, 1.5)


def test_flat_rows_see_growth(monkeypatch):
    """On a clock of our own: work that takes as long as it says, and every run over as many tokens."""
    now, calls = [0.0], [0, 0, 0]
    monkeypatch.setattr("writesae.bench.timing.time.perf_counter", lambda: now[0])

    def work(number, seconds):
        def run():
            now[0] += seconds
            calls[number] += 1

        return run

    flat, grown = flat_rows("a", (1, 2, 4), [work(0, 1.0), work(1, 2.0), work(2, 6.0)], 3)
    assert (flat.value, flat.met, grown.value, grown.met) == (1.0, True, 1.5, False)
    assert calls == [16, 8, 4]  # a round to warm up and three


def test_a_floor_is_of_a_product_in_the_same_rounds(monkeypatch):
    """On a clock of processor time that the products move too: a slow moment on both leaves the ratio alone."""
    now, pace, mm, size = [0.0], iter((1.0, 9.0, 1.0, 2.0)), torch.mm, 8
    monkeypatch.setattr("writesae.bench.timing.time.process_time", lambda: now[0])
    monkeypatch.setattr("writesae.bench.timing.torch.get_num_threads", lambda: 2)
    slow = [1.0]

    def run():
        slow[0] = next(pace)
        now[0] += 6 * slow[0]

    def product(*args, **kwargs):
        now[0] += 2 * slow[0]
        return mm(*args, **kwargs)

    monkeypatch.setattr("writesae.bench.timing.torch.mm", product)
    row = floor_row("a", run, work=4 * size**3, repeats=3, size=size)
    assert row.value == 1.5 and row.spread == 0.0 and row.target == 1.25 and row.met is False
    assert row.product_rate == 2 * size**3 / 2 / 1e9  # 2 processor seconds on two threads, in the median round
    assert row.seconds == 6.0 and "at the product's" in row.note


@pytest.mark.parametrize("bad", [float("nan"), 2.0])
def test_agree(bad):
    with pytest.raises(Disagree, match="results differ"):
        agree("a", torch.tensor([1.0, bad]), torch.tensor([1.0, 1.0]), 1e-3)
    agree("a", torch.ones(2), torch.ones(2), 0.0)


def test_two_cases_of_one_name(monkeypatch):
    import fake_bench

    monkeypatch.setattr(fake_bench, "CASES", [Case("a", "a", lambda options: [])] * 2)
    with pytest.raises(ValueError, match="case 'a': expected one of this name"):
        load_cases(["fake_bench"])


def test_rounds():
    assert (Options().rounds(), Options(quick=True).rounds(5), Options(repeats=7).rounds(5)) == (9, 3, 7)


def test_gpu_cases_are_listed(capsys):
    parser = argparse.ArgumentParser()
    command.configure(parser)
    assert command.run(parser.parse_args(["--gpu", "--list"])) == 0
    assert "gpu-scan" in capsys.readouterr().out
    with pytest.raises(ValueError, match="dry: expected together with --gpu"):
        command.run(parser.parse_args(["--dry", "twin.so"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_no_figure_is_claimed(tmp_path):
    parser = argparse.ArgumentParser()
    command.configure(parser)
    assert command.run(parser.parse_args(["--gpu", "gpu-scan", "--out", str(tmp_path)])) == 0
    (row,) = rows_of(tmp_path / "gpu-scan.json")
    assert row["value"] is None and row["note"].startswith("not measured: the CUDA kernels: ")
