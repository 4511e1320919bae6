"""Mixers side by side on the same tokens, their outputs added (Falcon-H1, arXiv 2507.22448; Hymba, arXiv 2411.13676).

    y = c_1 f_1(x) + c_2 f_2(x) + ..                 every f_i is a mixer with its own state

One block then combines the recall of attention with the constant state of a recurrence; in a hybrid whose layers
differ, each layer has only one of them. Falcon-H1 splits its channels among attention, Mamba-2 and the feed-forward
network. Here every mixer sees all channels, and has the width that its configuration gives. Hymba norms every output
before the sum, which is not done here.
"""

from collections import namedtuple
from functools import cache, reduce
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from ..ops.runtime.call import Call
from ..ops.runtime.paradigm import Paradigm
from .base.contract import MIXERS, MixerConfig, SequenceMixer, build_mixer
from .base.traits import ContractError, Traits

STATE_NAME = "ParallelHybridState"
"""Start of the names of the state types; the number of mixers follows."""

_EXAMPLES = [
    [{"kind": "linear_attention", "n_heads": 2, "chunk_size": 4}, {"kind": "attention", "n_heads": 2}],
    [{"kind": "retention", "n_heads": 2, "chunk_size": 3}, {"kind": "attention", "n_heads": 2}],
    [{"kind": "mamba2", "head_dim": 6, "d_state": 4}, {"kind": "attention", "n_heads": 2, "window": 4}],
    [{"kind": "attention", "n_heads": 2, "window": 4}, {"kind": "attention", "n_heads": 2}],
]


class ParallelHybridConfig(MixerConfig):
    """Several mixers in parallel on the same tokens, with their outputs added."""

    kind: Literal["parallel_hybrid"] = "parallel_hybrid"
    mixers: tuple[Annotated[MixerConfig, MIXERS], ...] = Field(min_length=2, strict=False, examples=_EXAMPLES)
    """Two or more mixers; the supported paradigms are those that all of them support."""
    scales: tuple[float, ...] | None = Field(default=None, strict=False, examples=[[0.5, 2.0]])
    """Factors by which the mixers' outputs are multiplied, one per mixer; 1 for all when null."""
    paradigm: Paradigm = Field(default=Paradigm.CHUNKWISE, strict=False)
    """Paradigm of training and evaluation, for all mixers."""

    @field_validator("mixers", mode="after")
    @classmethod
    def _check_paradigms(cls, mixers: tuple[MixerConfig, ...]) -> tuple[MixerConfig, ...]:
        if not _common_paradigms(mixers):
            declared = " and ".join(f"{mixer.kind} ({', '.join(sorted(mixer.traits.paradigms))})" for mixer in mixers)
            raise ValueError(f"mixers must have a paradigm in common, got {declared}")
        return mixers

    @field_validator("mixers", mode="after")
    @classmethod
    def _check_value_residual(cls, mixers: tuple[MixerConfig, ...]) -> tuple[MixerConfig, ...]:
        for mixer in mixers:
            if getattr(mixer, "value_residual", False):
                raise ValueError(f"value_residual of {mixer.kind} needs a layer for the mixer alone: leave it out")
        return mixers

    @model_validator(mode="after")
    def _check_scales(self) -> "ParallelHybridConfig":
        if self.scales is not None and len(self.scales) != len(self.mixers):
            raise ValueError(f"scales needs {len(self.mixers)} factors, one per mixer, got {len(self.scales)}")
        return self

    @property
    def traits(self) -> Traits:
        """Traits that hold for all mixers; the state grows if the state of any mixer grows."""
        all_traits = [mixer.traits for mixer in self.mixers]
        states = {traits.state for traits in all_traits}
        return Traits(
            paradigms=_common_paradigms(self.mixers),
            state=next(size for size in ("none", "growing", "constant") if size in states),
            packing=all(traits.packing for traits in all_traits),
            shift_invariant=all(traits.shift_invariant for traits in all_traits),
            parallel_from_state=all(traits.parallel_from_state for traits in all_traits),
            compiles=all(traits.compiles for traits in all_traits),
            surrogate_gradients=any(traits.surrogate_gradients for traits in all_traits),
            differentiable=all(traits.differentiable for traits in all_traits),
        )

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "ParallelHybrid":
        built = []
        for number, mixer in enumerate(self.mixers):
            try:
                built.append(build_mixer(mixer, d_model, layer_idx=layer_idx, n_layers=n_layers))
            except ContractError as error:
                raise ContractError(f"mixers.{number}: {error}") from error
        return ParallelHybrid(self, built)


def _common_paradigms(mixers: tuple[MixerConfig, ...]) -> frozenset[Paradigm]:
    return reduce(frozenset.__and__, (mixer.traits.paradigms for mixer in mixers))


@cache
def state_type(count: int) -> Any:
    """Return the state type for `count` mixers: a NamedTuple of their states."""
    state = namedtuple(f"{STATE_NAME}{count}", [f"mixer_{number}" for number in range(count)])
    state.__module__ = __name__
    return state


def __getattr__(name: str) -> Any:
    """Look up the state types by name, as pickle needs."""
    if name.startswith(STATE_NAME) and name.removeprefix(STATE_NAME).isdigit():
        return state_type(int(name.removeprefix(STATE_NAME)))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class ParallelHybrid(SequenceMixer[Any]):
    """Layer configured by `ParallelHybridConfig`."""

    def __init__(self, config: ParallelHybridConfig, mixers: list[SequenceMixer[Any]]) -> None:
        super().__init__(config)
        self.mixers = nn.ModuleList(mixers)
        self.state_type = state_type(len(mixers))
        self.scales = config.scales or (1.0,) * len(mixers)
        self.supports_context_parallel = all(mixer.supports_context_parallel for mixer in mixers)

    @property
    def parts(self) -> list[SequenceMixer[Any]]:
        """The mixers, as a list, so that type checkers know the type of its elements."""
        return [*self.mixers]  # pyright: ignore[reportReturnType]  ModuleList does not know the type of its elements

    def reset_parameters(self) -> None:
        """Initialise each mixer as its paper does."""
        for mixer in self.parts:
            mixer.reset_parameters()

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], Any]:
        outputs = []
        states = []
        for number, (mixer, scale) in enumerate(zip(self.parts, self.scales, strict=True)):
            mixer_call = call._replace(
                state=None if call.state is None else call.state[number],
                chunk_size=mixer.chunk_size,
                backend=mixer.backend_of(call.paradigm),
            )
            y, state = mixer.mix(x, mixer_call)[:2]
            outputs.append(y if scale == 1 else scale * y)
            states.append(state)
        return torch.stack(outputs).sum(0), self.state_type(*states) if call.return_state else None

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> Any:
        return self.state_type(*(mixer.init_state(batch_size, max_length=max_length) for mixer in self.parts))

    def scale_like(self, base: Any) -> None:
        for mixer, base_mixer in zip(self.parts, base.parts, strict=True):
            mixer.scale_like(base_mixer)

    def resize_state(self, state: Any, max_length: int | None) -> Any:
        return self._map_states("resize_state", state, max_length)

    def shift_state(self, state: Any, tokens: int) -> Any:
        return self._map_states("shift_state", state, tokens)

    def _map_states(self, method: str, state: Any, argument: Any) -> Any:
        parts = zip(self.parts, state, strict=True)
        return self.state_type(*(getattr(mixer, method)(mixer_state, argument) for mixer, mixer_state in parts))

    def resolve_backend(self, dtype: torch.dtype) -> None:
        for mixer in self.parts:
            mixer.resolve_backend(dtype)

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        return sum(mixer.flops(length, paradigm, context) for mixer in self.parts)
