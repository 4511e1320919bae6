"""Text as bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqmix import SeqmixError
from seqmix.models import ByteTokenizer


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
    pieces = [decoder.decode(bytes([token])) for token in ByteTokenizer().encode(text).tolist()[1:]]
    assert "".join(pieces) + decoder.decode(b"", final=True) == text


@pytest.mark.parametrize(
    ("given", "text"), [(b"a\xffb", "a\ufffdb"), (b"\xe2\x82", "\ufffd"), (b"\xe2\x82a", "\ufffda")]
)
def test_bytes_that_are_no_text_are_replaced(given, text):
    decoder = ByteTokenizer().decoder()
    assert "".join(decoder.decode(bytes([b])) for b in given) + decoder.decode(b"", final=True) == text
