"""Compiles the CUDA kernels for the CPU: the host twin, a library of operators that only tests load, and a module of
Python through which they set it and read what it measures (csrc/test/twin_module.cpp).

    python scripts/build_twin.py [--sanitize] [--plant N]

Prints the library's path. Needs a C++ compiler, torch and Python's headers, no CUDA. Only what changed is compiled.
With --sanitize, under the address and undefined-behaviour sanitizers (then libasan must be preloaded into Python),
whose objects the C++ checks link, too (CMakeLists.txt); --plant compiles one of the kernels' planted faults
(WRITESAE_PLANT) in, for the test that such faults are found.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The file that each planted fault (WRITESAE_PLANT) is compiled into.
PLANTED = dict.fromkeys((1, 2, 3), "gated_delta_rule_f32.cu") | {4: "gated_delta_rule_backward_f32.cu"}

# Lines are all that a report names: what else -g writes takes half of the compiler's time.
SANITIZED = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]

sys.path.insert(0, str(ROOT / "csrc"))
from sources import both_sides, kernels  # noqa: E402


def build(sanitize: bool = False, plant: int = 0, quiet: bool = True) -> Path:
    """Path of the library, built where needed. Raises RuntimeError with the compiler's output where it fails."""
    from torch.utils.cpp_extension import include_paths, library_paths

    csrc = ROOT / "csrc"
    folder = ROOT / "build" / ("twin" + ("-sanitize" if sanitize else "") + (f"-plant{plant}" if plant else ""))
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wno-psabi"]
    flags += ["-Wno-unknown-pragmas", "-DWRITESAE_SIDE=2", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{csrc}"]
    flags += [f"-isystem{path}" for path in include_paths()]
    flags += SANITIZED if sanitize else ["-O2", "-g0"]
    flags += [f"-DWRITESAE_PLANT={plant}"] if plant else []
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    headers = [p for pattern in ("*.h", "cuda/*.h", "cuda/*.cuh") for p in csrc.glob(pattern)]
    newest = max(p.stat().st_mtime for p in (*headers, Path(__file__)))
    sources = [*(csrc / "cuda" / name for name in kernels()), *(csrc / name for name in both_sides())]
    sources += [*sorted((csrc / "cuda").glob("*.cpp")), csrc / "test" / "twin_module.cpp"]

    def run(command: list[str]) -> None:
        if not quiet:
            print(shlex.join(command), file=sys.stderr, flush=True)
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{out.stdout}{out.stderr}")

    def compile_one(source: Path) -> tuple[Path, bool]:
        to = folder / (source.name + ".o")
        if to.exists() and to.stat().st_mtime > max(newest, source.stat().st_mtime):
            return to, False
        own = ["-O3"] if source.name.startswith("host_twin") else []  # switches, products: where tests spend their time
        own += [f"-isystem{sysconfig.get_paths()['include']}"] if source.name == "twin_module.cpp" else []
        run([*compiler, *flags, *own, "-x", "c++", "-c", str(source), "-o", str(to)])
        return to, True

    # Faults are planted in one file: the rest is the library without them.
    of_both = folder.with_name(folder.name.removesuffix(f"-plant{plant}")) if plant else None
    if of_both is not None:
        build(sanitize)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        own = [x for x in sources if of_both is None or x.name == PLANTED[plant]]
        objects = list(pool.map(compile_one, own))
        objects += [(of_both / (x.name + ".o"), False) for x in sources if x not in own]
    library = folder / "twin.so"
    if not library.exists() or any(made for _, made in objects):
        link = ["-shared", *(["-fsanitize=address,undefined"] if sanitize else [])]
        link += [f"-L{path}" for path in library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
        run([*compiler, *(str(o) for o, _ in objects), *link, "-o", str(library)])
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--plant", type=int, default=0, choices=[0, *PLANTED])
    args = parser.parse_args()
    print(build(args.sanitize, args.plant, quiet=False))


if __name__ == "__main__":
    main()
