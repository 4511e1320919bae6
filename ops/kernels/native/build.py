"""Libraries of the C++ kernels: each is compiled when one of its kernels is first considered, and cached.

The first use of a source takes the compiler half a second to three seconds, and all ten together about 13; later
processes load the libraries from the cache (library_cache.py). The name of a library is a hash of the source, the
flags and the compiler. Processes that start at the same time compile the same library, each into its own file, and the
last one to finish replaces the files of the others.

    SEQMIX_NATIVE=0   turns the kernels off: `auto` chooses the reference
"""

import ctypes
import hashlib
import logging
import os
import platform
from functools import cache
from pathlib import Path

from ....registry import SeqmixError
from .compiler import compile_command, compile_library
from .library_cache import build_folder, may_load, store, temporary_folder, user_folder

SOURCES = Path(__file__).parent

log = logging.getLogger("seqmix")


def is_off() -> bool:
    """True if the environment turns native kernels off."""
    return os.environ.get("SEQMIX_NATIVE") == "0"


@cache
def failure(family: str) -> str | None:
    """Return the reason why the kernels of a family cannot run in this process, or None; the first call compiles them.

    The reason is logged once: without these kernels everything works, but slower.
    """
    try:
        library(family)
    except SeqmixError as error:
        _warn_once(
            f"native CPU kernels are off, so that some mixers are several times slower: {error}; "
            "set SEQMIX_NATIVE=0 to hide this warning"
        )
        return str(error)
    return None


@cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


@cache
def library(family: str) -> ctypes.CDLL:
    """Return the loaded library of a family; it is compiled unless the cache has it.

    Raises:
        SeqmixError: there is no compiler, or it fails; the message has the remedy.
    """
    if os.name != "posix":
        raise SeqmixError("they run on Linux and macOS only")
    command = compile_command()
    try:
        return _load([*command, "-fopenmp"], family)
    except SeqmixError:  # the compiler has no OpenMP, or another one than torch: the kernels then run in one thread
        return _load(command, family)


def _load(command: list[str], family: str) -> ctypes.CDLL:
    """Load the library that a command compiles, from the user's cache or else a temporary folder."""
    try:
        file = _provide(command, family, user_folder())
    except OSError as error:
        _warn_once(
            f"native CPU kernels are compiled into a temporary folder, and again in every process, because {error}; "
            "set SEQMIX_CACHE_DIR to a folder that only you can write"
        )
        try:
            file = _provide(command, family, temporary_folder())
        except OSError as error:
            raise SeqmixError(f"no folder for libraries can be written: {error}") from error
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise SeqmixError(f"{file} cannot be loaded: {error}; set CXX to another compiler") from error


def _provide(command: list[str], family: str, folder: Path) -> Path:
    """Return the library that a command compiles, in a folder; it is compiled unless the folder has it.

    Raises:
        SeqmixError: the compiler fails.
        OSError: the folder cannot be written.
    """
    source = SOURCES / f"{family}.cpp"
    file = folder / _library_name(command, source)
    if not may_load(file):
        with build_folder(folder) as workplace:
            store(compile_library(command, source, workplace), file)
    return file


def _library_name(command: list[str], source: Path) -> str:
    """Return the file name of a library, with a hash of everything that its contents depend on."""
    texts = [source.read_bytes(), (SOURCES / "common.h").read_bytes()]
    texts.append(os.fsencode(" ".join([*command, platform.system(), platform.machine()])))
    return f"{source.stem}-{hashlib.sha256(b'|'.join(texts)).hexdigest()[:20]}.so"
