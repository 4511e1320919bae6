"""The kinds of data, one file each: a text, or a synthetic task.

A file here is a built-in kind of data if its config says `kind: Literal["<the file's name>"]`.
"""
