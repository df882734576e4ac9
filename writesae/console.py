"""How commands speak: tables, one-line errors and hints; coloured on a terminal, plain and stable anywhere else.

A terminal is drawn on by rich, which follows NO_COLOR, TERM=dumb and the terminal's width. Into a pipe or file the same
words go as text, so that scripts read what people read. Control characters never pass: what is shown may come from a
stranger's folder, and an escape sequence would speak to the terminal.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TextIO

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NUMBER = re.compile(r"[-+−]?[\d,.]+(?:e[-+]?\d+)?(?: ?[%×])?|[–-]?")
_HEADING, _NAME, _COMMAND = "bold", "cyan", "bold cyan"


def clean(text: object) -> str:
    """Text without control characters, but line breaks and tabs."""
    return _CONTROL.sub("\ufffd", str(text))


def _rich(stream: TextIO | None):
    """A rich console for a terminal; None for anything else, and where rich is missing: `writesae info` must answer."""
    if stream is None or stream.closed or not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=stream, highlight=False)


def error(command: str, message: object) -> None:
    """`writesae collect: out: expected ...`, to standard error."""
    text, console = clean(message), _rich(sys.stderr)
    if console is None:
        print(f"{command}: {text}", file=sys.stderr)
        return
    from rich.text import Text

    console.print(Text.assemble((f"{command}:", "bold red"), " ", text), soft_wrap=True)


def next_step(step: str) -> None:
    """What to look at now, to standard error: what is printed for programs stays theirs."""
    step, console = clean(step), _rich(sys.stderr)
    if console is None:
        print(f"next: {step}", file=sys.stderr)
        return
    from rich.text import Text

    console.print(Text.assemble(("next: ", "dim"), (step, _COMMAND)), soft_wrap=True)


def help_text(text: str, stream: TextIO) -> None:
    """argparse's own text; on a terminal with its headings, options and commands marked."""
    console = _rich(stream)
    if console is None:
        stream.write(text)
        return
    from rich.text import Text

    marked = Text(text)
    marked.highlight_regex(r"(?m)^\S[^\n]*:$|^usage:|^example:", _HEADING)
    marked.highlight_regex(r"(?m)(?<=^  )[a-z][\w-]*(?=  |$)|(?<=^    )[a-z][\w-]*(?=  )", _NAME)
    marked.highlight_regex(r"(?<![\w-])--?[A-Za-z][\w-]*", _NAME)
    console.print(marked, soft_wrap=True, end="")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], stream: TextIO | None = None) -> None:
    """Rows under their columns' names, numbers to the right, to standard output.

    Args:
        columns: names. rows: one value each; None is left empty.
    """
    stream = stream or sys.stdout
    cells = [["" if x is None else clean(x).replace("\n", " ") for x in row] for row in rows]
    right = [all(_NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(columns))]
    console = _rich(stream)
    if console is None:
        every = [list(columns), *cells]
        widths = [max(len(row[i]) for row in every) for i in range(len(columns))]
        for row in every:
            parts = (x.rjust(w) if r else x.ljust(w) for x, w, r in zip(row, widths, right, strict=True))
            print("  ".join(parts).rstrip(), file=stream)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, header_style=_HEADING, pad_edge=False)
    for name, numbers in zip(columns, right, strict=True):
        drawn.add_column(Text(name), justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    for row in cells:
        drawn.add_row(*map(Text, row))
    console.print(drawn)
