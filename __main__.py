"""The command, and `python -m seqmix`, as `torchrun -m seqmix` starts it: a Ctrl-C during imports is silent."""

import os
import signal
import sys

if __name__ == "__main__" and not sys.flags.safe_path and sys.path[0] == os.getcwd():
    del sys.path[0]  # Python puts the working directory there, whose files would stand in for libraries


def start() -> None:
    """Run the command; a Ctrl-C while it is imported ends the process silently."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # in the background it may be ignored
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()


if __name__ == "__main__":
    start()
