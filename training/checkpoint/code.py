"""The plug-ins that a run carries: copies of their source in RUN/code, beside their checksums.

Nothing in the folder is imported without the user's trust. Where Python finds the same source, it is not needed.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ...registry import ConfigError, plug_in_sources, read_bytes, write_files
from ..config import RunConfig
from .provenance import plug_ins_of

CODE = "code"
"""Folder in a run directory."""
CHECKSUMS = "SHA256SUMS"
"""File in the folder with the checksums, as sha256sum reads it."""


def code_of(config: RunConfig) -> dict[str, bytes]:
    """Return the source of a configuration's plug-ins, by file name; those of installed distributions are left out."""
    files: dict[str, bytes] = {}
    for module, source in plug_ins_of(config).items():
        if "==" not in source and module != "__main__":
            files |= plug_in_sources.source_files(module)
    return files


def write_code(run: Path, files: Mapping[str, bytes]) -> None:
    """Write the source of a run's plug-ins into its folder, if there is any.

    Raises:
        SeqmixError: a file cannot be written.
    """
    if files:
        sums = "".join(f"{plug_in_sources.sha256(text)}  {name}\n" for name, text in sorted(files.items()))
        write_files(
            {**{run / CODE / name: text for name, text in files.items()}, run / CODE / CHECKSUMS: sums.encode()}
        )


def read_code(run: Path) -> dict[str, bytes]:
    """Return the source that a run carries, by file name; empty if it carries none, or if it is not readable."""
    folder = run / CODE
    try:
        names = [line.partition("  ")[2] for line in read_bytes(folder / CHECKSUMS).decode().splitlines()]
        return {name: read_bytes(folder / name) for name in names if _is_safe(name)}
    except (OSError, UnicodeDecodeError):
        return {}


def encode_code(files: Mapping[str, bytes]) -> str:
    """Return source files as JSON, for an exported file."""
    return json.dumps({name: text.decode("utf-8", errors="surrogateescape") for name, text in files.items()})


def decode_code(text: str) -> dict[str, bytes]:
    """Return source files from JSON; ValueError if it is something else."""
    values = json.loads(text)
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ValueError("its source code is not a mapping of file names to text")
    files = {name: value.encode("utf-8", errors="surrogateescape") for name, value in values.items()}
    return {name: value for name, value in files.items() if _is_safe(name)}


def _is_safe(name: str) -> bool:
    """True for the name of a source file below the folder."""
    return name.endswith(".py") and all(part.removesuffix(".py").isidentifier() for part in name.split("/"))


def prepare_code(
    files: Mapping[str, bytes],
    modules: Iterable[str],
    place: str,
    *,
    trust: bool,
    on_note: Callable[[str], object],
) -> None:
    """Decide where a run's plug-ins are imported from: where Python finds them, or from the copies that it carries.

    Args:
        files: the copies.
        modules: modules that the model needs.
        place: the folder of the copies, for messages.
        trust: True if the copies may be imported.
        on_note: called with a sentence for each difference, and each copy that will be imported.

    Raises:
        ConfigError: a module is found nowhere else, and the copies are not trusted; or another run's copy, which
            differs, is imported already.
    """
    needed = plug_in_sources.closure(files, (module.partition(".")[0] for module in modules))
    if not (differing := plug_in_sources.differing(needed)):
        return
    shown = ", ".join(f"{place}/{name} (sha256 {plug_in_sources.sha256(text)})" for name, text in needed.items())
    if trust and (absent := [top for top in differing if top not in sys.modules]):
        on_note(f"importing {shown}")
        plug_in_sources.carry(needed, absent, place)
        differing = [top for top in differing if top not in absent]
    if foreign := [top for top in differing if plug_in_sources.is_carried(top)]:
        raise ConfigError(
            f"{place} has another source of the module {foreign[0]} than a run that this process has loaded: load the "
            "two in separate processes"
        )
    missing = [top for top in differing if not plug_in_sources.exists_here(top)]
    if missing:
        raise ConfigError(
            f"the module {missing[0]} cannot be found here, but the run carries {shown}: read it, then import it with "
            "--trust (trust=True), or copy it to the working directory"
        )
    for top in differing:
        on_note(
            f"the module {top} differs from the copy in {place}, with which the run was trained; "
            f"{'it is imported already' if trust else '--trust imports the copy'}"
        )


def has_same_code(run: Path, config: RunConfig) -> bool:
    """True unless a run carries other source than that of the configuration's plug-ins."""
    carried_files = read_code(run)
    return not carried_files or carried_files == code_of(config)
