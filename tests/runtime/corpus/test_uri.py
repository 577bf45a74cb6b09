"""Inputs and output behind URIs, on a local S3 server."""

import boto3
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from stand_in import embed_with_stand_in, tree

from flashvec.runtime.corpus import sources as module
from flashvec.runtime.corpus.manifest import check_job
from flashvec.runtime.corpus.plan import PlanError
from flashvec.runtime.corpus.sources import find_sources, stat_source
from flashvec.runtime.corpus.storage import Storage


@pytest.fixture
def bucket(monkeypatch):
    """Makes URIs in a fresh bucket; the client puts and lists objects."""
    for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="bucket")
    query = f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    yield client, lambda path: f"s3://bucket/{path}{query}"
    server.stop()


def objects(client, prefix):
    listed = client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
    return {item["Key"]: client.get_object(Bucket="bucket", Key=item["Key"])["Body"].read() for item in listed}


def test_from_and_to_a_bucket(bucket, tmp_path):
    client, uri = bucket
    for i in range(2):
        client.put_object(
            Bucket="bucket", Key=f"in/{i}.txt", Body="".join(f"row {i} {j}\n" for j in range(30)).encode()
        )
    client.put_object(Bucket="bucket", Key="in/readme.md", Body=b"x")
    assert [source.uri for source in find_sources([uri("in")])] == [uri("in/0.txt"), uri("in/1.txt")]
    assert [source.uri for source in find_sources([uri("in/*1.txt")])] == [uri("in/1.txt")]
    assert find_sources([uri("in")]) == [stat_source(uri("in/0.txt")), stat_source(uri("in/1.txt"))]

    result = embed_with_stand_in([uri("in")], uri("out"), shard_size=25)
    assert result.rows == 60 and check_job(Storage(uri("out"))).problems == []
    written = objects(client, "out/")
    embed_with_stand_in([uri("in")], tmp_path / "out", shard_size=25)
    assert {key.removeprefix("out/"): content for key, content in written.items()} == tree(tmp_path / "out")

    client.delete_object(Bucket="bucket", Key="out/_manifest/00001.json")
    client.delete_object(Bucket="bucket", Key="out/_SUCCESS")
    embed_with_stand_in([uri("in")], uri("out"), shard_size=25)
    assert objects(client, "out/") == written

    client.put_object(Bucket="bucket", Key="in/0.txt", Body=b"other\n")
    with pytest.raises(PlanError, match="has changed"):
        embed_with_stand_in([uri("in")], uri("out"), shard_size=25)
    with pytest.raises(ValueError, match="its parts would become inputs"):
        embed_with_stand_in([uri("in")], uri("in/out"))
    with pytest.raises(ValueError, match="its parts would become inputs"):
        embed_with_stand_in([uri("in/**/*"), tmp_path / "out" / "*.parquet"], uri("in/out"))
    with pytest.raises(ValueError, match="its parts would become inputs"):
        embed_with_stand_in([f"file://{tmp_path}"], tmp_path / "out2")
    client.put_object(Bucket="bucket", Key="in/a/b.jsonl", Body=b'{"text": "a"}\n')
    assert embed_with_stand_in([uri("in/**/*.jsonl")], uri("in/vectors")).rows == 1  # its own end in .parquet


def test_files_are_listed_and_not_asked_for_one_by_one(bucket, monkeypatch):
    """A thousand small files would be a thousand requests, one after the other."""
    client, uri = bucket
    for i in range(3):
        client.put_object(Bucket="bucket", Key=f"many/{i}.txt", Body=b"x\n")
    first, *_ = found = find_sources([uri("many")])
    listed = pafs.FileInfo("bucket/many/0.txt", pafs.FileType.File, size=2, mtime_ns=first.mtime_ns + 123_456_789)
    assert stat_source(first.uri, listed) == first  # some stores list fractions of a second
    asked = []
    monkeypatch.setattr(module, "stat_source", lambda uri, info=None: (asked.append(info), stat_source(uri, info))[1])
    assert find_sources([uri("many")]) == found
    assert [info.size for info in asked] == [2, 2, 2]


def test_npy_behind_a_uri(bucket, tmp_path):
    client, uri = bucket
    (tmp_path / "a.txt").write_text("a\nb\n")
    embed_with_stand_in(tmp_path / "a.txt", uri("npy"), format="npy")
    assert set(objects(client, "npy/part")) == {"npy/part-00000.npy", "npy/part-00000.ids.parquet"}
    result = embed_with_stand_in(tmp_path / "a.txt", tmp_path / "again", reuse=uri("npy"))
    assert result.reused == 2 and pq.read_table(tmp_path / "again" / "part-00000.parquet").num_rows == 2
