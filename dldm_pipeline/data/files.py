"""Files and folders that are there complete or not at all: written under a temporary name, then renamed."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file


def _temporary(path: Path) -> Path:
    """A hidden name beside `path` that nothing else uses."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.partial")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path to write a file to; it is renamed to `path` when the block ends, and deleted on an error.

    Args:
        path (`str` or `os.PathLike`): File to write; missing folders are made, an older file is replaced.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file, see [`atomic_write`]."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_arrays(path: str | os.PathLike, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write named arrays as a safetensors file, see [`atomic_write`].

    Args:
        path (`str` or `os.PathLike`): File to write.
        arrays (`dict[str, np.ndarray]`): Name to array.
        metadata (`dict[str, str]`): Name to text, stored in the file's header.
    """
    with atomic_write(path) as temporary:
        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, temporary, metadata=metadata)


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray] | None:
    """Read what [`write_arrays`] wrote; `None` if the file does not exist or is damaged: compute the arrays anew then."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


@contextlib.contextmanager
def new_folder(output: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside `output` to write into; it is renamed to `output` when the block ends.

    It is deleted on an error, and `output` is then as it was before.

    Args:
        output (`str` or `os.PathLike`): Folder to create; it must not exist, or be empty.
        overwrite (`bool`, *optional*, defaults to `False`): Replace what is in `output`, once the new folder is complete.

    Raises:
        FileExistsError: If `output` is a file, or a folder with something in it and not to be overwritten.
        OSError: With a message that names `output`, if it cannot be written or the disk is full.
    """
    output = Path(output).resolve()  # where a link leads
    if output.exists() and (not output.is_dir() or (not overwrite and any(output.iterdir()))):
        raise FileExistsError(f"{output} already exists and is not an empty folder; delete it or name another output.")
    if output.is_mount():
        raise FileExistsError(
            f"{output} is a mount point, which cannot be replaced as a whole; name a folder inside it."
        )
    folder = _temporary(output)
    try:
        folder.mkdir(parents=True)
        yield folder
        if output.exists():
            old = _temporary(output)
            output.rename(old)
            folder.rename(output)
            shutil.rmtree(old)
        else:
            folder.rename(output)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            reason = f"the disk is full: could not finish {output}; nothing of it was kept. Free space and run again"
            raise OSError(errno.ENOSPC, reason) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            reason = f"cannot write {output} ({error.strerror}); name an output folder you may write to"
            raise OSError(error.errno, reason) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
