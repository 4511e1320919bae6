"""Files that are replaced when the new one is whole."""

from contextlib import suppress
from pathlib import Path

from ..registry import SeqmixError


def write_file(content: str | bytes, file: Path) -> Path:
    """Write a file, and its folder, whole or not at all; a SeqmixError where it cannot be written."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = f"{file.parent} is not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise SeqmixError(f"{file} cannot be written: {reason}") from error
    return file
