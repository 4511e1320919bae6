"""The matrix products of a call: their shapes, and the time that they take alone.

A call cannot be faster than its own matrix products, run at their own shapes with nothing between them. That time is
the floor of the call; its share is the floor divided by the call's own time.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS  # torch has no public access to the function behind a custom op
from torch.utils._python_dispatch import TorchDispatchMode

from ...models.cpu_linear import onednn_linear
from ...ops.runtime.custom_op import BODIES
from .timing import TimedCall, repeat_call

MAX_SIDE = 4096
"""Maximum number of rows, columns or inner elements of a timed product. Of a longer one, a piece is timed, and its time
is scaled up."""
MAX_ELEMENTS = 2**24
"""Maximum number of elements of an operand in a timed batch of products. Of a larger batch, a part is timed, and its
time is scaled up."""
BLOCK = 512
"""Queries and keys per block in which the products of attention are timed."""


class Product(NamedTuple):
    """Shapes of `batch` matrix products [m k] x [k n]."""

    batch: int
    m: int
    k: int
    n: int
    dtype: torch.dtype
    column_major: tuple[bool, bool] | None = None
    """True for each operand in column-major layout, in a oneDNN product (models/cpu_linear.py); None in torch's."""

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return 2 * self.batch * self.m * self.k * self.n


class Recorder(TorchDispatchMode):
    """Context that counts the matrix products of the code run inside it, including backward passes.

    A custom op runs as its Python implementation, so that the products inside it are seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()
        self.complete = True
        """False once a custom op ran without a visible product, such as a kernel in another language."""
        self._bodies = {packet.default: body for packet, body in BODIES.items()}
        self._bodies |= {d._opoverload: d._init_fn for d in OPDEFS.values() if d._namespace == "seqmix"}

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
        # inside a custom op's body, composite operations such as matmul are not decomposed yet
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        name = func.overloadpacket.__name__
        if name in _FIRST:
            self._count(*args[_FIRST[name] :][:2])
        elif name.startswith("_scaled_dot_product") and "math" not in name:
            names = [argument.name for argument in func._schema.arguments]
            self._count_attention({**dict(zip(names, args, strict=False)), **kwargs}, is_backward="backward" in name)
        elif name == "_linear_pointwise":
            x = args[0].flatten(0, -2)
            weight = args[1]
            column_major = not x.is_contiguous(), not weight.is_contiguous()
            self.products[Product(1, len(x), x.shape[1], len(weight), x.dtype, column_major)] += 1
        return func(*args, **kwargs)

    def _count(self, a: Tensor, b: Tensor) -> None:
        batch = a.shape[0] if a.ndim == 3 else 1
        n = b.shape[-1] if b.ndim > 1 else 1
        self.products[Product(batch, a.shape[-2] if a.ndim > 1 else 1, a.shape[-1], n, a.dtype)] += 1

    def _count_attention(self, arguments: dict[str, Any], *, is_backward: bool) -> None:
        """Count the two products of attention (scores, output), or the five of its backward pass.

        The backward pass computes the scores again, and the gradients of scores, queries, keys and values.
        """
        q, k, v = arguments["query"], arguments["key"], arguments["value"]
        causal = arguments.get("is_causal", False)
        batch = math.prod(q.shape[:-2])
        queries = q.shape[-2]
        keys = k.shape[-2]
        rows = min(queries, BLOCK)
        columns = min(keys, BLOCK)
        scored = queries * (queries + 1) / 2 if causal and queries == keys else queries * keys
        blocks = scored / (rows * columns)
        scores = Product(batch, rows, q.shape[-1], columns, q.dtype)
        output = Product(batch, rows, columns, v.shape[-1], q.dtype)
        # a product of width K costs as much as `scores`, one of width V as much as `output`
        self.products[scores] += blocks * (3 if is_backward else 1)  # type: ignore[assignment]
        self.products[output] += blocks * (2 if is_backward else 1)  # type: ignore[assignment]


_FIRST = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
"""Index of an operation's left operand among its arguments; the right operand follows it."""


def record_products(call: Callable[[], Any]) -> Counter[Product] | None:
    """Run a call once and count its products; None if some of them cannot be seen."""
    with Recorder() as recorder:
        call()
    return recorder.products if recorder.complete else None


def split_products(products: Counter[Product]) -> dict[Product, float]:
    """Replace large products by pieces to time; return how many times each piece is needed for the original FLOPs."""
    pieces: dict[Product, float] = {}
    for product, count in products.items():
        m, k, n = (min(x, MAX_SIDE) for x in (product.m, product.k, product.n))
        batch = min(product.batch, max(1, MAX_ELEMENTS // max(m * k, k * n, m * n)))
        small = product._replace(batch=batch, m=m, k=k, n=n)
        pieces[small] = pieces.get(small, 0.0) + count * product.flops / small.flops
    return pieces


def calls_of(products: Iterable[Product], device: torch.device) -> dict[Product, TimedCall]:
    """Return a call for each product that computes it once, or several times if it is short."""
    calls = {}
    for product in products:
        times = min(100, max(1, math.ceil(1e8 / product.flops)))
        once = _onednn_product(product) if product.column_major else _torch_product(product, device)
        calls[product] = TimedCall(repeat_call(once, times), units=times)
    return calls


def _torch_product(product: Product, device: torch.device) -> Callable[[], Any]:
    batch, m, k, n, dtype, _ = product
    a = torch.randn(batch, m, k, device=device).to(dtype)
    b = torch.randn(batch, k, n, device=device).to(dtype)
    out = torch.empty(batch, m, n, device=device, dtype=dtype)
    if batch == 1:
        return partial(torch.mm, a[0], b[0], out=out[0])
    return partial(torch.bmm, a, b, out=out)


def _onednn_product(product: Product) -> Callable[[], Any]:
    _, m, k, n, dtype, column_major = product
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    operands = [x.T.contiguous().T if turn else x for x, turn in zip((a, b), column_major or (), strict=True)]
    return partial(onednn_linear, *operands)
