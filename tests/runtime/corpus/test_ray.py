"""A cluster of two nodes on this machine: an actor killed, then a node; the output is the local one, byte for byte."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
from stand_in import StandIn, embed_with_stand_in, facts, tree

from flashvec.runtime.corpus.job import embed_corpus
from flashvec.runtime.corpus.local import WorkerError
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.worker import ShardRunner

ray = pytest.importorskip("ray", reason="needs Ray")
from flashvec.runtime.corpus import ray as ray_module  # noqa: E402
from flashvec.runtime.corpus.ray import RayFleet  # noqa: E402

ROWS, SIZE = 300, 10


def slow_stand_in(load):
    """On a node: says where it runs, and takes its time."""
    with open(load["pids"], "a") as file:
        file.write(f"{ray.get_runtime_context().get_node_id()} {os.getpid()}\n")
    return ShardRunner(StandIn({"delay_s": 0.02}), facts(load))


def lost_while_loading(load):
    """On a node without the memory for the model: the system ends the process. One may `stay`, and loads it last."""
    try:
        os.mkdir(load["stay"])
    except (KeyError, FileExistsError):
        with open(load["pids"], "a") as file:
            file.write(f"{os.getpid()}\n")
        os.kill(os.getpid(), signal.SIGKILL)
    pids = Path(load["pids"])
    while not pids.exists() or len(pids.read_text().splitlines()) < ray_module.LOADS:
        time.sleep(0.1)
    time.sleep(2)  # until Ray has seen the last one end
    return ShardRunner(StandIn(), facts(load))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    from ray.cluster_utils import Cluster

    here = os.path.dirname(os.path.abspath(facts.__code__.co_filename))
    root = os.path.dirname(here)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([here, root, *([before] if before else [])])  # for the nodes' processes
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    yield cluster, node
    ray.shutdown()
    cluster.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def test_an_actor_and_a_node_are_lost(cluster, tmp_path):
    cluster, node = cluster
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": f"row {i}" * (i % 30 > 0)}) + "\n" for i in range(ROWS))
    )
    pids = tmp_path / "pids"
    events = []

    def lose():
        """Once shards are being done: a worker process on the head, then the whole second node."""
        while sum(event["event"] == "done" for event in events) < 4:
            time.sleep(0.05)
        places = dict(line.split() for line in pids.read_text().splitlines())
        os.kill(int(places[ray.get_runtime_context().get_node_id()]), signal.SIGKILL)
        while sum(event["event"] == "done" for event in events) < 8:
            time.sleep(0.05)
        cluster.remove_node(node)

    thread = threading.Thread(target=lose)
    thread.start()
    result = embed_corpus(
        tmp_path / "in.jsonl",
        tmp_path / "ray",
        model="stand-in",
        load={"pids": str(pids)},
        settings=JobSettings(shard_size=SIZE),
        fleet=lambda load: RayFleet(load, num_workers=2, make=slow_stand_in),
        on_event=events.append,
    )
    thread.join()
    assert not result.set_aside and sum(event["event"] == "retry" for event in events) >= 1
    assert len({line.split()[0] for line in pids.read_text().splitlines()}) == 2  # both nodes were at work
    assert len(pids.read_text().splitlines()) >= 3  # and a new process took over
    embed_with_stand_in(tmp_path / "in.jsonl", tmp_path / "local", shard_size=SIZE, load={"pids": str(pids)})
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")


def test_actors_that_find_no_room_are_given_nothing(cluster, tmp_path):
    """Two of three actors run, or one where a node was lost before, and do it all."""
    (tmp_path / "in.txt").write_text("".join(f"row {i}\n" for i in range(30)))
    result = embed_corpus(
        tmp_path / "in.txt",
        tmp_path / "ray",
        model="stand-in",
        load={"pids": str(tmp_path / "pids")},
        settings=JobSettings(shard_size=SIZE),
        fleet=lambda load: RayFleet(load, num_workers=3, make=slow_stand_in),
    )
    assert result.rows == 30 and not result.set_aside
    assert len((tmp_path / "pids").read_text().splitlines()) <= 2


def test_a_cluster_without_room_is_waited_for_with_a_word(cluster, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ray_module, "SILENT_S", 0.2)
    num_cpus = int(ray.cluster_resources()["CPU"])
    others = [ray.remote(num_cpus=1)(threading.Event).remote() for _ in range(num_cpus)]
    ray.get([other.is_set.remote() for other in others])
    leave = threading.Timer(1.5, lambda: [ray.kill(other) for other in others])
    leave.start()
    with RayFleet({"pids": str(tmp_path / "pids")}, make=slow_stand_in) as fleet:
        assert fleet.facts().dim == facts({}).dim
    leave.join()
    assert f"An actor takes 1 CPU; the cluster has 0 of {num_cpus} CPU free" in caplog.text


def test_errors_come_through(cluster, tmp_path):
    (tmp_path / "in.txt").write_text("a\n\n\n")
    with pytest.raises(WorkerError, match="max_errors"):
        embed_corpus(
            tmp_path / "in.txt",
            tmp_path / "out",
            model="stand-in",
            load={"pids": str(tmp_path / "pids")},
            max_errors=1,
            fleet=lambda load: RayFleet(load, make=slow_stand_in),
        )
    with (
        pytest.raises(WorkerError, match="no such file or folder"),
        RayFleet({"model": str(tmp_path / "none")}) as fleet,
    ):
        fleet.facts()


def test_a_process_lost_whenever_it_loads_the_model_is_given_up(cluster, tmp_path):
    pids = tmp_path / "pids"
    with (
        pytest.raises(WorkerError, match=r"lost 3 times while it loaded the model .*, and none is left: .* memory"),
        RayFleet({"pids": str(pids)}, make=lost_while_loading) as fleet,
    ):
        fleet.facts()
    assert len(pids.read_text().splitlines()) == ray_module.LOADS
    with (
        pytest.raises(WorkerError, match="speed: no actor was left to answer"),
        RayFleet({"pids": str(pids)}, make=lost_while_loading) as fleet,
    ):
        fleet.ask("speed", ["a text"], JobSettings())


def test_others_do_the_work_of_one_that_is_given_up(cluster, tmp_path, caplog):
    cluster, _ = cluster
    cluster.add_node(num_cpus=1)  # room for both, also where a node was lost before
    cluster.wait_for_nodes()
    (tmp_path / "in.txt").write_text("".join(f"row {i}\n" for i in range(30)))
    result = embed_corpus(
        tmp_path / "in.txt",
        tmp_path / "ray",
        model="stand-in",
        load={"pids": str(tmp_path / "pids"), "stay": str(tmp_path / "stay")},
        settings=JobSettings(shard_size=SIZE),
        fleet=lambda load: RayFleet(load, num_workers=2, make=lost_while_loading),
    )
    assert result.rows == 30 and not result.set_aside
    assert "has its machine the memory for it? Going on with 1" in caplog.text


def test_an_address_where_nothing_listens_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for given in (address, f"ray://{address}"):
            with pytest.raises(ValueError, match=f"no Ray cluster answers at {given} .*refused.*: is it up"):
                ray_module.check_reachable(given)
        taken.listen()
        ray_module.check_reachable(address)
    for looked_up in ("auto", "local", "anyscale://cluster"):
        ray_module.check_reachable(looked_up)


def test_a_step_of_a_ray_data_pipeline(cluster):
    data = pytest.importorskip("ray.data")
    from flashvec.runtime.corpus.batch import EmbedBatch

    table = pa.table({"text": [f"row {i}" for i in range(50)], "n": range(50)})
    found = data.from_arrow(table).map_batches(
        EmbedBatch,
        fn_constructor_kwargs={"encoder": StandIn()},
        batch_format="pyarrow",
        batch_size=20,
        compute=data.ActorPoolStrategy(size=1),
    )
    rows = sorted(found.take_all(), key=lambda row: row["n"])
    assert [row["text"] for row in rows] == table["text"].to_pylist()
    assert (StandIn().embed(["row 7"])[0] == rows[7]["vector"]).all()
