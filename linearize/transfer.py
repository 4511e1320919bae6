"""What new mixers take over: projections by role and head, the reach of heads as decays, and a fitted output."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Source
from ..mixers import SequenceMixer
from ..mixers.influence import captured, reach_of, weights_of
from ..models import LanguageModel
from ..ops.runtime.recording import recorded

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
    done = {}
    source = old.projections
    target = new.projections
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
        theirs, ours = ("{} x {}".format(*each[role].shape[:2]) for each in (source, target))
        done[role] = "copied" if theirs == ours else f"{theirs} to {ours}"
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


def calibrate(
    teacher: LanguageModel, student: LanguageModel, layers: Sequence[int], source: Source, rows: int, tokens: int
) -> dict[int, list[str]]:
    """Set decays by the reach of the teacher's heads, then fit output projections to the teacher's outputs.

    On at least so many tokens, in batches of `rows` sequences; by layer, what was set, in words.
    """
    done: dict[int, list[str]] = {layer: [] for layer in layers}
    sums: dict[int, tuple[Any, Any, nn.Linear]] = {}
    seen = 0
    step = 0
    while seen < tokens:
        batch = source.training_batch(step, rows, seed=2**31 - 1)  # not those of the stages
        seen = seen + batch.inputs.numel()
        step = step + 1
        with torch.no_grad(), captured({layer: teacher.blocks[layer].mixer for layer in layers}) as found:
            teacher.run_blocks(teacher.embed(batch.inputs.to(teacher.device)))
        for layer, (x, y, _) in found.items():
            old, new = teacher.blocks[layer].mixer, student.blocks[layer].mixer
            if step == 1 and new.kind != old.kind:
                done[layer] += _set_reach(old, new, x[:4])
            if (linear := _output(new)) is not None and new.kind != old.kind:
                with torch.no_grad(), captured({0: linear}) as inner:
                    new(x)
                h = inner[0].x.flatten(0, -2).double()
                wanted = y.flatten(0, -2).double()
                gram, product, _ = sums.get(layer, (0.0, 0.0, linear))
                sums[layer] = gram + h.T @ h, product + h.T @ wanted, linear
    for layer, (gram, product, linear) in sums.items():
        ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        with torch.no_grad():
            linear.weight.copy_(torch.linalg.solve(gram + ridge, product).T)
        done[layer].append("o fitted to the teacher's outputs")
    return done


def _set_reach(old: SequenceMixer, new: SequenceMixer, x: Tensor) -> list[str]:
    """Give the new mixer's heads the reach of the old one's."""
    if new.takes_first_values:
        return []
    length = x.shape[1]
    queries = sorted({int(n) for n in torch.linspace(length // 2, length - 1, QUERIES)})
    with torch.no_grad(), recorded() as calls:
        new(x)
    if not calls:
        return []
    reach = reach_of(weights_of(old, x, queries)[0], queries)
    heads = calls[-1].output.shape[2]
    by = reach.clamp(min=0.1).log()[:, None, None]
    regrouped = by_heads(by, heads)
    mean = by.mean().expand(heads) if regrouped is None else regrouped.flatten(1).mean(1)
    names = new.set_reach(mean.exp().to(x))
    span = f"{reach.min():.0f} to {reach.max():.0f} tokens"
    return [f"{name} by the teacher's reach ({span})" for name in names]


def _output(mixer: SequenceMixer) -> nn.Linear | None:
    """The linear map whose weight is the projection `o`; None where there is none, or it has a bias."""
    at = mixer.projections["o"].data_ptr() if "o" in mixer.projections else None
    found = (m for m in mixer.modules() if isinstance(m, nn.Linear) and m.weight.data_ptr() == at and m.bias is None)
    return next(found, None)


def initial_of(new: SequenceMixer, before: Mapping[str, Tensor], done: Collection[str]) -> tuple[str, ...]:
    """Parameters of which something kept its initialisation, `before`, beside those that were taken over whole."""
    found = []
    for name, parameter in new.named_parameters():
        same = int((parameter == before[name]).sum())
        if same and name not in done:
            found.append(name if same == parameter.numel() else f"{same:,} of {parameter.numel():,} in {name}")
    return tuple(found)
