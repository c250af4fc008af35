"""Retrieval models over bucket embeddings: their common calls, and matrix factorisation.

A model is a pair of :class:`CompressedEmbedding` and a way to score. All models, NeuMF and LightGCN among them, have the same methods, so
training, evaluation and export do not depend on the model, and no model depends on how its bucket maps were made:

    model(users, items)               scores of pairs                     (n,), (n,) -> (n,)
    model.score_differences(u, i, j)  score of (u, i) less that of (u, j)  (n,), (n,), (n,) -> (n,)
    model.all_pairs()                 scores of many pairs of all ids     a function (users, items) -> (n,)
    model.score_all_items()           scores of every item                a function users -> (batch, n_items)

and those whose score is an inner product, for losses over vectors:

    model.vectors()                   of every id                         (n_users, dim), (n_items, dim)
    model.pair_vectors(u, i)          of users and of items               (n, dim), (m, dim)

With ``cosine`` these vectors have length 1, so that the inner product is the cosine.

Without an item bias, items of one bucket tie (unless the map mixes several buckets).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.embedding_spec import BUCKET, EmbeddingSpec
from graphhash.nn import _kernels
from graphhash.nn.compressed import CompressedEmbedding
from graphhash.nn.kinds import make_embeddings
from graphhash.nn.table_reads import gradient_slices, threads_for

# Directions that training does not use keep their initial noise where weight decay is small. On Gowalla's full table 0.01
# gives a tenth more validation recall than 0.1.
INITIAL_STD = 0.01
# Least length by which a vector is divided: vectors of zeros stay zeros. Exported graphs have the same.
LEAST_LENGTH = 1e-12

PairScores = Callable[[Tensor, Tensor], Tensor]
AllItemScores = Callable[[Tensor], Tensor]


class RetrievalModel(nn.Module, ABC):
    """What training, evaluation and export need of a model; see the top of this module."""

    user_embedding: CompressedEmbedding
    item_embedding: CompressedEmbedding
    item_bias: nn.Parameter | None

    @abstractmethod
    def score_differences(
        self, users: Tensor, positives: Tensor, negatives: Tensor, *, read_all: bool = False
    ) -> Tensor:
        """Pairwise score differences ``model(users, positives) - model(users, negatives)``.

        Args:
            users, positives, negatives: rows, int64, shape (n,) each.
            read_all: read the vector of every id from the table once, which pays where there are many triples.

        Returns: float32, shape (n,).
        """

    @abstractmethod
    def all_pairs(self) -> PairScores:
        """Scores as the model gives them, for many pairs of all ids: every id's vector is read from the table once."""

    @abstractmethod
    def score_all_items(self) -> AllItemScores:
        """Scores of all items for some users: rows of shape (n,) in, shape (n, n_items) out."""


class VectorModel(RetrievalModel):
    """A model whose scores are inner products of one vector per user and one per item, plus a bias per item.

    Attributes:
        cosine: vectors are scaled to length 1 before they are multiplied.
    """

    cosine: bool

    @abstractmethod
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Vectors of all known users and items, of length 1 with ``cosine``: (n_users, dim) and (n_items, dim)."""

    @abstractmethod
    def pair_vectors(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of some users and some items, as in :meth:`vectors`: rows of shapes (n,) and (m,) in, (n, dim) and (m, dim) out."""

    def scaled(self, vectors: Tensor) -> Tensor:
        """``vectors``, of shape (n, dim), as they are multiplied: of length 1 with ``cosine``; those of zeros stay zeros."""
        return unit_vectors(vectors) if self.cosine else vectors


class MatrixFactorization(VectorModel):
    """``score(user, item) = <p_user, q_item> + b_item`` (Koren et al., Computer 2009, without user terms).

    With ``cosine``, ``score(user, item) = <p_user, q_item> / (|p_user| |q_item|) + b_item``.

    Args:
        users: bucket map of the users.
        items: bucket map of the items.
        dim: length of the vectors.
        item_bias: train a scalar per item.
        seed: draws the initial values.
        embedding: kind of the embeddings; read through the maps alone by default.
        cosine: as in :class:`VectorModel`.
        std: standard deviation of the initial values.
    """

    def __init__(
        self,
        users: BucketMap,
        items: BucketMap,
        dim: int,
        *,
        item_bias: bool,
        seed: int,
        embedding: EmbeddingSpec = BUCKET,
        cosine: bool = False,
        std: float = INITIAL_STD,
    ):
        super().__init__()
        self.cosine, self.embedding_spec = cosine, embedding
        self.user_embedding, self.item_embedding = embeddings(users, items, dim, seed, std, spec=embedding)
        self.item_bias = nn.Parameter(torch.zeros(items.n_ids)) if item_bias else None

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Vectors of all known users and items, of length 1 with ``cosine``: (n_users, dim) and (n_items, dim)."""
        return self.scaled(self.user_embedding.all()), self.scaled(self.item_embedding.all())

    def pair_vectors(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of some users and some items, as in :meth:`vectors`: rows of shapes (n,) and (m,) in, (n, dim) and (m, dim) out."""
        user_vectors, item_vectors = self.user_embedding.read_with(users, self.item_embedding, items)
        return self.scaled(user_vectors), self.scaled(item_vectors)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of user-item pairs: rows of shape (n,) each in, shape (n,) out."""
        scores = (self.scaled(self.user_embedding(users)) * self.scaled(self.item_embedding(items))).sum(-1)
        return scores if self.item_bias is None else scores + self.item_bias.index_select(0, items)

    def score_differences(
        self, users: Tensor, positives: Tensor, negatives: Tensor, *, read_all: bool = False
    ) -> Tensor:
        """Pairwise score differences as in :class:`RetrievalModel`; the vectors of users are read once for both items."""
        if read_all:
            return product_differences(*self.vectors(), self.item_bias, users, positives, negatives)
        n = len(users)
        places = torch.arange(2 * n, device=users.device)
        items = torch.cat([positives, negatives])
        differences = dot_differences(*self.pair_vectors(users, items), places[:n], places[:n], places[n:])
        return differences if self.item_bias is None else differences + difference(self.item_bias, positives, negatives)

    def all_pairs(self) -> PairScores:
        """Scores as :meth:`forward` gives them, for many pairs of all ids: every id's vector is read from the table once."""
        return product_of_pairs(*self.vectors(), self.item_bias)

    def score_all_items(self) -> AllItemScores:
        """Scores of every item for each user: rows (batch,) in, shape (batch, n_items) out. Row ``n_users`` is the OOV user."""
        item_vectors = self.scaled(self.item_embedding.all())
        return lambda users: product_of_all_items(self.scaled(self.user_embedding(users)), item_vectors, self.item_bias)


def embeddings(
    users: BucketMap, items: BucketMap, dim: int, seed: int, std: float = INITIAL_STD, *, spec: EmbeddingSpec = BUCKET
) -> tuple[CompressedEmbedding, CompressedEmbedding]:
    """Embeddings of users and items, of one table where their maps share it; the seed draws the users' first.

    Args:
        std: standard deviation of the initial values.
        spec: their kind.

    Raises:
        ArgumentError: one map shares its table and the other does not, or both have the same OOV row.
    """
    return make_embeddings(users, items, dim, spec, std=std, seed=seed)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Vectors scaled to length 1, shape (n, dim); those of zeros stay zeros."""
    if vectors.device.type == "cpu" and vectors.dtype == torch.float32:
        return _CpuUnit.apply(vectors)
    return functional.normalize(vectors, dim=-1, eps=LEAST_LENGTH)


class _CpuUnit(torch.autograd.Function):
    """:func:`unit_vectors` on a CPU in one pass over the vectors, and one over their gradients."""

    @staticmethod
    def forward(ctx, vectors):
        units, lengths = torch.empty(vectors.shape), torch.empty(len(vectors))
        with threads_for(vectors.numel()):
            _kernels.unit_rows(vectors.detach().contiguous().numpy(), LEAST_LENGTH, units.numpy(), lengths.numpy())
        ctx.save_for_backward(units, lengths)
        return units

    @staticmethod
    def backward(ctx, gradients):
        units, lengths = ctx.saved_tensors
        vector_gradients = torch.empty(units.shape)
        with threads_for(units.numel()):
            _kernels.unit_row_gradients(
                units.detach().numpy(), lengths.numpy(), gradients.contiguous().numpy(), vector_gradients.numpy()
            )
        return vector_gradients


def product_of_pairs(user_vectors: Tensor, item_vectors: Tensor, item_bias: Tensor | None) -> PairScores:
    """The function (users, items) -> ``<user_vectors[users], item_vectors[items]> + item_bias[items]``."""

    def scores(users: Tensor, items: Tensor) -> Tensor:
        products = dot_pairs(user_vectors, item_vectors, users, items)
        return products if item_bias is None else products + item_bias.index_select(0, items)

    return scores


def product_differences(
    user_vectors: Tensor,
    item_vectors: Tensor,
    item_bias: Tensor | None,
    users: Tensor,
    positives: Tensor,
    negatives: Tensor,
) -> Tensor:
    """``product_of_pairs`` of (users, positives) less that of (users, negatives), shape (n,)."""
    differences = dot_differences(user_vectors, item_vectors, users, positives, negatives)
    return differences if item_bias is None else differences + difference(item_bias, positives, negatives)


def difference(values: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """``values[positives] - values[negatives]``, shape (n,)."""
    # index_select, because several threads add up the gradient of values[positives] in any order.
    return values.index_select(0, positives) - values.index_select(0, negatives)


def product_of_all_items(user_vectors: Tensor, item_vectors: Tensor, item_bias: Tensor | None) -> Tensor:
    """``user_vectors @ item_vectors.T + item_bias``, shape (batch, n_items)."""
    if item_bias is None:
        return user_vectors @ item_vectors.T
    return torch.addmm(item_bias, user_vectors, item_vectors.T)


def dot_pairs(left: Tensor, right: Tensor, left_rows: Tensor, right_rows: Tensor) -> Tensor:
    """``<left[left_rows[e]], right[right_rows[e]]>`` for every pair e.

    Args:
        left, right: float32, shapes (n_left, dim) and (n_right, dim).
        left_rows, right_rows: int64, shape (n_pairs,).

    Returns: shape (n_pairs,).
    """
    if left.device.type == "cpu" and left.dtype == right.dtype == torch.float32:
        return _CpuDotPairs.apply(left, right, left_rows, right_rows)
    return (left.index_select(0, left_rows) * right.index_select(0, right_rows)).sum(-1)


class _CpuDotPairs(torch.autograd.Function):
    """:func:`dot_pairs` on a CPU, without the (n_pairs, dim) intermediate arrays that make torch's gathers slow there."""

    @staticmethod
    def forward(ctx, left, right, left_rows, right_rows):
        ctx.save_for_backward(left, right, left_rows, right_rows)
        products = torch.empty(len(left_rows))
        with threads_for(len(left_rows) * left.shape[1]):
            _kernels.dot_pairs(
                left.detach().numpy(), right.detach().numpy(), left_rows.numpy(), right_rows.numpy(), products.numpy()
            )
        return products

    @staticmethod
    def backward(ctx, gradients):
        left, right, left_rows, right_rows = ctx.saved_tensors
        left_gradient, right_gradient = torch.zeros_like(left), torch.zeros_like(right)
        with threads_for(len(left_rows) * left.shape[1]):
            _kernels.add_dot_gradients(
                left.numpy(), right.numpy(), left_rows.numpy(), right_rows.numpy(), gradients.contiguous().numpy(),
                gradient_slices(left.shape[1]), left_gradient.numpy(), right_gradient.numpy(),
            )  # fmt: skip
        return left_gradient, right_gradient, None, None


def dot_differences(
    left: Tensor, right: Tensor, left_rows: Tensor, positive_rows: Tensor, negative_rows: Tensor
) -> Tensor:
    """``<left[left_rows[e]], right[positive_rows[e]] - right[negative_rows[e]]>`` for every triple e; types as in :func:`dot_pairs`."""
    if left.device.type == "cpu" and left.dtype == right.dtype == torch.float32:
        return _CpuDotDifferences.apply(left, right, left_rows, positive_rows, negative_rows)
    differences = right.index_select(0, positive_rows) - right.index_select(0, negative_rows)
    return (left.index_select(0, left_rows) * differences).sum(-1)


class _CpuDotDifferences(torch.autograd.Function):
    """:func:`dot_differences` on a CPU: every vector is read once, where two products would read the left ones twice."""

    @staticmethod
    def forward(ctx, left, right, *rows):
        ctx.save_for_backward(left, right, *rows)
        differences = torch.empty(len(rows[0]))
        with threads_for(len(differences) * left.shape[1]):
            _kernels.dot_differences(
                left.detach().numpy(), right.detach().numpy(), *(r.numpy() for r in rows), differences.numpy()
            )
        return differences

    @staticmethod
    def backward(ctx, gradients):
        left, right, *rows = ctx.saved_tensors
        left_gradient, right_gradient = torch.zeros_like(left), torch.zeros_like(right)
        with threads_for(len(gradients) * left.shape[1]):
            _kernels.add_dot_difference_gradients(
                left.numpy(), right.numpy(), *(r.numpy() for r in rows), gradients.contiguous().numpy(),
                gradient_slices(left.shape[1]), left_gradient.numpy(), right_gradient.numpy(),
            )  # fmt: skip
        return left_gradient, right_gradient, None, None, None
