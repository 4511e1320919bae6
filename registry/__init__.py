"""Configurations: validated values, YAML files that extend each other, and kinds that are looked up by name.

This package does not import torch.
"""

from .config import Config
from .deprecated import former_names
from .duration import Duration, format_duration, parse_duration
from .errors import (
    ConfigError,
    DataError,
    ElsewhereError,
    OutOfMemoryError,
    SeqmixError,
    choices_hint,
    nearest_hint,
    reason_of,
    require_name,
)
from .explain import explain_fields
from .files import (
    flush,
    is_locked,
    is_vacant,
    read_bytes,
    replacing,
    replacing_all,
    replacing_folder,
    try_lock,
    was_unfinished,
    write_file,
    write_files,
)
from .loading import dump, load, validated
from .plug_in_errors import explain_plug_in, place_of, require_signatures, where_raised
from .providers import import_named, import_object, require_trusted, unimported
from .registry import Registry
from .schema import json_schema
from .sources import read_mapping

__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "Duration",
    "ElsewhereError",
    "OutOfMemoryError",
    "Registry",
    "SeqmixError",
    "choices_hint",
    "dump",
    "explain_fields",
    "explain_plug_in",
    "flush",
    "format_duration",
    "import_named",
    "import_object",
    "is_locked",
    "is_vacant",
    "json_schema",
    "load",
    "nearest_hint",
    "parse_duration",
    "place_of",
    "read_bytes",
    "read_mapping",
    "reason_of",
    "replacing",
    "replacing_all",
    "replacing_folder",
    "require_name",
    "require_signatures",
    "require_trusted",
    "try_lock",
    "unimported",
    "validated",
    "was_unfinished",
    "where_raised",
    "write_file",
    "write_files",
]
__getattr__ = former_names(__name__, {"choices": "choices_hint", "nearest": "nearest_hint"})
