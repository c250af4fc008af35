"""Parity with the CPU: losses, gradients, scores and steps of a device beside those of the compiled CPU paths.

Both sides start from the same weights and see the same batch and negatives, so that what differs is arithmetic. Gradients are compared,
and not weights after Adam's first steps, which divide a gradient by its own size and turn the last bits of a small one into a whole step.
Dropout and vector noise draw from a device's own generator and are left out.

The CPU's kernels are for float32. Where the device is the CPU itself, the other side is in float64, which takes the same paths as a GPU.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphhash.errors import first_line
from graphhash.maps.embedding_spec import BUCKET, EmbeddingSpec
from graphhash.maps.soft_maps import soft_maps
from graphhash.models.ctr_layers import Dropout, binary_loss
from graphhash.models.mf import RetrievalModel
from graphhash.models.samplers import NegativeSampler, Shared
from graphhash.nn.codes import CodeEmbedding
from graphhash.nn.row_adam import RowAdam
from graphhash.nn.workers import Workers
from pipeline.bench.gpu.data import INDICES_PER_ID, SMALL, CtrData, Data, halves
from pipeline.config.choices import PRECISIONS, SHARED_LOSSES
from pipeline.ctr.models import CTR_MODELS, CTR_PRESETS
from pipeline.maps.methods import METHODS, Inputs
from pipeline.retrieval.models import ModelSpec
from pipeline.retrieval.objective import LossSettings, objective
from pipeline.retrieval.presets import PRESETS
from pipeline.retrieval.stored import as_shipped, tables

# Of float32 sums in another order, relative to the norm of the whole tensor.
TOLERANCE = 1e-4
# Gradients below this share of the norm of all of them are compared with that: some are zero but for rounding, as that of a bias which a
# difference of scores cancels.
LEAST_GRADIENT = 1e-2
GRADIENT = "gradient of "
BATCH, N_SCORED, N_STEPS, N_FOLDS = 512, 50, 5, 2
# Sizes of the embeddings that are no bucket map.
SIZES: dict[str, dict[str, int]] = {
    "product": {"codes_per_id": 4, "users_codewords": 16, "items_codewords": 16, "rotated": 0},
    "additive": {"codes_per_id": 4, "n_groups": 2, "codeword_bits": 8},
    "cce": {"n_chunks": 4, "user_rows": 8, "item_rows": 8, "n_clusterings": 2},
    "cafe": {"user_hot_rows": 8, "user_shared_rows": 8, "item_hot_rows": 8, "item_shared_rows": 8, "steps": 4},
    "robe": {"rows": 32, "block": 4},
    "dhe": {"n_hashes": 16, "width": 32, "n_layers": 2},
    "residual": {"own_dim": 4, "own_bits": 8},
}


@dataclass(frozen=True)
class Comparison:
    """One comparison.

    Args:
        part: what kind of thing is compared.
        difference: the largest one of its tensors: norm of the difference over the norm of the CPU's; None where it failed.
        where: the tensor with this difference, or the error.
        trace: traceback of the error.
    """

    part: str
    name: str
    difference: float | None
    where: str
    tolerance: float = TOLERANCE
    trace: str = ""

    @property
    def passed(self) -> bool:
        return self.difference is not None and self.difference <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


class SameDraws(NegativeSampler):
    """Uniform negatives that are the same on every device: a new generator on the CPU draws them in each call."""

    def __call__(self, users: Tensor, generator: torch.Generator) -> Tensor:
        return super().__call__(users.cpu(), torch.Generator().manual_seed(1)).to(users.device)

    def shared(self, positives: Tensor, n: int, generator: torch.Generator, workers: Workers = Workers()) -> Shared:
        drawn = super().shared(positives.cpu(), n, torch.Generator().manual_seed(1), workers)
        return Shared(drawn.items.to(positives.device), None)


def compare_all(device: torch.device) -> Iterator[Comparison]:
    """Every model with every loss, every map, stored precision, optimizer and CTR model on ``device`` and on the CPU."""
    data = Data.draw(SMALL)
    checks = (*_losses(data, device), *_maps(data, device), *_optimizers(data, device), *_ctr(data, device))
    for part, name, check in checks:
        try:
            differences = check()
            where = max(differences, key=lambda key: differences[key])
            yield Comparison(part, name, differences[where], where)
        except Exception as error:  # One that fails must not hide the others.
            reason = f"{type(error).__name__}: {first_line(error)}"
            yield Comparison(part, name, None, reason, trace=traceback.format_exc())


# Part, name, and a function that returns the difference of every tensor.
Check = tuple[str, str, Callable[[], dict[str, float]]]


def _losses(data: Data, device: torch.device) -> Iterator[Check]:
    for (kind, loss), preset in PRESETS.items():
        settings = LossSettings(
            loss, temperature=preset.temperature, negatives=256, negative_weight=preset.negative_weight
        )
        spec = ModelSpec(kind, SMALL.dim, True, 2, 0, cosine=loss in SHARED_LOSSES, std=0.1)
        build = partial(spec.build, *data.maps("soft"), data.graph)
        step = partial(retrieval_step, data=data, settings=settings)
        yield "model and loss", f"{kind}, {loss}", partial(differences, build, step, device)


def _maps(data: Data, device: torch.device) -> Iterator[Check]:
    rng = np.random.default_rng(0)
    users, items = (rng.normal(size=(n, 6)).astype(np.float32) for n in data.graph.shape)
    inputs = Inputs(data.graph, data.labels, INDICES_PER_ID, "1+2", 0, features=lambda: (users, items))
    for name in METHODS:
        step = partial(retrieval_step, data=data, settings=LossSettings())
        # The hashes of dhe are numbers in float32.
        yield "map", name, partial(differences, partial(_mf, name, inputs), step, device, double=name != "dhe")
    for precision in PRECISIONS[1:]:
        build, step = partial(_mf, "soft", inputs), partial(stored, precision=precision)
        yield "stored precision", precision, partial(differences, build, step, device)


def _mf(name: str, inputs: Inputs) -> RetrievalModel:
    """Matrix factorization with the embeddings of a method; codes and codebooks are random."""
    method = METHODS[name]
    sizes = SIZES.get(method.embedding, {}) | ({"rotated": 1} if name == "full_opq" else {})
    embedding = EmbeddingSpec(method.embedding, sizes) if method.embedding != "bucket" else BUCKET
    model = ModelSpec("mf", SMALL.dim, True, 0, 0, embedding, std=0.1).build(*method.make(inputs), None)
    for part in (model.user_embedding, model.item_embedding):
        if isinstance(part, CodeEmbedding):
            nn.init.normal_(part.codebooks, generator=torch.Generator().manual_seed(0))
            part.codes.random_(0, part.n_codewords, generator=torch.Generator().manual_seed(0))
    return model


def _optimizers(data: Data, device: torch.device) -> Iterator[Check]:
    for name in ("full", "soft"):
        build = partial(ModelSpec("mf", SMALL.dim, True, 0, 0).build, *data.maps(name), None)
        yield "optimizer", name, partial(differences, build, steps, device)


def _ctr(data: Data, device: torch.device) -> Iterator[Check]:
    samples = CtrData.draw(data, BATCH, n_folds=N_FOLDS)
    folds = soft_maps(
        data.graph, data.labels, indices_per_id=INDICES_PER_ID, folds=halves(data.graph, np.random.default_rng(0))
    )

    def build(kind: str, name: str) -> nn.Module:
        maps = samples.maps(*data.maps(name))
        model = CTR_PRESETS[kind].spec(kind, name, 0).build(maps, samples.batch.dense.shape[1], 1)
        if name == "soft":
            model.use_folds(dict(enumerate(folds)))
        return model

    for kind in CTR_MODELS:
        for name in ("full", "soft"):
            step = partial(ctr_step, samples=samples)
            yield "CTR model", f"{kind}, {name}", partial(differences, partial(build, kind, name), step, device)


def differences(
    build: Callable[[], Any], step: Callable[[Any], dict[str, Tensor]], device: torch.device, *, double: bool = True
) -> dict[str, float]:
    """Of every tensor that ``step`` returns for a model on the CPU in float32, and for its copy on the device.

    Args:
        double: where the device is the CPU, the copy is in float64.
    """
    model = build()
    twin = copy.deepcopy(model)
    twin = twin.double() if device.type == "cpu" and double else twin.to(device)
    first, second = step(model), step(twin)
    assert first.keys() == second.keys(), f"{sorted(first)} and {sorted(second)}"
    norms = [float(tensor.detach().norm()) for name, tensor in first.items() if name.startswith(GRADIENT)]
    least = LEAST_GRADIENT * float(np.linalg.norm(norms))
    return {
        name: relative_difference(first[name], second[name], least=least if name.startswith(GRADIENT) else 0.0)
        for name in first
    }


def relative_difference(expected: Tensor, found: Tensor, *, least: float = 0.0) -> float:
    """Norm of the difference over that of the first, or over ``least`` where that is more; NaN counts as infinite."""
    first, second = (tensor.detach().cpu().double() for tensor in (expected, found))
    norm = max(float(torch.linalg.vector_norm(first)), least, 1e-12)
    value = float(torch.linalg.vector_norm(first - second)) / norm
    return value if np.isfinite(value) else float("inf")


def retrieval_step(model: RetrievalModel, data: Data, settings: LossSettings) -> dict[str, Tensor]:
    """The loss of a batch, gradients, and scores of all items for some users."""
    device = next(model.parameters()).device
    users, items = data.users[:BATCH].to(device), data.items[:BATCH].to(device)
    loss_of = objective(settings, SameDraws(data.graph), whole=False)
    loss = loss_of(model, users, items, torch.Generator(device))
    loss.backward()
    with torch.no_grad():
        scores = model.score_all_items()(torch.arange(N_SCORED, device=device))
    return {"loss": loss, "scores": scores, **gradients(model)}


def ctr_step(model: Any, samples: CtrData) -> dict[str, Tensor]:
    """The loss of a batch, logits with and without folds, and gradients."""
    parameter = next(model.parameters())
    batch = samples.batch.to(parameter.device)
    without_folds = replace(batch, fold=None)
    for one in (batch, without_folds):
        # A batch of float64 is for this comparison alone, and refused where batches are made.
        object.__setattr__(one, "dense", one.dense.to(parameter.dtype))
    for module in model.modules():
        if isinstance(module, Dropout):
            # It draws other numbers on another device.
            module.eval()
    logits = model(batch)
    loss = binary_loss(logits, samples.labels.to(parameter.device))
    loss.backward()
    with torch.no_grad():
        return {"loss": loss, "logits": logits, "logits without folds": model(without_folds), **gradients(model)}


def stored(model: RetrievalModel, precision: str) -> dict[str, Tensor]:
    """The tables that a bundle in ``precision`` holds."""
    shipped = as_shipped(model, precision)
    assert isinstance(shipped, RetrievalModel)
    return {f"table {n}": part.table for n, part in enumerate(tables(shipped, precision))}


def steps(model: nn.Module) -> dict[str, Tensor]:
    """What some steps with the same random gradients change, those of most rows being zero."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = RowAdam(model.parameters(), (), lr=1e-2, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(N_STEPS):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            read = torch.rand(len(parameter), generator=generator) < 0.2
            gradient[~read] = 0
            parameter.grad = gradient.to(parameter)
        optimizer.step()
    optimizer.finish()
    return {name: parameter - before[name] for name, parameter in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter that has one."""
    return {GRADIENT + name: p.grad for name, p in model.named_parameters() if p.grad is not None}
