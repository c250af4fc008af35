from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.logs import values


def test_texts_are_the_same_numbers_whether_few_or_many(monkeypatch):
    texts = pa.array(["12", "-3", "007", "7.0", " 8 ", None, "x", "9223372036854775807", "9223372036854775808", ""])
    few, wrong = values.whole_numbers(texts)
    monkeypatch.setattr(values, "LEAST_COMPILED", 0)
    many, wrong_of_many = values.whole_numbers(texts)
    assert many.equals(few)
    assert np.array_equal(wrong, wrong_of_many)
