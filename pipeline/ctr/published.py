"""CTR data sets with a published split, in three files: those of BARS (Zhu et al., CIKM 2021), with the md5 of every file.

frappe_x1, movielenslatest_x1   7:2:1 (Cheng et al., AAAI 2020). Without the published files the same recipe is followed on the original
                                ones, `frappe.csv` and `tags.csv`: two unobserved items, or tags, for every row, drawn here.
criteo_x1, avazu_x1             7:2:1, of the same authors, whose ids and numbers are encoded: the published files are needed.
criteo_x4, avazu_x4             8:1:1 (Song et al., CIKM 2019): raw values. Without the published files the raw log is split at random:
                                `train.txt` of Criteo, `train` of Avazu.

Criteo's numbers are read in buckets in x4 (`serving.values.log_square_buckets`), and values of fewer than ten rows are out of
vocabulary; of Avazu those of one row, and the hour becomes hour and weekday. Its `is_weekend`, which follows from the weekday, is left out.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.ctr.schema import AUTO, Category, CtrSchema
from pipeline.logs.tables import LogFile

FILES = ("train.csv", "valid.csv", "test.csv")
SEVEN_TWO_ONE, EIGHT_ONE_ONE = (0.2, 0.1), (0.1, 0.1)
FRAPPE_CONTEXT = ("daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
NUMBERS = tuple(f"I{number}" for number in range(1, 14))
CRITEO_IDS = tuple(f"C{number}" for number in range(1, 27))
AVAZU_PLAIN = (
    *("C1", "banner_pos", "site_domain", "site_category", "app_domain", "app_category", "device_model", "device_type"),
    *("device_conn_type", "C14", "C15", "C16", "C17", "C18", "C19", "C20", "C21", "hour_hour", "hour_weekday"),
)
AVAZU_RAW = (
    *("id", "click", "hour", "C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain"),
    *("app_category", "device_id", "device_ip", "device_model", "device_type", "device_conn_type"),
    *("C14", "C15", "C16", "C17", "C18", "C19", "C20", "C21"),
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A data set that was published split.

    Args:
        schema: of its columns.
        header: column names of its files.
        md5: of FILES.
        shares: of validation and test.
        original: the file that the same recipe is followed on; None: there is none.
    """

    schema: CtrSchema
    header: tuple[str, ...]
    md5: tuple[str, str, str]
    shares: tuple[float, float]
    original: str | None = None


def pair(first: str, second: str, compress: str = "method", min_count: int | None = None) -> tuple[Category, Category]:
    """Two columns that are each other's partners, compressed whatever their size unless told otherwise."""
    return (
        Category(first, compress, second, min_count=min_count),
        Category(second, compress, first, min_count=min_count),
    )


def _criteo(label: str, *, min_count: int | None, in_buckets: bool) -> CtrSchema:
    # What the columns mean is not known, nor which of them belong together.
    ids = (Category(name, partner=AUTO, min_count=min_count) for name in CRITEO_IDS)
    others = [f"{name}_bucket" for name in NUMBERS] if in_buckets else []
    categories = (*ids, *(Category(name, min_count=min_count) for name in others))
    return CtrSchema(label, categories, dense=() if in_buckets else NUMBERS, buckets=NUMBERS if in_buckets else ())


def _avazu(min_count: int | None) -> CtrSchema:
    pairs = (*pair("device_ip", "site_id", min_count=min_count), *pair("device_id", "app_id", min_count=min_count))
    plain = (Category(name, min_count=min_count) for name in AVAZU_PLAIN)
    return CtrSchema("click", (*pairs, *plain), times=(("hour", "%y%m%d%H"),), group="device_ip")


# The columns of Avazu_x1 have no names; these are taken to be in the order of the raw log: device_ip and site_id, device_id and app_id.
_AVAZU_X1_PAIRS = (("feat_11", "feat_4"), ("feat_10", "feat_7"))
_AVAZU_X1 = tuple(f"feat_{number}" for number in range(1, 23))

PUBLISHED = {
    "frappe_x1": Published(
        CtrSchema("label", (*pair("user", "item"), *map(Category, FRAPPE_CONTEXT)), group="user"),
        ("label", "user", "item", *FRAPPE_CONTEXT),
        ("ba7306e6c4fc19dd2cd84f2f0596d158", "88d51bf2173505436d3a8f78f2a59da8", "3470f6d32713dc5f7715f198ca7c612a"),
        SEVEN_TWO_ONE,
        "frappe.csv",
    ),
    "movielenslatest_x1": Published(
        CtrSchema("label", (*pair("user_id", "item_id"), Category("tag_id", "method", "item_id")), group="user_id"),
        ("label", "user_id", "item_id", "tag_id"),
        ("efc8bceeaa0e895d566470fc99f3f271", "e1930223a5026e910ed5a48687de8af1", "54e8c6baff2e059fe067fb9b69e692d0"),
        SEVEN_TWO_ONE,
        "tags.csv",
    ),
    "criteo_x1": Published(
        _criteo("label", min_count=None, in_buckets=False),
        ("label", *NUMBERS, *CRITEO_IDS),
        ("30b89c1c7213013b92df52ec44f52dc5", "f73c71fb3c4f66b6ebdfa032646bea72", "2c48b26e84c04a69b948082edae46f8c"),
        SEVEN_TWO_ONE,
    ),
    "criteo_x4": Published(
        _criteo("Label", min_count=10, in_buckets=True),
        ("Label", *NUMBERS, *CRITEO_IDS),
        ("4a53bb7cbc0e4ee25f9d6a73ed824b1a", "fba5428b22895016e790e2dec623cb56", "cfc37da0d75c4d2d8778e76997df2976"),
        EIGHT_ONE_ONE,
        "train.txt",
    ),
    "avazu_x1": Published(
        CtrSchema(
            "label",
            (
                *(column for names in _AVAZU_X1_PAIRS for column in pair(*names)),
                *(Category(name) for name in _AVAZU_X1 if name not in sum(_AVAZU_X1_PAIRS, ())),
            ),
        ),
        ("label", *_AVAZU_X1),
        ("f1114a07aea9e996842c71648e0f6395", "d9568f246357d156c4b8030fadb8b623", "9e2fe9c48705c9315ae7a0953eb57acf"),
        SEVEN_TWO_ONE,
    ),
    "avazu_x4": Published(
        _avazu(2),
        AVAZU_RAW,
        ("de3a27264cdabf66adf09df82328ccaa", "33232931d84d6452d3f956e936cab2c9", "3ebb774a9ca74d05919b84a3d402986d"),
        EIGHT_ONE_ONE,
        "train",
    ),
}  # fmt: skip


def has_published_files(folder: Path) -> bool:
    """Whether all of FILES are there."""
    return all((folder / name).is_file() for name in FILES)


def published_files(folder: Path, split: str) -> list[LogFile]:
    """FILES in this order: with ``split="given"`` as train, validation and test, otherwise as one log."""
    given = split == "given"
    return [
        LogFile(str(folder / name), "csv", is_test=given and name == FILES[2], is_validation=given and name == FILES[1])
        for name in FILES
    ]


def say_published(name: str, files: Sequence[LogFile]) -> bool:
    """Log whether files are the published ones, by their md5; whether they are.

    Args:
        name: of PUBLISHED.
    """
    if [Path(file.path).name for file in files] != list(FILES):
        _log.warning(
            "%s: the published files (%s) are not there: the same recipe is followed on %s, with negatives and a split of its own; "
            "figures are not those of the published split",
            name, ", ".join(FILES), files[0].path,
        )  # fmt: skip
        return False
    for file, expected in zip(files, PUBLISHED[name].md5, strict=True):
        with open(file.path, "rb") as stream:
            found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != expected:
            _log.warning(
                "%s: %s has the md5 %s, that of the published file is %s; figures are not those of the published split",
                name, file.path, found, expected,
            )  # fmt: skip
            return False
    _log.info("%s: the published files, by their md5", name)
    return True
