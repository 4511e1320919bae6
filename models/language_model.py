"""The language model: embedding, layers, norm, output projection."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..blocks import Block
from ..mixers import ContractError, Paradigm
from ..ops.backends import described
from ..ops.context_parallel import Context
from .config import ModelConfig, NormalInit
from .loss import IGNORED, linear_cross_entropy, linear_predictions, token_losses
from .tokenizer import ByteTokenizer, Tokenizer

ModelState: TypeAlias = tuple[tuple[Any, ...], ...]
"""One opaque state a layer."""


class ModelOutput(NamedTuple):
    """What a model returns."""

    logits: Float[Tensor, "..."]
    """[B T vocab], or [M vocab] where `select` named M tokens."""
    state: ModelState | None
    """The state behind the last token; None unless wanted."""


class LanguageModel(nn.Module):
    """A causal language model whose layers may all be different."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        # a ModuleList does not say what it holds
        self.blocks = cast("Sequence[Block]", nn.ModuleList(_build(config, i) for i in range(config.n_layers)))
        self.norm = config.norm.build(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tokenizer: Tokenizer | None = ByteTokenizer()
        """Of the text that it is of: what generation reads and writes; None where its tokens stand for no text."""
        self.checkpoint_activations = False
        """Whether backward computes each block anew, so that only the inputs of blocks are kept for it."""
        self.context: Context | None = None
        """The ranks that `share` sequences."""
        self.tie()

    def tie(self) -> None:
        """Make the output projection the embedding's matrix, if so configured."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def share(self, context: Context | None) -> None:
        """Split every sequence over the ranks of a context, which all call the model with the same whole sequences.

        Each rank then computes its own segment: logits and losses are those of its tokens, states those of the whole.
        What a rank's gradients are of is the sum of all ranks' losses, and the sum of all ranks' gradients is that of
        the whole. None undoes it.
        """
        self.context = context
        for block in self.blocks:
            block.mixer.context = context

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter from torch's global generator, as `config.init` says."""
        for block in self.blocks:
            block.reset_parameters()
        self.norm.reset_parameters()
        std = self.config.d_model**-0.5
        matrices = [self.embedding.weight, self.head.weight]
        if isinstance(self.config.init, NormalInit):
            std = self.config.init.std
            matrices = [m.weight for m in self.modules() if isinstance(m, nn.Linear | nn.Embedding)]
        for matrix in matrices:
            nn.init.normal_(matrix, std=std)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: ModelState | None = None,
        *,
        paradigm: Paradigm | tuple[Paradigm, ...] | None = None,
        cu_seqlens: Int[Tensor, "N+1"] | None = None,
        return_state: bool = False,
        select: Int[Tensor, " M"] | None = None,
    ) -> ModelOutput:
        """Logits of the next token after each token of a segment.

        Args:
            tokens: the segment, [B T], T >= 1; whole on each of the ranks that `share` it, whose number divides T.
            state: what came before, from an earlier call or `init_state`; None means nothing.
            paradigm: how every layer computes it, or one a layer; each layer's configured default when None.
            cu_seqlens: borders of documents packed into one row; states then have a row a document.
            return_state: whether the state behind the segment is wanted.
            select: indexes into the B * T tokens (row by row): only their logits are computed.

        Raises:
            ContractError: a layer does not declare the paradigm or packing, or T cannot be shared.
        """
        x, after = self._hidden(tokens, state, paradigm, cu_seqlens, return_state)
        if select is not None:
            x = x.flatten(0, 1)[select]
        return ModelOutput(self.head(self.norm(x)), after)

    def loss(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        *,
        paradigm: Paradigm | tuple[Paradigm, ...] | None = None,
        cu_seqlens: Int[Tensor, "N+1"] | None = None,
    ) -> Float[Tensor, ""]:
        """The sum of the tokens' cross-entropies, in nats, without all logits in memory at once.

        Args:
            tokens: a segment with nothing before it, [B T], T >= 1.
            targets: what follows each token; `IGNORED` (-100) where nothing is to be predicted.
            paradigm: as in `forward`.
            cu_seqlens: as in `forward`.

        Raises:
            ContractError: a layer does not declare the paradigm or packing.
        """
        tokens, cu_seqlens = self._filled(tokens, cu_seqlens)
        x, _ = self._hidden(tokens, None, paradigm, cu_seqlens, False)
        return linear_cross_entropy(self.norm(x).flatten(0, 1), self.head.weight, self.own_targets(targets).flatten())

    def predictions(
        self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, ""], Int[Tensor, " M"]]:
        """The loss as above, and the most probable token at each of the M places that are asked, row by row.

        Nothing is computed of the logits of other places.

        Args:
            tokens: a segment with nothing before it, [B T], T >= 1.
            targets: what follows each token; `IGNORED` (-100) where nothing is asked. On ranks that `share` sequences,
                what comes back is of each one's `own_targets`.
        """
        tokens, _ = self._filled(tokens, None)
        x, _ = self._hidden(tokens, None, None, None, False)
        targets = self.own_targets(targets)
        asked = targets != IGNORED
        return linear_predictions(self.norm(x[asked]), self.head.weight, targets[asked])

    @torch.no_grad()
    def token_losses(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        *,
        paradigm: Paradigm | tuple[Paradigm, ...] | None = None,
        cu_seqlens: Int[Tensor, "N+1"] | None = None,
    ) -> Float[Tensor, "B T"]:
        """The loss as above token by token, 0 where nothing is to be predicted; without gradients.

        Raises:
            ContractError: a layer does not declare the paradigm or packing.
        """
        tokens, cu_seqlens = self._filled(tokens, cu_seqlens)
        x, _ = self._hidden(tokens, None, paradigm, cu_seqlens, False)
        targets = self.own_targets(targets)
        return token_losses(self.norm(x).flatten(0, 1), self.head.weight, targets.flatten()).view(targets.shape)

    def loss_and_state(
        self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], state: ModelState
    ) -> tuple[Float[Tensor, ""], ModelState]:
        """The loss as above of a segment behind a state, and the state behind it, both with gradients.

        Args:
            tokens: the segment, [B T], T >= 1.
            targets: what follows each token; `IGNORED` (-100) where nothing is to be predicted.
            state: what came before, from an earlier call or `init_state`.
        """
        x, after = self._hidden(tokens, state, None, None, True)
        targets = self.own_targets(targets).flatten()
        return linear_cross_entropy(self.norm(x).flatten(0, 1), self.head.weight, targets), after or ()

    def own_targets(self, targets: Int[Tensor, "B T"]) -> Int[Tensor, "B _"]:
        """Those of this rank's tokens, where ranks `share` sequences; nothing is asked behind the last token."""
        if self.context is None:
            return targets
        return self._part(F.pad(targets, (0, -targets.shape[1] % self.context.size), value=IGNORED))

    def _filled(self, tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens in equal segments for all ranks: what comes behind changes nothing before it."""
        if self.context is None or not (lacking := -tokens.shape[1] % self.context.size):
            return tokens, cu_seqlens
        borders = None if cu_seqlens is None else torch.cat((cu_seqlens[:-1], cu_seqlens[-1:] + lacking))
        return F.pad(tokens, (0, lacking)), borders

    def _part(self, tokens: Tensor) -> Tensor:
        """This rank's segment of sequences, or all of it."""
        if self.context is None:
            return tokens
        if tokens.shape[1] % self.context.size:
            raise ContractError(
                f"{self.context.size} processes share a sequence in equal segments, and {tokens.shape[1]} tokens have "
                "none: give a multiple"
            )
        return self.context.part(tokens)

    def _hidden(
        self,
        tokens: Tensor,
        state: ModelState | None,
        paradigm: Paradigm | tuple[Paradigm, ...] | None,
        cu_seqlens: Tensor | None,
        return_state: bool,
    ) -> tuple[Float[Tensor, "B T D"], ModelState | None]:
        """The residual stream behind the last block, and the state."""
        for what, given in (("state", state), ("paradigms", paradigm)):
            if isinstance(given, tuple) and len(given) != len(self.blocks):
                raise ContractError(f"{what} has {len(given)} entries, and the model has {len(self.blocks)} layers")
        x = self.dropout(self.embedding(self._part(tokens)))
        states = []
        for i, block in enumerate(self.blocks):
            call = partial(
                block,
                paradigm=paradigm[i] if isinstance(paradigm, tuple) else paradigm,
                cu_seqlens=cu_seqlens,
                return_state=return_state,
            )
            before = None if state is None else state[i]
            if self.checkpoint_activations and torch.is_grad_enabled():
                # ranks send each other what they do also where one needs nothing more of a block
                with set_checkpoint_early_stop(self.context is None):
                    x, after = checkpoint(call, x, before, use_reentrant=False)
            else:
                x, after = call(x, before)
            states.append(after)
        return x, tuple(states) if return_state else None

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> ModelState:
        """The state of nothing read; `max_length` bounds the tokens to come, so that caches are allocated once."""
        return tuple(block.mixer.init_state(batch_size, max_length=max_length) for block in self.blocks)

    def with_room(self, state: ModelState, max_length: int | None) -> ModelState:
        """The same state with room for `max_length` tokens in all, or none to spare where that is None.

        Raises:
            ContractError: more tokens were read already.
        """
        return tuple(
            block.mixer.with_room(before, max_length) for block, before in zip(self.blocks, state, strict=True)
        )

    def prefer(self, *paradigms: Paradigm) -> tuple[Paradigm, ...]:
        """For each layer, the first of these paradigms that it declares."""
        declared = [block.mixer.traits.paradigms for block in self.blocks]
        return tuple(next(p for p in (*paradigms, *Paradigm) if p in layer) for layer in declared)

    @property
    def backends(self) -> dict[str, str]:
        """Whose kernels compute each kind of block whose mixer has a choice."""
        mixers = {name: block.mixer for name, block in zip(self.config.layers, self.blocks, strict=True)}
        asked = {name: mixer.kernels(torch.float32) for name, mixer in mixers.items()}
        return {name: described(kernels[0], mixers[name].backends) for name, kernels in asked.items() if kernels}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embedding.weight.device


def _build(config: ModelConfig, index: int) -> Block:
    name = config.layers[index]
    try:
        return config.blocks[name].build(config.d_model, layer_idx=index, n_layers=config.n_layers)
    except ContractError as error:
        raise ContractError(f"model.blocks.{name}: {error}") from error
