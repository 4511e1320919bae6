"""Quantised weights of an exported graph, by ONNX Runtime's own tools, and the loss that they cost."""

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import ModelProto
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from ...data import Batch
from ...data.tasks.text import Text
from ...models import IGNORED
from ...training.length_eval import BATCH_TOKENS
from .session import OnnxModel
from .silence import silenced

BLOCK = 32
"""Number of inputs that share a scale and an offset in int4 weights."""
TOKENS = 16_384
"""Approximate number of tokens of the validation split that are measured."""


def quantize(graph: ModelProto, weights: str) -> ModelProto:
    """Return the graph with quantised matrices: those that tokens are multiplied with, in float32.

    Args:
        graph: the graph, which may be changed.
        weights: "int8", with one scale per output and inputs that are quantised as they come, or "int4", with a scale
            and an offset for every `BLOCK` inputs.
    """
    float32 = {x.name for x in graph.graph.initializer if x.data_type == onnx.TensorProto.FLOAT}
    others = [node.name for node in graph.graph.node if node.op_type == "MatMul" and node.input[1] not in float32]
    if weights == "int4":
        # accuracy level 4: products with inputs in int8, the fastest on a CPU
        quantizer: Any = MatMulNBitsQuantizer(
            graph, bits=4, block_size=BLOCK, is_symmetric=False, accuracy_level=4, nodes_to_exclude=others
        )
        with silenced():
            quantizer.process()
        return quantizer.model.model
    with tempfile.TemporaryDirectory() as folder, silenced():
        file = Path(folder) / "quantized.onnx"
        quantize_dynamic(
            graph,
            file,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=others,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return onnx.load(file)


@torch.no_grad()
def validation_loss(model: OnnxModel, source: Text) -> tuple[float, int]:
    """Return the mean loss in nats per token, and the number of tokens; documents are apart, as in training."""
    length = source.config.sequence_length
    rows = max(1, BATCH_TOKENS // length)
    total = 0.0
    count = 0
    for example in source.evaluation_batches(rows, max(1, TOKENS // (rows * length)), length):
        inputs, targets, cu_seqlens = source.packed(Batch(*example.batch))
        bounds = [0, inputs.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        for start, stop in pairwise(bounds):
            logits, _ = model(inputs[:, start:stop].numpy(), model.init_state(len(inputs)))
            part = targets[:, start:stop].reshape(-1)
            losses = F.cross_entropy(
                torch.from_numpy(logits).flatten(0, 1), part, reduction="sum", ignore_index=IGNORED
            )
            total += losses.item()
            count += int((part != IGNORED).sum())
    return total / max(count, 1), count
