"""A corpus job's output as a view in DuckDB. Needs the extra `duckdb`: pip install 'flashvec[duckdb]'.

view_job(connection, "vectors")
connection.execute("select id, array_cosine_similarity(vector, ?::float[576]) s from vectors order by s desc limit 5")
"""

from pathlib import Path

try:
    import duckdb
except ImportError as error:
    raise ImportError(f"this integration needs {error.name}: pip install 'flashvec[duckdb]'") from None

from flashvec.runtime.corpus.search import finished_shards, job_plan
from flashvec.runtime.corpus.storage import Storage
from flashvec.runtime.corpus.writers import part_names

TYPES = {"float32": "float", "float16": "float"}  # of a vector's elements; DuckDB has no half precision


def view_job(connection: "duckdb.DuckDBPyConnection", folder: str | Path, name: str = "vectors") -> None:
    """Make (or replace) a view of a job's finished parts; nothing is copied, rows are read when they are asked for.

    Its columns are the parts' own (file, row, id, passthrough), with `vector` as `FLOAT[d]`, the type that DuckDB's
    array functions and its HNSW index take, and `source`, the input that `file` numbers (`source_uri` where the job
    has a column `source` of its own, with another `_uri` for each that it has of these).

    Args:
        folder: a job's folder on this machine.
        name: of the view.

    Raises:
        PlanError: no job there.
        ValueError: a folder elsewhere, no finished part, or vectors that are not float32 or float16 Parquet.
    """
    storage = Storage(folder)
    plan = job_plan(storage)
    settings = plan.settings
    if settings.format != "parquet" or settings.precision not in TYPES:
        raise ValueError(
            f"{storage.location}: the view takes float32 or float16 vectors in Parquet; this job has "
            f"{settings.precision} in {settings.format}"
        )
    if storage.root is None:
        raise ValueError(f"{storage.location}: the view takes a folder on this machine")
    done = finished_shards(storage, plan)
    if not done:
        raise ValueError(f"{storage.location}: no part of this job is finished")
    parts = ", ".join(_text(str(storage.root / part_names(plan, shard)[0])) for shard in done)
    sources = ", ".join(_text(source.uri) for source in plan.sources)
    identifier = '"' + name.replace('"', '""') + '"'
    vector = f"vector::{TYPES[settings.precision]}[{plan.dim}]"
    own = {name.lower() for name in plan.columns.names}  # to DuckDB case makes no difference
    if "vector" in own:
        raise ValueError(f"{storage.location}: a column of this job is named as `vector` but for its case")
    where = "source"
    while where in own:  # DuckDB would rename the second without a word
        where += "_uri"
    connection.execute(
        f"create or replace view {identifier} as select * replace ({vector} as vector), "
        f"[{sources}][file + 1] as {where} from read_parquet([{parts}])"
    )


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
