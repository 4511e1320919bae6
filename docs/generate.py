"""Write what the documentation says of the code: `python docs/generate.py`.

That is docs/reference/fields.md, the fields of every configuration; the tables of docs/reference/checks.md; and
docs/reference/presets.md, the table of presets.
"""

import json
from pathlib import Path
from typing import Any

import torch

from seqmix import MIXERS, account, load_config
from seqmix.blocks import FFNS, NORMS, BlockConfig
from seqmix.data import DATA, DatasetConfig
from seqmix.experiments.files import write_file
from seqmix.experiments.match import Match
from seqmix.experiments.pages import fill, table
from seqmix.experiments.study import DecodeSpeed, Entry, PaperFigure, Speed, Study, TrainSpeed
from seqmix.models.config import ModelConfig, NormalInit, PaperInit
from seqmix.ops.kernels import KERNELS
from seqmix.registry import Config
from seqmix.testing import CHECKS, KERNEL_CHECKS
from seqmix.training import PRESETS, DistributedConfig, RunConfig, TrainingConfig

REFERENCE = Path(__file__).with_name("reference") / "fields.md"
CHECKS_PAGE = Path(__file__).with_name("reference") / "checks.md"
PRESETS_PAGE = Path(__file__).with_name("reference") / "presets.md"

WORDS = {"boolean": "`true` or `false`", "null": "*null*", "object": "mapping"}
LIMITS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def files() -> dict[Path, str]:
    """The reference, the page of checks, and that of presets."""
    checks = [
        (f"`{check.name}`", check.property, ", ".join((need.__doc__ or "").rstrip(".") for need in check.needs))
        for check in CHECKS.values()
    ]
    of_kernels = [(f"`{check.name}`", check.property) for check in KERNEL_CHECKS.values()]
    parts = {
        "checks": table(["check", "property", "needs"], checks),
        "kernel checks": table(["check", "property"], of_kernels),
        "kernels": _kernels(),
    }
    return {
        REFERENCE: fill(REFERENCE, {"fields": fields()}),
        CHECKS_PAGE: fill(CHECKS_PAGE, parts),
        PRESETS_PAGE: fill(PRESETS_PAGE, {"presets": _presets()}),
    }


def fields() -> list[str]:
    """The sections of all fields."""
    sections = {
        "Run": (RunConfig, TrainingConfig, DistributedConfig),
        "Data": (*DATA.built_in().values(), DatasetConfig),
        "Model": (ModelConfig, BlockConfig, PaperInit, NormalInit),
        "Mixers": MIXERS.built_in().values(),
        "Feed-forward networks": FFNS.built_in().values(),
        "Norms": NORMS.built_in().values(),
        "Studies": (Study, Entry, Match, Speed, TrainSpeed, DecodeSpeed, PaperFigure),
    }
    lines = [line for title, configs in sections.items() for line in (f"## {title}\n", *map(_section, configs))]
    return [*lines[:-1], lines[-1].rstrip("\n")]


def _presets() -> list[str]:
    """The presets' sizes, and the first line of each file. The small ones come first."""
    rows = []
    for file in sorted(PRESETS.glob("*.yaml"), key=lambda file: (not file.stem.endswith("-tiny"), file.stem)):
        model = load_config(file.stem).model
        size = f"{account(model, length=64).body_parameters:,}"
        what = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").rstrip(".")
        rows.append((f"`{file.stem}`", model.n_layers, model.d_model, size, what))
    return table(["preset", "layers", "d_model", "parameters", "what it is"], rows)


def _kernels() -> list[str]:
    """The tolerances of the reference kernels: those of other backends depend on what is installed."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    kernels = sorted((kernel for kernel in KERNELS.values() if kernel.reference), key=lambda kernel: kernel.key)
    rows = [(kernel.key, *(f"{kernel.tolerances[dtype]:g}" for dtype in dtypes)) for kernel in kernels]
    return table(["kernel", *(str(dtype).removeprefix("torch.") for dtype in dtypes)], rows)


def _section(config: type[Config]) -> str:
    schema = config.model_json_schema()
    kind = schema["properties"].get("kind")
    name = f"`{kind['const']}`" if kind else config.__name__.removesuffix("Config")
    rows = []
    for key, field in schema["properties"].items():
        if key != "kind":
            default = "" if key in schema.get("required", ()) else _default(config, key)
            meaning = " ".join(field.get("description", "").split())
            rows.append((f"`{key}`", _takes(field, schema.get("$defs", {})), default, meaning))
    fields = table(["field", "takes", "default", "meaning"], rows) if rows else []
    about = f"{schema['description']} `{config.__module__}.{config.__name__}`"
    return "\n".join([f"### {name}", "", about, "", *fields, ""])


def _default(config: type[Config], key: str) -> str:
    """A default as YAML has it; a configuration by its kind, or as the mapping of all its defaults."""
    value = config.model_fields[key].get_default(call_default_factory=True)
    if isinstance(value, Config):
        return f"`{{kind: {kind}}}`" if (kind := getattr(value, "kind", None)) else "`{}`"
    if value is None or isinstance(value, bool | tuple):
        return f"`{json.dumps(value)}`"
    return f"`{value}`"


def _takes(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a field takes, in words."""
    match field:
        case {"$ref": path}:
            name = path.rpartition("/")[2]
            target = definitions[name]
            return _takes(target, definitions) if "enum" in target else name.removesuffix("Config")
        case {"discriminator": {"mapping": kinds}}:
            return "one of " + ", ".join(f"`{kind}`" for kind in kinds)
        case {"anyOf": parts}:
            return " or ".join(_takes(part, definitions) for part in parts)
        case {"const": word}:
            return f"`{word}`"
        case {"enum": words}:
            return ", ".join(f"`{word}`" for word in words)
        case {"prefixItems": _}:
            return "list of two numbers"
        case {"items": {"type": word}}:
            return f"list of {word}s"
        case {"items": items}:
            return f"list of {_takes(items, definitions) or 'values'}"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"mapping of names to {_takes(values, definitions)}"
        case {"type": str(word)}:
            limits = ", ".join(f"{sign} {_limit(field[key])}" for key, sign in LIMITS.items() if key in field)
            return f"{WORDS.get(word, word)} {limits}".strip()
    return ""


def _limit(number: float) -> str:
    power = round(number).bit_length() - 1
    return f"2^{power}" if power > 16 and number == 2**power else f"{number:g}"


if __name__ == "__main__":
    for file, text in files().items():
        write_file(text, file)
