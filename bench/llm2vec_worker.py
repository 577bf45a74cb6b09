"""The reference implementation as a process of its own, in an environment of its own; knows nothing of this project.

    peers/llm2vec/bin/python bench/llm2vec_worker.py FOLDER MAX_LENGTH THREADS

Reads a JSON list of texts a line; answers each with a line of JSON, the vectors' shape, and then their fp32 bytes.
"""

import json
import sys

import torch


def main() -> None:
    """Until the input ends."""
    from llm2vec import LLM2Vec

    folder, max_length, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    model = LLM2Vec.from_pretrained(
        folder, torch_dtype=torch.float32, pooling_mode="mean", max_length=max_length, doc_max_length=max_length
    )
    answers = sys.stdout.buffer
    for line in sys.stdin:
        vectors = model.encode(json.loads(line), device="cpu", show_progress_bar=False, convert_to_numpy=True)
        vectors = torch.as_tensor(vectors).float().contiguous()
        answers.write(json.dumps(list(vectors.shape)).encode() + b"\n")
        answers.write(vectors.numpy().tobytes())
        answers.flush()


if __name__ == "__main__":
    main()
