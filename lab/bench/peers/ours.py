"""The seqmix model, built from its configuration, and the same layers written by hand."""

from typing import Any

import torch
from torch import Tensor, nn

from ....mixers import Paradigm, SequenceMixer
from ....mixers.base.state import to_dict
from ....mixers.parts import ShortConvolution
from ....models import build_meta, build_model, compile_blocks
from ....models.compiling import rows_as_sums
from ....models.cpu_linear import Linear
from ....models.decoding import Decoder
from ....models.prefill import compiled_prefill
from ....models.quantization import prepare_quantized, quantize_model, weights_of
from ....ops.kernels.selection import AUTO_ON_CPU, fallback_of
from ....ops.runtime.memo import Memo
from .by_hand import HandWritten, unsupported_reason
from .peer import ALL, Peer, Size, last_of_rows


class Seqmix(Peer):
    """seqmix as `seqmix train` and `seqmix generate` run it; on a GPU, a decoding step is captured as a CUDA graph."""

    name = "seqmix"
    layers_at = "blocks"
    roles = compiled_roles = ALL
    keeps_freed_memory = True
    compiled_steps = compiled_prefills = False

    def build(self) -> nn.Module:
        return build_model(self.size.config, device=self.device, dtype=self.dtype)

    def recompute_activations(self) -> None:
        self.module.activation_checkpointing = True

    def compile(self, role: str) -> None:
        if role == "decode":
            self.compiled_steps = True
        elif role == "prefill" and all(block.mixer.traits.state == "constant" for block in self.module.blocks):
            self.compiled_prefills = True
        else:
            compile_blocks(self.module)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.module(tokens).logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.module(tokens, targets=targets).loss

    def read(self, tokens: Tensor) -> Any:
        batch, length = tokens.shape
        state = self.module.init_state(batch, max_length=2 * length)
        if self.compiled_prefills:
            _, after = compiled_prefill(self.module)(self.module, tokens, state, None, last_of_rows(tokens))
            return self._decoder(after)
        paradigm = self.module.prefer(Paradigm.CHUNKWISE, Paradigm.PARALLEL)
        output = self.module(tokens, state, paradigm=paradigm, return_state=True, select=last_of_rows(tokens))
        return self._decoder(output.state)

    def state_after(self, context: int, batch: int, room: int) -> Any:
        decoder = self._decoder(self.module.init_state(batch, max_length=context + room))
        for leaf in self.tensors(decoder):
            leaf.fill_(context) if not leaf.is_floating_point() else leaf.normal_()
        return decoder

    def _decoder(self, state: Any) -> Decoder:
        return Decoder(self.module, state, compiled=self.compiled_steps)

    def renew(self, state: Any, context: int) -> Any:
        for leaf in self.tensors(state):
            if not leaf.is_floating_point():
                leaf.fill_(context)
        return state

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return state.step(tokens), state

    def tensors(self, state: Any) -> list[Tensor]:
        captured = state._captured  # a CUDA graph holds the state in buffers of its own
        return list(to_dict(state.state if captured is None else captured.held.state).values())

    def moved_bytes(self, state: Any) -> int:
        layers = zip(self.module.blocks, state.state, strict=True)
        caches = [layer for block, layer in layers if block.mixer.traits.state == "growing"]
        return super().moved_bytes(state) - sum(x.nbytes for layer in caches for x in to_dict(layer).values())


class Reference(Seqmix):
    """seqmix with its reference kernels in plain torch, instead of the native kernels that it has for a CPU."""

    name = "reference"
    roles = frozenset({"train", "prefill", "decode"})
    compiled_roles = frozenset()

    @classmethod
    def unavailable_reason(cls, size: Size, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "seqmix has native kernels for a CPU only"
        modules = list(build_meta(size.config).modules())
        mixers = [x for x in modules if isinstance(x, SequenceMixer)]
        ops = [op_and_probe[0] for x in mixers if (op_and_probe := x.kernels(torch.float32))]
        convolutions = [x for x in modules if isinstance(x, ShortConvolution)]
        return None if convolutions or set(ops) & set(AUTO_ON_CPU) else "seqmix has no native kernels for this model"

    def build(self) -> nn.Module:
        model = build_model(self.size.config, device=self.device, dtype=self.dtype)
        for module in model.modules():
            if isinstance(module, SequenceMixer):
                op_and_probe = module.kernels(self.dtype)
                module.backend = "reference" if op_and_probe is None else fallback_of(op_and_probe[0])
            elif isinstance(module, Linear):
                module.is_native = False
        model.resolve_backends(self.dtype)
        return model


class Int8(Seqmix):
    """seqmix with weights of 8 bits."""

    name = "seqmix-int8"
    roles = compiled_roles = frozenset({"decode"})
    weights = "int8"

    @classmethod
    def unavailable_reason(cls, size: Size, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "its weights are for a CPU"
        prepare_quantized(model := build_meta(size.config), cls.weights)
        return "the model has no matrices that are large enough" if weights_of(model) is None else None

    def build(self) -> nn.Module:
        return quantize_model(build_model(self.size.config), self.weights, on_note=lambda _: None)

    @property
    def parameters(self) -> int:
        return self.size.parameters

    def moved_bytes(self, state: Any) -> int:
        weights = (*self.module.parameters(), *self.module.buffers())
        stored = sum(x.nbytes for x in weights) - self.module.embedding.weight.nbytes
        floats = (self.parameters - self.module.embedding.weight.numel()) * self.dtype.itemsize
        return super().moved_bytes(state) - floats + stored


class Int4(Int8):
    """seqmix with weights of 4 bits."""

    name = "seqmix-int4"
    weights = "int4"


class ByHand(Peer):
    """RetNet with layers written by hand."""

    name = "by-hand"
    layers_at = "layers"
    roles = compiled_roles = ALL
    keeps_freed_memory = True
    compiled_steps = False

    @classmethod
    def unavailable_reason(cls, size: Size, device: torch.device) -> str | None:  # noqa: ARG003
        return unsupported_reason(size.config)

    def build(self) -> nn.Module:
        self.memo = Memo()  # kept between steps, as `Decoder` does
        return HandWritten(build_model(self.size.config, device=self.device, dtype=self.dtype))

    def recompute_activations(self) -> None:
        self.module.activation_checkpointing = True

    def compile(self, role: str) -> None:
        if role == "decode":
            self.module.compile(fullgraph=True, backend=rows_as_sums)
            self.compiled_steps = True
            return
        for module in self.layers:
            module.compile(fullgraph=True)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.module(tokens)[0]

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.module.loss(tokens, targets)

    def read(self, tokens: Tensor) -> Any:
        return self.module(tokens, self.module.init_state(len(tokens)), select=last_of_rows(tokens))[1]

    def state_after(self, context: int, batch: int, room: int) -> Any:  # noqa: ARG002
        state = self.module.init_state(batch)
        return [(memory.normal_(), recent, position.fill_(context)) for memory, recent, position in state]

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        memo = None if self.compiled_steps else self.memo
        logits, after = self.module(tokens[:, None], state, decode=True, memo=memo)
        return logits[:, 0], after
