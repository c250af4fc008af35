"""CafeEmbedding: a row each for the ids of large gradients, hashed rows for the others (CAFE: Zhang et al., SIGMOD 2024).

The importance of an id is the sum, over the training so far, of the L2 norms of the loss's gradient with respect to the vectors that were
read for it. The ids of greatest importance are *hot*: each has an exclusive row. All others read shared rows, which a hash names. From
time to time the hot ids are chosen anew, which is a *migration*, and importances decay. When an id becomes hot its exclusive row begins as
the shared row that it read. When it cools it reads its shared row again, and its exclusive row goes to another id. What is stored is the
tables and the id of every exclusive row; the hash is a seed.

The paper keeps importances in a sketch, because it does not know the ids beforehand. Here the vocabulary is known, and training holds exact
sums.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from graphhash.errors import ArgumentError
from graphhash.maps.hashes import universal_hash
from graphhash.nn.compressed import OovVectorEmbedding, StoredTable
from graphhash.nn.table_reads import MapRead, read_table
from graphhash.nn.workers import Workers

# What a migration leaves of every importance.
DECAY = 0.98


class CafeEmbedding(OovVectorEmbedding):
    """``embedding(id) = table[row of a hot id]``, or ``table[n_hot + hash(id)]`` of any other.

    Only reads in training mode whose gradient is computed count. A step is all reads up to their first gradient. In a process group every
    worker adds the norms of all workers, so that they have the same hot ids; they read at the same time. Before the first migration all
    importances are zero, and the lowest ids are hot.

    Args:
        n_ids: ids of the vocabulary.
        dim: length of a vector.
        n_hot: exclusive rows, at most ``n_ids``.
        n_shared: shared rows.
        steps: between two migrations. The first ones come earlier, after 1, 2, 4, ... steps.
        seed: of the hash function, and of the order in which newly hot ids get rows.
        std: standard deviation of the normal initial values.
        generator: draws them; torch's global generator when None.

    Raises:
        ArgumentError: there are no rows, more exclusive ones than ids, or no steps.

    Attributes:
        table: trained parameter, float32, shape (n_hot + n_shared, dim): exclusive rows, then shared ones.
        hot: buffer, int32, shape (n_hot,): the id of every exclusive row.
        importances: buffer, float32, shape (n_ids,). It is of the training's state, and not stored.
        counts: buffer, int64, shape (2,): steps so far, and steps before the last migration. It is not stored either.
        rows: buffer, int32, shape (n_ids, 1): the row of ``table`` that an id reads; follows from ``hot`` and the seed.
    """

    hot: Tensor
    importances: Tensor
    counts: Tensor
    rows: Tensor
    stored_buffers: ClassVar[tuple[str, ...]] = ("oov", "hot")

    def __init__(
        self,
        n_ids: int,
        dim: int,
        *,
        n_hot: int,
        n_shared: int,
        steps: int,
        seed: int,
        std: float = 0.1,
        generator: torch.Generator | None = None,
    ):
        super().__init__(n_ids, dim)
        if not 1 <= n_hot <= n_ids or min(n_shared, steps) < 1:
            raise ArgumentError(
                f"there must be 1 to {n_ids} exclusive rows, and at least 1 shared row and 1 step, got {n_hot}, {n_shared} and {steps}"
            )
        self.n_hot, self.n_shared, self.steps, self.seed = n_hot, n_shared, steps, seed
        self.table = nn.Parameter(torch.empty(n_hot + n_shared, dim))
        with torch.no_grad():
            self.table.normal_(std=std, generator=generator)
        self.register_buffer("hot", torch.arange(n_hot, dtype=torch.int32))
        self.register_buffer("importances", torch.zeros(n_ids))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("rows", torch.empty(n_ids, 1, dtype=torch.int32), persistent=False)
        # Whether reads of the current step have had no gradient yet. No state is saved then.
        self._is_awaiting = False
        self._workers: Workers | None = None
        self._place()
        self.register_load_state_dict_post_hook(lambda module, _: module._place())

    def _place(self) -> None:
        """Set what follows from the buffers of the state: ``rows``, and ``counts`` as numbers, for which no step waits for a GPU."""
        self._count(*self.counts.tolist())
        self.rows[:, 0] = self._shared_rows(torch.arange(self.n_ids))
        self.rows[self.hot.long(), 0] = torch.arange(self.n_hot, dtype=torch.int32, device=self.device)

    def _shared_rows(self, ids: Tensor) -> Tensor:
        """The rows that ids read while they are not hot, int32, shape (n,)."""
        hashed = universal_hash(ids.cpu().numpy(), self.n_shared, np.random.default_rng(self.seed))
        return torch.from_numpy((self.n_hot + hashed).astype(np.int32)).to(self.device)

    @property
    def map_bytes(self) -> int:
        """Bytes of the OOV vector and of the hot ids."""
        return super().map_bytes + 4 * self.n_hot

    def stored_tables(self, precision: str) -> list[StoredTable]:
        """The table, row by row in ``precision``."""
        return [StoredTable(self.table, precision)]

    def vectors(self, ids: Tensor) -> Tensor:
        """Vectors of known ids: shape (n, dim). A migration that is due comes before a read in training."""
        is_step = self.training and torch.is_grad_enabled() and self.table.requires_grad
        if is_step:
            if self._is_due:
                self.migrate()
            self._is_awaiting = True
        vectors = read_table(self.table, MapRead(self.rows, None, None, ids), weighted=False)
        if is_step:
            vectors.register_hook(partial(self._add_norms, ids))
        return vectors

    def _count(self, n_steps: int, n_migrated: int) -> None:
        """Set the counts, and whether a migration is due before the next read."""
        self._n_steps, self._n_migrated = n_steps, n_migrated
        # One attribute that seldom changes: torch.compile compiles anew for another value.
        self._is_due = n_steps >= min(2 * n_migrated or 1, n_migrated - n_migrated % self.steps + self.steps)

    @torch.no_grad()
    def _add_norms(self, ids: Tensor, gradients: Tensor) -> None:
        """Add to the importance of each id, int64, shape (n,), the norm of its vector's gradient, shape (n, dim)."""
        if self._workers is None:
            self._workers = Workers.from_process_group()
        # A training that diverges ends with an error of its own.
        norms = torch.linalg.vector_norm(gradients, dim=1).to(self.importances).nan_to_num(0.0)
        # Not summed before a migration alone: a saved state is the first worker's.
        all_ids, all_norms = (self._workers.gather_rows(part)[0] for part in (ids, norms))
        self.importances.index_add_(0, all_ids, all_norms)
        if self._is_awaiting:
            self._is_awaiting = False
            self._count(self._n_steps + 1, self._n_migrated)
            self.counts[0] = self._n_steps

    @torch.no_grad()
    def migrate(self) -> None:
        """Give the exclusive rows to the ids of greatest importance, as described at the top of this module."""
        if self._workers is not None:
            # On GPUs the last bits of sums may differ between workers.
            self._workers.copy_from_first([self.importances])
        is_hot = self._most_important()
        free = (~is_hot[self.hot.long()]).nonzero().squeeze(1)
        new = (is_hot & (self.rows[:, 0] >= self.n_hot)).nonzero().squeeze(1)
        order = np.random.default_rng([self.seed, self._n_steps]).permutation(len(new))
        new = new[torch.from_numpy(order).to(new.device)]
        old = self.hot[free].long()
        self.table[free] = self.table[self.rows[new, 0].long()]
        self.hot[free] = new.int()
        self.rows[old, 0] = self._shared_rows(old)
        self.rows[new, 0] = free.int()
        self.importances *= DECAY
        self._count(self._n_steps, self._n_steps)
        self.counts[1] = self._n_steps

    def _most_important(self) -> Tensor:
        """Whether an id is one of the ``n_hot`` of greatest importance, bool, shape (n_ids,); ties go to the lowest ids."""
        least = self.importances.kthvalue(self.n_ids - self.n_hot + 1).values
        is_hot = self.importances > least
        ties = (self.importances == least).nonzero().squeeze(1)
        is_hot[ties[: self.n_hot - int(is_hot.sum())]] = True
        return is_hot

    def extra_repr(self) -> str:
        return f"n_ids={self.n_ids}, dim={self.dim}, n_hot={self.n_hot}, n_shared={self.n_shared}, steps={self.steps}"
