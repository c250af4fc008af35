"""Named data sets follow their protocols."""

from __future__ import annotations

import numpy as np
import pytest

from graphhash.errors import DataError
from pipeline.config.run_config import DataConfig
from pipeline.ctr.columns import labels_of, multi_valued_of
from pipeline.ctr.datasets import find_name, named_files, read_named, unobserved
from pipeline.ctr.log import open_log


def test_negatives_are_unobserved_different_and_repeatable():
    rng = np.random.default_rng(0)
    users, items = rng.integers(20, size=300), rng.integers(30, size=300)
    drawn = unobserved(users, items, 30, 2, 5)
    seen = set(zip(users.tolist(), items.tolist(), strict=True))
    assert not any((u, i) in seen for u, pair in zip(users.tolist(), drawn.tolist(), strict=True) for i in pair)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert np.array_equal(drawn, unobserved(users, items, 30, 2, 5))
    assert not np.array_equal(drawn, unobserved(users, items, 30, 2, 6))
    with pytest.raises(DataError, match="used 2 of 3 items"):
        unobserved(np.array([0, 0]), np.array([0, 1]), 3, 2, 0)


def write_frappe(folder):
    lines = ["user\titem\tcnt\tdaytime\tweekday\tisweekend\thomework\tcost\tweather\tcountry\tcity"]
    lines += [
        f"{u}\t{(u * 3 + k) % 11}\t1\tmorning\tsunday\tweekend\thome\tfree\tsunny\tSpain\t{u}"
        for u in range(6)
        for k in range(3)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "frappe.csv").write_text("\n".join(lines) + "\n")


def test_frappe_has_two_negatives_of_the_same_context_behind_each_positive(tmp_path):
    write_frappe(tmp_path)
    assert find_name(str(tmp_path), "auto") == "frappe"
    (file,) = named_files("frappe", str(tmp_path), "random")
    (rows,) = read_named(file, 0)
    got = {name: values.to_pylist() for name, values in rows.columns.items()}
    assert got["label"] == [1, 0, 0] * 18
    assert got["user"] == [str(u) for u in range(6) for _ in range(9)]
    assert got["city"] == got["user"]
    used = {(u, i) for u, i, label in zip(got["user"], got["item"], got["label"], strict=True) if label}
    assert not any(
        (u, i) in used for u, i, label in zip(got["user"], got["item"], got["label"], strict=True) if not label
    )


def test_movielens_joins_users_and_movies(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::10::5::99\n2::11::3::98\n1::11::4::97\n")
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072-12\n")
    (tmp_path / "movies.dat").write_bytes("10::Amélie (2001)::Comedy|Romance\n11::Nothing::Drama\n".encode("latin-1"))
    (file,) = named_files("movielens-1m", str(tmp_path), "random")
    (rows,) = read_named(file, 0)
    got = {name: values.to_pylist() for name, values in rows.columns.items()}
    assert got["gender"] == ["F", "M", "F"]
    assert got["zip_prefix"] == ["480", "700", "480"]
    assert got["year"] == ["2001", None, None]
    schema = open_log(DataConfig(str(tmp_path))).schema
    assert labels_of(rows, schema.label, schema.label_from).tolist() == [1, 0, 1]
    counts, values = multi_valued_of(rows, "genres", "|", "string")
    assert counts.tolist() == [2, 1, 1]
    assert values.to_pylist() == ["Comedy", "Romance", "Drama", "Drama"]
    (tmp_path / "users.dat").unlink()
    with pytest.raises(DataError, match=r"no users.dat, which movielens-1m needs"):
        named_files("movielens-1m", str(tmp_path), "random")


def test_avazu_takes_hour_and_weekday_from_the_time_and_the_header_of_train(tmp_path):
    names = "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,"
    names += "device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
    row = "1,1,14102113,1005,0,s,sd,sc,a,ad,ac,d,ip,m,1,0,15706,320,50,1722,0,35,-1,79"
    (tmp_path / "train").write_text(f"{names}\n{row}\n")
    (tmp_path / "test").write_text(row.replace("14102113", "14102600") + "\n")
    log = open_log(DataConfig(str(tmp_path), split="given"))
    train, test = log.rows(0)
    assert [file.is_test for file in log.files] == [False, True]
    # 21 October 2014 was a Tuesday, the 26th a Sunday.
    assert [rows.columns["hour_hour"][0].as_py() for rows in (train, test)] == [13, 0]
    assert [rows.columns["hour_weekday"][0].as_py() for rows in (train, test)] == [1, 6]
    (tmp_path / "train").write_text(f"{names}\n{row.replace('14102113', 'noon')}\n")
    with pytest.raises(DataError, match=r"row 2: column 'hour' is 'noon', no time like"):
        list(open_log(DataConfig(str(tmp_path))).rows(0))
