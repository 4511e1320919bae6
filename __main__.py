"""`python -m seqmix` is the command, as `torchrun -m seqmix` starts it."""

import os
import sys

if __name__ == "__main__":
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():
        del sys.path[0]  # Python puts the working directory there, whose files would stand in for libraries
    from .cli import main

    main()
