"""Compiling a model block by block."""

from types import FunctionType, MethodType

import torch

from ..blocks import Block
from .language_model import LanguageModel


def compile_blocks(model: LanguageModel) -> int:
    """Compile each kind of block by itself (`fullgraph`), so that a deep model compiles as fast as a shallow one.

    Dynamo counts graphs by code object, and gives up at eight. All blocks have one `forward`, so every kind gets a copy
    of its code: blocks of a kind share graphs, and neither other kinds nor other models add to them.

    Returns:
        The number of kinds, each of which is compiled when it is first called.
    """
    kinds = dict.fromkeys(model.config.layers)
    for kind in kinds:
        forward = copy_of(Block.forward, f"forward_{kind}")
        for name, block in zip(model.config.layers, model.blocks, strict=True):
            if name == kind:
                # of the instance: hooks and parameter names stay as they are
                block.forward = torch.compile(MethodType(forward, block), fullgraph=True)
    return len(kinds)


def copy_of(function: FunctionType, name: str) -> FunctionType:
    """The same function with code of its own, whose graphs are counted by themselves."""
    code = function.__code__.replace(co_name=name)
    copy = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
