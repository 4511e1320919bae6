"""What a computation consists of: operations, and the tensors that they return."""

import gc
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


class Live(TorchDispatchMode):
    """Counts the bytes of all storages, those too that are resized, as FSDP's are; `added` is the most at once, beyond
    what there was before."""

    def __init__(self):
        super().__init__()
        gc.collect()
        self.storages, self.added = {}, 0
        self.see(each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
        self.before = self.now()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.see(tree_leaves(result))
        self.added = max(self.added, self.now() - self.before)
        return result

    def now(self):
        self.storages = {key: storage for key, storage in self.storages.items() if storage() is not None}
        return sum(found.nbytes() for storage in self.storages.values() if (found := storage()) is not None)

    def see(self, leaves):
        for leaf in leaves:
            if type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage)
