"""The language model: embedding, layers, norm, output projection."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..blocks import Block, Dropout
from ..blocks.ffn.moe import ExpertLinear
from ..blocks.residual import Stream
from ..mixers import ContractError, Paradigm
from ..mixers.base.layer_call import LayerCall, MixResult
from ..mixers.base.roles import Role, Roles, roles_of
from ..ops.kernels.selection import describe_backends
from ..ops.runtime.arguments import require_tensor
from ..ops.runtime.context_parallel import ContextParallel
from ..ops.runtime.memo import Memo
from ..registry import SeqmixError, nearest_hint
from .config import ModelConfig, NormalInit
from .cpu_linear import onednn_linear
from .looped_layers import LoopStart
from .loss import IGNORED, Reduction, capped, linear_cross_entropy, linear_predictions
from .parametrization import Shape, initial_std, shapes_of
from .readout import LastVector
from .tokenizer import ByteTokenizer, Tokenizer

Checkpointing: TypeAlias = bool | Literal["matmuls"]
"""Activation checkpointing: False for none, True to recompute whole blocks, `matmuls` to save products with weights."""
MATMULS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, onednn_linear._opoverload]
"""Operators whose results `matmuls` saves: products with weight matrices. The products inside mixers, such as attention
scores, are batched operators; their results grow with the number of pairs of tokens, and are recomputed."""
_keep_matmuls = partial(create_selective_checkpoint_contexts, MATMULS)
ModelState: TypeAlias = tuple[tuple[Any, ...], ...]
"""State of a model: one opaque state per layer."""


class ModelOutput(NamedTuple):
    """Output of a model's forward pass."""

    logits: Float[Tensor, "..."] | None
    """Logits, [B T vocab], or [M vocab] for the M tokens of `select`; None with `targets` and without `select`."""
    loss: Float[Tensor, "..."] | None = None
    """Cross-entropy in nats, after the requested reduction; None without `targets`."""
    state: ModelState | None = None
    """State after the last token; None unless `return_state`."""
    predictions: Int[Tensor, " P"] | None = None
    """Most probable token at each of the P positions with a target, row by row; None unless `return_predictions`."""
    auxiliary_loss: Float[Tensor, ""] | None = None
    """Sum of the mixers' auxiliary losses over tokens, set by a training objective; None if there are none."""


class LanguageModel(nn.Module):
    """A causal language model whose layers may all be different."""

    parameter_roles: ClassVar[Roles] = {"head.weight": Role.READOUT}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.embedding_norm = None if config.embedding_norm is None else config.embedding_norm.build(config.d_model)
        self.dropout = Dropout(config.dropout)
        # cast: a ModuleList does not know the type of its elements
        self.blocks = cast("Sequence[Block]", nn.ModuleList(_build_all(config)))
        _accept_token_values(config, self.blocks)
        self.kv_sources = config.kv_sources
        """Index of the layer whose keys and values each layer reads; None for layers that have their own."""
        self.kv_donors = frozenset(source for source in self.kv_sources if source is not None)
        """Indices of the layers whose keys and values later layers read."""
        self.loop = None if config.loop is None else LoopStart(config.loop, config.d_model, len(config.iterations))
        if config.loop is not None and config.loop.scale:
            for block, name in self.distinct_blocks.items():
                if name in config.shared_blocks:
                    block.residual_scale /= len(config.iterations)
        self.residual = config.residual.build_ends(config.d_model, n_layers=config.n_layers)
        self.readout = None if config.readout == "each" else LastVector(config.d_model, config.norm)
        self.norm = config.norm.build(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        widths = [self.blocks[layer].mixer.value_width or config.d_model for layer in config.value_layers]
        tables = [nn.Embedding(config.vocab_size, width) for width in widths]
        self.value_embeddings = nn.ModuleDict(dict(zip(map(str, config.value_layers), tables, strict=True)))
        """Tables of the value embeddings, by the index of the layer."""
        self._widths = [config.d_model, *widths]
        self.tokenizer: Tokenizer | None = ByteTokenizer()
        """Tokenizer for generation; None if the tokens are not text."""
        self.activation_checkpointing: Checkpointing = False
        """True if the backward pass recomputes the activations of each block: forward then saves only the blocks'
        inputs, and with `matmuls` also the results of linear layers."""
        self.cp_group: ContextParallel | None = None
        """Group of ranks that compute each sequence together (context parallelism), set by `set_cp_group`; None if each
        rank computes whole sequences."""
        self.tie()
        self.base_shapes: Mapping[str, Shape] = {}
        """Shape of each parameter in the base model of muP, by name; empty with the standard parametrization."""
        if config.base is not None:
            self._scale_like(config.base)

    def _scale_like(self, base: ModelConfig) -> None:
        """Set the factors of muP and CompleteP by the base model.

        Raises:
            SeqmixError: the model cannot be built at the base's width.
        """
        try:
            with torch.device("meta"):
                base_model = LanguageModel(base)
        except SeqmixError as error:
            raise SeqmixError(
                f"model.parametrization.base_width: the model cannot be built with d_model = {base.d_model}: {error}"
            ) from error
        self.base_shapes = shapes_of(base_model)
        for block, base_block in zip(self.distinct_blocks, base_model.distinct_blocks, strict=True):
            block.residual_scale *= self.config.branch_scale
            block.mixer.scale_like(base_block.mixer)

    def tie(self) -> None:
        """Share the embedding's matrix with the output projection, if `config.tie_embeddings`."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    @property
    def distinct_blocks(self) -> dict[Block, str]:
        """Blocks with their names in the configuration; a block that several layers share appears once."""
        return dict(zip(self.blocks, self.config.layers, strict=True))

    def set_cp_group(self, cp_group: ContextParallel | None) -> None:
        """Turn on context parallelism: split every sequence over the ranks of a group. None turns it off.

        All ranks call the model with the same whole sequences, and each rank computes one segment of them. Logits and
        losses are those of the rank's own tokens; states are those of the whole sequences. Each rank's loss contributes
        to the gradients on all ranks, and the sum of the ranks' gradients is the gradient of the whole loss.
        """
        self.cp_group = cp_group
        for block in self.blocks:
            block.mixer.cp_group = cp_group

    def reset_parameters(self) -> None:
        """Initialise every parameter according to `config.init`, from torch's global random generator."""
        for block in self.distinct_blocks:
            block.reset_parameters()
        self.apply_model_init()

    def reset_rest(self, assign: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Deprecated name of `apply_model_init`; it will be removed in 0.4."""
        warnings.warn(
            "LanguageModel.reset_rest is now LanguageModel.apply_model_init", DeprecationWarning, stacklevel=2
        )
        self.apply_model_init(assign)

    @torch.no_grad()
    def apply_model_init(self, assign: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Initialise the parameters outside the blocks according to `config.init`.

        With `NormalInit`, draw all matrices of the blocks too, which replaces what the blocks have initialised.

        `assign` is called with a parameter, which may be sharded, and the full tensor to copy into it.
        """
        for module in (self.embedding_norm, self.loop, self.residual, self.readout, self.norm):
            if module is not None:
                module.reset_parameters()
        names = [
            "embedding.weight",
            "head.weight",
            *(f"value_embeddings.{layer}.weight" for layer in self.value_embeddings),
        ]
        std = (self.config.base or self.config).d_model ** -0.5
        if isinstance(self.config.init, NormalInit):
            std = self.config.init.std
            initialised_types = (nn.Linear, nn.Embedding, ExpertLinear)
            names = [f"{path}.weight" for path, module in self.named_modules() if isinstance(module, initialised_types)]
        roles = roles_of(self) if self.base_shapes else {}
        for name in names:
            matrix = self.get_parameter(name)
            base = self.base_shapes.get(name)
            scaled = std if base is None else initial_std(std, roles[name].role, tuple(matrix.shape), base)
            assign(matrix, torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device).normal_(std=scaled))

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: ModelState | None = None,
        *,
        targets: Int[Tensor, "B T"] | None = None,
        reduction: Reduction = "mean",
        paradigm: Paradigm | tuple[Paradigm, ...] | None = None,
        cu_seqlens: Int[Tensor, "N+1"] | None = None,
        return_state: bool = False,
        return_predictions: bool = False,
        select: Int[Tensor, " M"] | None = None,
        donate_state: bool = False,
        losses: list[Tensor] | None = None,
        memo: Memo | None = None,
        **unknown: object,
    ) -> ModelOutput:
        """Return the logits of the next token after each token of a segment, or with `targets` the loss.

        The loss and the predictions are computed without all logits in memory at once.

        Args:
            tokens: the segment, [B T], T >= 1. Under context parallelism, every rank gets the whole segment.
            state: the state after the preceding tokens, from an earlier call or `init_state`; None for a new sequence.
            targets: the next token of each token, [B T]; `IGNORED` (-100) excludes a token from the loss.
            reduction: reduction of the loss, as in F.cross_entropy: "mean" over the targets (0 without targets), "sum",
                or "none" for one loss per token, [B T], which is 0 for ignored targets.
            paradigm: the paradigm of all layers, or one per layer; None for each layer's configured default.
            cu_seqlens: boundaries of documents packed into one row; states then have one row per document.
            return_state: True to return the state after the segment.
            return_predictions: True to return the most probable token at each position with a target.
            select: indices into the B * T tokens (row by row): only their logits are computed.
            donate_state: True if the next state may be written over `state`, which the caller does not need again.
            losses: list to which auxiliary losses of mixers are appended, one per layer that has the trait
                `auxiliary_loss`, summed over the tokens; None if they are not wanted.
            memo: cache of constants, such as rotation angles, for calls with the same parameters; None for a new cache.
            unknown: refused, with the nearest argument.

        Under context parallelism (`cp_group`), each rank returns the results of its own tokens (`local_targets`). The
        "mean" divides by the number of targets on all ranks, so that the ranks' losses add up to the loss of the whole
        sequence. The number of ranks must divide T, except with targets and without a final state: then the end is
        padded.

        Raises:
            ContractError: a layer does not declare the paradigm or packing, or the ranks cannot share T tokens.
            SeqmixError: an argument or the reduction is unknown, `tokens` or `targets` are not tensors of integers or
                differ in shape, or a token or target is not in the vocabulary (on a CPU, and not in compiled code).
        """
        if unknown:
            raise _unknown_argument(next(iter(unknown)))
        _require_ids("tokens", tokens, (torch.int64, torch.int32))
        if targets is not None:
            _require_ids("targets", targets, (torch.int64, torch.uint8))
            if targets.shape != tokens.shape:
                raise SeqmixError(
                    f"targets must have the shape of the tokens, {list(tokens.shape)}, got {list(targets.shape)}"
                )
        if targets is not None and not return_state:
            tokens, cu_seqlens = self._padded(tokens, cu_seqlens)
        x, after = self.run_blocks(
            self.embed(tokens),
            state,
            paradigm,
            cu_seqlens,
            return_state,
            donate_state=donate_state,
            losses=losses,
            memo=memo,
        )
        logits = loss = predictions = None
        if targets is None or select is not None:
            logits = self.logits(x if select is None else x.flatten(0, 1)[select])
        if targets is not None:
            try:
                loss, predictions = self._loss(x, targets, reduction, return_predictions)
            except (IndexError, RuntimeError) as error:  # torch's functions for few and for many tokens differ
                if "out of bounds" not in str(error):
                    raise
                some = targets[targets != IGNORED]
                raise SeqmixError(
                    f"targets must be from 0 to {self.config.vocab_size - 1}, or {IGNORED} to exclude a token, got "
                    f"{int(some.min())} to {int(some.max())}"
                ) from None
        return ModelOutput(logits, loss, after, predictions)

    def embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B _ D"]:
        """Return the start of the residual stream; under context parallelism, that of this rank's tokens.

        With value embeddings, theirs follow along the channels.

        Raises:
            SeqmixError: a token id is not in the vocabulary (on a CPU, and not in compiled code).
        """
        tokens = self._part(tokens)
        try:
            x = self.embedding(tokens)
        except IndexError:
            raise SeqmixError(
                f"token ids must be from 0 to {self.config.vocab_size - 1}, got {int(tokens.min())} to "
                f"{int(tokens.max())}: were the tokens made by another tokenizer?"
            ) from None
        scale = self.config.embedding_scale
        x = x if scale == 1 else scale * x
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        x = self.dropout(x) if self.dropout.p else x
        if not self.value_embeddings:
            return x
        return torch.cat((x, *(table(tokens) for table in self.value_embeddings.values())), dim=-1)

    def logits(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch vocab"]:
        """Return the logits from the vectors that `run_blocks` returns."""
        return capped(self.head(self.norm(x)), self.config.logit_softcap)

    def run_blocks(
        self,
        x: Float[Tensor, "B T D"],
        state: ModelState | None = None,
        paradigm: Paradigm | tuple[Paradigm, ...] | None = None,
        cu_seqlens: Int[Tensor, "N+1"] | None = None,
        return_state: bool = False,
        *,
        donate_state: bool = False,
        losses: list[Tensor] | None = None,
        memo: Memo | None = None,
    ) -> tuple[Float[Tensor, "B T D"], ModelState | None]:
        """Run all layers; return the vectors that the final norm reads, and the state.

        x comes from `embed`, or has embeddings from another source. The other arguments are those of `forward`.

        Raises:
            ContractError: a layer does not declare the paradigm or packing, the number of states or paradigms is
                not the number of layers, or x has not the width that `embed` gives it.
        """
        if x.shape[-1] != sum(self._widths):
            raise ContractError(
                f"expected vectors of width {sum(self._widths)}, got {x.shape[-1]}"
                + (": model.value_embeddings needs tokens, not their embeddings" if self.value_embeddings else "")
            )
        if state is not None and not isinstance(state, (tuple, list)):
            raise ContractError(
                f"state must be what an earlier call returned with return_state=True, or init_state: one entry for "
                f"each of the {len(self.blocks)} layers, got a {type(state).__name__}"
            )
        states = (None,) * len(self.blocks) if state is None else state
        paradigms = paradigm if isinstance(paradigm, tuple) else (paradigm,) * len(self.blocks)
        for name, entries in (("state", states), ("paradigm", paradigms)):
            if len(entries) != len(self.blocks):
                raise ContractError(
                    f"{name} must have one entry for each of the {len(self.blocks)} layers, got {len(entries)}"
                )
        after = []
        first_values: dict[str, Any] = {}
        shared_kv: dict[int, Any] = {}
        can_memoize = not torch.compiler.is_compiling() and not torch.is_grad_enabled()
        memo = (Memo() if memo is None else memo).next_pass() if can_memoize else None
        x, *tables = x.split_with_sizes(self._widths, -1) if self.value_embeddings else (x,)
        token_values = dict(zip(self.config.value_layers, tables, strict=True))
        stream = self.residual.start(x)
        iterations = self.config.iterations
        checkpoints = self.activation_checkpointing and torch.is_grad_enabled()
        layers = zip(self.blocks, states, paradigms, self.kv_sources, strict=True)
        for layer, (block, before, layer_paradigm, kv_source) in enumerate(layers):
            if self.loop is not None and layer in iterations:
                stream = self.loop(stream, x, iterations.index(layer))
            mixer = block.mixer  # reading a submodule is a function call: do it once
            call = LayerCall(
                before,
                layer_paradigm,
                cu_seqlens,
                return_state,
                donate_state,
                first_values=first_values[mixer.kind] if mixer.takes_first_values else None,
                token_values=token_values.get(layer),
                shared_kv=None if kv_source is None else shared_kv[kv_source],
                return_values=mixer.traits.value_residual and mixer.kind not in first_values,
                return_kv=layer in self.kv_donors,
                return_loss=losses is not None and mixer.traits.auxiliary_loss,
                memo=memo,
            )
            result = self._checkpointed(block, stream, call) if checkpoints else block(stream, call)
            stream = result.y
            if call.return_values:
                first_values[mixer.kind] = result.values
            if call.return_kv:
                shared_kv[layer] = result.kv
            if losses is not None and call.return_loss:
                losses.append(cast("Tensor", result.loss))
            after.append(result.state)
        x = self.residual(stream)
        if self.readout is not None:
            if state is not None or return_state or cu_seqlens is not None or self.cp_group is not None:
                raise ContractError(
                    "model.readout=last needs whole sequences: turn off states, packing and context parallelism"
                )
            x = self.readout(x)
        return x, tuple(after) if return_state else None

    def _checkpointed(self, block: Block, stream: Stream, call: LayerCall) -> MixResult[Any]:
        """Return the result of a block whose activations the backward pass computes again."""
        options: dict[str, Any] = {"context_fn": _keep_matmuls} if self.activation_checkpointing == "matmuls" else {}
        # no early stop under context parallelism: every rank has to run all the communication of a block
        return checkpoint(block, stream, call, use_reentrant=False, early_stop=self.cp_group is None, **options)

    def _loss(
        self, x: Float[Tensor, "B T D"], targets: Tensor, reduction: Reduction, return_predictions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss from the residual stream after the last block, and predictions (None unless requested)."""
        local = self.local_targets(targets)
        predictions = None
        softcap = self.config.logit_softcap
        weight = self.head.weight
        reduce = "sum" if reduction == "mean" else reduction
        if return_predictions:  # only the positions with a target are computed
            has_target = local != IGNORED
            hidden = self.norm(x[has_target])
            loss, predictions = linear_predictions(hidden, weight, local[has_target], reduce, softcap)
            if reduction == "none":
                loss = loss.new_zeros(local.shape).masked_scatter(has_target, loss)
        else:
            loss = linear_cross_entropy(self.norm(x).flatten(0, 1), weight, local.flatten(), reduce, softcap)
            loss = loss.view(local.shape) if reduction == "none" else loss
        if reduction == "mean":
            loss = loss / (targets != IGNORED).sum().clamp(min=1)
        return loss, predictions

    def local_targets(self, targets: Int[Tensor, "B T"]) -> Int[Tensor, "B _"]:
        """Return the targets of this rank's tokens; without context parallelism, all of them. Padding is `IGNORED`."""
        if self.cp_group is None:
            return targets
        return self._part(F.pad(targets, (0, -targets.shape[1] % self.cp_group.size), value=IGNORED))

    def _padded(self, tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Pad tokens at the end to equal segments for all ranks: by causality, padding changes no earlier token."""
        if self.cp_group is None or not (padding := -tokens.shape[1] % self.cp_group.size):
            return tokens, cu_seqlens
        boundaries = None if cu_seqlens is None else torch.cat((cu_seqlens[:-1], cu_seqlens[-1:] + padding))
        return F.pad(tokens, (0, padding)), boundaries

    def _part(self, tokens: Tensor) -> Tensor:
        """Return this rank's segment of the sequences; without context parallelism, the whole sequences."""
        if self.cp_group is None:
            return tokens
        if tokens.shape[1] % self.cp_group.size:
            raise ContractError(
                "context parallelism splits a sequence into equal segments: expected a multiple of "
                f"{self.cp_group.size} tokens, got {tokens.shape[1]}"
            )
        return self.cp_group.part(tokens)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> ModelState:
        """Return the initial state; `max_length` is its capacity in tokens, so that a KV cache is allocated once."""
        return tuple(block.init_state(batch_size, max_length=max_length) for block in self.blocks)

    def resize_state(self, state: ModelState, max_length: int | None) -> ModelState:
        """Return the state with a capacity of `max_length` tokens, prefix included; None for no spare capacity.

        Raises:
            ContractError: the processed prefix is longer than `max_length`.
        """
        return tuple(block.resize_state(before, max_length) for block, before in zip(self.blocks, state, strict=True))

    def prefer(self, *paradigms: Paradigm, from_state: bool = False) -> tuple[Paradigm, ...]:
        """Return for each layer the first of these paradigms that it declares, or else any that it declares.

        With `from_state`, only paradigms that can start from a state count.
        """
        return tuple(block.mixer.traits.prefer(*paradigms, from_state=from_state) for block in self.blocks)

    def resolve_backends(self, activations: torch.dtype) -> None:
        """Choose the kernel backends of all layers for the device of the parameters and the dtype of the activations.

        Raises:
            SeqmixError: a backend that a layer names cannot run here.
        """
        for block, layer in self.distinct_blocks.items():
            try:
                block.resolve_backend(activations)
            except SeqmixError as error:
                raise SeqmixError(f"model.blocks.{layer}.mixer: {error}") from error

    @property
    def backends(self) -> dict[str, str]:
        """Kernel backend of each kind of block, for the kinds whose mixer has a choice of backends."""
        mixers = {name: block.mixer for name, block in zip(self.config.layers, self.blocks, strict=True)}
        op_and_probe = {name: mixer.kernels(torch.float32) for name, mixer in mixers.items()}
        return {name: describe_backends(pair[0], mixers[name].backends) for name, pair in op_and_probe.items() if pair}

    @property
    def has_auxiliary_loss(self) -> bool:
        """True if some parameters learn from auxiliary losses of their mixers alone, see `forward`."""
        return any(block.mixer.traits.auxiliary_loss for block in self.blocks)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.embedding.weight.device


def _require_ids(name: str, ids: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise a SeqmixError if `ids` is not a tensor of one of these integer dtypes; no value is read."""
    require_tensor(name, ids, "a tensor of integers [B T]")
    if ids.dtype not in dtypes:
        raise SeqmixError(f"{name} must be a tensor of integers [B T], got {ids.dtype}: pass {name}.long()")


def _unknown_argument(name: str) -> SeqmixError:
    """Return the error of an argument that `LanguageModel.forward` does not have."""
    remedy = nearest_hint(name, signature(LanguageModel.forward).parameters)
    if name == "labels":
        remedy = ": pass targets=, the next token of each token, which are not shifted again"
    return SeqmixError(f"a model has no argument {name!r}{remedy}")


def _build_all(config: ModelConfig) -> Iterator[Block]:
    """Yield the block of every layer; layers that share parameters get the same block."""
    shared: dict[str, Block] = {}
    first_blocks: dict[str, Block] = {}
    sources = config.kv_sources
    for index, name in enumerate(config.layers):
        block = shared.get(name) or _build(config, index)
        if config.blocks[name].shared:
            shared[name] = block
        if block.mixer.traits.value_residual:
            _accept_first_values(block, first_blocks.setdefault(block.mixer.kind, block), name)
        if sources[index] is not None:
            block.mixer.accept_shared_kv()
        yield block


def _accept_first_values(block: Block, first: Block, name: str) -> None:
    """Let a block mix in the values of the first one with a mixer of its kind."""
    mixer, first_mixer = block.mixer, first.mixer
    if mixer is first_mixer or mixer.takes_first_values:
        return
    if mixer.value_width != first_mixer.value_width:
        raise ContractError(
            f"model.blocks.{name}: the value residual of {mixer.kind} needs layers with values of one width, got "
            f"{first_mixer.value_width} in the first and {mixer.value_width} here"
        )
    mixer.accept_first_values()


def _accept_token_values(config: ModelConfig, blocks: Sequence[Block]) -> None:
    """Let the mixers of the layers with value embeddings take them."""
    chosen = config.value_embeddings
    if chosen is None:
        return
    taking = {blocks[layer] for layer in config.value_layers}
    for layer, (name, block) in enumerate(zip(config.layers, blocks, strict=True)):
        if layer not in config.value_layers and block in taking:
            raise ContractError(
                f"model.value_embeddings: block {name} is shared by layers with and without value embeddings: set "
                "every = 1, or shared = false"
            )
        if block in taking and not block.mixer.takes_token_values:
            try:
                block.mixer.accept_token_values(chosen.scale, chosen.gate_channels)
            except ContractError as error:
                raise ContractError(f"model.blocks.{name}, layer {layer}: {error}") from error


def _build(config: ModelConfig, index: int) -> Block:
    """Build the block of one layer."""
    name = config.layers[index]
    try:
        return Block(
            config.blocks[name],
            config.d_model,
            layer_idx=index,
            n_layers=config.n_layers,
            residual=config.residual,
            first_branch=config.first_branches[index],
        )
    except ContractError as error:
        raise ContractError(f"model.blocks.{name}: {error}") from error
    except (TypeError, RuntimeError) as error:
        reason, *_ = str(error).splitlines() or [""]
        if "overflow" not in reason.lower():
            raise
        raise ContractError(
            f"model.blocks.{name}: expected tensors below 2^63 bytes, got larger ones: reduce its heads or widths"
        ) from error
