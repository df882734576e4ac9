"""What a user meets at the shell: complete help, `python -m writesae`, mistakes in one line, `writesae info`."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from writesae import cli, info, ops
from writesae.models import versions

ROOT = Path(__file__).parents[1]
# Options of which one must be given, so that none has a default.
ALTERNATIVES = {("train", "layer"), ("train", "head"), ("train", "site"), ("collect", "corpus"), ("collect", "dataset"),
                ("train", "dataset"), ("replace", "dataset"), ("train", "tokens"),
                ("loss-recovered", "dataset"), ("audit", "dataset")}  # fmt: skip


def subparsers() -> dict[str, argparse.ArgumentParser]:
    actions = cli.parser("*")._actions
    return next(a for a in actions if isinstance(a, argparse._SubParsersAction)).choices


PARSERS = subparsers()
OPTIONS = [
    pytest.param(name, action, id=f"{name}-{action.dest}")
    for name, sub in PARSERS.items()
    for action in sub._actions
    if action.dest != "help"
]


@pytest.mark.parametrize("name, action", OPTIONS)
def test_every_option_says_what_it_is_and_its_default(name, action):
    assert action.help and action.help[0].islower(), "a help text, without a capital like all others"
    shown = PARSERS[name]._get_formatter()._expand_help(action)
    takes_value = action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction)
    if takes_value and not action.required and (name, action.dest) not in ALTERNATIVES and action.dest != "run":
        assert "default" in shown, f"no default in {shown!r}"
    assert "(default: None)" not in shown and "(default: False)" not in shown and "(default: )" not in shown
    bare = (
        "seed",
        "text_seed",
        "layer",
        "head",
        "k",
        "rank",
        "atom_rank",
        "world_size",
        "lr",
        "lr_end",
        "aux",
        "penalty",
    )
    if action.type in (int, float) and action.dest not in bare:
        units = "tokens|passages|firings|atoms|steps|states|rounds|threads|times|bytes"
        assert re.search(units, shown), f"no unit in {shown!r}"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_says_what_it_does_and_writes_with_an_example(name):
    text = " ".join(PARSERS[name].format_help().split())
    command = cli.COMMANDS[name]
    assert f"{command.summary[0].upper()}{command.summary[1:]}." in text
    assert "rites" in command.writes and command.writes in text
    assert f"example: {command.example}" in text
    assert cli.parser("*").parse_args(command.example.replace("'", "").split()[1:]).command == name


@pytest.mark.parametrize("arguments", [["--help"], [], *[[name, "--help"] for name in cli.COMMANDS]])
def test_help_is_for_users(arguments, capsys):
    """No developer's docstring, no Python names, and the same as `writesae`'s."""
    try:
        cli.main(arguments)
    except SystemExit as done:
        assert done.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: writesae")
    for word in ("configure(", "run(args", "subcommand lives", "docstring", "argparse"):
        assert word not in text


def test_python_m_runs_the_command(tmp_path):
    command = [sys.executable, "-m", "writesae", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, "0.1.0")
    done = subprocess.run(command[:-1] + ["report", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("writesae report: ")


@pytest.mark.parametrize(
    "error, status",
    [
        (ValueError("k: expected an integer >= 1, got 0"), 2),
        (FileNotFoundError(2, "No such file or directory", "x"), 2),
        (NotADirectoryError(20, "Not a directory", "x"), 2),
        (PermissionError(13, "Permission denied", "x"), 2),
        (ImportError("matplotlib is needed: pip install writesae[experiments]"), 2),
        (OSError(28, "No space left on device"), 1),
        (BrokenPipeError(32, "Broken pipe"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else x,
)
def test_a_mistake_is_one_line(monkeypatch, capsys, error, status):
    def run(args):
        raise error

    monkeypatch.setattr(info, "run", run)
    assert cli.main(["info"]) == status
    out, err = capsys.readouterr()
    assert not out and err.startswith("writesae info: ") and err.count("\n") == 1


def test_info_says_what_is_tested_and_what_an_extra_lacks(monkeypatch, capsys):
    monkeypatch.setattr(info, "version_of", lambda name: None if name == "pandas" else "1.0")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "pandas (not installed)" in text and "pip install 'writesae[pandas]'" in text
    assert versions.TESTED[0] in text and versions.TESTED[-1] in text
    assert cli.main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["transformers"]["tested"] == list(versions.TESTED)
    assert set(told["extras"]) >= {"jinja2", "pandas", "datasets", "matplotlib"}


def test_info_lists_the_write_rules(capsys):
    """With what of them has kernels, as each op declares it."""
    assert cli.main(["info"]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("rule ")]
    assert [x.split()[1].removesuffix(":") for x in lines] == list(ops.RULES)
    assert "channel gate" in lines[0] and "kernels: cpu" in lines[0]
    assert cli.main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["rules"]
    for name, rule in ops.RULES.items():
        assert told[name]["gates"] == list(rule.gates) and told[name]["transition"] == rule.transition
        assert told[name]["backends"]["reference"] == {"error": None, "gates": told[name]["gates"],
                                                       "gradient": told[name]["gates"]}  # fmt: skip
        assert ("gates" in told[name]["backends"]["cpu"]) == ("cpu" in rule.limits)
    assert info._kernels({"gates": ("element",), "backends": {"cpu": {"error": "no kernel"}}}) == "reference only"


@pytest.mark.parametrize(
    "release, inside",
    [("5.14.1", True), ("5.23.0", True), ("5.24.0", True), ("5.20", True), ("5.24.0.dev0", True), ("5.14.0", False),
     ("4.57.6", False), ("5.24.1", False), ("5.100.0", False), ("6", False)],
)  # fmt: skip
def test_the_tested_range(monkeypatch, release, inside):
    assert versions.in_range(release) is inside
    monkeypatch.setattr(versions, "version", lambda name: release)
    assert versions.remark().startswith(release) and ("than what is tested" in versions.remark()) is not inside


def test_info_answers_without_transformers(monkeypatch, capsys):
    def missing(name):
        raise versions.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", missing)
    assert cli.main(["info"]) == 0
    assert "transformers:      not installed; tested with" in capsys.readouterr().out


def test_the_cuda_kernels_are_built_only_when_asked(tmp_path):
    """setup.py finds an nvcc and leaves it alone; asked, it takes it. Nothing is compiled."""
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    for wanted, told in ((None, "the CPU kernels alone"), ("1", f"by {fake}")):
        given = {k: v for k, v in os.environ.items() if k not in ("WRITESAE_CUDA", "CUDA_HOME", "CUDA_PATH")}
        given["PATH"] = f"{tmp_path}{os.pathsep}{given['PATH']}"
        if wanted is not None:
            given["WRITESAE_CUDA"] = wanted
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "--name"], env=given, capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        assert told in done.stdout, done.stdout
        assert done.stdout.count("writesae: ") == 1
