"""Write the tables of mixers in docs/reference/mixers.md and the README: `python docs/mixers.py`.

Papers are the arXiv numbers in the first paragraph of each mixer's module docstring. Formulas come from
docs/mixers.yaml; for a mixer that is missing there, the indented lines of its docstring are shown as code.
"""

import ast
import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from ruamel.yaml import YAML

from seqmix import MIXERS, Paradigm, RunConfig
from seqmix.lab.markdown import fill, table
from seqmix.mixers import MixerConfig
from seqmix.mixers.base.state import nbytes
from seqmix.models.builder import build_meta
from seqmix.registry import write_file
from seqmix.training.presets import mixer_kind, single_kind_presets

TARGET = Path(__file__).with_name("reference") / "mixers.md"
README = Path(__file__).parents[1] / "README.md"
LENGTH = 2048
"""Length in tokens of the sequence for which costs are counted."""
MATHEMATICS: dict[str, dict[str, Any]] = YAML(typ="safe").load(Path(__file__).with_name("mixers.yaml"))
ARXIV, LINK = re.compile(r"\b(\d{4}\.\d{5})\b"), r"[\1](https://arxiv.org/abs/\1)"

USED_IN = {
    "attention": "Llama, Qwen3, Gemma 3, gpt-oss",
    "channel_mix": "RWKV-4, RWKV-6, RWKV-7",
    "dsa": "DeepSeek-V3.2, GLM-5",
    "gated_delta_net": "Qwen3-Next, Qwen3.5",
    "gated_retention": "YOCO",
    "hyena": "StripedHyena, Evo",
    "kda": "Kimi Linear",
    "latent_attention": "DeepSeek-V2, DeepSeek-V3",
    "lightning": "TransNormerLLM, MiniMax-01",
    "mamba": "Falcon Mamba, Jamba",
    "mamba2": "Nemotron-H, Zamba2, Falcon-H1",
    "mlstm": "xLSTM",
    "parallel_hybrid": "Falcon-H1",
    "retention": "RetNet",
    "rg_lru": "Griffin, RecurrentGemma",
    "rwkv4": "RWKV-4",
    "rwkv6": "RWKV-6",
    "rwkv7": "RWKV-7",
    "slstm": "xLSTM",
}
"""Released models that use each mixer; mixers that are missing here are only known from papers."""

FAMILIES = {
    "sparse_attention": "sparse attention",
    "attention": "softmax attention",
    "decay": "linear attention and decays",
    "fenwick": "linear attention and decays",
    "ttt": "test-time training",
    "delta": "delta rule",
    "cell": "sequential cells",
    "scan": "recurrences by channel",
    "convolution": "long convolution",
}
"""Names of the op families. A mixer belongs to the first family whose op its module imports, else to that of its
configuration."""
HYBRID = "combinations"
"""The family of a mixer without an op."""

INLINE = {
    r"\b([a-z])_([a-z])\b": r"$\1_\2$",
    r"\b(alpha|beta)_t\b": r"$\\\1_t$",
    r"\b(phi)\((\w)\)": r"$\\\1(\2)$",
    r"\b1/sqrt\(K\)": r"$1/\\sqrt{K}$",
    r"\bA_log\b": r"$A_{\\log}$",
    r"l / \(L - 1\)": r"$l/(L - 1)$",
}
"""Formulas in the prose of docstrings, and their LaTeX."""


def files() -> dict[Path, str]:
    """Return the text of the page and the README with generated tables."""
    presets = single_kind_presets()
    formulas = [line for kind in MIXERS.built_in() for line in (f"### {kind}", "", *_formulas(kind), "")]
    parts = {"mixers": _traits(presets), "states": _states(), "costs": _costs(presets), "formulas": formulas[:-1]}
    return {TARGET: fill(TARGET, parts), README: fill(README, {"mixers": _summary()})}


def _traits(presets: dict[str, RunConfig]) -> list[str]:
    """Return two tables: papers and formulas of each mixer, and the traits of its tiny preset or example."""
    configured = {mixer_kind(preset): preset for preset in presets.values()}
    words = {True: "yes", False: "no"}
    formulas = []
    traits = []
    for kind, cls in MIXERS.built_in().items():
        preset = configured.get(kind)
        config = cls.example() if preset is None else preset.model.blocks[preset.model.layers[0]].mixer
        papers = ARXIV.sub(LINK, ", ".join(dict.fromkeys(ARXIV.findall(_docstring(kind).partition("\n\n")[0]))))
        used = USED_IN.get(kind, "")
        formulas.append((f"[`{kind}`](#{kind})", papers, _recurrence(kind), _state(kind, config), used))
        width = 64 if preset is None else preset.model.d_model
        parallel = config.build(width, layer_idx=0, n_layers=1).supports_context_parallel
        answers = *(paradigm in config.traits.paradigms for paradigm in Paradigm), config.traits.packing, parallel
        traits.append((f"`{kind}`", *(words[answer] for answer in (*answers, config.traits.shift_invariant))))
    return [
        *table(["mixer", "paper", "recurrence", "state size", "models"], formulas),
        "",
        *table(["mixer", *Paradigm, "packing", "context parallelism", "shift-invariant"], traits),
    ]


def _recurrence(kind: str) -> str:
    """Return the equation of a mixer's state as LaTeX, or as code if only its docstring has it."""
    if kind in MATHEMATICS:
        return f"${MATHEMATICS[kind]['recurrence']}$"
    return f"`{_plain_recurrence(kind)}`".replace("|", r"\|")


def _state(kind: str, config: MixerConfig) -> str:
    """Return the size of a mixer's state as a formula; without a formula, its trait (constant, growing or none)."""
    return f"${latex(MATHEMATICS[kind]['state'])}$" if kind in MATHEMATICS else config.traits.state


def latex(expression: str) -> str:
    """Convert an expression of letters, numbers, sums, products and `min` to LaTeX."""

    def convert(node: ast.expr) -> str:
        match node:
            case ast.BinOp(left, ast.Mult(), right):
                return " ".join(
                    f"({convert(x)})" if isinstance(x, ast.BinOp) and _is_sum(x.op) else convert(x)
                    for x in (left, right)
                )
            case ast.BinOp(left, sign, right) if _is_sum(sign):
                return f"{convert(left)} {'+' if isinstance(sign, ast.Add) else '-'} {convert(right)}"
            case ast.Call(ast.Name(name), arguments):
                return rf"\{name}({', '.join(map(convert, arguments))})"
            case ast.Name(name):
                letter, _, index = name.partition("_")
                return rf"{letter}_{{\text{{{index}}}}}" if index else letter
            case ast.Constant(number):
                return str(number)
        raise ValueError(f"{expression}: {ast.unparse(node)} cannot be converted to LaTeX")

    return convert(ast.parse(expression, mode="eval").body)


def _is_sum(sign: ast.operator) -> bool:
    return isinstance(sign, ast.Add | ast.Sub)


def state_elements(config: MixerConfig, d_model: int, tokens: int) -> float:
    """Evaluate the formula of a mixer's state size: floating-point numbers per layer and sequence."""
    mathematics = MATHEMATICS[config.kind]
    fields = {**config.model_dump(), "d_model": d_model, "inf": math.inf}
    parts: list[MixerConfig] = getattr(config, "mixers", [])
    functions = {"part": lambda number: state_elements(parts[number], d_model, tokens)}
    letters = {letter: eval(value, functions, fields) for letter, value in mathematics["where"].items()}
    return eval(mathematics["state"], {"min": min}, {**letters, "T": tokens})


def _states() -> list[str]:
    """Return the table of the tensors in the states of each mixer's example, as their classes declare them."""
    kinds: dict[str, list[str]] = {}
    for kind, cls in MIXERS.built_in().items():
        state = cls.example().build(12, layer_idx=0, n_layers=1).init_state(1)
        kinds.setdefault(", ".join(_tensors(state)) or "those of its mixers", []).append(f"`{kind}`")
    rows = sorted(kinds.items(), key=lambda item: -len(item[1]))
    return table(["tensors", "mixers"], [(tensors, ", ".join(names)) for tensors, names in rows])


def _tensors(state: Any, path: str = "") -> Iterator[str]:
    """Yield the tensors of a state with the shapes of their annotations; a path leads to those of a state inside it."""
    for field, hint in get_type_hints(type(state)).items():
        value = getattr(state, field, None)
        if isinstance(value, torch.Tensor):
            shape = next(each.dim_str for each in (hint, *get_args(hint)) if hasattr(each, "dim_str"))
            yield f"`{path}{field} [{shape.strip()}]`{' (float64)' if value.dtype == torch.float64 else ''}"
        elif value is not None:
            yield from _tensors(value, f"{path}{field}.")


def _costs(presets: dict[str, RunConfig]) -> list[str]:
    """Return the table of the tiny presets' sizes and the costs of one layer's mixer."""
    rows = []
    for name, config in presets.items():
        model = build_meta(config.model)
        mixer = model.blocks[0].mixer
        parameters = sum(parameter.numel() for parameter in model.parameters())
        flops = mixer.flops(LENGTH, mixer.paradigm) // LENGTH
        state = nbytes(mixer.init_state(1, max_length=LENGTH))
        sizes = f"{parameters:,}", config.model.n_layers, f"{flops:,}", f"{state:,}"
        rows.append((f"`{mixer.kind}`", f"`{name}`", *sizes))
    return table(["mixer", "preset", "parameters", "layers", "FLOPs per token", "state, bytes"], rows)


def _summary() -> list[str]:
    """Return the README's table: the mixers of each family, with links to their equations."""
    members: dict[str, list[str]] = {family: [] for family in (*FAMILIES.values(), HYBRID)}
    for kind in MIXERS.built_in():
        members[family(kind)].append(f"[`{kind}`](docs/reference/mixers.md#{kind})")
    return table(["family", "mixers"], [(family, ", ".join(kinds)) for family, kinds in members.items()])


def family(kind: str) -> str:
    """Return the name of a mixer's op family."""
    source = Path(importlib.import_module(MIXERS.origin(kind)).__file__ or "").read_text(encoding="utf-8")
    imported = [name for name in FAMILIES if f"from ..ops.{name} import" in source.replace("ops.dplr", "ops.delta")]
    family = getattr(MIXERS.resolve(kind), "family", None)
    if not imported and family is not None:
        imported = [family.name.replace("dplr", "delta")]
    return FAMILIES[imported[0]] if imported else HYBRID


def _docstring(kind: str) -> str:
    """Return the docstring of a mixer's module."""
    return importlib.import_module(MIXERS.origin(kind)).__doc__ or ""


def _plain_recurrence(kind: str) -> str:
    """Return the equation of a mixer's state update from its docstring; of its output, if it has no state.

    Raises:
        ValueError: the docstring has no such equation on an indented line.
    """
    lines = [line.strip() for line in _docstring(kind).splitlines() if line.startswith("    ")]
    # split lines with several equations at runs of spaces, but not at the spaces around an equals sign
    parts = [part for line in lines for part in re.split(r"(?<=[^\s=-])\s{2,}(?=[^\s=<])", line)]
    equations = [" ".join(part.rstrip(";").split()) for part in parts]
    for pattern in (r".+= .*_\{\w ?- ?1\}", r".+ <- ", r"[oyh](_\w)? = "):
        for equation in equations:
            if re.match(pattern, equation):
                return equation
    raise ValueError(
        f"{MIXERS.origin(kind)}: expected an equation of the state or output on an indented line of the docstring, got "
        "none"
    )


def _formulas(kind: str) -> list[str]:
    """Return a mixer's docstring with its equations as LaTeX, or as indented Markdown code if there is no LaTeX."""
    paragraphs = _docstring(kind).strip().split("\n\n")
    if kind in MATHEMATICS:
        block = "\n".join(["```math", r"\begin{split}", MATHEMATICS[kind]["equations"].strip(), r"\end{split}", "```"])
        # the LaTeX stands for all equations but those that a sentence announces, as of an option
        announced = [ahead.endswith(":") for ahead in ("", *paragraphs)]
        pairs = zip(paragraphs, announced, strict=False)
        text = [each for each, is_announced in pairs if is_announced or not each.startswith("    ")]
        paragraphs = [text[0], block, *(each if each.startswith("    ") else _inline(each) for each in text[1:])]
    lines = "\n\n".join(paragraphs).splitlines()
    return [line if line.startswith("    ") else ARXIV.sub(LINK, line) for line in lines]


def _inline(text: str) -> str:
    """Replace the formulas in prose by LaTeX."""
    for pattern, formula in INLINE.items():
        text = re.sub(pattern, formula, text)
    return text


if __name__ == "__main__":
    for file, text in files().items():
        write_file(text, file)
