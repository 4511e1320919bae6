"""The claims of the RetNet paper (arXiv 2307.08621v4), each measured by a command; see docs/explanation/paper.md."""
