from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphhash.errors import DataError
from graphhash.graph.vocabulary import Vocabulary

INTEGERS = st.lists(st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, -1, 2**63 - 1, -(2**63)]))
STRINGS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["", " ", "é", "e\u0301", "\x00"])
)
IDS = INTEGERS | STRINGS


@given(IDS)
def test_from_ids_is_the_sorted_set_of_the_ids(ids):
    expected = sorted(set(ids), key=lambda i: i.encode() if isinstance(i, str) else i)
    assert Vocabulary.from_ids(ids).ids.to_pylist() == expected


@given(IDS.filter(bool), st.randoms())
def test_rows_and_take_are_inverse_in_any_order(ids, random):
    unique = list(set(ids))
    random.shuffle(unique)
    vocabulary = Vocabulary(unique)
    rows = vocabulary.rows(ids)
    assert rows.dtype == np.int32
    assert rows.tolist() == [unique.index(i) for i in ids]
    assert vocabulary.take(rows).tolist() == ids


@given(st.data())
def test_unknown_ids_get_the_fallback_or_an_error_that_names_the_first(data):
    both = data.draw(st.sampled_from([INTEGERS, STRINGS]).flatmap(lambda s: st.tuples(s.filter(bool), s)))
    known, asked = both
    vocabulary = Vocabulary.from_ids(known)
    expected = [sorted(set(known), key=lambda i: i.encode() if isinstance(i, str) else i).index(i) if i in known
                else len(vocabulary) for i in asked]  # fmt: skip
    assert vocabulary.rows(asked, missing="fallback").tolist() == expected
    unknown = [i for i in asked if i not in known]
    if unknown:
        with pytest.raises(DataError) as error:
            vocabulary.rows(asked)
        assert f"the first is {unknown[0]!r};" in str(error.value)


@given(STRINGS | INTEGERS, st.integers(0, 5))
def test_content_hash_ignores_chunks_offsets_and_width_but_not_order_or_type(ids, cut):
    unique = list(dict.fromkeys(ids))
    dtype = pa.string() if unique and isinstance(unique[0], str) else pa.int64()
    whole = Vocabulary(pa.array(unique, dtype))
    wide = pa.large_string() if dtype == pa.string() else dtype
    chunked = pa.chunked_array([unique[:cut], unique[cut:]], type=wide)
    sliced = pa.array([*unique[:1], *unique], dtype).slice(len(unique[:1]))
    assert whole == Vocabulary(chunked) == Vocabulary(sliced)
    if len(unique) > 1:
        assert whole != Vocabulary(unique[::-1])


def test_content_hash_tells_types_and_boundaries_apart():
    hashes = {Vocabulary(ids).content_hash for ids in ([1, 2], ["1", "2"], ["12"], ["12", ""], ["", "12"], [12], [])}
    assert len(hashes) == 7


@pytest.mark.parametrize("ids", [[3, -1, 2**62], ["b", "", "é"], []], ids=["int64", "string", "empty"])
def test_save_and_load_keep_kind_and_order(ids, tmp_path):
    vocabulary = Vocabulary(ids)
    vocabulary.save(tmp_path / "ids.parquet")
    loaded = Vocabulary.load(tmp_path / "ids.parquet")
    assert loaded == vocabulary
    assert loaded.kind == vocabulary.kind
    assert loaded.ids.to_pylist() == ids


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1, None], "1 of 2 ids are null, the first at 1"),
        (["a", "b", "a"], "id 'a' occurs more than once"),
        ([1.0], "ids are double"),
        ([1, "a"], "ids must be all int64 or all strings"),
        (pa.array([2**64 - 1], pa.uint64()), "ids must fit int64"),
        ([True], "ids are bool"),
    ],
)
def test_bad_ids_are_refused(ids, words):
    with pytest.raises(DataError, match=words):
        Vocabulary(ids)


def test_narrow_integers_and_dictionaries_become_int64_and_strings():
    assert Vocabulary(np.array([3, 1], np.uint8)).ids.type == pa.int64()
    assert Vocabulary(pa.array(["b", "a"]).dictionary_encode()).ids.to_pylist() == ["b", "a"]


def test_ids_of_the_other_kind_are_an_error_and_not_unknown():
    with pytest.raises(DataError, match=r"ids are string .first 'x'., the vocabulary holds int64"):
        Vocabulary([1]).rows(["x"], missing="fallback")


def test_rows_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"rows span -1..1, the vocabulary has rows 0..1"):
        Vocabulary([5, 6]).take([-1, 1])


def test_loading_something_else_says_so(tmp_path):
    path = tmp_path / "ids.parquet"
    with pytest.raises(DataError, match="not a readable vocabulary"):
        Vocabulary.load(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a readable vocabulary"):
        Vocabulary.load(path)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(DataError, match="one column 'id'"):
        Vocabulary.load(path)
