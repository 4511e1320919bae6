"""Decoding by llama.cpp, with the package xllamacpp: a random Llama of the size of the seqmix model, in its formats.

The package runs llama.cpp's server in this process, on the loopback interface, until the model is released. A call
returns the tokens of a request, whose prompt is in the server's cache.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from .benchmark import Implementation, PreparedCall, Settings, Skip
from .peers import Size
from .peers.peer import install_hint
from .timing import TimedCall

FORMATS = {"F32": "llama.cpp-f32", "Q8_0": "llama.cpp-q8_0", "Q4_0": "llama.cpp-q4_0"}
"""Names of the implementations, by the format of the weights."""
CACHE_BYTES = 2
"""Bytes of a number in the KV cache, which llama.cpp keeps in float16."""


class LlamaCpp(Implementation):
    """Greedy decoding of one sequence by llama.cpp.

    Args:
        settings: settings of the benchmark.
        size: the size that the Llama is to have.
        weights: format of the weights, a key of `FORMATS`.
        steps: tokens that a call generates.
    """

    def __init__(self, settings: Settings, size: Size, weights: str, steps: int) -> None:
        self.settings = settings
        self.size = size
        self.weights = weights
        self.steps = steps
        self.name = FORMATS[weights]
        self.server: Any = None
        self.file_bytes = 0

    def unavailable_reason(self) -> str | None:
        if self.settings.device.type != "cpu":
            return "it is measured on a CPU only"
        if self.settings.batch != 1:
            return "it is measured with one sequence only"
        if self.size.config.d_model % 32:
            return "its formats need a width that is a multiple of 32"
        return install_hint("xllamacpp", "xllamacpp") or install_hint("gguf", "gguf")

    def prepared_call(self, length: int) -> PreparedCall:
        if reason := self.unavailable_reason():
            raise Skip(reason)
        config = self.size.config
        self._start_server(length + 2 * self.steps)
        prompt = np.random.default_rng(0).integers(config.vocab_size, size=length).tolist()
        request = {"prompt": prompt, "n_predict": self.steps, "temperature": 0.0, "ignore_eos": True}

        def run() -> None:
            answer = self.server.handle_completions(request)
            if not isinstance(answer, dict) or answer["usage"]["completion_tokens"] != self.steps:
                raise RuntimeError(f"llama.cpp was to generate {self.steps} tokens, and answered {answer!r:.200}")

        run()  # processes the prompt; later calls find it in the cache
        state_bytes = 2 * config.n_layers * length * config.d_model * CACHE_BYTES
        embedding = self.file_bytes * config.vocab_size * config.d_model // self.parameters
        return PreparedCall(
            call=TimedCall(run, run, units=self.steps),
            tokens=1,
            parameters=self.parameters,
            state_bytes=state_bytes,
            moved_bytes=self.file_bytes - embedding + state_bytes,
        )

    def release(self) -> None:
        self.server = None

    @property
    def parameters(self) -> int:
        """Number of parameters of the Llama."""
        return sum(int(np.prod(shape)) for _, shape in self._shapes())

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and the shape of every tensor."""
        config = self.size.config
        width, hidden = config.d_model, -(-self.size.hidden(4, 3) // 32) * 32
        yield from (("token_embd", (config.vocab_size, width)), ("output", (config.vocab_size, width)))
        yield "output_norm", (width,)
        for layer in range(config.n_layers):
            yield from ((f"blk.{layer}.{name}", (width,)) for name in ("attn_norm", "ffn_norm"))
            names = ("attn_q", "attn_k", "attn_v", "attn_output")
            yield from ((f"blk.{layer}.{name}", (width, width)) for name in names)
            yield from ((f"blk.{layer}.{name}", (hidden, width)) for name in ("ffn_gate", "ffn_up"))
            yield f"blk.{layer}.ffn_down", (width, hidden)

    def _start_server(self, capacity: int) -> None:
        """Start a server with random weights and room for `capacity` tokens."""
        import xllamacpp  # type: ignore[import-not-found]

        threads = torch.get_num_threads()
        params = xllamacpp.CommonParams()
        params.n_ctx = capacity
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity = 0
        with TemporaryDirectory() as folder:  # the server reads it when it starts
            file = Path(folder) / "llama.gguf"
            self._write(file)
            self.file_bytes = file.stat().st_size
            params.model.path = str(file)
            self.server = xllamacpp.Server(params)

    def _write(self, file: Path) -> None:
        """Write a Llama with random weights, and a vocabulary of made-up tokens."""
        from gguf import GGMLQuantizationType, GGUFWriter  # type: ignore[import-not-found]
        from gguf.quants import quantize  # type: ignore[import-not-found]

        config = self.size.config
        kind = GGMLQuantizationType[self.weights]
        random = np.random.default_rng(0)
        shapes = dict(self._shapes())
        writer = GGUFWriter(file, "llama")
        writer.add_context_length(2**20)
        writer.add_embedding_length(config.d_model)
        writer.add_block_count(config.n_layers)
        writer.add_feed_forward_length(shapes["blk.0.ffn_up"][0])
        writer.add_head_count(self.size.n_heads)
        writer.add_head_count_kv(self.size.n_heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(config.d_model // self.size.n_heads)
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])
        writer.add_token_types([1] * config.vocab_size)
        writer.add_token_merges(["t 0"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        for name, shape in shapes.items():
            values = random.standard_normal(shape, dtype=np.float32)
            if len(shape) == 1:
                writer.add_tensor(f"{name}.weight", values)
            else:
                writer.add_tensor(f"{name}.weight", quantize(0.02 * values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
