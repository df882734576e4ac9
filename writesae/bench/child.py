"""One case in a process of its own: `python -m writesae.bench.child MODULE CASE FILE OPTIONS`.

So that one case's memory, threads or crash is no other's, and the memory of a case can be measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .case import Options, load_cases
from .record import run_case, write_record


def main(module: str, name: str, file: str, options: str) -> int:
    case = next(case for case in load_cases([module]) if case.name == name)
    settings = json.loads(options)
    extra = settings.pop("record")
    found = run_case(case, Options(**settings)) | extra
    write_record(Path(file), found)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
