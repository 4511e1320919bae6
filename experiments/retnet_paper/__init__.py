"""The claims of the RetNet paper (arXiv 2307.08621v4), each measured by a command; docs/paper.md has what came out."""
