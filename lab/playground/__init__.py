"""A page that runs trained models in a browser: a static folder, which opens from disk and needs no network."""

from .folder import write_playground

__all__ = ["write_playground"]
