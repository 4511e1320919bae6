"""Entry point of the `seqmix` program, of `python -m seqmix` and of `torchrun -m seqmix`."""

import os
import signal
import sys

if __name__ == "__main__" and not sys.flags.safe_path and sys.path[0] == os.getcwd():
    del sys.path[0]  # the working directory, whose files would shadow libraries


def start() -> None:
    """Run the program; a Ctrl-C during its imports ends it silently."""
    handles_interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a background process may not
    if handles_interrupts:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli.app import main

    if handles_interrupts:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()


if __name__ == "__main__":
    start()
