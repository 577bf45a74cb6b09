"""LanceDB's embedding function over an `Encoder`. Needs the extra `lancedb`: pip install 'flashvec[lancedb]'.

Importing this module registers it as "flashvec"; a program that opens a table made with it imports it too:

    embed = get_registry().get("flashvec").create(name="smollm2-encoder")

    class Passage(LanceModel):
        text: str = embed.SourceField()
        vector: Vector(embed.ndims()) = embed.VectorField()
"""

import json
from functools import lru_cache
from typing import Any

try:
    from lancedb.embeddings import EmbeddingFunction, register
    from pydantic import ConfigDict
except ImportError as error:
    raise ImportError(f"this integration needs {error.name}: pip install 'flashvec[lancedb]'") from None

from flashvec.runtime.encoder import Encoder
from flashvec.runtime.integrations.two_sides import TwoSides

MAX_LOADED = 2  # models kept: LanceDB makes its function anew from a table's metadata whenever it needs it


@register("flashvec")
class FlashvecFunction(EmbeddingFunction):
    """`create` takes these as keywords, and a table's metadata keeps them: a name and settings, never weights.

    Attributes:
        name: what `Encoder.load` takes; a folder is looked for where the table is opened.
        revision, device, dtype, max_length, local_files_only: of `Encoder.load`.
        query_instruction, document_instruction: None takes the model's own prompt for that side, "" none.
        normalize, truncate_dim: of `Encoder.embed`.

    Raises:
        ValidationError: an unknown keyword (a ValueError that names it).
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_length: int | None = None
    local_files_only: bool = False
    query_instruction: str | None = None
    document_instruction: str | None = None
    normalize: bool | None = None
    truncate_dim: int | None = None

    @property
    def encoder(self) -> Encoder:
        return self._sides().encoder

    def ndims(self) -> int:
        return int(self._sides().documents([]).shape[1])

    def compute_query_embeddings(self, query: str, *args: Any, **kwargs: Any) -> list[Any]:
        """fp32 [d] of one query, in a list.

        Raises:
            TypeError: not a str.
        """
        return [self._sides().query(query)]

    def compute_source_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """fp32 [d] for every text.

        Raises:
            TypeError: rows that are not str; a missing text is one.
        """
        return list(self._sides().documents(self.sanitize_input(texts)))

    # LanceDB tries again after some seconds, as for a service that is busy. A model in this process answers at once or
    # not at all, and its error should be seen.

    def compute_query_embeddings_with_retry(self, *args: Any, **kwargs: Any) -> list[Any]:
        return self.compute_query_embeddings(*args, **kwargs)

    def compute_source_embeddings_with_retry(self, *args: Any, **kwargs: Any) -> list[Any]:
        return self.compute_source_embeddings(*args, **kwargs)

    def _sides(self) -> TwoSides:
        return _open(json.dumps(self.model_dump(exclude={"max_retries"}), sort_keys=True))


@lru_cache(maxsize=MAX_LOADED)
def _open(fields: str) -> TwoSides:
    given = json.loads(fields)
    sides = ("query_instruction", "document_instruction", "normalize", "truncate_dim")
    settings = {name: given.pop(name) for name in sides}
    return TwoSides(Encoder.load(given.pop("name"), **given), **settings)
