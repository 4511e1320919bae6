"""Coordinate check: sizes of activations over widths after a few training steps (arXiv 2203.03466, appendix D.1).

With a parametrisation that fits the width, such as muP, a few steps change the activations of every width by the same
amount, so their sizes over widths are flat. Where sizes grow with the width, wide models need a lower learning rate.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ..data.source import Source
from ..models import LanguageModel, build_model
from ..registry import SeqmixError
from ..training import RunConfig
from ..training.optimizer import build_optimizer, set_learning_rate
from .figures.figure import Axis, Figure, Point, Series

WIDTHS = (64, 128, 256, 512)
FLAT = 0.2
"""Largest |a| at which sizes that grow as width^a count as flat: doubling the width changes them by less than 15 %."""


@dataclass(frozen=True)
class Coordinate:
    """Sizes of the activations of one part of a model at several widths.

    A size is the mean absolute value of the activations, averaged over the layers of the part.
    """

    part: str
    """`embedding`, `mixer (BLOCK)`, `ffn (BLOCK)`, `stream` (after the last layer) or `logits`."""
    before: tuple[float, ...]
    """Sizes at initialisation, one per width."""
    after: tuple[float, ...]
    """Sizes after the steps, one per width."""
    exponent: float
    """Exponent of the width in the sizes after the steps, by least squares over the logarithms."""

    @property
    def verdict(self) -> str:
        """`flat`, `grows` or `shrinks`."""
        if abs(self.exponent) <= FLAT:
            return "flat"
        return "grows" if self.exponent > 0 else "shrinks"


def coordinates(
    config: RunConfig,
    widths: Sequence[int] = WIDTHS,
    *,
    steps: int = 10,
    batch_size: int = 4,
    seeds: int = 1,
    on_width: Callable[[int], object] = lambda _: None,
) -> list[Coordinate]:
    """Train models of several widths for a few steps, and return the sizes of their activations.

    Every step has the configuration's learning rate and optimizer. All models see the same batches.

    Args:
        config: the configuration; its width is replaced.
        widths: values of `model.d_model`, at least two.
        steps: number of training steps.
        batch_size: sequences per step.
        seeds: number of seeds of the initial values, over which sizes are averaged.
        on_width: called with each width before its model is trained.

    Raises:
        SeqmixError: a model cannot be built at one of the widths, or its activations are not finite.
    """
    sizes: list[tuple[dict[str, float], dict[str, float]]] = []
    for width in widths:
        on_width(width)
        runs = [_sizes_at(config, width, steps, batch_size, seed) for seed in range(seeds)]
        before, after = ({part: fmean(run[i][part] for run in runs) for part in runs[0][i]} for i in (0, 1))
        sizes.append((before, after))
    result = []
    for part in sizes[0][0]:
        before, after = (tuple(size[moment][part] for size in sizes) for moment in (0, 1))
        result.append(Coordinate(part, before, after, _exponent(widths, after)))
    return result


def _exponent(widths: Sequence[int], sizes: Sequence[float]) -> float:
    x = torch.tensor(widths, dtype=torch.float64).log()
    y = torch.tensor(sizes, dtype=torch.float64).clamp(min=1e-30).log()
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()


def _sizes_at(
    config: RunConfig, width: int, steps: int, batch_size: int, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the sizes of activations by part, before and after the training steps."""
    try:
        model = build_model(config.model.model_copy(update={"d_model": width}), seed=seed)
    except SeqmixError as error:
        raise SeqmixError(f"d_model = {width}: {error}") from error
    source = config.open_data()
    optimizer = build_optimizer(model, config.training)
    set_learning_rate(optimizer, config.training.learning_rate)
    with _measured(model) as sizes:
        before = _forward(model, source, 0, batch_size, sizes)[1]
        for step in range(steps):
            loss, _ = _forward(model, source, step, batch_size, sizes)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            after = _forward(model, source, steps, batch_size, sizes)[1]
    if not all(map(math.isfinite, after.values())):
        raise SeqmixError(f"d_model = {width}: activations are not finite after {steps} steps: lower the learning rate")
    return before, after


def _forward(
    model: LanguageModel, source: Source, step: int, batch_size: int, sizes: dict[str, list[float]]
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of a batch, and the size of each part's activations."""
    inputs, targets = source.training_batch(step, batch_size, seed=0)
    sizes.clear()
    output = model(inputs, targets=targets, select=torch.arange(inputs.numel()))
    sizes["logits"].append(output.logits.abs().mean().item())
    return output.loss, {part: fmean(values) for part, values in sizes.items()}


@contextmanager
def _measured(model: LanguageModel) -> Iterator[dict[str, list[float]]]:
    """Context in which every forward pass adds the sizes of activations to a dictionary, by part."""
    sizes: dict[str, list[float]] = defaultdict(list)

    def measure(part: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            sizes[part].append(output.detach().abs().mean().item())

        return hook

    hooks = [model.embedding.register_forward_hook(measure("embedding"))]
    for name, block in zip(model.config.layers, model.blocks, strict=True):
        hooks.append(block.mixer.register_forward_hook(measure(f"mixer ({name})")))
        if block.ffn is not None:
            hooks.append(block.ffn.register_forward_hook(measure(f"ffn ({name})")))
    hooks.append(model.residual.register_forward_hook(measure("stream")))
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def figure_of(result: Sequence[Coordinate], widths: Sequence[int], steps: int) -> Figure:
    """Return the figure of a coordinate check: sizes after the steps over widths, one line per part."""
    series = [
        Series(one.part, [Point(width, size) for width, size in zip(widths, one.after, strict=True)], style)
        for style, one in enumerate(result)
    ]
    return Figure(
        "coordinates",
        "Activations over widths",
        f"Mean absolute value of activations after {steps} steps. Flat lines: the learning rate fits every width.",
        Axis("width d_model", log=True, ticks=widths),
        Axis("mean absolute value", log=True),
        series,
    )
