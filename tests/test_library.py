"""Where the compiled libraries are looked for, and what is said of those that cannot be used."""

from __future__ import annotations

import sys

import pytest
import torch

import writesae
from writesae import _library


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package of CUDA kernels of some version, as if it had been installed, beside no library of our own."""

    def install(version: str, library: bytes | None = b"no library") -> None:
        folder = tmp_path / "site" / "writesae_cuda"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(f"__version__ = {version!r}\n")
        if library is not None:
            (folder / "_C_cuda.abi3.so").write_bytes(library)
        monkeypatch.syspath_prepend(str(folder.parent))

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(_library, "_FOLDER", tmp_path / "empty")
    monkeypatch.setattr(_library, "CPU_ERROR", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delitem(sys.modules, "writesae_cuda", raising=False)
    yield install
    sys.modules.pop("writesae_cuda", None)


def test_without_the_package_its_name_is_said(package):
    assert _library._load_cuda() == (
        f"not installed: pip install writesae-cuda13=={writesae.__version__}, or build it where nvcc is: "
        "WRITESAE_CUDA=1 pip install ."
    )


def test_a_package_of_another_version_is_refused(package):
    package("9.9")
    error = _library._load_cuda()
    assert f"expected version {writesae.__version__}, as writesae has, got 9.9" in error
    assert f"pip install writesae-cuda13=={writesae.__version__}" in error


def test_the_package_is_loaded_where_it_lies(package, tmp_path):
    package(writesae.__version__)
    error = _library._load_cuda()
    assert error.startswith("built, but did not load") and str(tmp_path / "site" / "writesae_cuda") in error


def test_a_package_without_its_library(package):
    package(writesae.__version__, None)
    assert "no _C_cuda*.so in" in _library._load_cuda()


def test_a_library_built_here_comes_first(package, tmp_path):
    package("9.9")
    (tmp_path / "empty" / "_C_cuda.abi3.so").write_bytes(b"")
    assert str(tmp_path / "empty") in _library._load_cuda()


def test_torch_without_cuda_is_told(package, monkeypatch):
    package(writesae.__version__)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch" in _library._load_cuda() and "has no CUDA" in _library._load_cuda()
