"""The language model: embedding, layers, norm, output projection."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..blocks import Block, Dropout
from ..blocks.ffn.moe import ExpertLinear
from ..mixers import ContractError, Paradigm
from ..ops.kernels.selection import described
from ..ops.runtime.context_parallel import ContextParallel
from ..ops.runtime.memo import Memo
from ..registry import SeqmixError
from .config import ModelConfig, NormalInit
from .loss import IGNORED, Reduction, capped, linear_cross_entropy, linear_predictions
from .onednn_linear import onednn_linear
from .readout import LastVector
from .tokenizer import ByteTokenizer, Tokenizer

Checkpointing: TypeAlias = bool | Literal["matmuls"]
"""Activation checkpointing: none, of whole blocks, or all but the products of matrices with parameters."""
MATMULS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, onednn_linear._opoverload]
"""What those are; products of attention's scores and within chunks are batched, and as many as pairs of tokens."""
_keep_matmuls = partial(create_selective_checkpoint_contexts, MATMULS)
ModelState: TypeAlias = tuple[tuple[Any, ...], ...]
"""One opaque state per layer."""


class ModelOutput(NamedTuple):
    """What a model returns."""

    logits: Float[Tensor, "..."] | None
    """[B T vocab]; [M vocab] where `select` names M tokens; None where `targets` are given and no `select`."""
    loss: Float[Tensor, "..."] | None = None
    """The cross-entropy in nats, reduced as asked; None without `targets`."""
    state: ModelState | None = None
    """The state after the last token; None unless `return_state`."""
    predictions: Int[Tensor, " P"] | None = None
    """The most probable token at each of the P places with a target, row by row; None unless `return_predictions`."""


class LanguageModel(nn.Module):
    """A causal language model whose layers may all be different."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.embedding_norm = None if config.embedding_norm is None else config.embedding_norm.build(config.d_model)
        self.dropout = Dropout(config.dropout)
        # a ModuleList has no type of its elements
        self.blocks = cast("Sequence[Block]", nn.ModuleList(_build_all(config)))
        self.readout = None if config.readout == "each" else LastVector(config.d_model, config.norm)
        self.norm = config.norm.build(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tokenizer: Tokenizer | None = ByteTokenizer()
        """The tokenizer of generation; None where the tokens are not text."""
        self.activation_checkpointing: Checkpointing = False
        """Whether the backward pass recomputes the activations of each block: forward saves only the blocks' inputs,
        and with `matmuls` the results of linear layers."""
        self.cp_group: ContextParallel | None = None
        """The ranks that share sequences (context parallelism), by `set_cp_group`."""
        self.tie()

    def tie(self) -> None:
        """Make the output projection the embedding's matrix, if so configured."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    @property
    def distinct_blocks(self) -> dict[Block, str]:
        """The blocks, one that several layers share once, and their names in the configuration."""
        return dict(zip(self.blocks, self.config.layers, strict=True))

    def set_cp_group(self, cp_group: ContextParallel | None) -> None:
        """Split every sequence over the ranks of a group, which all call the model with the same whole sequences.

        Each rank then computes its own segment: logits and losses are those of its tokens, states those of the whole.
        A rank's gradients are those of the sum of all ranks' losses, and the ranks' gradients add up to those of the
        whole. None undoes it.
        """
        self.cp_group = cp_group
        for block in self.blocks:
            block.mixer.cp_group = cp_group

    def reset_parameters(self) -> None:
        """Initialise every parameter from torch's global generator, as `config.init` says."""
        for block in self.distinct_blocks:
            block.reset_parameters()
        self.reset_rest()

    @torch.no_grad()
    def reset_rest(self, assign: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Initialise all but the blocks; `assign` copies a full tensor into a parameter, which may be sharded."""
        for module in (self.embedding_norm, self.readout, self.norm):
            if module is not None:
                module.reset_parameters()
        std = self.config.d_model**-0.5
        matrices = [self.embedding.weight, self.head.weight]
        if isinstance(self.config.init, NormalInit):
            std = self.config.init.std
            matrices = [m.weight for m in self.modules() if isinstance(m, nn.Linear | nn.Embedding | ExpertLinear)]
        for matrix in matrices:
            assign(matrix, torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device).normal_(std=std))

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
        memo: Memo | None = None,
    ) -> ModelOutput:
        """Logits of the next token after each token of a segment, or with `targets` their loss.

        The loss and the predictions never hold all logits in memory.

        Args:
            tokens: the segment, [B T], T >= 1; whole on each of the ranks that share it.
            state: what came before, from an earlier call or `init_state`; None means nothing.
            targets: the next token of each token; `IGNORED` (-100) where none is predicted.
            reduction: of the loss, as in F.cross_entropy: "mean" over the targets (0 if there are none), "sum", or
                "none" for one loss per token, [B T], 0 where none is predicted.
            paradigm: how every layer computes it, or one per layer; each layer's configured default when None.
            cu_seqlens: boundaries of documents packed into one row; states then have one row per document.
            return_state: whether the state after the segment is wanted.
            return_predictions: whether the most probable tokens at the places with a target are wanted.
            select: indices into the B * T tokens (row by row): only their logits are computed.
            donate_state: True if the next state may be written over `state`, which the caller does not need again.
            memo: constants of earlier calls of this model, whose parameters have not changed since; a decoder's.

        On the ranks of a `cp_group`, each rank returns the results of its own tokens (`local_targets`), and the mean is
        over the targets of all ranks: their losses add up to that of the whole sequence. The number of ranks divides T,
        except with targets and without a final state: then the end is padded.

        Raises:
            ContractError: a layer does not declare the paradigm or packing, or T cannot be shared.
            SeqmixError: the reduction is unknown, or the targets have another shape than the tokens.
        """
        if targets is not None and targets.shape != tokens.shape:
            shapes = f"{list(targets.shape)}, and tokens of {list(tokens.shape)}"
            raise SeqmixError(f"each token has a target, and the model was given targets of shape {shapes}")
        if targets is not None and not return_state:
            tokens, cu_seqlens = self._padded(tokens, cu_seqlens)
        x, after = self.run_blocks(
            self.embed(tokens), state, paradigm, cu_seqlens, return_state, donate_state=donate_state, memo=memo
        )
        logits = loss = predictions = None
        if targets is None or select is not None:
            logits = self.logits(x if select is None else x.flatten(0, 1)[select])
        if targets is not None:
            loss, predictions = self._loss(x, targets, reduction, return_predictions)
        return ModelOutput(logits, loss, after, predictions)

    def embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B _ D"]:
        """The residual stream before the first block, of this rank's tokens."""
        x = self.embedding(self._part(tokens))
        scale = self.config.embedding_scale
        x = x if scale == 1 else scale * x
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        return self.dropout(x) if self.dropout.p else x

    def logits(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch vocab"]:
        """The logits of the residual stream after the last block."""
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
        memo: Memo | None = None,
    ) -> tuple[Float[Tensor, "B T D"], ModelState | None]:
        """The residual stream after the last block, before the last norm, and the state; arguments as in `forward`.

        x is what `embed` gives, or embeddings of another origin.

        Raises:
            ContractError: a layer does not declare the paradigm or packing, or there is not one state per layer.
        """
        states = (None,) * len(self.blocks) if state is None else state
        paradigms = paradigm if isinstance(paradigm, tuple) else (paradigm,) * len(self.blocks)
        for what, given in (("state", states), ("paradigms", paradigms)):
            if len(given) != len(self.blocks):
                raise ContractError(f"{what} has {len(given)} entries, and the model has {len(self.blocks)} layers")
        after = []
        first_values = None
        eager = not torch.compiler.is_compiling() and not torch.is_grad_enabled()
        memo = (Memo() if memo is None else memo).next_pass() if eager else None
        for block, before, how in zip(self.blocks, states, paradigms, strict=True):
            call = partial(
                block,
                paradigm=how,
                cu_seqlens=cu_seqlens,
                return_state=return_state,
                donate_state=donate_state,
                memo=memo,
            )
            mixer = block.mixer  # each read of a part is a call
            if first_values is None and mixer.traits.value_residual:
                call = partial(call, return_values=True)
            if self.activation_checkpointing and torch.is_grad_enabled():
                # without early stop: every rank has to run all the communication of a block
                kept = {"context_fn": _keep_matmuls} if self.activation_checkpointing == "matmuls" else {}
                call = partial(checkpoint, call, use_reentrant=False, early_stop=self.cp_group is None, **kept)
            x, final, *values = call(x, before, first_values if mixer.takes_first_values else None)
            first_values = values[0] if values else first_values
            after.append(final)
        if self.readout is not None:
            if state is not None or return_state or cu_seqlens is not None or self.cp_group is not None:
                raise ContractError("model.readout last is of one whole sequence: without states, packing and sharing")
            x = self.readout(x)
        return x, tuple(after) if return_state else None

    def _loss(
        self, x: Float[Tensor, "B T D"], targets: Tensor, reduction: Reduction, return_predictions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of the residual stream after the last block, and the predictions."""
        own = self.local_targets(targets)
        predictions = None
        softcap = self.config.logit_softcap
        reduce = "sum" if reduction == "mean" else reduction
        if return_predictions:  # nothing is computed at the other places
            asked = own != IGNORED
            found, predictions = linear_predictions(self.norm(x[asked]), self.head.weight, own[asked], reduce, softcap)
            loss = found.new_zeros(own.shape).masked_scatter(asked, found) if reduction == "none" else found
        else:
            loss = linear_cross_entropy(self.norm(x).flatten(0, 1), self.head.weight, own.flatten(), reduce, softcap)
            loss = loss.view(own.shape) if reduction == "none" else loss
        if reduction == "mean":
            loss = loss / (targets != IGNORED).sum().clamp(min=1)
        return loss, predictions

    def local_targets(self, targets: Int[Tensor, "B T"]) -> Int[Tensor, "B _"]:
        """The targets of this rank's tokens under context parallelism; padded tokens have none."""
        if self.cp_group is None:
            return targets
        return self._part(F.pad(targets, (0, -targets.shape[1] % self.cp_group.size), value=IGNORED))

    def _padded(self, tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens padded to equal segments for all ranks: by causality, padding changes no earlier token."""
        if self.cp_group is None or not (lacking := -tokens.shape[1] % self.cp_group.size):
            return tokens, cu_seqlens
        boundaries = None if cu_seqlens is None else torch.cat((cu_seqlens[:-1], cu_seqlens[-1:] + lacking))
        return F.pad(tokens, (0, lacking)), boundaries

    def _part(self, tokens: Tensor) -> Tensor:
        """This rank's segment of sequences, or all of it."""
        if self.cp_group is None:
            return tokens
        if tokens.shape[1] % self.cp_group.size:
            raise ContractError(
                f"{self.cp_group.size} processes share a sequence in equal segments, and {tokens.shape[1]} tokens are "
                "not a multiple"
            )
        return self.cp_group.part(tokens)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> ModelState:
        """The initial state; `max_length` is its capacity in tokens, so that a KV cache is allocated once."""
        return tuple(block.mixer.init_state(batch_size, max_length=max_length) for block in self.blocks)

    def resize_state(self, state: ModelState, max_length: int | None) -> ModelState:
        """The same state with a capacity of `max_length` tokens; without spare room for None.

        Raises:
            ContractError: the processed prefix is longer.
        """
        return tuple(
            block.mixer.resize_state(before, max_length) for block, before in zip(self.blocks, state, strict=True)
        )

    def prefer(self, *paradigms: Paradigm, from_state: bool = False) -> tuple[Paradigm, ...]:
        """For each layer, the first of these paradigms that it declares, and `from_state` one that takes a state."""
        return tuple(block.mixer.traits.prefer(*paradigms, from_state=from_state) for block in self.blocks)

    def resolve_backends(self, activations: torch.dtype) -> None:
        """Choose the kernel backends of all layers, for the parameters' device and activations of this dtype.

        Raises:
            SeqmixError: a backend that a layer names cannot run here.
        """
        for block, layer in self.distinct_blocks.items():
            try:
                block.mixer.resolve_backend(activations)
            except SeqmixError as error:
                raise SeqmixError(f"model.blocks.{layer}.mixer: {error}") from error

    @property
    def backends(self) -> dict[str, str]:
        """The kernel backend of each kind of block whose mixer has a choice."""
        mixers = {name: block.mixer for name, block in zip(self.config.layers, self.blocks, strict=True)}
        asked = {name: mixer.kernels(torch.float32) for name, mixer in mixers.items()}
        return {name: described(kernels[0], mixers[name].backends) for name, kernels in asked.items() if kernels}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embedding.weight.device


def _build_all(config: ModelConfig) -> Iterator[Block]:
    """The block of every layer; those that share their parameters are one."""
    shared: dict[str, Block] = {}
    first: Block | None = None
    for index, name in enumerate(config.layers):
        block = shared.get(name) or _build(config, index)
        if config.blocks[name].shared:
            shared[name] = block
        if block.mixer.traits.value_residual:
            first = first or block
            if block is not first and not block.mixer.takes_first_values:
                block.mixer.accept_first_values()
        yield block


def _build(config: ModelConfig, index: int) -> Block:
    name = config.layers[index]
    try:
        return Block(config.blocks[name], config.d_model, layer_idx=index, n_layers=config.n_layers)
    except ContractError as error:
        raise ContractError(f"model.blocks.{name}: {error}") from error
    except (TypeError, RuntimeError) as error:
        reason, *_ = str(error).splitlines() or [""]
        if "overflow" not in reason.lower():
            raise
        raise ContractError(
            f"model.blocks.{name}: expected tensors below 2^63 bytes, got larger ones; lower its heads and widths"
        ) from error
