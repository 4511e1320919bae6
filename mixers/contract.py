"""The contract: what a sequence mixer is, what it declares, and how a plug-in registers one."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, Generic, Self, TypeAlias, cast, final

import torch
from jaxtyping import Float, Int
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from ..ops.kernels.selection import choose
from ..ops.runtime.call import CHUNK_SIZE, Call
from ..ops.runtime.context_parallel import ContextParallel
from ..ops.runtime.kernel import Probe
from ..ops.runtime.memo import Memo
from ..ops.runtime.packing import Documents
from ..ops.runtime.paradigm import Paradigm
from ..registry import Config, Registry, SeqmixError
from .context_parallel import mix_in_turn
from .state import S, from_dict, to_dict
from .traits import ContractError, Traits, require_compiles, require_paradigm, require_state, require_state_is_taken

IMPLEMENTATION_FIELDS = ("paradigm", "chunk_size", "backend")
"""Fields of mixers that choose how a map is computed: by the contract, they change nothing but its rounding."""


class MixerConfig(Config, ABC):
    """The configuration of a mixer, and what a plug-in registers.

    A subclass declares `kind: Literal["its_name"]`, gives the paradigm it uses by default, and builds its module.
    It never holds the sizes of its parent: `d_model` and the layer's index arrive at `build`.
    """

    kind: Any
    """The name it is registered under: a `Literal` in every subclass."""
    paradigm: Paradigm = Field(strict=False)
    """The paradigm used when a call names none: that of training and evaluation."""

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """What a mixer of this configuration declares."""

    @abstractmethod
    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "SequenceMixer[Any]":
        """Build the module.

        Args:
            d_model: width of the residual stream.
            layer_idx: index of the layer, from 0.
            n_layers: number of layers of the model.

        Raises:
            SeqmixError: the configuration does not fit `d_model`, in one sentence.
        """

    @classmethod
    def example(cls) -> Self:
        """A small configuration of this kind, for tables and checks.

        Required fields have the first of their `examples` (pydantic's own: `Field(gt=0, examples=[2])`), or 1.

        Raises:
            ContractError: a field refuses its own example, or is not a number and has no example.
        """
        fields = cls.example_fields()
        try:
            return cls(**fields)
        except ValidationError as error:
            raise ContractError(cls.example_error(error, fields) or str(error)) from error

    @classmethod
    def example_fields(cls) -> dict[str, Any]:
        """The fields that `example` gives."""
        required = {name: field for name, field in cls.model_fields.items() if field.is_required()}
        return {name: field.examples[0] if field.examples else 1 for name, field in required.items()}

    @classmethod
    def example_error(cls, error: ValidationError, fields: Collection[str], *, alone: bool = True) -> str | None:
        """What is wrong with the class where an example of `fields` (`alone`: no others) raised an error, if it is."""
        for detail in error.errors(include_url=False):
            place = detail["loc"]
            reason = detail["msg"].removeprefix("Value error, ")
            if not place and alone:  # of the whole: the traits, or a rule of the class about several fields
                return f"{cls.__name__}: {reason}"
            if not place or (name := place[0]) not in fields:
                continue
            if cls.model_fields[str(name)].examples:
                return f"{cls.__name__}: field {name} refuses the first of its own examples: {reason}"
            return (
                f"{cls.__name__}: field {name} is required and has no examples: give {name}=..., "
                "or declare Field(examples=[...])"
            )
        return None

    @field_validator("paradigm", mode="before")
    @classmethod
    def _paradigm_by_name(cls, value: Any) -> Any:
        # YAML has names; a subclass that redeclares the field need not know that enums are strict
        return Paradigm(value) if isinstance(value, str) and value in list(Paradigm) else value

    @model_validator(mode="after")
    def _default_paradigm_is_declared(self) -> "MixerConfig":
        require_paradigm(self.paradigm, _traits_of(self), self.kind)
        return self


MIXERS = Registry("mixer", MixerConfig, package="seqmix.mixers", entry_points="seqmix.mixers")
"""All mixers: the files of this folder, plug-ins (entry points `seqmix.mixers`), and what a program registers."""


Mixed: TypeAlias = (
    tuple[Float[Tensor, "B T D"], S | None] | tuple[Float[Tensor, "B T D"], S | None, Float[Tensor, "B T D"]]
)
"""Output and final state, and values for later layers if they are wanted."""


class SequenceMixer(nn.Module, ABC, Generic[S]):
    """A causal map (x, state) -> (y, state') over a segment of any length T >= 1.

    The state summarises everything before the segment; None means nothing before. Paradigms are algorithms, not
    semantics: for every segment, every state and every declared paradigm, output, final state and gradients agree up
    to rounding, and mixing a whole segment equals mixing its pieces in order:

        f_p(x, s) = f_q(x, s)        f(x1 ++ x2, s) = y1 ++ f(x2, s1)   where (y1, s1) = f(x1, s)

    A mixer that cannot satisfy this for some input refuses that input with an error that says why. The contract is
    stated for evaluation, and for training without dropout.

    A state is a NamedTuple of tensors, batch first in every leaf, with no Python numbers. Under autograd it is never
    written in place; without, a growing state may be (it is donated: the caller clones what it needs again). Positions
    live in the state, as an int64 tensor [B] named `position` or `length`.

    All of it is stated for finite numbers: NaN or infinity at a token may reach earlier tokens, and other documents of
    its row.
    """

    traits: Traits
    supports_context_parallel: bool = False
    """Whether `mix` reads `call.cp_group` itself: x is then this rank's segment, and everything else the whole row's.
    Otherwise the state goes from rank to rank, each of which waits for the one before."""
    takes_first_values: bool = False
    """Whether calls have to give `first_values`: after `accept_first_values`."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.kind = config.kind
        self.traits = config.traits
        self.paradigm = config.paradigm
        self.chunk_size: int = getattr(config, "chunk_size", CHUNK_SIZE)
        self.backend: str = getattr(config, "backend", "auto")
        """The kernel backend that is asked for."""
        self.backends: dict[Paradigm, str] = {}
        """The backend of each paradigm, once it is resolved."""
        self.cp_group: ContextParallel | None = None
        """The processes that share a row of tokens, one segment each; None where a call gives all tokens."""

    @final
    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: S | None = None,
        *,
        paradigm: Paradigm | None = None,
        cu_seqlens: Int[Tensor, "N+1"] | None = None,
        return_state: bool = False,
        first_values: Float[Tensor, "B T D"] | None = None,
        return_values: bool = False,
        donate_state: bool = False,
        memo: Memo | None = None,
    ) -> Mixed[S]:
        """Mix one segment.

        Args:
            x: the segment, [B T D], T >= 1. With a `cp_group`, this rank's part of it; all else is the whole row's.
            state: what came before, B rows (N rows with `cu_seqlens`); None means nothing.
            paradigm: how to compute it; the configured default when None. It is never guessed from T.
            cu_seqlens: boundaries of N documents packed into one row (B = 1): document n is tokens
                cu_seqlens[n] to cu_seqlens[n+1] - 1. Empty documents are legal.
            return_state: whether the final state is wanted.
            first_values: the values of the first layer with a value residual, of the same tokens.
            return_values: whether the mixer's own values are wanted, for later layers.
            donate_state: True if the next state may be written over `state`, which the caller does not need again;
                ignored under grad. A growing state is donated in any case.
            memo: results that the layers of a model have in common; not under grad, and not in compiled code.

        Returns:
            The output [B T D], and the final state (None unless wanted); then the values [B T D], if they are wanted.

        Raises:
            ContractError: the mixer does not declare the paradigm, a state in it or at all, packing or compiling, the
                dtypes or shapes do not fit, or its own `mix` returns something else than an output of the segment's
                shape and a state.
        """
        paradigm = self.paradigm if paradigm is None else paradigm
        require_paradigm(paradigm, self.traits, self.kind)
        if compiling := torch.compiler.is_compiling():
            require_compiles(self.traits, self.kind)
        paradigm = paradigm if isinstance(paradigm, Paradigm) else Paradigm(paradigm)  # of its name
        self._require_shapes(x, state, cu_seqlens)
        in_turn = self.cp_group is not None and not self.supports_context_parallel
        if state is not None or in_turn:  # from rank to rank goes a state
            require_state_is_taken(paradigm, self.traits, self.kind)
        elif return_state:
            require_state(self.traits, self.kind)
        self._require_values(x, first_values, return_values)
        documents = None if cu_seqlens is None else self._documents(x, cu_seqlens)
        call = Call(
            paradigm,
            state,
            documents,
            return_state,
            self.chunk_size,
            self.backend_of(paradigm),
            self.cp_group,
            first_values,
            donate_state and not torch.is_grad_enabled(),
            memo,
        )
        result = mix_in_turn(self, x, call) if in_turn else self.mix(x, call)
        if not compiling:  # a graph needs no guard for what the eager call has shown
            self._require_result(result, x)
        y, final_state, *values = result
        final_state = final_state if return_state else None
        return (y, final_state, values[0]) if return_values else (y, final_state)

    @final
    def step(self, x: Float[Tensor, "B 1 D"], state: S) -> tuple[Float[Tensor, "B 1 D"], S]:
        """Mix one token in the recurrent paradigm: decoding."""
        if x.shape[1] != 1:
            raise ContractError(f"a step mixes one token, and {x.shape[1]} were given: call the mixer itself")
        y, state_after = self(x, state, paradigm=Paradigm.RECURRENT, return_state=True)
        return y, state_after

    @abstractmethod
    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> Mixed[S]:
        """What `forward` computes, its arguments resolved and checked; the state may be None unless wanted.

        A mixer with the trait `value_residual` returns its own values, [B T D], as the third.
        """

    def accept_first_values(self) -> None:
        """Add what mixes values of the first layer into the mixer's own; calls have to give them from then on.

        A model calls it on later layers than the first with the trait `value_residual`, before parameters are
        initialised. Alone, and as the first, a layer has its own values alone.

        Raises:
            ContractError: the mixer has no value residual.
        """
        raise ContractError(f"{self.kind} has no value residual (traits.value_residual is False)")

    @abstractmethod
    def init_state(self, batch_size: int, *, max_length: int | None = None) -> S:
        """The initial state, on the parameters' device.

        Recurrent leaves are float32 (float64 under float64 parameters), caches have the parameters' dtype.

        Args:
            batch_size: rows of the state.
            max_length: the capacity in tokens; lets a growing state be allocated once.
        """

    def resize_state(self, state: S, max_length: int | None) -> S:
        """The same state with another capacity in tokens: to save it, or to continue from it.

        A mixer whose `init_state` uses max_length overrides this method; any other state has a fixed size.

        Args:
            state: the state; not changed, but the result may share its memory.
            max_length: the capacity in tokens, the processed prefix included; None for a state without spare room, as
                `init_state` makes it without max_length.

        Raises:
            ContractError: the processed prefix is longer than max_length.
        """
        return state

    def shift_state(self, state: S, tokens: int) -> S:
        """The state as if so many more tokens had been read before all that it holds, for the conformance kit.

        Integers named `position` or `length` are moved. A mixer overrides this method where another leaf is its
        position, or where none is, and returns the state as it is: a cache's length may count what the cache holds.

        Args:
            state: the state.
            tokens: by how many its position moves.
        """
        leaves = to_dict(state)
        moved = {name for name in leaves if name.rpartition(".")[2] in ("position", "length")}
        return from_dict(state, {name: leaf + tokens if name in moved else leaf for name, leaf in leaves.items()})

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise every parameter as the mixer's paper does."""

    @property
    def projections(self) -> Mapping[str, Float[Tensor, "H _ D"]]:
        """Weights by role and head, views that may be written: `q`, `k`, `v` [H K D], and `o` [H V D], transposed.

        What `seqmix linearize` gives another mixer, of roles that exist. A head's q, k and v count through its o alone.
        """
        return {}

    def set_reach(self, tokens: Float[Tensor, " H"]) -> list[str]:
        """Set decays so that each head's memory reaches so many tokens back on average: gamma / (1 - gamma).

        By default the parts of the mixer do it that have the method; a mixer whose decays are its own overrides it.

        Returns:
            Names of the parameters that were set; none where decays do not exist, or are fixed or functions of tokens.
        """
        parts = {name: part for name, part in self.named_children() if hasattr(part, "set_reach")}
        return [f"{name}.{each}" for name, part in parts.items() for each in cast("Any", part).set_reach(tokens)]

    @abstractmethod
    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        """Floating-point operations of the matrix products of one forward pass over one sequence.

        Args:
            length: tokens of the segment.
            paradigm: how it is computed.
            context: the length of the prefix in tokens.
        """

    def kernels(self, dtype: torch.dtype) -> tuple[str, Probe] | None:
        """The op and the probe of its kernels for activations of `dtype`; None where there is no choice of backend."""
        return None

    def resolve_backend(self, dtype: torch.dtype) -> None:
        """Choose the kernel backends, for the device of the parameters and activations of `dtype`.

        Raises:
            SeqmixError: the backend that the configuration names cannot run: its reasons.
        """
        if (asked := self.kernels(dtype)) is not None:
            op, probe = asked
            self.backends = dict(choose(op, self.backend, probe))

    def backend_of(self, paradigm: Paradigm) -> str:
        """The backend of a paradigm: the one asked for until it is resolved."""
        return self.backends.get(paradigm, self.backend)

    @property
    def device(self) -> torch.device:
        """Where the parameters are, or the buffers of a mixer without parameters."""
        return self._tensor().device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, or that of the buffers of a mixer without parameters."""
        return self._tensor().dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of recurrent state: float32, or float64 under float64 parameters."""
        return torch.promote_types(self.dtype, torch.float32)

    def _tensor(self) -> Tensor:
        """The tensor whose device and dtype the mixer computes with."""
        parts: list[nn.Module | None] = [self]
        while parts:  # parameters() takes several times as long, and this is asked for every token
            if (module := parts.pop()) is not None:
                if (parameter := next((p for p in module._parameters.values() if p is not None), None)) is not None:
                    return parameter
                parts += reversed(module._modules.values())
        for buffer in self.buffers():
            if buffer.is_floating_point():  # integers are indices or positions
                return buffer
        raise ContractError(
            f"{self.kind} has neither a parameter nor a floating-point buffer, so its device and dtype are unknown: "
            'register one, as self.register_buffer("one", torch.ones(1))'
        )

    def _require_values(self, x: Tensor, first_values: Tensor | None, return_values: bool) -> None:
        if return_values and not self.traits.value_residual:
            raise ContractError(f"{self.kind} gives no values (traits.value_residual is False)")
        if self.takes_first_values != (first_values is not None):
            needs = "needs first_values" if self.takes_first_values else "takes no first_values (accept_first_values)"
            raise ContractError(f"{self.kind} {needs}")
        if first_values is not None and first_values.shape != x.shape:
            raise ContractError(f"first_values must be {list(x.shape)}, and is {list(first_values.shape)}")

    def _require_result(self, result: Any, x: Tensor) -> None:
        values = self.traits.value_residual
        if not isinstance(result, tuple) or len(result) != 2 + values:
            length = f" of {len(result)}" if isinstance(result, (tuple, list)) else ""
            wanted = "(output, state, values)" if values else "(output, state)"
            raise ContractError(
                f"{self.kind}: mix has to return {wanted}, and returned a {type(result).__name__}{length}"
            )
        y = result[0]
        if not isinstance(y, Tensor):
            raise ContractError(f"{self.kind}: mix has to return a tensor as output, and returned a {type(y).__name__}")
        if y.shape != x.shape:
            raise ContractError(
                f"{self.kind}: mix has to return an output of the segment's shape {list(x.shape)}, and returned one of "
                f"{list(y.shape)}"
            )

    def _require_shapes(self, x: Tensor, state: tuple[Any, ...] | None, cu_seqlens: Tensor | None) -> None:
        if x.ndim != 3 or x.shape[1] < 1:
            raise ContractError(f"{self.kind} takes [batch, tokens >= 1, d_model], and was given {list(x.shape)}")
        if not x.is_floating_point() or (x.dtype != self.dtype and not torch.is_autocast_enabled(x.device.type)):
            raise ContractError(
                f"{self.kind} has parameters of {self.dtype} and was given {x.dtype}: convert the one or the other, "
                "or use torch.autocast"
            )
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        first: Any = state
        while isinstance(first, tuple) and first:  # parts may have states of their own
            first = first[0]
        if isinstance(first, Tensor) and (given := first.shape[0]) != rows:
            raise ContractError(f"{self.kind} was given {rows} sequences and a state of {given}")
        if cu_seqlens is None:
            return
        if not self.traits.packing:
            raise ContractError(f"{self.kind} does not declare packing: pass its documents one by one, not cu_seqlens")
        if x.shape[0] != 1 or cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ContractError(
                "packed documents are one row of tokens with integer boundaries [N+1]; "
                f"{self.kind} was given a batch of {x.shape[0]} and boundaries {list(cu_seqlens.shape)} "
                f"{cu_seqlens.dtype}"
            )

    def _documents(self, x: Tensor, cu_seqlens: Tensor | None) -> Documents | None:
        length = x.shape[1]
        size = 1 if self.cp_group is None else self.cp_group.size
        start = 0 if self.cp_group is None else self.cp_group.start(length)
        try:
            return Documents.of(cu_seqlens, length, start, size * length)
        except SeqmixError as error:
            raise ContractError(f"{self.kind}: {error}") from None


def _traits_of(config: MixerConfig) -> Traits:
    """The traits of a configuration, which may be a plug-in's.

    Raises:
        ContractError: they are not `Traits`, or computing them raised.
    """
    try:
        traits = config.traits
    except SeqmixError:
        raise
    except Exception as error:
        raise ContractError(f"{config.kind}: traits raised {type(error).__name__}: {error}") from error
    if not isinstance(traits, Traits):
        raise ContractError(f"{config.kind}: traits has to be a Traits(...), and is {traits!r}")
    return traits
