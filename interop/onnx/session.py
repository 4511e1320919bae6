"""Running an exported file with ONNX Runtime."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NotImplemented,
    RuntimeException,
)
from pydantic import ValidationError

from ...models import ByteTokenizer, LanguageModel, SubwordTokenizer, Tokenizer
from ...registry import DataError, SeqmixError, read_bytes
from .metadata import FORMAT, METADATA_KEY, Metadata, is_intact

State = Mapping[str, np.ndarray]
"""Tensors of a state, by the names of the graph's inputs."""
_ERRORS = (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NotImplemented, RuntimeException)
"""Errors of ONNX Runtime."""
TOLERANCE = 1e-3
"""Largest difference between logits of the graph and of the model, relative to the largest logit."""


class OnnxModel:
    """A model in an ONNX file, with a state that is passed from call to call."""

    def __init__(self, session: onnxruntime.InferenceSession, name: str) -> None:
        """Wrap a session.

        Args:
            session: the session of an exported graph.
            name: the name of the file in messages.

        Raises:
            SeqmixError: the file was not written by `seqmix export`, by a newer version, or its metadata is damaged.
        """
        self._session = session
        self._name = name
        try:
            self.metadata: dict[str, Any] = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
            version = self.metadata["format"]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{name} was not written by `seqmix export --to onnx`: it has no such metadata") from error
        if version != FORMAT:
            raise DataError(
                f"{name} has format {version!r:.40}, expected {FORMAT}: it is from another version of seqmix"
            )
        try:
            Metadata.model_validate(self.metadata)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise DataError(f"{name} has invalid metadata: {place}: {first['msg']}; export the run again") from error
        self._outputs = ["logits", *(f"new_{entry['name']}" for entry in self.metadata["states"])]

    @classmethod
    def load(cls, file: Path) -> "OnnxModel":
        """Open a file.

        Raises:
            SeqmixError: it cannot be read, is damaged, or was not written by `seqmix export`.
        """
        try:
            content = read_bytes(file)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        if not is_intact(content):
            raise DataError(f"{file} is damaged: its checksum does not match; export the run again")
        try:
            return cls(_session(content), str(file))
        except _ERRORS as error:
            reason = _first_line(error)
            raise DataError(f"{file} is not an ONNX file that can run here: {reason}; export the run again") from error

    @classmethod
    def from_bytes(cls, content: bytes) -> "OnnxModel":
        """Open the content of a file."""
        return cls(_session(content), "the graph")

    def init_state(self, batch_size: int) -> State:
        """Return the state before the first token.

        Raises:
            DataError: the file has initial values that do not fit the shapes of the state.
        """
        sizes: dict[Any, int] = {"batch": batch_size, "past": 0}
        state = {}
        for entry in self.metadata["states"]:
            shape: list[int] = [size if isinstance(size, int) else sizes[size] for size in entry["shape"]]
            try:
                initial = np.array(entry["initial"]).astype(entry["dtype"])
                state[entry["name"]] = np.broadcast_to(initial, shape).copy()
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                reason = f"the initial values of {entry['name']} do not fit: {_first_line(error)}"
                raise DataError(f"{self._name} has invalid metadata: {reason}; export the run again") from error
        return state

    def __call__(self, tokens: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        """Return the logits [B T vocabulary] of a segment [B T], and the state after it.

        Raises:
            DataError: the graph cannot run, or has other results than its metadata says.
        """
        logits, *after = self._run(self._outputs, tokens, state)
        self._require("logits", logits, (*tokens.shape, self.metadata["vocabulary"]), "float32")
        for entry, leaf in zip(self.metadata["states"], after, strict=True):
            shape = tuple(len(tokens) if size == "batch" else size for size in entry["shape"])
            self._require(f"new_{entry['name']}", leaf, shape, entry["dtype"])
        return logits, dict(zip(state, after, strict=True))

    def view(self, tokens: np.ndarray, state: State) -> dict[str, np.ndarray]:
        """Return the views of a segment by name; empty if the file was exported without views."""
        names = [entry["name"] for entry in self.metadata["views"]]
        outputs = self._run(names, tokens, state) if names else []
        return dict(zip(names, outputs, strict=True))

    def _run(self, names: Sequence[str], tokens: np.ndarray, state: State) -> list[Any]:
        """Return outputs of the graph by name; DataError if it cannot run."""
        try:
            return list(self._session.run(names, {"tokens": tokens, **state}))
        except (*_ERRORS, ValueError, RuntimeError) as error:  # the last two: inputs that the graph does not have
            raise DataError(f"{self._name} cannot run: {_first_line(error)}; export the run again") from error

    def _require(self, output: str, value: Any, shape: tuple[int | str, ...], dtype: str) -> None:
        """Raise a DataError unless an output of the graph has this shape, in which words are any size, and dtype."""
        sizes = getattr(value, "shape", ())
        fits = len(sizes) == len(shape) and all(a == b or isinstance(b, str) for a, b in zip(sizes, shape, strict=True))
        if not (isinstance(value, np.ndarray) and fits and value.dtype == dtype):
            got = f"{getattr(value, 'dtype', type(value).__name__)} {list(sizes)}"
            raise DataError(f"{self._name} is damaged: expected its {output} to be {dtype} {list(shape)}, got {got}")

    def concatenate(self, states: Sequence[State]) -> State:
        """Join the states of several batches; a shorter cache gets empty entries before its first one."""
        return {entry["name"]: _join([state[entry["name"]] for state in states]) for entry in self.metadata["states"]}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the file.

        Raises:
            SeqmixError: the model's tokens are not text.
        """
        content = self.metadata["tokenizer"]
        if content is None:
            raise SeqmixError(f"{self._name} has no tokenizer: its tokens are not text")
        if content == ByteTokenizer.identity:
            return ByteTokenizer()
        vocabulary = json.dumps(content).encode()
        begin = self.metadata["begin_token"]
        tokenizer = SubwordTokenizer(vocabulary, self._name)
        return (
            tokenizer
            if tokenizer.begin == begin
            else SubwordTokenizer(vocabulary, self._name, _text_of(begin, content))
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _session(content: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # fatal errors only: the others are raised
    # a graph may name files for its tensors, and in this folder there are none
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _join(leaves: Sequence[np.ndarray]) -> np.ndarray:
    if leaves[0].ndim > 1:
        longest = max(leaf.shape[1] for leaf in leaves)
        paddings = [[(0, 0), (longest - leaf.shape[1], 0), *[(0, 0)] * (leaf.ndim - 2)] for leaf in leaves]
        leaves = [np.pad(leaf, padding) for leaf, padding in zip(leaves, paddings, strict=True)]
    return np.concatenate(leaves)


def _text_of(token: int | None, content: Mapping[str, Any]) -> str | None:
    """Return the text of a token in the content of a tokenizer.json; None if it is not there."""
    vocabulary = content["model"]["vocab"]
    names = {number: text for text, number in vocabulary.items()} if isinstance(vocabulary, dict) else {}
    names = names or {number: text for number, (text, _) in enumerate(vocabulary)}
    names |= {entry["id"]: entry["content"] for entry in content.get("added_tokens") or []}
    return names.get(token)


@torch.no_grad()
def require_equal(exported: OnnxModel, model: LanguageModel) -> None:
    """Compare the logits of a graph with those of its model, over segments of several lengths.

    Raises:
        SeqmixError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    expected_state = model.init_state(2)
    state = exported.init_state(2)
    for length in (7, 1, 1, 4):
        tokens = torch.randint(model.config.vocab_size, (2, length), generator=generator)
        expected = model(tokens, expected_state, paradigm=model.prefer(from_state=True), return_state=True)
        expected_state = expected.state
        logits, state = exported(tokens.numpy(), state)
        difference = float(np.abs(logits - expected.logits.numpy()).max())
        largest = float(expected.logits.abs().max())
        if not difference <= TOLERANCE * max(largest, 1e-6):
            kinds = ", ".join(sorted({block.mixer.kind for block in model.blocks}))
            raise SeqmixError(
                f"the ONNX graph of {kinds} computes other logits than the model: they differ by {difference:.2g}, "
                f"and the largest is {largest:.2g}; nothing is written"
            )
