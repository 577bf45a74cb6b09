"""`flashvec bench`: this machine's tokens per second, and where the time goes."""

import json
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Model folder or GGUF file.", show_default=False)]
TextFile = Annotated[Path | None, typer.Option(help="File or folder of prose; default Python's own documentation.")]
PROFILE_TOKENS = 4000


def bench(
    model: Model,
    texts: TextFile = None,
    lengths: Annotated[str, typer.Option(help="queries, sentences, passages, pages, long tail.")] = "passages",
    repetitions: Annotated[int, typer.Option(min=1, help="Of each variant, in turn.")] = 3,
    peers: Annotated[
        bool, typer.Option(help="Also Hugging Face, OpenVINO, ONNX Runtime, ..., where installed.")
    ] = True,
    profile: Annotated[bool, typer.Option("--profile", help="Part by part instead: where each second goes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --profile: one JSON object.")] = False,
) -> None:
    """Tokens per second on this machine, beside its ceiling and what else is installed; nothing is kept.

    Example: `flashvec bench ./smollm2-encoder --profile`
    """
    from flashvec.bench.bench_embed import run
    from flashvec.bench.lengths import PROFILES, Texts
    from flashvec.bench.variants import Subject

    if lengths not in PROFILES:
        raise ValueError(f"--lengths is {lengths!r}; known are {', '.join(PROFILES)}")
    if as_json and not profile:
        raise ValueError("--json goes with --profile: rates are printed as they come")
    if not profile:
        for _ in run(Subject(model), texts, [lengths], repetitions, has_peers=peers):
            pass
        return
    from flashvec.bench.embed_profile import profile as profiled
    from flashvec.bench.embed_profile import table
    from flashvec.runtime.encoder import Encoder

    encoder = Encoder.load(model)
    drawn = Texts.for_encoder(texts, encoder).draw(lengths, PROFILE_TOKENS, 0)
    num_tokens = int(encoder.count_tokens(drawn).clip(max=encoder.spec.max_length).sum())
    parts = profiled(encoder, drawn)
    if as_json:
        print(json.dumps({"tokens": num_tokens, "parts": {name: vars(part) for name, part in parts.items()}}))
    else:
        print("\n".join(table(parts, num_tokens)))
