"""Fold-in of vectors and biases: trained numbers of new users and items, everything trained before frozen.

Where trained ids have table rows of their own, a mixture of others' rows is a poor vector for a new id. The new id gets a row of its own
instead, fitted to its interactions (:func:`fitted_users`, :func:`fitted_items`). A new item gets the bias of trained items of its degree
(:func:`mean_of_similar`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.sparse import csr_array
from scipy.special import logsumexp

# Trained items next in degree whose mean bias a new one gets. On MovieLens-1M an item's bias is off the mean over its neighbours in degree
# by .54 of the biases' standard deviation for 16 of them, .53 for 64 and for 256; 0 is off by 1.05.
SIMILAR_ITEMS = 64

# Users or items, drawn, that a fit weighs the scores of, and users whose scores' scale is estimated.
_DRAWN, _SCALED_USERS = 16_384, 512
# Steps of Adam, the first one's size as a share of a coordinate of trained vectors, and scores in memory at a time.
_STEPS, _STEP_SIZE, _SCORES = 40, 0.4, 2**22
# Keeps the exponential of a score finite.
_MOST_EXPONENT = 30.0
# Weight of the log-density of a vector under the distribution of the trained ones. Recall of trained users of MovieLens-100K, fitted again
# to a fifth, a half and all of their interactions, without this part and with weights of .1, .2 and 1. BPR: .234 .283 .324,
# .351 .372 .385, .353 .382 .391, .313 .354 .385. BSL: .309 .359 .402, .333 .360 .405, .342 .354 .410, .325 .353 .394.
_PRIOR = 0.2
# The first places of a ranking, which new items share with trained ones, and users and new items, drawn, whose places are counted.
PLACES, _JUDGES, _PLACED_ITEMS = 20, 2_000, 128
# Halvings of the range in which the factor of the exposure is looked for: a fourth to four times.
_HALVINGS, _MOST_LOG_FACTOR = 8, float(np.log(4))


def score_scale(
    graph: csr_array,
    user_vectors: NDArray[np.float32],
    item_vectors: NDArray[np.float32],
    item_bias: NDArray[np.float32] | None,
) -> float:
    """The factor of the scores at which their softmax over items is likeliest to give the interactions of trained users.

    Args:
        graph: interactions, shape (n_users, n_items); it holds one or more.
        user_vectors, item_vectors: float32, shapes (n_users, dim) and (n_items, dim).
        item_bias: float32, shape (n_items,); None: zeros.

    Returns: a positive number, estimated on users that are drawn with a fixed seed.
    """
    rng = np.random.default_rng(0)
    users = _drawn(np.flatnonzero(np.diff(graph.indptr)), _SCALED_USERS, rng)
    items = _drawn(np.arange(graph.shape[1]), _DRAWN, rng)
    bias = np.zeros(graph.shape[1], np.float32) if item_bias is None else item_bias
    scores = user_vectors[users] @ item_vectors[items].T + bias[items]
    rows, columns = csr_array(graph[users]).tocoo().coords
    of_taken = np.einsum("nd,nd->n", user_vectors[users[rows]], item_vectors[columns]) + bias[columns]

    def loss(log_scale: float) -> float:
        scale = np.exp(log_scale)
        return float((logsumexp(scale * scores, axis=1)[rows] - scale * of_taken).mean())

    spread = float(scores.std()) or 1.0
    bounds = np.log(0.01 / spread), np.log(100 / spread)
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def fitted_users(
    edges: csr_array,
    trained: NDArray[np.float32],
    item_vectors: NDArray[np.float32],
    item_bias: NDArray[np.float32] | None,
    scale: float,
    *,
    unit: bool = False,
) -> NDArray[np.float32]:
    """Vectors of new users for frozen items: the likeliest ones where interactions are draws of the softmax of a user's scores over items.

    A user with items S gets the vector p that minimises ``sum_S (log sum_j exp(a (p q_j + b_j)) - a (p q_i + b_i))``, a being the scale,
    minus the log-density of p under a normal distribution with the mean, and the mean variance, of the trained users' coordinates.

    Args:
        edges: interactions of each new user, shape (n, n_items); weights do not count.
        trained: vectors of trained users, float32, shape (n_users, dim).
        item_vectors: float32, shape (n_items, dim).
        item_bias: float32, shape (n_items,); None: zeros.
        scale: of the scores (:func:`score_scale`).
        unit: vectors count by their direction alone, as in models of cosines.

    Returns: float32, shape (n, dim); of length 1 with ``unit``.
    """
    drawn = _drawn(np.arange(len(item_vectors)), _DRAWN, np.random.default_rng(0))
    items, bias = scale * item_vectors[drawn], np.zeros(len(drawn)) if item_bias is None else scale * item_bias[drawn]
    counts = np.diff(edges.indptr).astype(np.float32)

    def rates(vectors: NDArray[np.float32], part: slice) -> NDArray[np.float32]:
        scores = vectors @ items.T + bias.astype(np.float32)
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        return scores * (counts[part] / scores.sum(axis=1))[:, None]

    return _fitted(scale * (_ones(edges) @ item_vectors), items, rates, trained, unit)


def fitted_items(
    edges: csr_array,
    graph: csr_array,
    trained: NDArray[np.float32],
    user_vectors: NDArray[np.float32],
    item_bias: NDArray[np.float32] | None,
    exposure: NDArray[np.float64],
    scale: float,
    *,
    own_bias: NDArray[np.float32],
    unit: bool = False,
) -> NDArray[np.float32]:
    """Vectors of new items for frozen users: the likeliest ones where interactions are draws of the softmax of a user's scores over items.

    A user with n interactions then takes up item i at the rate ``f n exp(a s_i) / sum_j exp(a s_j)``, j over trained items, s being the
    user's scores and a the scale. The vector of a new item minimises the sum of all users' rates, minus ``a s_i`` of the users who
    interacted: the negative log-likelihood of a Poisson regression. The distribution of the vectors is as in :func:`fitted_users`. The
    factor f is 1 where scores are probabilities. Here it is the one with which new items take as many places among the first
    :data:`PLACES` of users, who have not had them, as trained items of their degrees do.

    Args:
        edges: interactions of each new item, shape (n, n_users); weights do not count.
        graph: interactions of the trained users with the trained items, shape (n_trained, n_items).
        trained: vectors of trained items, float32, shape (n_items, dim).
        user_vectors: float32, shape (n_users, dim), the trained users first.
        item_bias: of the trained items, float32, shape (n_items,); None: zeros.
        exposure: interactions of every user with trained and new items, shape (n_users,).
        scale: of the scores (:func:`score_scale`).
        own_bias: of the new items, float32, shape (n,).
        unit: vectors count by their direction alone, as in models of cosines.

    Returns: float32, shape (n, dim); of length 1 with ``unit``.
    """
    drawn = _drawn(np.flatnonzero(exposure), _DRAWN, np.random.default_rng(0))
    users, pulls = scale * user_vectors[drawn], scale * (_ones(edges) @ user_vectors)
    offsets = np.log(exposure[drawn] * (np.count_nonzero(exposure) / len(drawn)))
    offsets -= _log_totals(users, trained, None if item_bias is None else scale * item_bias)

    def fit(items: NDArray[np.int64], log_factor: float) -> NDArray[np.float32]:
        def rates(vectors: NDArray[np.float32], part: slice) -> NDArray[np.float32]:
            scores = vectors @ users.T + (offsets + log_factor).astype(np.float32) + scale * own_bias[items][part, None]
            return np.exp(np.minimum(scores, _MOST_EXPONENT))

        return _fitted(pulls[items], users, rates, trained, unit)

    everyone = np.arange(len(pulls))
    some = _drawn(everyone, _PLACED_ITEMS, np.random.default_rng(0))
    if not len(some):
        return fit(everyone, 0.0)
    contest = _Contest.of(graph, trained, user_vectors, item_bias, edges[some])
    log_factor = _least(lambda f: contest.too_many(fit(some, f), own_bias[some]), _MOST_LOG_FACTOR)
    return fit(everyone, log_factor)


def fair_bias(
    edges: csr_array,
    graph: csr_array,
    item_vectors: NDArray[np.float32],
    user_vectors: NDArray[np.float32],
    item_bias: NDArray[np.float32],
    new_vectors: NDArray[np.float32],
    new_bias: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Biases of new items, all shifted by one number, with which they take as many places among the first :data:`PLACES` of users, who
    have not had them, as trained items of their degrees do.

    Args:
        edges, graph, user_vectors, item_bias: as for :func:`fitted_items`.
        item_vectors, new_vectors: of trained and new items, float32, shapes (n_items, dim) and (n, dim).
        new_bias: before the shift, float32, shape (n,).

    Returns: float32, shape (n,).
    """
    some = _drawn(np.arange(len(new_bias)), _PLACED_ITEMS, np.random.default_rng(0))
    if not len(some):
        return new_bias
    contest = _Contest.of(graph, item_vectors, user_vectors, item_bias, edges[some])
    spread = float(contest.scores(new_vectors[some], new_bias[some]).std()) or 1.0
    lowered = _least(lambda down: contest.too_many(new_vectors[some], new_bias[some] - down), 4 * spread)
    return (new_bias - lowered).astype(np.float32)


def _least(is_too_little: Callable[[float], bool], most: float) -> float:
    """The least number from -most to most that is not too little, by bisection."""
    low, high = -most, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_too_little(middle) else (low, middle)
    return high


@dataclass(frozen=True, eq=False)
class _Contest:
    """Places of users' rankings that new items may take.

    Args:
        users: vectors of some trained users, shape (n_judges, dim).
        thresholds: score of the last of each one's first PLACES trained items, without those that it had; shape (n_judges,).
        is_new: whether a user has not had a new item, shape (n, n_judges).
        wanted: how many places trained items of the new ones' degrees take.
    """

    users: NDArray[np.float32]
    thresholds: NDArray[np.float32]
    is_new: NDArray[np.bool_]
    wanted: float

    @classmethod
    def of(
        cls,
        graph: csr_array,
        items: NDArray[np.float32],
        users: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
        edges: csr_array,
    ) -> _Contest:
        """Of trained users and items, and the interactions of new items, shape (n, n_users)."""
        judges = _drawn(np.arange(graph.shape[0]), _JUDGES, np.random.default_rng(0))
        k, thresholds = min(PLACES, len(items)), np.empty(len(judges), np.float32)
        taken = np.zeros(len(items), np.float32)
        at_once = max(1, _SCORES // len(items))
        for begin in range(0, len(judges), at_once):
            part = slice(begin, begin + at_once)
            scores = users[judges[part]] @ items.T + (0 if bias is None else bias)
            scores[csr_array(graph[judges[part]]).tocoo().coords] = -np.inf
            first = np.argpartition(-scores, k - 1, axis=1)[:, :k]
            best = np.take_along_axis(scores, first, axis=1)
            thresholds[part] = best.min(axis=1)
            taken += np.bincount(first[np.isfinite(best)], minlength=len(items))
        degrees = np.bincount(graph.indices, minlength=len(items)).astype(np.float64)
        wanted = mean_of_similar(degrees, taken, np.diff(edges.indptr).astype(np.float64)).sum()
        return cls(users[judges], thresholds, csr_array(edges[:, judges]).toarray() == 0, float(wanted))

    def scores(self, items: NDArray[np.float32], bias: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of new items, shape (n, n_judges)."""
        return items @ self.users.T + bias[:, None]

    def too_many(self, items: NDArray[np.float32], bias: NDArray[np.float32]) -> bool:
        """Whether new items with these vectors and biases take more places than they should."""
        return int(np.count_nonzero((self.scores(items, bias) > self.thresholds) & self.is_new)) > self.wanted


def _fitted(
    pulls: NDArray[np.float32],
    others: NDArray[np.float32],
    rates: Callable[[NDArray[np.float32], slice], NDArray[np.float32]],
    trained: NDArray[np.float32],
    unit: bool,
) -> NDArray[np.float32]:
    """Vectors v at which ``rates(v) @ others`` is about ``pulls``, by Adam from the mean of the trained vectors on.

    Args:
        pulls: shape (n, dim).
        others: vectors of the other side, shape (n_drawn, dim).
        rates: of rows of vectors, and which rows they are; shape (n_rows, n_drawn).
        trained: vectors of the same side, whose distribution is that of the new ones.
    """
    mean = trained.mean(axis=0)
    spread = (float(((trained - mean) ** 2).mean()) or 1.0) / _PRIOR
    step = _STEP_SIZE * np.sqrt(float((trained**2).mean()) or 1.0)
    fitted = np.tile(mean, (len(pulls), 1))
    at_once = max(1, _SCORES // max(1, len(others)))
    for begin in range(0, len(fitted), at_once):
        part = slice(begin, begin + at_once)
        vectors = _normalized(fitted[part]) if unit else fitted[part]
        first, second = np.zeros_like(vectors), np.zeros_like(vectors)
        for number in range(1, _STEPS + 1):
            gradient = rates(vectors, part) @ others - pulls[part] + (vectors - mean) / spread
            if unit:
                # The part along the vector would only change its length.
                gradient -= (gradient * vectors).sum(axis=1, keepdims=True) * vectors
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            size = step * (1 - (number - 1) / _STEPS) / (1 - 0.9**number)
            vectors = vectors - size * first / (np.sqrt(second / (1 - 0.999**number)) + 1e-12)
            vectors = _normalized(vectors) if unit else vectors
        fitted[part] = vectors
    return fitted.astype(np.float32)


def _normalized(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _ones(edges: csr_array) -> csr_array:
    """The same interactions, each of weight 1."""
    return csr_array((np.ones(edges.nnz, np.float32), edges.indices, edges.indptr), shape=edges.shape)


def _drawn(ids: NDArray[np.int64], most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """At most so many of the ids, in ascending order."""
    return ids if len(ids) <= most else np.sort(rng.choice(ids, most, replace=False))


def _log_totals(
    users: NDArray[np.float32], items: NDArray[np.float32], bias: NDArray[np.float32] | None
) -> NDArray[np.float64]:
    """``log sum_j exp(score_j)`` over items of every user, shape (n_users,); of many items over a drawn part, in proportion."""
    drawn = _drawn(np.arange(len(items)), _DRAWN, np.random.default_rng(0))
    of_drawn = 0.0 if bias is None else bias[drawn]
    chunk = max(1, _SCORES // len(drawn))
    parts = [
        logsumexp(users[first : first + chunk] @ items[drawn].T + of_drawn, axis=1)
        for first in range(0, len(users), chunk)
    ]
    return np.concatenate(parts) + np.log(len(items) / len(drawn))


def mean_of_similar(
    degrees: NDArray[np.float64], values: NDArray[np.float32], new_degrees: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Values of new items, such as their biases: the mean over the SIMILAR_ITEMS trained items next to them in degree.

    A trained bias is mostly popularity, which the degree measures. A new log is shorter than the training log, and a new item's degree
    therefore rather low: no item is ranked above what its interactions show.

    Args:
        degrees: of the trained items, shape (n_items,).
        values: of the trained items, float32, shape (n_items,).
        new_degrees: shape (n_new,).

    Returns: float32, shape (n_new,).
    """
    order = np.argsort(degrees, kind="stable")
    n_similar = min(SIMILAR_ITEMS, len(order))
    sums = np.concatenate([[0.0], np.cumsum(values[order], dtype=np.float64)])
    below, above = (np.searchsorted(degrees[order], new_degrees, side) for side in ("left", "right"))
    starts = np.clip((below + above - n_similar) // 2, 0, len(order) - n_similar)
    return ((sums[starts + n_similar] - sums[starts]) / n_similar).astype(np.float32)
