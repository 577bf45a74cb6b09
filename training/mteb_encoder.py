"""An `Encoder` in mteb's protocol (mteb 2.x), so that mteb's tasks run on it.

What is written before a text, the first that there is:

1. `instructions`, by mteb's kinds of names: a task, a type of task, "query" or "document", or `NAME-query`. Documents
   take only what is said for documents, as in LLM2Vec's list of instructions.
2. the model's own prompts, under the same names, as sentence-transformers chooses them.
3. for LLM2Vec models mteb's own instruction of the task, a colon at its end, before all but documents.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashvec.runtime.encoder import Encoder
from flashvec.training.data import DataError, check_file

try:
    import mteb
    from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.types import PromptType
except ImportError:
    raise ImportError("evaluation on mteb's tasks needs mteb: pip install 'flashvec[mteb]'") from None

MAX_FILE_BYTES = 1 << 26
# What mteb has names for; it asks the encoder in any case.
MEASURES = {"cosine": ScoringFunction.COSINE, "dot": ScoringFunction.DOT_PRODUCT}
BLOCK_ROWS = 256


class MtebEncoder(AbsEncoder):
    """`mteb.evaluate(MtebEncoder(encoder, "owner/name"), tasks)`.

    Args:
        encoder: runs the texts; its prompts, direction, pooling and similarity are the model's.
        name: what results are stored under; a folder's last part will do.
        instructions: see above; written before a text as they stand, or around it where they hold `{text}`.
    """

    def __init__(self, encoder: Encoder, name: str, *, instructions: Mapping[str, str] | None = None) -> None:
        self.model = encoder
        self.instructions = dict(instructions or {})
        self.mteb_model_meta = model_meta(encoder, name, bool(instructions))

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """fp32 [n, d] of a DataLoader's batches of {"text": [...]}, in order.

        Packs are filled by tokens, so `batch_size` has no meaning here; nor does any other keyword but
        `show_progress_bar`.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        return self.model.embed(
            texts,
            instruction=self.instruction(task_metadata, prompt_type),
            show_progress=kwargs.get("show_progress_bar"),
        )

    def instruction(self, task_metadata: Any, prompt_type: Any) -> str | None:
        """What is written before the texts; None leaves it to the model's default prompt, if it has one."""
        given = self.instructions
        if prompt_type == PromptType.document:
            given = {key: value for key, value in given.items() if key == "document" or key.endswith("-document")}
        name = get_prompt_name(given, task_metadata, prompt_type)
        if name is not None:
            return given[name]
        own = self.model.spec.prompts
        name = get_prompt_name(own, task_metadata, prompt_type)
        if name is not None:
            return own[name]
        if self.model.spec.layout != "llm2vec" or prompt_type == PromptType.document:
            return None
        wanted = self.get_instruction(task_metadata, prompt_type)
        return wanted.rstrip(".:") + ":" if wanted else None

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """fp32 [n1, n2], by the model's own measure."""
        return self.model.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """fp32 [n]: each vector of the first with the one beside it in the second."""
        a, b = (torch.atleast_2d(torch.as_tensor(vectors)) for vectors in (embeddings1, embeddings2))
        if len(a) != len(b):
            raise ValueError(f"pairs need as many vectors on either side, there are {len(a)} and {len(b)}")
        blocks = zip(a.split(BLOCK_ROWS), b.split(BLOCK_ROWS), strict=True)
        return torch.cat([self.model.similarity(*block).diagonal() for block in blocks])


def model_meta(encoder: Encoder, name: str, has_instructions: bool = False) -> ModelMeta:
    """What mteb stores beside results: name, lengths, sizes, measure. What is not known is None."""
    spec = encoder.spec
    owner_and_name = name if name.count("/") == 1 and not Path(name).exists() else f"local/{Path(name).resolve().name}"
    return ModelMeta(
        loader=None,
        name=owner_and_name,
        revision=None,
        release_date=None,
        languages=None,
        n_parameters=None,
        memory_usage_mb=None,
        max_tokens=spec.max_length,
        embed_dim=spec.embedding_size,
        license=None,
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=MEASURES.get(spec.similarity),
        use_instructions=has_instructions or bool(spec.prompts) or spec.layout == "llm2vec",
        training_datasets=None,
    )


def read_instructions(path: Path) -> dict[str, str]:
    """A JSON object of names and instructions, such as LLM2Vec's task_to_instructions.json.

    Raises:
        DataError: missing, too large, or something else; names the file.
    """
    check_file(path, MAX_FILE_BYTES, "instructions")
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name}: not JSON ({error})") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise DataError(f"{path.name}: expected an object of names and instructions, both text")
    return found


def find_tasks(names: Sequence[str]) -> list[Any]:
    """mteb's tasks of these names.

    Raises:
        ValueError: no name, or one that mteb does not know.
    """
    if not names:
        raise ValueError("name at least one of mteb's tasks, such as STSBenchmark")
    try:
        return list(mteb.get_tasks(tasks=list(names)))
    except KeyError as error:
        raise ValueError(
            f"not a task of mteb {mteb.__version__}: {str(error.args[0]).removeprefix('KeyError: ')}"
        ) from None


def evaluate_mteb(model: MtebEncoder, tasks: Sequence[Any], *, show_progress: bool = True) -> Any:
    """Run tasks, their data loaded by mteb; results of earlier runs are neither read nor kept.

    Returns:
        mteb's `ModelResult`: one entry for each task, with `task_name` and `get_score()` from 0 to 1.
    """
    runs: Any = model  # its kinds of encoders are told apart by methods; this one's are not spelled as theirs
    return mteb.evaluate(runs, tasks, cache=None, co2_tracker=False, show_progress_bar=show_progress)
