"""Softmax attention with grouped heads, a sliding window, and relative positions (arXiv 1706.03762, 2305.13245).

    q, k, v = x W_Q, x W_K, x W_V by head          rope, xpos: q and k rotated by the angle n theta at position n
    s_nm = q_n . k_m / sqrt(K)
    o_n = sum_m softmax_m(s_nm) v_m          over the keys  max(0, n - window + 1) <= m <= n
    xpos: each product of a pair j of dimensions shrinks by zeta_j^((n - m) / 512), zeta_j = (j / (K/2) + 0.4) / 1.4

    short_conv     q, k, v <- conv(q), conv(k), conv(v)      causal, by channel, without activation (Primer)
    qk_norm        q, k <- RMSNorm(q), RMSNorm(k)            per head or over all heads, before rotation (Qwen3, OLMo)
    softcap        s <- c tanh(s / c)                        (Gemma 2)
    forget_gate    s_nm += sum_{m < l <= n} log f_l          f = sigmoid(x W_F + b), by head (FoX)
    alibi          s_nm -= slope (n - m)                     slopes 2^(-8 h / H), h = 1 .. H, if H is a power of 2
    sinks          softmax over the keys and one more score  a parameter per head (gpt-oss)
    differential   o_i <- o_2i - sigmoid(x W_D)_i o_2i+1     2H query heads, H outputs (Differential Transformer v2)
    exclusive      o <- o - a (o . v_n) v_n / (v_n . v_n)    a = 1, or tanh of a parameter per head (XSA)
    gate           o <- o * sigmoid(x W_G)                   element by element (Qwen3-Next)
    value_residual v <- l_1 v^1 + l_2 v                      v^1 of the model's first attention layer (ResFormer)
    qk_gain        s <- g s                                  a learned factor per query head, after qk_norm

xPos is Eq. 17 of arXiv 2212.10554 with gamma = 0.4 and a base of 512 tokens, as in the authors' code; ALiBi is arXiv
2108.12409, FoX arXiv 2503.02130, XSA arXiv 2603.09078, Primer arXiv 2109.08668. For other numbers of heads, the slopes
of ALiBi are those of its authors' code (`alibi_slopes`). With `exclusive: full`, the first token of a sequence
gives 0, since it sees its own value alone. The state is a KV cache. Cached keys are rotated, without the factor of
xPos; with a forget gate, the cache also has the gate of each token. With values from outside (a value residual, value
embeddings), the values that are cached, and that `exclusive` removes, are those after the mixture. There are no biases
by default, unlike in the Transformer baseline of the RetNet paper.

A layer can read the keys and values of an earlier layer (`model.kv_sharing`). It then has no W_K and W_V, and its state
is the number of tokens read; the keys and values come with each call, and those before the segment from the cache of
the earlier layer.

`differential` follows the code of Differential Transformer v2 (microsoft/unilm, 2026-01; v1 is arXiv 2410.05258, with
other heads, lambdas per layer and a head norm). Both heads of a pair read the same key and value head. Sinks, forget
gates and gains are per query head; with ALiBi, both heads of a pair have the same slope. XSA and the gate act on the
difference.
"""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..ops.attention import Backend, SharedKV, SoftmaxOptions, softmax_attention, softmax_flops
from ..ops.runtime.call import Call
from ..ops.runtime.kernel import Probe
from ..ops.runtime.paradigm import Paradigm
from .base.layer_call import Mixed, MixResult
from .base.roles import Role, RowBlock
from .base.traits import ContractError, Traits
from .parts import (
    CachedMixer,
    Gate,
    GatedNorm,
    QKNorm,
    ReaderState,
    ShortConvolution,
    divisors,
    nearest_of,
    rotated,
)
from .parts.cached import CachedState, GroupedQueryConfig, with_recent
from .parts.gates import gate_decay
from .parts.outside_values import OutsideValues, ValueResidualOption
from .parts.projections import projections_of
from .parts.rotary import LinearScaling, RopeScaling
from .parts.widths import rotary_dim

TINY = 1e-30
"""Least squared length of a value by which `exclusive` divides."""
XPOS_GAMMA = 0.4
"""Offset gamma in zeta_j = (j / (K/2) + gamma) / (1 + gamma)."""
XPOS_BASE = 512
"""Distance in tokens at which a product has shrunk by the factor zeta."""


class AttentionConfig(GroupedQueryConfig):
    """Softmax attention: every query attends to all keys before it, or to the last `window` of them."""

    kind: Literal["attention"] = "attention"
    head_dim: int | None = Field(default=None, gt=0, examples=[8])
    """Width of one head; d_model / n_heads when null."""
    positions: Literal["rope", "xpos", "alibi", "none"] = "rope"
    """Position encoding: `rope` rotates queries and keys (RoFormer); `xpos` also makes products shrink with distance;
    `alibi` subtracts from scores in proportion to distance instead; `none` has no positions."""
    rope_base: float = Field(default=10000.0, gt=1, examples=[100.0])
    """Base of the rotation frequencies."""
    rope_scaling: RopeScaling | None = Field(default=None, examples=[LinearScaling(factor=2.0)])
    """Scaling of the angles to extend the context, with positions = rope: `linear` or `llama3`; null for none."""
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1, examples=[0.5])
    """Fraction of the dimensions of a head that `rope` rotates, counted from the first."""
    short_conv: int | None = Field(default=None, ge=0, le=64, examples=[3])
    """Width in tokens of a short convolution of queries, keys and values, without activation; 0 or null for none."""
    qk_norm: Literal["rms", "rms_zero_centered", "rms_all_heads", "none"] = "none"
    """Norm of queries and keys before rotation: `rms` is per head, with weights that all heads share;
    `rms_zero_centered` is the same with factors 1 + weight (Qwen3-Next); `rms_all_heads` is over all heads (OLMo)."""
    norm_eps: float = Field(default=1e-6, ge=0)
    """Constant added to the mean square in `qk_norm`."""
    qk_gain: float | None = Field(default=None, gt=0, examples=[2.0])
    """Initial value of a learned factor of the scores per query head, after `qk_norm`; null for none."""
    softcap: float | None = Field(default=None, gt=0, examples=[2.0])
    """Bound c on the scores s, which become c tanh(s / c) (Gemma 2); null for no bound."""
    forget_gate: bool = False
    """True to add the log forget gates of all tokens after a key to its scores, one gate per query head (FoX)."""
    sinks: bool = False
    """True for an attention sink per head: one more score in the softmax, learned, without a value."""
    differential: bool = False
    """True for pairs of query heads, 2 n_heads in all, whose outputs are subtracted: the first minus a share of the
    second, the sigmoid of one more projection (Differential Transformer v2)."""
    exclusive: Literal["none", "full", "learned"] = "none"
    """Removal of a token's own value from its output (XSA): `full` removes the part of the output along that value;
    `learned` removes the fraction tanh of a parameter per head, which starts at 0."""
    value_residual: ValueResidualOption = False
    bias: Literal["none", "qkv", "output", "all"] = "none"
    """Projections that have biases: `qkv` (queries, keys, values and gates, as in Qwen2), `output`, `all` or `none`."""
    gate: Gate = "none"
    """Elementwise output gate."""
    window: int | None = Field(default=None, gt=0, examples=[4, 1])
    """Number of keys that a query sees, including its own; null for all. A window bounds the state."""
    chunk_size: int = Field(default=512, gt=0, le=2**20)
    """Queries per block of the chunkwise paradigm; changes the cost, never the result."""
    backend: Backend = "auto"
    """Kernel backend of the parallel paradigm; changes the cost, never the result."""
    paradigm: Paradigm = Field(default=Paradigm.PARALLEL, strict=False)
    """Paradigm of training and evaluation."""

    @model_validator(mode="after")
    def _check_heads(self) -> "AttentionConfig":
        if self.rotates and self.head_dim is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even, got {self.head_dim}: {self.positions} rotates pairs of dimensions"
            )
        if self.partial_rotary_factor != 1 and self.positions != "rope":
            raise ValueError(
                f"partial_rotary_factor = {self.partial_rotary_factor:g} needs positions = rope, "
                f"got positions = {self.positions}"
            )
        if self.qk_gain is not None and self.qk_norm == "none":
            raise ValueError(
                f"qk_gain = {self.qk_gain:g} needs qk_norm, got none: without a norm, the length of the queries is free"
            )
        if self.rope_scaling is not None and self.positions != "rope":
            raise ValueError(f"rope_scaling needs positions = rope, got positions = {self.positions}")
        return self

    @model_validator(mode="after")
    def _check_window(self) -> "AttentionConfig":
        unused = {"forget_gate": self.forget_gate, "qk_norm": self.qk_norm != "none" and not self.sinks}
        if self.window == 1 and (names := [name for name, enabled in unused.items() if enabled]):
            raise ValueError(
                f"{' and '.join(names)} would learn nothing with window = 1, where a query sees only its own key: "
                "set window >= 2"
            )
        if self.window == 1 and self.exclusive == "full":
            raise ValueError(
                "exclusive = full gives 0 with window = 1, where a query sees only its own value: set window >= 2"
            )
        return self

    @property
    def rotates(self) -> bool:
        """True if queries and keys are rotated (RoPE, xPos)."""
        return self.positions in ("rope", "xpos")

    @property
    def traits(self) -> Traits:
        """Traits: all paradigms; the state grows unless a window bounds it."""
        return Traits(
            paradigms=frozenset(Paradigm),
            state="growing" if self.window is None else "constant",
            packing=True,
            shift_invariant=True,
            value_residual=self.value_residual,
            kv_sharing=not (self.forget_gate or self.value_residual or self.short_conv),
        )

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Attention":
        return Attention(self, d_model)


class Attention(OutsideValues[CachedState], CachedMixer):
    """Layer configured by `AttentionConfig`."""

    def __init__(self, config: AttentionConfig, d_model: int) -> None:
        super().__init__(config)
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = config.head_dim or _head_dim(config, d_model)
        self.rotary_dim = rotary_dim(config.partial_rotary_factor, self.head_dim) if config.rotates else 0
        self.n_query_heads = 2 * self.n_heads if config.differential else self.n_heads
        keys = self.n_kv_heads * self.head_dim
        self.value_heads, self.value_width = self.n_kv_heads, keys
        self.widths = {"q": self.n_query_heads * self.head_dim, "k": keys, "v": keys}
        if config.gate != "none":
            self.widths["gate"] = self.n_heads * self.head_dim
        if config.forget_gate:
            self.widths["forget"] = self.n_query_heads
        if config.differential:
            self.widths["share"] = self.n_heads
        self._build_projection(d_model)
        channels = sum(self.widths[name] for name in "qkv")
        self.convolution = ShortConvolution.of(config.short_conv, channels, activation="none")
        self.qk_gain = None if config.qk_gain is None else nn.Parameter(torch.empty(self.n_query_heads))
        self.forget_heads = self.n_query_heads if config.forget_gate else None
        self.forget_bias = nn.Parameter(torch.empty(self.n_query_heads)) if config.forget_gate else None
        self.sinks = nn.Parameter(torch.empty(self.n_query_heads)) if config.sinks else None
        self.exclusion = nn.Parameter(torch.empty(self.n_heads)) if config.exclusive == "learned" else None
        self.gate = GatedNorm(self.head_dim, "none", config.gate, affine=False, eps=0)
        self.out_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=config.bias in ("output", "all"))
        self.reset_parameters()

    def _build_projection(self, d_model: int) -> None:
        """Build the input projection, one matrix with the blocks of rows `widths`, and the norm of what it returns."""
        config = self.config
        heads = {"q": self.n_query_heads, "k": self.n_kv_heads, "v": self.n_kv_heads, "gate": self.n_heads}
        self.row_blocks = [
            RowBlock(name, rows, Role.MATRIX if name in heads else Role.GATE, heads.get(name, 1))
            for name, rows in self.widths.items()
        ]
        self.parameter_roles = {
            "in_proj.weight": self.row_blocks,
            "forget_bias": Role.RATE,
            "qk_gain": Role.VECTOR,
            "sinks": Role.VECTOR,
            "exclusion": Role.VECTOR,
        }
        self.in_proj = nn.Linear(d_model, sum(self.widths.values()), bias=config.bias in ("qkv", "all"))
        kind = config.qk_norm
        self.qk_norm = None
        if kind != "none":
            self.qk_norm = QKNorm(
                (self.n_query_heads, 0 if self.takes_shared_kv else self.n_kv_heads),
                self.head_dim,
                config.norm_eps,
                all_heads=kind == "rms_all_heads",
                zero_centered=kind == "rms_zero_centered",
            )

    def accept_shared_kv(self) -> None:
        if not self.traits.kv_sharing:
            super().accept_shared_kv()
        device, dtype = self.device, self.dtype
        self.takes_shared_kv = True
        self.traits = replace(self.traits, state="constant")
        del self.widths["k"], self.widths["v"]
        self._build_projection(self.in_proj.in_features)
        self.to(device, dtype)

    def reset_parameters(self) -> None:
        """Initialise as the RetNet authors' Transformer: Xavier-uniform with gain 2^-0.5 (1 for the output projection),
        zeros for biases, sinks and the fractions of XSA."""
        for projection in self.in_proj.weight.split(list(self.widths.values())):
            nn.init.xavier_uniform_(projection, gain=2**-0.5)
        for part in (self.convolution, self.qk_norm, self.first_mix, self.token_gate):
            if part is not None:
                part.reset_parameters()
        if self.qk_gain is not None:
            nn.init.constant_(self.qk_gain, self.config.qk_gain)
        for parameter in (self.forget_bias, self.sinks, self.exclusion, self.in_proj.bias, self.out_proj.bias):
            if parameter is not None:
                nn.init.zeros_(parameter)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> Mixed[CachedState]:
        q, own, extras, recent = self._project(x, call)
        if self.convolution is not None:
            call = call.enter("cache")
        options = self._score_options(extras)
        if own is None:  # an earlier layer has the cache
            kv: SharedKV = call.shared_kv
            kv_call = call._replace(state=kv.before, return_state=kv.after is not None)
            options["written_cache"] = kv.after
            output, _ = softmax_attention(q, kv.k, kv.v, kv_call, **options)
            length = None if call.state is None else call.state.length
            final_state = ReaderState(call.advance(x, length)) if call.return_state else None
        else:
            k, own_values = own
            v = self.with_outside_values(own_values, x, call)
            if call.return_kv and not (call.paradigm is Paradigm.RECURRENT and x.shape[1] == 1):
                call = call._replace(donated=False)  # later layers read the cache before the segment
            output, cache = softmax_attention(q, k, v, call, **options)
            cache = None if cache is None else self.stored(cache)
            kv = SharedKV(k, v, call.state, cache)
            final_state = with_recent(cache, recent)
        if "share" in extras:
            share = extras["share"].to(self.state_dtype).sigmoid()[..., None]
            output = (output[:, :, ::2] - share * output[:, :, 1::2]).to(output.dtype)
        if self.config.exclusive != "none":
            output = self._without_own_value(output, kv.v)
        gate = extras["gate"].unflatten(-1, (self.n_heads, -1)) if "gate" in extras else None
        y = self.out_proj(self.gate(output, gate).to(output.dtype).flatten(2))
        values = own[1].flatten(2) if own is not None and self.traits.value_residual else None
        if values is None and not call.return_kv:
            return y, final_state
        return MixResult(y, final_state, values, kv if call.return_kv else None)

    def _project(
        self, x: Float[Tensor, "B T D"], call: Call
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None, dict[str, Tensor], Tensor | None]:
        """Return queries by head, keys and values by head, the other projections (gates) by name, and a state.

        Keys and values are None if those of an earlier layer are read. The state is that of the short convolution; None
        without one, or if it is not requested.
        """
        n_kv_heads = 0 if self.takes_shared_kv else self.n_kv_heads
        count = 1 if self.takes_shared_kv else 3
        names = list(self.widths)[count:]
        widths = list(self.widths.values())
        qkv, *others = self.in_proj(x).split([sum(widths[:count]), *widths[count:]], dim=-1)
        recent = None
        if self.convolution is not None:
            qkv, recent = self.convolution(qkv, call.enter("recent"))
        heads = [self.n_query_heads + n_kv_heads, n_kv_heads]
        qk, v = qkv.unflatten(-1, (-1, self.head_dim)).split(heads, dim=2)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if self.config.rotates:
            positions = call.positions(x, None if call.state is None else call.state.length)
            qk = rotated(
                qk, positions, "rope", self.config.rope_base, self.rotary_dim, self.config.rope_scaling, call.memo
            )
        q, k = qk.split([self.n_query_heads, n_kv_heads], dim=2)
        q = q if self.qk_gain is None else self.qk_gain.to(q.dtype)[:, None] * q
        return q, (k, v) if n_kv_heads else None, dict(zip(names, others, strict=True)), recent

    def _without_own_value(self, output: Float[Tensor, "B T H V"], v: Float[Tensor, "B T G V"]) -> Tensor:
        """Return each token's output without its part along the token's own value."""
        wide = output.to(self.state_dtype).unflatten(2, (self.n_kv_heads, -1))
        own = v.to(self.state_dtype)[:, :, :, None]
        share = (wide * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True).clamp_min(TINY)
        if self.exclusion is not None:
            share = share * self.exclusion.tanh().unflatten(0, (self.n_kv_heads, -1, 1))
        return (wide - share * own).flatten(2, 3).to(output.dtype)

    def _score_options(self, extras: dict[str, Tensor]) -> SoftmaxOptions:
        """Return the options of `softmax_attention` that change the scores."""
        options: SoftmaxOptions = {
            "scale": self.score_scale,
            "window": self.config.window,
            "softcap": self.config.softcap,
            "sinks": self.sinks,
        }
        if self.config.positions == "xpos":
            options["log_decay"] = xpos_log_decay(self.head_dim, self.device)
        if self.config.positions == "alibi":
            slopes = alibi_slopes(self.n_heads, self.device)
            options["slopes"] = slopes.repeat_interleave(2) if self.config.differential else slopes
        if self.forget_bias is not None:
            options["log_forget"] = gate_decay(extras["forget"].to(self.state_dtype) + self.forget_bias, 1)
        return options

    @property
    def projections(self) -> dict[str, Float[Tensor, "H _ D"]]:
        views = projections_of(self.in_proj, self.out_proj, self.row_blocks, self.n_heads)
        if self.config.differential:
            views["q"] = views["q"][::2]  # the queries that the output adds
        return views

    @property
    def score_width(self) -> int:
        return self.head_dim

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        return self.n_kv_heads, self.head_dim, self.head_dim

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return (2 * weights + self.outside_flops) * length + self.n_query_heads * softmax_flops(
            paradigm,
            length,
            self.head_dim,
            self.head_dim,
            window=self.config.window,
            chunk_size=self.config.chunk_size,
            context=context,
        )

    def kernels(self, dtype: torch.dtype) -> tuple[str, Probe]:
        return "softmax", Probe(
            device=self.device,
            dtype=dtype,
            key_width=self.head_dim,
            value_width=self.head_dim,
            log_decay="K" if self.config.positions == "xpos" else None,
            window=self.config.window is not None,
            scores=tuple(name for name, is_used in self._uses_score_option.items() if is_used),
        )

    @property
    def _uses_score_option(self) -> dict[str, bool]:
        """By name of a score option, which kernels may not support: True if this layer uses the option."""
        config = self.config
        capped = config.softcap is not None
        sloped = config.positions == "alibi"
        return {"log_forget": config.forget_gate, "slopes": sloped, "softcap": capped, "sinks": config.sinks}


def _head_dim(config: AttentionConfig, d_model: int) -> int:
    """Return d_model / n_heads.

    Raises:
        ContractError: n_heads does not divide d_model; the message names the nearest numbers of heads that do.
    """
    unit = 2 if config.rotates else 1
    workable = [n for n in divisors(d_model) if d_model // n % unit == 0 and n % (config.n_kv_heads or 1) == 0]
    if config.n_heads in workable:
        return d_model // config.n_heads
    nearest = nearest_of(workable, config.n_heads)
    into = "evenly" if unit == 1 else f"into heads of even width, as {config.positions} rotates pairs of dimensions"
    advice = f"set n_heads = {nearest}, or set head_dim" if nearest else "set head_dim"
    raise ContractError(f"{config.n_heads} heads do not divide d_model = {d_model} {into}: {advice}")


def xpos_log_decay(head_dim: int, device: torch.device) -> Float[Tensor, " K"]:
    """Return the natural log of xPos's factor per token of distance, float64, for interleaved pairs."""
    pair = torch.arange(head_dim // 2, device=device, dtype=torch.float64)
    zeta = (pair / (head_dim // 2) + XPOS_GAMMA) / (1 + XPOS_GAMMA)
    return (zeta.log() / XPOS_BASE).repeat_interleave(2)


def alibi_slopes(n_heads: int, device: torch.device) -> Float[Tensor, " H"]:
    """Return the ALiBi slope of each head, subtracted from a score per token of distance (arXiv 2108.12409), float64.

    The slopes are 2^(-8 h / H) for h = 1 .. H if H is a power of 2. Otherwise, as in the authors' code, with P the next
    lower power of 2, the first P heads have the slopes of P heads, and the others have every second slope of 2 P heads.
    """
    power = 2 ** (n_heads.bit_length() - 1)
    head = torch.arange(n_heads, device=device, dtype=torch.float64)
    return 2 ** -torch.where(head < power, 8 * (head + 1) / power, 8 * (head - power + 0.5) / power)
