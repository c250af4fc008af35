"""Answers of an exported bundle for raw user ids that come as text, as the command line has them.

recommend(Path("out/bundle"), ["42", "43"], 20, exclude_seen=True)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graphhash.errors import DataError
from serving.values import WHOLE, whole_number

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from graphhash.graph.vocabulary import Vocabulary
    from pipeline.distributed.shards import ShardedCsr

logger = logging.getLogger(__name__)


def recommend(
    bundle: Path,
    user_ids: Sequence[str],
    k: int,
    *,
    exclude: Sequence[str] = (),
    exclude_seen: bool = False,
    provider: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """The k best items of each user, in the order asked for.

    Args:
        bundle: folder written by the export stage.
        user_ids: raw ids as text; read as whole numbers when the bundle's users are int64.
        exclude: raw item ids, as text, that nobody is to get. Those that the bundle does not know are logged as a warning.
        exclude_seen: leave out the training interactions of the run folder around the bundle.

    Returns: `{"user_id", "known", "items": [{"item_id", "score"}, ...]}` per user, JSON-able.

    Raises:
        BundleError: the bundle is damaged or cannot be loaded.
        DataError: an id is of the wrong type, or the run folder is not there.
    """
    from serving.private_copy import load_privately
    from serving.retriever import Retriever

    retriever = load_privately(bundle, lambda folder: Retriever(folder, provider=provider, threads=threads))
    types = retriever.manifest["id_types"]
    users = _as_type(user_ids, types["user_id"], "user id")
    always = _as_type(exclude, types["item_id"], "item id")
    if always:
        _warn_of_unknown(always, retriever.score(users[:1], [always]).known_items[0])
    seen = _seen(bundle, users, retriever.manifest) if exclude_seen else None
    answer = retriever.recommend(
        users, k, exclude=[[*always, *(() if seen is None else seen[i])] for i in range(len(users))]
    )
    return [
        {
            "user_id": user,
            "known": bool(known),
            "items": [
                {"item_id": item_id, "score": score}
                for item_id, score in zip(item_ids.tolist(), scores.tolist(), strict=True)
            ],
        }
        for user, known, item_ids, scores in zip(users, answer.known, answer.item_ids, answer.scores, strict=True)
    ]


def _warn_of_unknown(items: Sequence[int | str], known: NDArray[np.bool_]) -> None:
    unknown = [item for item, is_known in zip(items, known.tolist(), strict=True) if not is_known]
    if unknown:
        named = ", ".join(repr(item) for item in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        logger.warning("exclude: %d of %d items are not in the bundle: %s", len(unknown), len(items), named)


def read_ids(path: Path) -> list[str]:
    """Raw ids of a file, one a line, as they stand; empty lines are left out.

    Raises:
        DataError: the file cannot be read, or is no UTF-8 text.
    """
    try:
        # Line ends alone end a line: other characters that Unicode counts among them may be part of an id.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); convert it (iconv -f LATIN1 -t UTF-8)") from error
    return [line.removesuffix("\r") for line in lines if line.removesuffix("\r")]


def _as_type(ids: Sequence[str], kind: str, what: str) -> list[Any]:
    if kind == "string":
        return list(ids)
    numbers = []
    for text in ids:
        number = whole_number(text)
        if number is None:
            if re.fullmatch(WHOLE, text):
                raise DataError(f"{what} {text:.60} does not fit int64, the type of this bundle's ids")
            raise DataError(f"{what} {text!r:.60} is not a whole number, and this bundle's ids are int64")
        numbers.append(number)
    return numbers


def _seen(bundle: Path, users: Sequence[Any], manifest: dict[str, Any]) -> list[np.ndarray]:
    """Raw ids of the items of each user that the model was trained on, or that updates added; none for an out-of-vocabulary user."""
    import numpy as np

    from graphhash.graph.vocabulary import Vocabulary
    from pipeline.distributed.shards import ShardedCsr
    from pipeline.retrieval.folded_in import SEEN, folded_in_dir
    from pipeline.task import TRAIN_PARTS

    run = bundle.resolve().parent
    if not (run / "ingest").is_dir():
        raise DataError(
            f"{run / 'ingest'}: not there, so what users have seen is not known; use a bundle inside its run folder, or --exclude"
        )
    # An update knows what training knew, and more.
    folded_in = folded_in_dir(run, str(manifest["provenance"].get("method")))
    trained_on = manifest["metrics"].get("trained_on", TRAIN_PARTS)
    for folder, graphs in ((folded_in, (SEEN,)), (run / "ingest", trained_on)):
        if not folder.is_dir():
            continue
        vocabularies = {side: Vocabulary.load(folder / f"{side}.parquet") for side in ("users", "items")}
        other = [side for side, ids in vocabularies.items() if not _begins_with(ids, manifest, side)]
        if not other:
            found = [_items_of(ShardedCsr.open(folder / graph), vocabularies, users) for graph in graphs]
            return [np.concatenate(parts) for parts in zip(*found, strict=True)]
    raise DataError(
        f"{run}/ingest/{other[0]}.parquet: not the ids that {bundle} was made with; export the bundle again"
    )


def _items_of(graph: ShardedCsr, vocabularies: dict[str, Vocabulary], users: Sequence[Any]) -> list[np.ndarray]:
    """Raw ids of the items of each user in a graph of users x items."""
    import numpy as np

    found = []
    for row in vocabularies["users"].rows(list(users), missing="fallback").tolist():
        items = graph.read(row, row + 1)[1] if row < graph.n_rows else np.empty(0, np.int64)
        found.append(vocabularies["items"].take(items))
    return found


def _begins_with(vocabulary: Vocabulary, manifest: dict[str, Any], side: str) -> bool:
    """Whether the first ids are the bundle's: an update may be ahead of the bundle, as ids are only ever appended."""
    n_ids = manifest[f"n_{side}"]
    first = vocabulary if len(vocabulary) == n_ids else type(vocabulary)(vocabulary.ids[:n_ids])
    return first.content_hash == manifest["vocabulary_hashes"][side]
