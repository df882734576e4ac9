"""Fixtures every test file may use, and what the operators' tests run on."""

import host_twin
import pytest
import rules
import targets
import torch


def pytest_addoption(parser):
    parser.addoption("--twin", metavar="PATH", help="the CUDA kernels' host twin (scripts/build_twin.py): tested too")
    parser.addoption("--targets", metavar="NAMES", help="only these of cpu, twin, cuda, or of the names in test ids")


def pytest_configure(config):
    targets.setup(config.getoption("--twin"), config.getoption("--targets"))


def pytest_generate_tests(metafunc):
    for name, found in (
        ("target", targets.FEW), ("each_target", targets.ALL), ("device_target", targets.DEVICES),
    ):  # fmt: skip
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, found, ids=[x.name for x in found])
    cases = rules.cases(getattr(metafunc.module, "KIND", "all"), getattr(metafunc.module, "GRADIENT", False))
    for name, found in (
        ("case", cases), ("step_case", [case for case in cases if case.step]),
    ):  # fmt: skip
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, found, ids=[x.name for x in found])


@pytest.fixture(scope="session")
def twin(request):
    """The host twin's module (csrc/test/twin_module.cpp), where a twin was given."""
    if request.config.getoption("--twin") is None:
        pytest.skip("no host twin (--twin PATH)")
    return host_twin.module()


@pytest.fixture
def device_targets():
    """For tests that go through all of them themselves."""
    if not targets.DEVICES:
        pytest.skip("no host twin (--twin) and no GPU")
    return targets.DEVICES


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


@pytest.fixture(scope="module")
def one_thread():
    """Tensors of tiny models only lose time to threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nothing_stays():
    """Without gradients; afterwards nothing is installed on any model."""
    from writesae.models import patch

    with torch.no_grad():
        yield
    assert not patch.entries and not patch.patches, "something stayed installed"
