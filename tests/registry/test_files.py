"""Files and folders are written atomically, without temporary files left over, and follow the umask."""

import os
import signal
import stat
import time

import pytest
import torch
from small_runs import contents, refusal, small_disk

from seqmix import SeqmixError
from seqmix.registry import is_vacant, replacing, replacing_folder, write_file, write_files
from seqmix.training.tensor_files import write_tensors


def write_half(file):
    with replacing(file) as partial:
        partial.write_text("half")
        raise OSError("no room")


def test_file_is_replaced_only_after_a_complete_write(tmp_path):
    file = tmp_path / "new" / "file"
    write_file("first", file)
    with pytest.raises(OSError, match="no room"):
        write_half(file)
    assert file.read_text() == "first"
    write_file(b"second", file)
    assert (file.read_text(), len(os.listdir(file.parent))) == ("second", 1)


def test_symlink_at_the_temporary_name_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / ".file.partial").symlink_to("other")
    write_file("text", tmp_path / "file")
    assert ((tmp_path / "other").read_text(), (tmp_path / "file").read_text()) == ("mine", "text")
    assert not (tmp_path / "file").is_symlink()


def test_unwritable_path_raises_a_readable_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SeqmixError, match="file is not a folder"):
        write_file("text", tmp_path / "file" / "below")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SeqmixError, match="folder cannot be written"):
        write_file("text", tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.skipif(os.name == "nt", reason="needs pipes")
def test_pipe_is_written_in_place(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_file("text", tmp_path / "pipe")
        assert os.read(reader, 10) == b"text"
    finally:
        os.close(reader)
    assert [stat.S_ISFIFO(file.stat().st_mode) for file in tmp_path.iterdir()] == [True]


def test_file_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_file("text", tmp_path / "text")
        write_tensors(tmp_path / "tensors", {"x": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}


def test_write_files_writes_all_files_or_none(tmp_path):
    with small_disk(100):
        message = refusal(lambda: write_files({tmp_path / "page": "short", tmp_path / "data": "long" * 100}))
    assert "data cannot be written" in message
    assert not list(tmp_path.iterdir())
    write_files({tmp_path / "page": "short", tmp_path / "data": "long" * 100})
    assert sorted(os.listdir(tmp_path)) == ["data", "page"]


def half_folder(folder):
    with replacing_folder(folder) as partial:
        (partial / "file").write_text("half")
        raise OSError("no room")


def whole_folder(folder, text="whole"):
    with replacing_folder(folder) as partial:
        (partial / "below").mkdir()
        (partial / "below" / "file").write_text(text)


@pytest.mark.parametrize("there", [False, True])
def test_folder_appears_only_when_complete_and_replaces_leftovers(tmp_path, there):
    folder = tmp_path / "new"
    if there:
        folder.mkdir()
        (folder / ".file.partial").write_text("left")
    (tmp_path / ".new.partial" / "below").mkdir(parents=True)
    (tmp_path / ".new.partial" / "below" / "other").write_text("left")
    assert is_vacant(folder)
    assert "no room" in refusal(lambda: half_folder(folder))
    assert [file.name for file in tmp_path.iterdir()] == (["new"] if there else [])
    whole_folder(folder)
    assert contents(tmp_path) == {"new/below/file": b"whole"}
    (tmp_path / ".new.partial").write_text("a file of this name")
    assert "new cannot be written" in refusal(lambda: whole_folder(folder, "other"))
    assert contents(tmp_path) == {"new/below/file": b"whole"}


def test_error_names_the_folder_that_cannot_be_replaced(tmp_path, monkeypatch):
    folder = tmp_path / "new"
    with replacing_folder(folder) as partial:
        (partial / "file").write_text("the first one's")
        assert "new is being written by another process" in refusal(lambda: whole_folder(folder))
    assert contents(tmp_path) == {"new/file": b"the first one's"}
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "the current directory" in refusal(lambda: whole_folder(tmp_path / "empty"))
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path)
    whole_folder(tmp_path / "link")
    assert contents(tmp_path / "empty") == {"below/file": b"whole"}
    assert not is_vacant(tmp_path / "empty")
    assert not is_vacant(tmp_path / "empty" / "below" / "file")


@pytest.mark.skipif(os.name == "nt", reason="needs processes that fork")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("write", [replacing, replacing_folder])
def test_fatal_signal_removes_unfinished_files(tmp_path, write, number):
    if not (child := os.fork()):
        try:
            signal.signal(number, signal.SIG_DFL)
            with write(tmp_path / "new"):
                signal.raise_signal(number)
                time.sleep(10)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number
    assert not list(tmp_path.iterdir())
