"""The commands of the `seqmix` program, one file per command."""
