"""What a user would run instead: the same model in other libraries, as a careful user sets them up.

Each has `embed(list of str) -> [n, d]` unit vectors, tokenisation included.
"""

import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from flashvec.bench import peers_llm2vec
from flashvec.bench.peers_llama_cpp import LlamaCpp
from flashvec.bench.peers_llm2vec import Llm2Vec
from flashvec.runtime.checkpoint.open import Overrides, open_checkpoint, resolve
from flashvec.runtime.verify import hugging_face_model

BATCH_SIZE = 32
LLM2VEC = "llm2vec"
BUDGET = 1024  # padded tokens of a batch of texts sorted by length: where OpenVINO is fastest


class HuggingFace:
    """transformers' own model, mean pooled in fp32.

    Args:
        model: folder or GGUF file.
        dtype: of weights and products.
        max_length: tokens of a text, the rest is cut; so of every class here.
        by_length: batches of texts of about the same length and at most `BUDGET` padded tokens; otherwise of 32 texts
            in the order they come.

    Raises:
        ValueError: a model whose vectors are not the means of its texts' tokens alone.
    """

    def __init__(self, model: str, dtype: torch.dtype, max_length: int, *, by_length: bool = True) -> None:
        self.by_length = by_length
        checkpoint = open_checkpoint(resolve(model), Overrides(max_length=max_length))
        self.spec = spec = checkpoint.spec
        if spec.pooling != ("mean",) or spec.dense or spec.template or spec.text_suffix or spec.default_prompt_name:
            raise ValueError("it takes means of texts alone, the model has another pooling, a prompt or a dense layer")
        self.tokenizer = checkpoint.tokenizer
        self.module = hugging_face_model(checkpoint, resolve(model), dtype)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        ids = self._tokenise(texts)
        if self.by_length:
            return _by_budget(ids, self.spec.decoder.hidden_size, self._run)
        batches = [list(range(len(ids)))[at : at + BATCH_SIZE] for at in range(0, len(ids), BATCH_SIZE)]
        vectors = np.zeros((len(ids), self.spec.decoder.hidden_size), np.float32)
        for rows in batches:
            vectors[rows] = F.normalize(self._mean(*_pad([ids[i] for i in rows])), dim=-1).numpy()
        return vectors

    def _tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids[: self.spec.max_length] for e in self.tokenizer.backend.encode_batch_fast(list(texts))]

    def _run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        ids, mask = (torch.from_numpy(inputs[name]) for name in ("input_ids", "attention_mask"))
        return self._mean(ids, mask).numpy()

    @torch.inference_mode()
    def _mean(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.module(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class OpenVINO(HuggingFace):
    """The same model and pooling converted to OpenVINO, in batches of at most `BUDGET` padded tokens.

    Args:
        int8: weights of products as 8-bit integers (`nncf.compress_weights`).
    """

    def __init__(self, model: str, dtype: str, max_length: int, *, int8: bool = False) -> None:
        import openvino

        super().__init__(model, torch.float32, max_length)
        pooled = _Pooled(self.module).eval()
        example = {
            "input_ids": torch.ones(2, 8, dtype=torch.int64),
            "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        }
        with torch.inference_mode():
            converted = openvino.convert_model(pooled, example_input=example)
        if int8:
            import nncf

            converted = nncf.compress_weights(converted)
        hint = {"float32": "f32", "bfloat16": "bf16"}[dtype]
        own = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.compiled: Any = openvino.Core().compile_model(converted, "CPU", own)
        del self.module

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return _by_budget(self._tokenise(texts), self.spec.decoder.hidden_size, lambda inputs: self.compiled(inputs)[0])


class OnnxRuntime(HuggingFace):
    """The same model and pooling exported to ONNX, every optimisation on, in batches of at most `BUDGET` padded tokens.

    Args:
        int8: weights of products as 8-bit integers, inputs quantised as they come (`quantize_dynamic`).
    """

    def __init__(self, model: str, max_length: int, *, int8: bool = False) -> None:
        import onnxruntime

        super().__init__(model, torch.float32, max_length)
        module: Any = self.module
        module.set_attn_implementation("eager")  # sdpa's masks do not trace with a length that changes
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            _export(_Pooled(self.module).eval(), file)
            del self.module
            if int8:
                from onnxruntime.quantization import QuantType, quantize_dynamic

                quantize_dynamic(file, file.with_name("int8.onnx"), weight_type=QuantType.QInt8)
                file = file.with_name("int8.onnx")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
            self.session: Any = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return _by_budget(
            self._tokenise(texts), self.spec.decoder.hidden_size, lambda inputs: self.session.run(None, inputs)[0]
        )


def _export(module: torch.nn.Module, file: Path) -> None:
    ids, mask = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    names = ["input_ids", "attention_mask"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tracing; the newer exporter asks for one more package
        torch.onnx.export(
            module, (ids, mask), str(file), dynamo=False, opset_version=17, input_names=names, output_names=["mean"],
            dynamic_axes={name: {0: "batch", 1: "length"} for name in names} | {"mean": {0: "batch"}},
        )  # fmt: skip


def _by_budget(
    ids: list[list[int]], hidden_size: int, run: Callable[[dict[str, np.ndarray]], np.ndarray]
) -> np.ndarray:
    """Unit vectors of `run`'s means, the longest texts first, at most `BUDGET` padded tokens a batch."""
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    vectors = np.zeros((len(ids), hidden_size), np.float32)
    while order:
        count = max(1, BUDGET // len(ids[order[0]]))
        rows, order = order[:count], order[count:]
        padded, mask = _pad([ids[i] for i in rows])
        mean = run({"input_ids": padded.numpy(), "attention_mask": mask.numpy()})
        vectors[rows] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return vectors


class _Pooled(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output = self.module(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        mask = attention_mask[..., None].float()
        return (output.last_hidden_state * mask).sum(1) / mask.sum(1)


class SentenceTransformers:
    """sentence-transformers as installed: its defaults, batches of 32 sorted by length; in a dtype."""

    def __init__(self, folder: str, max_length: int, dtype: torch.dtype = torch.float32) -> None:
        from sentence_transformers import SentenceTransformer

        own: Any = {"dtype": dtype}
        self.model = SentenceTransformer(folder, device="cpu", local_files_only=True, model_kwargs=own)
        self.model.max_seq_length = max_length

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return self.model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)


class Way(NamedTuple):
    """The package that a peer needs, and how it is opened."""

    package: str
    open: Callable[[], Any]


def ways(model: str, dtype: str, gguf: Path | None = None, max_length: int | None = None) -> dict[str, Way]:
    """Every peer of a model.

    Args:
        model: folder or GGUF file.
        dtype: "float32" or "bfloat16", for those that have a choice.
        gguf: the same model's file for llama.cpp; default `model` where it is one.
        max_length: tokens of a text; default the model's.
    """
    length = lambda: model_max_length(model) if max_length is None else max_length  # noqa: E731 (asked when opened)
    found = {
        f"hugging face {dtype}, sorted": Way(
            "transformers", lambda: HuggingFace(model, getattr(torch, dtype), length())
        ),
        "hugging face float32, as installed": Way(
            "transformers", lambda: HuggingFace(model, torch.float32, length(), by_length=False)
        ),
        f"openvino {dtype}, sorted": Way("openvino", lambda: OpenVINO(model, dtype, length())),
        "openvino int8, sorted": Way("nncf", lambda: OpenVINO(model, dtype, length(), int8=True)),
        "onnx runtime float32, sorted": Way("onnxruntime", lambda: OnnxRuntime(model, length())),
        "onnx runtime int8, sorted": Way("onnxruntime", lambda: OnnxRuntime(model, length(), int8=True)),
    }
    if (Path(model) / "modules.json").is_file():  # a folder that others open

        def sentence_transformers(kind: str) -> Way:
            return Way("sentence_transformers", lambda: SentenceTransformers(model, length(), getattr(torch, kind)))

        found |= {
            f"sentence-transformers {kind}, as installed": sentence_transformers(kind)
            for kind in dict.fromkeys(("float32", dtype))
        }
        found["llm2vec float32, as installed"] = Way(LLM2VEC, lambda: Llm2Vec(Path(model), length()))
    file = gguf or (Path(model) if Path(model).suffix == ".gguf" else None)
    if file is not None:
        name = f"llama.cpp, {file.stem.rpartition('.')[2]} weights"
        found[name] = Way("llama_cpp", lambda: LlamaCpp(file, length()))
    return found


def model_max_length(model: str) -> int:
    """Tokens of a text that the model's spec allows."""
    return open_checkpoint(resolve(model), Overrides()).spec.max_length


def is_installed(package: str) -> bool:
    """Whether a peer's package is there: in this environment, the reference's in its own."""
    return peers_llm2vec.is_installed() if package == LLM2VEC else importlib.util.find_spec(package) is not None


def _pad(rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, int64 [B, longest], padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask.long()
