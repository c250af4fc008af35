"""What a training holds and how fast it steps, before its data are there: the real model at sizes that are told, on random interactions."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
from scipy.sparse import csr_array

from graphhash.clustering.labels import Labels
from graphhash.models.mf import RetrievalModel
from graphhash.models.samplers import NegativeSampler
from graphhash.nn.embedding import BucketEmbedding
from pipeline.config.run_config import RunConfig
from pipeline.maps.methods import METHODS, Inputs, ResolvedMethod
from pipeline.retrieval.budget import GraphSize, resolve_method
from pipeline.retrieval.evaluate import rank_users
from pipeline.retrieval.forecast_log import distinct
from pipeline.retrieval.models import ModelSpec
from pipeline.retrieval.objective import K, RetrievalSettings, TrainingPairs, fit_retrieval
from pipeline.retrieval.train import fit_settings, trained_spec
from pipeline.training.memory import peak_mib, training_parts
from pipeline.training.step_clock import StepClock

# Of the interactions and ids of a burst; more of them are as many times as slow.
BURST_EDGES, BURST_IDS = 100_000, 100_000
# Scores that are ranked to measure an evaluation.
BURST_SCORES = 2_000_000
# Sizes of the smallest models that have every part; bytes grow with each number by a constant.
_SMALL = {"user_rows": 40, "item_rows": 36, "n_users": 60, "n_items": 50, "n_edges": 600}
PARTS = ("tables", "gradients", "optimizer", "maps")
EXAMPLE_BYTES = 24
MIB = 2**20


@dataclass(frozen=True)
class TrainingSize:
    """Table rows without those of OOV ids, ids and interactions of a training."""

    user_rows: int
    item_rows: int
    n_users: int
    n_items: int
    n_edges: int

    @classmethod
    def of(cls, size: GraphSize, n_rows: int) -> TrainingSize:
        """Rows are shared among the sides as ids are; the bytes of both are the same for any shares."""
        user_rows = max(1, min(n_rows - 1, round(n_rows * size.n_users / size.n_ids)))
        return cls(user_rows, n_rows - user_rows, size.n_users, size.n_items, size.n_edges)

    def scaled(self, share: float) -> TrainingSize:
        """A smaller one of the same density of rows."""
        users, items = (max(8, round(n * share)) for n in (self.n_users, self.n_items))
        edges = min(users * items // 2, max(16, round(self.n_edges * share)))
        user_rows, item_rows = (
            max(2, min(n, round(r * share))) for r, n in ((self.user_rows, users), (self.item_rows, items))
        )
        return TrainingSize(user_rows, item_rows, users, items, edges)


@dataclass(frozen=True)
class Speed:
    """What a burst of training measured, for the real sizes.

    Args:
        maps: seconds to make the maps.
        step: seconds of a training step.
        score: seconds to score and rank an item for a user.
        peak_bytes: that the process holds at its most beyond what it held before.
    """

    maps: float
    step: float
    score: float
    peak_bytes: int


@dataclass(frozen=True)
class PlannedTraining:
    """A training of a run whose sizes are known.

    Args:
        resolved: the method at the real sizes.
        spec: the model.
    """

    config: RunConfig
    resolved: ResolvedMethod
    spec: ModelSpec
    size: TrainingSize

    @classmethod
    def of(cls, config: RunConfig, method: str, size: GraphSize, n_rows: int) -> PlannedTraining:
        """Args: as :func:`pipeline.retrieval.budget.resolve_method`."""
        resolved = resolve_method(config, method, size, n_rows)
        spec = trained_spec(config, resolved)
        own_rows = resolved.n_rows or n_rows
        n_rows = own_rows if METHODS[method].trains_full_soft else min(n_rows, own_rows)
        return cls(config, resolved, spec, TrainingSize.of(size, n_rows))

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes that the training holds, by part, as :func:`pipeline.training.memory.training_parts` of the real model."""
        base = TrainingSize(**_SMALL)
        at_base = self._numbers_at(base)
        total = list(at_base)
        for name, number in _SMALL.items():
            more = self._numbers_at(replace(base, **{name: number + 1}))
            for place in range(len(total)):
                total[place] += (more[place] - at_base[place]) * (getattr(self.size, name) - number)
        parts = dict(zip(PARTS, total[: len(PARTS)], strict=True))
        for n_rows, n_bytes in zip(total[len(PARTS) :: 2], total[len(PARTS) + 1 :: 2], strict=True):
            # The rows of a table of more than 65,536 take as many bytes again.
            parts["maps"] += n_bytes if n_rows > 2**16 else 0
        return parts

    def _numbers_at(self, size: TrainingSize) -> list[int]:
        """Bytes by part, and of every map of 16-bit rows, how many the table has and the bytes of the map's."""
        model = self._build(size)[0]
        parts = training_parts(model)
        maps = [module for module in model.modules() if isinstance(module, BucketEmbedding)]
        held = [(part.n_buckets, part.held_rows.nbytes) for part in maps if part.held_rows is not None]
        return [*(parts[name] for name in PARTS), *chain.from_iterable(held)]

    def _build(self, size: TrainingSize) -> tuple[RetrievalModel, csr_array]:
        graph, labels = random_interactions(size)
        # Where features decide about rows, they decide about no sizes.
        method = "lsh_structure" if self.resolved.name == "lsh" else self.resolved.name
        resolved = self.resolved
        inputs = Inputs(graph, labels, resolved.indices_per_id, resolved.hops, self.config.map.seed)
        return self.spec.build(*METHODS[method].make(inputs), graph), graph

    def settings(self, size: GraphSize) -> RetrievalSettings:
        """The settings of the training at the real sizes."""
        rows = self.size.user_rows + self.size.item_rows + 2
        return fit_settings(self.config.train, METHODS[self.resolved.name], rows, size)

    def measured(self, size: GraphSize) -> Speed:
        """Train for a moment, rank for some users, and say how long either takes at the real sizes."""
        settings, whole = self.settings(size), self.config.train.model == "lightgcn"
        share = min(1.0, BURST_EDGES / self.size.n_edges, BURST_IDS / (self.size.n_users + self.size.n_items))
        more = sum(self.parts.values())  # Loads the compiled loops as well.
        before = peak_mib(reset=True)
        started = time.perf_counter()
        model, graph = self._build(self.size.scaled(share))
        maps = time.perf_counter() - started
        step, optimizer = _seconds_of_step(model, graph, settings, self.config)
        # Users and items of an interaction in int64, and the graph. Memory that earlier stages have left is used again, and not seen.
        of_model = sum(training_parts(model).values())
        held = max((peak_mib() - before) * MIB, of_model + EXAMPLE_BYTES * graph.nnz)
        score = _seconds_of_score(model, graph)
        if settings.batch_size is None or whole or settings.loss.name == "ials":
            # A step reads all interactions or all ids.
            return Speed(maps / share, step / share, score, round(held / share))
        step += optimizer * (1 / share - 1)
        grown = more - of_model + EXAMPLE_BYTES * (self.size.n_edges - graph.nnz)
        return Speed(maps / share, step, score, round(held + grown))


def random_interactions(size: TrainingSize) -> tuple[csr_array, Labels]:
    """Distinct pairs drawn uniformly, and communities of exactly as many rows."""
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, size.n_users * size.n_items, size.n_edges)
    while len(pairs := distinct(pairs)) < size.n_edges:
        pairs = np.append(pairs, rng.integers(0, size.n_users * size.n_items, size.n_edges - len(pairs)))
    users, items = np.divmod(pairs, size.n_items)
    shape = (size.n_users, size.n_items)
    graph = csr_array((np.ones(len(pairs), np.float32), (users, items)), shape=shape)
    user_labels, item_labels = (
        np.arange(n, dtype=np.int32) % rows for n, rows in zip(shape, (size.user_rows, size.item_rows), strict=True)
    )
    return graph, Labels(user_labels, item_labels, resolution=1.0, modularity=0.0)


def _seconds_of_step(
    model: RetrievalModel, graph: csr_array, settings: RetrievalSettings, config: RunConfig
) -> tuple[float, float]:
    """Seconds of a training step, and those of the optimizer in it; the first step is left out."""
    sample = NegativeSampler(graph, config.train.sampler, power=config.train.popularity_power)
    # Random interactions are not to be learnt: a low rate keeps the loss finite.
    endless = replace(settings, epochs=10**9, eval_every=10**9, lr=1e-4, schedule="constant")
    pairs = TrainingPairs.of(graph, sample)
    clock = StepClock()
    fit_retrieval(model, pairs, endless, None, callbacks=clock.callbacks())
    return clock.step, clock.optimizer


def _seconds_of_score(model: RetrievalModel, graph: csr_array) -> float:
    """Seconds to score an item for a user and to rank it."""
    n_users, n_items = graph.shape
    users = np.arange(min(n_users, max(1, BURST_SCORES // n_items)))
    model.eval()
    rank_users(model, users[:8], graph, min(K, n_items))
    started = time.perf_counter()
    rank_users(model, users, graph, min(K, n_items))
    return (time.perf_counter() - started) / (len(users) * n_items)
