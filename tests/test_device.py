"""Hooked models on a device, without one: device_cases.py in a process of its own, which the simulated device marks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def test_hooked_models_on_a_device():
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / "device_cases.py")]
    environment = {**os.environ, "PYTHONPATH": f"{folder.parent}{os.pathsep}{folder}"}
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stdout[-8000:] + out.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", out.stdout)[1]) >= 12 and "skipped" not in out.stdout
