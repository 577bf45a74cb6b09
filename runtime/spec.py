"""What one encoder is: frozen facts, printable, and enough to run it and to write it back.

`DecoderSpec` holds the transformer, `ModelSpec` adds what makes it an encoder: direction, pooling, prompts, heads.
A family (Llama, Qwen3, Gemma 3, ...) is a row of these facts (`runtime/families.py`), not a class.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flashvec.kernels.rope import Rope

Attention = Literal["bidirectional", "causal"]
PoolingMode = Literal["mean", "weighted_mean", "mean_sqrt_len", "max", "last", "cls"]
PoolingSpan = Literal["offsets", "prompt_tokens", "template", "count_from_right"]

ATTENTIONS: tuple[Attention, ...] = ("bidirectional", "causal")
POOLING_MODES: tuple[PoolingMode, ...] = ("mean", "weighted_mean", "mean_sqrt_len", "max", "last", "cls")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
DENSE_ACTIVATIONS = ("identity", "tanh", "relu", "gelu", "silu", "sigmoid")
VECTOR_LENGTHS = ("unit", "start of unit", "own")  # 1, that of the first numbers of a unit vector, whatever comes


@dataclass(frozen=True)
class DecoderSpec:
    """The transformer itself. Sizes are counts; `head_size` need not be hidden_size / num_heads."""

    family: str
    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    norm_eps: float
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each query and key head, before RoPE
    post_norms: bool = False  # RMSNorm on each block's output, before the residual add
    norm_offset: float = 0.0  # 1.0: the norm multiplies by 1 + w (Gemma)
    embedding_scale: float = 1.0  # token embeddings are multiplied by it, in fp32
    attention_scale: float = 0.0  # scores are q·k times this
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    ropes: tuple[Rope, ...] = (Rope(),)
    layer_ropes: tuple[int, ...] = ()  # index into `ropes`, one per layer
    layer_windows: tuple[int | None, ...] = ()  # reach in tokens to each allowed side, itself not counted; None: all
    query_scale_beta: float = 0.0  # Ministral 3: queries grow by 1 + beta * log(1 + floor(position / original))
    query_scale_positions: int = 0  # that rule's `original`
    tied_head: bool = True  # the language-model head, which only training reads, is the token embeddings
    head_softcap: float | None = None  # of its logits


@dataclass(frozen=True)
class DenseSpec:
    """A linear layer after pooling."""

    in_features: int
    out_features: int
    bias: bool
    activation: str  # one of DENSE_ACTIVATIONS


@dataclass(frozen=True)
class ModelSpec:
    """Everything `Encoder` needs to know of a model, resolved; print it to see what will run."""

    decoder: DecoderSpec
    attention: Attention
    pooling: tuple[PoolingMode, ...]  # several modes are concatenated in this order
    layout: str  # where the facts came from: hf, llm2vec, sentence-transformers, gguf, flashvec
    span: PoolingSpan = "offsets"
    include_prompt: bool = True  # span "prompt_tokens" only: are prompt tokens pooled
    template: str | None = None  # holds {text}: wraps instruction and text together
    text_suffix: str = ""  # appended to every text (a textual EOS)
    normalize: bool = True
    dense: tuple[DenseSpec, ...] = ()
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    max_length: int = 512  # tokens, special tokens included
    document_max_length: int | None = None  # compat only: tokens of text before instruction and template
    truncate_dim: int | None = None
    similarity: str = "cosine"
    direction_key: str = "is_causal"  # config.json's own key for a bidirectional model; windows are read by it
    compat: str | None = None  # "llm2vec": the reference's own rules
    base_model: str | None = None  # the id the weights started from, as the checkpoint states it
    int8_ranges: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # per dimension: minimum, maximum
    int8_length: str | None = None  # of the vectors that `int8_ranges` are of, one of VECTOR_LENGTHS; None: not known

    @property
    def embedding_size(self) -> int:
        """Width of a vector as `Encoder.embed` returns it."""
        width = self.decoder.hidden_size * len(self.pooling)
        if self.dense:
            width = self.dense[-1].out_features
        return min(width, self.truncate_dim or width)

    @property
    def document_limit(self) -> int | None:
        """Tokens that a text is cut to by words before anything is written around it; None but for `compat`."""
        return self.document_max_length if self.compat else None

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, JSON-ready; `spec_from_dict` reads it back."""
        return asdict(self)

    def __str__(self) -> str:
        from flashvec.runtime.describe import describe_spec

        return describe_spec(self)


def spec_from_dict(values: dict[str, Any]) -> ModelSpec:
    """Inverse of `ModelSpec.to_dict`.

    Raises:
        ValueError: an unknown or missing key, named.
    """
    values = dict(values)
    try:
        decoder = dict(values.pop("decoder"))
        decoder["ropes"] = tuple(Rope(**rope) for rope in decoder["ropes"])
        for key in ("layer_ropes", "layer_windows"):
            decoder[key] = tuple(decoder[key])
        values["dense"] = tuple(DenseSpec(**dense) for dense in values["dense"])
        values["pooling"] = tuple(values["pooling"])
        if values.get("int8_ranges") is not None:
            low, high = values["int8_ranges"]
            values["int8_ranges"] = (tuple(low), tuple(high))
        return ModelSpec(decoder=DecoderSpec(**decoder), **values)
    except KeyError as error:
        raise ValueError(f"not a flashvec model spec: {error.args[0]} is missing") from None
    except TypeError as error:
        raise ValueError(f"not a flashvec model spec: {error}") from None
