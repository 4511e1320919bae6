"""Files that appear when they are whole: every file that a command writes goes through here."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from .errors import SeqmixError


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A new, empty file beside `file`, which takes its place when the block ends; after an error it is deleted.

    It is created exclusively, so that a link of its name is not followed, flushed to disk before it is renamed, and has
    the permissions that the umask leaves, whoever writes to it.

    Raises:
        OSError: it cannot be created, or take the place.
    """
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        mode = os.fstat(handle).st_mode
        os.close(handle)
        yield partial
        os.chmod(partial, mode)  # a library may have put a file of its own there
        flush(partial)
        partial.replace(file)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_file(content: str | bytes, file: Path) -> Path:
    """Write a file, and its folder, whole or not at all; a pipe or device, such as /dev/stdout, in its place.

    Raises:
        SeqmixError: it cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        in_place = file.exists() and (not file.is_file() or file.parent == Path("/dev"))
        with nullcontext(file) if in_place else replacing(file) as partial:
            partial.write_bytes(content)
    except OSError as error:
        reason = f"{file.parent} is not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise SeqmixError(f"{file} cannot be written: {reason}") from error
    return file


def read_bytes(file: Path) -> bytes:
    """The content of a file that another file names; a pipe or a device is refused, as reading it may never end.

    Raises:
        OSError: it cannot be read.
    """
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(file))
    return file.read_bytes()


def flush(path: Path) -> None:
    """Flush a file or folder to disk (fsync): what is renamed must not outlive its contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
