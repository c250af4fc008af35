"""LightGCN over bucket embeddings: vectors averaged over the layers of a linear graph convolution (He et al., SIGIR 2020).

With the normalised biadjacency ``A = K^-1/2 B D^-1/2`` a layer is ``P <- A Q, Q <- A^T P`` (eq. 3); the final vectors are the mean of
layers 0 to ``n_layers`` (eq. 4, with equal weights), and the score is their inner product, or with ``cosine`` their cosine, plus the item's
own bias, if it has one.

Several workers either propagate the same, each for itself, or share the rows of the graph (:meth:`LightGCN.shard`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit, prange
from scipy.sparse import csr_array
from torch import Tensor, nn

from graphhash.errors import ArgumentError
from graphhash.maps.bucket_map import BucketMap
from graphhash.models.mf import (
    INITIAL_STD,
    AllItemScores,
    PairScores,
    VectorModel,
    embeddings,
    product_differences,
    product_of_all_items,
    product_of_pairs,
)
from graphhash.nn.table_reads import threads_for
from graphhash.nn.workers import Workers


class LightGCN(VectorModel):
    """Bucket embeddings behind ``n_layers`` of propagation over the training graph.

    Args:
        users, items: bucket maps.
        dim: length of the vectors.
        graph: training interactions, shape (n_users, n_items); their weights count.
        n_layers: 0 is matrix factorisation.
        item_bias: train a scalar per item.
        seed: draws the initial values.
        cosine: as in :class:`VectorModel`.
        std: standard deviation of the initial values.

    Raises:
        ArgumentError: the graph is not n_users x n_items, or ``n_layers`` is negative.
    """

    indptr_of_users: Tensor
    indices_of_users: Tensor

    def __init__(
        self,
        users: BucketMap,
        items: BucketMap,
        dim: int,
        *,
        graph: csr_array,
        n_layers: int = 2,
        item_bias: bool,
        seed: int,
        cosine: bool = False,
        std: float = INITIAL_STD,
    ):
        super().__init__()
        self.cosine = cosine
        if graph.shape != (users.n_ids, items.n_ids):
            raise ArgumentError(
                f"the graph is {graph.shape[0]} x {graph.shape[1]}, the maps have {users.n_ids} x {items.n_ids} ids"
            )
        if n_layers < 0:
            raise ArgumentError(f"n_layers must not be negative, got {n_layers}")
        self.user_embedding, self.item_embedding = embeddings(users, items, dim, seed, std)
        self.item_bias = nn.Parameter(torch.zeros(items.n_ids)) if item_bias else None
        self.n_layers = n_layers
        normalised = normalised_graph(graph)
        transposed = normalised.T.tocsr()
        transposed.sort_indices()
        # The graph is data of the run, not a weight: it is neither saved with them nor trained.
        for side, matrix in (("of_users", normalised), ("of_items", transposed)):
            for name, array in (("indptr", matrix.indptr), ("indices", matrix.indices)):
                self.register_buffer(f"{name}_{side}", torch.from_numpy(array.astype(np.int64)), persistent=False)
            self.register_buffer(f"values_{side}", torch.from_numpy(matrix.data.astype(np.float32)), persistent=False)
        self._shards: _Shards | None = None

    def shard(self, workers: Workers) -> None:
        """Keep of the graph the rows that this worker multiplies, as many edges on each; vectors are then gathered from all workers.

        A layer costs each side an all-gather of its vectors and, backwards, an all-reduce of their gradients. The vectors have the bits
        of a model that is not sharded. From here on all workers have to call the model together.
        """
        bounds = {}
        for side in ("users", "items"):
            indptr = getattr(self, f"indptr_of_{side}")
            targets = torch.linspace(0, float(indptr[-1]), workers.size + 1, dtype=torch.float64).long()[1:-1]
            inner = torch.searchsorted(indptr, targets.to(indptr.device)).tolist()
            bounds[side] = [0, *inner, len(indptr) - 1]
            first, last = bounds[side][workers.rank : workers.rank + 2]
            edges = slice(int(indptr[first]), int(indptr[last]))
            setattr(self, f"indptr_of_{side}", indptr[first : last + 1] - indptr[first])
            for name in ("indices", "values"):
                setattr(self, f"{name}_of_{side}", getattr(self, f"{name}_of_{side}")[edges].clone())
        self._shards = _Shards(workers, bounds["users"], bounds["items"])

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Propagated vectors of all users and items, of length 1 with ``cosine``: (n_users, dim) and (n_items, dim)."""
        users, items = self._propagated()
        return self.scaled(users), self.scaled(items)

    def _propagated(self) -> tuple[Tensor, Tensor]:
        to_users = (self.indptr_of_users, self.indices_of_users, self.values_of_users)
        to_items = (self.indptr_of_items, self.indices_of_items, self.values_of_items)
        users, items = self.user_embedding.all(), self.item_embedding.all()
        user_sum, item_sum = users, items
        shards, turned = self._shards, self._shards and self._shards.turned()
        for _ in range(self.n_layers):
            users, items = (
                _Propagate.apply(items, shards, *to_users, *to_items),
                _Propagate.apply(users, turned, *to_items, *to_users),
            )
            user_sum, item_sum = user_sum + users, item_sum + items
        return user_sum / (self.n_layers + 1), item_sum / (self.n_layers + 1)

    def pair_vectors(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Propagated vectors of some users and some items; the whole graph is propagated for it."""
        user_vectors, item_vectors = self.vectors()
        return user_vectors.index_select(0, users), item_vectors.index_select(0, items)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of user-item pairs: rows of shape (n,) each in, shape (n,) out."""
        return self.all_pairs()(users, items)

    def score_differences(
        self, users: Tensor, positives: Tensor, negatives: Tensor, *, read_all: bool = False
    ) -> Tensor:
        """Pairwise score differences as in :class:`RetrievalModel`, shape (n,); the graph is propagated once for both."""
        return product_differences(*self.vectors(), self.item_bias, users, positives, negatives)

    def all_pairs(self) -> PairScores:
        """Scores of many pairs, the graph propagated once for all of them."""
        return product_of_pairs(*self.vectors(), self.item_bias)

    def score_all_items(self) -> AllItemScores:
        """Scores of every item for each user, shape (batch, n_items). The OOV user, row ``n_users``, has its layer-0 vector alone."""
        user_vectors, item_vectors = self.vectors_with_oov()
        return lambda users: product_of_all_items(user_vectors[users], item_vectors[:-1], self.item_bias)

    def vectors_with_oov(self) -> list[Tensor]:
        """:meth:`vectors` with the OOV vector last: (n_users + 1, dim) and (n_items + 1, dim). Nothing is propagated to it."""
        sides = zip(self.vectors(), (self.user_embedding, self.item_embedding), strict=True)
        return [
            torch.cat(
                [
                    vectors,
                    self.scaled(
                        embedding(torch.tensor([embedding.n_ids], device=embedding.device)) / (self.n_layers + 1)
                    ),
                ]
            )
            for vectors, embedding in sides
        ]


def normalised_graph(graph: csr_array) -> csr_array:
    """``K^-1/2 B D^-1/2`` with the weighted degrees K of users and D of items; rows and columns without weight stay empty."""
    user_degrees, item_degrees = (np.asarray(graph.sum(axis=axis), np.float64).ravel() for axis in (1, 0))
    rows = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    values = graph.data / np.sqrt(user_degrees[rows] * item_degrees[graph.indices])
    return csr_array((values, graph.indices, graph.indptr), shape=graph.shape)


@dataclass(frozen=True)
class _Shards:
    """Which rows of a matrix, and of its transpose, each worker multiplies: ``bounds[rank]`` to ``bounds[rank + 1]``."""

    workers: Workers
    bounds: list[int]
    back_bounds: list[int]

    def turned(self) -> _Shards:
        return _Shards(self.workers, self.back_bounds, self.bounds)


class _Propagate(torch.autograd.Function):
    """``matrix @ vectors``; the gradient is ``matrix.T @ gradient``, for which the transposed matrix is given in CSR as well.

    With shards, both matrices are the own rows. Each worker's gradient is then a part of the whole, and what it passes on is one too:
    the sum of all parts, propagated to the own rows, and zero elsewhere.
    """

    @staticmethod
    def forward(ctx, vectors, shards, indptr, indices, values, back_indptr, back_indices, back_values):
        ctx.save_for_backward(back_indptr, back_indices, back_values)
        ctx.shards, ctx.n_vectors = shards, len(vectors)
        product = _multiply(indptr, indices, values, vectors)
        if shards is None:
            return product
        return shards.workers.gather_rows(product, np.diff(shards.bounds).tolist())[0]

    @staticmethod
    def backward(ctx, gradient):
        shards = ctx.shards
        if shards is not None:
            gradient = shards.workers.sum(gradient.clone(memory_format=torch.contiguous_format))
        indptr, indices, values = ctx.saved_tensors
        product = _multiply(indptr, indices, values, gradient)
        if shards is not None:
            first, last = shards.back_bounds[shards.workers.rank : shards.workers.rank + 2]
            whole = product.new_zeros(ctx.n_vectors, product.shape[1])
            whole[first:last] = product
            product = whole
        return product, None, None, None, None, None, None, None


def _multiply(indptr: Tensor, indices: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    if vectors.device.type != "cpu":
        return _sparse_product(indptr, indices, values, vectors)
    product = torch.empty(len(indptr) - 1, vectors.shape[1])
    # Each row is summed in one order, for any number of threads.
    with threads_for(len(indices) * vectors.shape[1]):
        _multiply_rows(
            indptr.numpy(), indices.numpy(), values.numpy(), vectors.detach().contiguous().numpy(), product.numpy()
        )
    return product


def _sparse_product(indptr: Tensor, indices: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """The product by PyTorch's operations, in the type of ``values``, also where autocast would take a smaller one: its backward pass
    is not in autocast and would meet two types."""
    shape = (len(indptr) - 1, len(vectors))
    with torch.autocast(vectors.device.type, enabled=False):
        matrix = torch.sparse_csr_tensor(indptr, indices, values, shape, check_invariants=False)
        return matrix @ vectors.to(values.dtype)


@njit(cache=True, parallel=True)
def _multiply_rows(indptr, indices, values, vectors, product):
    dim = vectors.shape[1]
    for row in prange(len(product)):
        target = product[row]
        target[:] = 0
        for edge in range(indptr[row], indptr[row + 1]):
            source, value = vectors[indices[edge]], values[edge]
            for d in range(dim):
                target[d] += value * source[d]
