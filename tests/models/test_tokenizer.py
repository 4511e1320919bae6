"""Tokenizers for bytes and subwords."""

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmix import SeqmixError, build_model, generate_text, load_config
from seqmix.models import ByteTokenizer, load_tokenizer, train_bpe


def test_byte_encoding_starts_with_begin_token():
    bytes_ = load_tokenizer("bytes")
    assert isinstance(bytes_, ByteTokenizer)
    assert (bytes_.vocab_size, bytes_.begin) == (257, 256)
    assert torch.equal(bytes_.encode("aé"), torch.tensor([256, 0x61, 0xC3, 0xA9]))
    assert torch.equal(bytes_.encode(""), torch.tensor([256]))
    # as a command line has bytes that are not UTF-8
    assert bytes_.encode(b"a\xff".decode(errors="surrogateescape")).tolist() == [256, 0x61, 0xFF]
    with pytest.raises(SeqmixError, match=r"'\\ud800' at 1"):
        bytes_.encode("a\ud800")


@given(st.text())
def test_byte_decoding_restores_text(text):
    decoder = ByteTokenizer().decoder()
    pieces = [decoder(token) for token in ByteTokenizer().encode(text).tolist()[1:]]
    assert "".join(pieces) + decoder(None) == text


@pytest.mark.parametrize(
    ("given", "text"), [(b"a\xffb", "a\ufffdb"), (b"\xe2\x82", "\ufffd"), (b"\xe2\x82a", "\ufffda")]
)
def test_byte_decoder_replaces_invalid_bytes(given, text):
    decoder = ByteTokenizer().decoder()
    assert "".join(decoder(b) for b in given) + decoder(None) == text


TEXTS = ["the mixer reads a token and writes its state. ", "der Mixer liest, und schreibt: Zustände, 状態, 🙂! "]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A vocabulary of 300 tokens, learned from two texts."""
    pytest.importorskip("tokenizers")
    file = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    train_bpe([(str(n), (text * 20).encode()) for n, text in enumerate(TEXTS)], 300, file)
    return file


@pytest.fixture
def subwords(vocabulary):
    return load_tokenizer(vocabulary)


def decoded(tokenizer, tokens) -> str:
    decoder = tokenizer.decoder()
    return "".join([decoder(token) for token in tokens] + [decoder(None)])


def test_trained_vocabulary_has_requested_size(subwords, tmp_path):
    assert (subwords.vocab_size, subwords.begin) == (300, 299)
    tokens = subwords.encode(TEXTS[0])
    assert tokens[0] == 299
    assert tokens[1:].max() < 299
    assert len(tokens) < len(TEXTS[0]) / 2
    assert tokens.dtype is torch.int64
    # the same text, the same vocabulary
    documents = [(str(n), (text * 20).encode()) for n, text in enumerate(TEXTS)]
    assert train_bpe(documents, 300, tmp_path / "again.json").identity == subwords.identity
    assert train_bpe(documents, 299, tmp_path / "other.json").identity != subwords.identity


# the fixture is of the module
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_subword_decoding_restores_any_text(subwords, text):
    assert decoded(subwords, subwords.encode(text).tolist()[1:]) == text


def test_begin_token_inside_vocabulary_does_not_limit_generation(subwords, tmp_path):
    subwords.save(tmp_path)
    own = load_tokenizer(tmp_path / "tokenizer.json", "a")
    assert (subwords.text_tokens, own.text_tokens, own.vocab_size) == (299, 299, 299)
    config = load_config("retnet-tiny", ["model.d_model=64", "model.n_layers=1", "model.vocab_size=299"])
    model = build_model(config.model).eval()
    model.tokenizer = own
    (text,) = generate_text(model, ["a"], max_new_tokens=40)
    assert len({*own.encode(text).tolist()}) > 10
    assert max(own.encode(text).tolist()) > own.begin


def test_decoder_emits_whole_characters(subwords):
    decoder = subwords.decoder()
    pieces = [decoder(token) for token in subwords.encode("🧪é").tolist()[1:]]
    assert [piece for piece in pieces if piece] == ["🧪", "é"]
    assert len(pieces) > 3
    assert decoder(None) == ""


def test_incomplete_character_is_replaced_at_end(subwords):
    first, second, *_ = subwords.encode("🧪").tolist()[1:]
    assert decoded(subwords, [first, second]).strip("\ufffd") == ""
    assert "\ufffd" in decoded(subwords, [first, second])


def test_documents_are_encoded_in_order(subwords):
    texts = [f"{number} mixers" for number in range(600)]
    encoded = list(subwords.encode_documents((text, text.encode()) for text in texts))
    assert [decoded(subwords, tokens.tolist()) for tokens in encoded] == texts
    assert {tokens.dtype.name for tokens in encoded} == {"uint16"}


def test_saved_tokenizer_loads_with_same_identity(subwords, tmp_path):
    subwords.save(tmp_path)
    copy = load_tokenizer(tmp_path / "tokenizer.json")
    assert copy.identity == load_tokenizer(tmp_path).identity == subwords.identity
    assert torch.equal(copy.encode(TEXTS[1]), subwords.encode(TEXTS[1]))
    ByteTokenizer().save(tmp_path / "nowhere")


def test_vocabulary_with_gaps_and_special_tokens_loads(tmp_path):
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.WordLevel({"a": 0, "b": 7, "[UNK]": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.add_special_tokens(["[CLS]"])
    made.post_processor = library.processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 8)])
    made.enable_truncation(2)
    made.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(tmp_path / "words.json")
    largest = max(made.get_vocab().values())
    assert (tokenizer.begin, tokenizer.vocab_size) == (largest + 1, largest + 2)
    assert tokenizer.encode("a b a b").tolist() == [largest + 1, 0, 7, 0, 7]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no.json", "No such file `bytes`"),
        ("", "folder without tokenizer.json: write one with transformers"),
        ("other.json", "tokenizer.json"),
    ],
)
def test_invalid_tokenizer_file_is_named_in_one_line_error(tmp_path, name, words):
    pytest.importorskip("tokenizers")
    (tmp_path / "other.json").write_text('{"version": 1}')
    with pytest.raises(SeqmixError) as raised:
        load_tokenizer(tmp_path / name)
    assert all(word in str(raised.value) for word in (str(tmp_path / name), *words.split()))
    assert "\n" not in str(raised.value)


def test_document_that_is_not_utf8_is_named_in_error(subwords):
    with pytest.raises(SeqmixError, match=r"a\.bin .*0xff at 2.*`bytes`"):
        list(subwords.encode_documents([("b.txt", b"ok"), ("a.bin", b"ab\xff")]))


def test_vocabulary_too_small_for_all_bytes_raises(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(SeqmixError, match=r"257 .*256"):
        train_bpe([("a", b"a")], 256, tmp_path / "a.json")
    assert train_bpe([("a", b"a")], 257, tmp_path / "a.json").vocab_size == 257


def test_missing_tokenizers_package_is_named_in_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SeqmixError, match="pip install tokenizers"):
        load_tokenizer(tmp_path / "tokenizer.json")
