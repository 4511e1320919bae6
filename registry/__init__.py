"""Configurations: checked values, YAML files that extend each other, and kinds found by name. Knows no torch."""

from .config import Config
from .errors import ConfigError, ElsewhereError, SeqmixError, nearest, require_name
from .explain import explain_fields
from .files import flush, read_bytes, replacing, write_file
from .loading import dump, load, validated
from .providers import import_named, import_object, require_trusted, unimported
from .registry import Registry
from .schema import json_schema
from .sources import read_mapping

__all__ = [
    "Config",
    "ConfigError",
    "ElsewhereError",
    "Registry",
    "SeqmixError",
    "dump",
    "explain_fields",
    "flush",
    "import_named",
    "import_object",
    "json_schema",
    "load",
    "nearest",
    "read_bytes",
    "read_mapping",
    "replacing",
    "require_name",
    "require_trusted",
    "unimported",
    "validated",
    "write_file",
]
