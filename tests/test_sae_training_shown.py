"""What a training run shows: its picture, and its logs through accelerate's trackers."""

# ruff: noqa: F811 (fixtures of the other file)

from __future__ import annotations

import json
import os
import sys
from xml.etree import ElementTree

import pytest
from test_sae_training import SMALL, command, corpus, model, model_folder  # noqa: F401

from writesae.sae import plot, trackers
from writesae.sae.watch import LOOKS

pytestmark = pytest.mark.usefixtures("one_thread")


def history(names, steps=(500, 1000, 1500)):
    """As a `Trainer` keeps it: the curves of the sites differ, and move."""
    levels = dict(zip(LOOKS, (1, 32, 9, 0.5), strict=True))
    looks = [
        {"step": n, **{what: {name: x + i / n for i, name in enumerate(names)} for what, x in levels.items()}}
        for n in steps
    ]
    return [{"step": 0, "layer": 1, "head": 2, "loss": 1.0, "aux": 0.0, "dead": 3, "rate": 1e-3}, *looks]


def shapes(path, tag):
    return ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}" + tag)


# ---- the picture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, curves",
    [
        (["L1H2"], ["c0"]),
        (["L1H2", "L3H0"], ["c0 one", "c0 one", "c0"]),
        (["k1/L1H2", "k8/L1H2"], ["c0", "c1"]),
        ([f"L{i}H0" for i in range(30)], ["c0"]),
    ],
)
def test_a_panel_a_look_and_a_curve_a_site(names, curves, tmp_path):
    assert plot.draw(tmp_path / "a.svg", history(names))
    lines = list(shapes(tmp_path / "a.svg", "polyline"))
    assert [x.get("class") for x in lines] == curves * len(LOOKS)
    said = [x.text for x in shapes(tmp_path / "a.svg", "text")]
    assert all(title in said for title in LOOKS.values()) and ("k8" in said) == ("k8/L1H2" in names)
    first = [tuple(map(float, point.split(","))) for point in lines[0].get("points").split()]
    assert [x for x, _ in first] == sorted(x for x, _ in first) and len(first) == 3
    assert "prefers-color-scheme:dark" in (tmp_path / "a.svg").read_text()


def test_pictures_of_odd_histories(tmp_path):
    assert not plot.draw(tmp_path / "a.svg", history([], ()))
    assert not (tmp_path / "a.svg").exists()
    assert plot.draw(tmp_path / "a.svg", history(["L1H2"], (7,)))
    assert len(list(shapes(tmp_path / "a.svg", "circle"))) == len(LOOKS)
    diverged = history(["L1H2", "L<1>"])
    diverged[1]["held_out_fvu"]["L1H2"] = float("nan")
    assert plot.draw(tmp_path / "a.svg", diverged)
    assert "nan" not in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("low, high", [(0, 1), (0.31, 0.3107), (-3, 5e5), (7, 7), (0, 0), (1e-9, 2e-9)])
def test_ticks_enclose(low, high):
    ticks = plot._ticks(low, high)
    assert 2 <= len(ticks) <= 7 and ticks[0] <= low <= high <= ticks[-1] and ticks == sorted(set(ticks))


# ---- trackers -------------------------------------------------------------------------------------------------------


def test_records_are_named_by_site():
    record = {"step": 50, "layer": 2, "head": 3, "loss": 0.5, "aux": 0.0, "dead": 1, "rate": 1e-3}
    assert trackers.named(record) == (
        {"L2H3/loss": 0.5, "L2H3/aux": 0.0, "L2H3/dead": 1, "L2H3/rate": 1e-3}, 50
    )  # fmt: skip
    assert "k8/L2H3/loss" in trackers.named({**record, "variant": "k8"})[0]
    look = {"step": 9, "held_out_fvu": {"L2H3": 0.3}, "dead": {"L2H3": 4}}
    assert trackers.named(look) == ({"L2H3/held_out_fvu": 0.3, "L2H3/dead": 4}, 9)


@pytest.fixture
def fake(monkeypatch):
    """What a tracker in tensorboard's place is given: a list of calls."""
    tracking = pytest.importorskip("accelerate.tracking")
    calls = []

    class Fake(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", True, None

        def __init__(self, run_name, logging_dir, **more):
            super().__init__()
            calls.append(("init", run_name, str(logging_dir), os.environ.get("WORLD_SIZE")))

        def store_init_configuration(self, values):
            calls.append(("config", values))

        def log(self, values, step=None, **more):
            calls.append(("log", values, step))

        def finish(self):
            calls.append(("finish",))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    return calls


def test_command_logs(fake, model_folder, corpus, tmp_path, monkeypatch, capsys):
    """Every record, under a launcher's environment too, in which no process waits for another."""
    import writesae.cli  # noqa: F401

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    base = ["--model", model_folder, "--corpus", corpus, *SMALL, "--site", "0:1", "--site", "1:2", "--steps", 6,
            "--evaluate-every", 3]  # fmt: skip
    out = tmp_path / "out"
    assert command(*base, "--distributed", "--track", "tensorboard", "--out", out) == 0
    assert os.environ["WORLD_SIZE"] == "2" and fake[0][:3] == ("init", "writesae", str(out / "rank-1-of-2" / "logs"))
    assert fake[1][1]["k"] == 2 and fake[1][1]["sites"] == "0:1 1:2" and fake[-1] == ("finish",)
    history = json.loads((out / "rank-1-of-2" / "training.json").read_text())
    assert [x[1:] for x in fake[2:-1]] == [trackers.named(record) for record in history]
    assert (out / "rank-1-of-2" / "training.svg").is_file() and not (out / "training.svg").exists()
    assert command(*base, "--rank", 0, "--world-size", 2, "--out", out) == 0
    assert (out / "training.svg").is_file()
    for names, message in (
        ("wandb", "track: wandb is not installed: pip install wandb"),
        ("tensorboard,paper", ", got 'paper'"),
    ):
        assert command(*base, "--track", names, "--out", tmp_path / "other") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_without_accelerate(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "accelerate.tracking", None)
    with pytest.raises(ValueError, match=r"track: .*: pip install writesae\[trackers\]"):
        trackers.Trackers(["tensorboard"], "run", tmp_path, {})
