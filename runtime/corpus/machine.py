"""What decides a vector's bits beside the text: the weights, the tokenizer, the rules and the machine."""

import json
from typing import Any

import torch
import xxhash

import flashvec
from flashvec.kernels.backend import instruction_set
from flashvec.kernels.linear import unpacked
from flashvec.runtime.corpus.plan import ModelFacts


def model_facts(encoder: Any, load: dict[str, Any]) -> ModelFacts:
    """Facts of a loaded `Encoder`.

    Args:
        load: the arguments it was loaded with.
    """
    spec = {**encoder.spec.to_dict(), "int8_ranges": None}  # a job has ranges of its own
    del spec["int8_length"]
    return ModelFacts(
        load=load,
        dim=encoder.spec.embedding_size,
        weights=_weights_digest(encoder),
        tokenizer=xxhash.xxh3_128_hexdigest(encoder.tokenizer.backend.to_str().encode()),
        spec=xxhash.xxh3_128_hexdigest(json.dumps(spec, sort_keys=True).encode()),
        machine=machine_facts(encoder.device, encoder.dtype),
    )


def machine_facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What of this machine the last bits depend on."""
    facts: dict[str, Any] = {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "flashvec": flashvec.__version__,
    }
    if device.type == "cuda":
        return {**facts, "gpu": torch.cuda.get_device_name(device)}
    return {**facts, "instructions": instruction_set(), "threads": torch.get_num_threads()}


def _weights_digest(encoder: Any) -> str:
    """xxh3 of all weights as they run, adapters merged, in a fixed order."""
    digest = xxhash.xxh3_128()
    decoder = encoder.decoder
    tensors = [decoder.embedding_VD, decoder.norm_D]
    for layer in decoder.layers:
        tensors += [unpacked(value) for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    for head in encoder.heads:
        tensors += [value for value in (head.weight, head.bias) if value is not None]
    for tensor in tensors:
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(flat.data)
    return digest.hexdigest()
