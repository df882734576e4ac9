"""The `writesae` command. Each subcommand lives in its own module, with `configure(parser)` and `run(args) -> int`."""

from __future__ import annotations

import argparse
import os
import shlex
import string
import sys
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from . import console


class Command(NamedTuple):
    """A subcommand: its module, one line for the overview, and what its own --help says besides the options."""

    module: str
    summary: str
    writes: str  # what it writes, and how it ends
    example: str
    interrupted: str = ""  # how to go on once it was
    group: str = "look"  # of `GROUPS`
    then: tuple[str, ...] = ()  # what to look at next: the first of which every {argument} was given


GROUPS = {
    "look": "look at what fires and what atoms write",
    "train": "train dictionaries",
    "collect": "collect firings at scale",
    "test": "test what atoms do",
    "steer": "steer, and see what else an edit changes",
    "share": "share dictionaries",
    "measure": "measure, and see what works here",
}
_PAGE = "open {out}/report.html in a browser"


_GOES_ON = "the same command goes on where it was"

COMMANDS = {
    "info": Command(
        "writesae.info",
        "say what is installed, what is built and usable here, and why not",
        "Writes nothing but what it prints.",
        "writesae info --json",
        group="measure", then=("writesae demo",),
    ),
    "demo": Command(
        "writesae.demo",
        "show everything once on the embedded model: firings, strongest atoms, replacement test, report",
        "Takes about 3 minutes and no network. Writes the collection firings/, summary.json, firings.parquet, plots/ "
        "and the page report.html to --out.",
        "writesae demo --out runs/demo",
        "the same command begins anew",
        group="look", then=("writesae browse {out}/firings", _PAGE),
    ),
    "train": Command(
        "writesae.sae.command",
        "train a dictionary (WriteSAE) on the writes of one or several sites of a model",
        "Writes cfg.json and sae.safetensors (several sites: a folder L<layer>H<head> for each), metrics.json with the "
        "held-out figures, and a checkpoint, to --out. Interrupted, the same command with --resume goes on.",
        "writesae train --layer 5 --head 3 --features 4096 -k 8 --steps 2000 --out runs/L5H3",
        "the same command goes on, with --resume once there is a checkpoint in --out",
        group="train", then=("writesae report {out}",),
    ),
    "push": Command(
        "writesae.sae.push_command",
        "upload a folder of dictionaries to the Hugging Face hub, with a card",
        "Writes one commit to the repository, all of the set or nothing, and nothing on this machine; unfinished runs "
        "and files that belong to no dictionary are refused. A new repository is private unless --public. The token is "
        "that of `hf auth login`.",
        "writesae push runs/set owner/set --license mit --public",
        "nothing was committed; the same command begins anew",
        group="share", then=("writesae pull {repo}",),
    ),
    "pull": Command(
        "writesae.sae.pull_command",
        "list the dictionaries of a repository of the Hugging Face hub, or download some",
        "Writes a folder with cfg.json and sae.safetensors for each to --out, which --sae of other commands takes; "
        "without --out nothing. Only what is asked for is downloaded, and checked; HF_HUB_OFFLINE=1 uses what was "
        "downloaded before.",
        "writesae pull owner/set L9H4 --out runs/pulled",
        "the same command, with a new --out, goes on: files that came whole are kept",
        group="share", then=(
            "writesae replace --sae {out} --model MODEL --out runs/replace", "writesae pull {repo} --out runs/pulled",
        ),
    ),
    "collect": Command(
        "writesae.collect.command",
        "collect what fires on a corpus: text in, a folder of Parquet files out",
        "Writes Parquet shards of firings, tokens and documents, an index by feature, manifest.json and summary.json "
        "to --out; writesae.Store reads the folder. Interrupted or killed, the same command goes on with nothing lost. "
        "Exit status: 0 done, 1 disk full or declined, 2 bad input, 130 interrupted.",
        "writesae collect notes/ --out runs/notes --max-tokens 1000000",
        _GOES_ON,
        group="collect", then=("writesae browse {out}", "writesae report {out}"),
    ),
    "verify": Command(
        "writesae.collect.verify",
        "check every file of a collection against its digest",
        "Writes nothing; names every damaged, missing or unexpected file. Exit status: 0 sound, 1 not sound, 2 no "
        "such collection.",
        "writesae verify runs/notes",
        group="collect", then=("writesae browse {store}", "writesae report {store}"),
    ),
    "merge": Command(
        "writesae.collect.merging",
        "make one collection of several that were collected apart, or end one that several workers filled",
        "Of the same model, dictionaries, tokenizer and options, and of other text each. Writes a collection to OUT, "
        "its documents numbered in the order given; interrupted, the same command goes on. Exit status: 0 done, 2 "
        "stores that cannot be merged.",
        "writesae merge runs/notes runs/letters runs/all",
        _GOES_ON,
        group="collect", then=("writesae browse {out}", "writesae report {out}"),
    ),
    "export": Command(
        "writesae.bridges.command",
        "put dictionaries, a collection or a prompt into the format of another tool",
        "For SAELens, delphi, Neuronpedia, sae-dashboard or circuit-tracer, none of which has to be installed. Writes "
        "the files to OUT, all or none, and prints what they hold as JSON; sends nothing.",
        "writesae export delphi runs/notes runs/delphi",
        "nothing was written; the same command begins anew",
        group="share", then=("see docs/bridges.md for how the other tool reads {out}",),
    ),
    "replace": Command(
        "writesae.experiments.command",
        "run the replacement test: a write against the atom, its deletion and a random matrix",
        "Follows the model's next-token distribution after each edit. Writes summary.json, firings.parquet, plots/ and "
        "the page report.html to --out. Interrupted, the same command goes on.",
        "writesae replace --firings 200 --out runs/replace",
        _GOES_ON,
        group="test", then=(_PAGE,),
    ),
    "loss-recovered": Command(
        "writesae.experiments.recovered_command",
        "run the model with every write coded, closed loop, and say how much of the loss is recovered",
        "Cross-entropy on held-out text between the plain model and the one with all these writes deleted, by head and "
        "all at once, beside an untrained codebook. Writes summary.json, recovered.csv, losses.parquet, plots/ and the "
        "page report.html to --out. Interrupted, the same command goes on.",
        "writesae loss-recovered --sae runs/writes --k 1 8 --out runs/recovered",
        _GOES_ON,
        group="test", then=(_PAGE,),
    ),
    "audit": Command(
        "writesae.experiments.audit_command",
        "say what else edits change, beside random ones of their size: a plain verdict each",
        "Follows the change of the state (exact), KL and flips of every later prediction, perplexity of the rest and "
        "every layer's memory. Writes summary.json, audit.csv, plots/ and the page report.html to --out.",
        "writesae audit --delete 0:1 --delete 5:3 --every --when before --out runs/audit",
        "the same command begins anew",
        group="steer", then=(_PAGE,),
    ),
    "paper": Command(
        "writesae.paper.command",
        "run the paper's experiments, one by name or all in one report",
        "Each study writes summary.json (statistics with their intervals, the paper's claims beside ours), a CSV a "
        "table and plots/ to its folder in --out; --all also report.html. Interrupted, the same command goes on.",
        "writesae paper partition --quick --out runs/paper",
        _GOES_ON,
        group="test", then=("writesae report {out}",),
    ),
    "bench": Command(
        "writesae.bench.command",
        "measure every figure of speed and accuracy beside its peer",
        "Writes one JSON file a case and the picture bench.png to --out, and prints the table. Exit status 1 where a "
        "case failed or its result disagrees with its peer's. Interrupted, the same command goes on.",
        "writesae bench 'encode*' --quick",
        _GOES_ON,
        group="measure", then=("writesae bench --show --out {out}", "writesae bench --show"),
    ),
    "completion": Command(
        "writesae.completion",
        "print what makes a shell complete commands, options and their values",
        "Writes nothing but the script, to standard output. bash: writesae completion bash > "
        "~/.local/share/bash-completion/completions/writesae; zsh: writesae completion zsh > _writesae, in a folder of "
        "$fpath; fish: writesae completion fish > ~/.config/fish/completions/writesae.fish.",
        "writesae completion bash",
        group="measure",
    ),
    "browse": Command(
        "writesae.browse.command",
        "look at the features of a store: where they fire, what they write, and what happens without them",
        "Serves web pages to this machine's own browser until Ctrl-C, and writes a table of the features beside the "
        "store (STORE.browse) first; with --static it writes the pages to a folder instead, for any host.",
        "writesae browse runs/notes --model default --open",
        group="look", then=("python -m http.server --directory {static}", "writesae report {store}"),
    ),
    "report": Command(
        "writesae.report.command",
        "write the page of a finished run of any kind, or draw it again",
        "Writes report.html, and plots/ with the numbers of every figure, from a run of collect, train, replace, "
        "loss-recovered, audit, paper or demo, without a model.",
        "writesae report runs/replace",
        group="look", then=(_PAGE, "open {run}/report.html in a browser"),
    ),
}  # fmt: skip

_MISUSE = (
    ValueError,
    ImportError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


_NO_NEXT = ("quiet", "json", "list", "dry_run")  # asked for these, a command says no more than it must


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """The command's parser; options are filled in for the subcommand `only`, whose module alone is imported (`writesae
    info` must answer even where another command's packages are missing), or for all with "*"."""
    top = _Top(
        prog="writesae", formatter_class=_Help,
        description="The rank-1 writes of matrix-state language models (Gated DeltaNet and kin): say which atoms of a "
        "dictionary fire at every token, collect and edit them, inside the model's fast forward pass.",
        epilog="writesae COMMAND --help explains a command. Exit status: 0 done, 1 failed, 2 bad usage or input, 130 "
        "interrupted. Start with: writesae demo",
    )  # fmt: skip
    top.add_argument("--version", action="store_true", help="print the version and exit")
    _add_debug(top, False)
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    top.commands = subparsers
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name, help=command.summary, formatter_class=_Help,
            description=f"{command.summary[0].upper()}{command.summary[1:]}. {command.writes}",
            epilog=f"example: {command.example}",
        )  # fmt: skip
        if only in (name, "*"):
            import_module(command.module).configure(sub)
        _add_debug(sub, argparse.SUPPRESS)
    options = [option for action in top._actions for option in action.option_strings]
    subparsers.choices["completion"].set_defaults(commands=dict(subparsers.choices), options=options)
    return top


def _add_debug(parser: argparse.ArgumentParser, default: Any) -> None:
    parser.add_argument(
        "--debug", action="store_true", default=default, help="show where an error came from, with Python's traceback"
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0 done, 1 failed, 2 bad usage or input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if sys.stdin is None:  # closed: whoever asks a question meets its end, not a missing file
        sys.stdin = open(os.devnull)
    name = next((word for word in argv if not word.startswith("-")), None)
    debug = "--debug" in argv
    try:
        # A script of completions holds every command's options.
        args = parser("*" if name == "completion" else name).parse_args(argv)
        if args.version:
            from . import __version__

            print(__version__)
            return 0
        if name is None:
            parser().print_help()
            return 2
        status = import_module(COMMANDS[args.command].module).run(args)
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _failed(f"writesae {name}" if name in COMMANDS else "writesae", error)
    command = COMMANDS[args.command] if name in COMMANDS else None
    if status == 130 and command is not None:
        hint = command.interrupted
        console.error(f"writesae {name}", f"interrupted: {hint}" if hint else "interrupted")
    elif status == 0 and command is not None and not any(getattr(args, quiet, False) for quiet in _NO_NEXT):
        step = then(command, vars(args))
        if step is not None:
            console.next_step(step)
    return status


def then(command: Command, given: dict[str, Any]) -> str | None:
    """The first of a command's next steps that these arguments tell all of, with them in it."""
    for step in command.then:
        names = [name for _, name, _, _ in string.Formatter().parse(step) if name is not None]
        if all(isinstance(given.get(name), (str, Path)) for name in names):
            return step.format(**{name: shlex.quote(str(given[name])) for name in names})
    return None


def _failed(who: str, error: Exception) -> int:
    """Says what went wrong, in one line; returns the exit status."""
    if isinstance(error, EOFError):
        console.error(who, "a question could not be asked: standard input is closed")
    elif isinstance(error, (OSError, *_MISUSE)):
        console.error(who, error)
    else:
        message = next((line for line in str(error).splitlines() if line.strip()), "no message")
        console.error(who, f"{type(error).__name__}: {message} (--debug shows where)")
        return 1
    # What is left of OSError: a full disk, a broken pipe.
    return 2 if isinstance(error, (EOFError, *_MISUSE)) else 1


# ---- the parsers -----------------------------------------------------------------------------------------------------


def meant(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?", or nothing where no name is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


class _Parser(argparse.ArgumentParser):
    """Mistakes are one line, as everywhere in the package: what was expected, what came, what was likely meant."""

    def error(self, message: str) -> Any:
        console.error(self.prog, f"{message.removeprefix('argument ')} ({self.prog} --help explains it)")
        raise SystemExit(2)

    def print_help(self, file: Any = None) -> None:
        console.help_text(self.format_help(), file or sys.stdout)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            text = f"expected one of {', '.join(known)}, got {value!r}{meant(str(value), known)}"
            raise argparse.ArgumentError(action, text)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except argparse.ArgumentError as error:
            kind = "a whole number" if action.type is int else "a number" if action.type is float else None
            if kind is None:
                raise
            raise argparse.ArgumentError(action, f"expected {kind}, got {arg_string!r}") from error


class _Top(_Parser):
    """`writesae` itself: its commands by what people do, and options that no command has named before anything else."""

    commands: argparse._SubParsersAction

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        here: argparse.ArgumentParser = self
        for word in words:
            option = word.partition("=")[0]
            if word == "--":
                break
            if not word.startswith("-") and here is self:
                here = self.commands.choices.get(word, self)
                if here is self:
                    break  # argparse says that there is no such command
            known = here._option_string_actions
            if option.startswith("--") and " " not in option and not any(name.startswith(option) for name in known):
                here.error(f"expected one of its options, got {option}{meant(option, known)}")
        return super().parse_args(args, namespace)

    def format_help(self) -> str:
        shown = self._get_formatter()
        shown.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        shown.add_text(self.description)
        lines = {action.dest: action for action in self.commands._choices_actions}
        for group, title in GROUPS.items():
            shown.start_section(title)
            shown.add_arguments([lines[name] for name, command in COMMANDS.items() if command.group == group])
            shown.end_section()
        shown.start_section("options")
        shown.add_arguments([action for action in self._actions if action is not self.commands])
        shown.end_section()
        shown.add_text(self.epilog)
        return shown.format_help()


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
