"""Compile the C++ kernels with the system's compiler, cache the libraries, and call their functions.

A source is compiled when one of its kernels is first considered, which takes less than a second, into the user's cache
folder: SEQMIX_CACHE_DIR, or seqmix/native in XDG_CACHE_HOME or ~/.cache; a temporary folder if that cannot be written.
The name of a library is a hash of the source, the flags and the compiler. A checksum beside it reveals a damaged
file, which is compiled again. Processes that start at the same time compile the same library, each into its own file,
and the last one to finish replaces the files of the others.

    CXX               the compiler; otherwise c++, g++ or clang++, whichever is found first
    SEQMIX_NATIVE=0   turns the kernels off: `auto` chooses the reference

-ffast-math is never set: a library that is linked with it makes the whole process flush denormal numbers, and sums
could be added in any order (where they may, a source says so: `#pragma omp simd reduction`). OpenMP is not linked:
torch has loaded its own, whose threads these kernels share.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from atexit import register
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ....registry import SeqmixError

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
"""Compilers that are looked for, in this order, if CXX is not set."""
BLOCK = 64
"""Channels of a task, as in common.h."""
COMPILER_TIMEOUT = 120
"""Seconds after which a compiler is stopped."""
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-ffp-contract=fast",
    "-fopenmp-simd",
)
VECTOR_FLAGS = {"AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"), "AVX2": ("-march=x86-64-v3",)}
"""Compiler flags for the vector instructions of an x86 processor, by torch's name for them. A library compiled with
them runs on every machine that has these instructions, so that machines may share a cache."""

log = logging.getLogger("seqmix")


def is_off() -> bool:
    """True if the environment turns native kernels off."""
    return os.environ.get("SEQMIX_NATIVE") == "0"


def compiler() -> list[str] | None:
    """Return the command of the compiler, which may have several words; None if there is none."""
    if named := os.environ.get("CXX", "").strip():
        try:
            command = shlex.split(named)
        except ValueError:  # a quote without an end
            return None
        return command if shutil.which(command[0]) else None
    return next(([found] for name in COMPILERS if (found := shutil.which(name))), None)


@cache
def failure(family: str) -> str | None:
    """Return the reason why the kernels of a family cannot run in this process, or None; the first call compiles them.

    The reason is logged once: without these kernels everything works, but slower.
    """
    try:
        library(family)
    except SeqmixError as error:
        _warn_once(str(error))
        return str(error)
    return None


@cache
def _warn_once(reason: str) -> None:
    log.warning(
        "native CPU kernels are off, so that some mixers are several times slower: %s; "
        "set SEQMIX_NATIVE=0 to hide this warning",
        reason,
    )


@cache
def library(family: str) -> ctypes.CDLL:
    """Return the loaded library of a family; it is compiled unless the cache has it.

    Raises:
        SeqmixError: there is no compiler, or it fails; the message has the remedy.
    """
    command = compiler()
    if command is None:
        named = os.environ.get("CXX")
        missing = f"the compiler CXX={named} was not found" if named else "no C++ compiler was found"
        raise SeqmixError(f"{missing}: install g++ or clang++, or set CXX")
    command += [*FLAGS, *VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())]
    try:
        return _load([*command, "-fopenmp"], family)
    except SeqmixError:  # the compiler has no OpenMP, or another one than torch: the kernels then run in one thread
        return _load(command, family)


def _load(command: list[str], family: str) -> ctypes.CDLL:
    """Load the library that a command compiles, from the first folder that has it or can be written."""
    name = _library_name(command, family)
    for folder in _folders():
        file = folder / name
        if not _is_whole(file):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _build(command, SOURCES / f"{family}.cpp", file)
            except OSError as error:
                log.debug("%s cannot be written: %s", folder, error)
                continue
        try:
            return ctypes.CDLL(str(file))
        except OSError as error:
            raise SeqmixError(f"{file} cannot be loaded: {error}; set CXX to another compiler") from error
    raise SeqmixError("no folder for libraries can be written: set SEQMIX_CACHE_DIR to a folder that can be written")


def _library_name(command: list[str], family: str) -> str:
    """Return the file name of a library, with a hash of everything that its contents depend on."""
    texts = [(SOURCES / name).read_bytes() for name in (f"{family}.cpp", "common.h")]
    texts.append(" ".join([*command, platform.system(), platform.machine()]).encode())
    return f"{family}-{hashlib.sha256(b'|'.join(texts)).hexdigest()[:20]}.so"


def _folders() -> Iterator[Path]:
    """Yield the folders to try: the user's cache, then a temporary folder of this process."""
    if named := os.environ.get("SEQMIX_CACHE_DIR"):
        yield Path(named)
    else:
        with suppress(RuntimeError):  # a user without a home
            yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqmix" / "native"
    yield _temporary()


@cache
def _temporary() -> Path:
    """Return a new folder that only this user can write; it is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="seqmix-"))
    register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_whole(file: Path) -> bool:
    """True if the file has the checksum beside it: loading a truncated library could crash the process."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() == file.with_suffix(".sha256").read_text()
    except OSError:
        return False


def _build(command: list[str], source: Path, file: Path) -> None:
    """Compile a source in a temporary folder, and move the library and its checksum to their places.

    Raises:
        SeqmixError: the compiler fails.
        OSError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        compiled, linked, checksum = (Path(folder) / f"library.{ending}" for ending in ("o", "so", "sha256"))
        _run_compiler([*command, "-c", str(source), "-o", str(compiled)], source)
        # -fopenmp would link the compiler's own OpenMP
        options = [word for word in command if word != "-fopenmp"]
        options += ["-Wl,-undefined,dynamic_lookup"] if platform.system() == "Darwin" else []
        _run_compiler([*options, "-shared", str(compiled), "-o", str(linked)], source)
        checksum.write_text(hashlib.sha256(linked.read_bytes()).hexdigest())
        os.replace(linked, file)
        os.replace(checksum, file.with_suffix(".sha256"))


def _run_compiler(command: list[str], source: Path) -> None:
    """Run a compiler; raise a SeqmixError with its first error if it fails."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILER_TIMEOUT, stdin=subprocess.DEVNULL, check=False
        )
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0]) if result.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if reason:
        raise SeqmixError(f"{command[0]} cannot compile {source.name}: {reason}; set CXX to another compiler")


_FUNCTIONS: dict[tuple[str, str], Callable[..., None]] = {}
"""Functions that were called before, by family and name."""


def run(family: str, name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a function of a family's library.

    Args:
        family: name of the source.
        name: name of the function.
        arguments: tensors become pointers (None a null pointer), integers and booleans `int64_t`, floats `double`;
            torch's number of threads is added as the last argument. The caller is responsible for dtypes and strides.
    """
    threads = torch.get_num_threads()
    function = _FUNCTIONS.get((family, name))
    if function is None:
        function = getattr(library(family), name)
        function.restype = None
        function.argtypes = [_type_of(argument) for argument in (*arguments, threads)]
        _FUNCTIONS[family, name] = function
    function(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments), threads)


def _type_of(argument: Tensor | int | float | None) -> type:
    """Return the C type of an argument, which is the same in every call of a function."""
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p
    return ctypes.c_int64 if isinstance(argument, int) else ctypes.c_double
