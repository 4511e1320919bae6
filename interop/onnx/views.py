"""Views: what a model does at each token, as further outputs of an exported graph, for pages that show it.

    decay      [batch, length, heads]           factor of each head's state, 0 to 1; a mean over the keys of a head
    write      [batch, length, heads]           strength with which each head writes (delta rules)
    attention  [batch, heads, length, keys]     share of each key in each query's softmax

The keys of an attention are the slots of its cache, then the tokens of the segment. A cache without a window is in the
order of tokens; with a window of W, slot p mod W has the key at position p. Recurrences by channel have one head per
channel.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...models import LanguageModel
from ...ops.recurrence.family import Recurrence
from ...ops.scan.diagonal import DIAGONAL, Diagonal
from ...ops.scan.elementwise import SCAN, Scan
from ...ops.scan.logarithmic import LOG_SCAN
from ...ops.scan.selective import SELECTIVE, Selective
from .lowering import RECURRENCES

AXES = {
    "decay": ["batch", "length", "heads"],
    "write": ["batch", "length", "heads"],
    "attention": ["batch", "heads", "length", "keys"],
}
"""Names of the axes of each kind of view."""


class View(NamedTuple):
    """One view of one layer."""

    layer: int
    kind: str
    """A key of `AXES`."""
    value: Tensor

    @property
    def name(self) -> str:
        """Name of the graph's output."""
        return f"view.{self.layer}.{self.kind}"


@contextmanager
def recorded_views(model: LanguageModel, tokens: Tensor) -> Iterator[list[View]]:
    """Record the views of a model's forward pass over `tokens` [B T] in the list that is yielded: one per layer and
    kind, the first."""
    recorder = _Recorder(*tokens.shape)

    def enter(module: nn.Module, args: Any) -> None:  # noqa: ARG001
        recorder.layer += 1
        recorder.is_in_mixer = True

    def leave(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
        recorder.is_in_mixer = False

    handles = []
    for block in model.distinct_blocks:
        handles += [block.mixer.register_forward_pre_hook(enter), block.mixer.register_forward_hook(leave)]
    try:
        with recorder:
            yield recorder.views
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchFunctionMode):
    """Mode that sees the calls of ops inside mixers."""

    def __init__(self, batch: Any, length: Any) -> None:
        super().__init__()
        self.shape = (batch, length)
        self.layer = -1
        self.is_in_mixer = False
        self.views: list[View] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.is_in_mixer:
            return result
        if func in RECURRENCES:
            self._add_recurrence(Recurrence._make(args))
        elif func in (SCAN.op, LOG_SCAN.op):
            self._add("decay", Scan._make(args).log_decay.exp())
        elif func is SELECTIVE.op:
            x = Selective._make(args)
            self._add("decay", (x.step[:, :, None] * x.rate).exp().mean(2))
        elif func is DIAGONAL.op:
            self._add("decay", Diagonal._make(args).log_decay.exp().mean(0))
        elif func is torch.nn.functional.scaled_dot_product_attention:
            self._add("attention", _attention_weights(*args, **kwargs))
        elif func is Tensor.softmax and args[0].ndim == 4:
            self._add("attention", result)
        return result

    def _add_recurrence(self, x: Recurrence) -> None:
        if x.log_decay is not None:
            decay = x.log_decay if x.log_decay.ndim == 1 else self._by_token(x.log_decay).sum(2)
            self._add("decay", decay.exp() if decay.ndim < 4 else decay.exp().mean(-1))
        if x.beta is not None:
            self._add("write", self._by_token(x.beta).mean(2))

    def _by_token(self, x: Tensor) -> Tensor:
        """Return x [B T*n ..], which has n steps per token (DeltaProduct), as [B T n ..]."""
        return x.unflatten(1, (self.shape[1], -1))

    def _add(self, kind: str, value: Tensor) -> None:
        if any((view.layer, view.kind) == (self.layer, kind) for view in self.views):
            return
        if kind != "attention":  # the same for all tokens, or for each token
            value = (value if value.ndim == 1 else value.flatten(2)).expand(*self.shape, -1)
        self.views.append(View(self.layer, kind, value.float()))


def _attention_weights(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, scale: float, enable_gqa: bool, **others: Any
) -> Tensor:
    """Return the weights [B H T M] of torch's scaled_dot_product_attention."""
    del v, others
    if enable_gqa:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.mT * scale
    masked = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.softmax(masked, -1)
