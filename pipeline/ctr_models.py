"""The click-through models of a run by name, and how each is trained with each method unless told otherwise.

All defaults were chosen on Frappe's validation rows, with the rows that ``graph`` has at resolution 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from graphhash.ctr import HEADS, CtrModel, CtrSpec
from graphhash.embedding import BucketEmbedding
from pipeline.models import SELDOM

CTR_MODELS = tuple(HEADS)
METHOD_CLASSES = ("full", "hash", "graph", "soft")

# Settings of the maps that have any, as :func:`graphhash.soft_maps` and :func:`graphhash.double_soft_maps` take them; they are cross-fitted
# (``pipeline.ctr_maps``). Frequencies are those of all training rows, clicked or not. Validation log loss of DLRM on Frappe: soft with 8 lookups
# .124, 16 .116, 32 .110, for the bytes of as many row numbers; double_soft with a share of 0.25 .123, 0.5 .127, 0.75 .179.
MAP_SETTINGS: dict[str, dict[str, Any]] = {
    "soft": {"n_lookups": 8, "hops": "1+2"},
    "double_soft": {"n_lookups": 9, "hops": "1+2", "share": 0.25, "own": 0.5},
}


@dataclass(frozen=True)
class CtrRecipe:
    """How a model is trained with a class of methods.

    Args:
        lr: of Adam, falling to 0 along a half cosine over ``epochs``.
        weight_decay: of Adam, on every parameter.
        epochs, batch_size: as in ``pipeline.config.TrainConfig``.
        patience: evaluations, one an epoch, without a higher validation AUC before training ends.
        id_bias: whether compressed categorical columns get a trained scalar per id.
        dim, hidden, dropout, n_cross, structure, std: as in :class:`graphhash.ctr.CtrSpec`.
    """

    lr: float = 3e-3
    weight_decay: float = 1e-4
    epochs: int = 6
    batch_size: int = 2048
    patience: int = 2
    id_bias: bool = False
    dim: int = 64
    hidden: tuple[int, ...] = (64, 32)
    dropout: float = 0.0
    n_cross: int = 2
    structure: str = "parallel"
    std: float = 0.05

    def spec(self, kind: str, seed: int, **changes: Any) -> CtrSpec:
        """What the model is: ``kind`` with the recipe's sizes, but for ``changes``, which are fields of CtrSpec."""
        sizes = {name: getattr(self, name) for name in ("id_bias", "dim", "hidden", "dropout", "n_cross", "structure", "std")}
        return CtrSpec(kind, seed=seed, **(sizes | changes))


def method_class(method: str) -> str:
    """Which recipes a method of ``pipeline.methods`` takes: one of METHOD_CLASSES."""
    named = {"full": "full", "soft": "soft", "double_soft": "soft"}
    named |= dict.fromkeys(("graph", "double_graph", "multilevel", "balanced"), "graph")
    return named.get(method, "hash")


# DLRM sees products alone, learns fast, and is held down: by less where ids share rows by chance (DLRM with double_frequency: validation AUC .9683
# for 3e-5, .9632 for 1e-4).
_PRODUCTS = {
    "full": CtrRecipe(),
    "hash": CtrRecipe(id_bias=True, weight_decay=3e-5),
    "graph": CtrRecipe(id_bias=True),
    "soft": CtrRecipe(id_bias=True),
}
# A perceptron finds products slowly: Wide&Deep with double_soft has a validation AUC of .967 after two epochs so, and of .941 with rate 3e-3,
# deviation 0.05, batches of 2,048 and hidden layers of 256 and 128 units.
_PERCEPTRON = CtrRecipe(lr=1e-2, weight_decay=1e-6, epochs=5, batch_size=1024, dim=16, std=0.2)
_PERCEPTRONS = {group: replace(_PERCEPTRON, id_bias=group != "full") for group in METHOD_CLASSES}

CTR_RECIPES: dict[tuple[str, str], CtrRecipe] = {
    (model, group): recipe
    for model, recipes in (("widedeep", _PERCEPTRONS), ("deepfm", _PERCEPTRONS), ("dcnv2", _PERCEPTRONS), ("dlrm", _PRODUCTS))
    for group, recipe in recipes.items()
}


def recipe_of(model: str, method: str) -> CtrRecipe:
    """The defaults for a model and a method, by their names.

    Raises:
        KeyError: the model is none of CTR_MODELS.
    """
    return CTR_RECIPES[model, method_class(method)]


def seldom_read(model: CtrModel, batch_size: int, bag_widths: tuple[int, ...] = ()) -> list[BucketEmbedding]:
    """Embeddings of which a training step reads few rows, so that :class:`graphhash.row_adam.RowAdam` is faster than Adam; none off the CPU.

    Args:
        batch_size: rows of the log that a step takes.
        bag_widths: of the batches' bags.
    """
    reads: dict[Tensor, int] = {}
    found = []
    for part in (model.fields, model.wide, model.bias):
        if part is None:
            continue
        widths = [1] * part.n_categorical + list(bag_widths)[: len(part.columns) - part.n_categorical]
        for embedding, columns in part.readers():
            n_reads = sum(widths[c] for c in columns) * batch_size * embedding.rows.shape[1]
            reads[embedding.table] = reads.get(embedding.table, 0) + n_reads
            found.append(embedding)
    return [e for e in found if e.table.device.type == "cpu" and reads[e.table] * SELDOM <= len(e.table)]
