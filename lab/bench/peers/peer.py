"""Interface of a model that is measured, and the common size of all models.

All models have the width, the layers, the vocabulary and (within 1 %) the parameters of one seqmix configuration: a
wider feed-forward network makes up for a mixer with fewer parameters.
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

from ....mixers.retention import RetentionConfig
from ....models import ModelConfig, build_meta

ALL = frozenset({"train", "decode", "prefill"})
"""Names of the benchmarks of whole models."""
GPU_ONLY = "its kernels run on a GPU only"


@dataclass(frozen=True)
class Size:
    """Common size of all models, set by a seqmix configuration."""

    config: ModelConfig
    """Configuration of the seqmix model; the others match its size."""

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of the seqmix model."""
        return sum(p.numel() for p in build_meta(self.config).parameters())

    @property
    def n_heads(self) -> int:
        """Number of attention heads: heads are 64 wide, or 128 in large models."""
        return max(1, self.config.d_model // (128 if self.config.d_model >= 2048 else 64))

    @property
    def retention(self) -> RetentionConfig | None:
        """Configuration of the first retention layer; None if there is none."""
        mixers = (self.config.blocks[name].mixer for name in self.config.layers)
        return next((mixer for mixer in mixers if isinstance(mixer, RetentionConfig)), None)

    def hidden(self, mixer: int, products: int) -> int:
        """Return the hidden width of the feed-forward network that gives a model as many parameters as seqmix's.

        The width is a multiple of 8, which vector units and tensor cores need for full speed.

        Args:
            mixer: parameters of the model's mixer, in units of d_model^2.
            products: number of d_model x hidden weight matrices in its feed-forward network.
        """
        d = self.config.d_model
        # norms are neglected, having few parameters; the other models do not tie embeddings
        body = self.parameters - (1 if self.config.tie_embeddings else 2) * self.config.vocab_size * d
        return max(8, 8 * round((body / self.config.n_layers - mixer * d * d) / (products * d * 8)))


class Peer(ABC):
    """Language model of a project, with the operations that the benchmarks time.

    A state is any object from which `step` can continue. The decoding benchmark starts from `state_after`, which fills
    the state with random numbers: the values do not change the cost.
    """

    name: ClassVar[str]
    layers_at: ClassVar[str]
    """Dotted path of the layers in the module, such as "model.layers"."""
    roles: ClassVar[frozenset[str]]
    """Names of the benchmarks that measure this model."""
    compiled_roles: ClassVar[frozenset[str]] = frozenset()
    """Names of the benchmarks that can measure it compiled."""
    writes_state: ClassVar[bool] = True
    """True if a step rewrites the whole state (constant size); False for a KV cache, which is only read."""
    needs: ClassVar[tuple[str, str] | None] = None
    """Name of a module that must be installed, and of the package that provides it; None if the peer needs none."""
    needs_gpu: ClassVar[bool] = False
    needs_retention: ClassVar[bool] = False
    """True if it takes its number of heads from a retention layer of the seqmix model."""
    keeps_freed_memory: ClassVar[bool] = False
    """True if its own training program calls `keep_freed_memory`."""
    optimizer: torch.optim.Optimizer | None = None
    """Optimizer of the training benchmark."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.size = size
        self.device = device
        self.dtype = dtype
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # created in the final dtype: the largest models do not fit twice
        try:
            with device:
                self.module: Any = self.build().to(device=device, dtype=dtype)
        finally:
            torch.set_default_dtype(before)

    @classmethod
    def unavailable_reason(cls, size: Size, device: torch.device) -> str | None:
        """Return the reason why the model cannot be built here; None if it can."""
        if cls.needs_gpu and device.type != "cuda":
            return GPU_ONLY
        if cls.needs_retention and size.retention is None:
            return "expects a model with a retention layer, which sets its number of heads"
        return install_hint(*cls.needs) if cls.needs else None

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the model with random weights."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Layers of the model, first to last."""
        return list(self.module.get_submodule(self.layers_at))

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits of all tokens, [B T vocab]."""

    @abstractmethod
    def read(self, tokens: Tensor) -> Any:
        """Process a prompt [B T] and return the state after it.

        Only the logits of the last token are computed, if the model supports that.
        """

    @abstractmethod
    def state_after(self, context: int, batch: int, room: int) -> Any:
        """Return a random state of the size that it has after `context` tokens, with space for `room` more tokens."""

    def renew(self, state: Any, context: int) -> Any:  # noqa: ARG002
        """Reset a state of `state_after`, after steps from it, to its context length."""
        return state

    @abstractmethod
    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Process one token per row, [B]; return the logits after it, [B vocab], and the next state."""

    def tensors(self, state: Any) -> list[Tensor]:
        """Return the tensors of a state."""
        return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats, in float32, of `tokens` and `targets` [B T]."""
        return F.cross_entropy(self.logits(tokens).float().flatten(0, 1), targets.flatten())

    def compile(self, role: str) -> None:  # noqa: ARG002
        """Compile the functions that a benchmark runs; `role` is its name."""
        self.module.compile()

    def recompute_activations(self) -> None:
        """Make the model save only the inputs of each layer for the backward pass (activation checkpointing)."""
        for layer in self.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(p.numel() for p in self.module.parameters())

    def moved_bytes(self, state: Any) -> int:
        """Return the bytes that a step must move: the state, and all weights but the embedding (it reads one row)."""
        weights = self.parameters - self.size.config.vocab_size * self.size.config.d_model
        return weights * self.dtype.itemsize + (1 + self.writes_state) * sum(x.nbytes for x in self.tensors(state))

    def random(self, *shape: int) -> Tensor:
        """Draw normal numbers on the model's device, in its dtype."""
        return torch.randn(shape, device=self.device).to(self.dtype)


def install_hint(module: str, package: str) -> str | None:
    """Return how to install a module's package; None if the module is installed."""
    try:
        installed = find_spec(module) is not None
    except ModuleNotFoundError:  # raised for a submodule whose parent package is missing
        installed = False
    return None if installed else f"{package} is not installed: pip install {package}"


def last_of_rows(tokens: Tensor) -> Tensor:
    """Return the index of each row's last token in the flattened tokens [B*T]."""
    batch, length = tokens.shape
    return torch.arange(1, batch + 1, device=tokens.device) * length - 1
