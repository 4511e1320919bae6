"""`python -m seqmix` is the command, as `torchrun -m seqmix` starts it."""

from .cli import main

if __name__ == "__main__":
    main()
