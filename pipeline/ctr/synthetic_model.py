"""The stated model of a synthetic CTR log: how the values of a row are drawn, and the probability that its label is 1.

**Values.** A categorical column has slots, drawn by a power law of the rank. The ten largest columns make five pairs of partners: a slot
belongs to the community ``slot % n_communities``, and the second column of a pair is drawn from the community of the first, but for a share
``mixing`` of the rows. In these columns a slot's value is replaced by a new one from time to time, a share ``drift`` of the slots a day, so
that later days have values that earlier ones lack. A new value has the community of the old one. The numbers are standard normal.

**Labels.** The logit is a sum of what the row shows, so that no model of the columns can do better than the mean entropy of the
probabilities. With ``e`` an effect of deviation 1 that a value has of its own, ``a`` one of its community, and ``k`` communities:

    logit = bias + PARTNER * sum over columns with a partner (sqrt(1/2) a(community) + sqrt(1/2) e(value))
                 + SINGLE * sum over other columns e(value)
                 + CROSS * sum over pairs p (vector of k_p in p, times vector of k_q in q, of the next pair q)
                 + NUMBER * sum over numbers (sign * number), 0 where it is missing

Effects of values are hashes of the seed, the column and the value, so that ten million values take no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import ArgumentError
from graphhash.graph.interactions import edge_hash

# The largest column has as many values as asked for, every other one that number to this power.
SIZE_EXPONENTS = (
    1.0, 0.98, 0.96, 0.94, 0.9,
    0.78, 0.74, 0.71, 0.6, 0.58,
    0.52, 0.5, 0.48, 0.45, 0.42, 0.4, 0.36, 0.32, 0.3, 0.27, 0.24, 0.2, 0.17, 0.14, 0.11, 0.08,
)  # fmt: skip
N_PAIRS, N_NUMBERS = 5, 13
LEAST_VALUES = 3
# The share of a column's slots of rank r falls off as (r + HEAD) ** -RANK_EXPONENT: the first 1 % of ten million have three quarters.
RANK_EXPONENT, HEAD = 1.05, 2.0
PARTNER, SINGLE, CROSS, NUMBER = 0.35, 0.12, 0.3, 0.12
CROSS_DIM = 4
MISSING_NUMBERS = 0.1
# Rows from which the bias is found.
CALIBRATION_ROWS = 1 << 17


@dataclass(frozen=True)
class LogSettings:
    """Settings of a synthetic CTR log; they check themselves.

    Args:
        n_rows: samples.
        cardinality: values of the largest column at most.
        n_days: days that the rows are spread over, evenly and in order.
        n_communities: of the values of every column that has a partner.
        mixing: share of the rows whose pair is of values of any two communities.
        drift: share of the slots that get a new value from one day to the next.
        positive_rate: share of positive labels to expect.

    Raises:
        ArgumentError: a value is out of its range; the message has the bound.
    """

    n_rows: int
    cardinality: int
    n_days: int
    n_communities: int
    mixing: float
    drift: float
    positive_rate: float
    seed: int

    def __post_init__(self) -> None:
        if min(self.n_rows, self.n_days, self.n_communities) < 1 or self.n_rows < self.n_days:
            raise ArgumentError(
                f"rows={self.n_rows}, days={self.n_days} and communities={self.n_communities} must be 1 or more, and every day has a row"
            )
        for name, low, value, high in (("mixing", 0, self.mixing, 1), ("drift", 0, self.drift, 1)):
            if not low <= value <= high:
                raise ArgumentError(f"{name}={value} is a share; use {low} to {high}")
        if not 0 < self.positive_rate < 1:
            raise ArgumentError(f"positive_rate={self.positive_rate} must be between 0 and 1, both excluded")
        if not LEAST_VALUES <= self.cardinality < 2**32:
            raise ArgumentError(f"cardinality={self.cardinality} must be {LEAST_VALUES} to {2**32 - 1}")
        smallest = min(column.n_slots for pair in self.pairs for column in pair)
        if self.n_communities > smallest:
            raise ArgumentError(
                f"communities={self.n_communities} are more than the {smallest} slots of the smallest column with a partner; "
                "use fewer, or a larger cardinality"
            )

    @property
    def columns(self) -> tuple[SyntheticColumn, ...]:
        """The 26 categorical columns, the largest first."""
        n_drawn = ceil(self.drift * (self.n_days - 1)) + 1
        columns = []
        for number, exponent in enumerate(SIZE_EXPONENTS):
            n_values = max(LEAST_VALUES, round(self.cardinality**exponent))
            drifts = number < 2 * N_PAIRS
            columns.append(
                SyntheticColumn(f"C{number + 1}", number, max(1, n_values // n_drawn) if drifts else n_values)
            )
        return tuple(columns)

    @property
    def pairs(self) -> tuple[tuple[SyntheticColumn, SyntheticColumn], ...]:
        """Partners: a large column, and a smaller one."""
        columns = self.columns
        return tuple((columns[p], columns[p + N_PAIRS]) for p in range(N_PAIRS))


@dataclass(frozen=True)
class SyntheticColumn:
    """A categorical column, its number, and how many of its values there are at a time."""

    name: str
    number: int
    n_slots: int


@dataclass(frozen=True)
class Samples:
    """Rows of a log.

    Args:
        values: of every categorical column, int64, shape (n, 26), from 0.
        numbers: float32, shape (n, 13), NaN where missing.
        probabilities: that the label is 1, float64, shape (n,).
        labels: drawn from them, uint8, shape (n,).
    """

    values: NDArray[np.int64]
    numbers: NDArray[np.float32]
    probabilities: NDArray[np.float64]
    labels: NDArray[np.uint8]


class LabelModel:
    """Draws rows and their labels.

    Args:
        settings: of the log; with the seed they fix every row.

    Attributes:
        bias: of the logit, found by bisection so that the mean probability of other rows is ``positive_rate``.
    """

    def __init__(self, settings: LogSettings) -> None:
        self._settings, k = settings, settings.n_communities
        rng = np.random.default_rng([settings.seed, 0])
        self._community_effects = rng.standard_normal((2 * N_PAIRS, k))
        vectors = rng.standard_normal((2, N_PAIRS, k, CROSS_DIM))
        self._crosses = [
            vectors[0, p] @ vectors[1, (p + 1) % N_PAIRS].T / CROSS_DIM**0.5 for p in range(N_PAIRS)
        ]  # (k, k) each
        self._signs = rng.choice([-1.0, 1.0], N_NUMBERS)
        rng = np.random.default_rng([settings.seed, 2])
        days = rng.integers(0, settings.n_days, CALIBRATION_ROWS)
        slots = self._draw_slots(rng, len(days))
        self.bias = _bias(
            self._logits(slots, self._values(slots, days), _draw_numbers(rng, len(days))), settings.positive_rate
        )

    def draw(self, rng: np.random.Generator, days: NDArray[np.int64]) -> Samples:
        """A row for every one of ``days``, shape (n,), from 0."""
        slots = self._draw_slots(rng, len(days))
        values, numbers = self._values(slots, days), _draw_numbers(rng, len(days))
        probabilities = _sigmoid(self.bias + self._logits(slots, values, numbers))
        labels = (rng.random(len(days)) < probabilities).astype(np.uint8)
        return Samples(values, numbers, probabilities, labels)

    def communities(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Communities of the values of the columns with a partner, shape (n, 10), out of values of all columns, shape (n, 26)."""
        n_slots = np.array([column.n_slots for column in self._settings.columns[: 2 * N_PAIRS]])
        return values[:, : 2 * N_PAIRS] % n_slots % self._settings.n_communities

    def _draw_slots(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """Slots of all columns, shape (n, 26)."""
        settings, k = self._settings, self._settings.n_communities
        slots = np.empty((n, len(settings.columns)), np.int64)
        for column in settings.columns:
            slots[:, column.number] = power_law(rng.random(n), column.n_slots)
        for first, second in settings.pairs:
            own = rng.random(n) >= settings.mixing
            drawn = slots[own, second.number]
            # The same rank but for the community: popularity stays a power law.
            drawn += slots[own, first.number] % k - drawn % k
            slots[own, second.number] = np.where(drawn < second.n_slots, drawn, drawn - k)
        return slots

    def _values(self, slots: NDArray[np.int64], days: NDArray[np.int64]) -> NDArray[np.int64]:
        """The value that every slot has on its row's day, shape (n, 26)."""
        values = slots.copy()
        for column in self._settings.columns[: 2 * N_PAIRS]:
            own = slots[:, column.number]
            n_before = np.floor(self._settings.drift * days + self._share(100 + column.number, own)).astype(np.int64)
            values[:, column.number] = own + column.n_slots * n_before
        return values

    def _logits(
        self, slots: NDArray[np.int64], values: NDArray[np.int64], numbers: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """Logits without the bias, shape (n,)."""
        logits = NUMBER * (np.nan_to_num(numbers) @ self._signs)
        communities = slots[:, : 2 * N_PAIRS] % self._settings.n_communities
        for number in range(values.shape[1]):
            own = (self._share(number, values[:, number]) - 0.5) * 12**0.5
            if number < 2 * N_PAIRS:
                logits += PARTNER * 0.5**0.5 * (own + self._community_effects[number][communities[:, number]])
            else:
                logits += SINGLE * own
        for p, cross in enumerate(self._crosses):
            logits += CROSS * cross[communities[:, p], communities[:, (p + 1) % N_PAIRS]]
        return logits

    def _share(self, stream: int, values: NDArray[np.int64]) -> NDArray[np.float64]:
        """A number in [0, 1) for every value, fixed by the seed, shape (n,)."""
        return edge_hash(np.array([stream]), values, seed=self._settings.seed).astype(np.float64) / 2.0**64


def power_law(uniform: NDArray[np.float64], n: int) -> NDArray[np.int64]:
    """Ranks in [0, n) of a power law, by the inverse of its distribution function.

    Args:
        uniform: numbers in [0, 1), shape (n_draws,).
    """
    power = 1.0 - RANK_EXPONENT
    low, high = HEAD**power, (n + HEAD) ** power
    ranks = (low + uniform * (high - low)) ** (1.0 / power) - HEAD
    return np.clip(ranks.astype(np.int64), 0, n - 1)


def entropies(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected log loss of the true probabilities in nats, shape (n,): the least that any prediction can expect."""
    return -(probabilities * np.log(probabilities) + (1 - probabilities) * np.log1p(-probabilities))


def _draw_numbers(rng: np.random.Generator, n: int) -> NDArray[np.float32]:
    numbers = rng.standard_normal((n, N_NUMBERS), np.float32)
    numbers[rng.random((n, N_NUMBERS)) < MISSING_NUMBERS] = np.nan
    return numbers


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.0 / (1.0 + np.exp(-logits))


def _bias(logits: NDArray[np.float64], rate: float) -> float:
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(logits + middle).mean() < rate else (low, middle)
    return (low + high) / 2
