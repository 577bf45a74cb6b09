"""The same shards on a Ray cluster: actors hold the model, the driver hands out numbers, vectors go to storage.

Ray restarts an actor whose process or node is lost; the shard it had goes to whichever actor is free. The job's folder
must be one that all nodes see: a shared file system or a URI.
"""

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flashvec.runtime.corpus.local import STRIKES, ErrorBudget, Event, WorkerError
from flashvec.runtime.corpus.plan import ModelFacts
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.worker import ShardRunner, describe_error

POLL_S = 1.0
SILENT_S = 60.0  # of waiting for a model to be loaded, before a word about it

logger = logging.getLogger("flashvec")


class _Actor:
    """Holds the model on one node; errors are handed over as plain values, so that a lost node is told apart."""

    def __init__(self, make: Callable[[dict[str, Any]], ShardRunner], load: dict[str, Any]) -> None:
        self.runner: ShardRunner | None = None
        self.error: Event = {}
        try:
            self.runner = make(load)
        except Exception as error:
            self.error = {"event": "failed", **describe_error(error)}

    def call(self, method: str, *arguments: Any) -> Event:
        """What a method of the runner gave, or its error."""
        if self.runner is None:
            return self.error
        try:
            return {"event": "done", "value": getattr(self.runner, method)(*arguments)}
        except Exception as error:
            return {"event": "failed", **describe_error(error)}

    def facts(self) -> Event:
        return self.error if self.runner is None else {"event": "ready", "facts": self.runner.facts}


class RayFleet:
    """Actors of one job; a context manager.

    Args:
        load: arguments of `Encoder.load`.
        address: of a cluster; None: the one that the environment names, else one started here.
        num_workers: actors to ask for, each with a GPU where the cluster has any. Fewer work where fewer fit.
        make: loads a runner on a node; tests have their own.

    Raises:
        ValueError: Ray is not installed.
    """

    def __init__(
        self,
        load: dict[str, Any],
        address: str | None = None,
        num_workers: int = 1,
        make: Callable[[dict[str, Any]], ShardRunner] = ShardRunner.load,
    ) -> None:
        try:
            import ray
        except ImportError:
            raise ValueError("engine 'ray' needs Ray: pip install flashvec[ray]") from None
        self.ray, self.load, self.address, self.num_workers, self.make = ray, load, address, num_workers, make
        self.notes: list[str] = []
        self.actors: list[Any] = []

    def __enter__(self) -> "RayFleet":
        self.is_own = not self.ray.is_initialized()
        if self.is_own:
            # Not Ray's own search, which takes whatever cluster was last started on this machine.
            address = self.address or os.environ.get("RAY_ADDRESS") or "local"
            here: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
            self.ray.init(address=address, log_to_driver=False, **here)
        gpus = 1 if self.ray.cluster_resources().get("GPU", 0) else 0
        self.needs = ("CPU", "GPU") if gpus else ("CPU",)
        actor = self.ray.remote(max_restarts=-1, num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD")
        made = actor(_Actor)
        self.actors = [made.remote(self.make, self.load) for _ in range(self.num_workers)]
        return self

    def __exit__(self, *error: object) -> None:
        for actor in self.actors:
            self.ray.kill(actor)
        if self.is_own:
            self.ray.shutdown()

    def facts(self) -> ModelFacts:
        """Facts of the model and machine, from the first actor that has loaded it; says so where that takes long."""
        asked = [actor.facts.remote() for actor in self.actors]
        ready, _ = self.ray.wait(asked, num_returns=1, timeout=SILENT_S)
        if not ready:
            logger.warning(
                "no actor has the model after %.0f s: it is being loaded, or none finds room. An actor takes %s; "
                "the cluster has %s free. Waiting for as long as it takes",
                SILENT_S,
                " and ".join(f"1 {name}" for name in self.needs),
                " and ".join(self._free(name) for name in self.needs),
            )
            ready, _ = self.ray.wait(asked, num_returns=1)
        found: ModelFacts = self._value(self.ray.get(ready[0]), "facts")
        return found

    def ask(self, question: str, texts: list[str], settings: JobSettings) -> Event:
        """An actor's answer about some texts: "ranges" or "speed"."""
        (ready, *_), _ = self.ray.wait([a.call.remote(question, texts, settings) for a in self.actors], num_returns=1)
        answer: Event = self._value(self.ray.get(ready), "value")
        return answer

    def run(self, job: str, shards: Sequence[int], errors_left: ErrorBudget) -> Iterator[Event]:
        """Run shards, one at a time on each actor.

        Yields:
            done, retry and set_aside events.

        Raises:
            WorkerError: what an actor could not do.
        """
        waiting, strikes = deque(shards), Counter[int]()
        under_way: dict[Any, tuple[Any, int]] = {}
        # An actor gets work once it has answered: on a cluster with no room for all, some never do.
        starting = {actor.facts.options(max_task_retries=-1).remote(): actor for actor in self.actors}
        free: list[Any] = []
        while waiting or under_way:
            while free and waiting:
                actor, shard = free.pop(), waiting.popleft()
                under_way[actor.call.remote("run", job, shard, errors_left.left)] = (actor, shard)
            ready, _ = self.ray.wait([*under_way, *starting], num_returns=1, timeout=POLL_S)
            for reference in ready:
                if reference in starting:
                    free.append(starting.pop(reference))
                    self._value(self.ray.get(reference), "facts")
                    continue
                actor, shard = under_way.pop(reference)
                try:
                    answer = self.ray.get(reference)
                    free.append(actor)
                except self.ray.exceptions.RayError as error:  # the actor's process or node is lost
                    starting[actor.facts.options(max_task_retries=-1).remote()] = actor
                    strikes[shard] += 1
                    again = strikes[shard] < STRIKES
                    if again:
                        waiting.appendleft(shard)
                    message = type(error).__name__
                    yield {"event": "retry" if again else "set_aside", "shard": shard, "message": message}
                    continue
                yield {"event": "done", "shard": shard, "entry": self._value(answer, "value", f"shard {shard}: ")}

    def _free(self, name: str) -> str:
        free, there = self.ray.available_resources(), self.ray.cluster_resources()
        return f"{free.get(name, 0):g} of {there.get(name, 0):g} {name}"

    def _value(self, answer: Event, name: str, where: str = "") -> Any:
        if answer["event"] == "failed":
            raise WorkerError(f"{where}{answer['message']}")
        return answer[name]
