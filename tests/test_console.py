"""How the command speaks: to a terminal and to a pipe, of mistakes, of what comes next; and how shells complete it."""

from __future__ import annotations

import io
import re
import shutil
import string
import subprocess
import sys
from argparse import Namespace

import pytest

from writesae import cli, completion, console, info
from writesae.progress import tqdm

ESCAPE = "\x1b["


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Called, makes standard output and error a terminal of 60 columns, and returns it."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")

    def make():  # in the test: pytest sets its own before
        made = Terminal()
        monkeypatch.setattr(sys, "stdout", made)
        monkeypatch.setattr(sys, "stderr", made)
        return made

    return make


ROWS = [("L2H5", "states", 4096, None, "0.3400"), ("L\x1b[31m9H4", "writes", 12, 4.5, "1.2")]
COLUMNS = ("dictionary", "of", "atoms", "L0", "FVU")


def test_a_table_for_a_pipe_is_plain_and_aligned(capsys):
    console.table(COLUMNS, ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(COLUMNS) and lines[1].split() == ["L2H5", "states", "4096", "0.3400"]
    assert lines[0].index("atoms") + len("atoms") == lines[1].index("4096") + 4 and ESCAPE not in "".join(lines)
    assert not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize("width", [44, 200])
def test_a_table_on_a_terminal_fits_and_says_all(terminal, monkeypatch, width):
    screen = terminal()
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    console.table(COLUMNS, ROWS)
    text = re.sub(r"\x1b\[\d+m", "", screen.getvalue())
    assert max(map(len, text.splitlines())) <= width and "\x1b[3" not in screen.getvalue()
    assert "4096" in text and "0.3400" in text  # whatever is cut, no number is


def test_colour_is_for_terminals_that_want_it(terminal, monkeypatch):
    screen = terminal()
    console.error("writesae info", "k: expected [1, 2], got [red]0[/red]\x1b]0;owned\x07")
    said = screen.getvalue()
    assert said.startswith(ESCAPE) and "expected [1, 2], got [red]0[/red]" in said and "\x1b]" not in said
    monkeypatch.setenv("NO_COLOR", "1")
    screen = terminal()
    console.next_step("writesae browse " + "x" * 100)
    assert "\x1b[3" not in screen.getvalue() and screen.getvalue().count("\n") == 1  # a line that can be copied whole


def test_help_is_marked_on_a_terminal_and_says_the_same(terminal, monkeypatch, capsys):
    screen = terminal()
    cli.main([])
    marked = screen.getvalue()
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", "60")
    cli.main([])
    plain = capsys.readouterr().out
    assert ESCAPE in marked and ESCAPE not in plain
    assert "".join(part.partition("m")[2] for part in f"m{marked}".split(ESCAPE)) == plain


def test_help_lists_every_command_once_and_by_group():
    assert {command.group for command in cli.COMMANDS.values()} == set(cli.GROUPS)
    text = cli.parser().format_help()
    for title in cli.GROUPS.values():
        assert f"\n{title}:\n" in text
    for name in cli.COMMANDS:
        assert text.count(f"\n  {name} ") == 1
    assert "Exit status: 0 done, 1 failed, 2" in text


@pytest.mark.parametrize(
    "words, said",
    [
        (["colect", "x"], "writesae: COMMAND: expected one of info, ; did you mean collect?"),
        (["report", "x", "--oot", "y"], "writesae report: expected one of its options, got --oot; did you mean --out?"),
        (["report", "--zzzz"], "writesae report: expected one of its options, got --zzzz ("),
        (["--verison"], "writesae: expected one of its options, got --verison; did you mean --version?"),
        (["pull", "x", "--revison=main"], "got --revison; did you mean --revision?"),
        (["completion", "fsh"], "shell: expected one of bash, zsh, fish, got 'fsh'; did you mean fish?"),
        (["bench", "--repeats", "two"], "--repeats: expected a whole number, got 'two'"),
        (["report"], "writesae report: the following arguments are required: RUN"),
    ],
)  # fmt: skip
def test_a_mistyped_word_is_answered_in_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and err.count("\n") == 1 and "--help explains it" in err
    for part in said.split(", ;"):
        assert part.strip() in err


def test_an_option_may_be_short_and_a_value_anything(monkeypatch):
    monkeypatch.setattr(info, "run", lambda args: int(not args.json))
    assert cli.main(["info", "--js"]) == 0
    assert cli.parser("report").parse_args(["report", "--out=--x", "--", "--y"]).run == "--y"


def test_errors_come_without_a_traceback_unless_asked_for(monkeypatch, capsys):
    def run(args):
        raise RuntimeError("it broke\nin two lines")

    monkeypatch.setattr(info, "run", run)
    assert cli.main(["info"]) == 1
    err = capsys.readouterr().err
    assert err == "writesae info: RuntimeError: it broke (--debug shows where)\n"
    for words in (["--debug", "info"], ["info", "--debug"]):
        assert cli.main(words) == 1
        err = capsys.readouterr().err
        assert "Traceback" in err and "in run" in err and "writesae info: RuntimeError: it broke" in err


# ---- what comes next ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_ends_with_what_to_look_at_next(name):
    """Each step is a command with options that there are, or a page to open, and is told for the command's example."""
    command = cli.COMMANDS[name]
    if name == "completion":  # what it prints is a script
        assert not command.then
        return
    given = vars(cli.parser(name).parse_args(command.example.replace("'", "").split()[1:]))
    step = cli.then(command, given)
    assert step is not None and "{" not in step and step.split()[0] in ("writesae", "open", "see")
    for template in command.then:
        words = template.split()
        for _, field, _, _ in string.Formatter().parse(template):
            assert field is None or field in given, template
        if words[0] == "writesae":
            known = cli.parser(words[1]).commands.choices[words[1]]._option_string_actions
            assert {word for word in words if word.startswith("--")} <= set(known), template


def test_the_next_step_is_told_apart_from_what_is_for_programs(monkeypatch, capsys):
    monkeypatch.setattr(info, "run", lambda args: print("{}") or 0)
    assert cli.main(["info"]) == 0
    assert capsys.readouterr() == ("{}\n", "next: writesae demo\n")
    assert cli.main(["info", "--json"]) == 0
    assert capsys.readouterr() == ("{}\n", "")
    monkeypatch.setattr(info, "run", lambda args: 1)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr() == ("", "")


def test_a_folder_of_two_words_can_be_copied():
    command = cli.COMMANDS["train"]
    assert cli.then(command, {"out": "my runs/$x"}) == "writesae report 'my runs/$x'"
    assert cli.then(cli.COMMANDS["pull"], {"out": None, "repo": "a/b"}) == "writesae pull a/b --out runs/pulled"
    assert cli.then(cli.Command("m", "s", "w", "e", then=("open {out}",)), {"out": None}) is None


# ---- progress -------------------------------------------------------------------------------------------------------


def test_in_a_log_a_bar_is_lines():
    log = io.StringIO()
    with tqdm(total=3, desc="training", file=log) as bar:
        for _ in range(3):
            bar.update()
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and lines[-1].startswith("training: 100%") and len(lines) == 2
    left = io.StringIO()
    with tqdm(total=3, desc="tokens", file=left, leave=False) as bar:
        bar.update(3)
    assert len(left.getvalue().splitlines()) == 1
    assert not tqdm(disable=True, file=log).close()


def test_on_a_terminal_a_bar_is_drawn_over():
    screen = Terminal()
    with tqdm(total=3, desc="training", file=screen, mininterval=0) as bar:
        bar.update(3)
    assert screen.getvalue().count("\r") >= 2 and "100%" in screen.getvalue()


# ---- completions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scripts():
    args = cli.parser("*").parse_args(["completion", "bash"])
    return {shell: make(args.commands, args.options) for shell, make in completion.SCRIPTS.items()}


def test_completions_in_bash(scripts, tmp_path):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    (tmp_path / "script").write_text(scripts["bash"])
    (tmp_path / "some folder").mkdir()
    (tmp_path / "some.txt").touch()
    asked = {
        "writesae col": "collect", "writesae collect --mod": "--mode --model", "writesae collect --mode t": "top",
        "writesae collect x --out so": "some folder", "writesae report so": "some folder|some.txt",
        "writesae completion ": "bash|zsh|fish", "writesae --debug rep": "replace|report",
        "writesae collect --max-tokens ": "",
    }  # fmt: skip
    code = ["source ./script"]
    for line in asked:
        words = line.split(" ")
        code += [f"COMP_WORDS=({' '.join(repr(word) for word in words)}) COMP_CWORD={len(words) - 1}", "_writesae",
                 "IFS='|'; echo \"${COMPREPLY[*]}\"; unset IFS"]  # fmt: skip
    done = subprocess.run([bash, "-c", "\n".join(code)], capture_output=True, text=True, cwd=tmp_path)
    assert not done.stderr and done.returncode == 0
    for (line, expected), found in zip(asked.items(), done.stdout.split("\n"), strict=False):
        expected = expected.replace(" --", "|--")
        assert sorted(found.split("|")) == sorted(expected.split("|")), line


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_their_scripts(scripts, shell, tmp_path):
    program = shutil.which(shell)
    for name, parser in cli.parser("*").commands.choices.items():
        assert name in scripts[shell]
        for option in parser._option_string_actions:
            assert option.lstrip("-") in scripts[shell]
    if program is None:
        pytest.skip(f"no {shell} to read the script")
    (tmp_path / "script").write_text(scripts[shell])
    done = subprocess.run([program, "-n", str(tmp_path / "script")], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_a_script_is_printed(capsys):
    assert completion.run(Namespace(shell="fish", commands={}, options=["--version"])) == 0
    assert "complete -c writesae" in capsys.readouterr().out
