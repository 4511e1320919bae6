"""Files and folders that appear when they are whole: all that a command writes goes through here.

Each is written beside its place under the name .NAME.partial, flushed to disk, and renamed. What a killed process left
of it is deleted by the next process that writes there.
"""

import errno
import os
import re
import shutil
import signal
import stat
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from .errors import SeqmixError


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A new, empty file beside `file`, which takes its place when the block ends; after an error it is deleted.

    It is created exclusively, so that a link of its name is not followed, flushed to disk before it is renamed, and has
    the permissions that the umask leaves, whoever writes to it.

    Raises:
        OSError: it cannot be created, or take the place.
    """
    partial = _partial(file)
    _delete(partial)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with _deleted_after_error(partial):
        mode = os.fstat(handle).st_mode
        os.close(handle)
        yield partial
        os.chmod(partial, mode)  # a library may have put a file of its own there
        flush(partial)
        partial.replace(file)


@contextmanager
def replacing_all(files: Sequence[Path]) -> Iterator[list[Path]]:
    """`replacing` for files that belong together: all are flushed to disk before one appears, the last of them first.

    Raises:
        OSError: one cannot be created, or take its place.
    """
    with _deferring_signals(), ExitStack() as stack:
        partials = [stack.enter_context(replacing(file)) for file in files]
        yield partials
        for partial in partials[:-1]:
            flush(partial)
        with _delaying_signals():  # or some would appear, and others not
            stack.close()


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new, empty folder beside `folder`, which takes its place when the block ends; after an error it is deleted.

    All in it is flushed to disk before it is renamed. Of two processes that write the same folder, one is refused.

    Raises:
        SeqmixError: `folder` is not vacant, another process is writing it, or a file cannot be written.
    """
    try:
        place = folder.resolve()
        partial = _partial(place)
        if place == Path.cwd() or place.is_mount():
            what = "the current directory" if place == Path.cwd() else "a mount point"
            raise SeqmixError(f"{folder} is {what}, which cannot be replaced: name a new folder in it")
        place.parent.mkdir(parents=True, exist_ok=True)
        if partial.is_symlink() or partial.is_file():
            _delete(partial)
        partial.mkdir(exist_ok=True)
        with _locked(partial, folder), _deleted_after_error(partial):
            for left in partial.iterdir():
                _delete(left)
            yield partial
            for path in (*partial.rglob("*"), partial):
                flush(path)
            for left in place.iterdir() if is_vacant(place) and place.exists() else ():
                _delete(left)
            partial.rename(place)  # fails if somebody has written there meanwhile
            flush(place.parent)
    except OSError as error:
        raise SeqmixError(f"{folder} cannot be written: {error.strerror or error}") from error


def is_vacant(folder: Path, besides: Collection[str] = ()) -> bool:
    """True if nothing is there, or an empty folder: what killed processes left unfinished, and `besides`, do not count.

    Raises:
        OSError: the folder cannot be read.
    """
    if not folder.is_dir():
        return not folder.exists()
    names = (file.name for file in folder.iterdir())
    return all(name in besides or re.fullmatch(r"\..+\.partial", name) for name in names)


def was_unfinished(path: Path) -> bool:
    """True if a process that wrote a file or folder was killed."""
    return _partial(path).exists()


def _partial(path: Path) -> Path:
    """Where a file or folder is written until it is whole."""
    return path.with_name(f".{path.name}.partial")


def _delete(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _deleted_after_error(path: Path) -> Iterator[None]:
    """Delete a path after an error in the block; also before SIGTERM or SIGHUP ends the process."""
    with _deferring_signals():
        try:
            yield
        except BaseException:
            with suppress(OSError):
                _delete(path)
            raise


class _Ended(BaseException):
    """Leaves the blocks of a process that a signal ends."""


@contextmanager
def _deferring_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP, where they would end the process at once, leave the block by an exception first."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    process = os.getpid()
    received = list[int]()

    def leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:  # a fork, which has nothing to delete
            signal.raise_signal(number)
        received.append(number)
        raise _Ended

    numbers = [number for number in _signals() if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        if received:
            signal.raise_signal(received[0])


@contextmanager
def _delaying_signals() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP wait for the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = list[int]()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *_signals())}
    before = {number: handler for number, handler in before.items() if handler is not None}  # another language's
    for number in before:
        signal.signal(number, lambda number, frame: received.append(number))  # noqa: ARG005
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


def _signals() -> list[signal.Signals]:
    """SIGTERM and SIGHUP, where the system has them."""
    return [number for number in signal.Signals if number.name in ("SIGTERM", "SIGHUP")]


@contextmanager
def _locked(partial: Path, folder: Path) -> Iterator[None]:
    """Lock what becomes a folder against other processes that write it."""
    handle = os.open(partial, os.O_RDONLY)
    try:
        if not try_lock(handle):
            raise SeqmixError(f"{folder} is being written by another process: wait until it ends")
        yield
    finally:
        os.close(handle)


def try_lock(file: IO[str] | int) -> bool:
    """Lock a file while it is open; false if another process holds the lock. True on systems without locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return True


def write_file(content: str | bytes, file: Path) -> Path:
    """Write a file, and its folder, whole or not at all; a pipe or device, such as /dev/stdout, in its place.

    Raises:
        SeqmixError: it cannot be written.
    """
    write_files({file: content})
    return file


def write_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write files that belong together as `write_file`, all or none.

    Raises:
        SeqmixError: one cannot be written.
    """
    file = Path()
    try:
        for file in contents:
            file.parent.mkdir(parents=True, exist_ok=True)
        in_place = [file for file in contents if file.exists() and (not file.is_file() or file.parent == Path("/dev"))]
        beside = [file for file in contents if file not in in_place]
        with replacing_all(beside) as partials:
            for file, place in zip((*beside, *in_place), (*partials, *in_place), strict=True):
                content = contents[file]
                place.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        file = Path(error.filename2 or file)
        reason = f"{file.parent} is not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise SeqmixError(f"{file} cannot be written: {reason}") from error


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
