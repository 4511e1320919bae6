"""Generate docs/reference/api.md and the pages of docs/reference/api/ from docstrings: `python docs/api.py`.

Griffe reads the source without importing it. Names that start with an underscore are left out.
"""

from pathlib import Path

import griffe

from seqmix.lab.markdown import fill, table
from seqmix.registry import write_file

TARGET = Path(__file__).with_name("reference") / "api.md"
PAGES = TARGET.parent / "api"
SOURCES = Path(__file__).parents[1] / ".typing"
"""A folder that contains the repository under the name `seqmix`."""

SECTIONS: dict[str, tuple[str, ...]] = {
    "Configurations and runs": (
        "training.warm_start.load_config",
        "training.run.train",
        "training.checkpoint.saved_run.load_run",
        "training.checkpoint.saved_run.export_run",
        "training.monitoring.events",
        "training.checkpoint.averaging.average_run",
        "training.checkpoint.status.read_status",
        "training.checkpoint.status.Status",
        "training.monitoring.loggers.Logger",
    ),
    "Models": (
        "models.builder.build_model",
        "models.language_model.LanguageModel",
        "models.language_model.ModelOutput",
        "models.accounting.account",
        "models.accounting.ModelCost",
    ),
    "Generation": (
        "models.sampling.Sampling",
        "models.speculation.Speculation",
        "models.drafting.Draft",
        "models.generate.generate_text",
        "models.generate.stream_text",
        "models.generate.generate_tokens",
        "models.prefill.prefill",
        "models.generate.cache_text",
        "models.prompt_cache.cache_tokens",
        "models.prompt_cache.PromptCache",
        "models.quantization.quantize_model",
        "training.checkpoint.saved_prompt_cache.save_prompt_cache",
        "training.checkpoint.saved_prompt_cache.load_prompt_cache",
    ),
    "Mixers": (
        "ops.runtime.paradigm.Paradigm",
        "mixers.base.traits.Traits",
        "mixers.base.contract.MixerConfig",
        "mixers.base.contract.SequenceMixer",
        "mixers.base.layer_call.LayerCall",
        "mixers.base.layer_call.MixResult",
        "mixers.base.state",
        "registry.registry.Registry",
    ),
    "Conformance": (
        "testing.check_mixer.check_mixer",
        "testing.check_mixer.parametrize_checks",
        "testing.check_mixer.reproduce",
        "testing.adapters.module.adapt",
        "testing.adapters.op.adapt_op",
        "testing.check.check",
        "testing.mixer.trial.Trial",
        "testing.check_kernel.check_kernel",
        "testing.check_kernel.parametrize_kernels",
        "testing.check_kernel.reproduce_kernel",
        "ops.runtime.kernel.Kernel",
        "ops.runtime.kernel.Probe",
    ),
    "Ops": (
        "ops.runtime.call",
        "ops.runtime.packing.Documents",
        "ops.decay.api.decay",
        "ops.decay.api.decay_reading_values",
        "ops.decay.api.decay_flops",
        "ops.delta.api.delta",
        "ops.delta.api.delta_product",
        "ops.delta.api.delta_flops",
        "ops.delta.api.unit_norm",
        "ops.dplr.api.dplr",
        "ops.attention.api.softmax_attention",
        "ops.attention.api.softmax_flops",
        "ops.attention.api.SoftmaxOptions",
        "ops.attention.kv_cache.GrowingCache",
        "ops.attention.kv_cache.RingCache",
        "ops.attention.kv_cache.empty_cache",
        "ops.sparse_attention.api",
        "ops.sparse_attention.tokens.Index",
        "ops.scan.api",
        "ops.convolution.short",
        "ops.convolution.long",
    ),
    "Parts of mixers": (
        "mixers.parts.qkv",
        "mixers.parts.matrix_state",
        "mixers.parts.scan_state",
        "mixers.parts.token_shift",
        "mixers.parts.short_convolution",
        "mixers.parts.gates",
        "mixers.parts.cached",
        "mixers.parts.qk_norm",
        "mixers.attention.xpos_log_decay",
        "mixers.attention.alibi_slopes",
        "mixers.parts.rotary",
        "mixers.retention.FixedDecay",
        "mixers.retention.scheduled",
        "mixers.parts.time_step",
        "mixers.parts.widths",
    ),
    "Your own recurrence or op": (
        "ops.recurrence.family",
        "ops.recurrence.token_loop",
        "ops.recurrence.chunk_loop",
        "ops.runtime.custom_op",
    ),
    "Optimizer and data": (
        "training.optimizer",
        "data.corpus.read_corpus",
        "data.packing.pack",
        "data.token_file.write_token_file",
        "data.token_file.TokenFile",
        "data.source.DataConfig",
        "data.source.Source",
        "data.task.TaskConfig",
    ),
    "Tokenizers": (
        "models.tokenizer.Tokenizer",
        "models.tokenizer.ByteTokenizer",
        "models.subword.load_tokenizer",
        "models.subword.train_bpe",
    ),
    "Hugging Face": (
        "interop.hf.modeling.SeqmixForCausalLM",
        "interop.hf.cache.SeqmixCache",
        "interop.hf.replace.replace_mixers",
        "interop.hf.tokenizer.hf_tokenizer",
        "interop.hf.export.export_hf",
    ),
    "ONNX": (
        "interop.onnx.export.export_onnx",
        "interop.onnx.export.OnnxExport",
        "interop.onnx.session.OnnxModel",
        "interop.onnx.generate.stream_text",
        "interop.onnx.metadata",
        "interop.onnx.views",
    ),
    "Evaluation": (
        "training.length_eval",
        "models.scoring",
        "interop.lm_eval.evaluate_tasks",
        "lab.precision.measure.state_precision",
        "lab.precision.measure.Precision",
        "lab.precision.measure.FormatResult",
        "lab.precision.state_format.StateFormat",
    ),
    "Errors": (
        "registry.errors.SeqmixError",
        "registry.errors.ConfigError",
        "registry.errors.DataError",
        "mixers.base.traits.ContractError",
        "training.checkpoint.errors.TrainingError",
        "training.checkpoint.errors.DivergenceError",
        "training.tensor_files.CheckpointError",
    ),
}
"""Titles of the pages, each with the names that it documents, without the prefix `seqmix.`. A module stands for its
public functions and classes."""


def files() -> dict[Path, str]:
    """Return the text of the index, and of the page of each section."""
    package = griffe.load("seqmix", search_paths=[SOURCES])
    index: list[str] = []
    pages = {}
    for title, names in SECTIONS.items():
        members = [member for name in names for member in _members(package[name])]
        page = f"{title.lower().replace(' ', '-')}.md"
        rows = [(f"[`{member.name}`](api/{page}#{member.name.lower()})", _summary(member)) for member in members]
        index += [f"## {title}", "", *table(["name", "description"], rows), ""]
        lines = [line for member in members for line in _section(member)]
        pages[PAGES / page] = "\n".join([f"# {title}", "", "Generated by `python docs/api.py`.", "", *lines])
    return {TARGET: fill(TARGET, {"api": index[:-1]}), **pages}


def _summary(member: griffe.Object) -> str:
    """Return the first paragraph of a docstring on one line, with `|` escaped for a table cell."""
    text = member.docstring.value if member.docstring else ""
    return " ".join(text.partition("\n\n")[0].split()).replace("|", r"\|")


def _members(member: griffe.Object) -> list[griffe.Object]:
    """Return the public functions and classes that a module defines; for a function or a class, only itself."""
    if not member.is_module:
        return [member]
    return [each for each in _public_members(member) if each.is_function or each.is_class]


def _public_members(owner: griffe.Object) -> list[griffe.Object]:
    """Return the public members with a docstring that `owner` defines, in source order."""
    members = [m for m in owner.members.values() if not m.is_alias and not m.name.startswith("_") and m.docstring]
    return sorted(members, key=lambda member: member.lineno or 0)


def _section(member: griffe.Object) -> list[str]:
    """Return the lines of a function, or of a class with its fields and methods."""
    lines = [f"## {member.name}", "", f"`{member.canonical_path}`", ""]
    if isinstance(member, griffe.Function):
        return [*lines, *_code(_signature(member)), *_docstring(member)]
    if isinstance(member, griffe.Class):
        bases = ", ".join(str(base) for base in member.bases)
        lines += [*_code(f"class {member.name}({bases})" if bases else f"class {member.name}"), *_docstring(member)]
        fields = [m for m in _public_members(member) if m.is_attribute]
        for field in fields:
            annotation = f": {field.annotation}" if field.annotation else ""
            value = f" = {field.value}" if field.value else ""
            lines.append(f"- `{field.name}{annotation}{value}`: {_one_line(field)}")
        lines += [""] if fields else []
        for method in (m for m in _public_members(member) if isinstance(m, griffe.Function)):
            lines += [f"**{method.name}**", "", *_code(_signature(method)), *_docstring(method)]
    return lines


def _code(text: str) -> list[str]:
    """Return text as a code block."""
    return ["```text", text, "```", ""]


def _signature(function: griffe.Function) -> str:
    """Return a signature on one line if it fits into 100 characters; otherwise with one parameter per line."""
    signature = function.signature()
    if len(signature) <= 100:
        return signature
    lines, depth = [""], 0  # commas inside brackets do not separate parameters
    for character in function.signature(return_type=False).removeprefix(f"{function.name}(").removesuffix(")"):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            lines.append("")
        else:
            lines[-1] += character
    returns = f" -> {function.returns}" if function.returns else ""
    return "\n".join([f"{function.name}(", *(f"    {line.strip()}," for line in lines), f"){returns}"])


def _one_line(member: griffe.Object) -> str:
    """Return a docstring on one line."""
    return " ".join(member.docstring.value.split()) if member.docstring else ""


def _docstring(member: griffe.Object) -> list[str]:
    """Return the sections of a docstring as Markdown lines."""
    if member.docstring is None:
        return []
    lines: list[str] = []
    for section in member.docstring.parse("google", warnings=False):
        match section.kind:
            case griffe.DocstringSectionKind.text:
                lines += [section.value, ""]
            case griffe.DocstringSectionKind.parameters:
                lines += [f"- `{each.name}`: {' '.join(each.description.split())}" for each in section.value] + [""]
            case griffe.DocstringSectionKind.returns:
                sentences = " ".join(" ".join(_return_text(each).split()) for each in section.value)
                lines += [f"Returns: {sentences}", ""]
            case griffe.DocstringSectionKind.raises:
                lines += [f"- raises `{e.annotation}`: {' '.join(e.description.split())}" for e in section.value] + [""]
            case _:
                raise ValueError(f"{member.canonical_path}: no Markdown for a section of {section.kind}")
    return lines


def _return_text(value: griffe.DocstringReturn) -> str:
    """Return the text of a `Returns:` entry. Griffe parses the words before a colon as a name, so join them again."""
    return f"{value.name}: {value.description}" if value.name else value.description


if __name__ == "__main__":
    for file, text in files().items():
        write_file(text, file)
