"""Units on a Ray cluster of several nodes on this machine, of which some are killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from damage import tables
from fake_source import FakeSource, words
from test_units import SETTINGS, assert_same, make

from writesae.collect import Corpus, collect_on_ray
from writesae.collect import on_ray as module

UNITS = {**SETTINGS, "unit": 30}


def prepare(folder, delay, device):
    return Corpus.from_path(folder), words, FakeSource(delay=delay)


def refusing(folder, device):
    if os.environ.get("THE_DRIVER") != str(os.getpid()):
        raise ValueError("source: expected a worker that can, got this one")
    return prepare(folder, 0, device)


@pytest.fixture(scope="module")
def cluster():
    """A head that does nothing and three nodes of one CPU."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, str(Path(here).parent), os.environ.get("PYTHONPATH", "")])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    small = {"include_dashboard": False, "object_store_memory": 10**8}  # nothing large goes through it
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    for _ in range(3):
        cluster.add_node(num_cpus=1, object_store_memory=10**8)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(24):
        (folder / f"{i:02d}.txt").write_text("".join(chr(97 + (j * j + i) % 26) for j in range(20 + i)))
    return folder


def test_a_lost_node_loses_nothing(cluster, text, tmp_path):
    one = make(text, tmp_path / "one", **UNITS)
    nodes = list(cluster.worker_nodes)

    def lose() -> None:
        while not list((tmp_path / "out").glob("done/unit-*.json")):
            time.sleep(0.02)
        cluster.remove_node(nodes[0], allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    summary = collect_on_ray(partial(prepare, str(text), 0.2), tmp_path / "out", **UNITS)
    thread.join()
    assert summary["complete"] and summary["units"] == one["units"] > 15
    assert_same(tmp_path / "out", tables(tmp_path / "one"))
    # Done: nothing runs, and one process sees a collection that is finished.
    assert collect_on_ray(partial(prepare, str(text), 0.0), tmp_path / "out", **UNITS) == summary
    source = FakeSource()
    assert make(text, tmp_path / "out", source, **UNITS)["complete"] and source.calls == 0


def test_a_lost_driver_loses_nothing(cluster, text, tmp_path):
    make(text, tmp_path / "one", **UNITS)
    script = (
        "from functools import partial\nimport ray, test_ray\nfrom writesae.collect import collect_on_ray\n"
        f"ray.init({cluster.address!r}, log_to_driver=False, logging_level='error')\n"
        f"collect_on_ray(partial(test_ray.prepare, {str(text)!r}, 0.2), {str(tmp_path / 'out')!r}, **test_ray.UNITS)"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "out").glob("done/unit-*.json"))) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    done = len(list((tmp_path / "out").glob("done/unit-*.json")))
    assert 1 <= done < 16 and not (tmp_path / "out" / "summary.json").exists()
    assert collect_on_ray(partial(prepare, str(text), 0.0), tmp_path / "out", **UNITS)["complete"]
    assert_same(tmp_path / "out", tables(tmp_path / "one"))


def test_what_a_worker_raises_reaches_the_user(cluster, text, tmp_path, monkeypatch):
    monkeypatch.setenv("THE_DRIVER", str(os.getpid()))
    with pytest.raises(ValueError, match="expected a worker that can, got this one"):
        collect_on_ray(partial(refusing, str(text)), tmp_path / "out", **UNITS)


@pytest.mark.parametrize("engine", ["spark", "ray:", "http://there"])
def test_engines_that_are_none(tmp_path, engine):
    with pytest.raises(ValueError, match=f"engine: expected ray or ray://HOST:PORT, got {engine}"):
        collect_on_ray(partial(prepare, "nowhere", 0.0), tmp_path / "out", engine=engine)


def test_without_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="needs the ray package: pip install 'writesae"):
        collect_on_ray(partial(prepare, "nowhere", 0.0), tmp_path / "out")
    monkeypatch.setattr(module, "_ray", lambda engine: None)
    with pytest.raises(ValueError, match="settings: expected some of mode, n, .* got rank"):
        collect_on_ray(partial(prepare, "nowhere", 0.0), tmp_path / "out", rank=1)
