"""Libraries of native kernels: how they are compiled, cached, loaded and called."""

import logging
import os
import select
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from seqmix import build_model, load_config
from seqmix.ops.kernels.native import build, compiler, functions, library_cache
from seqmix.ops.kernels.selection import AUTO_ON_CPU, choose
from seqmix.ops.runtime.kernel import Probe
from seqmix.ops.scan import scan
from seqmix.registry import SeqmixError

PROBE = Probe(device=torch.device("cpu"), dtype=torch.float32, key_width=4, value_width=16)
REMEDY = "install g\\+\\+ or clang\\+\\+, or set CXX"
STRANGER = 12345
"""Identifier of a user and of a group that are not ours."""
PUT = """
#include <cstdint>
extern "C" void put(float* to, int64_t n, double y, const float* missing, int64_t threads) {
    to[0] = float(n), to[1] = float(y), to[2] = missing == nullptr;
}
"""

needs_compiler = pytest.mark.skipif(compiler.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has compiled nothing, with an empty cache."""
    caches = (build.library, build.failure, build._warn_once, library_cache.temporary_folder, choose)
    caches += (functions._function, functions._parameters)

    def forget():
        for cached in caches:
            cached.cache_clear()
        compiler._too_slow.clear()

    forget()
    monkeypatch.setenv("SEQMIX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SEQMIX_NATIVE", raising=False)
    yield forget
    monkeypatch.undo()
    forget()


@pytest.fixture
def tiny(fresh, monkeypatch, tmp_path):
    """A family whose source compiles in no time."""
    (tmp_path / "tiny.cpp").write_text(PUT)
    (tmp_path / "common.h").touch()
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    return "tiny"


@pytest.fixture
def said(caplog, monkeypatch):
    """Return the messages that users see."""
    monkeypatch.setattr(logging.getLogger("seqmix"), "propagate", True)
    return lambda: [x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING]


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def native(caplog):
    """The warnings about native kernels."""
    return [x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING and "native" in x.getMessage()]


@pytest.mark.parametrize(
    ("variable", "reason"),
    [
        ("PATH", f"no C\\+\\+ compiler was found: {REMEDY}"),
        ("CXX", f"the compiler CXX=nowhere was not found: {REMEDY}"),
        ("BROKEN", "cannot compile scan.cpp: error: no such instruction; set CXX to another compiler"),
    ],
)
def test_reference_runs_with_one_warning_without_a_working_compiler(
    variable, reason, fresh, monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr(logging.getLogger("seqmix"), "propagate", True)
    monkeypatch.delenv("CXX", raising=False)
    if variable == "BROKEN":
        monkeypatch.setenv("CXX", script(tmp_path / "broken", "echo error: no such instruction >&2; exit 1"))
    else:
        monkeypatch.setenv(variable, "" if variable == "PATH" else "nowhere")
    config = load_config("rg-lru-tiny", ["model.n_layers=1"]).model
    model = build_model(config, seed=0)
    assert model.backends == {"lru": "reference"}
    build_model(config, seed=0)
    for paradigm in AUTO_ON_CPU["scan"]:
        with pytest.raises(SeqmixError, match=rf"backend native cannot run: .*{reason}; use backend=reference"):
            choose("scan", "native", PROBE)
        assert choose("scan", "auto", PROBE)[paradigm] == "reference"
    lines = native(caplog)
    assert len(lines) == len(set(lines)) == (2 if variable == "BROKEN" else 1)  # a line names the source that fails
    assert "several times slower" in lines[0]
    tokens = torch.arange(40)[None]
    plain = build_model(
        load_config("rg-lru-tiny", ["model.n_layers=1", "model.blocks.lru.mixer.backend=reference"]).model, seed=0
    )
    assert torch.equal(model(tokens).logits, plain(tokens).logits)


def test_environment_variable_disables_native_kernels_without_warning(fresh, monkeypatch, caplog):
    monkeypatch.setenv("SEQMIX_NATIVE", "0")
    monkeypatch.setenv("CXX", "nowhere")
    assert set(choose("scan", "auto", PROBE).values()) == {"reference"}
    assert not native(caplog)


@needs_compiler
def test_damaged_library_is_recompiled(fresh, tiny, tmp_path):
    build.library(tiny)
    (file,) = (tmp_path / "cache").glob("*.so")
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-1] + b"x"):
        fresh()
        file.unlink()  # this process has mapped the old file
        file.write_bytes(damaged)
        build.library(tiny)
        assert file.read_bytes() == whole
    assert sorted(x.suffix for x in (tmp_path / "cache").iterdir()) == [".sha256", ".so"]


@needs_compiler
def test_new_source_compiler_or_flag_builds_a_new_library(fresh, tiny, monkeypatch, tmp_path):
    def files():
        fresh()
        build.library(tiny)
        return len(list((tmp_path / "cache").glob("*.so")))

    assert [files(), files()] == [1, 1]
    (tmp_path / "tiny.cpp").write_text('extern "C" void something() {}')
    assert files() == 2
    monkeypatch.setenv("CXX", " ".join([*compiler.compiler(), "-g"]))
    assert files() == 3
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-O1"))
    assert files() == 4


@needs_compiler
def test_unwritable_cache_is_replaced_by_a_temporary_folder(tiny, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEQMIX_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert build.failure(tiny) is None
    assert list(library_cache.temporary_folder().glob("*.so"))


@needs_compiler
def test_kernels_work_with_a_compiler_without_openmp(fresh, monkeypatch, tmp_path):
    command = " ".join(compiler.compiler())
    refuses = f'for word in "$@"; do [ "$word" = -fopenmp ] && exit 1; done; exec {command} "$@"'
    monkeypatch.setenv("CXX", script(tmp_path / "plain", refuses))
    x = torch.randn(2, 9, 70)
    expected = scan(x, -x.abs(), paradigm="recurrent").output
    torch.testing.assert_close(scan(x, -x.abs(), backend="native").output, expected)


@needs_compiler
@pytest.mark.slow
def test_concurrent_processes_can_fill_one_empty_cache(tmp_path):
    code = "from seqmix.ops.kernels.native import build; assert build.failure('scan') is None"
    environment = os.environ | {"SEQMIX_CACHE_DIR": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    assert sorted(x.suffix for x in tmp_path.iterdir()) == [".sha256", ".so"]


@pytest.fixture
def planted(fresh, tiny, tmp_path):
    """The file of a library in the cache, with its checksum, whose constructor creates the file `loaded`."""
    source = tmp_path / "planted.cpp"
    constructor = f'__attribute__((constructor)) static void load() {{ fopen("{tmp_path}/loaded", "w"); }}'
    source.write_text(f"#include <cstdio>\n{constructor}\n")
    command = [*compiler.compile_command(), "-fopenmp"]
    file = library_cache.user_folder() / build._library_name(command, tmp_path / "tiny.cpp")
    with library_cache.build_folder(tmp_path) as folder:
        library_cache.store(compiler.compile_library(command, source, folder), file)
    return file


@needs_compiler
def test_library_writable_only_by_its_owner_is_loaded(tiny, planted, tmp_path, said):
    build.library(tiny)
    assert (tmp_path / "loaded").exists()
    assert not said()


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
by_others = pytest.mark.parametrize(
    ("mode", "user", "group"),
    [
        pytest.param(0o757, -1, -1, id="writable by all"),
        pytest.param(0o1777, -1, -1, id="writable by all, sticky"),
        pytest.param(0o775, -1, STRANGER, id="writable by a group", marks=as_root),
        pytest.param(0o755, STRANGER, -1, id="of another user", marks=as_root),
    ],
)


@needs_compiler
@by_others
@pytest.mark.parametrize("name", ["cache", "."])
def test_cache_folder_writable_by_others_is_not_used(tiny, planted, name, mode, user, group, tmp_path, said):
    folder = tmp_path / name
    os.chown(folder, user, group)
    folder.chmod(mode)
    build.library(tiny)
    is_safe = name == "." and mode == 0o1777  # in a folder above, the sticky bit protects what is ours
    assert (tmp_path / "loaded").exists() == is_safe
    if not is_safe:
        assert list(library_cache.temporary_folder().glob("*.so"))
        (message,) = said()
        assert all(word in message for word in ("temporary folder", str(folder.resolve()), "set SEQMIX_CACHE_DIR"))


@needs_compiler
@by_others
def test_library_writable_by_others_is_recompiled(tiny, planted, mode, user, group, tmp_path, said):
    os.chown(planted, user, group)
    planted.chmod(mode)
    build.library(tiny)
    assert not (tmp_path / "loaded").exists()
    assert library_cache.may_load(planted)
    assert not said()


@needs_compiler
def test_cache_folder_writable_by_a_private_group_is_used(tiny, planted, tmp_path, said):
    if not library_cache._is_private_group(os.getegid()):
        pytest.skip("this user shares a group")
    (tmp_path / "cache").chmod(0o775)
    build.library(tiny)
    assert (tmp_path / "loaded").exists()
    assert not said()


@needs_compiler
def test_new_cache_is_private_despite_a_permissive_umask(tiny, tmp_path, said):
    before = os.umask(0)
    try:
        build.library(tiny)
    finally:
        os.umask(before)
    for path in (tmp_path / "cache", *(tmp_path / "cache").iterdir()):
        assert path.stat().st_mode & 0o022 == 0
    assert not said()


@needs_compiler
@pytest.mark.parametrize("suffix", [".so", ".sha256"])
@pytest.mark.parametrize("kind", ["pipe", "endless link", "link", "bytes"])
def test_invalid_or_linked_library_files_are_recompiled(tiny, planted, kind, suffix, tmp_path):
    file = planted.with_suffix(suffix)
    copy = file.rename(tmp_path / f"copy{suffix}")
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "bytes":
        file.write_bytes(b"\xff")
    else:
        file.symlink_to("/dev/zero" if kind == "endless link" else copy)
    build.library(tiny)
    assert not (tmp_path / "loaded").exists()
    assert library_cache.may_load(planted)


@needs_compiler
def test_build_folders_older_than_an_hour_are_removed(tiny, tmp_path):
    cache = tmp_path / "cache"
    elsewhere = tmp_path / "elsewhere"
    for folder in (old := cache / ".seqmix-build-old", cache / ".seqmix-build-new", cache / "other", elsewhere):
        folder.mkdir(parents=True)
        (folder / "library.o").touch()
    link = cache / ".seqmix-build-link"
    link.symlink_to(elsewhere)
    for path in (old, cache / "other", elsewhere):
        os.utime(path, (0, time.time() - 3700))
    build.library(tiny)
    assert not old.exists()
    assert {".seqmix-build-new", "other"} <= {path.name for path in cache.iterdir()}
    assert (elsewhere / "library.o").exists()


def test_compiler_error_in_any_encoding_is_reported(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path / "broken", "printf 'error: \\377 expected' >&2; exit 1"))
    with pytest.raises(SeqmixError, match=r"cannot compile tiny.cpp: error: . expected; set CXX"):
        build.library(tiny)


def test_hanging_compiler_is_announced_and_stopped_once(tiny, monkeypatch, tmp_path, said):
    monkeypatch.setattr(compiler, "NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(compiler, "MAX_SECONDS", 0.5)
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    # its own process holds the pipe open, as a compiler runs others
    hangs = script(tmp_path / "hangs", f"echo x >> {tmp_path}/runs; sleep 1000 > {pipe} & wait")
    monkeypatch.setenv("CXX", hangs)
    (tmp_path / "other.cpp").write_text(PUT)
    assert "did not finish within" in build.failure(tiny)
    assert "did not finish within" in build.failure("other")
    assert (tmp_path / "runs").read_text() == "x\n"
    assert select.select([reader], [], [], 30)[0]
    assert os.read(reader, 1) == b""  # nobody holds the other end
    os.close(reader)
    notice, warning = said()
    assert "tiny.cpp" in notice
    assert all(word in warning for word in ("several times slower", hangs, "set CXX", "SEQMIX_NATIVE=0"))
    assert not list((tmp_path / "cache").iterdir())


@needs_compiler
@pytest.mark.parametrize(
    ("n", "y"), [(2, 2), (True, True), (np.int64(2), np.float32(0.5)), (torch.tensor(2), torch.tensor(0.5)), (2, 0.5)]
)
def test_native_function_accepts_every_kind_of_number(tiny, n, y):
    to = torch.zeros(3)
    functions.call(tiny, "put", to, n, y, None)
    assert to.tolist() == [int(n), float(y), 1]


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((torch.zeros(3), 1, 2.0), "expects 4 arguments, got 3"),
        ((torch.zeros(3), 1, 2.0, None, 1), "expects 4 arguments, got 5"),
        ((torch.zeros(3), 1.0, 2.0, None), "expects an integer for `int64_t n`, got float"),
        ((torch.zeros(3), 1, "2", None), "expects a real number for `double y`, got str"),
        ((torch.zeros(3), 1, torch.zeros(2), None), "expects a real number for `double y`, got Tensor"),
        ((1, 1, 2.0, None), "expects a tensor or None for `float\\* to`, got int"),
    ],
)
def test_native_function_raises_on_invalid_arguments(tiny, arguments, reason):
    with pytest.raises(SeqmixError, match=f"put of tiny.cpp {reason}"):
        functions.call(tiny, "put", *arguments)
