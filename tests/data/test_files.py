"""Files and folders that are there complete or not at all."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from dldm_pipeline.data.files import atomic_write, new_folder, read_arrays, write_arrays, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "old ä")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), atomic_write(tmp_path / "new" / "a.txt") as temporary:
            temporary.write_text("half")
            assert temporary.parent == tmp_path / "new" and temporary.name.startswith(".")
            raise error
        assert names(tmp_path) == ["new", "new/a.txt"]
    assert (tmp_path / "new" / "a.txt").read_bytes() == "old ä".encode()
    write_text(tmp_path / "new" / "a.txt", "new")
    assert (tmp_path / "new" / "a.txt").read_text() == "new" and names(tmp_path) == ["new", "new/a.txt"]


def test_arrays_come_back_and_damaged_ones_are_none(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.zeros((0, 2), np.uint8)}
    write_arrays(tmp_path / "x.safetensors", arrays, {"made by": "a test"})
    back = read_arrays(tmp_path / "x.safetensors")
    assert set(back) == {"a", "b"} and back["b"].dtype == np.uint8
    assert all(np.array_equal(back[key], arrays[key]) for key in arrays)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert b"made by" in content
    (tmp_path / "x.safetensors").write_bytes(content[:-3])
    assert read_arrays(tmp_path / "x.safetensors") is None and read_arrays(tmp_path / "none") is None


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "an older folder"])
def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path, before: str) -> None:
    out = tmp_path / "below" / "out"
    if before != "nothing":
        out.mkdir(parents=True)
    if before == "an older folder":
        (out / "old.txt").write_text("")
    kept = names(out) if out.exists() else None
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), new_folder(out, overwrite=before == "an older folder") as folder:
            (folder / "new.txt").write_text("")
            assert (names(out) if out.exists() else None) == kept
            raise error
        assert (names(out) if out.exists() else None) == kept
        assert [path.name for path in out.parent.iterdir()] == ["out"] * out.exists()
    with new_folder(out, overwrite=before == "an older folder") as folder:
        (folder / "new.txt").write_text("")
    assert names(tmp_path) == ["below", "below/out", "below/out/new.txt"]
    assert out.stat().st_mode & 0o777 == out.parent.stat().st_mode & 0o777


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    for path, overwrite in ((tmp_path / "out", False), (tmp_path / "out" / "mine.txt", True)):
        with (
            pytest.raises(FileExistsError, match=f"{path} already exists .* delete it or name another output"),
            new_folder(path, overwrite),
        ):
            raise AssertionError
    assert names(tmp_path) == ["out", "out/mine.txt"]


def test_messages_of_the_system_name_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir(mode=0o500)
    for path, error, message in (
        (tmp_path / "out", errno.ENOSPC, "the disk is full: could not finish .*out; nothing of it was kept"),
        (tmp_path / "out", errno.EROFS, "cannot write .*out .*; name an output folder you may write to"),
        (tmp_path / "file" / "out", 0, "cannot write .*file/out .*; name an output folder you may write to"),
        (tmp_path / "closed" / "out", errno.EACCES, "cannot write .*closed/out .*ermission"),  # root may write there
    ):
        with pytest.raises(OSError, match=message), new_folder(path):
            raise OSError(error, os.strerror(error))
    assert names(tmp_path) == ["closed", "file"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_mount_point_is_refused_before_the_work():
    with pytest.raises(OSError, match="/proc.*"), new_folder("/proc"):
        pytest.fail("the work began")
