"""Write what docs/mixers.md says of the code: `python docs/mixers.py`.

Papers, recurrences and formulas are those of each mixer's module docstring: its first paragraph names the paper by its
arXiv number, indented lines are formulas. The table of what was trained is left as it is (seqmix.benchmarks.families).
"""

import importlib
import re
from pathlib import Path

from seqmix import MIXERS, MixerConfig, Paradigm, RunConfig
from seqmix.benchmarks.families import fill, mixer_kind, single_kind_presets
from seqmix.mixers.state import nbytes
from seqmix.models.builder import build_meta

TARGET = Path(__file__).with_name("mixers.md")
LENGTH = 2048
"""Tokens of the sequence whose cost is told."""
ARXIV = re.compile(r"\b(\d{4}\.\d{5})\b")


def render() -> str:
    """The page, with the parts that the code says."""
    kinds = {kind: MIXERS.resolve(kind) for kind in MIXERS.kinds() if MIXERS.origin(kind).startswith("seqmix.")}
    presets = single_kind_presets()
    page = fill(TARGET.read_text(encoding="utf-8"), "mixers", _traits(kinds, presets))
    page = fill(page, "costs", _costs(presets))
    return fill(page, "formulas", [line for kind in kinds for line in (f"### {kind}", "", *_formulas(kind), "")][:-1])


def _traits(kinds: dict[str, type[MixerConfig]], presets: dict[str, RunConfig]) -> list[str]:
    """What each mixer is and declares, as its tiny preset configures it (or in an example of it)."""
    configured = {mixer_kind(preset): preset for preset in presets.values()}
    words = {True: "yes", False: "no"}
    lines = ["| mixer | paper | recurrence | paradigms | state | packing | shift-invariant |", "|---" * 7 + "|"]
    for kind, cls in kinds.items():
        preset = configured.get(kind)
        traits = (cls.example() if preset is None else preset.model.blocks[preset.model.layers[0]].mixer).traits
        papers = ", ".join(dict.fromkeys(_linked(number) for number in ARXIV.findall(_title(kind))))
        paradigms = ", ".join(paradigm for paradigm in Paradigm if paradigm in traits.paradigms)
        recurrence = _recurrence(kind).replace("|", r"\|")
        cells = [f"[`{kind}`](#{kind})", papers, f"`{recurrence}`", paradigms, traits.state]
        lines.append(f"| {' | '.join([*cells, words[traits.packing], words[traits.shift_invariant]])} |")
    return lines


def _costs(presets: dict[str, RunConfig]) -> list[str]:
    """Sizes of the tiny presets, and what one layer's mixer costs."""
    lines = ["| mixer | preset | parameters | layers | FLOPs a token | state, bytes |", "|---" * 6 + "|"]
    for name, config in presets.items():
        model = build_meta(config.model)
        mixer = model.blocks[0].mixer
        parameters = sum(parameter.numel() for parameter in model.parameters())
        flops = mixer.flops(LENGTH, mixer.paradigm) // LENGTH
        state = nbytes(mixer.init_state(1, max_length=LENGTH))
        sizes = f"{parameters:,} | {config.model.n_layers} | {flops:,} | {state:,}"
        lines.append(f"| `{mixer.kind}` | `{name}` | {sizes} |")
    return lines


def _docstring(kind: str) -> str:
    return importlib.import_module(MIXERS.origin(kind)).__doc__ or ""


def _title(kind: str) -> str:
    """The first paragraph of a mixer's docstring."""
    return _docstring(kind).partition("\n\n")[0]


def _recurrence(kind: str) -> str:
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
    """A mixer's docstring: indented lines are code in Markdown as they are."""
    lines = _docstring(kind).strip().splitlines()
    return [line if line.startswith("    ") else ARXIV.sub(lambda found: _linked(found[1]), line) for line in lines]


def _linked(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
