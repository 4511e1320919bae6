"""The system's C++ compiler: which one, with which flags, and for how long.

CXX names it; otherwise it is c++, g++ or clang++, whichever is found first.

-ffast-math is never set: a library that is linked with it makes the whole process flush denormal numbers, and sums
could be added in any order (where they may, a source says so: `#pragma omp simd reduction`). OpenMP is not linked:
torch has loaded its own, whose threads these kernels share.
"""

import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

from ....registry import SeqmixError

COMPILERS = ("c++", "g++", "clang++")
"""Compilers that are looked for, in this order, if CXX is not set."""
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
NOTICE_SECONDS = 5
"""Time after which a message says that a compiler is at work."""
MAX_SECONDS = 120
"""Time after which a compiler is stopped."""

_too_slow: set[str] = set()
"""Compilers that were stopped in this process, which does not run them again."""

log = logging.getLogger("seqmix")


def compiler() -> list[str] | None:
    """Return the command of the compiler, which may have several words; None if there is none."""
    if named := os.environ.get("CXX", "").strip():
        try:
            command = shlex.split(named)
        except ValueError:  # a quote without an end
            return None
        return command if shutil.which(command[0]) else None
    return next(([found] for name in COMPILERS if (found := shutil.which(name))), None)


def compile_command() -> list[str]:
    """Return the compiler with its flags, without those for threads.

    Raises:
        SeqmixError: there is no compiler.
    """
    command = compiler()
    if command is None:
        named = os.environ.get("CXX")
        missing = f"the compiler CXX={named} was not found" if named else "no C++ compiler was found"
        raise SeqmixError(f"{missing}: install g++ or clang++, or set CXX")
    return [*command, *FLAGS, *VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())]


def compile_library(command: list[str], source: Path, folder: Path) -> Path:
    """Compile a source in a folder, and return the library.

    Raises:
        SeqmixError: the compiler fails, or takes too long.
        OSError: the folder cannot be written.
    """
    compiled, linked = folder / "library.o", folder / "library.so"
    _run([*command, "-c", str(source), "-o", str(compiled)], source, folder)
    # -fopenmp would link the compiler's own OpenMP
    options = [word for word in command if word != "-fopenmp"]
    options += ["-Wl,-undefined,dynamic_lookup"] if platform.system() == "Darwin" else []
    _run([*options, "-shared", str(compiled), "-o", str(linked)], source, folder)
    return linked


def _run(command: list[str], source: Path, folder: Path) -> None:
    """Run a compiler, whose temporary files belong in the folder; raise a SeqmixError with its first error."""
    if command[0] in _too_slow:
        raise _too_slow_error(command)
    errors = folder / "errors.txt"
    with errors.open("wb") as stderr:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=os.environ | {"TMPDIR": str(folder)},
                start_new_session=True,
            )
        except OSError as error:
            raise _failure(command, source, str(error)) from error
        code = _wait(process, source)
    if code is None:
        _too_slow.add(command[0])
        raise _too_slow_error(command)
    if code:
        lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"exit code {code}"]
        raise _failure(command, source, next((line for line in lines if "error" in line), lines[0]))


def _failure(command: list[str], source: Path, reason: str) -> SeqmixError:
    return SeqmixError(f"{command[0]} cannot compile {source.name}: {reason}; set CXX to another compiler")


def _too_slow_error(command: list[str]) -> SeqmixError:
    return SeqmixError(f"{command[0]} did not finish within {MAX_SECONDS} seconds; set CXX to another compiler")


def _wait(process: subprocess.Popen[bytes], source: Path) -> int | None:
    """Return the exit code of a compiler, or None if its time is over; it has ended when this function returns."""
    try:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(NOTICE_SECONDS)
        log.warning("the C++ compiler is at work on %s; it is stopped after %d seconds", source.name, MAX_SECONDS)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(MAX_SECONDS - NOTICE_SECONDS)
        return None
    finally:
        if process.poll() is None:  # its time is over, or Ctrl-C was pressed
            with suppress(ProcessLookupError, PermissionError):  # it ended in between
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
