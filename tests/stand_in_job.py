"""A whole job with the stand-in, as a program to be killed: `python stand_in_job.py INPUT OUT OPTIONS`.

OPTIONS is JSON: arguments of `embed_with_stand_in`, and `in_process` to run the shards in this one process.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stand_in import StandIn, embed_with_stand_in, facts

from flashvec.runtime.corpus.job import embed_corpus
from flashvec.runtime.corpus.local import ErrorBudget, Event
from flashvec.runtime.corpus.plan import ModelFacts
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.worker import ShardRunner


class InProcess:
    """A fleet without processes."""

    def __init__(self, load: dict[str, Any]) -> None:
        self.runner, self.notes = ShardRunner(StandIn(load), facts(load)), list[str]()

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def facts(self) -> ModelFacts:
        return self.runner.facts

    def ask(self, question: str, texts: list[str], settings: JobSettings) -> Event:
        return getattr(self.runner, question)(texts, settings)

    def run(self, job: str, shards: Sequence[int], errors_left: ErrorBudget) -> Iterator[Event]:
        for shard in shards:
            yield {"event": "done", "shard": shard, "entry": self.runner.run(job, shard, errors_left.left)}


def run(given: str, out: str, options: dict[str, Any], on_event: Any = lambda event: None) -> None:
    if options.pop("in_process", False):
        settings = JobSettings(**options)
        embed_corpus(given, out, model="stand-in", settings=settings, fleet=InProcess, on_event=on_event)
    else:
        embed_with_stand_in(given, Path(out), on_event=on_event, **options)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), lambda event: print(json.dumps(event), flush=True))
