"""What a computation consists of: operations, and the tensors that they return."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watched(TorchDispatchMode):
    """Remembers every operation with its results."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.append((func, [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]))
        return result

    @property
    def largest(self):
        """Elements of the largest result."""
        return max(x.numel() for _, results in self.seen for x in results)


class Allocated(TorchDispatchMode):
    """Counts the bytes that operations allocate, while they are in use; `peak` is the most at once."""

    def __init__(self):
        super().__init__()
        self.used = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.used += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata)
        self.peak = max(self.peak, self.used)
        return result

    def freed(self, storage):
        self.used -= self.sizes.pop(storage)
