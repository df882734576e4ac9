"""Loads hostile files one after another and says of each what came of it: no code run, no unclear error, little memory.

`judge` works in this process; `in_child` runs a generator's cases in a process of their own, where a crash is a finding
and the high-water mark of memory can be reset (Linux only).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ALLOWED_BYTES = 200 * 2**20
LONGEST = 20.0  # seconds for one file of a few kilobytes
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pty.spawn", "os.fork")


@dataclass
class Case:
    """A hostile thing in `folder`: `load` loads it, `check(result)` says what is wrong with what was accepted."""

    name: str
    folder: Path
    load: Callable[[], object]
    check: Callable[[object], str | None] = lambda result: None

    def size(self) -> int:
        """Bytes of what is in the folder, links and devices at nothing."""
        files = (p for p in self.folder.rglob("*") if p.is_file() and not p.is_symlink())
        return sum(p.stat().st_size for p in files)


class Watch:
    """Notes what must not happen while a stranger's file is read (once installed an audit hook stays)."""

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.on and event.startswith(_FORBIDDEN):
            self.seen.append(f"{event} {arguments!r}"[:200])


def memory(reset: bool = False) -> int:
    """Most resident bytes since the last reset, or of the process's whole life where that cannot be reset."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def judge(case: Case, watch: Watch, marker: Path) -> tuple[str, str]:
    """("accepted" | "refused" | "bad", why) of a case. `marker` is a path that the case's code, if run, creates."""
    before, began = memory(reset=True), time.perf_counter()
    watch.seen.clear()
    watch.on = True
    try:
        result = case.load()
        what, why = "accepted", ""
    except (ValueError, FileNotFoundError) as error:
        what, why = "refused", str(error)
    except Exception as error:
        what, why = "bad", f"unclear {type(error).__name__}: {error}"[:300]
    finally:
        watch.on = False
    used, seconds = memory() - before, time.perf_counter() - began
    if marker.exists():
        return "bad", "its code ran"
    if watch.seen:
        return "bad", f"it did {watch.seen[0]}"
    if what == "refused" and (str(case.folder) not in why or len(why) > 1500 or "\n" in why):
        what, why = "bad", f"an error without the file's name, or too long: {why[:300]}"
    if what == "accepted" and (fault := case.check(result)):
        what, why = "bad", f"accepted with {fault}"
    if used > 3 * case.size() + ALLOWED_BYTES:
        what, why = "bad", f"took {used / 2**20:.0f} MB for a file of {case.size():,} bytes"
    if seconds > LONGEST:
        what, why = "bad", f"took {seconds:.0f} s"
    return what, why


def run(cases: Callable[[int, int, Path, Path], Iterator[Case]], seed: int, count: int, warm: int = 3) -> dict:
    """Judges `count` cases of a generator. {"cases", "accepted", "refused", "bad": [(name, why)],
    "taken": [names of those accepted], "most_bytes"}."""
    watch, out = Watch(), {"cases": 0, "accepted": 0, "refused": 0, "bad": [], "most_bytes": 0, "taken": []}
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder) / "owned"
        for i, case in enumerate(cases(seed, count, Path(folder) / "cases", marker)):
            if i < warm:  # first calls import things, which is not the file's doing
                for _ in range(2):
                    try:
                        case.load()
                    except Exception:
                        pass
            before = memory(reset=True)
            what, why = judge(case, watch, marker)
            out["cases"] += 1
            out["most_bytes"] = max(out["most_bytes"], memory() - before)
            if what == "bad":
                out["bad"].append((case.name, why))
                marker.unlink(missing_ok=True)
            else:
                out[what] += 1
                out["taken"] += [case.name] if what == "accepted" else []
    return out


def in_child(module: str, function: str, seed: int, count: int) -> dict:
    """`run` in a process of its own; a crash is one bad case."""
    here = Path(__file__).parent
    code = (
        f"import sys, json; sys.path[:0] = [{str(here.parent)!r}, {str(here)!r}]; import watch, {module} as m; "
        f"print(json.dumps(watch.run(m.{function}, {seed}, {count})))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL,
        cwd=here.parents[1],
    )  # fmt: skip
    if out.returncode:
        return {"cases": 0, "accepted": 0, "refused": 0, "bad": [("the process", out.stderr[-2000:])], "most_bytes": 0}
    return json.loads(out.stdout.splitlines()[-1])
