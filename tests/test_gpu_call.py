"""bench/gpu.sh and bench/gpu_call.py without a GPU: deadlines, what a kill leaves, what is missing, few files; what the
peers' cases hand to other packages, and what `ncu` says."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from writesae import ops
from writesae.bench import bench_gpu_peers as peers
from writesae.bench.case import Options
from writesae.bench.record import read_records

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"


@pytest.fixture
def call(monkeypatch):
    """bench/gpu_call.py as a module, on the cases of fake_bench.py."""
    spec = importlib.util.spec_from_file_location("gpu_call", ROOT / "bench" / "gpu_call.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(module, "MODULES", ("fake_bench",))
    return module


@pytest.fixture
def machine(tmp_path):
    """(folder of programs, environment with nothing else on PATH but what a shell needs). The Python in it does what
    FAKE says with the arguments it is given, and answers the questions that bench/gpu.sh asks of a card."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "tr", "cut", "tee", "tail", "timeout", "mkdir", "mktemp", "cat", "sort", "xargs", "find", "rm",
                 "dirname", "sha256sum", "nproc", "sleep", "env", "echo", "tar"):  # fmt: skip
        found = subprocess.run(["bash", "-c", f"type -P {name}"], capture_output=True, text=True).stdout.strip()
        (tools / name).symlink_to(found)
    answers = 'case "$1" in -c) case "$2" in *capability*) echo 90;; esac; exit;; -) exit;; esac'
    program(tools / "python3", f'{answers}\neval "$FAKE"')
    environment = {"PATH": str(tools), "GPU_GRACE": "1", "HOME": str(tmp_path), "FAKE": "true"}
    return tools, environment


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def gpu(environment, *arguments) -> subprocess.CompletedProcess:
    """The script in a tree of its own, so that what it builds is not this clone's."""
    tree = Path(environment["HOME"]) / "tree"
    for folder in ("bench", "csrc", "writesae"):
        (tree / folder).mkdir(parents=True, exist_ok=True)
    (tree / "setup.py").write_text("a source")
    shutil.copy(SCRIPT, tree / "bench")
    command = ["/bin/bash", str(tree / "bench" / "gpu.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def steps(path: Path) -> dict[str, dict]:
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return {line["name"]: line for line in lines if line["what"] == "step"}


# ---- the script -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["4", "out"], ["1"], ["2", "--dry"], ["3", "a", "b"]])
def test_usage(arguments, tmp_path):
    done = subprocess.run(["bash", str(SCRIPT), *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("gpu.sh: expected ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [1, 2, 3])
def test_no_step_passes_the_deadline(number, machine, tmp_path):
    """Of programs that never end: the steps that began are interrupted, the others named, and all is over in time."""
    tools, environment = machine
    for name in ("nvidia-smi", "nvcc", "ncu", "compute-sanitizer"):
        program(tools / name, "sleep 100")
    quick = 'case "$*" in *build_ext*|*begin*|*show*) ;; *) sleep 100;; esac'
    began = time.monotonic()
    done = gpu(environment | {"GPU_DEADLINE": "6", "FAKE": quick}, number, tmp_path / "out")
    assert time.monotonic() - began < 20 and done.returncode == 1
    found = steps(tmp_path / "out" / f"call{number}.jsonl")
    statuses = [x["status"] for x in found.values()]
    assert "cut short" in statuses and statuses[-1] == "not run"
    late = [x for x in found.values() if x["status"] == "not run"]
    assert all("s are left of 6" in x["note"] for x in late)
    last = (tmp_path / "out" / f"call{number}.txt").read_text().splitlines()[-1]
    assert all(name in last for name in (x["name"] for x in late))


def test_a_program_that_ignores_the_interrupt_is_killed(machine, tmp_path):
    tools, environment = machine
    stubborn = 'case "$*" in *build_ext*|*begin*|*show*) ;; *) trap "" INT TERM; while :; do sleep 1; done;; esac'
    began = time.monotonic()
    done = gpu(environment | {"GPU_DEADLINE": "5", "FAKE": stubborn}, 1, tmp_path / "out")
    assert time.monotonic() - began < 20 and done.returncode == 1
    assert steps(tmp_path / "out" / "call1.jsonl")["smoke"]["status"] == "cut short"


def test_what_is_missing_is_named(machine, tmp_path):
    _, environment = machine
    done = gpu(environment, 1, tmp_path / "1")
    assert "missing: nvidia-smi is not on PATH" in done.stdout
    assert steps(tmp_path / "1" / "call1.jsonl")["counters"]["note"] == "ncu is not on PATH"
    assert done.returncode == 1 and "not run: counters" in done.stdout.splitlines()[-1]
    gpu(environment, 3, tmp_path / "3")
    assert steps(tmp_path / "3" / "call3.jsonl")["memcheck, racecheck, synccheck"]["status"] == "not run"


def test_without_a_library_nothing_else_is_tried(machine, tmp_path):
    _, environment = machine
    done = gpu(environment | {"FAKE": 'echo "nvcc failed on a.cu"; exit 3'}, 1, tmp_path / "out")
    found = steps(tmp_path / "out" / "call1.jsonl")
    assert list(found) == ["build"] and found["build"]["note"] == "status 3: nvcc failed on a.cu"
    assert done.returncode == 1


@pytest.mark.parametrize("number", [1, 2, 3])
def test_few_files(number, machine, tmp_path):
    """At most six of a call, and the steps of each go on after one that failed."""
    tools, environment = machine
    for name in ("nvidia-smi", "nvcc", "ncu", "compute-sanitizer"):
        program(tools / name, "true")
    done = gpu(environment | {"FAKE": r'case "$*" in *-m\ pytest*) exit 1;; esac'}, number, tmp_path / "out")
    files = {x.name for x in (tmp_path / "out").rglob("*")}
    assert {f"call{number}.jsonl", f"call{number}.txt", f"call{number}.log"} <= files and len(files) <= 6
    found = steps(tmp_path / "out" / f"call{number}.jsonl")
    if number != 3:
        assert {x["status"] for x in found.values()} == {"ok", "FAILED"} and len(found) >= 7 - number
    assert done.returncode == (0 if number == 3 else 1)


def test_a_library_is_built_once(machine, tmp_path):
    """Another call with the same sources and card takes what is there; one without the libraries builds."""
    _, environment = machine
    gpu(environment, 3, tmp_path / "a")
    (tmp_path / "tree" / "writesae" / "_C_cuda.abi3.so").touch()
    gpu(environment, 3, tmp_path / "b")
    (tmp_path / "tree" / "csrc" / "new.cu").touch()
    gpu(environment, 3, tmp_path / "c")
    notes = [steps(tmp_path / x / "call3.jsonl")["build"]["note"] for x in "abc"]
    assert notes == ["", "compiled before, for the same sources and 90", ""]


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_rows_survive_a_kill(call, tmp_path):
    """A case that is killed with its process: what it had measured is in the file, and the file can be read."""
    path = tmp_path / "rows.jsonl"
    call.begin(path, 1, dry="none")
    code = (
        "import importlib.util, pathlib, sys\n"
        "spec = importlib.util.spec_from_file_location('gpu_call', sys.argv[1])\n"
        "call = importlib.util.module_from_spec(spec); spec.loader.exec_module(call)\n"
        "call.MODULES = ('fake_bench',)\n"
        "call.measure(pathlib.Path(sys.argv[2]), ['product', 'wrong', 'killed', 'later'], '')"
    )
    command = [sys.executable, "-c", code, str(ROOT / "bench" / "gpu_call.py"), str(path)]
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    with path.open("a") as file:
        file.write('{"what": "row", "case": "killed", "ro')
    found = {x["case"]: x for x in call.records([path])}
    assert found["product"]["status"] == "measured" and len(found["product"]["rows"]) == 2
    assert found["wrong"]["status"] == "disagree" and found["wrong"]["rows"][-1]["note"].startswith("no ratio: ")
    assert "later" not in found and found["product"]["rows"][0]["value"] > 0
    with pytest.raises(ValueError, match="expected measurements, got a dry run's of product, wrong"):
        call.keep([path], tmp_path / "out")


def test_what_is_kept_is_a_record_of_the_benchmark(call, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    call.begin(path, 2, dry="none")
    assert call.measure(path, ["product", "lonely"], "") == 0
    path.write_text(path.read_text().replace('"dry": true', '"dry": false'))
    assert call.keep([path], tmp_path / "out") == 2
    found = {x["case"]: x for x in read_records(tmp_path / "out")}
    assert found["product"]["machine"]["processor"] and found["product"]["call"] == 2
    assert found["lonely"]["status"] == "missing" and "fast-peer is not installed" in call.show([path])


def test_after_a_failure_the_rest_has_a_new_process(call, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(call.os, "execv", lambda program, command: given.append(command))
    call.measure(tmp_path / "rows.jsonl", ["broken", "product"], "", bad=1)
    assert given[0][2:] == ["case", str(tmp_path / "rows.jsonl"), "--bad", "2", "product"]
    with pytest.raises(ValueError, match="NAME: expected cases of product, .*, got nothing"):
        call.measure(tmp_path / "rows.jsonl", ["nothing"], "")


# ---- ncu ------------------------------------------------------------------------------------------------------------

COUNTED = """==PROF== Connected to process 7
==PROF== Profiling "walk" - 0: 0%....100% - 9 passes
"ID","Process ID","Kernel Name","Block Size","Grid Size","gpu__time_duration.sum","dram__bytes_read.sum","u","OCCUPANCY"
"","","","","","msecond","Mbyte","","%"
"0","7","void writesae::cuda::walk<__nv_bfloat16, 128>(Call)","(128, 1, 1)","(64, 2, 1)","1.25","1,024.5","3","n/a"
"1","7","prepare","(128, 1, 1)","(512, 1, 1)","0.50","7","3","24.9"
==PROF== Disconnected from process 7
""".replace("OCCUPANCY", "sm__warps_active.avg.pct_of_peak_sustained_active")


def test_counters_are_read(call, tmp_path):
    walk, prepare = call.read_counters(COUNTED)
    assert walk["kernel"].startswith("writesae::cuda::walk<") and walk["grid"] == "(64, 2, 1)"
    assert walk["values"] == {"ms": 1.25, "DRAM read": 1024.5} and walk["units"] == {
        "ms": "msecond",
        "DRAM read": "Mbyte",
    }
    assert prepare["values"]["occupancy %"] == 24.9
    (tmp_path / "a.csv").write_text("==ERROR== No kernels were profiled\n")
    with pytest.raises(ValueError, match="ncu said: ==ERROR== No kernels were profiled"):
        call.counters(tmp_path / "rows.jsonl", tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text(COUNTED)
    call.begin(tmp_path / "rows.jsonl", 1, dry="none")
    call.counters(tmp_path / "rows.jsonl", tmp_path / "b.csv")
    assert "DRAM read 1,024 Mbyte" in call.show([tmp_path / "rows.jsonl"])


def test_counters_that_ncu_lacks_are_left_out(call, tmp_path, monkeypatch, capsys):
    program(tmp_path / "ncu", 'echo "gpu__time_duration Counter"; echo "sm__warps_active Counter"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    asked = call.metrics().split(",")
    assert "gpu__time_duration.sum" in asked and "launch__registers_per_thread" in asked
    assert not [x for x in asked if x.startswith("dram__")] and "dram__bytes_read.sum" in capsys.readouterr().err
    program(tmp_path / "ncu", "echo nonsense")
    assert call.metrics().split(",") == list(call.METRICS.values())


# ---- peers ----------------------------------------------------------------------------------------------------------


def _chunked(q, k, v, g, beta, scale, output_final_state, use_qk_l2norm_in_kernel):
    out = ops.gated_delta_rule(
        q, k, v, g, beta, scale=scale, output_final_state=output_final_state, use_qk_l2norm=use_qk_l2norm_in_kernel,
        backend="reference",
    )  # fmt: skip
    return out.o, out.final_state


def _recurrent(initial_state, **given):
    inside = given.pop("use_qk_l2norm_in_kernel")
    out = ops.gated_delta_rule(**given, initial_state=initial_state, use_qk_l2norm=inside, backend="reference")
    return out.o, out.final_state


def _packed(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel):
    """FlashInfer's: `[tokens, heads, D]`, gates as factors, both in float32, its state `[B, H, V, K]`."""
    assert (
        q.ndim == 3 and all(x.dtype == torch.float32 for x in (g, beta)) and all(x.is_contiguous() for x in (q, k, v))
    )
    out = ops.gated_delta_rule(
        *(x[None] for x in (q, k, v, g.log(), beta)), scale=scale, cu_seqlens=cu_seqlens, output_final_state=True,
        use_qk_l2norm=use_qk_l2norm_in_kernel, backend="reference",
    )  # fmt: skip
    return out.o[0], out.final_state.mT


@pytest.mark.parametrize("measured", peers.CASES, ids=lambda case: case.name)
def test_peers_get_what_they_expect(measured, request, monkeypatch):
    """Stand-ins with the signatures of the packages, on the host twin: results agree, heads stay grouped."""
    twin = request.config.getoption("--twin")
    if twin is None:
        pytest.skip("no host twin (--twin)")
    asked = []

    def stand_in(module, name, package):
        asked.append(module)
        if name.startswith("fused_recurrent"):
            return _recurrent
        return _packed if package == peers.INFER else _chunked

    monkeypatch.setattr(peers, "peer", stand_in)
    rows = list(measured.measure(Options(dry=twin)))
    assert rows and all(row.value is None and row.note == "dry run: no number" for row in rows) and asked
    spoiled = lambda *given, **more: tuple(1.1 * x for x in stand_in_of(asked[0], measured)(*given, **more))  # noqa: E731
    monkeypatch.setattr(peers, "peer", lambda *names: spoiled)
    with pytest.raises(Exception, match="results differ"):
        list(measured.measure(Options(dry=twin)))


def stand_in_of(module: str, case):
    return _recurrent if case.name == "gpu-peer-step" else _packed if "flashinfer" in module else _chunked
