"""Transfer from old mixers to new ones: copy projections, set decays by the reach of heads, fit output projections."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...data import Source
from ...mixers import SequenceMixer
from ...mixers.base.influence import reach_of, record_calls, weights_of
from ...mixers.base.layer_call import LayerCall
from ...models import LanguageModel
from ...ops.runtime.recording import recorded

QUERIES = 16
"""Number of query tokens, in the second half of a sequence, at which the reach of heads is measured."""


@torch.no_grad()
def transfer(old: SequenceMixer, new: SequenceMixer, roles: Sequence[str]) -> dict[str, str]:
    """Copy parameters of the old mixer into the new one.

    Between mixers of the same kind, all parameters of equal name and shape are copied; otherwise the projections in
    `roles` (`q`, `k`, `v`, `o`) are copied head by head.

    Returns:
        A description of each copy, such as "copied", by the name of the parameter or the role of the projection.
    """
    if new.kind == old.kind:
        old_parameters = dict(old.named_parameters())
        common = {
            name: parameter
            for name, parameter in new.named_parameters()
            if name in old_parameters and old_parameters[name].shape == parameter.shape
        }
        for name, parameter in common.items():
            parameter.copy_(old_parameters[name])
        return dict.fromkeys(common, "copied")
    done = {}
    source = old.projections
    target = new.projections
    for role in roles:
        if role not in source or role not in target:
            continue
        weight = source[role]
        if weight.shape[0] != target[role].shape[0] and role in "kv":  # heads that share keys and values
            weight = weight.repeat_interleave(source["q"].shape[0] // weight.shape[0], dim=0)
        regrouped = regroup_heads(weight, target[role].shape[0])
        if regrouped is None:
            continue
        width = min(regrouped.shape[1], target[role].shape[1])
        target[role][:, :width] = regrouped[:, :width]
        old_shape, new_shape = ("{} x {}".format(*each[role].shape[:2]) for each in (source, target))
        done[role] = "copied" if old_shape == new_shape else f"{old_shape} to {new_shape}"
    return done


def regroup_heads(weight: Tensor, heads: int) -> Tensor | None:
    """Divide a weight [H K D] into another number of heads; None if neither number divides the other.

    With fewer heads, neighbouring heads are joined. With more heads, each head is split, or repeated if its width
    cannot be divided.
    """
    old_heads, width = weight.shape[:2]
    if old_heads % heads == 0:
        return weight.reshape(heads, old_heads // heads * width, -1)
    if heads % old_heads:
        return None
    parts = heads // old_heads
    return weight.repeat_interleave(parts, 0) if width % parts else weight.reshape(heads, width // parts, -1)


def calibrate(
    teacher: LanguageModel, student: LanguageModel, layers: Sequence[int], source: Source, batch_size: int, tokens: int
) -> dict[int, list[str]]:
    """Set decays so that heads reach as far back as the teacher's, then fit output projections to its outputs.

    Args:
        teacher: the teacher.
        student: the student, whose new mixers are changed.
        layers: indices of the layers with new mixers.
        source: the data.
        batch_size: number of sequences per batch.
        tokens: number of tokens to use, rounded up to whole batches.

    Returns:
        Descriptions of what was set, by the index of the layer.
    """
    done: dict[int, list[str]] = {layer: [] for layer in layers}
    sums: dict[int, tuple[Any, Any, nn.Linear]] = {}
    tokens_used = 0
    step = 0
    while tokens_used < tokens:
        batch = source.training_batch(step, batch_size, seed=2**31 - 1)  # other batches than those of the stages
        tokens_used = tokens_used + batch.inputs.numel()
        step = step + 1
        with torch.no_grad(), record_calls({layer: teacher.blocks[layer].mixer for layer in layers}) as teacher_calls:
            teacher.run_blocks(teacher.embed(batch.inputs.to(teacher.device)))
        for layer, (x, y, outside) in teacher_calls.items():
            old, new = teacher.blocks[layer].mixer, student.blocks[layer].mixer
            if new.takes_first_values:  # they come from an earlier layer, which is not trained yet
                continue
            if step == 1 and new.kind != old.kind:
                done[layer] += _set_reach(old, new, x[:4], _rows(outside, 4))
            if (linear := _output_projection(new)) is not None and new.kind != old.kind:
                with torch.no_grad(), record_calls({0: linear}) as linear_calls:
                    new(x)
                h = linear_calls[0].x.flatten(0, -2).double()
                expected = y.flatten(0, -2).double()
                gram, product, _ = sums.get(layer, (0.0, 0.0, linear))
                sums[layer] = gram + h.T @ h, product + h.T @ expected, linear
    for layer, (gram, product, linear) in sums.items():
        ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        with torch.no_grad():
            linear.weight.copy_(torch.linalg.solve(gram + ridge, product).T)
        done[layer].append("o fitted to the teacher's outputs")
    return done


def _rows(call: LayerCall, number: int) -> LayerCall:
    """Return the values from outside of the first rows."""
    first, token = call.first_values, call.token_values
    return call._replace(
        first_values=None if first is None else first[:number], token_values=None if token is None else token[:number]
    )


def _set_reach(old: SequenceMixer, new: SequenceMixer, x: Tensor, outside: LayerCall) -> list[str]:
    """Set the decays of the new mixer so that its heads reach as far back as those of the old one.

    `outside` has the values from outside that the old mixer takes.

    Returns:
        Descriptions of what was set.
    """
    length = x.shape[1]
    queries = sorted({int(n) for n in torch.linspace(length // 2, length - 1, QUERIES)})
    with torch.no_grad(), recorded() as calls:
        new(x)
    if not calls:
        return []
    reach = reach_of(weights_of(old, x, queries, outside)[0], queries)
    heads = calls[-1].output.shape[2]
    log_reach = reach.clamp(min=0.1).log()[:, None, None]
    regrouped = regroup_heads(log_reach, heads)
    mean = log_reach.mean().expand(heads) if regrouped is None else regrouped.flatten(1).mean(1)
    names = new.set_reach(mean.exp().to(x))
    span = f"{reach.min():.0f} to {reach.max():.0f} tokens"
    return [f"{name} by the teacher's reach ({span})" for name in names]


def _output_projection(mixer: SequenceMixer) -> nn.Linear | None:
    """Return the linear map whose weight is the projection `o`; None if there is none, or if it has a bias."""
    if "o" not in mixer.projections:
        return None
    address = mixer.projections["o"].data_ptr()
    for module in mixer.modules():
        if isinstance(module, nn.Linear) and module.weight.data_ptr() == address and module.bias is None:
            return module
    return None


def initial_parameters(new: SequenceMixer, before: Mapping[str, Tensor], done: Collection[str]) -> tuple[str, ...]:
    """Return the names of the parameters that keep their initialisation, in part or as a whole.

    Args:
        new: the new mixer.
        before: its parameters at initialisation.
        done: names of parameters that were copied as a whole; they are left out of the result.
    """
    kept = []
    for name, parameter in new.named_parameters():
        unchanged = int((parameter == before[name]).sum())
        if unchanged and name not in done:
            kept.append(name if unchanged == parameter.numel() else f"{unchanged:,} of {parameter.numel():,} in {name}")
    return tuple(kept)
