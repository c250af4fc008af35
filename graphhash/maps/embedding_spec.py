"""The kind and the sizes of a model's compressed embeddings, before they are made.

Most methods compress by a bucket map alone: kind ``"bucket"``. The others have parameters of another shape than one table of vectors, such
as a flat array of numbers or the layers of a network. Their bucket map is the identity, which names the ids, and the spec holds the sizes.
``graphhash.nn.kinds`` makes embeddings from specs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class EmbeddingSpec:
    """How both embeddings of a model are compressed.

    Args:
        kind: one of ``graphhash.nn.kinds.KINDS``.
        sizes: whole numbers that the kind takes, by name.
        seed: of its hash functions.
    """

    kind: str = "bucket"
    sizes: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0

    def to_json(self) -> str:
        """One line, read by :meth:`from_json`."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> EmbeddingSpec:
        return cls(**json.loads(text))


BUCKET = EmbeddingSpec()
