"""Compressed embeddings by the name of their kind, made in pairs: one of the users and one of the items of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from graphhash.errors import ArgumentError, did_you_mean
from graphhash.maps.bucket_map import BucketMap
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.maps.vector_codes import MAX_CODEWORDS
from graphhash.nn.cafe import CafeEmbedding
from graphhash.nn.cce import ClusteredEmbedding
from graphhash.nn.codes import CodeEmbedding
from graphhash.nn.compressed import CompressedEmbedding
from graphhash.nn.dhe import DeepHashEmbedding
from graphhash.nn.embedding import BucketEmbedding
from graphhash.nn.residual import ResidualEmbedding
from graphhash.nn.robe import RobeEmbedding


@dataclass(frozen=True)
class Side:
    """What the embedding of one side, users or items, is made from.

    Args:
        bucket_map: of its ids; the identity where the kind has no use for one.
        dim: length of a vector.
        spec: kind, sizes and seed.
        std: standard deviation of initial values.
        generator: draws them.
        users: the embedding of the users, where this is the items' and may share its parameters.
    """

    bucket_map: BucketMap
    dim: int
    spec: EmbeddingSpec
    std: float
    generator: torch.Generator
    users: CompressedEmbedding | None = None

    @property
    def n_ids(self) -> int:
        return self.bucket_map.n_ids

    @property
    def seed(self) -> int:
        """Of the hash functions of this side."""
        return self.spec.seed + (self.users is not None)

    def size(self, name: str) -> int:
        """A whole number of the spec.

        Raises:
            ArgumentError: the spec has none of this name.
        """
        if name not in self.spec.sizes:
            raise ArgumentError(f"embedding {self.spec.kind!r} needs the size {name!r}, got {dict(self.spec.sizes)}")
        return self.spec.sizes[name]


def _bucket(side: Side) -> BucketEmbedding:
    shared = side.users if side.bucket_map.shared else None
    assert shared is None or isinstance(shared, BucketEmbedding)
    table = None if shared is None else shared.table
    return BucketEmbedding(side.bucket_map, side.dim, std=side.std, generator=side.generator, table=table)


def _product(side: Side) -> CodeEmbedding:
    return CodeEmbedding(
        side.n_ids,
        side.dim,
        n_codes=side.size("codes_per_id"),
        n_codewords=side.size("items_codewords" if side.users is not None else "users_codewords"),
        rotated=bool(side.size("rotated")),
    )


def _additive(side: Side) -> CodeEmbedding:
    # Users and items have the same codewords, and are rotated in the same way, where there are several groups.
    assert side.users is None or isinstance(side.users, CodeEmbedding)
    n_groups = side.size("n_groups")
    return CodeEmbedding(
        side.n_ids, side.dim, n_codes=side.size("codes_per_id"), n_codewords=MAX_CODEWORDS, n_groups=n_groups, rotated=n_groups > 1,
        precision=f"int{side.size('codeword_bits')}", shared_with=side.users,
    )  # fmt: skip


def _robe(side: Side) -> RobeEmbedding:
    # One array for users and items.
    array = side.users.array if isinstance(side.users, RobeEmbedding) else None
    n_rows, block = side.size("rows"), side.size("block")
    return RobeEmbedding(
        side.n_ids, side.dim, n_rows=n_rows, block=block, seed=side.seed, std=side.std, generator=side.generator, array=array
    )  # fmt: skip


def _dhe(side: Side) -> DeepHashEmbedding:
    sizes = {name: side.size(name) for name in ("n_hashes", "width", "n_layers")}
    return DeepHashEmbedding(side.n_ids, side.dim, **sizes, seed=side.seed, generator=side.generator)


def _cce(side: Side) -> ClusteredEmbedding:
    n_rows = side.size("item_rows" if side.users is not None else "user_rows")
    return ClusteredEmbedding(
        side.n_ids, side.dim, n_chunks=side.size("n_chunks"), n_rows=n_rows, n_clusterings=side.size("n_clusterings"),
        seed=side.seed, std=side.std, generator=side.generator,
    )  # fmt: skip


def _cafe(side: Side) -> CafeEmbedding:
    name = "item" if side.users is not None else "user"
    return CafeEmbedding(
        side.n_ids, side.dim, n_hot=side.size(f"{name}_hot_rows"), n_shared=side.size(f"{name}_shared_rows"),
        steps=side.size("steps"), seed=side.seed, std=side.std, generator=side.generator,
    )  # fmt: skip


def _residual(side: Side) -> ResidualEmbedding:
    assert side.users is None or isinstance(side.users, ResidualEmbedding)
    return ResidualEmbedding(
        side.bucket_map, side.dim, own_dim=side.size("own_dim"), own_bits=side.size("own_bits"),
        projected=bool(side.spec.sizes.get("projected", 1)),
        std=side.std, generator=side.generator, users=side.users,
    )  # fmt: skip


KINDS: dict[str, Callable[[Side], CompressedEmbedding]] = {
    "bucket": _bucket,
    "product": _product,
    "additive": _additive,
    "cce": _cce,
    "cafe": _cafe,
    "robe": _robe,
    "dhe": _dhe,
    "residual": _residual,
}


def make_embeddings(
    users: BucketMap, items: BucketMap, dim: int, spec: EmbeddingSpec, *, std: float, seed: int
) -> tuple[CompressedEmbedding, CompressedEmbedding]:
    """Embeddings of users and items; those of maps that share a table have one.

    Args:
        std: standard deviation of initial values.
        seed: draws them, the users' first.

    Raises:
        ArgumentError: the kind is unknown, one map shares its table and the other does not, or both have the same OOV row.
    """
    if users.shared != items.shared or (users.shared and users.oov_row == items.oov_row):
        raise ArgumentError("the maps of users and items were not made together: pass both of one call")
    generator = torch.Generator().manual_seed(seed)
    of_users = make_embedding(Side(users, dim, spec, std, generator))
    return of_users, make_embedding(Side(items, dim, spec, std, generator, of_users))


def make_embedding(side: Side) -> CompressedEmbedding:
    """The embedding of one side.

    Raises:
        ArgumentError: the kind is unknown, or its spec lacks a size.
    """
    if side.spec.kind not in KINDS:
        hint = did_you_mean(side.spec.kind, KINDS)
        raise ArgumentError(f"unknown embedding {side.spec.kind!r}; {hint}kinds are {', '.join(KINDS)}")
    return KINDS[side.spec.kind](side)
