"""The matrix products of a call: which they are, and how long they take by themselves.

A call cannot be quicker than its own matrix products, done at their own shapes with nothing between them. That time is
the floor that a figure's share is of.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS  # no public way leads to the function that an op was made of
from torch.utils._python_dispatch import TorchDispatchMode

from ..models.onednn_linear import onednn_linear
from .measure import TimedCall, repeated

LONGEST = 4096
"""Rows, columns or summands beyond it are timed in pieces: a product grows in proportion."""
LARGEST = 2**24
"""Numbers of a matrix, over the whole batch, beyond which a batch is timed in pieces."""
BLOCK = 512
"""Queries and keys of the blocks that attention's products are timed in."""


class Product(NamedTuple):
    """`batch` products of [m k] and [k n]."""

    batch: int
    m: int
    k: int
    n: int
    dtype: torch.dtype
    turned: tuple[bool, bool] | None = None
    """Of one by oneDNN (models/onednn_linear.py), whether each operand lies column by column; None of torch's."""

    @property
    def flops(self) -> int:
        """Operations."""
        return 2 * self.batch * self.m * self.k * self.n


class Recorder(TorchDispatchMode):
    """Counts the matrix products of what runs inside, backward too.

    Of a custom op, the function that it was made of is run as well, to see the products inside it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()
        self.complete = True
        """Whether products were seen inside every custom op: those of a kernel in another language are not."""
        self._bodies = {d._opoverload: d._init_fn for d in OPDEFS.values() if d._namespace == "seqmix"}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._bodies:
            before = self.products.total()
            with self:
                result = self._bodies[func](*args, **kwargs)
            self.complete &= self.products.total() > before
            return result
        # inside an op's body, matmul and the like have not been taken apart
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        name = func.overloadpacket.__name__
        if name in _FIRST:
            self._count(*args[_FIRST[name] :][:2])
        elif name.startswith("_scaled_dot_product") and "math" not in name:
            names = [argument.name for argument in func._schema.arguments]
            self._count_attention({**dict(zip(names, args, strict=False)), **kwargs}, backward="backward" in name)
        elif name == "_linear_pointwise":
            x = args[0].flatten(0, -2)
            weight = args[1]
            turned = not x.is_contiguous(), not weight.is_contiguous()
            self.products[Product(1, len(x), x.shape[1], len(weight), x.dtype, turned)] += 1
        return func(*args, **kwargs)

    def _count(self, a: Tensor, b: Tensor) -> None:
        batch = a.shape[0] if a.ndim == 3 else 1
        n = b.shape[-1] if b.ndim > 1 else 1
        self.products[Product(batch, a.shape[-2] if a.ndim > 1 else 1, a.shape[-1], n, a.dtype)] += 1

    def _count_attention(self, given: dict[str, Any], *, backward: bool) -> None:
        """Scores and output; backward, scores again and a gradient of each of scores, queries, keys and values."""
        q, k, v = given["query"], given["key"], given["value"]
        causal = given.get("is_causal", False)
        batch = math.prod(q.shape[:-2])
        queries = q.shape[-2]
        keys = k.shape[-2]
        rows = min(queries, BLOCK)
        columns = min(keys, BLOCK)
        scored = queries * (queries + 1) / 2 if causal and queries == keys else queries * keys
        blocks = scored / (rows * columns)
        scores = Product(batch, rows, q.shape[-1], columns, q.dtype)
        output = Product(batch, rows, columns, v.shape[-1], q.dtype)
        # of equal widths all products of a block cost the same
        self.products[scores] += blocks * (3 if backward else 1)  # type: ignore[assignment]
        self.products[output] += blocks * (2 if backward else 1)  # type: ignore[assignment]


_FIRST = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
"""Which argument of an operation is multiplied by the next."""


def recorded(call: Callable[[], Any]) -> Counter[Product] | None:
    """Run a call once, and count its products; None where not all of them can be seen."""
    with Recorder() as recorder:
        call()
    return recorder.products if recorder.complete else None


def in_pieces(products: Counter[Product]) -> dict[Product, float]:
    """The same work in products that are not too large to be timed alone, and how often each is done."""
    pieces: dict[Product, float] = {}
    for product, count in products.items():
        m, k, n = (min(x, LONGEST) for x in (product.m, product.k, product.n))
        batch = min(product.batch, max(1, LARGEST // max(m * k, k * n, m * n)))
        small = product._replace(batch=batch, m=m, k=k, n=n)
        pieces[small] = pieces.get(small, 0.0) + count * product.flops / small.flops
    return pieces


def timed_alone(products: Iterable[Product], device: torch.device) -> dict[Product, TimedCall]:
    """A call for each product, which does it once, or several times if it is short."""
    calls = {}
    for product in products:
        times = min(100, max(1, math.ceil(1e8 / product.flops)))
        once = _by_onednn(product) if product.turned else _by_torch(product, device)
        calls[product] = TimedCall(repeated(once, times), units=times)
    return calls


def _by_torch(product: Product, device: torch.device) -> Callable[[], Any]:
    batch, m, k, n, dtype, _ = product
    a = torch.randn(batch, m, k, device=device).to(dtype)
    b = torch.randn(batch, k, n, device=device).to(dtype)
    out = torch.empty(batch, m, n, device=device, dtype=dtype)
    if batch == 1:
        return partial(torch.mm, a[0], b[0], out=out[0])
    return partial(torch.bmm, a, b, out=out)


def _by_onednn(product: Product) -> Callable[[], Any]:
    _, m, k, n, dtype, turned = product
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    operands = [x.T.contiguous().T if turn else x for x, turn in zip((a, b), turned or (), strict=True)]
    return partial(onednn_linear, *operands)
