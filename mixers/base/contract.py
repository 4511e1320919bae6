"""The mixer contract: base classes of configurations and modules, and the registry of all mixers."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Self, cast, final

import torch
from jaxtyping import Float, Int
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from ...ops.kernels.selection import choose
from ...ops.runtime.arguments import expected_width, require_tensor
from ...ops.runtime.call import CHUNK_SIZE, Call
from ...ops.runtime.context_parallel import ContextParallel
from ...ops.runtime.kernel import Probe
from ...ops.runtime.packing import Documents
from ...ops.runtime.paradigm import Paradigm
from ...registry import Config, Registry, SeqmixError, place_of, require_signatures
from .context_parallel import mix_sequentially
from .layer_call import LayerCall, Mixed, MixResult, unknown_option
from .roles import Roles
from .rollback import kept_tokens, read_again
from .state import S, from_dict, to_dict
from .traits import ContractError, Traits, require_compiles, require_initial_state, require_paradigm, require_state

IMPLEMENTATION_FIELDS = ("paradigm", "chunk_size", "backend")
"""Fields of a mixer that choose the algorithm; by the contract, they change nothing but rounding."""


class MixerConfig(Config, ABC):
    """Configuration of a mixer; a plug-in registers a subclass.

    A subclass declares `kind: Literal["its_name"]`, sets the default paradigm, and builds its module in `build`. It has
    no fields for the sizes of the model: `build` receives `d_model` and the index of the layer.
    """

    built_in: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Accessories that the mixer always has, without an option for them: their kind by name of the option that other
    mixers have, such as {"gate": "swish"}. Comparisons of mixers name them."""
    kind: Any
    """Name of the mixer in the registry and in YAML; a `Literal` in every subclass."""
    paradigm: Paradigm = Field(strict=False)
    """Paradigm of training and evaluation, used by every call that names none."""

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """Properties that a mixer of this configuration declares, such as its paradigms."""

    @abstractmethod
    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "SequenceMixer[Any]":
        """Build the module.

        Args:
            d_model: width of the residual stream.
            layer_idx: index of the layer, from 0.
            n_layers: number of layers of the model.

        Raises:
            SeqmixError: the configuration does not fit `d_model`; the message is one sentence.
        """

    @classmethod
    def example(cls) -> Self:
        """Return a small configuration of this kind, for tables and checks.

        A required field takes the first of its `examples`, as in `Field(gt=0, examples=[2])`, or 1 if it has none.

        Raises:
            ContractError: a field rejects its own example, or has no example and rejects 1.
        """
        fields = cls.example_fields()
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise ContractError(cls.example_error(error, fields) or str(error)) from error

    @classmethod
    def example_fields(cls) -> dict[str, Any]:
        """Return the fields that `example` passes to the constructor, by name."""
        required = {name: field for name, field in cls.model_fields.items() if field.is_required()}
        return {name: field.examples[0] if field.examples else 1 for name, field in required.items()}

    @classmethod
    def example_error(cls, error: ValidationError, fields: Collection[str], *, alone: bool = True) -> str | None:
        """Explain why a configuration of example values is invalid, if the class is at fault; return None if it is not.

        Args:
            error: the error that the constructor raised.
            fields: names of the fields that have example values.
            alone: True if the configuration has no other values: the class is then at fault for errors without a field
                too.
        """
        for detail in error.errors(include_url=False):
            place = detail["loc"]
            reason = detail["msg"].removeprefix("Value error, ")
            if not place and alone:  # no field is named: the traits are wrong, or a validator of several fields
                return f"{cls.__name__}: {reason}"
            if not place or (name := place[0]) not in fields:
                continue
            if cls.model_fields[str(name)].examples:
                return f"{cls.__name__}: field {name} rejects the first of its own examples: {reason}"
            return (
                f"{cls.__name__}: field {name} is required and has no examples: give {name}=..., "
                "or declare Field(examples=[...])"
            )
        return None

    @field_validator("paradigm", mode="before")
    @classmethod
    def _paradigm_by_name(cls, value: Any) -> Any:
        # YAML gives names: converted here, so that a subclass may redeclare the field without strict=False
        return Paradigm(value) if isinstance(value, str) and value in list(Paradigm) else value

    @model_validator(mode="after")
    def _check_default_paradigm(self) -> "MixerConfig":
        require_paradigm(self.paradigm, _traits_of(self), self.kind)
        return self


MIXERS = Registry("mixer", MixerConfig, package="seqmix.mixers", entry_points="seqmix.mixers")
"""Registry of all mixers: the files of this folder, plug-ins (entry points `seqmix.mixers`), and registered classes."""


class SequenceMixer(nn.Module, ABC, Generic[S]):
    """A causal map (x, state) -> (y, state') over a segment of any length T >= 1.

    The state summarises all tokens before the segment; None means that there are none. Paradigms are algorithms, not
    semantics: for every segment, every state and every declared paradigm, output, final state and gradients agree up
    to rounding, and mixing a whole segment equals mixing its pieces in order:

        f_p(x, s) = f_q(x, s)        f(x1 ++ x2, s) = (y1 ++ y2, s2)

    where (y1, s1) = f(x1, s) and (y2, s2) = f(x2, s1).

    A mixer that cannot satisfy this for some input rejects that input with an error that gives the reason. The contract
    holds in evaluation, and in training without dropout.

    A state is a NamedTuple of tensors, batch first in every leaf, with no Python numbers. Under autograd it is never
    written in place. Without autograd a call may write into a growing state after its last token: it stays the state
    before the segment, but the call invalidates earlier continuations of it. Positions are part of the state, as an
    int64 tensor [B] named `position` or `length`.

    The contract covers finite numbers only: NaN or infinity at one token may reach earlier tokens, and other documents
    of its row.
    """

    traits: Traits
    parameter_roles: Roles = MappingProxyType({})
    """Roles of the mixer's parameters that are not those of torch's layers or of the mixer's parts, by name."""
    supports_context_parallel: bool = False
    """True if `mix` reads `call.cp_group` itself: x is then this rank's segment, and all other arguments are those of
    the whole row. If False, the state is sent from rank to rank, and each rank waits for the one before it."""
    takes_first_values: bool = False
    """True if every call must pass `first_values`; set by `accept_first_values`."""
    takes_token_values: bool = False
    """True if every call must pass `token_values`; set by `accept_token_values`."""
    value_width: int | None = None
    """Width C of the values that the mixer gives to later layers and takes from outside; None for that of x."""
    takes_shared_kv: bool = False
    """True if the mixer has no keys and values of its own, and every call must pass `shared_kv`; set by
    `accept_shared_kv`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        require_signatures(cls)

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.kind = config.kind
        self.traits = config.traits
        self.paradigm = config.paradigm
        self.chunk_size: int = getattr(config, "chunk_size", CHUNK_SIZE)
        self.backend: str = getattr(config, "backend", "auto")
        """Kernel backend in the configuration; "auto" chooses one for each paradigm."""
        self.backends: dict[Paradigm, str] = {}
        """Kernel backend of each paradigm; empty until `resolve_backend`."""
        self.cp_group: ContextParallel | None = None
        """Group of processes that compute a row of tokens together, one segment each (context parallelism); None if x
        has all tokens."""

    @final
    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: S | None = None,
        *,
        paradigm: Paradigm | None = None,
        cu_seqlens: Int[Tensor, "N+1"] | None = None,
        return_state: bool = False,
        call: LayerCall | None = None,
        **unknown: object,
    ) -> Mixed[S]:
        """Mix one segment.

        Args:
            x: the segment, [B T D], T >= 1. With a `cp_group` it is this rank's segment.
            state: the state before the segment; this and the next three are the fields of `LayerCall` of that name.
            paradigm: the algorithm; the configured default when None.
            cu_seqlens: boundaries of packed documents.
            return_state: True to return the final state.
            call: everything that a model asks of a layer, in place of the four arguments above.
            unknown: refused, with what to pass instead.

        Returns:
            The output [B T D] and the final state (None unless requested); with `call`, all that it asks for.

        Raises:
            ContractError: the call needs something that the mixer does not declare: the paradigm, a state (at all, or
                in this paradigm), packing or compiling. Or dtypes or shapes do not fit, or the mixer's own `mix`
                returns anything but an output of the shape of x and a state (and values, if it declares them).
            SeqmixError: an argument is unknown.
        """
        if unknown:
            raise unknown_option(self.kind, next(iter(unknown)))
        asked = LayerCall(state, paradigm, cu_seqlens, return_state) if call is None else call
        if call is not None and (state is not None or paradigm or cu_seqlens is not None or return_state):
            raise ContractError(f"{self.kind} expects state, paradigm, cu_seqlens and return_state as fields of `call`")
        chosen = self.paradigm if asked.paradigm is None else asked.paradigm
        require_paradigm(chosen, self.traits, self.kind)
        if compiling := torch.compiler.is_compiling():
            require_compiles(self.traits, self.kind)
        chosen = chosen if isinstance(chosen, Paradigm) else Paradigm(chosen)  # from its name
        self._require_shapes(x, asked.state, asked.cu_seqlens)
        sequential = self.cp_group is not None and not self.supports_context_parallel
        if asked.state is not None or sequential:  # each rank starts from the state of the rank before it
            require_initial_state(chosen, self.traits, self.kind)
        elif asked.return_state:
            require_state(self.traits, self.kind)
        self._require_values(x, asked)
        if asked.return_kv or self.takes_shared_kv or asked.shared_kv is not None:
            self._require_kv(asked)
        op_call = Call(
            chosen,
            asked.state,
            None if asked.cu_seqlens is None else self._documents(x, asked.cu_seqlens),
            asked.return_state,
            self.chunk_size,
            self.backend_of(chosen),
            self.cp_group,
            asked.first_values,
            asked.token_values,
            asked.shared_kv,
            asked.return_kv,
            asked.return_loss,
            asked.donate_state and not torch.is_grad_enabled(),
            asked.memo,
        )
        try:
            result = mix_sequentially(self, x, op_call) if sequential else self.mix(x, op_call)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            if asked.state is not None and (misfit := self._misfit(asked.state)):
                raise ContractError(f"{self.kind} expects a state of its own: {misfit}") from error
            width = expected_width(error, x) if isinstance(error, RuntimeError) else None
            if not any(width in parameter.shape for parameter in self.parameters()):  # no operation of a parameter
                raise
            raise ContractError(f"{self.kind} expects x of width {width}, got {x.shape[2]}") from error
        if not compiling:  # in compiled code the checks would add guards to the graph
            self._require_result(result, x, asked)
        y, final_state, *others = result
        final_state = final_state if asked.return_state else None
        if call is None:
            return y, final_state
        if not others:
            return MixResult(y, final_state)
        values, kv, loss = others
        return MixResult(y, final_state, values if asked.return_values else None, kv, loss)

    @final
    def step(self, x: Float[Tensor, "B 1 D"], state: S) -> tuple[Float[Tensor, "B 1 D"], S]:
        """Mix one token in the recurrent paradigm, as decoding does."""
        if x.shape[1] != 1:
            raise ContractError(f"step expects one token, got {x.shape[1]}: call the mixer for a longer segment")
        y, state_after = self(x, state, paradigm=Paradigm.RECURRENT, return_state=True)
        return y, state_after

    @abstractmethod
    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> Mixed[S]:
        """Compute the output and final state of a segment; `forward` has resolved and checked the arguments.

        The final state may be None unless `call.return_state` is set. A mixer with more to return uses `MixResult`:
        with the trait `value_residual` always its `values`, with `kv_sharing` its keys and values (`kv`) if
        `call.return_kv` is set, with `auxiliary_loss` its `loss` if `call.return_loss` is set.
        """

    def accept_first_values(self) -> None:
        """Add the parameters that mix values of the first layer into the mixer's own values.

        Every later call must pass `first_values`. A model calls this method before parameters are initialised, on every
        layer with the trait `value_residual` but the first of its kind. Without it, a layer uses only its own values.

        Raises:
            ContractError: the mixer has no value residual.
        """
        raise ContractError(
            f"{self.kind} has no value residual: declare traits.value_residual and override accept_first_values"
        )

    def accept_token_values(self, scale: float, channels: int) -> None:
        """Add the parameters that gate vectors of the tokens, which are added to the mixer's values.

        Every later call must pass `token_values`. A model with `value_embeddings` calls this method before parameters
        are initialised.

        Args:
            scale: factor c of the gates.
            channels: number of channels of x that the gates read.

        Raises:
            ContractError: the mixer takes no values from outside.
        """
        del scale, channels
        raise ContractError(
            f"{self.kind} takes no values from outside, which model.value_embeddings adds: leave it out, or give every "
            "layer that has one a mixer with queries, keys and values, such as attention or gla"
        )

    def accept_shared_kv(self) -> None:
        """Remove the mixer's own keys and values: every later call must pass `shared_kv`.

        A model calls this method before parameters are initialised, on the layers that read the keys and values of an
        earlier layer.

        Raises:
            ContractError: the mixer cannot share keys and values.
        """
        raise ContractError(
            f"{self.kind} cannot share keys and values: declare traits.kv_sharing and override accept_shared_kv"
        )

    @abstractmethod
    def init_state(self, batch_size: int, *, max_length: int | None = None) -> S:
        """Return the initial state, on the parameters' device.

        Recurrent leaves are float32 or wider (float64 under float64 parameters); caches have the parameters' dtype.

        Args:
            batch_size: number of rows of the state.
            max_length: capacity in tokens, so that a growing state is allocated once.
        """

    def resize_state(self, state: S, max_length: int | None) -> S:
        """Return the state with another capacity in tokens, to save it or to continue from it.

        A mixer whose `init_state` uses max_length overrides this method; any other state has a fixed size.

        Args:
            state: the state, which is not changed; the result may share its memory.
            max_length: capacity in tokens, including the processed prefix; None for no spare capacity, as in
                `init_state`.

        Raises:
            ContractError: the processed prefix is longer than max_length.
        """
        return state

    def rollback(
        self,
        x: Float[Tensor, "B T D"],
        before: S | None,
        after: S,
        tokens: int | Int[Tensor, " B"],
        *,
        paradigm: Paradigm | None = None,
        cu_seqlens: Int[Tensor, "N+1"] | None = None,
        first_values: Float[Tensor, "B T C"] | None = None,
        token_values: Float[Tensor, "B T C"] | None = None,
    ) -> S:
        """Return the state before the last `tokens` tokens of a segment that has been mixed.

        Going on from it equals never having read those tokens, up to rounding. By default the first tokens of the
        segment are mixed again from `before`. A mixer whose `after` still holds what is needed, such as a KV cache,
        overrides this method.

        Args:
            x: the segment.
            before: the state before the segment, which the call has not changed (unless it was donated); None if no
                tokens came before.
            after: the state after the segment; not valid any more if the state grows.
            tokens: number of tokens to go back, from 0 to the length of the row: one for all rows (or packed
                documents), or one per row.
            paradigm: the algorithm that mixes again; the configured default, if it accepts a state, when None.
            cu_seqlens: boundaries of the packed documents, if the segment is packed.
            first_values: those of the call that mixed the segment.
            token_values: those of the call that mixed the segment.

        Raises:
            ContractError: the mixer has no state, or `tokens` does not fit the segment.
        """
        require_state(self.traits, self.kind)
        kept = kept_tokens(x, tokens, cu_seqlens, self.kind)
        paradigm = self.traits.prefer(paradigm or self.paradigm, from_state=before is not None)
        values = {"first_values": first_values, "token_values": token_values}
        return read_again(self, x, before, kept, paradigm, cu_seqlens, values)

    def shift_state(self, state: S, tokens: int) -> S:
        """Return the state as if `tokens` more tokens had come before the whole prefix; for the conformance kit.

        The integer leaves named `position` or `length` grow. A mixer overrides this method if another leaf holds its
        position. It also overrides it, and returns the state unchanged, if no leaf does: for example if `length` counts
        the entries of a cache.

        Args:
            state: the state.
            tokens: number of tokens added to the position.
        """
        leaves = to_dict(state)
        positions = {name for name in leaves if name.rpartition(".")[2] in ("position", "length")}
        return from_dict(state, {name: leaf + tokens if name in positions else leaf for name, leaf in leaves.items()})

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise every parameter as the mixer's paper does."""

    @property
    def projections(self) -> Mapping[str, Float[Tensor, "H _ D"]]:
        """Projection weights by role and head, as writable views: `q`, `k`, `v` [H K D], and `o` transposed, [H V D].

        `seqmix linearize` copies them to another mixer, for the roles that both mixers have. The q, k and v of a head
        affect the output only through its o.
        """
        return {}

    def scale_like(self, base: Any) -> None:
        """Set the constants that change with the width for muP, before the parameters are initialised.

        Softmax attention divides its scores by K instead of sqrt(K). Mixers whose keys have length 1 lower the constant
        of their output norm. Initial values that do not fall as 1/sqrt(fan-in) get another scale. By default this calls
        the `scale_like` of each submodule that has one.

        Args:
            base: the mixer of the base model, which is equal but for its width.
        """
        for name, part in self.named_children():
            if hasattr(part, "scale_like"):
                cast("Any", part).scale_like(getattr(base, name))

    def set_reach(self, tokens: Float[Tensor, " H"]) -> list[str]:
        """Set decays gamma so that each head's memory reaches back `tokens` = gamma / (1 - gamma) tokens on average.

        By default this calls the `set_reach` of each submodule that has one. A mixer that computes decays itself
        overrides it.

        Returns:
            Names of the parameters that were set; empty if there are no decays, or if they are fixed or depend on the
            tokens alone.
        """
        parts = {name: part for name, part in self.named_children() if hasattr(part, "set_reach")}
        return [f"{name}.{leaf}" for name, part in parts.items() for leaf in cast("Any", part).set_reach(tokens)]

    @abstractmethod
    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        """Count the floating-point operations of matrix products in one forward pass over one sequence.

        Args:
            length: number of tokens in the segment.
            paradigm: the algorithm.
            context: number of tokens in the prefix before the segment.
        """

    def kernels(self, dtype: torch.dtype) -> tuple[str, Probe] | None:
        """Return the name of the mixer's op, and a description of its calls with activations of `dtype`.

        Return None if there is no choice of backend.
        """
        return None

    def resolve_backend(self, dtype: torch.dtype) -> None:
        """Choose the kernel backends for the parameters' device and activations of `dtype`.

        Raises:
            SeqmixError: the configured backend cannot run; the message gives the reasons.
        """
        if (op_and_probe := self.kernels(dtype)) is not None:
            op, probe = op_and_probe
            self.backends = dict(choose(op, self.backend, probe))
        for part in self.modules():
            if hasattr(part, "choose_kernel"):  # a short convolution
                cast("Any", part).choose_kernel(self.backend, dtype)

    def backend_of(self, paradigm: Paradigm) -> str:
        """Return the kernel backend of a paradigm; before `resolve_backend` was called, the configured one."""
        return self.backends.get(paradigm, self.backend)

    @property
    def device(self) -> torch.device:
        """Device of the parameters, or of the buffers if there are no parameters."""
        return self._tensor().device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters, or of the floating-point buffers if there are no parameters."""
        return self._tensor().dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """Dtype of recurrent states: float32, or float64 under float64 parameters."""
        return torch.promote_types(self.dtype, torch.float32)

    def _tensor(self) -> Tensor:
        """Return the first parameter, or the first floating-point buffer if there are no parameters.

        The mixer computes in its dtype and on its device.
        """
        parts: list[nn.Module | None] = [self]
        while parts:  # called for every token, and parameters() would take several times as long
            if (module := parts.pop()) is not None:
                for parameter in module._parameters.values():
                    if parameter is not None:
                        return parameter
                parts += reversed(module._modules.values())
        for buffer in self.buffers():
            if buffer.is_floating_point():  # integers are indices or positions
                return buffer
        raise ContractError(
            f"{self.kind} needs a parameter or a floating-point buffer to have a device and a dtype, and has neither: "
            'register one, for example self.register_buffer("one", torch.ones(1))'
        )

    def _require_values(self, x: Tensor, asked: LayerCall) -> None:
        if asked.return_values and not self.traits.value_residual:
            raise ContractError(f"{self.kind} has no values (traits.value_residual is False): leave out return_values")
        takes = self.takes_first_values
        if takes or asked.first_values is not None:
            self._require_outside("first_values", asked.first_values, takes, "the first layer returns", x)
        takes = self.takes_token_values
        if takes or asked.token_values is not None:
            self._require_outside("token_values", asked.token_values, takes, "an embedding has", x)

    def _require_outside(self, name: str, values: Tensor | None, takes: bool, source: str, x: Tensor) -> None:
        if values is None:
            raise ContractError(f"{self.kind} needs {name}: pass those that {source}")
        if not takes:
            raise ContractError(f"{self.kind} takes no {name}: call accept_{name}() first")
        expected = [*x.shape[:2], x.shape[2] if self.value_width is None else self.value_width]
        if list(values.shape) != expected:
            raise ContractError(f"{self.kind} expects {name} of shape {expected}, got {list(values.shape)}")

    def _require_kv(self, asked: LayerCall) -> None:
        if asked.return_kv and not self.traits.kv_sharing:
            raise ContractError(f"{self.kind} cannot share keys and values (traits.kv_sharing is False)")
        if asked.return_kv and self.takes_shared_kv:
            raise ContractError(f"{self.kind} has no keys and values of its own: take them from the layer that has")
        if self.takes_shared_kv != (asked.shared_kv is not None):
            if self.takes_shared_kv:
                raise ContractError(f"{self.kind} needs shared_kv: pass what the earlier layer returns with return_kv")
            raise ContractError(f"{self.kind} takes no shared_kv: call accept_shared_kv() first")

    def _require_result(self, result: Any, x: Tensor, asked: LayerCall) -> None:
        """Raise ContractError unless `mix` has returned all that the traits promise, and an output of x's shape."""
        if not isinstance(result, tuple) or len(result) not in (2, len(MixResult._fields)):
            raise self._wrong_result("mix", "(output, state) or a MixResult", result)
        y = result[0]
        if not isinstance(y, Tensor):
            raise self._wrong("mix", "a tensor as output", f"a {type(y).__name__}")
        if y.shape != x.shape:
            raise self._wrong("mix", f"an output of the shape of x, {list(x.shape)}", str(list(y.shape)))
        if not (asked.return_values or asked.return_kv or asked.return_loss):
            return
        promised = {
            "values": asked.return_values,
            "kv": asked.return_kv,
            "loss": asked.return_loss and self.traits.auxiliary_loss,
        }
        for field, is_promised in promised.items():
            if is_promised and (len(result) == 2 or getattr(MixResult(*result), field) is None):
                raise self._wrong("mix", f"MixResult(..., {field}=...), which its traits promise", f"no {field}")

    def _wrong_result(self, method: str, expected: str, result: Any) -> ContractError:
        """Return the error of a method whose result is not the tuple that is expected."""
        length = f" of {len(result)}" if isinstance(result, (tuple, list)) else ""
        name = "Tensor" if isinstance(result, Tensor) else type(result).__name__  # not FakeTensor
        return self._wrong(method, expected, f"a {name}{length}")

    def _wrong(self, method: str, expected: str, actual: str) -> ContractError:
        place = place_of(getattr(self, method))
        return ContractError(f"{self.kind}: {method} must return {expected}, got {actual}: see {place}")

    def _require_shapes(self, x: Tensor, state: tuple[Any, ...] | None, cu_seqlens: Tensor | None) -> None:
        if not isinstance(x, Tensor):
            require_tensor("x", x, "a tensor of shape [B, T >= 1, d_model]")
        if x.ndim != 3 or x.shape[1] < 1:
            remedy = ": add a batch dimension with x[None]" if x.ndim == 2 else ""
            raise ContractError(f"{self.kind} expects x of shape [B, T >= 1, d_model], got {list(x.shape)}{remedy}")
        if x.dtype != self.dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise ContractError(
                f"{self.kind} expects x of dtype {self.dtype}, that of its parameters, got {x.dtype}: "
                "convert one of them, or use torch.autocast"
            )
        if cu_seqlens is not None:
            require_tensor("cu_seqlens", cu_seqlens, "an integer tensor of boundaries [N+1]")
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        first: Any = state
        while isinstance(first, tuple) and first:  # states may be nested
            first = first[0]
        if isinstance(first, Tensor):
            if first is not state and (state_rows := first.shape[0]) != rows:
                raise ContractError(f"{self.kind} expects a state of {rows} rows, one per sequence, got {state_rows}")
        elif state is not None and not isinstance(state, tuple):
            raise ContractError(
                f"{self.kind} expects the state that an earlier call or init_state returned, got a "
                f"{type(state).__name__}"
            )
        if cu_seqlens is None:
            return
        if not self.traits.packing:
            raise ContractError(f"{self.kind} does not declare packing: pass documents one by one, without cu_seqlens")
        if x.shape[0] != 1 or cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ContractError(
                f"{self.kind}: cu_seqlens requires batch size 1 and integer boundaries of shape [N+1], "
                f"got batch size {x.shape[0]} and boundaries of shape {list(cu_seqlens.shape)}, {cu_seqlens.dtype}"
            )

    def _misfit(self, state: S) -> str:
        """Return what differs between the tensors of a state and those of this mixer's; an empty text if they fit."""
        if isinstance(state, Tensor):
            return "a tuple of tensors, got a tensor"
        given, *forms = (
            {name: list(leaf.shape[1:]) for name, leaf in to_dict(each).items()}
            for each in (state, self.init_state(1), self.init_state(1, max_length=1))
        )
        if all(form.keys() != given.keys() for form in forms):
            return f"one with {', '.join(forms[0])}, got one with {', '.join(given)}"
        if self.traits.state == "growing":
            return ""
        for name, shape in given.items():
            expected, *others = [form[name] for form in forms if name in form]
            if shape != expected and expected in others:  # else the shape depends on the capacity
                return f"{name} of shape {expected} per row, got {shape}"
        return ""

    def _documents(self, x: Tensor, cu_seqlens: Tensor | None) -> Documents | None:
        length = x.shape[1]
        size = 1 if self.cp_group is None else self.cp_group.size
        start = 0 if self.cp_group is None else self.cp_group.start(length)
        try:
            return Documents.of(cu_seqlens, length, start, size * length)
        except SeqmixError as error:
            raise ContractError(f"{self.kind}: {error}") from None


class BuildError(ContractError):
    """A mixer cannot be built because of an error in its code. A refusal by its configuration is a `SeqmixError`."""


def build_mixer(config: MixerConfig, d_model: int, *, layer_idx: int, n_layers: int) -> SequenceMixer[Any]:
    """Build a mixer with `config.build`, which has the same arguments, and check that it is one.

    Raises:
        SeqmixError: the configuration does not fit `d_model`.
        BuildError: `build` returns anything else, or a mixer without `super().__init__(config)`.
    """
    mixer: Any = config.build(d_model, layer_idx=layer_idx, n_layers=n_layers)
    if not isinstance(mixer, SequenceMixer):
        got = "None" if mixer is None else f"a {type(mixer).__name__}"
        raise BuildError(f"{config.kind}: build must return a SequenceMixer, got {got}: see {place_of(config.build)}")
    if not hasattr(mixer, "traits"):
        raise BuildError(f"{config.kind}: {place_of(mixer.__init__)} has to call super().__init__(config)")
    return mixer


def _traits_of(config: MixerConfig) -> Traits:
    """Return the traits of a configuration, which may be a plug-in's.

    Raises:
        ContractError: the value is not a `Traits`, or computing it raised an error.
    """
    try:
        traits = config.traits
    except SeqmixError:
        raise
    except Exception as error:
        raise ContractError(f"{config.kind}: traits raised {type(error).__name__}: {error}") from error
    if not isinstance(traits, Traits):
        raise ContractError(f"{config.kind}: traits must be a Traits(...), got {traits!r}")
    return traits
