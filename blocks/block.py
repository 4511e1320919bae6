"""The pre-norm residual block.

x ──┬── norm ── mixer ── dropout ──(+)──┬── norm ── ffn ── dropout ──(+)── y          (RetNet, Eq. 9)
    └───────────────────────────────┘   └────────────────────────────┘

The picture shows plain residual connections; `residual/` has others.
"""

from typing import Annotated, Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..mixers import MIXERS, ContractError, MixerConfig, Traits
from ..mixers.base.contract import build_mixer
from ..mixers.base.layer_call import PLAIN_CALL, LayerCall, MixResult
from ..registry import Config
from .canon import Canon, CanonCall, Place
from .dropout import Dropout
from .ffn import FFNS, FfnConfig
from .norm import NORMS, Norm, NormConfig
from .residual import Residual, ResidualConfig, Stream
from .residual.plain import PlainConfig


class BlockConfig(Config):
    """Configuration of a block: one kind of layer, with a mixer, a feed-forward network and norms."""

    mixer: Annotated[MixerConfig, MIXERS]
    """Sequence mixer, which combines tokens."""
    ffn: Annotated[FfnConfig, FFNS] | None
    """Feed-forward network, applied to each token; null for a block that has only a mixer."""
    norm: Annotated[NormConfig, NORMS]
    """Norm of the mixer branch and of the feed-forward branch; each branch has its own parameters."""
    norm_placement: Literal["input", "output", "both", "stream"] = "input"
    """Position of the norms: the `input` of a branch (pre-norm), its `output` (OLMo 2), `both` (sandwich norm, Gemma 2;
    two norms per branch), or the `stream` before the branch, so that the branch's output is added to the normed stream
    (MiniMax-01)."""
    parallel: bool = False
    """True to compute mixer and feed-forward network as one branch, x + mixer(norm(x)) + ffn(norm(x)), with one norm
    for both (GPT-J, PaLM, Phi, Command R); False to compute one after the other."""
    canon: tuple[Place, ...] = Field(default=(), strict=False)
    """Places of Canon layers, short convolutions x + conv(x) over four tokens (arXiv 2512.17351): `a` before the mixer,
    `c` before the feed-forward network, `d` on its hidden layer."""
    layer_scale: float | None = Field(default=None, ge=0)
    """Initial value of a learned factor per channel of a branch's output (LayerScale, arXiv 2103.17239), such as 1e-4;
    null for none."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability for the outputs of the mixer and of the feed-forward network, in training."""
    residual_scale: float = Field(default=1.0, gt=0)
    """Factor by which the outputs of the mixer and of the feed-forward network are multiplied before they are added to
    the residual stream."""
    shared: bool = False
    """True if all layers of this block share their parameters; each layer still has its own state."""

    @model_validator(mode="after")
    def _check_parallel(self) -> Self:
        if self.parallel and self.ffn is None:
            raise ValueError("parallel = true needs a feed-forward network, got ffn = null: set one of them")
        return self

    @model_validator(mode="after")
    def _check_canon(self) -> Self:
        if len(set(self.canon)) < len(self.canon):
            raise ValueError(f"canon must name each place once, got {', '.join(self.canon)}")
        if self.ffn is None and (places := [place for place in self.canon if place != "a"]):
            raise ValueError(f"canon = {places[0]} needs a feed-forward network, got ffn = null: leave it out")
        return self

    @property
    def n_branches(self) -> int:
        """Number of residual branches of a layer."""
        return 1 if self.ffn is None or self.parallel else 2


class Block(nn.Module):
    """A layer: a mixer and a feed-forward network as residual branches with norms."""

    def __init__(
        self,
        config: BlockConfig,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        residual: ResidualConfig | None = None,
        first_branch: int = 0,
    ) -> None:
        """Build the layer with index `layer_idx` of `n_layers`.

        `residual` configures the connections of its branches, None for plain ones; `first_branch` is the index of its
        first branch in the model.
        """
        super().__init__()
        self.mixer_norm = config.norm.build(d_model)
        self.mixer = build_mixer(config.mixer, d_model, layer_idx=layer_idx, n_layers=n_layers)
        has_two = config.n_branches == 2
        self.ffn_norm = config.norm.build(d_model) if has_two else None
        self.ffn = config.ffn.build(d_model) if config.ffn else None
        # None for the plain connection: decoding feels every call of a module
        routed = None if isinstance(residual, PlainConfig) else residual
        self.mixer_residual = routed.build(d_model, index=first_branch, place=0, layer=layer_idx) if routed else None
        self.ffn_residual = (
            routed.build(d_model, index=first_branch + 1, place=1, layer=layer_idx) if routed and has_two else None
        )
        sandwich = config.norm_placement == "both"
        self.mixer_output_norm = config.norm.build(d_model) if sandwich else None
        self.ffn_output_norm = config.norm.build(d_model) if sandwich and has_two else None
        self.canon = Canon(self._canon_widths(config, d_model)) if config.canon else None
        self.layer_scale = config.layer_scale
        scaled = config.layer_scale is not None
        self.mixer_scale = nn.Parameter(torch.empty(d_model)) if scaled else None
        self.ffn_scale = nn.Parameter(torch.empty(d_model)) if scaled and has_two else None
        # nn.Dropout draws a new mask for every call of a shared block
        self.dropout = nn.Dropout(config.dropout) if config.shared else Dropout(config.dropout)
        self.residual_scale = config.residual_scale
        self.norm_placement = config.norm_placement
        self._norms_inputs = config.norm_placement in ("input", "both")
        self._one_branch = not has_two

    def _canon_widths(self, config: BlockConfig, d_model: int) -> dict[Place, int]:
        """Return the number of channels of each Canon layer."""
        widths: dict[Place, int] = dict.fromkeys(config.canon, d_model)
        if "d" in widths and self.ffn is not None:
            if not self.ffn.hidden_channels:
                kind = None if config.ffn is None else config.ffn.kind
                raise ContractError(f"canon = d needs a feed-forward network of kind mlp or swiglu, got {kind}")
            widths["d"] = self.ffn.hidden_channels
        return widths

    @property
    def kind(self) -> str:
        """Kind of the mixer."""
        return self.mixer.kind

    @property
    def traits(self) -> Traits:
        """Traits of the mixer, which are those of the layer: Canon layers support all that a mixer may declare."""
        return self.mixer.traits

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> Any:
        """Return the initial state: that of the mixer, and with Canon layers theirs beside it."""
        state = self.mixer.init_state(batch_size, max_length=max_length)
        return state if self.canon is None else self.canon.init_state(state, batch_size)

    def resize_state(self, state: Any, max_length: int | None) -> Any:
        """Return the state with another capacity in tokens, as `SequenceMixer.resize_state`."""
        if self.canon is None:
            return self.mixer.resize_state(state, max_length)
        return state._replace(mixer=self.mixer.resize_state(state.mixer, max_length))

    def resolve_backend(self, dtype: torch.dtype) -> None:
        """Choose the kernel backends for the parameters' device and activations of `dtype`.

        Raises:
            SeqmixError: the mixer's backend cannot run.
        """
        self.mixer.resolve_backend(dtype)
        for layer in () if self.canon is None else self.canon.convolutions.values():
            layer.choose_kernel("auto", dtype)

    @property
    def residuals(self) -> tuple[Residual, ...]:
        """Connections of the branches, in the order in which they are computed; empty for plain ones."""
        return tuple(each for each in (self.mixer_residual, self.ffn_residual) if each is not None)

    def reset_parameters(self) -> None:
        """Initialise every parameter, each module as its paper does."""
        mixer_parts = self.mixer_norm, self.mixer, self.mixer_output_norm, self.mixer_residual
        ffn_parts = self.ffn_norm, self.ffn, self.ffn_output_norm, self.ffn_residual
        for part in (*mixer_parts, *ffn_parts, self.canon):
            if part is not None:
                part.reset_parameters()
        for scale in (self.mixer_scale, self.ffn_scale):
            if scale is not None:
                nn.init.constant_(scale, self.layer_scale or 0.0)

    def __getstate__(self) -> dict[str, Any]:
        # compiled code is bound to this object, so copies must not have it
        return {name: value for name, value in super().__getstate__().items() if name != "forward"}

    def forward(self, stream: Stream, call: LayerCall = PLAIN_CALL) -> MixResult[Any]:
        """Apply the layer to a segment of the residual stream: [B T D] with plain connections.

        Returns:
            The result of the mixer, with the stream in place of its output. With Canon layers, the state is a
            `CanonState`, as that of the call.
        """
        canon = None if self.canon is None else CanonCall(self.canon, call, self.mixer.cp_group)
        if canon is not None:
            call = canon.mixer_call

        if self.norm_placement == "stream":
            stream = self.mixer_norm(stream)
        if (residual := self.mixer_residual) is None:
            added, mixed = self._mix(stream, call, canon)
            stream = stream + added
        else:
            mixed = None

            def mix(x: Tensor) -> Tensor:
                nonlocal mixed
                added, mixed = self._mix(x, call, canon)
                return added

            stream = residual(stream, mix)
            assert mixed is not None

        if not self._one_branch:
            if self.norm_placement == "stream" and self.ffn_norm is not None:
                stream = self.ffn_norm(stream)
            if (residual := self.ffn_residual) is None:
                stream = stream + self._feed(stream, canon)
            else:
                stream = residual(stream, lambda x: self._feed(x, canon))

        state = mixed.state if canon is None or not call.return_state else canon.state_after(mixed.state)
        return MixResult(stream, state, mixed.values, mixed.kv, mixed.loss)

    def _mix(
        self, x: Float[Tensor, "B T D"], call: LayerCall, canon: CanonCall | None
    ) -> tuple[Float[Tensor, "B T D"], MixResult[Any]]:
        """Return what the mixer's branch adds to the stream, and the result of the mixer.

        In a parallel block, the branch has the feed-forward network too.
        """
        norm = self.mixer_norm  # nn.Module looks up parts by a function call
        x = norm(x) if self._norms_inputs else x
        mixed = self.mixer(x if canon is None else canon("a", x), call=call)
        y = mixed.y
        if self._one_branch and (ffn := self.ffn) is not None:
            y = y + (ffn(x) if canon is None else canon.feed(ffn, x))
        output_norm = norm if self.norm_placement == "output" else self.mixer_output_norm
        return self._scaled(y, output_norm, self.mixer_scale), mixed

    def _feed(self, x: Float[Tensor, "B T D"], canon: CanonCall | None) -> Float[Tensor, "B T D"]:
        """Return what the feed-forward network's branch adds to the stream."""
        norm, ffn = self.ffn_norm, self.ffn
        assert norm is not None
        assert ffn is not None
        x = norm(x) if self._norms_inputs else x
        y = ffn(x) if canon is None else canon.feed(ffn, x)
        return self._scaled(y, norm if self.norm_placement == "output" else self.ffn_output_norm, self.ffn_scale)

    def _scaled(self, y: Tensor, output_norm: Norm | None, scale: Tensor | None) -> Tensor:
        """Return the output of a branch, normed, scaled and with dropout, as configured."""
        y = y if output_norm is None else output_norm(y)
        y = y if scale is None else scale.to(y.dtype) * y
        dropout = self.dropout
        y = dropout(y) if dropout.p else y
        return y if self.residual_scale == 1 else self.residual_scale * y
