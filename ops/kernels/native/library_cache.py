"""The cache of compiled libraries: its folder, and which files in it may be loaded.

The folder is SEQMIX_CACHE_DIR, or seqmix/native in XDG_CACHE_HOME or ~/.cache.

Loading a library runs its code. The folder and its files must therefore belong to this user or to root, and nobody
else may write to them; nor to the folders above, up to the user's home folder, but for those with the sticky bit, such
as /tmp. These are the rules of ssh for its keys. A checksum beside a library reveals a damaged file.
"""

import hashlib
import os
import shutil
import stat
import tempfile
import time
from atexit import register
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

MAX_BYTES = 2**26
"""Maximum size of a library."""
BUILD_PREFIX = ".seqmix-build-"
"""Beginning of the names of folders in which compilers are at work."""
STALE_SECONDS = 3600
"""Age after which such a folder is left over from a killed process: longer than any compiler may run."""


def user_folder() -> Path:
    """Return the folder of the user's cache; it is created if it does not exist.

    Raises:
        OSError: the folder cannot be created, or others could write to it.
    """
    folder = Path(os.path.realpath(_named_folder()))
    home = _home()
    above_home = home.parents if home and folder.is_relative_to(home) else ()
    for path in (*reversed(folder.parents), folder):
        path.mkdir(0o755, exist_ok=True)
        if path not in above_home:
            _require_private(path, path.lstat(), may_be_sticky=path != folder)
    _remove_leftovers(folder)
    return folder


def _named_folder() -> Path:
    """Return the folder of the cache that the environment names; raise OSError if the user has no home."""
    if named := os.environ.get("SEQMIX_CACHE_DIR"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "seqmix", "native")
    except RuntimeError as error:
        raise FileNotFoundError("this user has no home folder") from error


@cache
def temporary_folder() -> Path:
    """Return a new folder that only this user can write; it is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="seqmix-"))
    register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def build_folder(folder: Path) -> Iterator[Path]:
    """Context of a temporary folder inside a cache, to compile a library that `store` then moves."""
    with tempfile.TemporaryDirectory(prefix=BUILD_PREFIX, dir=folder, ignore_cleanup_errors=True) as path:
        yield Path(path)


def store(library: Path, file: Path) -> None:
    """Move a library to its place in a cache, with its checksum."""
    checksum = library.with_suffix(".sha256")
    checksum.write_bytes(_checksum(library.read_bytes()))
    library.chmod(0o755)
    checksum.chmod(0o644)
    os.replace(library, file)
    os.replace(checksum, file.with_suffix(".sha256"))


def may_load(file: Path) -> bool:
    """True if a library is private and has the checksum beside it: loading a truncated one could crash the process."""
    try:
        return _checksum(_read_private(file)) == _read_private(file.with_suffix(".sha256"))
    except OSError:
        return False


def _checksum(library: bytes) -> bytes:
    return hashlib.sha256(library).hexdigest().encode()


def _read_private(file: Path) -> bytes:
    """Return the contents of a regular file that only this user or root can write; raise OSError for any other."""
    with open(file, "rb", opener=_open_plainly) as opened:
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise OSError(f"{file} is not a library")
        _require_private(file, status)
        return opened.read(MAX_BYTES)


def _open_plainly(path: str, flags: int) -> int:
    """Open a file, but not the target of a link, and without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _require_private(path: Path, status: os.stat_result, *, may_be_sticky: bool = False) -> None:
    """Raise PermissionError if a file or folder belongs to another user, or another user can write to it."""
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{path} belongs to another user")
    if may_be_sticky and status.st_mode & stat.S_ISVTX:
        return
    by_group = status.st_mode & stat.S_IWGRP and not _is_private_group(status.st_gid)
    if by_group or status.st_mode & stat.S_IWOTH:
        raise PermissionError(f"other users can write to {path}")


def _is_private_group(group: int) -> bool:
    """True if a group has the name of this user and no other member, as many systems create one for every user."""
    import grp  # Windows has neither of these modules
    import pwd

    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
        name, _, _, members = grp.getgrgid(group)
    except KeyError:
        return False
    return name == user and set(members) <= {user}


def _home() -> Path | None:
    """Return the home folder of this user, which is not an environment variable."""
    import pwd

    try:
        return Path(os.path.realpath(pwd.getpwuid(os.geteuid()).pw_dir))
    except KeyError:
        return None


def _remove_leftovers(folder: Path) -> None:
    """Delete the build folders of processes that were killed."""
    oldest = time.time() - STALE_SECONDS
    for path in folder.glob(f"{BUILD_PREFIX}*"):
        with suppress(OSError):
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and status.st_mtime < oldest:
                shutil.rmtree(path)
