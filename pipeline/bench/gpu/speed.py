"""Speed and memory of training on a device: examples per second, bytes held beside the forecast, and the bound that bandwidth sets.

Every measurement calls :func:`pipeline.training.loop.fit`, as a run does. The bound counts the least bytes that a step moves through
memory: parameters, gradients and both moments of Adam once, and the vectors that a batch reads, forwards and backwards. It leaves out
activations and caches, so the share of the bound that a training reaches says how far from it there is to go, and not what is possible.
"""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graphhash.errors import first_line
from graphhash.models.ctr import CtrModel, FeatureBatch
from graphhash.models.ctr_layers import binary_loss
from graphhash.models.lightgcn import LightGCN
from graphhash.models.mf import RetrievalModel
from graphhash.models.samplers import NegativeSampler
from graphhash.nn.embedding import BucketEmbedding
from pipeline.bench.gpu.data import MULTI_VALUED_WIDTH, CtrData, Data, Scale
from pipeline.bench.gpu.tables import NO_MEMORY
from pipeline.config.choices import SHARED_LOSSES
from pipeline.ctr.models import CTR_PRESETS
from pipeline.retrieval.models import ModelSpec
from pipeline.retrieval.objective import LossSettings, objective
from pipeline.retrieval.presets import PRESETS
from pipeline.training.loop import CONTINUE, STOP, Callbacks, FitSettings, LossOf, Objective, fit
from pipeline.training.memory import training_bytes

MAPS = ("full", "soft")
# Model, loss, and numbers of interactions per step beside the preset's; None: all interactions.
RETRIEVAL: tuple[tuple[str, str, tuple[int | None, ...]], ...] = (
    ("mf", "bpr", (None, 65_536)),
    ("mf", "softmax", (65_536,)),
    ("lightgcn", "bpr", (None,)),
)
CTR_BATCH = 65_536
N_LAYERS = 2
WARM_UP_STEPS = 3
FOREVER = 10**9
MIB = 2**20


@dataclass(frozen=True)
class Result:
    """One training.

    Args:
        batch: examples per step.
        per_second: examples per second; None: the training failed, and ``error`` says why.
        forecast_mib: ``training_bytes`` of the model.
        allocated_mib: what a step leaves allocated on the device beyond data and batch; None on a CPU.
        peak_mib: the most during a step, counted in the same way.
        bound_share: least time of a step by the bandwidth over its time.
        trace: traceback of the error.
    """

    model: str
    map: str
    precision: str
    batch: int
    n_parameters: int
    per_second: float | None = None
    step_ms: float | None = None
    forecast_mib: float | None = None
    allocated_mib: float | None = None
    peak_mib: float | None = None
    bound_share: float | None = None
    error: str = ""
    trace: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Training:
    """What is trained: a model on the CPU, examples, and how a batch becomes a loss.

    Args:
        make: the untrained model.
        moved_bytes: least bytes that a step moves, of the model and examples per step.
    """

    name: str
    map: str
    make: Callable[[], nn.Module]
    examples: Sequence[Tensor]
    batch: int | None
    loss_of: LossOf
    moved_bytes: Callable[[nn.Module, int], int]

    @property
    def n_per_step(self) -> int:
        return len(self.examples[0]) if self.batch is None else min(self.batch, len(self.examples[0]))


@dataclass
class StepClock:
    """Callbacks that time steps after the first ones, and stop a training after some seconds.

    Args:
        seconds: 0: stop after the first steps.
    """

    device: torch.device
    seconds: float
    n_steps: int = 0
    started: float = 0.0
    allocated: int = 0
    peak: int = 0
    _n_at_start: int = field(default=0, repr=False)

    def on_phase(self, phase: str) -> None:
        # The only one that comes once a step.
        if phase != "backward":
            return
        self.n_steps += 1
        if self.n_steps == WARM_UP_STEPS:
            wait_for(self.device)
            self.started, self._n_at_start = time.perf_counter(), self.n_steps

    def poll(self) -> int:
        if self.n_steps <= WARM_UP_STEPS or time.perf_counter() - self.started < self.seconds:
            return CONTINUE
        wait_for(self.device)
        self.seconds = time.perf_counter() - self.started
        if self.device.type == "cuda":
            # Before the state of the training is copied for whoever stopped it.
            self.allocated, self.peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return STOP

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / (self.n_steps - self._n_at_start)


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device, copy_mib: int) -> float:
    """Bytes per second that copies of an array read and write, the best of five."""
    source = torch.ones(copy_mib * MIB // 4, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(6):
        wait_for(device)
        start = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / best


def measure(training: Training, device: torch.device, amp: str | None, seconds: float, bytes_per_s: float) -> Result:
    """Time a training, and measure its memory in a few steps on one batch, whose order and copies are small."""
    precision = "float32" if amp is None else amp
    result = Result(training.name, training.map, precision, training.n_per_step, 0)
    try:
        model = training.make()
        result = replace(result, n_parameters=sum(parameter.numel() for parameter in model.parameters()))
        # Only a retrieval model's bytes are forecast by a run, and the sum is the same for every model.
        forecast = training_bytes(model)
        moved = training.moved_bytes(model, training.n_per_step)
        examples = [tensor[: training.n_per_step].to(device) for tensor in training.examples]
        before = reset_memory(device)
        model = model.to(device)
        clock = run(training, model, examples, amp, StepClock(device, 0.0))
        if device.type == "cuda":
            allocated, peak = (clock.allocated - before) / MIB, (clock.peak - before) / MIB
            result = replace(result, allocated_mib=allocated, peak_mib=peak)
        examples = [tensor.to(device) for tensor in training.examples]
        clock = run(training, model, examples, amp, StepClock(device, seconds))
    except torch.OutOfMemoryError:
        return replace(result, error=NO_MEMORY)
    except Exception as error:  # One that fails must not hide the others.
        return replace(result, error=f"{type(error).__name__}: {first_line(error)}", trace=traceback.format_exc())
    step_s = clock.seconds_per_step
    return replace(
        result,
        per_second=training.n_per_step / step_s,
        step_ms=1000 * step_s,
        forecast_mib=forecast / MIB,
        bound_share=moved / bytes_per_s / step_s,
    )


def reset_memory(device: torch.device) -> int:
    """Forget the peak; bytes that are allocated now."""
    if device.type != "cuda":
        return 0
    # What the training before has left in circles of references.
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def run(
    training: Training, model: nn.Module, examples: Sequence[Tensor], amp: str | None, clock: StepClock
) -> StepClock:
    """Train until the clock stops it."""
    settings = FitSettings(
        lr=1e-3, weight_decay=0.0, epochs=FOREVER, eval_every=FOREVER, patience=1, batch_size=training.batch, seed=0,
        amp=amp if clock.device.type == "cuda" else None,
    )  # fmt: skip
    callbacks = Callbacks(on_phase=clock.on_phase, poll=clock.poll)
    fit(model, examples, settings, Objective(training.loss_of, ""), callbacks=callbacks)
    return clock


def trainings(data: Data, scale: Scale, device: torch.device) -> list[Training]:
    """MF with BPR and softmax, LightGCN and DLRM, each with full and with soft tables."""
    sampler = NegativeSampler(data.graph, device=device)
    found = []
    for name in MAPS:
        maps = data.maps(name)
        for kind, loss, more in RETRIEVAL:
            preset = PRESETS[kind, loss]
            cosine = loss in SHARED_LOSSES
            spec = ModelSpec(kind, scale.dim, False, N_LAYERS, 0, cosine=cosine, std=preset.std)
            settings = LossSettings(loss, temperature=preset.temperature, negatives=preset.negatives)
            for batch in dict.fromkeys((preset.batch_size, *more)):
                loss_of = retrieval_loss(settings, sampler, whole=batch is None)
                make, moved = partial(spec.build, *maps, data.graph), partial(retrieval_bytes, settings=settings)
                examples = (data.users, data.items)
                found.append(Training(f"{kind}, {loss}", name, make, examples, batch, loss_of, moved))
        samples = CtrData.draw(data, scale.n_samples)
        ctr_spec = CTR_PRESETS["dlrm"].spec("dlrm", name, 0, dim=scale.dim)
        features = (samples.batch.categorical, samples.batch.dense, *samples.batch.multi_valued)
        build = partial(ctr_spec.build, samples.maps(*maps), samples.batch.dense.shape[1], 1)
        found.append(Training("dlrm", name, build, (samples.labels, *features), CTR_BATCH, ctr_loss, ctr_bytes))
    return found


def retrieval_loss(settings: LossSettings, sampler: NegativeSampler, *, whole: bool) -> LossOf:
    """The loss of a batch of users and items."""
    loss = objective(settings, sampler, whole=whole)

    def loss_of(model: nn.Module, batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        assert isinstance(model, RetrievalModel)
        return loss(model, batch[0], batch[1], generator)

    return loss_of


def ctr_loss(model: nn.Module, batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """The loss of a batch of labels, categorical, dense and multi-valued features."""
    labels, categorical, dense, multi_valued = batch
    return binary_loss(model(FeatureBatch(categorical, dense, (multi_valued,))), labels)


def retrieval_bytes(model: nn.Module, n: int, settings: LossSettings) -> int:
    """Least bytes of a step on ``n`` interactions: the optimizer's, table rows and vectors, and LightGCN's graph."""
    assert isinstance(model, RetrievalModel)
    n_ids = model.user_embedding.n_ids + model.item_embedding.n_ids
    n_vectors = 2 * n + (n if settings.name == "bpr" else settings.negatives)
    reads_all = isinstance(model, LightGCN) or n_vectors > n_ids
    dim, n_rows = model.user_embedding.dim, rows_per_id(model.user_embedding)
    total = optimizer_bytes(model) + row_bytes(n_rows * (n_ids if reads_all else n_vectors), dim)
    if reads_all:
        total += row_bytes(n_vectors, dim)
    if isinstance(model, LightGCN):
        n_edges = len(model.indices_of_users)
        # An index, a value and a vector for every edge, to both sides, in every layer, forwards and backwards.
        total += 2 * 2 * model.n_layers * n_edges * (8 + 4 + 4 * dim)
    return total


def ctr_bytes(model: nn.Module, n: int) -> int:
    """Least bytes of a step on ``n`` samples: the optimizer's, and table rows of every column."""
    assert isinstance(model, CtrModel)
    n_read = 0
    for number, column in enumerate(model.fields.columns):
        n_values = 1 if number < model.fields.n_categorical else MULTI_VALUED_WIDTH
        n_read += n_values * rows_per_id(column)
    return optimizer_bytes(model) + row_bytes(n * n_read, model.fields.dim)


def optimizer_bytes(model: nn.Module) -> int:
    """A gradient is written; Adam reads it, the parameter and both moments, and writes all but the gradient."""
    return 4 * 8 * sum(parameter.numel() for parameter in model.parameters())


def rows_per_id(column: object) -> int:
    """Table rows that an id reads."""
    return column.indices_per_id if isinstance(column, BucketEmbedding) else 1


def row_bytes(n_rows: int, dim: int) -> int:
    """Rows of a table that are read once, and whose gradients are added once."""
    return 2 * 4 * dim * n_rows
