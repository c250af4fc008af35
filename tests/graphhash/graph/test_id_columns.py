from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from graphhash.graph.id_columns import IdCodes, IntegerRanks, order_ids, read_integers


def strings(n, rng):
    """Ids with shared prefixes, of all lengths from none, with bytes of any value."""
    words = [chr(0x60 + number % 7) * (number % 20) + "\0ü"[number % 2] * (number % 3) for number in range(60)]
    return [f"{words[a]}{words[b]}" for a, b in rng.integers(0, 60, (n, 2))]


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_codes_are_those_of_a_dictionary_and_do_not_depend_on_batches(kind):
    rng = np.random.default_rng(0)
    ids = (
        rng.integers(-(2**62), 2**62, 3000)[rng.integers(0, 3000, 90_000)] if kind == "int64" else strings(90_000, rng)
    )
    array = pa.array(ids, pa.int64() if kind == "int64" else pa.large_string())
    expected = array.dictionary_encode()
    for step in (90_000, 1234):
        codes = IdCodes(kind)
        found = np.concatenate([codes.encode(array.slice(start, step)) for start in range(0, len(array), step)])
        assert np.array_equal(found, expected.indices.to_numpy())
        assert codes.ids.equals(expected.dictionary)
        assert len(codes) == len(expected.dictionary)


def test_strings_are_ordered_by_their_bytes():
    rng = np.random.default_rng(1)
    for ids in (
        [],
        ["b"],
        ["b", "", "a\0", "a"],
        [f"user-{number:012}" for number in rng.permutation(5000)],
        strings(9000, rng),
    ):
        array = pa.array(list(dict.fromkeys(ids)), pa.large_string())
        expected = sorted(array.to_pylist(), key=str.encode)
        assert array.take(pa.array(order_ids(array))).to_pylist() == expected
    assert order_ids(pa.array([5, -3, 2])).tolist() == pc.array_sort_indices(pa.array([5, -3, 2])).to_pylist()


@pytest.mark.parametrize("low", [-(2**63), -70, 0, 2**62])
def test_ranks_are_places_among_the_distinct_integers(low):
    values = low + np.random.default_rng(2).integers(0, 5000, 800)
    parts = [IntegerRanks.empty(low, low + 4999) for _ in range(2)]
    for ranks, half in zip(parts, (values[:300], values[300:]), strict=True):
        ranks.mark(half)
    parts[0].add(parts[1].words[:, 0])
    distinct, expected = np.unique(values, return_inverse=True)
    assert np.array_equal(parts[0].finish(), distinct)
    assert np.array_equal(parts[0].ranks(values, np.int32), expected)


def test_a_wide_range_of_integers_is_not_marked():
    assert IntegerRanks.fits(0, 63, 1)
    assert not IntegerRanks.fits(0, 64, 1)
    assert not IntegerRanks.fits(-(2**63), 2**63 - 1, 10**12)


def test_plain_integers_are_read_and_nothing_else():
    plain = ["0", "7", "-7", "10", "999999999999999999", "-999999999999999999"]
    others = [
        "",
        "-",
        "-0",
        "00",
        "07",
        "+7",
        "7.0",
        " 7",
        "7 ",
        "1e3",
        "1234567890123456789",
        "٣",
        "a",
        "-a",
        "1/",
        "1:",
    ]
    array = pa.array(["skipped", *plain, *others, None, "5"], pa.large_string()).slice(1)
    values, is_read = read_integers(array)
    assert is_read.tolist() == [True] * len(plain) + [False] * (len(others) + 1) + [True]
    assert values[is_read].tolist() == [int(text) for text in (*plain, "5")]
