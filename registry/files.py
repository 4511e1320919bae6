"""Atomic writes: a file or folder appears only when it is complete. Every command writes through these functions.

Each file or folder is written beside its place under the name .NAME.partial, flushed to disk, and renamed. If a process
is killed while writing, the next process that writes there deletes the partial file.
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

from .errors import DataError, SeqmixError


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a new, empty file that replaces `file` when the block ends; after an error it is deleted.

    The new file is created exclusively, so that an existing link of its name is not followed, and it is flushed to disk
    before it is renamed. Its permissions follow the umask, even if a library replaces the file inside the block.

    Raises:
        OSError: the new file cannot be created or renamed.
    """
    partial = _partial(file)
    _delete(partial)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with _deleted_after_error(partial):
        mode = os.fstat(handle).st_mode
        os.close(handle)
        yield partial
        os.chmod(partial, mode)  # a library may have replaced the file by its own
        flush(partial)
        partial.replace(file)


@contextmanager
def replacing_all(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Apply `replacing` to files that belong together: all are flushed to disk before the first is renamed.

    They are renamed in reverse order, the last file first.

    Raises:
        OSError: a new file cannot be created or renamed.
    """
    with _deferring_signals(), ExitStack() as stack:
        partials = [stack.enter_context(replacing(file)) for file in files]
        yield partials
        for partial in partials[:-1]:
            flush(partial)
        with _delaying_signals():  # a signal between two renames would leave some files old
            stack.close()


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new, empty folder that replaces `folder` when the block ends; after an error it is deleted.

    Its contents are flushed to disk before it is renamed. A second process that writes the same folder is refused.

    Raises:
        SeqmixError: `folder` is not vacant, another process is writing it, or a file cannot be written.
    """
    try:
        place = folder.resolve()
        partial = _partial(place)
        if place == Path.cwd() or place.is_mount():
            reason = "the current directory" if place == Path.cwd() else "a mount point"
            raise SeqmixError(f"{folder} is {reason}, which cannot be replaced: name a new folder in it")
        place.parent.mkdir(parents=True, exist_ok=True)
        if partial.is_symlink() or partial.is_file():
            _delete(partial)
        partial.mkdir(exist_ok=True)
        with _locked(partial, folder), _deleted_after_error(partial):
            for leftover in partial.iterdir():
                _delete(leftover)
            yield partial
            for path in (*partial.rglob("*"), partial):
                flush(path)
            for leftover in place.iterdir() if is_vacant(place) and place.exists() else ():
                _delete(leftover)
            partial.rename(place)  # fails if another process has written there meanwhile
            flush(place.parent)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}") from error


def is_vacant(folder: Path, besides: Collection[str] = ()) -> bool:
    """True if a folder is missing or empty, apart from the names in `besides` and partial files of killed processes.

    Raises:
        OSError: the folder cannot be read.
    """
    if not folder.is_dir():
        return not folder.exists()
    names = (file.name for file in folder.iterdir())
    return all(name in besides or re.fullmatch(r"\..+\.partial", name) for name in names)


def was_unfinished(path: Path) -> bool:
    """True if a process was killed while it wrote this file or folder."""
    return _partial(path).exists()


def _partial(path: Path) -> Path:
    """Return the path at which a file or folder is written until it is complete."""
    return path.with_name(f".{path.name}.partial")


def _delete(path: Path) -> None:
    """Delete a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _deleted_after_error(path: Path) -> Iterator[None]:
    """Delete a path after an error in the block, or before SIGTERM or SIGHUP ends the process."""
    with _deferring_signals():
        try:
            yield
        except BaseException:
            with suppress(OSError):
                _delete(path)
            raise


class _Ended(BaseException):
    """Exception raised in the blocks of `_deferring_signals` when a signal is about to end the process, to clean up."""


@contextmanager
def _deferring_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise an exception in the block before they end the process.

    Signals for which the program has its own handler are left alone.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    process = os.getpid()
    received = list[int]()

    def leave(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        signal.signal(signum, signal.SIG_DFL)
        if os.getpid() != process:  # a forked process has nothing to delete
            signal.raise_signal(signum)
        received.append(signum)
        raise _Ended

    deferred = [signum for signum in _signals() if signal.getsignal(signum) is signal.SIG_DFL]
    for signum in deferred:
        signal.signal(signum, leave)
    try:
        yield
    finally:
        for signum in deferred:
            signal.signal(signum, signal.SIG_DFL)
        if received:
            signal.raise_signal(received[0])


@contextmanager
def _delaying_signals() -> Iterator[None]:
    """Delay Ctrl-C, SIGTERM and SIGHUP until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = list[int]()
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, *_signals())}
    before = {signum: handler for signum, handler in before.items() if handler is not None}  # None: not set by Python
    for signum in before:
        signal.signal(signum, lambda signum, frame: received.append(signum))  # noqa: ARG005
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for signum in received:
            signal.raise_signal(signum)


def _signals() -> list[signal.Signals]:
    """Return the signals SIGTERM and SIGHUP, or those of the two that the operating system has."""
    return [signum for signum in signal.Signals if signum.name in ("SIGTERM", "SIGHUP")]


@contextmanager
def _locked(partial: Path, folder: Path) -> Iterator[None]:
    """Lock the partial folder, so that another process that writes `folder` is refused."""
    handle = os.open(partial, os.O_RDONLY)
    try:
        if not try_lock(handle):
            raise SeqmixError(f"{folder} is being written by another process: wait until it ends")
        yield
    finally:
        os.close(handle)


def try_lock(file: IO[str] | int) -> bool:
    """Lock a file until it is closed; return False if another process holds the lock, True on systems without locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return True


def is_locked(path: Path) -> bool | None:
    """True if a process has locked a file or folder (`try_lock`), False if none has, None on systems without locks."""
    with ExitStack() as stack:
        descriptors = list[int]()
        try:
            for _ in range(2):
                descriptors.append(os.open(path, os.O_RDONLY))
                stack.callback(os.close, descriptors[-1])
        except FileNotFoundError:
            return False
        except OSError:
            return None
        if not try_lock(descriptors[0]):
            return True
        return None if try_lock(descriptors[1]) else False  # only without locks is it free twice


def write_file(content: str | bytes, file: Path) -> Path:
    """Write a file atomically and return its path; missing folders are created.

    A pipe or device, such as /dev/stdout, is written in place.

    Raises:
        SeqmixError: the file cannot be written.
    """
    write_files({file: content})
    return file


def write_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write several files, given as contents by path, like `write_file`: all of them, or none if there is an error.

    Raises:
        SeqmixError: a file cannot be written.
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
        raise DataError(f"{file} cannot be written: {reason}") from error


def read_bytes(file: Path) -> bytes:
    """Return the content of a file; a pipe or device is refused, because reading it may never end.

    Raises:
        OSError: the file cannot be read.
    """
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is a pipe or device, not a file", str(file))
    return file.read_bytes()


def flush(path: Path) -> None:
    """Flush a file or folder to disk (fsync), so that a rename cannot reach the disk before the contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
