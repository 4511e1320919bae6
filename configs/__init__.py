"""Presets: one YAML file each, named on the command line by its stem."""
