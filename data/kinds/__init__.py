"""What a run can learn, one file a kind: a text, or a task whose answers are known.

A file here is a built-in kind of data if its config says `kind: Literal["<the file's name>"]`.
"""
