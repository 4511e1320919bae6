"""Write what docs/reference/mixers.md and the README say of mixers: `python docs/mixers.py [studies/families]`.

Papers are those of each mixer's module docstring, whose first paragraph names them by their arXiv numbers. Its formulas
are set from docs/mixers.yaml; a mixer that is not there has the indented lines of its docstring, as code. The table of
what was trained is that of the study (`seqmix compare families`) whose folder is given, and else stays as it is.
"""

import ast
import importlib
import math
import re
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from ruamel.yaml import YAML

from seqmix import MIXERS, Paradigm, RunConfig
from seqmix.experiments.figures.figure import Axis, Figure, Point, Series
from seqmix.experiments.figures.writer import adaptive
from seqmix.experiments.pages import fill, table
from seqmix.experiments.results import Results, read_results
from seqmix.mixers import MixerConfig
from seqmix.mixers.state import nbytes
from seqmix.models.builder import build_meta
from seqmix.registry import write_file
from seqmix.training.presets import mixer_kind, single_kind_presets

TARGET = Path(__file__).with_name("reference") / "mixers.md"
PICTURE = TARGET.parent / "mixers" / "families.svg"
README = Path(__file__).parents[1] / "README.md"
LENGTH = 2048
"""Tokens of the sequence whose cost is counted."""
MATHEMATICS: dict[str, dict[str, Any]] = YAML(typ="safe").load(Path(__file__).with_name("mixers.yaml"))
ARXIV, LINK = re.compile(r"\b(\d{4}\.\d{5})\b"), r"[\1](https://arxiv.org/abs/\1)"

USED_IN = {
    "attention": "Llama, Qwen3, Gemma 3, gpt-oss",
    "channel_mix": "RWKV-4, RWKV-7",
    "gated_delta_net": "Qwen3-Next",
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
    "rwkv7": "RWKV-7",
}
"""Released models with the mixer; of the others there is a paper alone."""

FAMILIES = {
    "attention": "softmax attention",
    "decay": "linear attention and decays",
    "delta": "delta rule",
    "scan": "recurrences by channel",
    "convolution": "long convolution",
}
"""Names of the op families. A mixer belongs to the first one that its module imports."""
HYBRID = "combinations"
"""The family of a mixer that imports no op."""

INLINE = {
    r"\b([a-z])_([a-z])\b": r"$\1_\2$",
    r"\b(alpha|beta)_t\b": r"$\\\1_t$",
    r"\b(phi)\((\w)\)": r"$\\\1(\2)$",
    r"\b1/sqrt\(K\)": r"$1/\\sqrt{K}$",
    r"\bA_log\b": r"$A_{\\log}$",
    r"l / \(L - 1\)": r"$l/(L - 1)$",
}
"""Formulas of a docstring's prose."""


def files(study: str | None = None) -> dict[Path, str]:
    """The page and the README's table, with the parts that the code says, and a study if there is one."""
    presets = single_kind_presets()
    formulas = [line for kind in MIXERS.built_in() for line in (f"### {kind}", "", *_formulas(kind), "")]
    parts = {"mixers": _traits(presets), "costs": _costs(presets), "formulas": formulas[:-1]}
    drawn = {}
    if study is not None:
        results = read_results(study)
        parts["trained"] = trained(results)
        drawn[PICTURE] = adaptive([families(results)], 6.0)
    page = fill(TARGET, parts)
    return {TARGET: page, README: fill(README, {"mixers": _summary()}), **drawn}


def _traits(presets: dict[str, RunConfig]) -> list[str]:
    """What each mixer is, and what it declares as its tiny preset configures it (or in an example of it)."""
    configured = {mixer_kind(preset): preset for preset in presets.values()}
    words = {True: "yes", False: "no"}
    formulas, traits = [], []
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
    """The equation of a mixer's state, as LaTeX; as code where only its docstring has it."""
    if kind in MATHEMATICS:
        return f"${MATHEMATICS[kind]['recurrence']}$"
    return f"`{_plain_recurrence(kind)}`".replace("|", r"\|")


def _state(kind: str, config: MixerConfig) -> str:
    """The size of a mixer's state as a formula; of one without, whether it grows."""
    return f"${latex(MATHEMATICS[kind]['state'])}$" if kind in MATHEMATICS else config.traits.state


def latex(expression: str) -> str:
    """An expression of letters, numbers, sums, products and `min` as LaTeX."""

    def of(node: ast.expr) -> str:
        match node:
            case ast.BinOp(left, ast.Mult(), right):
                return " ".join(
                    f"({of(x)})" if isinstance(x, ast.BinOp) and _is_sum(x.op) else of(x) for x in (left, right)
                )
            case ast.BinOp(left, sign, right) if _is_sum(sign):
                return f"{of(left)} {'+' if isinstance(sign, ast.Add) else '-'} {of(right)}"
            case ast.Call(ast.Name(name), arguments):
                return rf"\{name}({', '.join(map(of, arguments))})"
            case ast.Name(name):
                letter, _, index = name.partition("_")
                return rf"{letter}_{{\text{{{index}}}}}" if index else letter
            case ast.Constant(number):
                return str(number)
        raise ValueError(f"{expression}: {ast.unparse(node)} is not set as LaTeX")

    return of(ast.parse(expression, mode="eval").body)


def _is_sum(sign: ast.operator) -> bool:
    return isinstance(sign, ast.Add | ast.Sub)


def state_elements(config: MixerConfig, d_model: int, tokens: int) -> float:
    """What the formula of a mixer's state gives: the floating-point numbers of one layer and sequence."""
    mathematics = MATHEMATICS[config.kind]
    fields = {**config.model_dump(), "d_model": d_model, "inf": math.inf}
    parts: list[MixerConfig] = getattr(config, "mixers", [])
    functions = {"part": lambda number: state_elements(parts[number], d_model, tokens)}
    letters = {letter: eval(value, functions, fields) for letter, value in mathematics["where"].items()}
    return eval(mathematics["state"], {"min": min}, {**letters, "T": tokens})


def _costs(presets: dict[str, RunConfig]) -> list[str]:
    """Sizes of the tiny presets, and what one layer's mixer costs."""
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
    """The README's table: the mixers of each family, with links to their equations."""
    members: dict[str, list[str]] = {family: [] for family in (*FAMILIES.values(), HYBRID)}
    for kind in MIXERS.built_in():
        members[_family(kind)].append(f"[`{kind}`](docs/reference/mixers.md#{kind})")
    return table(["family", "mixers"], [(family, ", ".join(kinds)) for family, kinds in members.items()])


def trained(results: Results) -> list[str]:
    """A sentence, and a row an entry; losses by seed, speeds over retention's."""
    seeds = sorted({run.seed for run in results.runs})
    losses = {(run.entry, run.seed): run.validation_loss for run in results.runs}
    speeds = {row.entry: row.tokens_per_second for row in results.speed.train}
    decode = {row.entry: row for row in results.speed.decode}
    retention = next((speeds.get(entry.name) for entry in results.entries if entry.mixers == ("retention",)), None)
    rows = []
    for entry in results.entries:
        own = [losses.get((entry.name, seed)) for seed in seeds]
        found = [loss for loss in own if loss is not None]
        own += [mean(found) if len(found) == len(seeds) else None] if len(seeds) > 1 else []
        speed, token = speeds.get(entry.name), decode.get(entry.name)
        ratio = f" ({speed / retention:.2f})" if speed and retention else ""
        cells = [f"`{entry.mixers[0]}`", f"`{entry.name}`", f"{entry.parameters:,}"]
        cells += ["" if loss is None else f"{loss:.4f}" for loss in own]
        cells += [f"{speed:,.0f}{ratio}" if speed else "", f"{token.state_bytes:,}" if token else ""]
        rows.append([*cells, f"{1e3 * token.seconds:.2f}" if token and token.seconds else ""])
    heads = [f"loss, seed {seed}" for seed in seeds] + (["mean"] if len(seeds) > 1 else [])
    return [
        "Tokens per second are medians of interleaved training steps of the models, on one thread, in brackets over",
        "retention's; a decoded token is the median of as many.",
        "",
        *table(["mixer", "preset", "parameters", *heads, "tokens/s", "state, bytes", "ms per decoded token"], rows),
    ]


def families(results: Results) -> Figure:
    """The loss over the size of the state, a series for each op family."""
    losses: dict[str, list[float]] = {}
    for run in results.runs:
        if run.validation_loss is not None:
            losses.setdefault(run.entry, []).append(run.validation_loss)
    points: dict[str, list[Point]] = {name: [] for name in (*FAMILIES.values(), HYBRID)}
    for entry in results.entries:
        found = losses.get(entry.name, [])
        if found:
            point = Point(float(entry.state_bytes), mean(found), min(found), max(found))
            points[_family(entry.mixers[0])].append(point)
    series = [Series(name, sorted(found), style) for style, (name, found) in enumerate(points.items()) if found]
    state, loss = (
        Axis("state of one sequence", unit="bytes", log=True),
        Axis("validation loss (nats per byte)", log=False),
    )
    caption = "Means, and the ends of both seeds; down and to the left is better."
    return Figure("families", "Loss by state", caption, state, loss, series, joined=False)


def _family(kind: str) -> str:
    source = Path(importlib.import_module(MIXERS.origin(kind)).__file__ or "").read_text(encoding="utf-8")
    found = [name for name in FAMILIES if f"from ..ops.{name} import" in source.replace("ops.dplr", "ops.delta")]
    return FAMILIES[found[0]] if found else HYBRID


def _docstring(kind: str) -> str:
    return importlib.import_module(MIXERS.origin(kind)).__doc__ or ""


def _plain_recurrence(kind: str) -> str:
    """The equation of a mixer's docstring that says how its state moves; of one without, what its output is."""
    lines = [line.strip() for line in _docstring(kind).splitlines() if line.startswith("    ")]
    # equations of one line have spaces between them, and may have some around their sign
    parts = [part for line in lines for part in re.split(r"(?<=[^\s=-])\s{2,}(?=[^\s=<])", line)]
    equations = [" ".join(part.rstrip(";").split()) for part in parts]
    for pattern in (r".+= .*_\{\w ?- ?1\}", r".+ <- ", r"[oyh](_\w)? = "):
        for equation in equations:
            if re.match(pattern, equation):
                return equation
    raise ValueError(f"{MIXERS.origin(kind)}: no indented line of its docstring is an equation of its state or output")


def _formulas(kind: str) -> list[str]:
    """A mixer's docstring, its equations as LaTeX, or as the code that indented lines are in Markdown."""
    paragraphs = _docstring(kind).strip().split("\n\n")
    if kind in MATHEMATICS:
        block = "\n".join(["```math", r"\begin{split}", MATHEMATICS[kind]["equations"].strip(), r"\end{split}", "```"])
        text = [paragraph for paragraph in paragraphs if not paragraph.startswith("    ")]
        paragraphs = [text[0], block, *map(_inline, text[1:])]
    lines = "\n\n".join(paragraphs).splitlines()
    return [line if line.startswith("    ") else ARXIV.sub(LINK, line) for line in lines]


def _inline(text: str) -> str:
    """Prose with the few formulas that it has as LaTeX."""
    for pattern, formula in INLINE.items():
        text = re.sub(pattern, formula, text)
    return text


if __name__ == "__main__":
    for file, text in files(*sys.argv[1:]).items():
        write_file(text, file)
