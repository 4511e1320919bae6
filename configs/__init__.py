"""Presets: one YAML file each, named on the command line by its stem."""

from pathlib import Path

PRESETS = Path(__file__).resolve().parent
