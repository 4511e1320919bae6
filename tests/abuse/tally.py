"""What was tried and what held: hostile input is refused in one sentence, or is used; it never ends in a traceback.

A group is a function `(folder, random) -> cases`: each case has a name, an action, and whether it must be refused.

    python tests/abuse/run.py [GROUP ...]    prints tried, held and the faults of all cases
"""

import os
import random
import resource
import select
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from seqmix.cli.app import explanation

LONGEST = 2000
"""Characters of a line of an error: a screen of them."""
PATIENCE = 10
"""Seconds of the clock per second of computing: what waits for ever, for a pipe, ends too."""
TOO_LONG = "it takes too long"
ROOM = 2**31
"""Bytes that a case in a process of its own may allocate."""


@dataclass(frozen=True)
class Case:
    """Something hostile."""

    name: str
    action: Callable[[], object]
    refused: bool = True
    """Whether anything but a refusal is a fault: what is used in its place would be a silent default."""


Group = Callable[[Path, random.Random], Iterator[Case]]


@dataclass
class Tally:
    """Counts, and what failed."""

    tried: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def held(self) -> int:
        return self.tried - len(self.faults)

    def add(self, case: Case, seconds: int = 60, *, alone: bool = False) -> None:
        """Try a case, `alone` in a process of its own, which may be aborted."""
        self.tried += 1
        fault = _in_a_process(case, seconds) if alone else fault_of(case, seconds)
        if fault is not None:
            self.faults.append(f"{case.name}: {fault}")


def fault_of(case: Case, seconds: int = 60) -> str | None:
    """What is wrong with what a case does, or None."""
    before = {number: signal.signal(number, _too_long) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of this process: on a busy machine the clock runs faster
    signal.alarm(PATIENCE * seconds)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.action()
    except BaseException as error:  # a library written in Rust panics by one that is not an Exception
        late = TOO_LONG in str(error)  # a library may make it an error of its own
        if not late and isinstance(error, Exception) and (sentence := explanation(error)) is not None:
            return _fault_of_sentence(str(sentence))
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return f"{what} ({Path(where.filename).name}:{where.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
    return "it was used" if case.refused else None


def _fault_of_sentence(message: str) -> str | None:
    lines = message.split("\n")
    if len(lines) > 6 or not all(line.strip() and line.isprintable() and len(line) <= LONGEST + 100 for line in lines):
        return f"its error is not a sentence: {message[:200]!r}"
    return None


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(TOO_LONG)


@contextmanager
def little_memory() -> Iterator[None]:
    """Inside, the process may allocate `ROOM` more bytes of addresses."""
    used, before = int(Path("/proc/self/statm").read_text().split()[0]), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used * resource.getpagesize() + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _in_a_process(case: Case, seconds: int) -> str | None:
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the panics of libraries
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds + 5, seconds + 5))  # a library does not see the signals
        os.write(writing, (fault_of(case, seconds) or "").encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as pipe:
        ready, _, _ = select.select([pipe], [], [], PATIENCE * seconds + 5)
        if not ready:
            os.kill(child, signal.SIGKILL)
        fault = pipe.read()
    _, status = os.waitpid(child, 0)
    return fault or (f"the process ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else None)
