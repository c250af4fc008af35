"""A click bundle beside a file of labelled samples: log loss, AUC and calibration, as ``graphhash check --against`` prints them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphhash.errors import DataError, did_you_mean
from graphhash.metrics.ctr import CtrTotals, auc, probability
from pipeline.bundles.predict import oov_text, predict_rows, slices
from pipeline.ctr.columns import LABELS, labels_of
from pipeline.logs.csv import DEFAULT_FORMAT, CsvFormat
from pipeline.logs.tables import column_names, find_files, listed_names, read_rows
from serving.bundle_model import Provider
from serving.private_copy import load_privately
from serving.scorer import Scorer

# Bins of about as many samples each, by rising prediction.
N_BINS = 10


@dataclass(frozen=True)
class Against:
    """What labelled samples say of a bundle.

    Args:
        figures: ``n_rows``, ``log_loss`` (nats), ``auc`` (None where all labels are the same), ``mean_prediction``, ``positive_rate``,
            ``calibration`` (the former over the latter; None without a positive), ``ece`` (expected calibration error, in 20 bins of equal
            width), and ``oov_rate`` (share of out-of-vocabulary values, by categorical column).
        bins: of every bin ``n_rows``, ``lowest`` and ``highest`` prediction, ``predicted`` and ``positive`` (means).
        tested: ``log_loss``, ``auc`` and ``calibration`` of the test of the training, from the manifest; None where they are not there.
    """

    figures: dict[str, Any]
    bins: list[dict[str, float]]
    tested: dict[str, float | None]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**self.figures, "bins": self.bins, "tested": self.tested}

    def text(self) -> str:
        """One line."""
        figures, tested = self.figures, self.tested

        def pair(key: str, title: str) -> str:
            before = "" if tested[key] is None else f" (test {tested[key]:.4f})"
            return f"{title} " + ("-" if figures[key] is None else f"{figures[key]:.4f}") + before

        named = [pair("log_loss", "log loss"), pair("auc", "AUC"), pair("calibration", "calibration")]
        means = f"mean prediction {figures['mean_prediction']:.4f}, positive {figures['positive_rate']:.4f}"
        unknown = oov_text(figures["oov_rate"])
        return f"{figures['n_rows']:,} samples: {', '.join(named)}; ECE {figures['ece']:.4f}; {means}{unknown}"

    def table(self) -> list[tuple[str, ...]]:
        """The bins as texts, a header first."""
        header = ("predictions", "samples", "mean prediction", "positive", "calibration")
        rows = [
            (
                f"{part['lowest']:.4f} to {part['highest']:.4f}",
                f"{part['n_rows']:,}",
                f"{part['predicted']:.4f}",
                f"{part['positive']:.4f}",
                f"{part['predicted'] / part['positive']:.3f}" if part["positive"] else "-",
            )
            for part in self.bins
        ]
        return [header, *rows]


def check_against(
    bundle: Path,
    log: str,
    *,
    label: str | None = None,
    layout: CsvFormat = DEFAULT_FORMAT,
    provider: Provider = "auto",
) -> Against:
    """Predict labelled samples with a bundle, and compare.

    Args:
        log: a file, a folder or a glob: csv, tsv or parquet.
        layout: of csv and tsv files.
        label: its column; None: that of the training, or the one that is named like a label.

    Raises:
        BundleError: the bundle is not one of a CTR model.
        DataError: a column is missing, a label is neither 0 nor 1, or a value is of another type than the bundle's.
    """
    scorer = load_privately(bundle, lambda folder: Scorer(folder, provider))
    files = find_files(log, "auto", "random", layout)
    name, label_from = _label(scorer.manifest, column_names(files[0]), label, files[0].path)
    totals, parts, n_oov = CtrTotals(), [], dict[str, int]()
    for rows in slices(rows for file in files for rows in read_rows(file)):
        labels, answer = labels_of(rows, name, label_from), predict_rows(scorer, rows)
        totals.add(labels, answer.logits)
        parts.append((labels, answer.logits))
        n_oov = {name: n_oov.get(name, 0) + int((~there).sum()) for name, there in answer.known.items()}
    labels, logits = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    predictions, n_positive = probability(logits), int(labels.sum())
    figures = {
        "n_rows": len(labels),
        "log_loss": totals.log_loss,
        "auc": auc(labels, logits) if 0 < n_positive < len(labels) else None,
        "mean_prediction": float(predictions.mean()),
        "positive_rate": n_positive / len(labels),
        "calibration": totals.calibration if n_positive else None,
        "ece": totals.calibration_error,
        "oov_rate": {name: n / len(labels) for name, n in n_oov.items()},
    }
    metrics = scorer.manifest["metrics"]
    return Against(
        figures, bins_of(labels, predictions), {key: metrics.get(key) for key in ("log_loss", "auc", "calibration")}
    )


def bins_of(labels: NDArray[np.uint8], predictions: NDArray[np.float64]) -> list[dict[str, float]]:
    """Samples in N_BINS bins by rising prediction, of equal number up to one; equal predictions may be in two."""
    order = np.argsort(predictions, kind="stable")
    return [
        {
            "n_rows": len(part),
            "lowest": float(predictions[part[0]]),
            "highest": float(predictions[part[-1]]),
            "predicted": float(predictions[part].mean()),
            "positive": float(labels[part].mean()),
        }
        for part in np.array_split(order, min(N_BINS, len(order)))
    ]


def _label(manifest: Mapping[str, Any], names: list[str], label: str | None, path: str) -> tuple[str, float | None]:
    """The column of labels, and from which value on it is positive, where it is that of the training."""
    data = manifest["provenance"].get("data", {})
    trained = data.get("label")
    for name in filter(None, (label, None if label else trained, *(() if label else LABELS))):
        if name in names:
            return name, data.get("label_from") if name == trained else None
    wanted = label or trained or "label"
    raise DataError(
        f"{path}: no column {wanted!r}; {did_you_mean(wanted, names)}name the labels with --label-column; the columns are "
        f"{listed_names(names)}"
    )
