"""`EmbedBatch`: the job's row rules as a step of a pipeline that hands over Arrow tables, such as Ray Data's."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from flashvec.runtime.corpus.job import PLACEHOLDER_FACTS
from flashvec.runtime.corpus.plan import Plan
from flashvec.runtime.corpus.rows import make_rows, strings
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.vectors import TextEncoder, Vectors, embed_texts
from flashvec.runtime.corpus.windows import Window


class EmbedBatch:
    """Adds a column of vectors to a table: `dataset.map_batches(EmbedBatch, batch_format="pyarrow", ...)`.

    Give it large batches, thousands of rows: texts are sorted and packed inside.

    Args:
        model: as for `Encoder.load`.
        settings: text columns, prompt, dims, precision (int8 is left to jobs, which measure ranges first).
        vector_column: name of the new column.
        load: further arguments of `Encoder.load`.
        encoder: a loaded encoder instead of `model`.
    """

    def __init__(
        self,
        model: str = "",
        settings: JobSettings | None = None,
        vector_column: str = "vector",
        load: dict[str, Any] | None = None,
        encoder: TextEncoder | None = None,
    ) -> None:
        settings = settings or JobSettings(text_columns=("text",))
        if settings.precision == "int8" or settings.chunks == "rows":
            raise ValueError("EmbedBatch gives one vector a row and measures no ranges: no int8, no chunks='rows'")
        if not settings.text_fields():
            raise ValueError("EmbedBatch needs text_columns or text_template")
        if encoder is None:
            from flashvec.runtime.encoder import Encoder

            encoder = Encoder.load(model, **(load or {}))
        self.encoder, self.settings, self.vector_column = encoder, settings, vector_column
        width = embed_texts(encoder, ["x"], settings)[0].shape[1]
        self.plan = Plan(settings, (), (), pa.schema([]), replace(PLACEHOLDER_FACTS, dim=width))

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with its vectors, rows in order; null where a row has no text or its vector is not finite."""
        fields = {name: strings(table[name].combine_chunks()) for name in self.settings.text_fields()}
        rows = make_rows(0, np.arange(len(table)), fields, {}, {}, self.settings)
        empty = np.zeros(len(table), np.int32)
        window = Window(empty, rows.places, rows.texts, rows.bad, pa.table({}), len(table))
        window, _, vectors, _ = Vectors(self.plan, self.encoder).make(window)
        kind = self.plan.vector_type()
        good = np.array([i not in window.bad for i in range(len(table))], dtype=bool)
        values = np.zeros((len(table), kind.list_size), vectors.dtype)
        values[good] = vectors
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind, mask=pa.array(~good))
        return table.append_column(pa.field(self.vector_column, kind), column)
