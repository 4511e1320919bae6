"""Standard output and standard error: output that nobody reads does not cost the work, and a terminal obeys no text."""

import errno
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

UNREAD = 141
"""Exit status where nobody reads the output and nothing else was asked for: that of a program that SIGPIPE ends."""


class _Standard(io.FileIO):
    """A standard stream that drops what is written after its first error, so that no command fails by what it says."""

    lost: OSError | None = None

    def write(self, data: Any, /) -> int | None:
        """Write, or drop; never raises."""
        if self.lost is None:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = error
        return memoryview(data).nbytes


@contextmanager
def guarded() -> Iterator[None]:
    """Survive a closed pipe, which is silent, and a full disk, which ends a command that succeeds with status 2."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # not where a program, such as pytest, has put an object of its own
        if isinstance(stream, io.TextIOWrapper) and isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):
            stream.flush()
            errors = "backslashreplace" if stream.errors == "strict" else stream.errors
            raw = io.BufferedWriter(_Standard(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, errors, line_buffering=True))
    try:
        yield
    except SystemExit as ended:
        if sys.stdout is not None:
            sys.stdout.flush()
        error = lost()
        if error is None or error.errno == errno.EPIPE or ended.code not in (None, 0, UNREAD):
            raise
        typer.secho(f"error: standard output cannot be written: {error.strerror}", err=True, fg="red")
        raise SystemExit(2) from None


def lost() -> OSError | None:
    """Why standard output is no longer written; None while it is."""
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", None)


_OBEYED = (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""What moves a cursor, changes a terminal's settings or the direction of text: all but tabs and line breaks."""
_ESCAPED = {code: ascii(chr(code))[1:-1] for code in _OBEYED}


def visible(text: str, *, err: bool = False) -> str:
    """Text of a model, a file or a folder, its control characters escaped where a terminal would obey them."""
    stream = sys.stderr if err else sys.stdout
    return text.translate(_ESCAPED) if stream is not None and stream.isatty() else text
