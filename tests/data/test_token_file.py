"""Token files: what is written is what is mapped, and what is damaged is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from streams import evaluation_batches, training_batch

from seqmix import SeqmixError
from seqmix.data import Stream, TextConfig, TokenFile, read_corpus, write_token_file
from seqmix.data.files import Document
from seqmix.data.stream import tokenized
from seqmix.data.token_file import BLOCK, HEADER
from seqmix.models import ByteTokenizer

BEGIN = 256


class WideTokenizer(ByteTokenizer):
    """Bytes with large numbers."""

    identity = unit = "wide"
    begin = 2**17
    vocab_size = begin + 1

    def encode_documents(self, documents):
        for tokens in super().encode_documents(documents):
            yield tokens.astype(np.uint32) + 2**16


def write(path: Path, *texts: bytes, tokenizer=None) -> TokenFile:
    tokenizer = tokenizer or ByteTokenizer()
    documents = [Document(f"{number}", f"{number}", text) for number, text in enumerate(texts)]
    return write_token_file(path, tokenized(documents, tokenizer), tokenizer)


def error(path: Path, tokenizer=None) -> str:
    def read():
        file = TokenFile(path, tokenizer or ByteTokenizer())
        file.read(0, int(file.ends[-1]))

    with pytest.raises(SeqmixError) as raised:
        read()
    assert "\n" not in str(raised.value)
    return str(raised.value)


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


# ---- what is written


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WideTokenizer()], ids=["uint16", "uint32"])
def test_tokens_come_back(tmp_path, tokenizer):
    file = write(tmp_path / "a.tokens", b"one", b"two!", tokenizer=tokenizer)
    shift = 0 if tokenizer.begin == BEGIN else 2**16
    expected = [tokenizer.begin, *(byte + shift for byte in b"one"), tokenizer.begin, *(b + shift for b in b"two!")]
    assert file.read(0, 9).tolist() == expected
    assert file.read(2, 7).tolist() == expected[2:7]
    assert file.read(0, 9).dtype == tokenizer.dtype
    assert (file.ends.tolist(), file.bytes) == ([4, 9], 7)


def test_a_token_file_is_a_safetensors_file(tmp_path):
    write(tmp_path / "a.tokens", b"one", b"two!")
    tensors = load_file(tmp_path / "a.tokens")
    assert tensors["tokens"].tolist() == [BEGIN, *b"one", BEGIN, *b"two!"]
    assert tensors["ends"].tolist() == [4, 9]
    assert {name: str(tensor.dtype) for name, tensor in tensors.items()} == {
        "tokens": "uint16",
        "ends": "int64",
        "digests": "uint64",
        "checks": "uint32",
    }


def test_a_file_of_many_blocks_comes_back(tmp_path):
    texts = [np.random.default_rng(n).integers(0, 256, size=BLOCK * n // 3).astype(np.uint8).tobytes() for n in (2, 5)]
    file = write(tmp_path / "a.tokens", *texts)
    expected = np.concatenate([[BEGIN, *text] for text in texts])
    assert np.array_equal(file.read(0, len(expected)), expected)
    again = TokenFile(file.path, ByteTokenizer())
    for start, stop in ((BLOCK - 1, BLOCK + 1), (2 * BLOCK, 2 * BLOCK + 1), (len(expected) - 1, len(expected))):
        assert np.array_equal(again.read(start, stop), expected[start:stop])


def test_documents_are_written_as_they_come(tmp_path):
    seen = []

    def documents():
        for number in range(2000):
            seen.append(number)
            yield Document("", "", b"x" * 100)
        # what was tokenized is on disk before the last document is asked for
        assert (tmp_path / ".a.tokens.partial").stat().st_size > BLOCK

    write_token_file(tmp_path / "a.tokens", tokenized(documents(), ByteTokenizer()), ByteTokenizer())
    assert len(seen) == 2000


def test_what_fails_leaves_no_file(tmp_path):
    def documents():
        yield Document("", "", b"x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_token_file(tmp_path / "a.tokens", tokenized(documents(), ByteTokenizer()), ByteTokenizer())
    with pytest.raises(SeqmixError, match="there is no text to tokenize"):
        write(tmp_path / "a.tokens")
    with pytest.raises(SeqmixError, match=r"the token file cannot be written to .*No such file"):
        write(tmp_path / "nowhere" / "a.tokens", b"x")
    assert not list(tmp_path.iterdir())


# ---- a corpus


def corpora(folder, file, **fields):
    options = {"sequence_length": 8, "validation_fraction": 0.3} | fields
    return (read_corpus(TextConfig(paths=(str(path),), **options)) for path in (folder, file))


@pytest.mark.parametrize("split", ["by_document", "tail"])
def test_a_mapped_corpus_is_the_one_in_memory(folder, file, split):
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


def test_auto_splits_a_mapped_corpus_by_document(folder, file):
    assert [corpus.split for corpus in corpora(folder, file)] == ["by_file", "by_document"]


def test_several_files_are_one_corpus(tmp_path):
    names = [f"{number}.tokens" for number in range(12)]
    for number, name in enumerate(names):
        write(tmp_path / name, *(bytes([number * 3 + n]) * 20 for n in range(3)))
    options = {"sequence_length": 8, "split": "by_file", "validation_fraction": 0.4}
    corpus = read_corpus(TextConfig(paths=(str(tmp_path),), **options))
    assert corpus.documents == 36
    held, learned = (
        {int(token) // 3 for token in side[:] if token != BEGIN} for side in (corpus.validation, corpus.train)
    )
    assert held | learned == set(range(12))
    assert not held & learned
    assert len(corpus.train) == len(learned) * 63


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
def test_a_slice_of_a_stream_is_that_of_its_tokens(lengths, data):
    tokens = np.arange(100, 100 + sum(lengths), dtype=np.uint16)
    ends = np.cumsum(lengths)

    class Held:
        digests = np.zeros(len(lengths), dtype=np.uint64)

        def read(self, start, stop):
            return tokens[start:stop].copy()

    Held.ends = ends
    kept = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1)))
    pieces = np.array([[ends[n] - lengths[n], ends[n]] for n in kept])
    stream = Stream([(Held(), pieces[: len(kept) // 2]), (Held(), pieces[len(kept) // 2 :])], begin=7)
    whole = [7 if at == start else int(tokens[at]) for start, stop in pieces for at in range(start, stop)]
    assert len(stream) == len(whole)
    start, stop = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, len(whole) + 3))
    assert stream[start:stop].tolist() == whole[start:stop]
    assert stream.starts.tolist() == [at for at, token in enumerate(whole) if token == 7]


def test_token_files_and_text_are_not_mixed(folder, file):
    with pytest.raises(SeqmixError, match=r"token files and text cannot be read together: .*texts\.tokens is the one"):
        read_corpus(TextConfig(paths=(str(folder), str(file))))


# ---- what cannot be used


def test_a_file_of_another_tokenizer_is_refused(file):
    assert error(file, WideTokenizer()) == f"{file} was tokenized with bytes, and data.tokenizer is wide"


@pytest.mark.parametrize("length", [0, 7, 100, HEADER, HEADER + 1, -1])
def test_a_truncated_file_is_refused(file, length):
    file.write_bytes(file.read_bytes()[:length])
    assert error(file).startswith(f"{file} is damaged, truncated, or no token file: ")


def test_a_longer_file_is_refused(file):
    file.write_bytes(file.read_bytes() + b"x")
    assert error(file).startswith(f"{file} is damaged, truncated, or no token file: ")


def test_any_damaged_byte_behind_the_header_is_seen(file):
    content = file.read_bytes()
    for at in range(HEADER, len(content), 7):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert "is damaged: " in error(file)
    file.write_bytes(content)
    TokenFile(file, ByteTokenizer()).read(0, 10)


def test_damage_is_told_where_it_is_read(tmp_path):
    path = tmp_path / "a.tokens"
    write(path, b"x" * 3 * BLOCK)
    content = bytearray(path.read_bytes())
    content[HEADER + 2 * (BLOCK + 5)] ^= 1
    path.write_bytes(content)
    file = TokenFile(path, ByteTokenizer())
    file.read(0, BLOCK)
    file.read(2 * BLOCK, 3 * BLOCK)
    with pytest.raises(SeqmixError, match=r"a.tokens is damaged: tokens from 65,536 on are not what was written"):
        file.read(BLOCK - 1, BLOCK + 1)


def test_other_files_are_no_token_files(tmp_path):
    path = tmp_path / "a.tokens"
    path.write_text("some text, which is longer than a header's length")
    assert error(path).startswith(f"{path} is damaged, truncated, or no token file: ")
    header = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    assert error(path) == f"{path} is no token file: `seqmix tokenize` writes one"
    assert error(tmp_path).startswith(f"the token file {tmp_path} cannot be read: ")
    assert error(tmp_path / "no.tokens").startswith(f"the token file {tmp_path / 'no.tokens'} cannot be read: ")


def test_a_newer_version_is_refused(file):
    file.write_bytes(file.read_bytes().replace(b'"seqmix.tokens": "1"', b'"seqmix.tokens": "2"'))
    assert error(file).startswith(f"{file} is a token file of version 2, and this seqmix reads version 1")


@pytest.mark.parametrize(
    ("written", "instead", "what"),
    [
        (b'"seqmix.tables"', b'"seqmix.fables"', "it lacks tables"),
        (b'"digests": {', b'"dogests": {', "it lacks digests"),
        (b'"seqmix.bytes": "1', b'"seqmix.bytes": "-', "its text has '-"),
        (b'"I64", "shape": [', b'"U64", "shape": [', "its ends are U64 ["),
    ],
)
def test_a_header_that_says_something_else_is_one_sentence(tmp_path, written, instead, what):
    path = tmp_path / "a.tokens"
    write(path, b"a" * 100)
    content = path.read_bytes()
    assert content.count(written) == 1
    path.write_bytes(content.replace(written, instead))
    assert error(path).startswith(f"{path} is damaged: {what}")
