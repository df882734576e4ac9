"""`writesae.files`: whole or not at all, for files and for folders."""

from __future__ import annotations

import os

import pytest

from writesae.files import discard_left_over, left_over, sha256, whole_file, whole_folder, write_first, write_json


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_json_without_a_meaning_leaves_what_stood_there(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n  "a": 1\n}\n' and names(tmp_path) == ["x.json"]
    write_json(path, [float("nan")], indent=None, allow_nan=True)
    assert path.read_text() == "[NaN]\n"


def test_left_over_files(tmp_path):
    """Of a process that died within `whole_file`: known, and removed; a user's own .tmp is neither."""
    child = os.fork()
    if not child:
        with whole_file(tmp_path / "a.b.json"):
            os._exit(0)
    os.waitpid(child, 0)
    (name,) = names(tmp_path)
    assert left_over(tmp_path / name) == tmp_path / "a.b.json"
    (tmp_path / "mine.tmp").touch()
    assert left_over(tmp_path / "mine.tmp") is None and left_over(tmp_path / "a.b.json") is None
    discard_left_over(tmp_path)
    discard_left_over(tmp_path / "nowhere")
    assert names(tmp_path) == ["mine.tmp"]


def test_of_many_who_write_at_once_one_does(tmp_path):
    """Each its own content, in processes of their own; the loser's is nowhere, nor a temporary file."""
    path, readers = tmp_path / "x.json", []
    for number in range(8):
        read, write = os.pipe()
        if not os.fork():
            os.write(write, b"%d" % write_first(path, str(number).encode()))
            os._exit(0)
        os.close(write)
        readers.append(read)
    first = [os.read(read, 1) == b"1" for read in readers]
    for _ in readers:
        os.wait()
    assert first.count(True) == 1 and path.read_text() == str(first.index(True)) and names(tmp_path) == ["x.json"]
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ValueError, match="is a symbolic link"):
        write_first(tmp_path / "link", b"other")


def test_a_folder_takes_the_place_of_another(tmp_path):
    path = tmp_path / "deep" / "folder"
    with whole_folder(path) as fresh:
        (fresh / "inner").mkdir()
        (fresh / "inner" / "first").write_text("1")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), whole_folder(path) as fresh:
        (fresh / "second").write_text("2")
        raise KeyboardInterrupt
    assert names(path) == ["inner"] and names(path.parent) == ["folder"]
    with whole_folder(path) as fresh:
        (fresh / "third").write_text("3")
    assert names(path) == ["third"] and names(path.parent) == ["folder"]
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ValueError, match="symbolic link"), whole_folder(tmp_path / "link"):
        pass
    assert names(path) == ["third"]


def test_a_folder_that_cannot_take_the_place_leaves_the_other(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    with whole_folder(path) as fresh:
        (fresh / "first").touch()
    replace = os.replace

    def fails(source, to):
        if source.name.endswith(".new"):
            raise OSError(5, "Input/output error")
        replace(source, to)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="Input/output"), whole_folder(path) as fresh:
        (fresh / "second").touch()
    assert names(tmp_path) == ["folder"] and names(path) == ["first"]


@pytest.mark.parametrize("size", [None, 0, 1, 2**20, 2**20 + 5])
def test_a_digest_of_the_beginning(tmp_path, size):
    whole = bytes(range(256)) * 4097
    (tmp_path / "whole").write_bytes(whole)
    (tmp_path / "beginning").write_bytes(whole[:size])
    assert sha256(tmp_path / "whole", size=size) == sha256(tmp_path / "beginning")
