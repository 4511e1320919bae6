"""The kinds of data, one file each: text and the synthetic tasks.

A file of this folder is a built-in kind of data if its configuration declares `kind: Literal["<name of the file>"]`.
"""
