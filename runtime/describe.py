"""A model spec as a person reads it: what runs, how it is pooled, where it came from."""

from flashvec.runtime.spec import ModelSpec

SPANS = {
    "offsets": "all tokens; with an instruction the text's own",
    "prompt_tokens": "all tokens",
    "template": "text and template suffix, without instruction and BOS",
    "count_from_right": "as many tokens from the right as the text has alone",
}


def describe_spec(spec: ModelSpec) -> str:
    """One fact per line, name and value."""
    return "\n".join(f"{name:<14} {value}" for name, value in spec_rows(spec))


def spec_rows(spec: ModelSpec) -> list[tuple[str, str]]:
    """The facts of a spec that decide its vectors, in reading order."""
    d = spec.decoder
    span = SPANS[spec.span]
    if spec.span == "prompt_tokens" and not spec.include_prompt:
        span = "all tokens after the prompt"
    windows = sorted({w for w in d.layer_windows if w is not None})
    windowed = sum(w is not None for w in d.layer_windows)
    rows = [
        ("family", d.family),
        ("layout", spec.layout),
        (
            "attention",
            spec.attention
            + (f", {windowed} of {d.num_layers} layers see {windows[0]} tokens to each side" if windows else ""),
        ),
        ("pooling", f"{' + '.join(spec.pooling)} over {span}"),
        ("normalize", "yes" if spec.normalize else "no"),
        ("vector", f"{spec.embedding_size} dimensions" + _heads(spec)),
        ("max length", f"{spec.max_length} tokens (the model has {d.max_positions} positions)"),
        ("layers", f"{d.num_layers}, hidden {d.hidden_size}, mlp {d.mlp_size} ({d.activation})"),
        ("heads", f"{d.num_heads} query, {d.num_kv_heads} key/value, size {d.head_size}"),
        ("vocabulary", f"{d.vocab_size:,}"),
        (
            "rope",
            "; ".join(
                f"{r.kind}, theta {r.theta:g}" + (f", factor {r.factor:g}" if r.kind != "default" else "")
                for r in d.ropes
            ),
        ),
    ]
    if spec.template:
        rows.append(("template", repr(spec.template)))
    for name, prompt in spec.prompts.items():
        mark = " (default)" if name == spec.default_prompt_name else ""
        rows.append((f"prompt {name}", repr(prompt) + mark))
    if spec.compat:
        rows.append(("compat", f"{spec.compat}: the reference's own rules"))
    if spec.base_model:
        rows.append(("base model", spec.base_model))
    if spec.int8_ranges:
        rows.append(("int8", "calibrated"))
    return rows


def _heads(spec: ModelSpec) -> str:
    if not spec.dense:
        return ""
    return " after dense " + " -> ".join(str(d.in_features) for d in spec.dense) + f" -> {spec.dense[-1].out_features}"
