import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from tiny_models import TEXTS

from flashvec.runtime.integrations.sklearn import FlashvecVectorizer

SNOW = [f"The summit number {i} was covered in snow." for i in range(12)]
BREAD = [f"Mix {i} cups of flour, then wait for the dough." for i in range(12)]
LABELS = ["snow"] * 12 + ["bread"] * 12


@pytest.fixture(scope="module")
def vectorizer(prompted_folder):
    return FlashvecVectorizer(prompted_folder, dtype="float32", truncate_dim=16)


def test_vectors(vectorizer, prompted):
    expected = prompted.embed(list(TEXTS), truncate_dim=16)
    for texts in (list(TEXTS), np.array(TEXTS), pd.Series(TEXTS), (t for t in TEXTS)):
        np.testing.assert_array_equal(vectorizer.transform(texts), expected)
    np.testing.assert_array_equal(vectorizer.fit_transform(list(TEXTS)), expected)
    assert vectorizer.transform([]).shape == (0, 16)
    asked = FlashvecVectorizer(prompted, prompt_name="query", normalize=True)
    np.testing.assert_array_equal(asked.transform(["a"]), prompted.embed(["a"], prompt_name="query", normalize=True))


def test_names_of_features(vectorizer, prompted):
    assert list(vectorizer.get_feature_names_out()) == [f"flashvecvectorizer{i}" for i in range(16)]
    table = clone(vectorizer).set_output(transform="pandas").fit_transform(pd.Series(TEXTS, index=range(10, 18)))
    assert list(table.columns[:2]) == ["flashvecvectorizer0", "flashvecvectorizer1"] and table.index[0] == 10
    columns = make_column_transformer((vectorizer, "text"), remainder="drop")
    np.testing.assert_array_equal(
        columns.fit_transform(pd.DataFrame({"text": TEXTS})), prompted.embed(list(TEXTS), truncate_dim=16)
    )


def test_in_a_pipeline_and_a_search(vectorizer):
    pipeline = make_pipeline(vectorizer, LogisticRegression(C=100)).fit(SNOW[:8] + BREAD[:8], ["s"] * 8 + ["b"] * 8)
    assert list(pipeline.predict([SNOW[10], BREAD[10]])) == ["s", "b"]
    search = GridSearchCV(pipeline, {"flashvecvectorizer__truncate_dim": [4, 32]}, cv=2)
    search.fit(SNOW + BREAD, LABELS)
    assert search.best_score_ > 0.9
    assert search.best_estimator_[0].encoder is vectorizer.encoder  # clones share what is loaded


def test_parameters_and_clones(vectorizer, prompted):
    assert vectorizer.get_params()["truncate_dim"] == 16 and vectorizer.get_params()["dtype"] == "float32"
    copy = clone(vectorizer)
    assert copy.get_params() == vectorizer.get_params() and copy is not vectorizer
    assert copy.encoder is vectorizer.encoder
    assert copy.set_params(max_length=3).encoder.spec.max_length == 3  # other arguments of loading, another encoder
    assert clone(FlashvecVectorizer(prompted)).encoder is prompted


def test_pickles_hold_parameters_only(vectorizer, prompted):
    vectorizer.fit(["a"])
    pickled = pickle.dumps(vectorizer)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    assert again.get_params() == vectorizer.get_params()
    np.testing.assert_array_equal(again.transform(["a"]), vectorizer.transform(["a"]))
    with pytest.raises(TypeError, match="weights are not pickled: give its folder"):
        pickle.dumps(FlashvecVectorizer(prompted))


def test_what_is_refused(vectorizer, prompted_folder, prompted):
    with pytest.raises(TypeError, match="X is one str: give a list of str"):
        vectorizer.transform("a text")
    with pytest.raises(TypeError, match=r"X\[1\] is nan, a missing value"):
        vectorizer.fit(["a", float("nan")])
    with pytest.raises(TypeError, match=r"X is a table \(DataFrame\)"):
        vectorizer.fit(pd.DataFrame({"text": ["a"]}))
    with pytest.raises(ValueError, match="X has 2 dimensions"):
        vectorizer.transform(np.array([["a"], ["b"]]))
    with pytest.raises(ValueError, match="no texts to fit on"):
        vectorizer.fit([])
    with pytest.raises(ValueError, match="prompt_name is 'title'; this model's prompts are: query, document"):
        FlashvecVectorizer(prompted, prompt_name="title").fit(["a"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        FlashvecVectorizer(prompted_folder, colour="red")
    with pytest.raises(ValueError, match="dtype is given by itself and in load: leave one of them out"):
        FlashvecVectorizer(prompted_folder, dtype="float32", load={"dtype": "bfloat16"}).fit(["a"])
    with pytest.raises(TypeError, match="loaded already: dtype"):
        FlashvecVectorizer(prompted, dtype="float32").fit(["a"])
