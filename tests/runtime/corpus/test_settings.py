import pytest

from flashvec.runtime.corpus.settings import JobSettings, settings_from_dict


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"precision": "int4"}, "precision is 'int4'"),
        ({"format": "lance"}, "format"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"dims": True}, "dims is True"),
        ({"normalize": "no"}, "normalize is 'no'"),
        ({"dedupe": 0}, "dedupe is 0"),
        ({"instruction": "a", "prompt_name": "b"}, "not both"),
        ({"chunks": "rows"}, "needs long='chunk'"),
        ({"text_template": "no column"}, "names no column"),
        ({"text_template": "{title} {body"}, "a brace that belongs to no column"),
        ({"text_columns": ("a", "b")}, r"text_template='\{a\} \{b\}'"),
        ({"columns": ("vector",)}, "has of its own"),
        ({"columns": "id"}, r"give a tuple of names: \('id',\)"),
        ({"text_columns": "text"}, r"give a tuple of names: \('text',\)"),
        ({"columns": {"a"}}, r"columns is \{'a'\}; give a tuple of names"),
        ({"columns": None}, "columns is None; give a tuple of names"),
        ({"columns": ("a", "a")}, "names 'a' twice"),
        ({"columns": ("id",)}, "name it as id_column"),
    ],
)
def test_refused(values, named):
    with pytest.raises(ValueError, match=named):
        JobSettings(**values)


def test_template_joins_columns_and_nothing_else():
    settings = JobSettings(text_template="{title}: {body} {title}")
    assert settings.text_fields() == ("title", "body")
    assert settings.join({"title": "{body}", "body": "b"}) == "{body}: b {body}"  # values are not templates


def test_back_from_json():
    settings = JobSettings(columns=("a", "b"), dims=8)
    assert settings_from_dict(settings.to_dict()) == settings
    with pytest.raises(ValueError, match="unknown key 'colour'"):
        settings_from_dict({**settings.to_dict(), "colour": 1})


def test_a_list_of_names_is_as_good_as_a_tuple():
    assert JobSettings(text_columns=["a"], columns=["b", "c"]) == JobSettings(text_columns=("a",), columns=("b", "c"))
