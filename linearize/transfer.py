"""What new mixers take over: projections by role and head, the reach of heads as decays, and a fitted output."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Source
from ..mixers import SequenceMixer
from ..mixers.influence import reach_of, weights_of
from ..models import LanguageModel
from ..ops.recording import recorded

QUERIES = 16
"""Tokens, from the second half of a sequence, whose reach is measured."""


@torch.no_grad()
def transfer(old: SequenceMixer, new: SequenceMixer, roles: Sequence[str]) -> dict[str, str]:
    """Copy what the old mixer has into the new one: parameters of its own kind, else projections by head.

    Returns:
        By name of a parameter, or role of a projection, how it was done.
    """
    if new.kind == old.kind:
        theirs = dict(old.named_parameters())
        same = {n: p for n, p in new.named_parameters() if n in theirs and theirs[n].shape == p.shape}
        for name, parameter in same.items():
            parameter.copy_(theirs[name])
        return dict.fromkeys(same, "copied")
    done, source, target = {}, old.projections, new.projections
    for role in roles:
        if role not in source or role not in target:
            continue
        weight = source[role]
        if weight.shape[0] != target[role].shape[0] and role in "kv":  # heads that share keys and values
            weight = weight.repeat_interleave(source["q"].shape[0] // weight.shape[0], dim=0)
        if (found := by_heads(weight, target[role].shape[0])) is None:
            continue
        width = min(found.shape[1], target[role].shape[1])
        target[role][:, :width] = found[:, :width]
        done[role] = _words(source[role], target[role])
    return done


def by_heads(weight: Tensor, heads: int) -> Tensor | None:
    """[H K D] as so many heads: neighbours joined, or each one split or, where its width is not divisible, repeated."""
    own, width = weight.shape[:2]
    if own % heads == 0:
        return weight.reshape(heads, own // heads * width, -1)
    if heads % own:
        return None
    parts = heads // own
    return weight.repeat_interleave(parts, 0) if width % parts else weight.reshape(heads, width // parts, -1)


def _words(source: Tensor, target: Tensor) -> str:
    shapes = [" x ".join(map(str, weight.shape[:2])) for weight in (source, target)]
    return "copied" if shapes[0] == shapes[1] else f"{shapes[0]} to {shapes[1]}"


@contextmanager
def captured(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """By number of a module, its first input and first output of the last call while the context is open."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def hook(number: int) -> Any:
        def store(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            found[number] = args[0], output[0] if isinstance(output, tuple) else output

        return store

    handles = [module.register_forward_hook(hook(number)) for number, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def calibrate(
    teacher: LanguageModel, student: LanguageModel, layers: Sequence[int], source: Source, rows: int, tokens: int
) -> dict[int, list[str]]:
    """Set decays by the reach of the teacher's heads, then fit output projections to the teacher's outputs.

    Args:
        teacher: the teacher.
        student: the student, its projections transferred.
        layers: the swapped layers.
        source: the data.
        rows: sequences per batch.
        tokens: how many tokens, at least a batch.

    Returns:
        By layer, what was set, in words.
    """
    done: dict[int, list[str]] = {layer: [] for layer in layers}
    sums: dict[int, list[Tensor]] = {}
    seen, step = 0, 0
    while seen < tokens:
        batch = source.training_batch(step, rows, seed=2**31 - 1)  # not those of the stages
        seen, step = seen + batch.inputs.numel(), step + 1
        with torch.no_grad(), captured({layer: teacher.blocks[layer].mixer for layer in layers}) as found:
            teacher.run_blocks(teacher.embed(batch.inputs.to(teacher.device)))
        for layer, (x, y) in found.items():
            old, new = teacher.blocks[layer].mixer, student.blocks[layer].mixer
            if step == 1 and new.kind != old.kind:
                done[layer] += _set_reach(old, new, x[:4])
            if (linear := _output(new)) is not None and new.kind != old.kind:
                products = _products(new, linear, x, y)
                sums[layer] = [a + b for a, b in zip(sums[layer], products, strict=True)] if layer in sums else products
    for layer, (gram, product) in sums.items():
        linear = _output(student.blocks[layer].mixer)
        assert linear is not None
        ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        with torch.no_grad():
            linear.weight.copy_(torch.linalg.solve(gram + ridge, product).T)
        done[layer].append("o fitted to the teacher's outputs")
    return done


def _set_reach(old: SequenceMixer, new: SequenceMixer, x: Tensor) -> list[str]:
    """Give the new mixer's heads the reach of the old one's."""
    length = x.shape[1]
    queries = sorted({int(n) for n in torch.linspace(length // 2, length - 1, QUERIES)})
    with torch.no_grad(), recorded() as calls:
        new(x)
    if not calls:
        return []
    reach, heads = reach_of(weights_of(old, x, queries)[0], queries), calls[-1].output.shape[2]
    by = reach.clamp(min=0.1).log()[:, None, None]
    regrouped = by_heads(by, heads)
    mean = by.mean().expand(heads) if regrouped is None else regrouped.flatten(1).mean(1)
    names = new.set_reach(mean.exp().to(x))
    span = f"{reach.min():.0f} to {reach.max():.0f} tokens"
    return [f"{name} by the teacher's reach ({span})" for name in names]


def _output(mixer: SequenceMixer) -> nn.Linear | None:
    """The linear map whose weight is the projection `o`; None where there is none, or it has a bias."""
    if "o" not in mixer.projections:
        return None
    at = mixer.projections["o"].data_ptr()
    found = [m for m in mixer.modules() if isinstance(m, nn.Linear) and m.weight.data_ptr() == at and m.bias is None]
    return found[0] if found else None


@torch.no_grad()
def _products(new: SequenceMixer, linear: nn.Linear, x: Tensor, y: Tensor) -> list[Tensor]:
    """The products of a least squares of the output projection, of one batch."""
    with captured({0: linear}) as inner:
        new(x)
    h, wanted = inner[0][0].flatten(0, -2).double(), y.flatten(0, -2).double()
    return [h.T @ h, h.T @ wanted]


def initial_of(new: SequenceMixer, before: Mapping[str, Tensor], done: Collection[str]) -> tuple[str, ...]:
    """Parameters of which something kept its initialisation, `before`, beside those that were taken over whole."""
    found = []
    for name, parameter in new.named_parameters():
        same = int((parameter == before[name]).sum())
        if same and name not in done:
            found.append(name if same == parameter.numel() else f"{same:,} of {parameter.numel():,} in {name}")
    return tuple(found)
