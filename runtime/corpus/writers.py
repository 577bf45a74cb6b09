"""A shard's output: one Parquet file, or one .npy of vectors with a Parquet file of what belongs to each row.

Rows have the columns file, row (and chunk), hash, then id and the passthrough columns; `file` counts the plan's
sources, `row` is a row number or the first byte of a line, `hash` the xxh3 (128 bits) of prompt and text.
"""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from flashvec.runtime.corpus.manifest import FileFacts
from flashvec.runtime.corpus.plan import Plan
from flashvec.runtime.corpus.storage import Staged, Storage

INCOMPRESSIBLE = ("hash", "vector")  # noise to a compressor, and read faster as they lie


def part_names(plan: Plan, shard: int) -> list[str]:
    """Names of a shard's files: made from its number alone."""
    if plan.settings.format == "npy":
        return [f"part-{shard:05d}.npy", f"part-{shard:05d}.ids.parquet"]
    return [f"part-{shard:05d}.parquet"]


def facts_schema(plan: Plan) -> pa.Schema:
    """Columns beside the vector."""
    own = [pa.field("file", pa.int32()), pa.field("row", pa.int64())]
    if plan.settings.chunks == "rows":
        own.append(pa.field("chunk", pa.int32()))
    return pa.schema([*own, pa.field("hash", pa.binary(16)), *plan.columns])


class PartWriter:
    """Takes a shard's rows in order; `finish` makes its files appear, `discard` drops them."""

    def __init__(self, plan: Plan, storage: Storage, shard: int) -> None:
        self.vector_type = plan.vector_type()
        self.schema = facts_schema(plan)
        self.digest = xxhash.xxh3_64()
        self.num_rows = 0
        self.is_npy = plan.settings.format == "npy"
        self.staged: list[Staged] = []
        self.parquet: pq.ParquetWriter | None = None
        try:
            for name in part_names(plan, shard):
                self.staged.append(storage.stage(name))
            table_schema = self.schema
            if self.is_npy:
                self.staged[0].file.write(self._header())
            else:
                table_schema = self.schema.append(pa.field("vector", self.vector_type))
            leaves = _leaves(table_schema)
            compression = {path: "none" if path.split(".")[0] in INCOMPRESSIBLE else "zstd" for path in leaves}
            dictionaries = [field.name for field in plan.columns if not pa.types.is_nested(field.type)]
            if self.vector_type.value_type.bit_width == 8:  # Parquet stores such numbers in 32 bits; their index in 8
                dictionaries += [path for path in leaves if path.split(".")[0] == "vector"]
            self.parquet = pq.ParquetWriter(
                self.staged[-1].file,
                table_schema,
                compression=compression,
                use_dictionary=dictionaries,
                write_statistics=[field.name for field in self.schema if field.name != "hash"],
            )
        except BaseException:
            self.discard()
            raise

    def write(self, facts: pa.Table, vectors: np.ndarray) -> None:
        """Rows of the part.

        Args:
            facts: columns of `facts_schema`, n rows.
            vectors: [n, d] in the job's precision.
        """
        vectors = np.ascontiguousarray(vectors)
        self.digest.update(vectors.data.cast("B") if vectors.size else b"")
        self.num_rows += len(vectors)
        if self.is_npy:
            self.staged[0].file.write(vectors.data.cast("B") if vectors.size else b"")
        else:
            values = pa.array(vectors.reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(values, type=self.vector_type)
            facts = facts.append_column(pa.field("vector", self.vector_type), column)
        assert self.parquet is not None
        self.parquet.write_table(facts)

    def finish(self) -> tuple[FileFacts, ...]:
        """Make the files durable and visible."""
        assert self.parquet is not None
        self.parquet.close()
        if self.is_npy:
            self.staged[0].file.seek(0)
            self.staged[0].file.write(self._header())
            self.staged[0].file.seek(0, 2)
        found = []
        for staged in self.staged:
            size, value = staged.digest()
            found.append(FileFacts(staged.name, size, value))
        for staged in self.staged:
            staged.commit()
        return tuple(found)

    def _header(self) -> bytes:
        kind = np.dtype(self.vector_type.value_type.to_pandas_dtype())
        return _npy_header(kind, (self.num_rows, self.vector_type.list_size))

    def discard(self) -> None:
        """Drop the files; does nothing to those that are visible."""
        if self.parquet is not None:
            self.parquet.is_open = False  # or it would write a footer into a closed file when it is collected
        for staged in self.staged:
            staged.discard()


def _npy_header(dtype: np.dtype, shape: tuple[int, int]) -> bytes:
    """A .npy header; numpy leaves room in it for a growing first dimension, so its size is always the same."""
    header = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, facts)
    return header.getvalue()


def _leaves(schema: pa.Schema) -> list[str]:
    """Paths of the columns that Parquet stores, as its writer names them."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema):
        pass
    stored = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [stored.column(i).path for i in range(len(stored))]
