import ast
from pathlib import Path

import seqmix.registry

FILES = sorted(Path(seqmix.registry.__file__).parent.glob("*.py"))


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or "").partition(".")[0])
    return names


def test_the_registry_imports_no_torch_and_no_other_floor():
    names = {name for file in FILES for name in imported(file)}
    assert "torch" not in names
    assert not [name for name in names if name.startswith("..") or name == "seqmix"]


def test_public_names_are_frozen():
    assert sorted(seqmix.registry.__all__) == [
        "Config",
        "ConfigError",
        "ElsewhereError",
        "Registry",
        "SeqmixError",
        "dump",
        "json_schema",
        "load",
        "nearest",
        "read_mapping",
        "require_name",
    ]
