"""Base classes of mixers with queries, keys, values and an output gate per head around a recurrence.

q, k, v, g = x W_Q, x W_K, x W_V, x W_G         one product, together with a mixer's further projections
q, k, v    = silu(conv(q, k, v))                by channel, if there is a short convolution; in some mixers q, k only
v          = l_1 v^1 + l_2 v                    with a value residual: v^1 of the model's first layer of this kind
q, k       = norm(q), norm(k), rotated by their positions
o          = the recurrence of q, k, v          the mixer's own equations
y          = (norm(o) * act(g)) W_O             per head
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...ops.delta import unit_norm
from ...ops.recurrence.family import RecurrenceOutput
from ...ops.runtime.call import Call
from ...ops.runtime.paradigm import Paradigm
from ..base.layer_call import Mixed
from ..base.roles import Role, RowBlock
from ..base.traits import ContractError, Traits
from .gates import Gate, GatedNorm, HeadNorm
from .matrix_state import MatrixState, MatrixStateConfig, MatrixStateMixer, ShortConv
from .outside_values import OutsideValues, ValueResidualOption
from .projections import projections_of
from .rotary import rotated
from .short_convolution import ShortConvolution
from .widths import head_width

Heads = Annotated[int, Field(gt=0, examples=[2, 1, 3], description="Number of heads.")]
KeyExpansion = Annotated[
    float,
    Field(
        gt=0,
        le=1000,
        examples=[0.5, 1.0],
        description="Total width of the queries, and of the keys, divided by d_model.",
    ),
]
ValueExpansion = Annotated[
    float,
    Field(
        gt=0,
        le=1000,
        examples=[1.0, 2.0],
        description="Total width of the values, and of the gate, divided by d_model.",
    ),
]
QKNormKind = Annotated[
    Literal["l2", "rms", "none"],
    Field(description="Norm of queries and keys per head: `l2` scales them to length 1, `rms` to sqrt(K); or `none`."),
]
Rotation = Annotated[
    Literal["rope", "retnet", "none"],
    Field(
        description="Rotation of queries and keys by position: `rope` with RoFormer's frequencies, `retnet` with "
        "those of the RetNet authors' code, or `none`."
    ),
]
OutputGate = Annotated[Gate, Field(description="Activation of the output gate; `none` for no gate.")]
OutputNorm = Annotated[HeadNorm, Field(description="Norm of the output of each head.")]
Affine = Annotated[bool, Field(description="True if the output norm has weights, shared by all heads.")]


class QKVConfig(MatrixStateConfig):
    """Fields of every mixer with queries, keys and values per head; each mixer sets its own defaults."""

    n_heads: Heads
    expand_k: KeyExpansion = 1.0
    expand_v: ValueExpansion = 1.0
    short_conv: ShortConv = None
    qk_norm: QKNormKind = "none"
    rotation: Rotation = "none"
    rotation_base: float = Field(default=10000.0, gt=1)
    """Base of the rotation frequencies."""
    gate: OutputGate = "swish"
    head_norm: OutputNorm = "rms"
    norm_affine: Affine = False
    value_residual: ValueResidualOption = False

    @property
    def traits(self) -> Traits:
        """Traits of the op family, and the value residual."""
        return replace(super().traits, value_residual=self.value_residual)

    @model_validator(mode="after")
    def _check_rotation_base(self) -> "QKVConfig":
        if self.rotation == "none" and self.rotation_base != type(self).model_fields["rotation_base"].default:
            raise ValueError(
                f"rotation_base = {self.rotation_base} needs a rotation, got rotation = none: "
                "set rotation, or leave out rotation_base"
            )
        return self


class QKV(NamedTuple):
    """Queries, keys, values and further projections of a segment, ready for the recurrence."""

    q: Float[Tensor, "B T H K"]
    k: Float[Tensor, "B T*n H K"]
    """Keys of n steps per token, one after another; n > 1 only with several delta-rule steps (DeltaProduct)."""
    v: Float[Tensor, "B T*n H V"]
    gate: Float[Tensor, "B T H V"] | None
    more: dict[str, Tensor]
    """Further projections of the mixer, by name."""
    positions: Int[Tensor, "_ T"] | None
    """Positions of the tokens; None if the mixer does not use them."""
    recent: Float[Tensor, "N W-1 C"] | None
    """Last inputs of the short convolution; None unless the final state is requested."""
    dtype: torch.dtype
    """Dtype of the projections; `q`, `k` and `v` may be wider."""
    own_values: Float[Tensor, "B T n*H V"]
    """Values without those from outside the mixer."""


class QKVMixer(OutsideValues[MatrixState], MatrixStateMixer):
    """Layer around a recurrence, which a subclass defines in `recur`.

    A submodule that a subclass adds must initialise itself when it is built, and have `reset_parameters`, which the
    layer's own `reset_parameters` calls.

    Args:
        config: the mixer's configuration.
        d_model: width of the residual stream.
        more: widths of further projections by name, the gates of the recurrence; `project` returns them in `QKV.more`.

    Raises:
        ContractError: the heads do not divide the widths, or heads that are rotated have an odd width.
    """

    gains: ClassVar[tuple[float, float]] = (2**-2.5, 2**-1)
    """Gains with which the input and the output projection are initialised (Xavier-uniform); RetNet's by default."""
    activation: ClassVar[Literal["silu", "none"]] = "silu"
    """Activation after the short convolution."""
    convolves_values: ClassVar[bool] = True
    """True if values go through the short convolution, as queries and keys do."""
    projects_gate: ClassVar[bool] = True
    """True if the input projection includes the output gate; if False, the mixer's own `project` adds the gate."""

    def __init__(self, config: Any, d_model: int, **more: int) -> None:
        super().__init__(config)
        self.config = config
        self.n_heads = config.n_heads
        self.n_qk_heads: int = getattr(config, "n_qk_heads", None) or config.n_heads
        self.key_dim = head_width(d_model, config.expand_k, self.n_qk_heads, "expand_k")
        self.value_dim = head_width(d_model, config.expand_v, config.n_heads, "expand_v")
        if config.rotation != "none" and self.key_dim % 2:
            raise ContractError(
                f"rotation needs heads with keys of even width, got width {self.key_dim}: change n_heads or expand_k"
            )
        keys = self.n_qk_heads * self.key_dim
        values = self.n_heads * self.value_dim
        gate = {"gate": values} if config.gate != "none" and self.projects_gate else {}
        step_widths = self.steps * keys, self.steps * values
        self.value_heads, self.value_width = self.steps * self.n_heads, step_widths[1]
        self.widths = {"q": keys, "k": step_widths[0], "v": step_widths[1], **gate, **more}
        self.extra_names = tuple(self.widths)[3:]
        heads = {"q": self.n_qk_heads, "k": self.n_qk_heads * self.steps, "v": self.n_heads * self.steps}
        heads["gate"] = self.n_heads
        self.row_blocks = [
            RowBlock(name, rows, Role.GATE if name in more else Role.MATRIX, heads.get(name, 1))
            for name, rows in self.widths.items()
        ]
        self.parameter_roles = {"in_proj.weight": self.row_blocks}
        self.in_proj = nn.Linear(d_model, sum(self.widths.values()), bias=False)
        channels = keys + (sum(step_widths) if self.convolves_values else step_widths[0])
        self.convolution = ShortConvolution.of(config.short_conv, channels, activation=self.activation)
        self.norm = self.output_norm(self.value_dim)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    def output_norm(self, width: int) -> GatedNorm:
        """Return the gated norm of the output over `width` dimensions."""
        config = self.config
        return GatedNorm(width, config.head_norm, config.gate, affine=config.norm_affine, eps=config.norm_eps)

    def reset_parameters(self) -> None:
        """Initialise Xavier-uniform projections with the class's gains, filters as `nn.Conv1d`, norm weights of 1."""
        for projection in self.in_proj.weight.split(list(self.widths.values())):
            nn.init.xavier_uniform_(projection, gain=self.gains[0])
        parts: list[Any] = [part for part in self.children() if part not in (self.in_proj, self.out_proj)]
        for part in parts:
            part.reset_parameters()
        nn.init.xavier_uniform_(self.out_proj.weight, gain=self.gains[1])

    def scale_like(self, base: Any) -> None:
        super().scale_like(base)
        # with keys and queries of length 1, outputs are proportional to 1/K at initialisation, and in wide heads the
        # norm's constant would outweigh them
        if self.config.qk_norm == "l2":
            self.norm.eps *= (base.key_dim / self.key_dim) ** 2

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> Mixed[MatrixState]:
        h = self.project(x, call)
        result = self.recur(x, h, call.enter("memory"))
        pair: Any = result if isinstance(result, tuple) else ()  # a tensor of two rows could be unpacked too
        try:
            o, memory = pair
        except ValueError:
            raise self._wrong_result("recur", "(output, state)", result) from None
        y, after = self.project_out(x, h, o, memory, call)
        return self.with_own_values(y, after, h.own_values) if self.traits.value_residual else (y, after)

    def project_out(
        self, x: Float[Tensor, "B T D"], h: QKV, o: Float[Tensor, "B T H V"], memory: Tensor | None, call: Call
    ) -> tuple[Float[Tensor, "B T D"], MatrixState | None]:
        """Compute everything after the recurrence: norm, gate and output projection; then the state (None unless
        requested)."""
        y = self.out_proj(self.gated_norm(o, h.gate).to(h.dtype).flatten(2))
        return y, self.state_after(x, memory, h.recent, call)

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        return super().flops(length, paradigm, context) + self.outside_flops * length

    @property
    def projections(self) -> dict[str, Float[Tensor, "H _ D"]]:
        # with several steps per token, return the first step
        views = projections_of(self.in_proj, self.out_proj, self.row_blocks, self.n_heads)
        return views | {"k": views["k"][: self.n_qk_heads], "v": views["v"][: self.n_heads]}

    @abstractmethod
    def recur(self, x: Float[Tensor, "B T D"], h: QKV, call: Call) -> RecurrenceOutput:
        """Compute the recurrence: call an op of the family on the projections `h` of x."""

    def gated_norm(self, o: Float[Tensor, "B T H V"], gate: Float[Tensor, "B T H V"] | None) -> Tensor:
        """Norm the output of the recurrence and apply the gate."""
        return self.norm(o, gate)

    def project(self, x: Float[Tensor, "B T D"], call: Call) -> QKV:
        """Compute everything before the recurrence: projections, convolution, norms and rotation."""
        q, k, v, *rest = self.widths.values()
        if not self.convolves_values:
            qk, v, *others = self.in_proj(x).split_with_sizes([q + k, v, *rest], -1)
            qk, recent = self.convolve(qk, call)
        elif self.silu_without_conv or self.convolution is not None:
            # queries, keys and values go through the convolution together
            qkv, *others = self.in_proj(x).split_with_sizes([q + k + v, *rest], -1)
            qkv, recent = self.convolve(qkv, call)
            qk, v = qkv.split_with_sizes([q + k, v], -1)
        else:  # a single split, so that backward concatenates the gradients once
            qk, v, *others = self.in_proj(x).split_with_sizes([q + k, v, *rest], -1)
            _, recent = self.convolve(qk, call)
        more = dict(zip(self.extra_names, others, strict=True))
        heads = self.n_heads
        kv_heads = self.steps * self.n_heads
        qk = torch.unflatten(qk, -1, ((1 + self.steps) * self.n_qk_heads, -1))  # faster than Tensor.unflatten
        own_values = torch.unflatten(v, -1, (kv_heads, -1))
        takes = self.takes_first_values or self.takes_token_values  # decoding feels every call
        v = self.with_outside_values(own_values, x, call) if takes else own_values
        qk = self.features(qk)
        positions = None
        if self.counts_positions:
            positions = call.positions(x, None if call.state is None else call.state.position)
            if self.config.rotation != "none":  # rotation comes last, so that scores depend on distances only
                qk = rotated(qk, positions, self.config.rotation, self.config.rotation_base, memo=call.memo)
        if self.n_qk_heads != heads:  # several value heads share queries and keys
            qk = qk.repeat_interleave(heads // self.n_qk_heads, dim=2)
        q, k = qk.to(self.op_dtype(v.dtype)).split_with_sizes([heads, kv_heads], 2)
        gate = more.pop("gate", None)
        gate = None if gate is None else torch.unflatten(gate, -1, (heads, -1))
        if self.steps != 1:
            k, v = self.by_step(k), self.by_step(v)
        return QKV(q, k, v.to(q.dtype), gate, more, positions, recent, v.dtype, own_values)

    def by_step(self, x: Float[Tensor, "B T n*H *rest"]) -> Float[Tensor, "B T*n H *rest"]:
        """Move the steps of a token from the head dimension to the token dimension, one after another."""
        return x.unflatten(2, (self.steps, -1)).flatten(1, 2)

    @property
    def counts_positions(self) -> bool:
        """True if the mixer uses the positions of the tokens."""
        return self.config.rotation != "none"

    def features(self, qk: Float[Tensor, "B T 2H K"]) -> Float[Tensor, "B T 2H K"]:
        """Norm queries and keys before the rotation."""
        if self.config.qk_norm == "l2":
            qk = unit_norm(qk)
        elif self.config.qk_norm == "rms":
            qk = F.rms_norm(qk, qk.shape[-1:], eps=self.config.norm_eps)
        return qk
