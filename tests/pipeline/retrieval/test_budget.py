"""A share of the full bytes allows exactly as many rows as fit, in every precision."""

from __future__ import annotations

import math

import pytest

from graphhash.errors import DataError
from graphhash.maps.bucket_map import full_map
from graphhash.maps.quantization import bias_bytes, row_bytes
from graphhash.models.neumf import NeuMF, layer_numbers
from pipeline.config.run_config import RunConfig
from pipeline.retrieval import budget
from pipeline.retrieval.budget import BudgetSettings, GraphSize, planned_precisions, resolve_method, spendable
from pipeline.retrieval.defaults import planned_precision_of, precision_of
from pipeline.runs.tasks import task_of

USERS, ITEMS, DIM = 29_858, 40_981, 64
EDGES = 20 * (USERS + ITEMS) // 2


def rows_for_ratio(config, ratio, *size):
    return budget.rows_for_ratio(BudgetSettings.of(config), ratio, planned_precisions(config), GraphSize(*size))


def indices_per_id(config, name, *size):
    return resolve_method(config, name, GraphSize(*size), 0).indices_per_id


def hops(config, n_rows, *size):
    return resolve_method(config, "soft", GraphSize(*size), n_rows).hops


def config(precision, indices_per_id):
    """Of BPR, with which `soft` has a bias per item."""
    sizes = [f"map.indices_per_id={indices_per_id}", f"train.dim={DIM}"]
    return RunConfig.load(None, [f"export.precision={precision}", "train.loss=bpr", *sizes])


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("indices_per_id", [4, 8])
def test_one_row_more_would_not_fit(precision, indices_per_id):
    ratio = 0.15 if precision == "int4" else 0.25  # In 4 bits more would be enough for every id.
    rows = rows_for_ratio(config(precision, indices_per_id), ratio, USERS, ITEMS, EDGES)
    # Soft: a 16-bit row per lookup and a profile's number, for every id and the unknown one of each side; the codebook; a bias per item,
    # beside whole numbers one of 8 bits, and a 16-bit scale per 64 items.
    bias = {"float32": 4 * ITEMS, "float16": 2 * ITEMS}.get(precision, math.ceil(ITEMS / 64) * (64 + 2))
    beside = (2 * indices_per_id + 1) * (USERS + ITEMS + 2) + 2 * 256 * 4 * indices_per_id + bias
    allowed = spendable(ratio, USERS, ITEMS, DIM)
    assert rows <= 2**16
    assert beside + rows * row_bytes(DIM, precision) <= allowed < beside + (rows + 1) * row_bytes(DIM, precision)


def test_the_layers_of_a_network_are_paid_from_the_same_budget():
    model = NeuMF(full_map(3), full_map(4), DIM, item_bias=True, seed=0)
    beside = 4 * DIM * (3 + 4 + 2) + 4 * 4  # Tables and biases.
    n_bytes = sum(4 * parameter.numel() for parameter in model.parameters()) - beside
    assert n_bytes == 4 * layer_numbers(DIM)
    plain = config("int8", 4)
    deep = RunConfig.from_flat(plain.flat() | {"train.model": "neumf"})
    rows = [rows_for_ratio(c, 0.25, USERS, ITEMS, EDGES) for c in (plain, deep)]
    assert rows[0] - rows[1] == pytest.approx(n_bytes / row_bytes(DIM, "int8"), abs=1)


def test_more_rows_than_16_bits_count_take_32_bits():
    users, items = 10 * USERS, 10 * ITEMS
    rows = rows_for_ratio(config("int8", 8), 0.25, users, items, 10 * EDGES)
    assert rows > 2**16
    beside = (4 * 8 + 1) * (users + items + 2) + 2 * 256 * 4 * 8 + bias_bytes(items, "int8")
    allowed = spendable(0.25, users, items, DIM)
    assert beside + rows * row_bytes(DIM, "int8") <= allowed < beside + (rows + 1) * row_bytes(DIM, "int8")


def test_a_ratio_that_the_maps_alone_exceed_is_refused():
    with pytest.raises(DataError, match=r"maps of method 'soft' alone take 16.2%"):
        rows_for_ratio(config("int8", 20), 0.1, USERS, ITEMS, EDGES)


def test_compressed_tables_are_stored_in_few_bits_and_full_ones_are_not_unless_told():
    methods = ("soft", "double_soft", "graph", "modulo", "full")
    auto = [
        RunConfig.load(None, settings)
        for settings in ([], ["train.model=lightgcn"], ["run.task=ctr", "train.model=dlrm"])
    ]
    stored = [[task_of(c).precision_of(c, method) for method in methods] for c in auto]
    assert stored[0] == ["int4", "int4", "int8", "int8", "float32"]
    assert stored[1] == stored[2] == ["int8"] * 4 + ["float32"]
    assert precision_of(config("float16", 4), "full") == "float16"


def test_rows_are_planned_in_the_precision_of_the_run_and_stored_in_that_of_the_export():
    export = {"cluster.budget_precision": "auto", "export.precision": "float32"}
    for settings, stored, planned in (
        ({"export.precision": "int8"}, "int8", "int8"),
        (export, "float32", "int4"),
        ({"cluster.budget_precision": "int8"}, "int8", "int8"),
    ):
        config = RunConfig.from_flat(settings)
        assert (precision_of(config, "soft"), planned_precision_of(config, "soft")) == (stored, planned)


def test_there_are_fewer_rows_than_ids_however_many_bytes():
    assert rows_for_ratio(RunConfig.load(None, ["train.dim=64"]), 0.9, 40, 30, 300) == 71


@pytest.mark.parametrize(
    ("ratio", "degree", "expected"),
    # 0.55 of 64 or 32 bytes an id; 0.55 + 0.15 with twice the neighbours; 0.9 of them at most; never more than 32.
    [(0.25, 20, 16), (0.125, 20, 8), (0.25, 3, 16), (0.25, 40, 21), (0.25, 1000, 27), (0.5, 1000, 32), (0.001, 20, 1)],
)
def test_more_bytes_and_denser_graphs_get_more_lookups(ratio, degree, expected):
    config = RunConfig.load(None, [f"cluster.ratio={ratio}", "export.precision=int8", "map.hops=1+2"])
    graph = USERS, ITEMS, degree * (USERS + ITEMS) // 2
    assert indices_per_id(config, "soft", *graph) == expected
    assert indices_per_id(config, "graph", *graph) == 1
    assert indices_per_id(RunConfig.load(None, ["map.indices_per_id=5"]), "soft", *graph) == 5


@pytest.mark.parametrize(("ratio", "expected"), [(0.25, 26), (0.125, 10), (0.05, 3)])
def test_in_4_bits_less_than_three_rows_for_ten_ids_and_the_rest_for_lookups(ratio, expected):
    config = RunConfig.load(None, [f"cluster.ratio={ratio}"])
    assert indices_per_id(config, "soft", USERS, ITEMS, EDGES) == expected
    rows = rows_for_ratio(config, ratio, USERS, ITEMS, EDGES) / (USERS + ITEMS)
    assert 0.25 < rows < 0.45 or ratio == 0.05


@pytest.mark.parametrize(
    ("degree", "ratio", "lookups", "expected"),
    [(60, 0.25, 8, "2"), (60, 0.185, 4, "2"), (60, 0.125, None, "1+2"), (40, 0.25, None, "1+2")],
)
def test_dense_graphs_get_a_row_for_nearly_every_id_where_bytes_allow(degree, ratio, lookups, expected):
    config = RunConfig.load(None, [f"cluster.ratio={ratio}", "train.loss=bpr"])
    graph = USERS, ITEMS, degree * (USERS + ITEMS) // 2
    rows = rows_for_ratio(config, ratio, *graph)
    # The clustering leaves two rows to unknown ids.
    assert hops(config, rows - 2, *graph) == expected
    assert indices_per_id(config, "soft", *graph) == lookups or lookups is None
    assert (rows >= 0.9 * (USERS + ITEMS)) == (expected == "2")
    assert hops(RunConfig.load(None, ["map.hops=1"]), rows, *graph) == "1"


def test_lightgcn_makes_do_with_fewer_rows_per_id():
    config = RunConfig.load(None, ["cluster.ratio=0.25", "train.model=lightgcn"])
    graph = USERS, ITEMS, 60 * (USERS + ITEMS) // 2
    rows = rows_for_ratio(config, 0.25, *graph)
    assert indices_per_id(config, "soft", *graph) == 4
    assert hops(config, rows - 2, *graph) == "2"
    assert 0.8 < rows / (USERS + ITEMS) < 0.9


@pytest.mark.parametrize(("ratio", "codes", "product_codes"), [(0.25, 56, 32), (0.07, 16, 16), (0.038, 8, 8)])
def test_codes_leave_room_for_the_item_bias(ratio, codes, product_codes):
    settings = ["train.loss=softmax", f"cluster.ratio={ratio}"]
    size = GraphSize(USERS, ITEMS, EDGES)
    allowed, n_ids = spendable(ratio, USERS, ITEMS, DIM), USERS + ITEMS + 2
    for method, number in (("additive", codes), ("full_pq", product_codes)):
        resolved = resolve_method(RunConfig.load(None, settings), method, size, 20)
        sizes = resolved.embedding.sizes
        assert resolved.item_bias
        assert sizes["codes_per_id"] == number
        if method == "additive":
            codewords = number * 256 * row_bytes(DIM // sizes["n_groups"], f"int{sizes['codeword_bits']}")
            codewords += 2 * DIM**2 if sizes["n_groups"] > 1 else 0
        else:
            codewords = 2 * 2 * 256 * DIM
        assert number * n_ids + codewords + bias_bytes(ITEMS, "int8") <= allowed


def test_codebook_count_where_ids_are_few():
    config = RunConfig.load(None, ["cluster.ratio=0.25", "export.precision=int8", "map.hops=1+2"])
    n_indices = indices_per_id(config, "soft", 5436, 3700, 750_000)
    assert rows_for_ratio(config, 0.25, 5436, 3700, 750_000) > 500
    assert 20 < n_indices < 27


@pytest.mark.parametrize(
    ("loss", "method", "has_bias"),
    [("softmax", "soft", (True, False)), ("bsl", "residual", (True, False)), ("ccl", "soft", (False, False)),
     ("bpr", "soft", (True, True)), ("bpr", "full", (False, False)), ("softmax", "full", (True, False))],
)  # fmt: skip
def test_cosines_have_an_item_bias_on_sparse_graphs_alone(loss, method, has_bias):
    sizes = GraphSize(100, 100, 4900), GraphSize(100, 100, 5000)  # 49 and 50 neighbours.
    config = RunConfig.load(None, [f"train.loss={loss}"])
    assert tuple(resolve_method(config, method, size, 20).item_bias for size in sizes) == has_bias
    if loss != "ccl":
        config = RunConfig.load(None, [f"train.loss={loss}", "map.item_bias=true"])
        assert all(resolve_method(config, method, size, 20).item_bias for size in sizes)
