"""The `writesae` command. Each subcommand lives in its own module, with `configure(parser)` and `run(args) -> int`."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

COMMANDS = {
    "info": ("writesae.info", "versions, backends built and usable (or why not), CPU instruction sets"),
    "demo": ("writesae.demo", "the embedded model and dictionary, end to end, with a report"),
    "train": ("writesae.sae.command", "train a dictionary on the writes of a site"),
    "collect": ("writesae.collect.command", "collect the firings of a corpus into Parquet"),
    "verify": ("writesae.collect.verify", "check every file of a collection against its digest"),
    "replace": ("writesae.experiments.command", "the replacement test: native write against atom, deletion, random"),
    "bench": ("writesae.bench.command", "every figure of speed beside its peer: JSON, table and picture"),
    "report": ("writesae.report.command", "rebuild the report of a finished run"),
}


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0 done, 1 failed, 2 bad usage or input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if sys.stdin is None:  # closed: whoever asks a question meets its end, not a missing file
        sys.stdin = open(os.devnull)
    parser = argparse.ArgumentParser(prog="writesae", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    modules = {}
    for name, (module, summary) in COMMANDS.items():
        sub = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip
        # Only the chosen command is imported: `writesae info` must answer even where torch's extras are missing.
        if name in argv[:1]:
            modules[name] = import_module(module)
            modules[name].configure(sub)
    args = parser.parse_args(argv)
    if args.version:
        from . import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return modules[args.command].run(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"writesae {args.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"writesae {args.command}: {error}", file=sys.stderr)
        return 1
    except EOFError:
        print(f"writesae {args.command}: a question could not be asked: standard input is closed", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"writesae {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
