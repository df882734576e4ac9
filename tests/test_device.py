"""Hooked models and training on a device, without one: each file of cases in a process of its own, which the simulated
device marks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {"device_cases": 15, "device_count_cases": 13, "device_firing_cases": 16, "device_training_cases": 8}


@pytest.mark.parametrize("name, cases", CASES.items())
def test_on_a_device(name, cases):
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / f"{name}.py")]
    environment = {**os.environ, "PYTHONPATH": f"{folder.parent}{os.pathsep}{folder}"}
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", out.stdout)[1]) >= cases and "skipped" not in out.stdout
