"""The `writesae` command. Each subcommand lives in its own module, with `configure(parser)` and `run(args) -> int`."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    """A subcommand: its module, one line for the overview, and what its own --help says besides the options."""

    module: str
    summary: str
    writes: str  # what it writes, and how it ends
    example: str
    interrupted: str = ""  # how to go on once it was


_GOES_ON = "the same command goes on where it was"

COMMANDS = {
    "info": Command(
        "writesae.info",
        "say what is installed, what is built and usable here, and why not",
        "Writes nothing but what it prints.",
        "writesae info --json",
    ),
    "demo": Command(
        "writesae.demo",
        "show everything once on the embedded model: firings, strongest atoms, replacement test, report",
        "Takes about 3 minutes and no network. Writes the collection firings/, summary.json, firings.parquet, plots/ "
        "and the page report.html to --out.",
        "writesae demo --out runs/demo",
        "the same command begins anew",
    ),
    "train": Command(
        "writesae.sae.command",
        "train a dictionary (WriteSAE) on the writes of one or several sites of a model",
        "Writes cfg.json and sae.safetensors (several sites: a folder L<layer>H<head> for each), metrics.json with the "
        "held-out figures, and a checkpoint, to --out. Interrupted, the same command with --resume goes on.",
        "writesae train --layer 5 --head 3 --features 4096 -k 8 --steps 2000 --out runs/L5H3",
        "the same command goes on, with --resume once there is a checkpoint in --out",
    ),
    "push": Command(
        "writesae.sae.push_command",
        "upload a folder of dictionaries to the Hugging Face hub, with a card",
        "Writes one commit to the repository, all of the set or nothing, and nothing on this machine; unfinished runs "
        "and files that belong to no dictionary are refused. A new repository is private unless --public. The token is "
        "that of `hf auth login`.",
        "writesae push runs/set owner/set --license mit --public",
        "nothing was committed; the same command begins anew",
    ),
    "pull": Command(
        "writesae.sae.pull_command",
        "list the dictionaries of a repository of the Hugging Face hub, or download some",
        "Writes a folder with cfg.json and sae.safetensors for each to --out, which --sae of other commands takes; "
        "without --out nothing. Only what is asked for is downloaded, and checked; HF_HUB_OFFLINE=1 uses what was "
        "downloaded before.",
        "writesae pull owner/set L9H4 --out runs/pulled",
        "the same command, with a new --out, goes on: files that came whole are kept",
    ),
    "collect": Command(
        "writesae.collect.command",
        "collect what fires on a corpus: text in, a folder of Parquet files out",
        "Writes Parquet shards of firings, tokens and documents, an index by feature, manifest.json and summary.json "
        "to --out; writesae.Store reads the folder. Interrupted or killed, the same command goes on with nothing lost. "
        "Exit status: 0 done, 1 disk full or declined, 2 bad input, 130 interrupted.",
        "writesae collect notes/ --out runs/notes --max-tokens 1000000",
        _GOES_ON,
    ),
    "verify": Command(
        "writesae.collect.verify",
        "check every file of a collection against its digest",
        "Writes nothing; names every damaged, missing or unexpected file. Exit status: 0 sound, 1 not sound, 2 no "
        "such collection.",
        "writesae verify runs/notes",
    ),
    "merge": Command(
        "writesae.collect.merging",
        "make one collection of several that were collected apart, or end one that several workers filled",
        "Of the same model, dictionaries, tokenizer and options, and of other text each. Writes a collection to OUT, "
        "its documents numbered in the order given; interrupted, the same command goes on. Exit status: 0 done, 2 "
        "stores that cannot be merged.",
        "writesae merge runs/notes runs/letters runs/all",
        _GOES_ON,
    ),
    "export": Command(
        "writesae.bridges.command",
        "put dictionaries, a collection or a prompt into the format of another tool",
        "For SAELens, delphi, Neuronpedia, sae-dashboard or circuit-tracer, none of which has to be installed. Writes "
        "the files to OUT, all or none, and prints what they hold as JSON; sends nothing.",
        "writesae export delphi runs/notes runs/delphi",
        "nothing was written; the same command begins anew",
    ),
    "replace": Command(
        "writesae.experiments.command",
        "run the replacement test: a write against the atom, its deletion and a random matrix",
        "Follows the model's next-token distribution after each edit. Writes summary.json, firings.parquet, plots/ and "
        "the page report.html to --out. Interrupted, the same command goes on.",
        "writesae replace --firings 200 --out runs/replace",
        _GOES_ON,
    ),
    "loss-recovered": Command(
        "writesae.experiments.recovered_command",
        "run the model with every write coded, closed loop, and say how much of the loss is recovered",
        "Cross-entropy on held-out text between the plain model and the one with all these writes deleted, by head and "
        "all at once, beside an untrained codebook. Writes summary.json, recovered.csv, losses.parquet, plots/ and the "
        "page report.html to --out. Interrupted, the same command goes on.",
        "writesae loss-recovered --sae runs/writes --k 1 8 --out runs/recovered",
        _GOES_ON,
    ),
    "audit": Command(
        "writesae.experiments.audit_command",
        "say what else edits change, beside random ones of their size: a plain verdict each",
        "Follows the change of the state (exact), KL and flips of every later prediction, perplexity of the rest and "
        "every layer's memory. Writes summary.json, audit.csv, plots/ and the page report.html to --out.",
        "writesae audit --delete 0:1 --delete 5:3 --every --when before --out runs/audit",
        "the same command begins anew",
    ),
    "paper": Command(
        "writesae.paper.command",
        "run the paper's experiments, one by name or all in one report",
        "Each study writes summary.json (statistics with their intervals, the paper's claims beside ours), a CSV a "
        "table and plots/ to its folder in --out; --all also report.html. Interrupted, the same command goes on.",
        "writesae paper partition --quick --out runs/paper",
        _GOES_ON,
    ),
    "bench": Command(
        "writesae.bench.command",
        "measure every figure of speed and accuracy beside its peer",
        "Writes one JSON file a case and the picture bench.png to --out, and prints the table. Exit status 1 where a "
        "case failed or its result disagrees with its peer's. Interrupted, the same command goes on.",
        "writesae bench 'encode*' --quick",
        _GOES_ON,
    ),
    "browse": Command(
        "writesae.browse.command",
        "look at the features of a store: where they fire, what they write, and what happens without them",
        "Serves web pages to this machine's own browser until Ctrl-C, and writes a table of the features beside the "
        "store (STORE.browse) first; with --static it writes the pages to a folder instead, for any host.",
        "writesae browse runs/notes --model default --open",
    ),
    "report": Command(
        "writesae.report.command",
        "draw the pictures and the page of a finished run again",
        "Writes report.html and plots/ from the files of replace, loss-recovered, audit or paper, without a model.",
        "writesae report runs/replace",
    ),
}  # fmt: skip

_MISUSE = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """The command's parser; options are filled in for the subcommand `only`, whose module alone is imported (`writesae
    info` must answer even where another command's packages are missing), or for all with "*"."""
    top = argparse.ArgumentParser(
        prog="writesae",
        description="The rank-1 writes of matrix-state language models (Gated DeltaNet and kin): say which atoms of a "
        "dictionary fire at every token, collect and edit them, inside the model's fast forward pass.",
        epilog="writesae COMMAND --help explains a command. Start with: writesae demo",
    )
    top.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name, help=command.summary, formatter_class=_Help,
            description=f"{command.summary[0].upper()}{command.summary[1:]}. {command.writes}",
            epilog=f"example: {command.example}",
        )  # fmt: skip
        if only in (name, "*"):
            import_module(command.module).configure(sub)
    return top


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0 done, 1 failed, 2 bad usage or input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if sys.stdin is None:  # closed: whoever asks a question meets its end, not a missing file
        sys.stdin = open(os.devnull)
    top = parser(argv[0] if argv else None)
    args = top.parse_args(argv)
    if args.version:
        from . import __version__

        print(__version__)
        return 0
    if args.command is None:
        top.print_help()
        return 2
    try:
        status = import_module(COMMANDS[args.command].module).run(args)
    except KeyboardInterrupt:
        status = 130
    except (ValueError, ImportError, *_MISUSE) as error:
        return _say(args.command, error, 2)
    except EOFError:
        return _say(args.command, "a question could not be asked: standard input is closed", 2)
    except OSError as error:  # a full disk, a broken pipe
        return _say(args.command, error, 1)
    if status == 130:
        hint = COMMANDS[args.command].interrupted
        return _say(args.command, f"interrupted: {hint}" if hint else "interrupted", status)
    return status


def _say(command: str, error: object, status: int) -> int:
    print(f"writesae {command}: {error}", file=sys.stderr)
    return status


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to every option that has one, leaves out "(default: None)", and writes N for a whole number."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, [], "") or action.default is False or "default" in (action.help or ""):
            return action.help or ""
        if isinstance(action.default, (list, tuple)):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action) or ""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        number = "N" if action.type is int else "X" if action.type is float else None
        return number or super()._get_default_metavar_for_optional(action)


if __name__ == "__main__":
    sys.exit(main())
