"""`writesae completion`: scripts of completions for bash, zsh and fish, made from the parsers themselves.

A script holds all there is to complete, so that a press of Tab starts no Python: importing what `writesae train` needs
to know its options takes seconds. It is to be made again when the package is updated.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping

_FOLDERS = ("DIR",)  # metavars whose values are folders
_PATHS = ("FILE", "PATH", "[LAYER:HEAD=]PATH", "CORPUS", "RUN")
_PATH_NAMES = ("corpus", "run", "store", "stores", "out", "folder", "validation", "model", "edit")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="the shell that is to complete (no default)")


def run(args: argparse.Namespace) -> int:
    """Prints the script. Returns 0."""
    print(SCRIPTS[args.shell](args.commands, args.options), end="")
    return 0


Parsers = Mapping[str, argparse.ArgumentParser]


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings]


def _values(action: argparse.Action) -> list[str] | str | None:
    """What an argument takes: its choices, "folder", "path", "" for anything else; None for nothing at all."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return None
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    if action.metavar in _FOLDERS:
        return "folder"
    return "path" if action.metavar in _PATHS or action.dest in _PATH_NAMES else ""


def _positional(parser: argparse.ArgumentParser) -> list[str] | str:
    """What words that are no options may be."""
    found = [_values(action) for action in parser._actions if not action.option_strings]
    choices = [choice for values in found if isinstance(values, list) for choice in values]
    return choices or ("path" if "path" in found else "")


def _help(action: argparse.Action) -> str:
    """An option in a few plain words: up to its first stop, without what shells take for their own."""
    text = re.split(r"[;:.(]\s|\(", action.help or "", maxsplit=1)[0]
    return _plain(text)[:70].strip()


def _said(parser: argparse.ArgumentParser) -> str:
    return _plain(re.split(r"[.:] ", parser.description or "", maxsplit=1)[0])


def _plain(text: str) -> str:
    """Without what a shell takes for its own inside quotes."""
    return re.sub(r"[^\w ,/+’-]", "", text.replace("'", "’"))


# ---- bash -----------------------------------------------------------------------------------------------------------


def _bash(commands: Parsers, options: Iterable[str]) -> str:
    lines = [
        "# Completions of writesae for bash, made by: writesae completion bash", "_writesae() {",
        '    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command="" i',
        "    COMPREPLY=()",
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        '        [[ ${COMP_WORDS[i]} != -* ]] && { command=${COMP_WORDS[i]}; break; }',
        "    done",
        '    if [[ -z $command ]]; then',
        f'        COMPREPLY=($(compgen -W "{" ".join((*commands, *options))}" -- "$cur"))', "        return", "    fi",
        '    case "$command $prev" in',
    ]  # fmt: skip
    for name, parser in commands.items():
        for values, actions in _by_values(parser):
            words = "|".join(f'"{name} {option}"' for action in actions for option in action.option_strings)
            lines.append(f"        {words}) {_bash_reply(values)} ;;")
    lines += ["    esac", "    case $command in"]
    for name, parser in commands.items():
        every = " ".join(option for action in _options(parser) for option in action.option_strings)
        lines += [
            f"        {name})", f'            if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W "{every}" -- "$cur"))',
            f"            else {_bash_reply(_positional(parser)).removesuffix('; return')}; fi ;;",
        ]  # fmt: skip
    return "\n".join([*lines, "    esac", "}", "complete -o filenames -F _writesae writesae", ""])


def _by_values(parser: argparse.ArgumentParser) -> Iterator[tuple[list[str] | str, list[argparse.Action]]]:
    """Options that take a value, those of the same values together."""
    found: dict[str, tuple[list[str] | str, list[argparse.Action]]] = {}
    for action in _options(parser):
        values = _values(action)
        if values is not None:
            found.setdefault(str(values), (values, []))[1].append(action)
    yield from found.values()


def _bash_reply(values: list[str] | str) -> str:
    if isinstance(values, list):
        return f'COMPREPLY=($(compgen -W "{" ".join(values)}" -- "$cur")); return'
    if values == "":
        return "return"
    flag = "-d" if values == "folder" else "-f"
    return f'mapfile -t COMPREPLY < <(compgen {flag} -- "$cur"); return'


# ---- zsh ------------------------------------------------------------------------------------------------------------


def _zsh(commands: Parsers, options: Iterable[str]) -> str:
    lines = ["#compdef writesae", "# Completions of writesae for zsh, made by: writesae completion zsh", "",
             "_writesae() {", "    local line state", "    local -a commands", "    commands=("]  # fmt: skip
    lines += [f"        '{name}:{_said(parser)}'" for name, parser in commands.items()]
    first = " ".join(f"'{option}'" for option in options)
    lines += [
        "    )", f"    _arguments -C {first} '1:command:->command' '*::argument:->argument'", "    case $state in",
        "        command) _describe command commands ;;", "        argument) case $line[1] in",
    ]  # fmt: skip
    for name, parser in commands.items():
        specs = []
        for action in _options(parser):
            values = _values(action)
            value = "" if values is None else f":{action.dest}:{_zsh_values(values)}"
            specs += [f"'*{option}[{_help(action)}]{value}'" for option in action.option_strings]
        specs.append(f"'*:argument:{_zsh_values(_positional(parser))}'")
        lines.append(
            f"            {name}) _arguments \\\n                " + " \\\n                ".join(specs) + " ;;"
        )
    return "\n".join([*lines, "        esac ;;", "    esac", "}", "",
                      'if [[ $funcstack[1] == _writesae ]]; then _writesae "$@"; else compdef _writesae writesae; fi',
                      ""])  # fmt: skip


def _zsh_values(values: list[str] | str) -> str:
    if isinstance(values, list):
        return f"({' '.join(values)})"
    return {"folder": "_files -/", "path": "_files"}.get(values, " ")


# ---- fish -----------------------------------------------------------------------------------------------------------


def _fish(commands: Parsers, options: Iterable[str]) -> str:
    lines = ["# Completions of writesae for fish, made by: writesae completion fish", "complete -c writesae -f"]
    none = "__fish_use_subcommand"
    lines += [f"complete -c writesae -n {none} -l {option.removeprefix('--')}"
              for option in options if option.startswith("--")]  # fmt: skip
    for name, parser in commands.items():
        lines.append(f"complete -c writesae -n {none} -a {name} -d '{_said(parser)}'")
    for name, parser in commands.items():
        here = f"complete -c writesae -n '__fish_seen_subcommand_from {name}'"
        positional = _positional(parser)
        if positional:
            lines.append(f"{here} {_fish_values(positional).replace('-x ', '')}")
        for action in _options(parser):
            names = " ".join(f"-{'l' if option.startswith('--') else 's'} {option.lstrip('-')}"
                             for option in action.option_strings)  # fmt: skip
            values = _values(action)
            takes = "" if values is None else f" {_fish_values(values)}"
            lines.append(f"{here} {names}{takes} -d '{_help(action)}'")
    return "\n".join([*lines, ""])


def _fish_values(values: list[str] | str) -> str:
    if isinstance(values, list):
        return f"-x -a '{' '.join(values)}'"
    return {"folder": "-x -a '(__fish_complete_directories)'", "path": "-F"}.get(values, "-x")


SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
