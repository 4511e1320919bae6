"""The command, and `python -m seqmix`, as `torchrun -m seqmix` starts it: a Ctrl-C during imports is silent."""

import atexit
import gc
import io
import os
import signal
import sys
from contextlib import suppress

if __name__ == "__main__" and not sys.flags.safe_path and sys.path[0] == os.getcwd():
    del sys.path[0]  # Python puts the working directory there, whose files would stand in for libraries


def start() -> None:
    """Run the command; a Ctrl-C while it is imported ends the process silently."""
    codes: list[object] = []
    if sys.argv[1:2] == ["check"]:  # of all commands the one that leaves a compiler's objects, and no other process
        atexit.register(_leave, codes)  # before any other, so that it is the last
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # in the background it may be ignored
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except SystemExit as end:
        codes.append(end.code)
        raise


def _leave(codes: list[object]) -> None:
    """End the process with the code it ended with, when threads and exit handlers are through: to free a million
    objects one by one takes a second. What is open is closed, as it would be."""
    if codes and not sys.gettrace() and not sys.getprofile():  # an error, or somebody wants to know what was run
        files = [each for each in gc.get_objects() if issubclass(type(each), (io.TextIOBase, io.BufferedIOBase))]
        for file in sorted(files, key=lambda file: isinstance(file, io.BufferedIOBase)):  # what holds another first
            with suppress(Exception):
                file.close()
        os._exit(codes[0] if isinstance(codes[0], int) else int(codes[0] is not None))


if __name__ == "__main__":
    start()
