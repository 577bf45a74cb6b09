"""Tiny random checkpoints and tokenizers, built in a test's own folder by the libraries that users use.

Weights are wide (std 0.3) and norms soft (eps 1e-2), so that attention is far from uniform and a wrong mask,
scale or rotation shows; with the usual std of 0.02 every token attends to every other alike.
"""

from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "The summit was covered in snow, and nobody had climbed it before.",
    "A decoder reads from left to right; an encoder reads everything at once.",
    "Query: how do I bake sourdough bread?",
    "Passage: mix flour, water and salt, then wait for the dough to rise.",
    "Prices rose by 3.5% in 2024, economists said on Tuesday.",
    "El gato duerme en la ventana; the cat sleeps at the window.",
    "Retrieve semantically similar text: kernels fused for speed!",
)
TEXTS = (
    "summit",
    "a decoder reads everything",
    "The cat sleeps.",
    "Mix flour, water and salt; then wait, and wait, until the dough has doubled in size and smells a little sour.",
    "x",
    "Ünïcode — déjà vu, 你好 and 🙂 in one text",
    "  leading and trailing spaces  ",
    "prices rose " * 12,
)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-2,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {  # family -> configuration class, model class, keys of its own
    "llama": ("LlamaConfig", "LlamaModel", {}),
    "mistral": ("MistralConfig", "MistralModel", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2Model", {}),
    "qwen3": ("Qwen3Config", "Qwen3Model", {"head_dim": 16}),
    "gemma": ("GemmaConfig", "GemmaModel", {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2Model",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3TextModel",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "sliding_window_pattern": 2},
    ),
}


def tiny_tokenizer(
    folder: Path,
    *,
    bos: bool = True,
    eos: bool = False,
    specials: tuple[str, ...] = (),
    max_length: int | None = None,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `SENTENCES`, save it into a folder and return it.

    Args:
        bos, eos: put `<s>` before and `</s>` after every text.
        specials: more special tokens.
        max_length: model_max_length of tokenizer_config.json.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<pad>", "<s>", "</s>", *specials]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    keys: dict[str, Any] = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "additional_special_tokens": list(specials),
    }
    if bos:
        keys["bos_token"] = "<s>"
    if max_length is not None:
        keys["model_max_length"] = max_length
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **keys)
    fast.save_pretrained(folder)
    return fast


def tiny_model(
    folder: Path | None, family: str = "llama", *, causal_lm: bool = False, seed: int = 0, **keys: Any
) -> transformers.PreTrainedModel:
    """A random model of a family, saved into a folder (None: not saved) and returned in fp32, ready to run.

    Args:
        family: a key of `CLASSES`.
        causal_lm: with the language-model head, as base models are published; the decoder is then
            `model.model`.
        seed: of the weights.
        keys: more configuration, for example is_causal=False, vocab_size=..., _name_or_path=...
    """
    torch.manual_seed(seed)
    config_name, model_name, own = CLASSES[family]
    config = getattr(transformers, config_name)(**{"vocab_size": 420, **SIZES, **own, **keys})
    if causal_lm:
        model_name = model_name.replace("TextModel", "ForCausalLM").replace("Model", "ForCausalLM")
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # all the same would hide a norm that is read in the wrong place
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def tiny_checkpoint(
    folder: Path, family: str = "llama", *, bos: bool = True, eos: bool = False, **keys: Any
) -> transformers.PreTrainedModel:
    """`tiny_model` and `tiny_tokenizer` in one folder; the model is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(folder, bos=bos, eos=eos)
    return tiny_model(folder, family, **keys)


def tiny_adapter(model: transformers.PreTrainedModel, folder: Path, **config: Any) -> transformers.PreTrainedModel:
    """Save a LoRA adapter with random factors; returns the model with it merged in by peft."""
    config = {"r": 4, "target_modules": PROJECTIONS, **config}
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(str(folder))
    return cast(transformers.PreTrainedModel, adapted.merge_and_unload())


def unit(vectors: Any) -> torch.Tensor:
    """Rows at unit length, fp32."""
    return torch.nn.functional.normalize(torch.as_tensor(vectors, dtype=torch.float32), dim=-1)


def hugging_face_states(folder: Path, text: str, is_causal: bool = False, **config: Any) -> Any:
    """Final states fp32 [tokens, D] of one text, by transformers' own model of a folder.

    Args:
        config: keys of the configuration to change.
    """
    hf_config = transformers.AutoConfig.from_pretrained(folder, **config)
    hf_config.is_causal = is_causal
    model = transformers.AutoModel.from_pretrained(folder, config=hf_config).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        return model(ids).last_hidden_state[0]
