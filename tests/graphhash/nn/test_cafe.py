"""CAFE: importances, migrations and assignments against a naive second implementation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from graphhash.errors import ArgumentError
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.maps.hashes import universal_hash
from graphhash.maps.quantization import row_bytes
from graphhash.models.ctr import CtrSpec
from graphhash.nn.cafe import DECAY, CafeEmbedding
from graphhash.nn.workers import Workers
from pipeline.config.run_config import MapConfig
from pipeline.maps.sizes import SizeBudget, embedding_spec

N_IDS, DIM, N_HOT, N_SHARED, STEPS, LR = 30, 4, 6, 5, 8, 0.1


def made(n_hot=N_HOT, n_ids=N_IDS, **changes) -> CafeEmbedding:
    settings = {"n_shared": N_SHARED, "steps": STEPS, "seed": 3} | changes
    return CafeEmbedding(n_ids, DIM, n_hot=n_hot, **settings, generator=torch.Generator().manual_seed(0))


def batch_of(step: int, n: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Ids, many of them more than once and some out of vocabulary, and the gradients of their vectors: weighted targets.

    Favourites change in the middle, so that hot ids cool.
    """
    rng = np.random.default_rng(step)
    favourites = (rng.geometric(0.2, n) - 1 + (0 if step < 20 else 11)) % N_IDS
    ids = np.where(rng.random(n) < 0.1, N_IDS, favourites)
    weights = rng.choice([0.0, 0.5, 2.0], n)
    return ids, (weights[:, None] * rng.normal(size=(n, DIM))).astype(np.float32) / n


def step_of(embedding: CafeEmbedding, step: int, share: slice = slice(None)) -> None:
    """A step of gradient descent, whose loss is the sum of inner products with the batch's targets."""
    ids, gradients = (torch.from_numpy(part[share]) for part in batch_of(step))
    (embedding(ids) * gradients).sum().backward()
    Workers.from_process_group().sum_gradients(embedding.parameters())
    with torch.no_grad():
        embedding.table -= LR * embedding.table.grad
    embedding.table.grad = None


class Naive:
    """The same with a dictionary of vectors per hot id."""

    def __init__(self, embedding: CafeEmbedding):
        table = embedding.table.detach().numpy().copy()
        self.own = {i: table[i].copy() for i in range(N_HOT)}
        self.shared = table[N_HOT:]
        self.hashes = universal_hash(np.arange(N_IDS), N_SHARED, np.random.default_rng(embedding.seed))
        self.importance = dict.fromkeys(range(N_IDS), 0.0)

    def vector(self, i: int) -> np.ndarray:
        return self.own[i] if i in self.own else self.shared[self.hashes[i]]

    def migrate(self) -> None:
        ranked = sorted(range(N_IDS), key=lambda i: (-self.importance[i], i))[:N_HOT]
        self.own = {i: self.vector(i).copy() for i in ranked}
        self.importance = {i: DECAY * value for i, value in self.importance.items()}

    def step(self, step: int) -> None:
        if step in (1, 2, 4, *range(STEPS, 100, STEPS)):
            self.migrate()
        for i, gradient in zip(*batch_of(step), strict=True):
            if i < N_IDS:
                self.importance[i] += float(np.sqrt((gradient.astype(np.float64) ** 2).sum()))
                self.vector(i)[:] -= LR * gradient


def test_a_training_is_that_of_the_naive_implementation():
    embedding = made()
    naive = Naive(embedding)
    cooled = set()
    for step in range(50):
        before = set(naive.own)
        step_of(embedding, step)
        naive.step(step)
        cooled |= before - set(naive.own)
        assert set(embedding.hot.tolist()) == set(naive.own), step
        np.testing.assert_allclose(embedding.importances, list(naive.importance.values()), rtol=1e-4, atol=1e-6)
        wanted = np.stack([naive.vector(i) for i in range(N_IDS)])
        with torch.no_grad():
            np.testing.assert_allclose(embedding.all(), wanted, rtol=1e-4, atol=1e-5)
    assert len(cooled) >= N_HOT
    assert embedding.counts.tolist() == [50, 48]


def test_importances_are_the_norms_of_the_gradients_of_what_is_read():
    embedding = made()
    ids = torch.tensor([[7, 2], [7, N_IDS]])
    vectors = embedding(ids)
    vectors.retain_grad()
    (vectors.square().sum(-1) * torch.tensor([[1.0, 0.0], [3.0, 5.0]])).sum().backward()
    wanted = torch.zeros(N_IDS)
    wanted[7] = vectors.grad[0, 0].norm() + vectors.grad[1, 0].norm()
    torch.testing.assert_close(embedding.importances, wanted)


def test_reads_that_nobody_trains_are_not_counted():
    embedding = made()
    embedding.eval()(torch.arange(4)).sum().backward()
    embedding.train()
    with torch.no_grad():
        embedding(torch.arange(4))
    embedding(torch.arange(4))
    embedding.fill_oov(torch.ones(N_IDS))
    assert not embedding.importances.any()
    assert embedding.counts.tolist() == [0, 0]


def test_two_reads_of_one_step_are_one_step_and_nothing_migrates_between_them():
    embedding = made()
    for step in range(1, 20):
        first = embedding(torch.tensor([step]))
        rows = embedding.rows.clone()
        second = embedding(torch.tensor([step + 1]))
        assert torch.equal(embedding.rows, rows)
        (first + second).sum().backward()
        assert int(embedding.counts[0]) == step
    assert int(embedding.counts[1]) == 16


def test_a_migration_gives_rows_to_the_most_important_ids_and_ties_to_the_lowest():
    embedding = made()
    embedding.importances[torch.tensor([20, 25, 9])] = torch.tensor([3.0, 2.0, 1.0])
    embedding.importances[torch.tensor([28, 15, 17, 16, 11])] = 0.5
    before = embedding.all().detach()
    embedding.migrate()
    after = embedding.all().detach()
    hot = [9, 11, 15, 16, 20, 25]
    assert sorted(embedding.hot.tolist()) == hot
    assert torch.equal(after[hot], before[hot])
    # Those that cooled, 0 to 5, read the rows that their hashes name.
    shared = embedding.table.detach()[N_HOT:]
    hashes = universal_hash(np.arange(N_IDS), N_SHARED, np.random.default_rng(embedding.seed))
    assert torch.equal(after[:6], shared[torch.from_numpy(hashes[:6])])
    assert not torch.equal(after[:6], before[:6])
    assert sorted(embedding.rows[hot, 0].tolist()) == list(range(N_HOT))
    # A second one finds the same.
    embedding.migrate()
    assert torch.equal(embedding.all(), after)


def test_the_seed_decides_the_order_of_new_ids():
    orders = []
    for seed in (3, 3, 4):
        embedding = made(seed=seed)
        embedding.importances[10:16] = 1.0
        embedding.migrate()
        orders.append(embedding.hot.tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(10, 16))


def test_a_row_for_every_id_and_one_for_nobody_else_are_possible():
    for n_hot in (1, N_IDS):
        embedding = made(n_hot)
        for step in range(10):
            step_of(embedding, step)
        assert len(set(embedding.hot.tolist())) == n_hot


def test_gradients_that_are_not_finite_leave_every_row_to_one_id():
    embedding = made()
    embedding(torch.tensor([8])).sum().mul(float("nan")).backward()
    embedding(torch.tensor([9])).sum().mul(float("inf")).backward()
    embedding.migrate()
    assert sorted(embedding.hot.tolist()) == [0, 1, 2, 3, 4, 9]


@pytest.mark.parametrize("stopped", [7, 8, 9])
def test_a_training_goes_on_from_its_state_to_the_same_bits(stopped):
    whole, begun = made(), made()
    for step in range(30):
        step_of(whole, step)
    for step in range(stopped):
        step_of(begun, step)
    resumed = CafeEmbedding(N_IDS, DIM, n_hot=N_HOT, n_shared=N_SHARED, steps=STEPS, seed=3)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    for step in range(stopped, 30):
        step_of(resumed, step)
    state = whole.state_dict()
    assert set(state) == {"oov", "hot", "importances", "counts", "table"}
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())
    assert torch.equal(whole.rows, resumed.rows)


def test_what_is_stored_answers_as_the_trained_one_and_has_the_bytes_that_are_counted():
    trained, loaded = made(), made(seed=3)
    for step in range(20):
        step_of(trained, step)
    stored = {"table": trained.table.detach(), **trained.learned_buffers()}
    assert set(stored) == {"table", "hot", "oov"}
    loaded.load_state_dict(stored, strict=False)
    assert torch.equal(loaded.eval().all(), trained.eval().all())
    assert trained.stored_bytes("float32") == sum(4 * tensor.numel() for tensor in stored.values())
    assert trained.stored_bytes("int8") == (N_HOT + N_SHARED) * row_bytes(DIM, "int8") + 4 * N_HOT + 4 * DIM


def trained_by_workers(n_steps: int) -> dict[str, torch.Tensor]:
    """The state after some steps, of which a worker takes its share."""
    embedding, workers = made(), Workers.from_process_group()
    for step in range(n_steps):
        step_of(embedding, step, workers.share(20))
    return {**embedding.state_dict(), "rows": embedding.rows}


@pytest.mark.parametrize("n_steps", [1, 30])
def test_two_workers_have_the_assignment_of_one(pair, n_steps):
    alone = trained_by_workers(n_steps)
    first, second = pair(trained_by_workers, n_steps)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        if name in ("hot", "rows", "counts"):
            assert torch.equal(first[name], value), name
        else:
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)


def test_columns_and_multi_valued_columns_migrate_by_themselves():
    from graphhash.maps.bucket_map import full_map
    from graphhash.models.ctr import FeatureBatch

    spec = EmbeddingSpec("cafe", {"user_hot_rows": 3, "user_shared_rows": 2, "steps": 4}, seed=1)
    maps = [full_map(12), full_map(15)]
    model = CtrSpec("dlrm", dim=4, hidden=(4,), embeddings=((0, spec), (1, spec))).build(maps, 0, 1)
    rng = np.random.default_rng(0)
    for _ in range(6):
        values = rng.integers(7, 11, (30, 2))
        values[:, 1] = -1
        ids = torch.from_numpy(rng.integers(5, 8, (30, 1)))
        batch = FeatureBatch(ids, torch.zeros(30, 0), (torch.from_numpy(values),))
        model.loss(batch, torch.from_numpy(rng.integers(0, 2, 30)).float()).backward()
    of_ids, of_values = model.embeddings
    assert sorted(of_ids.hot.tolist()) == [5, 6, 7]
    assert set(of_values.hot.tolist()) <= {7, 8, 9, 10}
    # The empty slots read id 0 with weight 0.
    assert not of_values.importances[0]


@pytest.mark.parametrize(("n_bytes", "n_items"), [(40_000, None), (40_000, 300), (9_000, 300), (500_000, 300)])
def test_exclusive_rows_take_seven_tenths_of_the_bytes(n_bytes, n_items):
    budget = SizeBudget(n_bytes, 900, n_items, 16, "int8")
    sizes = embedding_spec("cafe", "cafe", budget, MapConfig()).sizes
    names = ("user", "item")[: len(budget.sides)]
    hot = sum(sizes[f"{name}_hot_rows"] for name in names) * (row_bytes(16, "int8") + 4)
    shared = sum(sizes[f"{name}_shared_rows"] for name in names) * row_bytes(16, "int8")
    assert hot + shared + 4 * 16 * len(names) <= n_bytes
    if n_bytes == 500_000:
        # Enough for a row of either kind for every id.
        assert (sizes["user_hot_rows"], sizes["user_shared_rows"]) == (900, 900)
    elif sizes["user_hot_rows"] < 900:
        assert hot / (hot + shared) == pytest.approx(0.7, abs=0.02)


def test_the_least_budget_that_fits_has_a_row_of_either_kind_for_each_side():
    row = row_bytes(16, "int8")
    least = 2 * 4 * 16 + (2 * row + 4) * (900 + 300) // 300
    sizes = embedding_spec("cafe", "cafe", SizeBudget(least, 900, 300, 16, "int8"), MapConfig()).sizes
    assert (sizes["item_hot_rows"], sizes["item_shared_rows"]) == (1, 1)
    with pytest.raises(ValueError, match=rf"method 'cafe' needs {least:,} bytes"):
        embedding_spec("cafe", "cafe", SizeBudget(least - 1, 900, 300, 16, "int8"), MapConfig())


@pytest.mark.parametrize("changes", [{"n_hot": 0}, {"n_hot": N_IDS + 1}, {"n_shared": 0}, {"steps": 0}])
def test_sizes_that_do_not_fit_are_refused(changes):
    with pytest.raises(ArgumentError, match="1 to 30 exclusive rows"):
        made(**changes)
