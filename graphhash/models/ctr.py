"""CTR models over compressed columns: Wide&Deep, DeepFM, DCN-V2, DLRM and FinalNet.

All take a :class:`FeatureBatch` and return logits. A model is an embedding layer (:class:`graphhash.models.ctr_fields.FieldEmbeddings`)
and a head, in which the columns interact. No model depends on how a column's bucket map was made. Everything that a model holds per id
goes through the map: first-order weights are a scalar per table row. ``id_bias``, a scalar per id of the compressed columns, is the one
exception, and is off by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphhash.errors import ArgumentError
from graphhash.maps.bucket_map import BucketMap, full_map
from graphhash.maps.embedding_spec import EmbeddingSpec
from graphhash.maps.folded_map import FoldedMap
from graphhash.models.ctr_fields import FieldEmbeddings, TableSlice
from graphhash.models.ctr_layers import (
    BatchNorm,
    CrossNetwork,
    DotInteraction,
    Dropout,
    FactorizedPerceptron,
    FieldGate,
    Perceptron,
    binary_loss,
    fm_interaction,
)
from graphhash.nn.compressed import CompressedEmbedding
from graphhash.nn.embedding import BucketEmbedding

STRUCTURES = ("stacked", "parallel")


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """Features of some samples.

    Args:
        categorical: entries of each column's vocabulary, int64, shape (batch, n_categorical); a column's ``n_ids`` stands for an OOV id.
        dense: normalised numbers, float32, shape (batch, n_dense), none of them NaN.
        multi_valued: entries of each multi-valued (multi-hot) column, int64, shape (batch, width) each, -1 for an empty slot.
        fold: fold of each sample, int64, shape (batch,), in training with cross-fitted maps (:meth:`CtrModel.use_folds`).

    Raises:
        ArgumentError: a type or shape is not as above.
    """

    categorical: Tensor
    dense: Tensor
    multi_valued: tuple[Tensor, ...] = ()
    fold: Tensor | None = None

    def __post_init__(self):
        for name, tensor, dtype in (
            ("categorical", self.categorical, torch.int64),
            ("dense", self.dense, torch.float32),
            *((f"multi-valued column {n}", values, torch.int64) for n, values in enumerate(self.multi_valued)),
        ):
            if tensor.dtype != dtype or tensor.ndim != 2 or len(tensor) != len(self.categorical):
                raise ArgumentError(
                    f"{name} must be {dtype} of shape ({len(self.categorical)}, .), got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )

    def __len__(self) -> int:
        return len(self.categorical)

    def take(self, rows: Tensor) -> FeatureBatch:
        """The batch of some rows, int64, shape (n,), on the same device."""
        return FeatureBatch(
            self.categorical.index_select(0, rows),
            self.dense.index_select(0, rows),
            tuple(values.index_select(0, rows) for values in self.multi_valued),
            None if self.fold is None else self.fold.index_select(0, rows),
        )

    def to(self, device: torch.device | str) -> FeatureBatch:
        """The batch on another device."""
        fold = None if self.fold is None else self.fold.to(device)
        return FeatureBatch(
            self.categorical.to(device),
            self.dense.to(device),
            tuple(values.to(device) for values in self.multi_valued),
            fold,
        )


@dataclass(frozen=True)
class CtrSpec:
    """Architecture and initial values of a CTR model.

    Args:
        kind: one of HEADS.
        dim: length of a column's vector.
        hidden: units of the hidden layers; even numbers with FinalNet.
        dense_hidden: units of the layers before the vector that DLRM makes of dense columns.
        n_cross: cross layers of DCN-V2.
        cross_rank: rank of their matrices; None: square matrices.
        structure: of DCN-V2: the network reads the cross layers' output ("stacked"), or the input as they do ("parallel").
        dropout: rate behind hidden layers.
        id_bias: train a scalar per id of every compressed categorical column, added to the logit.
        std: standard deviation of the vectors' initial values.
        seed: draws the initial values.
        embeddings: kind and sizes of the columns, by number, that are compressed in another way than by a bucket map alone
            (``graphhash.nn.kinds``).

    Raises:
        ArgumentError: a value is out of range.
    """

    kind: str
    dim: int = 16
    hidden: tuple[int, ...] = (256, 128)
    dense_hidden: tuple[int, ...] = (64,)
    n_cross: int = 2
    cross_rank: int | None = None
    structure: str = "parallel"
    dropout: float = 0.0
    id_bias: bool = False
    std: float = 0.05
    seed: int = 0
    embeddings: tuple[tuple[int, EmbeddingSpec], ...] = ()

    def __post_init__(self):
        if self.kind not in HEADS:
            raise ArgumentError(f"kind is {self.kind!r}; use one of {', '.join(HEADS)}")
        if self.structure not in STRUCTURES:
            raise ArgumentError(f"structure is {self.structure!r}; use one of {', '.join(STRUCTURES)}")
        if self.dim < 1 or self.n_cross < 0 or any(units < 1 for units in (*self.hidden, *self.dense_hidden)):
            raise ArgumentError(
                f"sizes must be 1 or more: dim {self.dim}, hidden {self.hidden}, dense_hidden {self.dense_hidden}, n_cross {self.n_cross}"
            )
        if self.kind == "finalnet" and any(units % 2 for units in self.hidden):
            raise ArgumentError(f"hidden is {self.hidden}; layers of finalnet have an even number of units each")
        if self.cross_rank is not None and self.cross_rank < 1:
            raise ArgumentError(f"cross_rank is {self.cross_rank}; use 1 or more, or None for square matrices")
        if not 0 <= self.dropout < 1 or self.std < 0:
            raise ArgumentError(f"dropout must be in [0, 1) and std not negative, got {self.dropout} and {self.std}")

    @property
    def first_order(self) -> bool:
        """Whether the model has first-order weights."""
        return self.kind in ("widedeep", "deepfm")

    def build(
        self,
        maps: Sequence[BucketMap],
        n_dense: int,
        n_multi_valued: int = 0,
        *,
        n_trained: Sequence[int] | None = None,
    ) -> CtrModel:
        """The model with its initial weights.

        Args:
            maps: of the categorical columns, then of the multi-valued ones.
            n_dense: dense columns.
            n_multi_valued: how many of the maps are of multi-valued columns.
            n_trained: ids of every column at the training, where the maps have more; the head reads the fields in an order of theirs.

        Raises:
            ArgumentError: as :class:`graphhash.models.ctr_fields.FieldEmbeddings`.
        """
        return CtrModel(self, maps, n_dense, n_multi_valued, n_trained)


class CtrModel(nn.Module):
    """``logit = head(vectors, dense) + first-order weights + id biases``; see :meth:`CtrSpec.build`.

    Attributes:
        calibration: slope and offset of the logits that :meth:`forward` returns, float32, shape (2,); 1 and 0 until
            :meth:`calibrate`. The loss knows nothing of them.
        embeddings: of every column, in the order of the maps: ``n_ids``, ``all()``, and of bucket maps ``table`` and ``oov_row``.
    """

    bias_columns: Tensor
    calibration: Tensor

    def __init__(
        self,
        spec: CtrSpec,
        maps: Sequence[BucketMap],
        n_dense: int,
        n_multi_valued: int,
        n_trained: Sequence[int] | None = None,
    ):
        super().__init__()
        self.spec, self.n_dense = spec, n_dense
        generator = torch.Generator().manual_seed(spec.seed)
        self.fields = FieldEmbeddings(
            maps,
            spec.dim,
            n_multi_valued=n_multi_valued,
            std=spec.std,
            generator=generator,
            specs=dict(spec.embeddings),
            n_trained=n_trained,
        )
        # First-order weights of what is no bucket map are a scalar per id.
        others = dict(spec.embeddings)
        of_wide = [full_map(m.n_ids) if c in others else m for c, m in enumerate(maps)]
        self.wide = FieldEmbeddings(of_wide, 1, n_multi_valued=n_multi_valued, std=0.0) if spec.first_order else None
        compressed = compressed_columns(spec, maps, n_multi_valued) if spec.id_bias else []
        self.bias = FieldEmbeddings([full_map(maps[c].n_ids) for c in compressed], 1, std=0.0) if compressed else None
        self.register_buffer("bias_columns", torch.tensor(compressed, dtype=torch.int64), persistent=False)
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            self.wide_dense = nn.Linear(n_dense, 1, bias=False) if spec.first_order and n_dense else None
            self.head = HEADS[spec.kind](spec, len(maps), n_dense)

    @property
    def embeddings(self) -> list[CompressedEmbedding | TableSlice]:
        return self.fields.columns

    def forward(self, batch: FeatureBatch) -> Tensor:
        """Logits of the positive label, calibrated, float32, shape (batch,)."""
        return self.calibration[0] * self._logits(batch) + self.calibration[1]

    def calibrate(self, slope: float, offset: float) -> None:
        """Set the slope and the offset of the logits, such as those of `graphhash.metrics.ctr.fit_calibration`.

        Raises:
            ArgumentError: the slope is not positive, or a number is not finite.
        """
        if not (0 < slope < math.inf and math.isfinite(offset)):
            raise ArgumentError(f"a calibration has a positive slope and a finite offset, not {slope} and {offset}")
        self.calibration.copy_(torch.tensor([slope, offset]))

    def loss(self, batch: FeatureBatch, labels: Tensor) -> Tensor:
        """Mean binary cross-entropy of the labels, 0 or 1, shape (batch,).

        FinalNet adds that of each of its two streams with the model's own probabilities as labels, which have no gradient: each
        learns from both (Zhu et al., SIGIR 2023, self-knowledge distillation).
        """
        if not isinstance(self.head, FinalNetHead):
            return binary_loss(self._logits(batch), labels)
        first, second = self.head.streams(self._vectors(batch), batch.dense)
        logits, apart = self._with_scalars((first + second) / 2, batch), (first - second) / 2
        taught = torch.sigmoid(logits.detach())
        return binary_loss(logits, labels) + binary_loss(logits + apart, taught) + binary_loss(logits - apart, taught)

    def _logits(self, batch: FeatureBatch) -> Tensor:
        return self._with_scalars(self.head(self._vectors(batch), batch.dense), batch)

    def _vectors(self, batch: FeatureBatch) -> Tensor:
        return self.fields(batch.categorical, batch.multi_valued, batch.fold)

    def _with_scalars(self, logits: Tensor, batch: FeatureBatch) -> Tensor:
        """The head's logits plus first-order weights and id biases."""
        if self.wide is not None:
            logits = logits + self.wide(batch.categorical, batch.multi_valued, batch.fold).sum((1, 2))
        if self.wide_dense is not None:
            logits = logits + self.wide_dense(batch.dense).squeeze(1)
        if self.bias is not None:
            logits = logits + self.bias(batch.categorical.index_select(1, self.bias_columns), ()).sum((1, 2))
        return logits

    def use_folds(self, folded: Mapping[int, BucketMap | FoldedMap]) -> None:
        """Let batches with a ``fold`` read the tables of some columns, by number, through cross-fitted maps; others read as before.

        Raises:
            ArgumentError: as :meth:`graphhash.models.ctr_fields.FieldEmbeddings.use_folds`.
        """
        self.fields.use_folds(folded)
        if self.wide is not None:
            others = dict(self.spec.embeddings)
            self.wide.use_folds({number: bucket_map for number, bucket_map in folded.items() if number not in others})

    def use_generator(self, generator: torch.Generator) -> None:
        """Let dropout draw from ``generator``, which is on the model's device."""
        for module in self.modules():
            if isinstance(module, Dropout):
                module.generator = generator

    def fill_oov(self, counts: Sequence[Tensor]) -> None:
        """Set the OOV row of a column to the mean vector, weight and bias of its ids, where training did not read it.

        Where OOV entries occurred, and where ids read the OOV row (in soft maps, those without a positive), it is trained and stays.

        Args:
            counts: of every column, how often each entry occurred in training, shape (n_ids + 1,), OOV last.
        """
        counts = [torch.as_tensor(c) for c in counts]
        for part in (self.fields, self.wide):
            if part is not None:
                part.fill_oov(counts)
        if self.bias is not None:
            self.bias.fill_oov([counts[c] for c in self.bias_columns.tolist()])

    def bucket_embeddings(self) -> list[BucketEmbedding]:
        """All embeddings that hold a table, each once."""
        return [module for module in self.modules() if isinstance(module, BucketEmbedding)]

    def learned_buffers(self) -> dict[str, Tensor]:
        """Buffers that are stored with the weights, because training has changed them, by name in the module."""
        own = enumerate(self.fields.own)
        norms = ((name, module) for name, module in self.named_modules() if isinstance(module, BatchNorm))
        of_norms = {f"{name}.{part}": buffer for name, norm in norms for part, buffer in norm.named_buffers()}
        return {"calibration": self.calibration, **of_norms} | {
            f"fields.own.{number}.{name}": buffer
            for number, embedding in own
            if isinstance(embedding, CompressedEmbedding)
            for name, buffer in embedding.learned_buffers().items()
        }

    def before_epoch(self, epoch: int, n_epochs: int) -> None:
        """As :meth:`CompressedEmbedding.before_epoch`, for every column."""
        for embedding in self.fields.own:
            if isinstance(embedding, CompressedEmbedding):
                embedding.before_epoch(epoch, n_epochs)


def compressed_columns(spec: CtrSpec, maps: Sequence[BucketMap], n_multi_valued: int) -> list[int]:
    """Numbers of the categorical columns that are not full."""
    specs = dict(spec.embeddings)
    return [c for c, m in enumerate(maps[: len(maps) - n_multi_valued]) if not m.identity or c in specs]


class DeepHead(nn.Module):
    """A perceptron over the vectors of all fields and the dense columns: the deep part of Wide&Deep (Cheng et al., DLRS 2016)."""

    def __init__(self, spec: CtrSpec, n_fields: int, n_dense: int):
        super().__init__()
        self.network = Perceptron(n_fields * spec.dim + n_dense, spec.hidden, spec.dropout)
        self.out = nn.Linear(self.network.n_out, 1)

    def forward(self, vectors: Tensor, dense: Tensor) -> Tensor:
        return self.out(self.network(concatenated(vectors, dense))).squeeze(1)


class DeepFmHead(DeepHead):
    """The same plus a factorisation machine over the same vectors (Guo et al., IJCAI 2017)."""

    def forward(self, vectors: Tensor, dense: Tensor) -> Tensor:
        return super().forward(vectors, dense) + fm_interaction(vectors)


class DcnV2Head(nn.Module):
    """Cross layers before a perceptron, or beside it (Wang et al., WWW 2021, section 3)."""

    def __init__(self, spec: CtrSpec, n_fields: int, n_dense: int):
        super().__init__()
        n_in = n_fields * spec.dim + n_dense
        self.stacked = spec.structure == "stacked"
        self.cross = CrossNetwork(n_in, spec.n_cross, spec.cross_rank)
        self.network = Perceptron(n_in, spec.hidden, spec.dropout)
        self.out = nn.Linear(self.network.n_out + (0 if self.stacked else n_in), 1)

    def forward(self, vectors: Tensor, dense: Tensor) -> Tensor:
        first = concatenated(vectors, dense)
        crossed = self.cross(first)
        if self.stacked:
            return self.out(self.network(crossed)).squeeze(1)
        # The weights in two parts, rather than both outputs side by side: copies of them take 2 % of a training step.
        of_crossed, of_units = self.out.weight[0].split([crossed.shape[1], self.network.n_out])
        return crossed @ of_crossed + self.network(first) @ of_units + self.out.bias


class DlrmHead(nn.Module):
    """Inner products of all pairs of vectors, one of which is made of the dense columns, into a perceptron (Naumov et al., 2019)."""

    def __init__(self, spec: CtrSpec, n_fields: int, n_dense: int):
        super().__init__()
        self.dense = Perceptron(n_dense, (*spec.dense_hidden, spec.dim)) if n_dense else None
        self.dots = DotInteraction(n_fields + (1 if n_dense else 0))
        self.network = Perceptron(self.dots.n_out + (spec.dim if n_dense else 0), spec.hidden, spec.dropout)
        self.out = nn.Linear(self.network.n_out, 1)

    def forward(self, vectors: Tensor, dense: Tensor) -> Tensor:
        if self.dense is None:
            units = self.dots(vectors)
        else:
            of_dense = self.dense(dense)
            units = torch.cat([of_dense, self.dots(torch.cat([of_dense.unsqueeze(1), vectors], 1))], 1)
        return self.out(self.network(units)).squeeze(1)


class FinalNetHead(nn.Module):
    """Two streams of factorized layers, one of them over gated fields, whose logits' mean is the logit (Zhu et al., SIGIR 2023).

    The second stream has the first of the hidden layers alone.
    """

    def __init__(self, spec: CtrSpec, n_fields: int, n_dense: int):
        super().__init__()
        n_in = n_fields * spec.dim
        self.gate = FieldGate(n_fields)
        self.network = FactorizedPerceptron(2 * n_in + n_dense, spec.hidden, spec.dropout)
        self.second = FactorizedPerceptron(n_in + n_dense, spec.hidden[:1], spec.dropout)
        self.out, self.out_second = nn.Linear(self.network.n_out, 1), nn.Linear(self.second.n_out, 1)

    def streams(self, vectors: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of each, shape (batch,)."""
        first = self.out(self.network(concatenated(self.gate(vectors), dense)))
        return first.squeeze(1), self.out_second(self.second(concatenated(vectors, dense))).squeeze(1)

    def forward(self, vectors: Tensor, dense: Tensor) -> Tensor:
        first, second = self.streams(vectors, dense)
        return (first + second) / 2


HEADS: dict[str, Callable[[CtrSpec, int, int], nn.Module]] = {
    "widedeep": DeepHead,
    "deepfm": DeepFmHead,
    "dcnv2": DcnV2Head,
    "dlrm": DlrmHead,
    "finalnet": FinalNetHead,
}


def concatenated(vectors: Tensor, dense: Tensor) -> Tensor:
    """Vectors of all fields, shape (batch, n_fields, dim), and dense columns side by side: (batch, n_fields * dim + n_dense)."""
    flat = vectors.flatten(1)
    return torch.cat([flat, dense], 1) if dense.shape[1] else flat
