"""The same shards on a Ray cluster: actors hold the model, the driver hands out numbers, vectors go to storage.

An actor whose process or node is lost is made anew; the shard it had goes to whichever actor is free. The job's folder
must be one that all nodes see: a shared file system or a URI.
"""

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from flashvec.runtime.corpus.local import STRIKES, ErrorBudget, Event, WorkerError
from flashvec.runtime.corpus.plan import ModelFacts
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.worker import ShardRunner, describe_error

POLL_S = 1.0
SILENT_S = 60.0  # of waiting for a model to be loaded, before a word about it
REACH_S = 10.0  # for a cluster to take a connection
LOADS = 3  # tries of an actor to load the model: a machine without the memory for it ends the process each time

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


def check_reachable(address: str) -> None:
    """Refuse an address where nothing listens, which Ray would try without end.

    Raises:
        ValueError: names the address and why.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.scheme not in ("", "ray") or not parts.hostname or not parts.port:
        return  # "auto" and others that Ray looks up itself
    try:
        socket.create_connection((parts.hostname, parts.port), REACH_S).close()
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"no Ray cluster answers at {address} ({why}): is it up, and its port open?") from None


class RayFleet:
    """Actors of one job; a context manager.

    Args:
        load: arguments of `Encoder.load`.
        address: of a cluster; None: the one that the environment names, else one started here.
        num_workers: actors to ask for, each with a GPU where the cluster has any. Fewer work where fewer fit.
        make: loads a runner on a node; tests have their own.

    Raises:
        ValueError: Ray is not installed, or nothing listens at the address.
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
            raise ValueError("engine 'ray' needs Ray: pip install 'flashvec[ray]'") from None
        self.ray, self.load, self.address, self.num_workers, self.make = ray, load, address, num_workers, make
        self.notes: list[str] = []
        self.actors: list[Any] = []

    def __enter__(self) -> "RayFleet":
        self.is_own = not self.ray.is_initialized()
        if self.is_own:
            # Not Ray's own search, which takes whatever cluster was last started on this machine.
            address = self.address or os.environ.get("RAY_ADDRESS") or "local"
            here: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
            check_reachable(address)
            self.ray.init(address=address, log_to_driver=False, **here)
        gpus = 1 if self.ray.cluster_resources().get("GPU", 0) else 0
        self.needs = ("CPU", "GPU") if gpus else ("CPU",)
        options: dict[str, Any] = {
            "max_restarts": LOADS - 1,
            "num_cpus": 1,
            "num_gpus": gpus,
            "scheduling_strategy": "SPREAD",
        }
        self.actor_class = self.ray.remote(**options)(_Actor)
        self.actors = [self._new() for _ in range(self.num_workers)]
        return self

    def __exit__(self, *error: object) -> None:
        for actor in self.actors:
            self.ray.kill(actor)
        if self.is_own:
            self.ray.shutdown()

    def facts(self) -> ModelFacts:
        """Facts of the model and machine, from the first actor that has loaded it; says so where that takes long."""
        asked = self._asked(self.actors)
        ready, _ = self.ray.wait([*asked], num_returns=1, timeout=SILENT_S)
        if not ready:
            logger.warning(
                "no actor has the model after %.0f s: it is being loaded, or none finds room. An actor takes %s; "
                "the cluster has %s free. Waiting for as long as it takes",
                SILENT_S,
                " and ".join(f"1 {name}" for name in self.needs),
                " and ".join(self._free(name) for name in self.needs),
            )
        while True:
            ready, _ = self.ray.wait([*asked], num_returns=1)
            facts = self._started(ready[0], asked.pop(ready[0]))
            if facts is not None:
                return facts

    def ask(self, question: str, texts: list[str], settings: JobSettings) -> Event:
        """An actor's answer about some texts: "ranges" or "speed"; that of the first which has one.

        Raises:
            WorkerError: what an actor could not do, or none was left to answer.
        """
        asked = [actor.call.remote(question, texts, settings) for actor in self.actors]
        lost = "no actor"
        while asked:
            (ready, *_), asked = self.ray.wait(asked, num_returns=1)
            try:
                answer: Event = self.ray.get(ready)
            except self.ray.exceptions.RayError as error:
                lost = type(error).__name__
                continue
            value: Event = self._value(answer, "value")
            return value
        raise WorkerError(f"{question}: no actor was left to answer ({lost})")

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
        starting = self._asked(self.actors)
        free: list[Any] = []
        while waiting or under_way:
            while free and waiting:
                actor, shard = free.pop(), waiting.popleft()
                under_way[actor.call.remote("run", job, shard, errors_left.left)] = (actor, shard)
            ready, _ = self.ray.wait([*under_way, *starting], num_returns=1, timeout=POLL_S)
            for reference in ready:
                if reference in starting:
                    actor = starting.pop(reference)
                    if self._started(reference, actor) is not None:
                        free.append(actor)
                    continue
                actor, shard = under_way.pop(reference)
                try:
                    answer = self.ray.get(reference)
                    free.append(actor)
                except self.ray.exceptions.RayError as error:  # the actor's process or node is lost
                    self._give_up(actor)
                    self.actors.append(self._new())
                    starting |= self._asked(self.actors[-1:])
                    strikes[shard] += 1
                    again = strikes[shard] < STRIKES
                    if again:
                        waiting.appendleft(shard)
                    message = type(error).__name__
                    yield {"event": "retry" if again else "set_aside", "shard": shard, "message": message}
                    continue
                yield {"event": "done", "shard": shard, "entry": self._value(answer, "value", f"shard {shard}: ")}

    def _new(self) -> Any:
        return self.actor_class.remote(self.make, self.load)

    def _give_up(self, actor: Any) -> None:
        self.actors.remove(actor)
        self.ray.kill(actor)

    def _asked(self, actors: Sequence[Any]) -> dict[Any, Any]:
        """Each actor by its promise of facts, which waits for the model to be loaded."""
        return {actor.facts.options(max_task_retries=-1).remote(): actor for actor in actors}

    def _started(self, reference: Any, actor: Any) -> ModelFacts | None:
        """What an actor promised; None where it will never be ready, and others are left.

        Raises:
            WorkerError: the model cannot be loaded, or the last actor will never be ready.
        """
        try:
            facts: ModelFacts = self._value(self.ray.get(reference), "facts")
            return facts
        except self.ray.exceptions.RayError as error:
            self._give_up(actor)
            what = f"an actor was lost {LOADS} times while it loaded the model ({type(error).__name__})"
            cure = "has its machine the memory for it?"
            if not self.actors:
                raise WorkerError(f"{what}, and none is left: {cure}") from None
            logger.warning("%s: %s Going on with %d", what, cure, len(self.actors))
            return None

    def _free(self, name: str) -> str:
        free, there = self.ray.available_resources(), self.ray.cluster_resources()
        return f"{free.get(name, 0):g} of {there.get(name, 0):g} {name}"

    def _value(self, answer: Event, name: str, where: str = "") -> Any:
        if answer["event"] == "failed":
            raise WorkerError(f"{where}{answer['message']}")
        return answer[name]
