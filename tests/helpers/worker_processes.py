"""Functions that other processes run in tests."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def command(*arguments: str) -> None:
    """The `seqmix` command, in a process of its own."""
    import torch

    from seqmix.cli.app import main

    torch.set_num_threads(1)
    output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    sys.argv = ["seqmix", *arguments]
    main()


def command_of_rank(rank: int, size: int, port: int, *arguments: str) -> None:
    """The same as one of several processes, as torchrun starts them."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command(*arguments)


def command_of_rank_that_notes_rows(file: str, rank: int, size: int, port: int, *arguments: str) -> None:
    """The same; each batch that it reads adds a line to a file: the step, and a hash of each row."""
    import json
    from zlib import crc32

    from seqmix.training.trainer import Trainer

    read = Trainer.batch

    def batch(self: Trainer, step: int) -> Any:
        given = read(self, step)
        rows = [crc32(row.numpy().tobytes()) for row in given.inputs]
        with Path(file).open("a") as opened:
            opened.write(json.dumps([step, rows]) + "\n")
        return given

    Trainer.batch = batch
    command_of_rank(rank, size, port, *arguments)


def command_killed_in(call: str, count: int, *arguments: str) -> None:
    """The same, killed in a numbered call of a function of the modules that write checkpoints."""
    from seqmix.training import tensor_files
    from seqmix.training.checkpoint import files as checkpoint

    module = tensor_files if call == "save_file" else checkpoint
    owner, name = (module, call) if "." not in call else (getattr(module, call.split(".")[0]), call.split(".")[1])
    setattr(owner, name, _deadly(getattr(owner, name), count))
    command(*arguments)


def _deadly(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    left = count

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            half = next((Path(x) for x in args if isinstance(x, Path) and x.suffix == ".safetensors"), None)
            if half is not None and not half.exists():
                half.write_bytes(b"half of a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def command_in(folder: str, output: str, *arguments: str) -> None:
    """The `seqmix` command in a process of its own, in a folder, its output in a file."""
    from seqmix.cli.app import main

    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["seqmix", *arguments]
    main()
