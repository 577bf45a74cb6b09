import json
from dataclasses import replace

import mteb.mocks as mocks
import numpy as np
import pytest
import torch
from mteb.types import PromptType
from tiny_models import TEXTS, tiny_checkpoint

from flashvec.runtime.encoder import Encoder
from flashvec.training.data import DataError
from flashvec.training.mteb_encoder import MtebEncoder, evaluate_mteb, find_tasks, read_instructions

TASKS = ("MockSTSTask", "MockRetrievalTask", "MockClassificationTask", "MockPairClassificationTask")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_checkpoint(folder)
    return Encoder.load(folder, dtype="float32")


@pytest.fixture
def with_spec(encoder):
    """Gives the encoder other facts for a test."""
    before = encoder.spec
    yield lambda **facts: setattr(encoder, "spec", replace(before, **facts))
    encoder.spec = before


def metadata(name="MockSTSTask"):
    return getattr(mocks, name).metadata


def encode(model, texts, prompt_type=None):
    batches = [{"text": texts[:3]}, {"text": texts[3:]}]
    return model.encode(
        batches, task_metadata=metadata(), hf_split="test", hf_subset="default", prompt_type=prompt_type
    )


def test_offline_tasks_run(encoder):
    model = MtebEncoder(encoder, "owner/tiny")
    found = evaluate_mteb(model, [getattr(mocks, name)() for name in TASKS], show_progress=False)
    assert [result.task_name for result in found.task_results] == list(TASKS) and not found.exceptions
    assert all(np.isfinite(result.get_score()) for result in found.task_results)
    assert found.model_name == "owner/tiny"


def test_vectors_are_the_encoders_in_order(encoder):
    model = MtebEncoder(encoder, "owner/tiny")
    np.testing.assert_array_equal(encode(model, list(TEXTS)), encoder.embed(TEXTS))


def test_given_instructions_leave_documents_alone(encoder):
    model = MtebEncoder(encoder, "owner/tiny", instructions={"MockSTSTask": "Match: ", "STS": "no: "})
    np.testing.assert_array_equal(encode(model, list(TEXTS)), encoder.embed(TEXTS, instruction="Match: "))
    plain = encode(model, list(TEXTS), PromptType.document)
    np.testing.assert_array_equal(plain, encoder.embed(TEXTS))
    model = MtebEncoder(encoder, "owner/tiny", instructions={"STS-document": "D: ", "query": "Q: "})
    assert model.instruction(metadata(), PromptType.document) == "D: "
    assert model.instruction(metadata(), PromptType.query) == "Q: "
    assert model.instruction(metadata(), None) is None


def test_the_models_own_prompts(encoder, with_spec):
    with_spec(prompts={"query": "Query: ", "STS": "Same: "})
    model = MtebEncoder(encoder, "owner/tiny")
    assert model.instruction(metadata("MockRetrievalTask"), PromptType.query) == "Query: "
    assert model.instruction(metadata("MockRetrievalTask"), PromptType.document) is None
    assert model.instruction(metadata(), None) == "Same: "
    assert model.mteb_model_meta.use_instructions


def test_llm2vec_models_get_mtebs_instruction(encoder, with_spec):
    with_spec(layout="llm2vec", span="template")
    model = MtebEncoder(encoder, "owner/tiny")
    wanted = model.get_instruction(metadata(), None)
    assert wanted and model.instruction(metadata(), None) == wanted.rstrip(".:") + ":"
    assert model.instruction(metadata("MockRetrievalTask"), PromptType.document) is None


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_similarity_is_the_models(similarity, encoder, with_spec):
    with_spec(similarity=similarity)
    model = MtebEncoder(encoder, "owner/tiny")
    a, b = torch.randn(300, 8), torch.randn(300, 8)
    assert torch.equal(model.similarity(a, b), encoder.similarity(a, b))
    torch.testing.assert_close(model.similarity_pairwise(a, b), encoder.similarity(a, b).diagonal())
    with pytest.raises(ValueError, match="300 and 1"):
        model.similarity_pairwise(a, b[:1])
    assert model.mteb_model_meta.similarity_fn_name == (None if similarity == "euclidean" else similarity)


def test_a_folders_name(encoder, tmp_path):
    assert MtebEncoder(encoder, str(tmp_path / "out")).mteb_model_meta.name == "local/out"


def test_instructions_from_a_file(tmp_path):
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps({"STS12": "Match:"}))
    assert read_instructions(path) == {"STS12": "Match:"}
    for text, named in (("{", "not JSON"), ("[1]", "expected an object"), ('{"a": 1}', "expected an object")):
        path.write_text(text)
        with pytest.raises(DataError, match=f"instructions.json: {named}"):
            read_instructions(path)
    with pytest.raises(DataError, match="no such file"):
        read_instructions(tmp_path / "none.json")


def test_tasks_that_mteb_does_not_know():
    assert [task.metadata.name for task in find_tasks(["STS12", "SICK-R"])] == ["STS12", "SICK-R"]
    with pytest.raises(ValueError, match="not a task of mteb"):
        find_tasks(["STS99x"])
    with pytest.raises(ValueError, match="at least one"):
        find_tasks([])
