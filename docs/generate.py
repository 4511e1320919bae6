"""Write what the documentation says of the code: `python docs/generate.py`.

That is docs/reference.md, the fields of every configuration; the tables of docs/conformance.md but the mutants'; and
the README's table of presets.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from seqmix import MIXERS, account, load_config
from seqmix.blocks import FFNS, NORMS, BlockConfig
from seqmix.experiments.match import Match
from seqmix.experiments.pages import fill, table
from seqmix.experiments.study import DecodeSpeed, Entry, PaperFigure, Speed, Study, TrainSpeed
from seqmix.models.config import ModelConfig, NormalInit, PaperInit
from seqmix.ops.kernels import KERNELS
from seqmix.registry import Config, Registry
from seqmix.testing import CHECKS, KERNEL_CHECKS
from seqmix.training import DATA, PRESETS, DatasetConfig, DistributedConfig, RunConfig, TrainingConfig

TARGET = Path(__file__).with_name("reference.md")
CONFORMANCE = Path(__file__).with_name("conformance.md")
README = Path(__file__).parents[1] / "README.md"

LIMITS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}

HEAD = """\
# All fields

Every field of every configuration, generated from the code by `docs/generate.py`. A field without a default must be
given; *null* means that it may be `null`.
"""


def render() -> str:
    """The whole page."""
    parts = [
        HEAD,
        *_sections("Run", RunConfig, TrainingConfig, DistributedConfig),
        *_sections("Data", *_built_in(DATA), DatasetConfig),
    ]
    parts += _sections("Model", ModelConfig, BlockConfig, PaperInit, NormalInit)
    for title, registry in (("Mixers", MIXERS), ("Feed-forward networks", FFNS), ("Norms", NORMS)):
        parts += _sections(title, *_built_in(registry))
    studies = (Study, Entry, Match, Speed, TrainSpeed, DecodeSpeed, PaperFigure)
    return "\n".join([*parts, *_sections("Studies", *studies)])


def render_conformance() -> str:
    """The page of the conformance kit, with the tables of its checks and of the kernels."""
    checks = [
        (f"`{check.name}`", check.property, ", ".join((need.__doc__ or "").rstrip(".") for need in check.needs))
        for check in CHECKS.values()
    ]
    kernel_checks = [(f"`{check.name}`", check.property) for check in KERNEL_CHECKS.values()]
    page = fill(CONFORMANCE.read_text(), "checks", table(["check", "property", "needs"], checks))
    page = fill(page, "kernel checks", table(["check", "property"], kernel_checks))
    return fill(page, "kernels", _kernels())


def render_readme() -> str:
    """The README, with the table of presets: sizes, and the first line of each file. The small ones come first."""
    rows = []
    for file in sorted(PRESETS.glob("*.yaml"), key=lambda file: (not file.stem.endswith("-tiny"), file.stem)):
        model = load_config(file.stem).model
        size = f"{account(model, length=64).body_parameters:,}"
        what = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").rstrip(".")
        rows.append((f"`{file.stem}`", model.n_layers, model.d_model, size, what))
    heads = ["preset", "layers", "d_model", "parameters", "what it is"]
    return fill(README.read_text(encoding="utf-8"), "presets", table(heads, rows))


def _kernels() -> list[str]:
    """The tolerances of the reference kernels: those of other backends depend on what is installed."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    kernels = sorted((kernel for kernel in KERNELS.values() if kernel.reference), key=lambda kernel: kernel.key)
    rows = [(kernel.key, *(f"{kernel.tolerances[dtype]:g}" for dtype in dtypes)) for kernel in kernels]
    return table(["kernel", *(str(dtype).removeprefix("torch.") for dtype in dtypes)], rows)


def _built_in(registry: Registry[Any]) -> list[type[Config]]:
    """The library's own kinds: what else is installed differs from machine to machine."""
    return [registry.resolve(kind) for kind in registry.kinds() if registry.origin(kind).startswith("seqmix.")]


def _sections(title: str, *configs: type[Config]) -> Iterator[str]:
    yield f"## {title}\n"
    for config in configs:
        yield _section(config)


def _section(config: type[Config]) -> str:
    schema = config.model_json_schema()
    kind = schema["properties"].get("kind")
    name = f"`{kind['const']}`" if kind else config.__name__.removesuffix("Config")
    lines = [f"### {name}\n", f"{schema['description']} `{config.__module__}.{config.__name__}`\n"]
    rows = []
    for key, field in schema["properties"].items():
        if key != "kind":
            default = "" if key in schema.get("required", ()) else _default(config, key)
            meaning = " ".join(field.get("description", "").split())
            rows.append((f"`{key}`", _takes(field, schema.get("$defs", {})), default, meaning))
    return "\n".join([*lines, *(table(["field", "takes", "default", "meaning"], rows) if rows else [])]) + "\n"


def _default(config: type[Config], key: str) -> str:
    """A default as YAML has it; a configuration by its kind, or as the mapping of all its defaults."""
    value = config.model_fields[key].get_default(call_default_factory=True)
    if isinstance(value, Config):
        return f"`{{kind: {value.kind}}}`" if hasattr(value, "kind") else "`{}`"
    if value is None or isinstance(value, bool | tuple):
        return f"`{json.dumps(value)}`"
    return f"`{value}`"


def _takes(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a field takes, in words."""
    if not field:
        return ""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        target = definitions[name]
        return _takes(target, definitions) if "enum" in target else name.removesuffix("Config")
    if "discriminator" in field:
        return "one of " + ", ".join(f"`{kind}`" for kind in field["discriminator"]["mapping"])
    if "anyOf" in field:
        return " or ".join(
            "*null*" if part == {"type": "null"} else _takes(part, definitions) for part in field["anyOf"]
        )
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{word}`" for word in field["enum"])
    if field["type"] == "array":
        if "prefixItems" in field:
            return "list of two numbers"
        items = field["items"]
        return f"list of {items['type']}s" if "type" in items else f"list of {_takes(items, definitions) or 'values'}"
    if field["type"] == "object":
        values = field.get("additionalProperties", True)
        return "mapping" if values is True else f"mapping of names to {_takes(values, definitions)}"
    limits = ", ".join(f"{sign} {_limit(field[key])}" for key, sign in LIMITS.items() if key in field)
    return ("`true` or `false`" if field["type"] == "boolean" else f"{field['type']} {limits}").strip()


def _limit(number: float) -> str:
    power = round(number).bit_length() - 1
    return f"2^{power}" if power > 16 and number == 2**power else f"{number:g}"


if __name__ == "__main__":
    TARGET.write_text(render())
    CONFORMANCE.write_text(render_conformance())
    README.write_text(render_readme(), encoding="utf-8")
