"""The report: complete, self-contained, escaped, and drawn from what the stages left."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.run_config import RunConfig
from pipeline.errors import RunFolderError
from pipeline.maps.methods import METHODS
from pipeline.retrieval.defaults import ITEM_PARTS, USER_PARTS, metric_keys
from pipeline.retrieval.report import write_report

PICTURES = ("bytes_recall.png", "served.png", "cluster_sizes.png", "training.png")
PNG = b"\x89PNG\r\n\x1a\n"
BYTES_FULL = 18_134_784


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return make_run(tmp_path / "run")


def make_run(
    out: Path,
    path: str = "/data/log.parquet",
    methods: tuple[str, ...] = ("soft", "modulo", "full"),
    **settings: object,
) -> Path:
    """A run folder with what the stages up to `evaluate` leave there; settings are of training."""
    for folder in ("stages", "cluster", "bundle"):
        (out / folder).mkdir(parents=True)
    flat = {"data.path": path, "run.out": str(out), "run.methods": methods}
    config = RunConfig.from_flat(flat | {f"train.{key}": value for key, value in settings.items()})
    (out / "config.toml").write_text(config.to_toml())
    counts = {"n_users": 300, "n_items": 200, "n_train": 8000, "n_validation": 1000, "n_test": 1234, "n_rejected": 0}
    (out / "stages" / "ingest.json").write_text(json.dumps({"result": counts}))
    labels = np.repeat(np.arange(10), 30).astype(np.int32)
    np.save(out / "cluster" / "labels_users.npy", labels)
    np.save(out / "cluster" / "labels_items.npy", labels[:200])
    sizes = {"median": 3, "p99": 60.5, "largest": 1100}
    cluster = {
        "resolution": 200.0,
        "modularity": 0.1155,
        "n_communities": 10,
        "n_disconnected": 3,
        "levels": {"level_1": {"resolution": 20.0, "modularity": 0.2973, "user_rows": 4, "item_rows": 5}},
        "user_rows": 10,
        "item_rows": 7,
        "rows": 17,
        "share_inside": 0.2312,
        "sizes": {"users": sizes, "items": sizes},
    }
    (out / "cluster" / "cluster.json").write_text(json.dumps(cluster))
    metrics = []
    for i, method in enumerate(methods):
        recall = 0.1421 / (i + 1)
        n_bytes = BYTES_FULL if method == "full" else BYTES_FULL // 4
        metrics.append(
            {
                "method": method,
                "recall@20": recall,
                "capped_recall@20": 1.01 * recall,
                "ndcg@20": recall,
                "k": [20],
                "coverage@20": 0.4,
                **{
                    f"{name}@20_{part}": recall * (1 - 0.2 * place)
                    for parts in (ITEM_PARTS, USER_PARTS)
                    for place, part in enumerate(parts)
                    for name in ("recall", "ndcg")
                },
                "rows": 17,
                "bytes": n_bytes,
                "bytes_full": BYTES_FULL,
                "bytes_ratio": n_bytes / BYTES_FULL,
                "bytes_of": {
                    "tables": n_bytes - 10,
                    "maps": 6 if method != "full" else 0,
                    "bias": 4 if method == "soft" else 0,
                },
                "indices_per_id": {"soft": 20, "double": 2}.get(method, 1),
                "item_bias": method == "soft",
                "mlflow_run_id": "ab" * 16,
                "seconds": {"ingest": 1.0, "cluster": 2.0, "train": 90.0},
            }
        )
        (out / "methods" / method).mkdir(parents=True)
        epochs = [{"epoch": e, "loss": 0.5, "capped_recall@20": recall * e / 30, "ndcg@20": 0.1} for e in (10, 20, 30)]
        history = {"epochs": epochs, "best_epoch": 30}
        (out / "methods" / method / "history.json").write_text(json.dumps(history))
    (out / "metrics.json").write_text(json.dumps(metrics))
    return out


def text_of(page: str) -> str:
    """The words of the page, with single spaces."""
    text = re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    return re.sub(r" ([.,;)])", r"\1", " ".join(html.unescape(text).split()))


def report_text(run_dir: Path) -> str:
    write_report(run_dir)
    return text_of((run_dir / "report.html").read_text())


def test_pictures_and_page_are_written(run_dir):
    files = write_report(run_dir)
    assert [file.name for file in files] == ["report.html", *PICTURES]
    for name in PICTURES:
        assert (run_dir / name).read_bytes().startswith(PNG)
    assert not list(run_dir.glob(".*"))


def test_page_says_what_happened(run_dir):
    write_report(run_dir)
    page = (run_dir / "report.html").read_text()
    assert "<td>level_1</td>" in page
    assert "0.2973" in page
    text = text_of(page)
    for words in (
        "soft keeps 25.0 % of the bytes",
        "the full tables find 4.7 %",
        "3 of the communities are not connected by their own interactions",
        "10,234 distinct interactions between 300 users and 200 items",
        "split at random: 8,000 for training, 1,000 for validation (when to stop), and 1,234 for the test",
        "matrix factorization with the BPR loss (uniform negatives) and embedding dimension 64",
        "embedding tables, bucket maps, item biases",
        "soft + item bias",
        "modularity 0.1155 at resolution 200",
        "23.1 % of the interaction weight",
        "soft kept epoch 30 of 30",
        "recommend",
        "train 4.5 min",
    ):
        assert words in text, words


class Closed(HTMLParser):
    """Collects the tags left open and every address that the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_one_well_formed_file_without_scripts(run_dir):
    write_report(run_dir)
    page = Closed()
    page.feed((run_dir / "report.html").read_text())
    assert page.open == []
    assert "script" not in page.tags
    assert len(page.loaded) == 4
    assert all(value.startswith("data:image/png;base64,") for value in page.loaded)


def test_texts_from_outside_are_escaped(tmp_path):
    run_dir = make_run(tmp_path / "a <b>&'x'", path='/data/<script>alert("x")</script>.csv')
    write_report(run_dir)
    page = (run_dir / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "a <b>" not in page


MODELS = {
    "mf": "matrix factorization with the BPR loss (uniform negatives)",
    "neumf": "NeuMF with the BPR loss (uniform negatives)",
    "lightgcn": "LightGCN (2 propagation layers) with the BPR loss (uniform negatives)",
}


@pytest.mark.parametrize("model", MODELS)
def test_page_names_the_model_and_the_loss_that_were_trained(tmp_path, model):
    text = report_text(make_run(tmp_path / "run", model=model))
    assert MODELS[model] in text
    assert ("matrix factorization" in text) == (model == "mf")


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("directau", "matrix factorization with the DirectAU loss"),
        ("ials", "matrix factorization with the implicit ALS loss"),
    ],
)
def test_page_names_other_losses(tmp_path, loss, words):
    text = report_text(make_run(tmp_path / "run", loss=loss))
    assert words in text
    assert "BPR" not in text
    assert "negatives" not in text


def test_page_names_the_negatives_of_losses_that_draw_some(tmp_path):
    text = report_text(make_run(tmp_path / "run", loss="softmax"))
    assert "matrix factorization with sampled softmax (uniform negatives)" in text


@pytest.mark.parametrize(
    ("method", "reads", "communities"),
    [
        ("full", "a row for every id", "full does not use them."),
        ("modulo", "row number modulo table size", "modulo takes the number of rows alone."),
        ("double", "the sum of two hashed rows", "double takes the number of rows alone."),
        ("graph", "ids of one community share a row", "The bucket maps of graph are made from these communities."),
        ("soft", "a weighted sum of 20 rows", "The bucket maps of soft are made from these communities."),
    ],
)
def test_page_says_how_each_kind_of_method_reads_the_tables(tmp_path, method, reads, communities):
    text = report_text(make_run(tmp_path / "run", methods=(method,)))
    assert f"{method} " in text
    assert reads in text
    assert communities in text
    # Only hard communities share a row.
    assert ("community share a row" in text) == (method == "graph")


def test_page_lists_what_the_bytes_are_of(tmp_path):
    run_dir = make_run(tmp_path / "run", methods=("graph", "full"), model="lightgcn")
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for entry in metrics:
        entry["bytes_of"] = {"tables": 10, "maps": 1 if entry["method"] == "graph" else 0, "bias": 0, "graph": 5}
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    assert "Every byte is counted: embedding tables, bucket maps, the training graph." in report_text(run_dir)


def test_page_says_what_rounding_the_tables_cost(run_dir):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    metrics[0] |= {"precision": "int8", "recall@20_float32": 0.1450}
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    text = report_text(run_dir)
    assert (
        "soft: stored as int8, 4,533,696 bytes; recall@20 0.1421 against 0.1450 in float32, a change of -2.00 %."
        in text
    )


def test_page_says_whom_each_method_serves(run_dir):
    text = report_text(run_dir)
    assert "Who is served" in text
    assert "soft 0.1421 / 0.1421 0.1137 / 0.1137 0.0853 / 0.0853" in text
    assert "the catalogue that is recommended to any test user" in text


def test_page_has_the_bytes_of_training_where_they_were_counted(run_dir):
    assert "training bytes" not in report_text(run_dir)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    metrics[0] |= {"training_bytes": 3 * 2**20, "training_bytes_measured": 5 * 2**20}
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    text = report_text(run_dir)
    assert "of full size training bytes measured recall@20" in text
    assert "25.0 % 3.00 MiB 5.00 MiB 0.1421" in text


def test_page_has_the_cut_offs_of_the_test(run_dir):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    extra = {"k": [5, 20], "recall@5": 0.05, "capped_recall@5": 0.06, "ndcg@5": 0.07}
    (run_dir / "metrics.json").write_text(json.dumps([{**entry, **extra} for entry in metrics]))
    text = report_text(run_dir)
    assert "recall@5 capped recall@5 NDCG@5" in text
    assert "soft finds 5.0 %" in text or "finds 5.0 % of what the test users went on to choose, within 5" in text
    assert "0.0500 / 0.1421" in text


@pytest.mark.parametrize("methods", [("soft",), ("full",), tuple(METHODS)], ids=["soft", "full", "all"])
def test_any_number_of_methods(tmp_path, methods):
    write_report(make_run(tmp_path / "run", methods=methods))


def test_no_method_was_good_at_all(tmp_path):
    run_dir = make_run(tmp_path / "run")
    metrics = json.loads((run_dir / "metrics.json").read_text())
    (run_dir / "metrics.json").write_text(
        json.dumps([{**entry, "recall@20": 0.0, "capped_recall@20": 0.0, "ndcg@20": 0.0} for entry in metrics])
    )
    write_report(run_dir)


def test_without_test_and_validation_the_page_says_so(run_dir):
    write_report(run_dir)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    (run_dir / "metrics.json").write_text(json.dumps([{**entry, **dict.fromkeys(metric_keys())} for entry in metrics]))
    for history in run_dir.glob("methods/*/history.json"):
        epochs = [{"epoch": 30, "loss": 0.5, "capped_recall@20": None}]
        history.write_text(json.dumps({"epochs": epochs, "best_epoch": 30}))
    assert [file.name for file in write_report(run_dir)] == ["report.html", "cluster_sizes.png"]
    assert not (run_dir / "training.png").exists()
    text = text_of((run_dir / "report.html").read_text())
    assert "no test interactions" in text
    assert "no validation interactions" in text


@pytest.mark.parametrize(
    "name", ["metrics.json", "cluster/cluster.json", "stages/ingest.json", "methods/full/history.json"]
)
def test_missing_part_is_named(run_dir, name):
    (run_dir / name).unlink()
    with pytest.raises(RunFolderError, match=name):
        write_report(run_dir)


def test_the_page_says_what_filters_removed(tmp_path):
    run = make_run(tmp_path / "run")
    write_report(run)
    assert "Filters removed" not in (run / "report.html").read_text()
    record = json.loads((run / "stages" / "ingest.json").read_text())
    record["result"]["removed"] = {"rows_below": 1234, "users": 5, "items": 6, "interactions": 77, "test_rows": 8}
    (run / "stages" / "ingest.json").write_text(json.dumps(record))
    write_report(run)
    text = " ".join((run / "report.html").read_text().split())
    assert "Filters removed 1,234 rows of a lower rating, 5 users and 6 items with too few interactions" in text
    assert "and 8 test rows of users or items that are not in training." in text


def test_the_page_says_what_a_split_by_time_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    part = {"rows": 1000, "rows_of_unseen": 700, "rows_repeated": 3, "unseen_users": 20, "unseen_items": 4}
    first = {"validation": None, "test": "2024-05-01 00:00:00"}
    times = {
        "column": "t",
        "first": first,
        "parts": {"validation": part, "test": part},
        "newest": "2024-04-30 23:00:00",
    }
    record = json.loads((run / "stages" / "ingest.json").read_text())
    record["result"]["times"] = times
    (run / "stages" / "ingest.json").write_text(json.dumps(record))
    config = (run / "config.toml").read_text().replace('split = "random"', 'split = "temporal"\nhalf_life = 30.0')
    (run / "config.toml").write_text(config)
    write_report(run)
    text = " ".join((run / "report.html").read_text().split())
    assert "The interactions were split by time: the latest ones are the test" in text
    assert "Of 1,000 rows of validation 700 are left out because their user or item is not in training" in text
    assert "Of 1,000 rows of the test, which begins at 2024-05-01 00:00:00, 700 are left out" in text
    assert "Weights are halved every 30.0 days before 2024-04-30 23:00:00." in text
