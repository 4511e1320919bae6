"""Files appear when they are whole, under no other name, and as everybody's permissions are."""

import os
import stat

import pytest
import torch

from seqmix import SeqmixError
from seqmix.registry import replacing, write_file
from seqmix.training.tensor_files import write_tensors


def write_half(file):
    with replacing(file) as partial:
        partial.write_text("half")
        raise OSError("no room")


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    file = tmp_path / "new" / "file"
    write_file("first", file)
    with pytest.raises(OSError, match="no room"):
        write_half(file)
    assert file.read_text() == "first"
    write_file(b"second", file)
    assert (file.read_text(), len(os.listdir(file.parent))) == ("second", 1)


def test_a_link_in_the_way_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / ".file.partial").symlink_to("other")
    write_file("text", tmp_path / "file")
    assert ((tmp_path / "other").read_text(), (tmp_path / "file").read_text()) == ("mine", "text")
    assert not (tmp_path / "file").is_symlink()


def test_what_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SeqmixError, match="file is not a folder"):
        write_file("text", tmp_path / "file" / "below")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SeqmixError, match="folder cannot be written"):
        write_file("text", tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.skipif(os.name == "nt", reason="needs pipes")
def test_a_pipe_or_a_device_is_written_where_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_file("text", tmp_path / "pipe")
        assert os.read(reader, 10) == b"text"
    finally:
        os.close(reader)
    assert [stat.S_ISFIFO(file.stat().st_mode) for file in tmp_path.iterdir()] == [True]


def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_file("text", tmp_path / "text")
        write_tensors(tmp_path / "tensors", {"x": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}
