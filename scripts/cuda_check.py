"""What can be proven of the CUDA kernels without a GPU; `make cuda-check`.

    python scripts/cuda_check.py [STEP ...]

Steps: library (every kernel compiled by nvcc for every architecture, linked, and bound to torch's stable C interface
only), ptxas (scripts/check_ptxas.py), sass (scripts/check_sass.py), twin (the operators' tests on the kernels compiled
for the host, in both orders of execution, under the address and undefined-behaviour sanitizers), planted (faults put
into kernels on purpose are noticed), truncating (some of the tests with sums of matrix products cut off as the
hardware's are, Hopper's and Ampere's), dry (the three calls of bench/gpu.sh without a GPU). Without nvcc the first
three fail; WRITESAE_WITHOUT_NVCC=1 leaves them out, and says so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_twin import build

ROOT = Path(__file__).resolve().parents[1]
# Those that take longest first, so that all cores are busy to the end.
OPERATORS = ("rules_backward", "encode_gradient", "encode", "rules", "gated_delta_rule")
TESTS = [f"tests/test_{x}.py" for x in OPERATORS]
TESTS += sorted((f"tests/{path.name}" for path in (ROOT / "tests").glob("test_cuda_*.py")), reverse=True)
# Not under the sanitizers, which see addresses and undefined arithmetic: long sequences, where they find what they do
# in short ones; other numbers at the same addresses; what the reference or a counter says. `make test` runs them all.
LEFT_OUT = (
    "test_long", "of_many_tokens", "65536", "repeats", "memory_stays", "rules_backward.py and test_segments",
    "test_decay", "closed_gates", "test_zeros", "mixed_decay", "every_strength",
    "bank_conflicts", "gradcheck", "reference_backend", "-reference", "threads_agree", "test_threads",
    "edits_at_borders and (before] or after])",  # those of both times in one list stay
)  # fmt: skip
SHORT = " and ".join(f"not ({words})" for words in LEFT_OUT)
LIBRARIES = ROOT / "build" / "cuda-check"
# Where sums that are cut off, and another rounding to tf32, could show: long sums, float32 in several narrow products,
# small results of large terms, selection near ties. The other tests of operators run so by `--targets twin-truncating`.
TRUNCATED = {
    "cuda_rules": "mixed_decay or (test_sizes and float32 and 64-136)",
    "cuda_rules_backward": "every_strength or (test_sizes and float32 and 64-136)",
    "encode": "(65536 and not 2.0) or (against_states and (grouped or T127 or k))",
    "encode_gradient": "test_decays or test_parts",
    "cuda_encode": "test_sizes or top_32",
}

# What each planted fault of the kernels (WRITESAE_PLANT) is, the tests to run, and how it shows there; the one that
# writes out of bounds needs the sanitizers.
PLANTED_TESTS = "gated_delta_rule and (test_long or test_lengths)"
FORWARD, BACKWARD = "tests/test_rules.py", "tests/test_rules_backward.py"
PLANTS = {
    1: ("a wrong carry between segments of a sequence", FORWARD, "relative RMS error"),
    2: ("a missing barrier", FORWARD, "relative RMS error"),
    3: ("a write out of bounds", FORWARD, "heap-buffer-overflow"),
    4: ("a missing barrier of the backward", BACKWARD, "relative RMS error"),
}


def run(command: list[str], **options) -> None:
    subprocess.run(command, check=True, cwd=ROOT, **options)


def environment() -> dict[str, str]:
    """Of a Python that may load a library built with sanitizers; Python's own leaks are not looked at."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    # The second because the first looks for the function that throws when it is loaded, and Python itself has none.
    libraries = [
        subprocess.run([compiler, f"-print-file-name={x}"], capture_output=True, text=True, check=True).stdout.strip()
        for x in ("libasan.so", "libstdc++.so")
    ]
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    sanitizers = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    return {**os.environ, "PYTHONPATH": path, "LD_PRELOAD": " ".join(libraries), **sanitizers}


def pytest(twin: Path, *options: str, sanitized: bool = True, targets="twin") -> subprocess.CompletedProcess:
    """Run on one core; the output is captured."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--targets",
        targets,
        "--twin",
        str(twin),
    ]
    command.append("--capture=sys")  # a sanitizer writes its report past Python, and ends it
    given = {**(environment() if sanitized else os.environ), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *options], cwd=ROOT, env=given, capture_output=True, text=True)


def library() -> None:
    if not have_nvcc():
        return
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(LIBRARIES)]
    run(command, env={**os.environ, "WRITESAE_CUDA": "1"})
    for path in sorted(LIBRARIES.glob("writesae/_C_*")):
        if unstable := unstable_symbols(path):
            sys.exit(f"{path.name} needs C++ symbols of torch, which change from release to release: {unstable[:5]}")
        stable = sum(name.startswith(("aoti_", "torch_")) for name in undefined(path))
        print(f"{path.name}: {path.stat().st_size:,} bytes, {stable} functions of torch's stable interface")


def undefined(path: Path) -> list[str]:
    """What a library expects others to define."""
    nm = ["nm", "-D", "--undefined-only", str(path)]
    text = subprocess.run(nm, capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in text.splitlines()]


def unstable_symbols(path: Path) -> list[str]:
    """C++ symbols of torch that a library needs; they change from release to release."""
    return [name for name in undefined(path) if re.match(r"_ZNK?(2at|3c10|5torch)", name)]


def ptxas() -> None:
    if have_nvcc():
        run([sys.executable, "scripts/check_ptxas.py"])


def sass() -> None:
    if have_nvcc():
        run([sys.executable, "scripts/check_sass.py"])


def have_nvcc() -> bool:
    if shutil.which("nvcc"):
        return True
    if os.environ.get("WRITESAE_WITHOUT_NVCC") == "1":
        print("NOT CHECKED: no nvcc here, and WRITESAE_WITHOUT_NVCC=1: the CUDA library was not compiled")
        return False
    sys.exit("cuda-check: no nvcc on PATH: the CUDA library cannot be checked (WRITESAE_WITHOUT_NVCC=1 to go without)")


def twin() -> None:
    path, failed = build(sanitize=True), []

    def look(test: str) -> subprocess.CompletedProcess:
        # `make test` runs both orders; bounds are the same in each.
        return pytest(path, test, "-k", SHORT, targets="twin-reverse")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for test, done in zip(TESTS, pool.map(look, TESTS), strict=True):
            print(f"{test}: {done.stdout.splitlines()[-1] if done.stdout else 'no output'}", flush=True)
            if done.returncode:
                failed.append(test)
                print(f"{done.stdout[-10000:]}{done.stderr[-10000:]}", flush=True)
    if failed:
        sys.exit(f"tests fail on the host twin under the sanitizers: {', '.join(failed)}")


def planted() -> None:
    def look(plant: int) -> str:
        what, test, shown = PLANTS[plant]
        sanitize = plant == 3
        done = pytest(build(sanitize, plant), "-x", test, "-k", PLANTED_TESTS, sanitized=sanitize)
        if done.returncode == 0 or shown not in done.stdout + done.stderr:
            sys.exit(f"{what} was planted and went unseen:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return what

    build(), build(sanitize=True)  # the files without faults
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for what in pool.map(look, PLANTS):
            print(f"planted and seen: {what}", flush=True)


def truncating() -> None:
    path, targets = build(), "twin-truncating,twin-ampere"

    def look(test: str) -> subprocess.CompletedProcess:
        return pytest(path, f"tests/test_{test}.py", "-k", TRUNCATED[test], sanitized=False, targets=targets)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for test, done in zip(TRUNCATED, pool.map(look, TRUNCATED), strict=True):
            print(f"{test}: {done.stdout.splitlines()[-1] if done.stdout else 'no output'}", flush=True)
            if done.returncode:
                sys.exit(f"with sums cut off:\n{done.stdout[-10000:]}{done.stderr[-3000:]}")


def dry() -> None:
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    given = {**os.environ, "PYTHONPATH": path, "PYTHON": sys.executable, "TWIN": str(build())}
    with tempfile.TemporaryDirectory() as out:
        for call in "123":
            run(["bash", "bench/gpu.sh", call, "--dry", out], env=given)


STEPS = {f.__name__: f for f in (library, ptxas, sass, twin, planted, truncating, dry)}


def main() -> None:
    asked = sys.argv[1:] or list(STEPS)
    if set(asked) - STEPS.keys():
        sys.exit(__doc__)
    for name in asked:
        start = time.monotonic()
        print(f"== cuda-check: {name}", flush=True)
        STEPS[name]()
        print(f"== cuda-check: {name} took {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
