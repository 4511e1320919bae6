"""What a model must offer to be measured, and the size that all of them have.

All have the width, the layers and the vocabulary of one seqmix configuration, and as many parameters: the width of
their feed-forward networks makes up for what their mixers have less.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ...mixers.retention import RetentionConfig
from ...models import ModelConfig, build_meta

ALL = frozenset({"train", "decode", "prefill"})
"""The benchmarks of whole models."""
GPU_ONLY = "its kernels run on a GPU only"


@dataclass(frozen=True)
class Size:
    """What all models have in common."""

    config: ModelConfig
    """Ours; the others are of its size."""

    @cached_property
    def parameters(self) -> int:
        """Of our model."""
        return sum(p.numel() for p in build_meta(self.config).parameters())

    @property
    def n_heads(self) -> int:
        """Heads of attention: 64 wide, or 128 in large models."""
        return max(1, self.config.d_model // (128 if self.config.d_model >= 2048 else 64))

    @property
    def retention(self) -> RetentionConfig | None:
        """That of the first layer which has it."""
        mixers = (self.config.blocks[name].mixer for name in self.config.layers)
        return next((mixer for mixer in mixers if isinstance(mixer, RetentionConfig)), None)

    def hidden(self, mixer: int, products: int) -> int:
        """Width inside a feed-forward network of `products` matrices, beside a mixer of `mixer` d_model^2 parameters.

        A multiple of 8, which vector units and tensor cores want.
        """
        d = self.config.d_model
        # norms have so few that they play no part; the others never tie their embeddings
        body = self.parameters - (1 if self.config.tie_embeddings else 2) * self.config.vocab_size * d
        return max(8, 8 * round((body / self.config.n_layers - mixer * d * d) / (products * d * 8)))


class Peer(ABC):
    """A language model that can be trained or decoded with.

    A state is whatever `step` goes on from; the benchmark of decoding starts from `state_after`, whose numbers are
    random, since their values change no cost.
    """

    name: ClassVar[str]
    layers_at: ClassVar[str]
    """Where its layers are, as in its state's names."""
    roles: ClassVar[frozenset[str]]
    """The benchmarks that it takes part in."""
    compiled_roles: ClassVar[frozenset[str]] = frozenset()
    """Those in which it can be compiled."""
    writes_state: ClassVar[bool] = True
    """Whether a step writes all of its state, as one of constant size; a cache is only read."""
    needs: ClassVar[tuple[str, str] | None] = None
    """The module that must be installed, and the package that has it."""
    needs_gpu: ClassVar[bool] = False
    needs_retention: ClassVar[bool] = False
    """Whether its heads are retention's."""
    keeps_freed_memory: ClassVar[bool] = False
    """Whether its own program trains with `keep_freed_memory`."""
    optimizer: torch.optim.Optimizer | None = None
    """That of the benchmark of training."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.size = size
        self.device = device
        self.dtype = dtype
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # made as it is needed: the largest do not fit twice
        try:
            with device:
                self.module: Any = self.build().to(device=device, dtype=dtype)
        finally:
            torch.set_default_dtype(before)

    @classmethod
    def missing(cls, size: Size, device: torch.device) -> str | None:
        """Why it cannot be built here, in a few words."""
        if cls.needs_gpu and device.type != "cuda":
            return GPU_ONLY
        if cls.needs_retention and size.retention is None:
            return "its heads are retention's, and the model has none"
        return not_installed(*cls.needs) if cls.needs else None

    @abstractmethod
    def build(self) -> nn.Module:
        """The model, with random weights."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Its layers."""
        return list(self.module.get_submodule(self.layers_at))

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """Of all tokens, [B T vocab]."""

    @abstractmethod
    def read(self, tokens: Tensor) -> Any:
        """Read a prompt; the state after it. Only the last token's logits are computed, where that can be had."""

    @abstractmethod
    def state_after(self, context: int, batch: int, room: int) -> Any:
        """A state as after `context` tokens, with room for more tokens."""

    def renew(self, state: Any, context: int) -> Any:  # noqa: ARG002
        """The state that `state_after` gave, after it was used: as good as new."""
        return state

    @abstractmethod
    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One more token a row, [B]: the logits after it, [B vocab], and the next state."""

    def tensors(self, state: Any) -> list[Tensor]:
        """What a state consists of."""
        return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, in float32; `tokens` and `targets` [B T]."""
        return F.cross_entropy(self.logits(tokens).float().flatten(0, 1), targets.flatten())

    def compile(self, role: str) -> None:  # noqa: ARG002
        """Compile what a benchmark runs."""
        self.module.compile()

    def recompute_activations(self) -> None:
        """Save only what goes into each layer for backward (activation checkpointing)."""
        for layer in self.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    @property
    def parameters(self) -> int:
        """How many the model has."""
        return sum(p.numel() for p in self.module.parameters())

    def moved(self, state: Any) -> int:
        """Bytes that a step must move: all weights but the embedding's, of which it reads a row, and the state."""
        weights = self.parameters - self.size.config.vocab_size * self.size.config.d_model
        return weights * self.dtype.itemsize + (1 + self.writes_state) * sum(x.nbytes for x in self.tensors(state))

    def random(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, device=self.device).to(self.dtype)


def not_installed(module: str, package: str) -> str | None:
    """What to do where a module is not there; None where it is."""
    try:
        there = find_spec(module) is not None
    except ModuleNotFoundError:  # of a submodule, whose package is not there
        there = False
    return None if there else f"{package} is not installed: pip install {package}"


def last_of_rows(tokens: Tensor) -> Tensor:
    """Indexes of the last token of each row, row by row."""
    batch, length = tokens.shape
    return torch.arange(1, batch + 1, device=tokens.device) * length - 1
