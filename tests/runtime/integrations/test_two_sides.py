import copy
import pickle
import threading

import numpy as np
import pytest
from tiny_models import TEXTS

from flashvec.runtime.integrations.two_sides import TwoSides, open_encoder

QUERY, DOCUMENTS = "who sleeps?", list(TEXTS)


@pytest.mark.parametrize(
    ("given", "query", "document"),
    [
        ({}, {"prompt_name": "query"}, {"prompt_name": "document"}),
        ({"query_instruction": "Q: "}, {"instruction": "Q: "}, {"prompt_name": "document"}),
        ({"query_instruction": "", "document_instruction": ""}, {}, {}),
    ],
)
def test_each_side_has_its_prompt(prompted, given, query, document):
    sides = TwoSides(prompted, **given, truncate_dim=16)
    np.testing.assert_array_equal(sides.query(QUERY), prompted.embed(QUERY, **query, truncate_dim=16))
    np.testing.assert_array_equal(sides.documents(DOCUMENTS), prompted.embed(DOCUMENTS, **document, truncate_dim=16))


def test_no_documents(prompted):
    assert TwoSides(prompted).documents([]).shape == (0, 32)


def test_threads_get_the_same(prompted):
    sides, found = TwoSides(prompted), {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: sides.documents(DOCUMENTS[i:])})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = sides.documents(DOCUMENTS)
    for i in range(4):
        np.testing.assert_array_equal(found[i], whole[i:])


def test_copies_share_the_weights_and_pickles_are_refused(prompted):
    sides = TwoSides(prompted)
    assert copy.deepcopy(sides) is sides
    with pytest.raises(TypeError, match="weights are not pickled"):
        pickle.dumps(sides)


def test_what_is_refused(prompted, prompted_folder):
    sides = TwoSides(prompted)
    for query in (["a"], None, b"a"):
        with pytest.raises(TypeError, match=r"the query is .*: give one str"):
            sides.query(query)
    with pytest.raises(TypeError, match="the documents are one str: give a list"):
        sides.documents("a text")
    with pytest.raises(TypeError, match=r"texts\[1\] is None, a missing value"):
        sides.documents(["a", None])
    with pytest.raises(TypeError, match="query_instruction is int"):
        TwoSides(prompted, query_instruction=3)
    with pytest.raises(ValueError, match="truncate_dim is 1000"):  # at once, not at the first text
        TwoSides(prompted, truncate_dim=1000)
    with pytest.raises(TypeError, match="model is int: give an Encoder"):
        open_encoder(3, {})
    with pytest.raises(TypeError, match=r"loaded already: dtype must be given to Encoder\.load"):
        open_encoder(prompted, {"dtype": "float32"})
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        open_encoder(prompted_folder, {"colour": "red"})
