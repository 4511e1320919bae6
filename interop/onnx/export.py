"""Export of a trained model to one ONNX file, which runs without seqmix: in ONNX Runtime, and in a browser."""

import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ...data.tasks.text import Text
from ...mixers import SequenceMixer
from ...models import LanguageModel
from ...models.quantization import weights_of
from ...registry import DataError, SeqmixError, replacing, require_name
from ...training import Choice, load_run, read_config
from ...training.length_eval import open_text
from .states import layout_of

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""Packages that an export needs."""
OPSETS = ("contrib", "27")
"""Sources of the operator LinearAttention: ONNX Runtime's own operators, or version 27 of the standard."""
WEIGHTS = ("int8", "int4")
"""Formats of quantised weights."""
MAX_BYTES = 2**31 - 2**20
"""Size of the largest ONNX file: the format ends at 2 GiB."""


class OnnxExport(NamedTuple):
    """Measurements of an export."""

    losses: tuple[float, float] | None
    """Validation loss in nats per token before and after the weights were quantised; None if it was not measured."""
    tokens: int
    """Number of tokens measured."""


def export_onnx(
    run: str | Path,
    out: Path,
    *,
    opset: str = "contrib",
    weights: str | None = None,
    views: bool = False,
    choice: Choice = "newest",
    ema: bool = False,
    trust: bool = False,
    on_note: Callable[[str], object] = warnings.warn,
) -> OnnxExport:
    """Write the trained model of a run as one ONNX graph, with its configuration and tokenizer in the metadata.

    The graph maps (tokens, state) to (logits, state), for any batch size and any length of a segment. It is compared
    with the model before it is written.

    Args:
        run: the run directory, or a file of `export_run`.
        out: the output file, *.onnx, which must not exist.
        opset: where the operator LinearAttention comes from, one of `OPSETS`.
        weights: "int8" or "int4" to quantise the weights; the loss is then measured on the run's validation split.
        views: True to add the outputs of `views`, for a page that shows the model at work.
        choice: the checkpoint, as in `load_run`.
        ema: as in `load_run`.
        trust: as in `load_run`.
        on_note: as in `load_run`.

    Raises:
        SeqmixError: an option is invalid, a package is missing, the model cannot be exported, or the file cannot be
            written.
    """
    require_name("opset", opset, OPSETS)
    if weights is not None:
        require_name("weight format", weights, WEIGHTS)
    require_packages("exporting to ONNX", *PACKAGES)
    if out.suffix != ".onnx":
        raise SeqmixError(f"an ONNX file needs a name that ends in .onnx, got {out}: try {out.with_suffix('.onnx')}")
    if out.exists():
        raise DataError(f"{out} already exists: give --out the name of a new file")
    source = None if weights is None else _validation_split(Path(run), on_note)
    model = load_run(run, choice=choice, ema=ema, trust=trust, on_note=on_note)
    require_exportable(model)
    from .graph import build_graph  # after the packages are known to be there
    from .metadata import add_metadata, seal
    from .session import OnnxModel, require_equal

    layout = layout_of(model)
    graph = build_graph(model, layout, opset=opset, views=views)
    name = Path(run).stem if Path(run).is_file() else Path(run).resolve().name
    add_metadata(graph, model, layout, name=name, weights=weights)
    exported = OnnxModel.from_bytes(graph.SerializeToString())
    require_equal(exported, model)
    losses = None
    tokens = 0
    if weights is not None:
        from .quantize import quantize, validation_loss

        graph = quantize(graph, weights)
        if source is not None:
            before, tokens = validation_loss(exported, source)
            after, _ = validation_loss(OnnxModel.from_bytes(graph.SerializeToString()), source)
            losses = before, after
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as partial:
            partial.write_bytes(seal(graph.SerializeToString()))
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from error
    return OnnxExport(losses, tokens)


def _validation_split(run: Path, on_note: Callable[[str], object]) -> Text | None:
    """Return the text on which the loss is measured; None, and a note, if there is none."""
    try:
        config = read_config(run)
        return open_text(config, run, [config.data.sequence_length])
    except SeqmixError as error:
        on_note(f"the loss of quantised weights is not measured: {error}")
        return None


def require_packages(purpose: str, *packages: str) -> None:
    """Raise a SeqmixError if a package is not installed."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise SeqmixError(f"{purpose} needs the packages {', '.join(missing)}: pip install 'seqmix[onnx]'")


UNTRANSLATED: Mapping[str, str] = {
    **dict.fromkeys(
        ("moba", "nsa", "dsa", "latent_dsa"), "it chooses the keys that it reads, which has no ONNX function"
    ),
    **dict.fromkeys(("m2rnn", "slstm"), "its cell has no ONNX function"),
    "path_attention": "its triangular systems have no ONNX function",
    **dict.fromkeys(
        ("titans", "ttt"),
        "the number of its mini-batches depends on the length of the text, which is a symbol in the graph",
    ),
}
"""Built-in mixers that cannot be exported, each with the reason."""


def require_exportable(model: LanguageModel) -> None:
    """Raise a SeqmixError, by the name of the mixer, if a model cannot become one graph with states.

    Raises:
        SeqmixError: the model has no state, a mixer cannot be traced, or the file would be too large.
    """
    if model.config.readout != "each":
        raise SeqmixError(
            f"a model with readout = {model.config.readout} has no state and cannot be exported to ONNX: it predicts "
            "whole sequences"
        )
    for block in model.distinct_blocks:
        mixer = block.mixer
        if not mixer.traits.has_state:
            raise SeqmixError(f"{mixer.kind} has no state and cannot be exported to ONNX, which decodes by states")
        for part in mixer.modules():
            if isinstance(part, SequenceMixer) and (reason := UNTRANSLATED.get(part.kind)) is not None:
                raise SeqmixError(f"{part.kind} cannot be exported to ONNX: {reason}")
        if not mixer.traits.compiles:
            raise SeqmixError(f"{mixer.kind} declares compiles=False and cannot be traced, so not exported to ONNX")
    if (quantised := weights_of(model)) is not None:
        raise SeqmixError(
            f"a model with {quantised} weights cannot be exported to ONNX, which has formats of its own: export the "
            "run directory with --weights (weights=...)"
        )
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    if model.config.tie_embeddings:  # the output projection is the transposed matrix, a second one
        size += model.embedding.weight.numel() * 4
    if size > MAX_BYTES:
        raise SeqmixError(
            f"an ONNX file has at most 2 GiB, and the float32 weights of this model have {size / 2**30:.1f} GiB"
        )
