import json
import subprocess
import sys

import lancedb
import numpy as np
import pytest
from lancedb.embeddings import get_registry
from lancedb.pydantic import LanceModel, Vector
from pydantic import ValidationError
from tiny_models import TEXTS

from flashvec.runtime.integrations.lancedb import FlashvecFunction


@pytest.fixture(scope="module")
def function(prompted_folder):
    return get_registry().get("flashvec").create(name=str(prompted_folder), dtype="float32", truncate_dim=16)


@pytest.fixture(scope="module")
def database(function, tmp_path_factory):
    class Passage(LanceModel):
        text: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()

    place = tmp_path_factory.mktemp("db")
    table = lancedb.connect(place).create_table("passages", schema=Passage)
    table.add([{"text": text} for text in TEXTS])
    return place


def test_vectors_with_the_models_prompts(function, database, prompted):
    assert isinstance(function, FlashvecFunction)
    rows = lancedb.connect(database).open_table("passages").to_arrow()
    np.testing.assert_array_equal(rows["vector"].to_pylist(), prompted.encode_document(list(TEXTS), truncate_dim=16))
    (query,) = function.compute_query_embeddings("who sleeps?")
    np.testing.assert_array_equal(query, prompted.encode_query("who sleeps?", truncate_dim=16))


def test_search_by_text(database, prompted):
    vectors = prompted.encode_document(list(TEXTS), truncate_dim=16)
    distances = ((vectors - prompted.encode_query("who sleeps?", truncate_dim=16)) ** 2).sum(1)
    found = lancedb.connect(database).open_table("passages").search("who sleeps?").limit(2).to_list()
    assert [row["text"] for row in found] == [TEXTS[i] for i in np.argsort(distances)[:2]]


def test_a_table_opens_in_another_program(database):
    program = (
        "import sys, json, lancedb, flashvec.runtime.integrations.lancedb\n"
        "table = lancedb.connect(sys.argv[1]).open_table('passages')\n"
        "print(json.dumps([row['text'] for row in table.search('who sleeps?').limit(2).to_list()]))"
    )
    ran = subprocess.run([sys.executable, "-c", program, database], capture_output=True, text=True, check=True)
    here = lancedb.connect(database).open_table("passages").search("who sleeps?").limit(2).to_list()
    assert json.loads(ran.stdout.splitlines()[-1]) == [row["text"] for row in here]


def test_a_model_is_loaded_once(function, prompted_folder):
    again = get_registry().get("flashvec").create(name=str(prompted_folder), dtype="float32", truncate_dim=16)
    assert again.encoder is function.encoder


def test_what_is_refused(function, database, prompted_folder):
    with pytest.raises(ValidationError, match="colour"):
        FlashvecFunction.create(name=str(prompted_folder), colour="red")
    with pytest.raises(TypeError, match="the query is list: give one str"):
        function.compute_query_embeddings(["a"])
    with pytest.raises(TypeError, match=r"texts\[0\] is int"):
        function.compute_source_embeddings_with_retry([3])
    with pytest.raises(RuntimeError, match=r"texts\[0\] is None, a missing value"):  # at once, not after seven tries
        lancedb.connect(database).open_table("passages").add([{"text": None}])
