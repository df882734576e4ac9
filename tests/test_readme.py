"""The README's example runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "tensor(" in capsys.readouterr().out


def test_every_command_named_exists():
    from writesae.cli import COMMANDS

    for name in re.findall(r"`writesae (\w+)`", (ROOT / "README.md").read_text()):
        assert name in COMMANDS
