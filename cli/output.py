"""Protection of standard output and standard error, and the sentence of an error.

A closed pipe does not end a command, whose other results would be lost. Control characters in texts and names are
escaped, so that they do not reach a terminal.
"""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..registry import SeqmixError

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


def explanation(error: Exception) -> "SeqmixError | None":
    """Return the error for the user: one sentence and the exit status; None if the error is a bug.

    The sentence is empty if another process reports the error.
    """
    from ..registry import DataError, ElsewhereError, OutOfMemoryError, SeqmixError, explain_plug_in

    match error:
        case SeqmixError():
            if isinstance(error, ElsewhereError) or _reported_by_another_process():
                error.args = ()
            return error
        case OSError(filename=str() | bytes() | int()):
            # problems with a file that no command checks: a name that is too long, a folder without permission
            return DataError(f"{error.filename} cannot be used: {error.strerror}")
        case OSError(errno=errno.ENOSPC | errno.EFBIG | errno.EDQUOT):
            return DataError(f"a file cannot be written: {error.strerror}")
        case FileNotFoundError(strerror=str(reason)) if "temporary directory" in reason:  # raised on a full disk
            return DataError(f"a file cannot be written: {reason}")
        case MemoryError() | RuntimeError():
            from ..models import is_out_of_memory

            if is_out_of_memory(error):
                reason = f" ({str(error).partition(chr(10))[0]})" if str(error) else ""
                return OutOfMemoryError(
                    f"out of memory{reason}: use a shorter text, a smaller model or a smaller batch"
                )
    return None if (known := explain_plug_in(error)) is None else explanation(known)


def _reported_by_another_process() -> bool:
    """Return True if local rank 0 has the same error and reports it, as it does before the process group exists."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return False
    import torch.distributed as dist

    return not dist.is_initialized()
