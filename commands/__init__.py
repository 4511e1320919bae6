"""The commands: one file each, its options beside what it does."""
