import pytest

from flashvec.training.entities import Entity, entities, entity_scores


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("", []),
        ("O O O", []),
        ("B-per", [(0, 1, "per")]),
        ("B-per I-per O", [(0, 2, "per")]),
        ("O B-per B-per I-per", [(1, 2, "per"), (2, 4, "per")]),
        ("I-per I-per O", [(0, 2, "per")]),
        ("O I-loc", [(1, 2, "loc")]),
        ("B-per I-loc", [(0, 1, "per"), (1, 2, "loc")]),
        ("I-per B-per", [(0, 1, "per"), (1, 2, "per")]),
        ("B-creative-work I-creative-work O I-creative-work", [(0, 2, "creative-work"), (3, 4, "creative-work")]),
    ],
)
def test_entities_of_tags(tags, wanted):
    assert entities(tags.split()) == {Entity(*entity) for entity in wanted}


def test_scores_count_exact_matches_over_all_sentences():
    gold = [["B-per", "I-per", "O"], ["B-loc", "O", "B-loc"]]
    predicted = [["B-per", "O", "O"], ["B-loc", "O", "I-per"]]
    found = entity_scores(gold, predicted)  # a span too short, one right, one of another kind
    assert found == pytest.approx({"precision": 100 / 3, "recall": 100 / 3, "f1": 100 / 3, "entities": 3})
    assert entity_scores(gold, gold)["f1"] == 100


def test_scores_where_there_is_nothing():
    nothing, something = [["O", "O"]], [["B-per", "O"]]
    assert entity_scores(nothing, nothing) == {"precision": 0, "recall": 0, "f1": 0, "entities": 0}
    assert entity_scores(nothing, something) == {"precision": 0, "recall": 0, "f1": 0, "entities": 0}
    assert entity_scores(something, nothing) == {"precision": 0, "recall": 0, "f1": 0, "entities": 1}
    with pytest.raises(ValueError, match="2 tags and 1 predicted"):
        entity_scores(nothing, [["O"]])
