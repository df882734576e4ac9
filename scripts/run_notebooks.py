"""Runs the notebooks of docs/notebooks, each in a fresh process and an empty folder, and keeps what they show.

    python scripts/run_notebooks.py [NAME ...]

A cell that raises ends the run, with status 1. What ran, with all it printed and drew, is written to build/notebooks;
the site shows it (scripts/docs_site.py). Those in docs/ keep no outputs. Needs nbclient and ipykernel. Prints what
each took of the processor, and fails where one took more than --most seconds of it.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

from writesae.files import make_folder, write_bytes

ROOT = Path(__file__).resolve().parents[1]
SOURCES, RAN = ROOT / "docs" / "notebooks", ROOT / "build" / "notebooks"


def run(path: Path) -> nbformat.NotebookNode:
    """A notebook with the outputs of a run of it.

    Raises:
        CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = {
        **os.environ,
        "MATPLOTLIBRC": str(SOURCES),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        # `!writesae` in a cell is the one of this environment.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as sockets:
        client = NotebookClient(
            notebook,
            timeout=1800,  # of a cell, in seconds of the clock; a machine may be busy
            startup_timeout=600,
            resources={"metadata": {"path": folder}},
            extra_arguments=[
                "--InlineBackend.figure_formats=svg",
                "--HistoryManager.enabled=False",
                "--ZMQInteractiveShell.system_raise_on_error=True",  # a command that fails ends the run, too
            ],
        )
        kernel = client.create_kernel_manager()
        kernel.transport, kernel.ip = "ipc", str(Path(sockets) / "kernel")  # no port that others could connect to
        client.execute(env=environment)
    return notebook


def seconds() -> float:
    """Of processor time, of all that this process has run and waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks, without .ipynb (default: all)")
    parser.add_argument(
        "--most", type=float, default=120, help="seconds of processor time that one may take (busy cores count too)"
    )
    args = parser.parse_args()
    every = {path.stem: path for path in sorted(SOURCES.glob("*.ipynb"))}
    unknown = [name for name in args.names if name not in every]
    if unknown:
        parser.error(f"NAME: expected of {', '.join(every)}, got {', '.join(unknown)}")
    make_folder(ROOT, "build", "notebooks")
    status = 0
    for name in args.names or every:
        before = seconds()
        try:
            ran = run(every[name])
        except (CellExecutionError, CellTimeoutError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
            continue
        took = seconds() - before
        write_bytes(RAN / f"{name}.ipynb", nbformat.writes(ran).encode())
        print(f"{name}: {took:.0f} s of processor time")
        if took > args.most:
            print(f"{name}: expected at most --most {args.most:g} s, got {took:.0f}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
