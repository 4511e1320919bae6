"""Ridge regression at every token, by conjugate gradients (MesaNet, arXiv 2506.05233).

Notation: B batch, T tokens, H heads, K key width, C chunk, N rows of the state; a = log_decay, l = ridge.

    G_t = exp(a_t) G_{t-1} + beta_t k_t k_t^T       state  [H K K]
    x_t = (G_t + diag(l))^-1 q_t

G is not formed for every token. With G the state before a chunk (i, j count from 0 inside it), a product with G_i is
linear attention to the keys of the chunk, and one product with the state:

    y G_i = p_i y G + sum_{j <= i} (y k_j) D_ij k_j         p_i = exp(a_0 + .. + a_i)
    D_ij  = beta_j exp(a_{j+1} + .. + a_i)

The recurrent paradigm has one token per chunk, the parallel one all tokens in one chunk. As the system is symmetric,
the gradient of q solves the same system, and the other gradients follow from it (implicit differentiation): they are
exact if the iterations have converged. In exact arithmetic, K of them have; where keys are forgotten or the ridge is
large, far fewer: on a CPU, a group of chunks stops when all its systems are solved to the last digits.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .decay import decay
from .runtime.call import Call
from .runtime.custom_op import Gradients, Op, needs_grad
from .runtime.packing import stretches
from .runtime.paradigm import Paradigm

GROUP_ELEMENTS = 2**20
"""Elements of states that are formed at once; a group has at least one chunk."""
FEW = 16
"""Iterations up to which all are done: checks would cost more than they save."""
CHECK_EVERY = 4
"""Iterations between two checks whether all systems are solved."""


def ridge_solve(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"],
    ridge: Float[Tensor, "H K"],
    iterations: int,
    call: Call,
) -> Float[Tensor, "B T H K"]:
    """Solve (G_t + diag(ridge)) x_t = q_t for every token, with G_t a decayed sum of outer products of keys.

    Args:
        q: right sides, float32 or float64, as everything else.
        k: keys.
        beta: weights of the outer products, >= 0.
        log_decay: natural log of the decays, <= 0.
        ridge: diagonal that is added to G, > 0.
        iterations: largest number of iterations of conjugate gradients.
        call: the call; its state is G before the first token, [N H K K].
    """
    length = q.shape[1]
    chunk = {Paradigm.RECURRENT: 1, Paradigm.PARALLEL: length}.get(call.paradigm, call.chunk_size)
    documents = call.documents
    boundaries = None if documents is None else documents.boundaries
    system = System(q, k, beta, log_decay, ridge, call.state, None, call.cu_seqlens, boundaries, chunk, iterations)
    if not needs_grad(q, k, beta, log_decay, ridge, call.state):
        return RIDGE_SOLVE(system)[0]
    constants = {name: y.detach() for name, y in system._asdict().items() if isinstance(y, Tensor)}
    system = system._replace(**constants)
    x = RIDGE_SOLVE(system)[0]
    # zero up to rounding; its gradient is that of the solution, times the system
    product, _ = decay(x, beta[..., None] * k, k, log_decay, call._replace(return_state=False), scale=1.0)
    residual = q - product - ridge * x
    return RIDGE_SOLVE(system._replace(b=residual, solution=x))[0]


class System(NamedTuple):
    """Inputs of the op: a right side, and the system; only the right side has a gradient."""

    b: Tensor
    """Right sides [B T H K]; with a `solution`, what it leaves of them."""
    k: Tensor
    """Keys [B T H K]."""
    beta: Tensor
    """Weights of the keys' outer products [B T H]."""
    log_decay: Tensor
    """Natural log of the decays [B T H]."""
    ridge: Tensor
    """Diagonal that is added to G [H K]."""
    initial_state: Tensor | None
    """G before the first token [N H K K]; None means zero."""
    solution: Tensor | None
    """Solution, if it is known: it is returned, and only the gradient is computed."""
    cu_seqlens: Tensor | None
    """Boundaries of packed documents [N+1], with B = 1; None if the batch is not packed."""
    boundaries: Sequence[int] | None
    """Values of cu_seqlens; None where they are not known."""
    chunk: int
    """Tokens per chunk."""
    iterations: int
    """Largest number of iterations."""


class Chunks(NamedTuple):
    """Products with G_t of the tokens of several chunks; R rows are those of the batch and the heads."""

    k: Tensor
    """Keys [R n C K]."""
    pairs: Tensor
    """D: weights of pairs of tokens [R n C C]."""
    prefix: Tensor
    """p: decays since the start of the chunk [R n C 1]."""
    states: Tensor
    """G before each chunk [R n K K]."""
    ridge: Tensor
    """Diagonal that is added to G [R 1 1 K]."""

    def times(self, y: Tensor) -> Tensor:
        """Return the products of vectors y [R n C K] with their systems."""
        return self.prefix * (y @ self.states) + ((y @ self.k.mT) * self.pairs) @ self.k + self.ridge * y


def ridge_flops(paradigm: Paradigm, length: int, key_width: int, iterations: int, *, chunk_size: int) -> int:
    """Count the operations (FLOPs) of one head's matrix products in a forward pass.

    A ragged chunk counts whole, and all iterations count, although systems may be solved after fewer.
    """
    chunk = min({Paradigm.RECURRENT: 1, Paradigm.PARALLEL: length}.get(paradigm, chunk_size), length)
    tokens = -(-length // chunk) * chunk
    return 2 * tokens * key_width * (key_width + iterations * (key_width + 2 * chunk))


def _allocate(x: System) -> tuple[Tensor]:
    return (torch.empty_like(x.b, memory_format=torch.contiguous_format),)


def _forward(x: System) -> tuple[Tensor]:
    return (_solve(x, x.b) if x.solution is None else x.solution.clone(),)


def _backward(x: System, gradients: Gradients) -> dict[str, Tensor]:
    (d_solution,) = gradients.outputs
    return {} if d_solution is None else {"b": _solve(x, d_solution)}


def _solve(x: System, b: Tensor) -> Tensor:
    """Return the solutions of x's systems for the right sides b [B T H K]."""
    out = torch.empty_like(b, memory_format=torch.contiguous_format)
    for start, stop, chunks in _chunks(x):
        rows = _rows(b[:, start:stop], chunks.k.shape[2])
        # on other devices a check would wait for the device
        solved = conjugate_gradients(chunks.times, rows, x.iterations, stops=rows.device.type == "cpu")
        out[:, start:stop] = solved.flatten(1, 2)[:, : stop - start].unflatten(0, (b.shape[0], -1)).transpose(1, 2)
    return out


def _chunks(x: System) -> Iterator[tuple[int, int, Chunks]]:
    """Yield ranges of tokens of one document, with the systems of their chunks."""
    batch, length, heads, width = x.k.shape
    ridge = x.ridge.repeat(batch, 1)[:, None, None]
    for stretch in stretches(batch, length, x.cu_seqlens, x.boundaries):
        if x.initial_state is None:
            state = x.k.new_zeros(batch * heads, width, width)
        else:
            state = x.initial_state[stretch.rows].flatten(0, 1).to(x.k.dtype)
        chunk = max(min(x.chunk, stretch.stop - stretch.start), 1)
        size = chunk * max(GROUP_ELEMENTS // max(batch * heads * width * max(width, chunk), 1), 1)
        for start in range(stretch.start, stretch.stop, size):
            stop = min(start + size, stretch.stop)
            k, beta, a = (_rows(y[:, start:stop], chunk) for y in (x.k, x.beta[..., None], x.log_decay[..., None]))
            # sums of decays, never differences: a decay of 0 is allowed
            later = a.expand(*a.shape[:-1], chunk).tril(-1).cumsum(-2).exp().tril()
            prefix = a.cumsum(-2).exp()
            written = (k * (beta * later[..., -1, :, None])).mT @ k
            states = torch.empty_like(written)
            for number in range(states.shape[1]):
                states[:, number] = state
                state = torch.addcmul(written[:, number], prefix[:, number, -1:], state)
            yield start, stop, Chunks(k, later * beta.mT, prefix, states, ridge)


def _rows(y: Tensor, chunk: int) -> Tensor:
    """Return tokens [B T H *] as chunks of rows, [R n C *], padded with zeros."""
    rows = y.transpose(1, 2).flatten(0, 1)
    missing = -rows.shape[1] % chunk
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)).unflatten(1, (-1, chunk))


def conjugate_gradients(
    times: Callable[[Tensor], Tensor], b: Tensor, iterations: int, *, stops: bool = False
) -> Tensor:
    """Return solutions of symmetric systems, one for each right side in the last dimension of b.

    Args:
        times: computes the products of vectors, in the shape of b, with their systems.
        b: right sides; they are scaled to a largest element of 1 first.
        iterations: number of iterations.
        stops: True to stop when all systems are solved: when no residual is larger than the rounding of its right side.
            A solved system does not change while others go on, so its solution does not depend on theirs.
    """
    tiny = torch.finfo(b.dtype).tiny
    size = b.abs().amax(-1, keepdim=True).clamp(min=tiny)
    x = torch.zeros_like(b)
    residual = b / size
    direction = residual
    square = residual.square().sum(-1, keepdim=True)
    rounding = square * torch.finfo(b.dtype).eps ** 2
    for number in range(iterations):
        if stops and iterations > FEW and number % CHECK_EVERY == 0:
            solved = square <= rounding
            if solved.all():
                break
            square, residual, direction = (y.masked_fill(solved, 0) for y in (square, residual, direction))
        product = times(direction)
        # a solved token has a residual and a direction of 0, and takes no more steps
        step = square / (direction * product).sum(-1, keepdim=True).clamp(min=tiny)
        x = torch.addcmul(x, step, direction)
        residual = torch.addcmul(residual, step, product, value=-1)
        before, square = square, residual.square().sum(-1, keepdim=True)
        direction = torch.addcmul(residual, square / before.clamp(min=tiny), direction)
    return size * x


RIDGE_SOLVE = Op("ridge_solve", System, fake=_allocate, forward=_forward, backward=_backward, outputs=1)
