"""Protection of standard output and standard error.

A closed pipe does not end a command, whose other results would be lost. Control characters in texts and names are
escaped, so that they do not reach a terminal.
"""

import errno
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

EXIT_UNREAD = 141
"""Exit status if the output is the only result and nobody reads it: that of a program that SIGPIPE ends."""


class _SafeStream(io.FileIO):
    """A standard stream that discards all output after its first error, so that printing never fails."""

    first_error: OSError | None = None
    """The first error; None if there was none."""

    def write(self, data: Any, /) -> int | None:
        """Write or discard the data; never raises."""
        if self.first_error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.first_error = error
        return memoryview(data).nbytes


@contextmanager
def protect_output() -> Iterator[None]:
    """Context in which output errors do not stop a command.

    A closed pipe is ignored. After a full disk, a command that succeeds otherwise exits with status 3.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # leave a stream that another program, such as pytest, has replaced
        if isinstance(stream, io.TextIOWrapper) and isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):
            stream.flush()
            errors = "backslashreplace" if stream.errors == "strict" else stream.errors
            raw = io.BufferedWriter(_SafeStream(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, errors, line_buffering=True))
    try:
        yield
    except SystemExit as ended:
        if sys.stdout is not None:
            sys.stdout.flush()
        error = output_error()
        if error is None or error.errno == errno.EPIPE or ended.code not in (None, 0, EXIT_UNREAD):
            raise
        typer.secho(f"error: standard output cannot be written: {error.strerror}", err=True, fg="red")
        raise SystemExit(3) from None


def output_error() -> OSError | None:
    """Return the error after which standard output is discarded; None if there was none."""
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "first_error", None)


_CONTROL = (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Code points that control a terminal or the direction of text; tabs and line breaks are not among them."""
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _CONTROL}


def visible(text: str, *, err: bool = False) -> str:
    """Return text that is safe to print: on a terminal, control characters are escaped.

    Args:
        text: the text.
        err: True for standard error.
    """
    stream = sys.stderr if err else sys.stdout
    return text.translate(_ESCAPES) if stream is not None and stream.isatty() else text
