"""Negatives that all interactions of a batch share: which of them do not count, and sums over their scores as matrix products.

The scores of a batch of n interactions with m negatives are one product, shape (n, m), of n users' and m items' vectors. A negative that
is the interaction's own item (an accidental hit) is no negative, and is left out: :func:`accidental_hits`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Exponentials of logits of at most this size, up or down, are summed without a shift in float32.
SAFE_LOGIT = 40.0


class Hits(NamedTuple):
    """Pairs of an interaction and a negative that do not count: entry ``(rows[h], columns[h])`` of the scores; int64, shape (n_hits,)."""

    rows: Tensor
    columns: Tensor


def accidental_hits(positives: Tensor, negatives: Tensor) -> Hits:
    """The pairs whose keys are equal.

    Args:
        positives: a key of each interaction's item, such as its number, any integer type, shape (n,).
        negatives: the same of each negative, shape (m,).
    """
    ordered, order = negatives.sort()
    first = torch.searchsorted(ordered, positives)
    counts = torch.searchsorted(ordered, positives, right=True) - first
    rows = torch.repeat_interleave(torch.arange(len(positives), device=positives.device), counts)
    # The number of each hit among those of its interaction.
    numbers = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    return Hits(rows, order[first[rows] + numbers])


def log_sum_exp(
    users: Tensor, items: Tensor, *, temperature: float, offsets: Tensor | None = None, hits: Hits | None = None
) -> Tensor:
    """``log sum_j exp(<users[i], items[j]> / temperature + offsets[j])`` over the negatives j that count for interaction i.

    Args:
        users: vectors of the interactions' users, float32, shape (n, dim).
        items: vectors of the negatives, float32, shape (m, dim).
        offsets: added to the logits, shape (m,); None: zeros.
        hits: pairs left out of the sums.

    Returns: float32, shape (n,); -inf, without a gradient, where no negative counts.
    """
    if users.device.type == "cpu" and users.dtype == items.dtype == torch.float32:
        rows, columns = (None, None) if hits is None else hits
        return _CpuLogSumExp.apply(users, items, offsets, rows, columns, temperature)
    logits = (users @ items.T).float() / temperature
    if offsets is not None:
        logits = logits + offsets
    if hits is not None:
        logits = logits.index_put((hits.rows, hits.columns), logits.new_tensor(-torch.inf))
    # Of a row of -inf alone, logsumexp has no gradient but NaN.
    highest = logits.detach().amax(1).clamp_min(torch.finfo(logits.dtype).min)
    sums = (logits - highest[:, None]).exp().sum(1)
    return torch.where(sums > 0, highest + sums.clamp_min(torch.finfo(sums.dtype).tiny).log(), -torch.inf)


def mean_excess(
    users: Tensor, items: Tensor, *, margin: float, offsets: Tensor | None = None, hits: Hits | None = None
) -> Tensor:
    """``mean_j max(0, <users[i], items[j]> + offsets[j] - margin)`` over all m negatives, those of ``hits`` counting as 0.

    Args, Returns: as for :func:`log_sum_exp`, the value of an interaction without negatives being 0.
    """
    scores = (users @ items.T).float()
    excess = ((scores if offsets is None else scores + offsets) - margin).relu()
    if hits is not None:
        excess = excess.index_put((hits.rows, hits.columns), excess.new_tensor(0.0))
    return excess.mean(1)


class _CpuLogSumExp(torch.autograd.Function):
    """:func:`log_sum_exp` on a CPU with one array of shape (n, m), which the backward pass reads again."""

    @staticmethod
    def forward(ctx, users, items, offsets, rows, columns, temperature):
        scaled = users / temperature
        logits = torch.matmul(scaled, items.T)
        if offsets is not None:
            logits += offsets
        highest = None
        if rows is not None:
            logits[rows, columns] = -torch.inf
        if not _largest(scaled, items, offsets) <= SAFE_LOGIT:
            highest = logits.amax(1).clamp_min_(torch.finfo(logits.dtype).min)
            logits -= highest[:, None]
        exponentials = logits.exp_()
        sums = exponentials.sum(1)
        ctx.save_for_backward(scaled, items, exponentials, sums)
        ctx.temperature, ctx.has_offsets = temperature, offsets is not None
        return sums.log() if highest is None else sums.log() + highest

    @staticmethod
    def backward(ctx, gradients):
        scaled, items, exponentials, sums = ctx.saved_tensors
        # The softmax of row i is exponentials[i] / sums[i]; dividing users or products is cheaper than dividing it.
        shares = torch.where(sums > 0, gradients / sums, 0.0)[:, None]
        user_gradient = (exponentials @ items).mul_(shares / ctx.temperature)
        item_gradient = exponentials.T @ (scaled * shares)
        offset_gradient = (exponentials.T @ shares).squeeze(1) if ctx.has_offsets else None
        return user_gradient, item_gradient, offset_gradient, None, None, None


def _largest(users: Tensor, items: Tensor, offsets: Tensor | None) -> float:
    """A bound of the logits' size."""
    products = users.square().sum(1).amax().sqrt() * items.square().sum(1).amax().sqrt()
    return float(products) + (0.0 if offsets is None else float(offsets.abs().amax()))
