"""sentence-transformers' method names and parameters, as synonyms of `Encoder`'s own."""

import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.kernels.backend import as_given
from flashvec.runtime.options import EncodeOptions
from flashvec.runtime.pooling import cut_ranges, dequantize
from flashvec.runtime.spec import ModelSpec
from flashvec.runtime.texts import check_truth

QUERY_PROMPTS = ("query",)
DOCUMENT_PROMPTS = ("document", "passage", "corpus")


def first_prompt(prompts: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted names that a model has a prompt of, None if it has none."""
    known = set(prompts)
    return next((name for name in wanted if name in known), None)


class SentenceTransformerNames:
    """That library's methods and properties, for code written for it.

    Code that asks for a `SentenceTransformer` by its class wants `runtime/integrations/sentence_transformers.py`.
    """

    spec: ModelSpec
    embed: Callable[..., Any]
    embed_tokens: Callable[..., Any]

    @typing.overload
    def encode(
        self, inputs: str | Iterable[str], *, convert_to_tensor: Literal[True], **given: Unpack[EncodeOptions]
    ) -> Tensor: ...

    @typing.overload
    def encode(
        self,
        inputs: str | Iterable[str],
        *,
        convert_to_numpy: Literal[True] = True,
        convert_to_tensor: Literal[False] = False,
        **given: Unpack[EncodeOptions],
    ) -> np.ndarray: ...

    @typing.overload
    def encode(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding", "token_embeddings"] = "sentence_embedding",
        precision: str | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> Any: ...

    def encode(
        self,
        inputs: str | Iterable[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding", "token_embeddings"] = "sentence_embedding",
        precision: str | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        sentences: str | Iterable[str] | None = None,
    ) -> Any:
        """`embed` under sentence-transformers' name and parameters.

        `batch_size` counts rows there and has no meaning here (packs are filled by tokens); `device` is where the
        encoder was loaded. Both are accepted so that code written for that library runs as it is. `truncate_dim` cuts
        as in `embed`: what is cut has unit length again, unless the model came as a sentence-transformers folder.
        `sentences` is `inputs` by its name before version 6.

        Returns:
            As there: an array [n, d], a tensor with `convert_to_tensor`, a list of tensors with neither conversion,
            and for "token_embeddings" one tensor [len, d] per text; without the first dimension for a str.

        Raises:
            ValueError: an unknown `output_value` or `prompt_name`, or what `embed` refuses.
        """
        return encode(
            self,
            _one_of(inputs, sentences),
            output_value=output_value,
            convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor,
            instruction=prompt,
            prompt_name=prompt_name,
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
            precision=precision,
            show_progress=show_progress_bar,
        )

    @typing.overload
    def encode_query(
        self, inputs: str | Iterable[str], *, convert_to_tensor: Literal[True], **given: Unpack[EncodeOptions]
    ) -> Tensor: ...

    @typing.overload
    def encode_query(self, inputs: str | Iterable[str], **given: Unpack[EncodeOptions]) -> np.ndarray: ...

    @typing.overload
    def encode_query(self, inputs: str | Iterable[str], **settings: Any) -> Any: ...

    def encode_query(self, inputs: str | Iterable[str] | None = None, **settings: Any) -> Any:
        """`encode` with the prompt named "query"; without one, with none."""
        return self._encode_as(QUERY_PROMPTS, inputs, settings)

    @typing.overload
    def encode_document(
        self, inputs: str | Iterable[str], *, convert_to_tensor: Literal[True], **given: Unpack[EncodeOptions]
    ) -> Tensor: ...

    @typing.overload
    def encode_document(self, inputs: str | Iterable[str], **given: Unpack[EncodeOptions]) -> np.ndarray: ...

    @typing.overload
    def encode_document(self, inputs: str | Iterable[str], **settings: Any) -> Any: ...

    def encode_document(self, inputs: str | Iterable[str] | None = None, **settings: Any) -> Any:
        """`encode` with the first prompt named "document", "passage" or "corpus" that the model has, else with none."""
        return self._encode_as(DOCUMENT_PROMPTS, inputs, settings)

    def _encode_as(self, names: Sequence[str], inputs: Any, settings: dict[str, Any]) -> Any:
        if settings.get("prompt") is None and settings.get("prompt_name") is None:
            name = first_prompt(self.spec.prompts, names)
            settings |= {"prompt": ""} if name is None else {"prompt_name": name}  # as theirs: not the default
        return self.encode(inputs, **settings)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Score of every vector of the first against every one of the second.

        Args:
            embeddings1, embeddings2: arrays or tensors [n, d] (or [d]).

        Returns:
            fp32 [n1, n2]: cosine, dot product, or minus the distance, as `spec.similarity` says; higher is closer. Of
            int8 and uint8 vectors it is that of the values they stand for, so that they compare with float ones, too.

        Raises:
            TypeError, ValueError: no vectors, whole numbers other than int8 and uint8 (steps that a list or a table has
                widened would pass for values), packed signs (`precision="binary"`), int8 ones without this encoder's
                value ranges, or widths that differ.
        """
        return _scores(*self._sides(embeddings1, embeddings2), self.spec.similarity)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Score of every vector of the first with the one at its place in the second: fp32 [n], as `similarity`.

        One vector alone is paired with every one of the other side.
        """
        a, b = self._sides(embeddings1, embeddings2)
        if len(a) != len(b) and 1 not in (len(a), len(b)):
            raise ValueError(f"embeddings1 has {len(a)} vectors, embeddings2 {len(b)}: give one for each")
        return _pair_scores(a, b, self.spec.similarity)

    def _sides(self, embeddings1: Any, embeddings2: Any) -> tuple[Tensor, Tensor]:
        sides = []
        for name, given in (("embeddings1", embeddings1), ("embeddings2", embeddings2)):
            if given is None or isinstance(given, str):
                raise TypeError(f"{name} is {type(given).__name__}: give vectors [n, d]")
            vectors = torch.atleast_2d(_as_tensor(name, given))
            if vectors.ndim != 2:
                raise ValueError(f"{name} has {vectors.ndim} dimensions: give vectors [n, d]")
            is_steps = vectors.dtype in (torch.int8, torch.uint8)
            if not (is_steps or vectors.is_floating_point()):
                kind = str(vectors.dtype).removeprefix("torch.")
                raise TypeError(
                    f"{name} is of {kind}: give floats, or steps in the type they were made in, int8 or uint8"
                )
            sides.append(_values_of_steps(name, vectors, self.spec) if is_steps else vectors.float())
        a, b = sides
        if a.shape[1] != b.shape[1]:
            raise ValueError(f"embeddings1 has {a.shape[1]} dimensions, embeddings2 {b.shape[1]}: give equal widths")
        return a, b

    def get_embedding_dimension(self) -> int:
        """Width of a vector."""
        return self.spec.embedding_size

    def get_sentence_embedding_dimension(self) -> int:
        """`get_embedding_dimension` by its name before version 5."""
        return self.spec.embedding_size

    @property
    def max_seq_length(self) -> int:
        """Tokens a text may have; set by `Encoder.load(max_length=...)`."""
        return self.spec.max_length


def _one_of(inputs: Any, sentences: Any) -> Any:
    if (inputs is None) is (sentences is None):
        raise TypeError("give texts as inputs, or as sentences, one of both")
    return sentences if inputs is None else inputs


def encode(
    encoder: SentenceTransformerNames,
    inputs: str | Iterable[str],
    *,
    output_value: str | None = "sentence_embedding",
    convert_to_numpy: bool = True,
    convert_to_tensor: bool = False,
    normalize_embeddings: bool = False,
    **settings: Any,
) -> Any:
    """`embed` or `embed_tokens`, returned in that library's types.

    Args:
        settings: of `embed`; of them tokens take the instruction, `max_length` and `show_progress`.

    Raises:
        ValueError: an unknown `output_value` or `prompt_name`, another precision of tokens, or what `embed` refuses.
    """
    check_truth("normalize_embeddings", normalize_embeddings)
    if settings.get("precision") is None:
        settings["precision"] = "float32"  # that library's evaluators say None
    name, instruction = settings.get("prompt_name"), settings.get("instruction")
    if name is not None and instruction is not None:
        raise ValueError("give prompt or prompt_name, not both")
    if output_value == "token_embeddings":
        prompts = encoder.spec.prompts
        if name is not None and not (isinstance(name, str) and name in prompts):
            raise ValueError(f"prompt_name is {name!r}; this model's prompts are: {', '.join(prompts) or 'none'}")
        if settings["precision"] != "float32":
            raise ValueError(f"precision is {settings['precision']!r}; token_embeddings are float32")
        instruction = instruction if name is None else prompts[name]
        run = {"max_length": settings.get("max_length"), "show_progress": settings.get("show_progress")}
        tensors = [torch.from_numpy(s.vectors) for s in encoder.embed_tokens(inputs, instruction=instruction, **run)]
        return tensors[0] if isinstance(inputs, str) else tensors
    if output_value != "sentence_embedding":
        raise ValueError(f"output_value is {output_value!r}, known are sentence_embedding, token_embeddings")
    settings["normalize"] = True if normalize_embeddings else None
    stays = convert_to_tensor and settings["precision"] in ("float32", "float16")  # others are made by numpy
    result = encoder.embed(inputs, output="torch" if stays else "numpy", **settings)
    if convert_to_tensor:
        return result if stays else torch.from_numpy(result)
    if convert_to_numpy:
        return result
    return torch.from_numpy(result) if isinstance(inputs, str) else [torch.from_numpy(row) for row in result]


@as_given
def _scores(a: Tensor, b: Tensor, similarity: str) -> Tensor:
    if similarity == "dot":
        return a @ b.T
    if similarity in ("euclidean", "manhattan"):
        return -torch.cdist(a, b, p=2 if similarity == "euclidean" else 1)
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


@as_given
def _pair_scores(a: Tensor, b: Tensor, similarity: str) -> Tensor:
    if similarity == "dot":
        return (a * b).sum(-1)
    if similarity in ("euclidean", "manhattan"):
        return -torch.linalg.vector_norm(a - b, 2 if similarity == "euclidean" else 1, dim=-1)
    return F.cosine_similarity(a, b)


def _values_of_steps(name: str, steps: Tensor, spec: ModelSpec) -> Tensor:
    """fp32 values of int8 or uint8 vectors, whose steps are counted from each dimension's own lower end.

    Raises:
        ValueError: packed signs, or steps whose ranges the model does not have.
    """
    width = steps.shape[1]
    possible = (cut_ranges(spec, width, normalize) for normalize in (None, True, False))
    ranges = next((found for found in possible if found is not None), None)
    if width == spec.embedding_size and ranges is None:
        raise ValueError(
            f"{name} holds steps (precision='int8' or 'uint8') and this encoder has no value ranges of {width} "
            "dimensions: take the encoder that made them, or give float vectors"
        )
    if ranges is None or 8 * width == spec.embedding_size:
        raise ValueError(
            f"{name} holds packed signs (precision='binary' or 'ubinary'), which have no similarity of this "
            "kind: count the bits that differ, or give float vectors"
        )
    return torch.from_numpy(dequantize(steps.numpy(force=True), ranges)).to(steps.device)


def _as_tensor(name: str, x: Any) -> Tensor:
    """As it is where its type is a tensor's or it holds whole numbers, else fp32.

    Raises:
        TypeError: what is no array of numbers, nor made one by numpy; names the argument.
    """
    if isinstance(x, list | tuple) and len(x) and isinstance(x[0], Tensor):
        return torch.stack(list(x))
    if isinstance(x, Tensor):
        return x
    try:
        array = np.asarray(x)
        if array.dtype == object:
            raise TypeError("numbers in objects: steps could not be told from values")
        if array.dtype.kind not in "iub":
            array = array.astype(np.float32, copy=False)
    except (TypeError, ValueError):
        cure = "; a column of them as one array of its type, e.g. np.stack(list(column)).astype('float32')"
        raise TypeError(f"{name} is {type(x).__name__}: give vectors [n, d]{cure}") from None
    # torch takes no rows in reverse, and warns of what cannot be written into (a memmap, a table's column)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
