"""ClusteredEmbedding: sums of a clustered and a hashed row per chunk (CCE: Tsang and Ahle, NeurIPS 2023, arXiv 2210.05974).

A vector is cut into chunks. A chunk is the sum of a row of its first table, which the id's cluster names, and a row of its second table,
which a hash names. Some times in training the current chunks of all ids are clustered by k-means: the clusters become the assignment, the
centroids the rows of the first table, the rows of the second one become zeros, and its hash is drawn anew. Before the first clustering the
assignment is a hash as well. What is stored is the tables and the assignment; the hash is a seed and a number of clusterings.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from graphhash.errors import ArgumentError
from graphhash.maps.hashes import universal_hash
from graphhash.maps.product import kmeans
from graphhash.nn.compressed import OovVectorEmbedding, StoredTable
from graphhash.nn.table_reads import MapRead, read_table


class ClusteredEmbedding(OovVectorEmbedding):
    """``embedding(id)`` = chunks ``first[c][cluster(id, c)] + second[c][hash(id, c)]``, one after the other.

    Args:
        n_ids: ids of the vocabulary.
        dim: length of a vector.
        n_chunks: chunks of a vector; divides ``dim``.
        n_rows: rows of each of the ``2 * n_chunks`` tables.
        n_clusterings: how often :meth:`before_epoch` clusters; evenly over the first half of the training.
        seed: of the hash functions and of the k-means.
        std: standard deviation of the normal initial values.
        generator: draws them; torch's global generator when None.

    Raises:
        ArgumentError: ``n_chunks`` does not divide ``dim``, or there are no rows.

    Attributes:
        table: trained parameter, float32, shape (2 * n_chunks * n_rows, dim / n_chunks): first tables, then second ones.
        clusters: buffer, int32, shape (n_ids, n_chunks), in [0, n_rows).
        clustered: buffer, int64, shape (2,): how often it was clustered, and before which epoch it was last.
        rows: buffer, int32, shape (n_ids * n_chunks, 2): the rows of ``table`` that a chunk sums; follows from the others.
    """

    clusters: Tensor
    clustered: Tensor
    rows: Tensor
    stored_buffers: ClassVar[tuple[str, ...]] = ("oov", "clusters", "clustered")

    def __init__(
        self,
        n_ids: int,
        dim: int,
        *,
        n_chunks: int,
        n_rows: int,
        n_clusterings: int = 4,
        seed: int,
        std: float = 0.1,
        generator: torch.Generator | None = None,
    ):
        super().__init__(n_ids, dim)
        if n_chunks < 1 or dim % n_chunks:
            raise ArgumentError(f"{n_chunks} chunks do not divide the dim {dim}; use a divisor of it")
        if n_rows < 1:
            raise ArgumentError(f"every table needs at least 1 row, got {n_rows}")
        self.n_chunks, self.n_rows, self.n_clusterings, self.seed = n_chunks, n_rows, n_clusterings, seed
        self.table = nn.Parameter(torch.empty(2 * n_chunks * n_rows, dim // n_chunks))
        with torch.no_grad():
            self.table.normal_(std=std, generator=generator)
        clusters = _hashed(n_ids, n_chunks, n_rows, np.random.default_rng([seed, 0, 1]))
        self.register_buffer("clusters", torch.from_numpy(clusters))
        self.register_buffer("clustered", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("rows", torch.empty(n_ids * n_chunks, 2, dtype=torch.int32), persistent=False)
        self._place()
        self.register_load_state_dict_post_hook(lambda module, _: module._place())

    def _place(self) -> None:
        """Set ``rows`` from the assignment and from the hash of the current clustering."""
        n_tables = torch.arange(self.n_chunks, dtype=torch.int32) * self.n_rows
        rng = np.random.default_rng([self.seed, int(self.clustered[0])])
        hashed = torch.from_numpy(_hashed(self.n_ids, self.n_chunks, self.n_rows, rng))
        first = self.clusters.cpu() + n_tables
        second = hashed + n_tables + self.n_chunks * self.n_rows
        self.rows.copy_(torch.stack([first.reshape(-1), second.reshape(-1)], dim=1))

    @property
    def map_bytes(self) -> int:
        """Bytes of the OOV vector and of the assignment, in 16 bits where they do."""
        return super().map_bytes + self.clusters.numel() * (2 if self.n_rows <= 2**16 else 4)

    def stored_tables(self, precision: str) -> list[StoredTable]:
        """The tables, row by row in ``precision``."""
        return [StoredTable(self.table, precision)]

    def vectors(self, ids: Tensor) -> Tensor:
        """Vectors of known ids: shape (n, dim)."""
        entries = ids[:, None] * self.n_chunks + torch.arange(self.n_chunks, device=self.device)
        read = MapRead(self.rows, None, None, entries.reshape(-1))
        return read_table(self.table, read, weighted=False).reshape(-1, self.dim)

    def before_epoch(self, epoch: int, n_epochs: int) -> None:
        """Cluster before the epochs that follow each ``1 / (2 * n_clusterings)`` of the training; once, if it is resumed there."""
        every = max(1, n_epochs // (2 * self.n_clusterings))
        n_done = (epoch - 1) // every
        if (epoch - 1) % every == 0 and 1 <= n_done <= self.n_clusterings and self.clustered[1] < epoch:
            self.cluster()
            self.clustered[1] = epoch

    @torch.no_grad()
    def cluster(self) -> None:
        """Cluster the chunks of all ids, as described at the top of this module.

        Raises:
            ArgumentError: FAISS is not installed.
        """
        chunks = self.all().reshape(self.n_ids, self.n_chunks, -1).cpu().numpy()
        tables = self.table.view(2, self.n_chunks, self.n_rows, -1)
        for chunk in range(self.n_chunks):
            centroids, clusters = kmeans(chunks[:, chunk], self.n_rows, seed=self.seed + chunk)
            tables[0, chunk].copy_(torch.from_numpy(centroids))
            self.clusters[:, chunk] = torch.from_numpy(clusters)
        tables[1].zero_()
        self.clustered[0] += 1
        self._place()

    def extra_repr(self) -> str:
        return f"n_ids={self.n_ids}, dim={self.dim}, n_chunks={self.n_chunks}, n_rows={self.n_rows}"


def _hashed(n_ids: int, n_chunks: int, n_rows: int, rng: np.random.Generator) -> np.ndarray:
    """A universal hash of every id per chunk, int32, shape (n_ids, n_chunks)."""
    ids = np.arange(n_ids)
    return np.stack([universal_hash(ids, n_rows, rng) for _ in range(n_chunks)], axis=1).astype(np.int32)
