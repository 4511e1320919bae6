"""Generate reference pages from the code: `python docs/generate.py`.

It writes the fields of every configuration (docs/reference/fields.md), the commands and their options
(docs/reference/commands.md), their results as JSON (docs/reference/json.md), the tables of checks
(docs/reference/checks.md), and the table of presets (docs/reference/presets.md).
"""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from seqmix import MIXERS, account, load_config
from seqmix.blocks import FFNS, NORMS, RESIDUALS, BlockConfig
from seqmix.cli import app as cli
from seqmix.cli.json_output import schema_of
from seqmix.data import DATA, DatasetConfig, WeightedSourceConfig
from seqmix.lab.linearize.plan import Keep, Plan, Stage, Stages, Swap
from seqmix.lab.markdown import fill, table
from seqmix.lab.study.equal_cost import Match
from seqmix.lab.study.study import DecodeSpeed, Entry, PaperFigure, Speed, Study, TrainSpeed, Tune
from seqmix.models.config import ModelConfig, NormalInit, PaperInit
from seqmix.ops.runtime.kernel import KERNELS
from seqmix.registry import Config, write_file
from seqmix.testing import CHECKS, KERNEL_CHECKS
from seqmix.training import PRESETS, DistributedConfig, RunConfig, TrainingConfig

REFERENCE = Path(__file__).with_name("reference") / "fields.md"
JSON_PAGE = Path(__file__).with_name("reference") / "json.md"
COMMANDS_PAGE = Path(__file__).with_name("reference") / "commands.md"
CHECKS_PAGE = Path(__file__).with_name("reference") / "checks.md"
PRESETS_PAGE = Path(__file__).with_name("reference") / "presets.md"

WORDS = {"boolean": "`true` or `false`", "null": "*null*", "object": "mapping"}
"""Types of JSON schema in words; the other types keep their names."""
LIMITS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
"""Limits of JSON schema, each with its sign."""


def files() -> dict[Path, str]:
    """Return the text of each page: fields, commands, results, checks and presets."""
    checks = [
        (
            f"`{check.name}`",
            check.property,
            ", ".join((need.__doc__ or "").rstrip(".") for need in check.needs),
            "`--stress`" if check.stress else "",
        )
        for check in CHECKS.values()
    ]
    kernel_checks = [(f"`{check.name}`", check.property) for check in KERNEL_CHECKS.values()]
    parts = {
        "checks": table(["check", "property", "needs", "option"], checks),
        "kernel checks": table(["check", "property"], kernel_checks),
        "kernels": _kernels(),
    }
    return {
        REFERENCE: fill(REFERENCE, {"fields": fields()}),
        COMMANDS_PAGE: fill(COMMANDS_PAGE, {"commands": _commands()}),
        JSON_PAGE: fill(JSON_PAGE, {"results": _results()}),
        CHECKS_PAGE: fill(CHECKS_PAGE, parts),
        PRESETS_PAGE: fill(PRESETS_PAGE, {"presets": _presets()}),
    }


def fields() -> list[str]:
    """Return the lines of all sections of the page of fields."""
    sections = {
        "Run": (RunConfig, TrainingConfig, DistributedConfig),
        "Data": (*DATA.built_in().values(), DatasetConfig, WeightedSourceConfig),
        "Model": (ModelConfig, BlockConfig, PaperInit, NormalInit),
        "Mixers": MIXERS.built_in().values(),
        "Feed-forward networks": FFNS.built_in().values(),
        "Norms": NORMS.built_in().values(),
        "Residual connections": RESIDUALS.built_in().values(),
        "Linearizing": (Plan, Swap, Keep, Stages, Stage),
        "Studies": (Study, Entry, Match, Tune, Speed, TrainSpeed, DecodeSpeed, PaperFigure),
    }
    lines = [line for title, configs in sections.items() for line in (f"## {title}\n", *map(_section, configs))]
    return [*lines[:-1], lines[-1].rstrip("\n")]


def _presets() -> list[str]:
    """Return the table of presets with sizes and descriptions (the first line of each file), tiny presets first."""
    rows = []
    for file in sorted(PRESETS.glob("*.yaml"), key=lambda file: (not file.stem.endswith("-tiny"), file.stem)):
        model = load_config(file.stem).model
        size = f"{account(model, length=64).body_parameters:,}"
        description = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").rstrip(".")
        rows.append((f"`{file.stem}`", model.n_layers, model.d_model, size, description))
    return table(["preset", "layers", "d_model", "parameters", "description"], rows)


def _kernels() -> list[str]:
    """Return the table of the reference kernels' tolerances; other kernels depend on the installed backends."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    kernels = sorted((kernel for kernel in KERNELS.values() if kernel.reference), key=lambda kernel: kernel.key)
    rows = [(kernel.key, *(f"{kernel.tolerances[dtype]:g}" for dtype in dtypes)) for kernel in kernels]
    return table(["kernel", *(str(dtype).removeprefix("torch.") for dtype in dtypes)], rows)


def _commands() -> list[str]:
    """Return a section for each command: its description, usage, arguments and options, and examples."""
    lines = []
    for name in cli.COMMANDS:
        command = cli.import_command(name)
        paragraphs = (command.help or "").split("\n\n")
        examples = [re.sub(r"\[/?bold\]", "", text) for text in paragraphs if text.startswith("[bold]")]
        prose = [text for text in paragraphs if not text.startswith("[bold]")]
        word = name.replace("-", "_")
        types = get_type_hints(getattr(import_module(f"seqmix.cli.commands.{word}"), word))
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        required_options = [
            f"{p.opts[0]} {p.metavar or _metavar(types[p.name])}"
            for p in command.params
            if p.required and p not in arguments
        ]
        argument_names = [str(p.metavar or p.name.upper()) for p in arguments]
        usage = " ".join(["seqmix", name, *argument_names, *required_options])
        shown = [p for p in command.params if p.name in types and not getattr(p, "hidden", False)]
        rows = [_parameter_row(parameter, types) for parameter in shown]
        has_optional = len(rows) > len(arguments) + len(required_options)
        lines += [f"## seqmix {name}", "", "\n\n".join(map(_strip_markup, prose)), ""]
        lines += ["```text", f"{usage} [OPTIONS]" if has_optional else usage, "```", ""]
        lines += [*table(["argument or option", "default", "meaning"], rows), ""] if rows else []
        lines += ["Examples:", "", "```text", *map(_strip_markup, examples), "```", ""] if examples else []
    return lines[:-1]


def _results() -> list[str]:
    """Return a section for each command: the fields of its result, and of each type that was not shown before."""
    lines: list[str] = []
    shown: list[dict[str, Any]] = []
    for name in cli.COMMANDS:
        schema = schema_of(name)
        definitions = schema["$defs"]
        results = [part["$ref"].rpartition("/")[2] for part in schema["anyOf"] if "$ref" in part]
        lines += [f"## seqmix {name}", "", *([] if results else ["No other fields.", ""])]
        for key in (*results, *(key for key in definitions if key not in results)):
            definition = definitions[key]
            if "properties" in definition and definition not in shown:
                shown.append(definition)
                description = definition.get("description", "").split("\n")[0]
                lines += [description if key in results else f"`{key}`: {description}", ""]
                lines += [*_fields_of(definition, definitions), ""]
    return lines[:-1]


def _fields_of(definition: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    """Return the table of an object's fields, from its JSON schema."""
    rows = [
        (f"`{name}`", _type(field, definitions), " ".join(field.get("description", "").split()).replace("|", r"\|"))
        for name, field in definition["properties"].items()
    ]
    return table(["field", "type", "meaning"], rows)


def _parameter_row(parameter: Any, types: dict[str, Any]) -> tuple[str, str, str]:
    """Return the table row of an argument or option: its syntax, its default and its help."""
    meaning = _strip_markup(parameter.help or "").replace("|", r"\|")
    default = parameter.default
    if parameter.param_type_name == "argument":
        name = _choices(parameter.metavar or parameter.name.upper())
        return f"`{name}`", "*required*" if parameter.required else "", meaning
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if parameter.is_flag:
        default_names = {True: parameter.opts, False: parameter.secondary_opts}.get(default, [])
        return names, f"`{default_names[0]}`" if default_names and parameter.secondary_opts else "", meaning
    metavar = _choices(parameter.metavar or _metavar(types[parameter.name]))
    names = ", ".join(f"`{name} {metavar}`" for name in parameter.opts)
    if parameter.required:
        return names, "*required*", meaning
    return names, "" if default is None else f"`{default}`", meaning


def _choices(metavar: str) -> str:
    """Write choices as `{a,b}` instead of `a|b`, because `|` ends a table cell."""
    return f"{{{metavar.replace('|', ',')}}}" if "|" in metavar else metavar


def _metavar(hint: Any) -> str:
    """Return the placeholder of an option's value, from its type annotation."""
    parts = []
    if get_origin(hint) not in (list, Literal):
        parts = [part for part in get_args(hint) if part is not type(None)]
    hint = parts[0] if len(parts) == 1 else hint
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return _metavar(get_args(hint)[0])
    return {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}[hint]


def _strip_markup(text: str) -> str:
    """Remove the terminal markup from a help text."""
    return re.sub(r"\[/?(?:bold|dim|italic)\]", "", text).replace(r"\[", "[")


def _section(config: type[Config]) -> str:
    """Return the section of one configuration: its name, description and table of fields."""
    schema = config.model_json_schema()
    if "$ref" in schema:  # a recursive schema, e.g. of a mixer that contains mixers
        schema = {"$defs": schema["$defs"], **schema["$defs"][schema["$ref"].rpartition("/")[2]]}
    kind = schema["properties"].get("kind")
    name = f"`{kind['const']}`" if kind else config.__name__.removesuffix("Config")
    rows = []
    for key, field in schema["properties"].items():
        if key != "kind":
            default = "" if key in schema.get("required", ()) else _default(config, key)
            meaning = " ".join(field.get("description", "").split())
            rows.append((f"`{key}`", _type(field, schema.get("$defs", {})), default, meaning))
    fields = table(["field", "type", "default", "meaning"], rows) if rows else []
    description = f"{schema['description']} `{config.__module__}.{config.__name__}`"
    return "\n".join([f"### {name}", "", description, "", *fields, ""])


def _default(config: type[Config], key: str) -> str:
    """Return a field's default as YAML; a nested configuration by its kind, or as `{}` if it has no kind."""
    value = config.model_fields[key].get_default(call_default_factory=True)
    if isinstance(value, Config):
        return f"`{{kind: {kind}}}`" if (kind := getattr(value, "kind", None)) else "`{}`"
    if value is None or isinstance(value, bool | tuple):
        return f"`{json.dumps(value)}`"
    return f"`{value}`"


def _type(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return the type of a field in words, from its JSON schema."""
    match field:
        case {"$ref": path}:
            name = path.rpartition("/")[2]
            target = definitions[name]
            return _type(target, definitions) if "enum" in target else name.removesuffix("Config")
        case {"discriminator": {"mapping": kinds}}:
            return "one of " + ", ".join(f"`{kind}`" for kind in kinds)
        case {"anyOf": parts}:
            return " or ".join(_type(part, definitions) for part in parts)
        case {"const": word}:
            return f"`{word}`"
        case {"enum": words}:
            return ", ".join(f"`{word}`" for word in words)
        case {"prefixItems": _}:
            return "list of two numbers"
        case {"items": {"type": word}}:
            return f"list of {word}s"
        case {"items": items}:
            return f"list of {_type(items, definitions) or 'values'}"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"mapping of names to {_type(values, definitions)}"
        case {"type": str(word)}:
            limits = ", ".join(f"{sign} {_limit(field[key])}" for key, sign in LIMITS.items() if key in field)
            return f"{WORDS.get(word, word)} {limits}".strip()
    return ""


def _limit(number: float) -> str:
    """Write a limit; large powers of two as `2^n`."""
    power = round(number).bit_length() - 1
    return f"2^{power}" if power > 16 and number == 2**power else f"{number:g}"


if __name__ == "__main__":
    for file, text in files().items():
        write_file(text, file)
