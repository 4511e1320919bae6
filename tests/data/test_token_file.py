"""Token files: mapped tokens match the written ones, and damaged files are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from small_runs import refusal
from token_streams import evaluation_batches, training_batch

from seqmix import SeqmixError
from seqmix.data import Stream, TextConfig, TokenFile, read_corpus, write_token_file
from seqmix.data.files import Document
from seqmix.data.token_file import BLOCK, HEADER
from seqmix.data.token_store import tokenized
from seqmix.models import ByteTokenizer

BEGIN = 256
BYTES = ByteTokenizer()


class WideTokenizer(ByteTokenizer):
    """Bytes with large numbers."""

    identity = unit = "wide"
    begin = 2**17
    vocab_size = begin + 1

    def encode_documents(self, documents):
        for tokens in super().encode_documents(documents):
            yield tokens.astype(np.uint32) + 2**16


def write(path: Path, *texts: bytes, tokenizer=BYTES) -> TokenFile:
    documents = [Document(f"{number}", f"{number}", text) for number, text in enumerate(texts)]
    return write_token_file(path, tokenized(documents, tokenizer), tokenizer)


def error(path: Path, tokenizer=BYTES) -> str:
    def read():
        file = TokenFile(path, tokenizer)
        file.read(0, int(file.ends[-1]))

    message = refusal(read)
    assert str(path) in message
    return message


@pytest.fixture
def folder(tmp_path):
    """Thirty texts, of which two are equal."""
    random = np.random.default_rng(0)
    (tmp_path / "texts").mkdir()
    for number in range(30):
        text = random.integers(0, 256, size=random.integers(1, 40)).astype(np.uint8).tobytes()
        (tmp_path / "texts" / f"{number:02d}").write_bytes(text)
    (tmp_path / "texts" / "30").write_bytes((tmp_path / "texts" / "07").read_bytes())
    return tmp_path / "texts"


@pytest.fixture
def file(folder):
    """Those texts as a token file."""
    path = folder.parent / "texts.tokens"
    write(path, *(file.read_bytes() for file in sorted(folder.iterdir())))
    return path


@pytest.mark.parametrize("tokenizer", [BYTES, WideTokenizer()], ids=["uint16", "uint32"])
def test_token_file_is_a_safetensors_file_with_the_tokens(tmp_path, tokenizer):
    file = write(tmp_path / "a.tokens", b"one", b"two!", tokenizer=tokenizer)
    shift = 0 if tokenizer.begin == BEGIN else 2**16
    expected = [tokenizer.begin, *(byte + shift for byte in b"one"), tokenizer.begin, *(b + shift for b in b"two!")]
    assert file.read(0, 9).tolist() == expected
    assert file.read(2, 7).tolist() == expected[2:7]
    assert file.read(0, 9).dtype == tokenizer.dtype
    assert (file.ends.tolist(), file.bytes) == ([4, 9], 7)
    tensors = load_file(tmp_path / "a.tokens")
    assert (tensors["tokens"].tolist(), tensors["ends"].tolist()) == (expected, [4, 9])
    dtypes = {name: str(tensor.dtype) for name, tensor in tensors.items()}
    tokens = np.dtype(tokenizer.dtype).name
    assert dtypes == {"tokens": tokens, "ends": "int64", "digests": "uint64", "checks": "uint32"}


def test_file_of_many_blocks_round_trips(tmp_path):
    texts = [np.random.default_rng(n).integers(0, 256, size=BLOCK * n // 3).astype(np.uint8).tobytes() for n in (2, 5)]
    file = write(tmp_path / "a.tokens", *texts)
    expected = np.concatenate([[BEGIN, *text] for text in texts])
    assert np.array_equal(file.read(0, len(expected)), expected)
    again = TokenFile(file.path, BYTES)
    for start, stop in ((BLOCK - 1, BLOCK + 1), (2 * BLOCK, 2 * BLOCK + 1), (len(expected) - 1, len(expected))):
        assert np.array_equal(again.read(start, stop), expected[start:stop])


def test_documents_are_written_while_they_are_read(tmp_path):
    def documents():
        yield from (Document("", "", b"x" * 100) for _ in range(2000))
        # what was tokenized is on disk before the last document is asked for
        assert (tmp_path / ".a.tokens.partial").stat().st_size > BLOCK

    assert len(write_token_file(tmp_path / "a.tokens", tokenized(documents(), BYTES), BYTES).ends) == 2000


def test_failed_write_leaves_no_file(tmp_path):
    def documents():
        yield Document("", "", b"x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_token_file(tmp_path / "a.tokens", tokenized(documents(), BYTES), BYTES)
    with pytest.raises(SeqmixError):
        write(tmp_path / "a.tokens")  # no text
    assert str(tmp_path / "nowhere") in refusal(lambda: write(tmp_path / "nowhere" / "a.tokens", b"x"))
    assert not list(tmp_path.iterdir())


def corpora(folder, file, **fields):
    options = {"sequence_length": 8, "validation_fraction": 0.3, "encoding": "bytes"} | fields
    return (read_corpus(TextConfig(paths=(str(path),), **options)) for path in (folder, file))


@pytest.mark.parametrize("split", ["by_document", "tail"])
def test_mapped_corpus_matches_the_one_in_memory(folder, file, split):
    text, mapped = corpora(folder, file, split=split)
    assert isinstance(mapped.train, Stream)
    assert mapped.train[:].tolist() == text.train.tolist()
    assert mapped.validation[:].tolist() == text.validation.tolist()
    assert (mapped.documents, mapped.split, mapped.unigram_entropy) == (31, split, text.unigram_entropy)
    for order in ("random_windows", "epochs"):
        for step in range(5):
            pair = [training_batch(c.train, 8, 7, seed=1, step=step, order=order) for c in (text, mapped)]
            assert all((a == b).all() for a, b in zip(*pair, strict=True))
    batches = [evaluation_batches(c.validation, 8, 3, None) for c in (text, mapped)]
    assert all((a.inputs == b.inputs).all() for a, b in zip(*batches, strict=True))


def test_mapped_corpus_is_split_by_document_and_rejects_text_files(folder, file):
    assert [corpus.split for corpus in corpora(folder, file)] == ["by_file", "by_document"]
    assert str(file) in refusal(lambda: read_corpus(TextConfig(paths=(str(folder), str(file)))))


def test_several_token_files_form_one_corpus(tmp_path):
    for number in range(12):
        write(tmp_path / f"{number}.tokens", *(bytes([number * 3 + n]) * 20 for n in range(3)))
    options = {"sequence_length": 8, "split": "by_file", "validation_fraction": 0.4}
    corpus = read_corpus(TextConfig(paths=(str(tmp_path),), **options))
    assert corpus.documents == 36
    splits = corpus.validation, corpus.train
    held, learned = ({int(token) // 3 for token in tokens[:] if token != BEGIN} for tokens in splits)
    assert held | learned == set(range(12))
    assert not held & learned
    assert len(corpus.train) == len(learned) * 63


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
def test_stream_slice_matches_the_slice_of_its_tokens(lengths, data):
    tokens, ends = np.arange(100, 100 + sum(lengths), dtype=np.uint16), np.cumsum(lengths)

    class InMemory:
        digests = np.zeros(len(lengths), dtype=np.uint64)

        def read(self, start, stop):
            return tokens[start:stop].copy()

    InMemory.ends = ends
    chosen = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1)))
    pieces = np.array([[ends[n] - lengths[n], ends[n]] for n in chosen])
    half = len(chosen) // 2
    stream = Stream([(InMemory(), pieces[:half]), (InMemory(), pieces[half:])], begin=7)
    whole = [7 if at == start else int(tokens[at]) for start, stop in pieces for at in range(start, stop)]
    assert len(stream) == len(whole)
    start, stop = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, len(whole) + 3))
    assert stream[start:stop].tolist() == whole[start:stop]
    assert stream.starts.tolist() == [at for at, token in enumerate(whole) if token == 7]


def test_damaged_bytes_and_wrong_lengths_are_detected(file):
    content = file.read_bytes()
    for length in (0, 7, 100, HEADER, HEADER + 1, -1):
        file.write_bytes(content[:length])
        assert "truncated" in error(file)
    file.write_bytes(content + b"x")
    assert "damaged" in error(file)
    for at in range(HEADER, len(content), 7):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert "damaged" in error(file)
    file.write_bytes(content)
    TokenFile(file, BYTES).read(0, 10)
    # and reported where it is read
    path = file.with_name("a.tokens")
    write(path, b"x" * 3 * BLOCK)
    content = bytearray(path.read_bytes())
    content[HEADER + 2 * (BLOCK + 5)] ^= 1
    path.write_bytes(content)
    file = TokenFile(path, BYTES)
    file.read(0, BLOCK)
    file.read(2 * BLOCK, 3 * BLOCK)
    with pytest.raises(SeqmixError, match=r"a\.tokens .*65,536"):
        file.read(BLOCK - 1, BLOCK + 1)


def test_other_files_are_refused_as_token_files(tmp_path):
    path = tmp_path / "a.tokens"
    path.write_text("some text, which is longer than a header's length")
    error(path)
    header = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    assert "seqmix tokenize" in error(path)
    error(tmp_path)
    error(tmp_path / "no.tokens")
    write(path, b"one")
    message = error(path, WideTokenizer())
    assert all(part in message for part in (" bytes", "data.tokenizer", "wide"))


@pytest.mark.parametrize(
    ("written", "instead", "named"),
    [
        (b'"seqmix.tokens": "1"', b'"seqmix.tokens": "2"', "version 2"),
        (b'"seqmix.tables"', b'"seqmix.fables"', "tables"),
        (b'"digests": {', b'"dogests": {', "digests"),
        (b'"seqmix.bytes": "1', b'"seqmix.bytes": "-', "'-"),
        (b'"I64", "shape": [', b'"U64", "shape": [', "ends must be one-dimensional I64, got U64 ["),
    ],
)
def test_token_file_with_a_wrong_header_is_refused(tmp_path, written, instead, named):
    path = tmp_path / "a.tokens"
    write(path, b"a" * 100)
    content = path.read_bytes()
    assert content.count(written) == 1
    path.write_bytes(content.replace(written, instead))
    assert named in error(path)


class Opened(ByteTokenizer):
    """Bytes of which every n-th is the begin token, which a vocabulary may have in texts, too."""

    def __init__(self, every: int) -> None:
        self.every = every

    def encode_documents(self, documents):
        for tokens in super().encode_documents(documents):
            yield np.where(np.arange(len(tokens)) % self.every == self.every - 1, self.begin, tokens).astype(np.uint16)


@pytest.mark.parametrize("packing", [True, False])
def test_text_of_only_begin_tokens_is_refused(tmp_path, packing):
    write(tmp_path / "a.tokens", *([b"a text"] * 40), tokenizer=Opened(1))
    config = TextConfig(paths=(str(tmp_path / "a.tokens"),), sequence_length=4, packing=packing, split="tail")
    with pytest.raises(SeqmixError, match=r"has no text: all its tokens \(\d+\) are the begin token 256; use a text"):
        config.open(257)


def test_begin_tokens_inside_documents_are_refused_only_when_packing(tmp_path):
    write(tmp_path / "a.tokens", *([b"the text of a document"] * 40), tokenizer=Opened(3))
    fields = {"paths": (str(tmp_path / "a.tokens"),), "sequence_length": 12, "split": "tail"}
    text = TextConfig(**fields, packing=True).open(257)
    expected = (
        r"begin token 256 inside its documents: data.packing expected at most \d documents in a sequence, got \d;"
    )
    for read in (lambda: text.training_batch(0, 4, 0), lambda: list(text.evaluation_batches(2, None))):
        with pytest.raises(SeqmixError, match=expected):
            read()
    assert TextConfig(**fields).open(257).training_batch(0, 4, 0).inputs.shape == (4, 12)
