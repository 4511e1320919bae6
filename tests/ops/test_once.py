"""What is formed once: of the same arguments, while the context is open and nothing wants gradients."""

import torch
from torch.testing import assert_close

from seqmix.ops.runtime.once import formed_once, once


def test_the_same_tensor_or_the_same_positions_are_formed_once_and_others_again():
    calls = []

    def form(x, factor):
        calls.append(factor)
        return factor * x

    positions, floats = torch.tensor([3, 5]), torch.ones(2)
    with torch.no_grad(), formed_once():
        first = once(form, positions, 2)
        assert once(form, positions.clone(), 2) is first
        positions.add_(1)  # as one who owns a state may
        for x, factor in ((positions, 2), (positions[:1], 2), (positions, 3), (floats, 2), (floats.clone(), 2)):
            assert_close(once(form, x, factor), factor * x)
            once(form, x, factor)
        assert calls == [2, 2, 2, 3, 2, 2]
        with formed_once():  # a model in a model
            once(form, floats, 2)
        once(form, floats, 2)
    assert len(calls) == 7
    for _ in range(2):
        once(form, floats, 2)
    with formed_once():  # gradients are wanted
        assert once(form, floats, 2) is not once(form, floats, 2)


@torch.no_grad()
def test_a_transform_or_a_compiler_sees_every_operation():
    with formed_once():
        positions = torch.tensor([[1], [1], [4]])
        assert_close(torch.vmap(lambda x: once(torch.square, x))(positions), positions.square())
        compiled = torch.compile(lambda x: once(torch.square, x), backend="eager", fullgraph=True)
        for x in (positions[0], positions[2]):
            assert_close(compiled(x), x.square())
