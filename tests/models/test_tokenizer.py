"""Text as bytes, and as subwords."""

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmix import SeqmixError
from seqmix.models import ByteTokenizer, load_tokenizer, train_bpe


def test_the_begin_token_opens_a_text():
    assert torch.equal(ByteTokenizer().encode("aé"), torch.tensor([256, 0x61, 0xC3, 0xA9]))
    assert torch.equal(ByteTokenizer().encode(""), torch.tensor([256]))


def test_bytes_that_the_command_line_could_not_decode_come_back():
    assert ByteTokenizer().encode(b"a\xff".decode(errors="surrogateescape")).tolist() == [256, 0x61, 0xFF]


def test_half_of_a_surrogate_pair_is_refused():
    with pytest.raises(SeqmixError, match=r"no character at 1: '\\ud800'"):
        ByteTokenizer().encode("a\ud800")


def test_tokens_are_int64():
    assert ByteTokenizer().encode("a").dtype is torch.int64


def test_the_vocabulary_is_the_bytes_and_the_begin_token():
    assert (ByteTokenizer.vocab_size, ByteTokenizer.begin) == (257, 256)


@given(st.text())
def test_decoding_gives_the_text_back_byte_by_byte(text):
    decoder = ByteTokenizer().decoder()
    pieces = [decoder(token) for token in ByteTokenizer().encode(text).tolist()[1:]]
    assert "".join(pieces) + decoder(None) == text


@pytest.mark.parametrize(
    ("given", "text"), [(b"a\xffb", "a\ufffdb"), (b"\xe2\x82", "\ufffd"), (b"\xe2\x82a", "\ufffda")]
)
def test_bytes_that_are_no_text_are_replaced(given, text):
    decoder = ByteTokenizer().decoder()
    assert "".join(decoder(b) for b in given) + decoder(None) == text


def test_load_tokenizer_knows_bytes():
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)


# ---- subwords

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


def test_a_learned_vocabulary_has_as_many_tokens_as_asked_for(subwords):
    assert (subwords.vocab_size, subwords.begin) == (300, 299)
    tokens = subwords.encode(TEXTS[0])
    assert tokens[0] == 299
    assert tokens[1:].max() < 299
    assert len(tokens) < len(TEXTS[0]) / 2
    assert tokens.dtype is torch.int64


def test_the_same_text_gives_the_same_vocabulary(subwords, tmp_path):
    documents = [(str(n), (text * 20).encode()) for n, text in enumerate(TEXTS)]
    assert train_bpe(documents, 300, tmp_path / "again.json").identity == subwords.identity
    assert train_bpe(documents, 299, tmp_path / "other.json").identity != subwords.identity


# the fixture is of the module, and makes nothing anew
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_subwords_give_any_text_back_token_by_token(subwords, text):
    assert decoded(subwords, subwords.encode(text).tolist()[1:]) == text


def test_characters_come_whole(subwords):
    decoder = subwords.decoder()
    pieces = [decoder(token) for token in subwords.encode("🧪é").tolist()[1:]]
    assert [piece for piece in pieces if piece] == ["🧪", "é"]
    assert len(pieces) > 3
    assert decoder(None) == ""


def test_the_first_bytes_of_a_character_are_replaced_at_the_end(subwords):
    first, second, *_ = subwords.encode("🧪").tolist()[1:]
    assert decoded(subwords, [first, second]).strip("\ufffd") == ""
    assert "\ufffd" in decoded(subwords, [first, second])


def test_documents_are_encoded_in_order(subwords):
    texts = [f"{number} mixers" for number in range(600)]
    encoded = list(subwords.encode_documents((text, text.encode()) for text in texts))
    assert [decoded(subwords, tokens.tolist()) for tokens in encoded] == texts
    assert {tokens.dtype.name for tokens in encoded} == {"uint16"}


def test_a_copy_is_the_same_tokenizer(subwords, tmp_path):
    subwords.save(tmp_path)
    copy = load_tokenizer(tmp_path / "tokenizer.json")
    assert copy.identity == subwords.identity
    assert torch.equal(copy.encode(TEXTS[1]), subwords.encode(TEXTS[1]))
    ByteTokenizer().save(tmp_path / "nowhere")


def test_a_vocabulary_with_holes_and_special_tokens_is_read(tmp_path):
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


def test_what_is_no_tokenizer_is_one_sentence(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "other.json").write_text('{"version": 1}')
    for file, sentence in (
        (tmp_path / "no.json", "cannot be read: No such file or directory; data.tokenizer is `bytes` or a tokeniz"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "other.json", "is no tokenizer.json: "),
    ):
        with pytest.raises(SeqmixError) as raised:
            load_tokenizer(file)
        assert str(raised.value).startswith(f"the tokenizer {file} {sentence}")
        assert "\n" not in str(raised.value)


def test_bytes_that_are_no_text_have_no_subwords(subwords):
    with pytest.raises(SeqmixError, match=r"^a.bin is no UTF-8 text: byte 0xff at 2; the tokenizer `bytes` takes any"):
        list(subwords.encode_documents([("b.txt", b"ok"), ("a.bin", b"ab\xff")]))


def test_a_vocabulary_without_all_bytes_is_refused(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(SeqmixError, match=r"at least 257 tokens .* and 256 were asked for"):
        train_bpe([("a", b"a")], 256, tmp_path / "a.json")
    assert train_bpe([("a", b"a")], 257, tmp_path / "a.json").vocab_size == 257


def test_without_the_library_the_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SeqmixError, match=r"needs tokenizers: pip install 'seqmix\[data\]'"):
        load_tokenizer(tmp_path / "tokenizer.json")
