"""Fixtures every test file may use."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    """Prints, by test file, the largest of the errors that tests recorded with `record_property(name, value)`."""
    worst: dict[str, dict[str, tuple[float, str]]] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            found = worst.setdefault(report.nodeid.split("::")[0], {})
            if name not in found or value > found[name][0]:
                found[name] = (value, report.nodeid.split("::")[1])
    for path, found in sorted(worst.items()):
        text = ", ".join(f"{name} {value:.1e} ({where})" for name, (value, where) in sorted(found.items()))
        terminalreporter.write_line(f"largest errors, {path}: {text}")
