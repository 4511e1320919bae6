"""Values to YAML text that `yaml_reader` reads as the same values."""

from typing import Any

import yaml

from .yaml_scalars import TAG, Resolvers, resolvers


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: Resolvers = resolvers()

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 every value is written out where it stands
        return True


def _represent_list(dumper: _Dumper, items: list[Any]) -> yaml.SequenceNode:
    in_one_line = not any(isinstance(item, list | dict) for item in items)
    return dumper.represent_sequence(f"{TAG}seq", items, flow_style=in_one_line)


def _represent_string(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # in every style but the one with escapes, PyYAML reads some line breaks (U+0085, U+2028) as spaces
    return dumper.represent_scalar(f"{TAG}str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_string)


def write(value: Any) -> str:
    """The YAML text of dicts, lists and scalars, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
