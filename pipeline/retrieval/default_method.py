"""The method that `run.methods = ["auto"]` stands for, which follows from the budget, the model and its loss."""

from __future__ import annotations

from pipeline.config.choices import AUTO_METHODS
from pipeline.config.run_config import RunConfig
from pipeline.retrieval.budget import GraphSize, full_bytes
from pipeline.retrieval.defaults import DEFAULT_BUDGET
from pipeline.task import MOST_FULL_BYTES, budget_of

# Losses of cosines, with which rows of the ids' own beside the mixture pay: docs/experiments/frontier.md.
LOSSES = ("softmax", "bsl")
# From this share of the full tables' bytes on `residual` is ahead of `additive`: test recall@20 .2207 against .2195 on Gowalla, three
# seeds, and it trains with fewer bytes. Where the graph is dense a mixture beside rows takes something from them, and so does one instead
# of them: MovieLens-1M, three seeds, `full` .2943, `full_soft` .2927; seed 0, `full` .2951, `residual` .2733.
RESIDUAL_RATIO = 0.2


def with_method_of_budget(config: RunConfig, size: GraphSize) -> RunConfig:
    """The configuration with the method that `auto` stands for; other methods stay.

    Where matrix factorization has a softmax loss and the budget is a share of the full bytes, `residual` or `additive`, or `full_additive`
    on dense graphs; else `soft`.

    Args:
        config: its loss is decided.
        size: of the train graph.
    """
    if config.run.methods != AUTO_METHODS:
        return config
    return RunConfig.from_flat(config.flat() | {"run.methods": (_method(config, size),)})


def _method(config: RunConfig, size: GraphSize) -> str:
    train, (kind, value) = config.train, budget_of(config, DEFAULT_BUDGET)
    if train.model != "mf" or train.loss not in LOSSES or kind != "ratio":
        return "soft"
    if full_bytes(size.n_users, size.n_items, train.dim) > MOST_FULL_BYTES:
        return "soft"
    if size.is_dense:
        return "full_additive"
    return "residual" if value >= RESIDUAL_RATIO else "additive"
