"""Files appear whole or not at all, with the permissions of any new file."""

import os

import pytest

from memcircuits.base.errors import InputError
from memcircuits.base.io import atomic_file, atomic_folder, write_atomically, write_if_absent


def permissions(path):
    return path.stat().st_mode & 0o777


def write_half(context, name):
    with context as temporary:
        path = temporary / name if temporary.is_dir() else temporary
        path.write_text("half")
        raise RuntimeError("no space left")


@pytest.fixture(autouse=True)
def _private_umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.parametrize("data", ["naïve\n", b"\x00\xff"])
def test_a_file_holds_exactly_what_was_written(tmp_path, data):
    path = write_atomically(tmp_path / "new" / "file", data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert permissions(path) == 0o640
    write_atomically(path, "again")
    assert path.read_text() == "again"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_not_overwritten_by_a_file(tmp_path):
    with pytest.raises(InputError, match="it is a folder"):
        write_atomically(tmp_path, "text")


def test_of_several_writers_the_first_one_counts(tmp_path):
    write_if_absent(tmp_path / "file", "first")
    write_if_absent(tmp_path / "file", "second")
    assert (tmp_path / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_older_file_as_it_was(tmp_path):
    path = write_atomically(tmp_path / "file", "older")
    with pytest.raises(RuntimeError, match="no space left"):
        write_half(atomic_file(path), "file")
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_library_may_replace_the_temporary_file_by_one_that_nobody_else_may_read(tmp_path):
    path = tmp_path / "file"
    with atomic_file(path) as temporary:
        temporary.unlink()
        temporary.touch(mode=0o600)
    assert permissions(path) == 0o640


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(RuntimeError, match="no space left"):
        write_half(atomic_folder(folder), "weights")
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()  # an empty one is replaced
    with atomic_folder(folder) as temporary:
        (temporary / "weights").touch(mode=0o600)
        (temporary / "part").mkdir(mode=0o700)
        assert not list(folder.iterdir())
    assert [permissions(path) for path in (folder, folder / "weights", folder / "part")] == [
        0o750,
        0o640,
        0o750,
    ]
    assert list(tmp_path.iterdir()) == [folder]
