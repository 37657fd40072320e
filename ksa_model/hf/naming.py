"""Which Hugging Face tensor is which of ours, and what a tensor that a checkpoint has not got is made of.

The names are Qwen3's; summaries use those of the published KSA checkpoints: `q_proj_summary`, `k_proj_summary`,
`v_proj_summary` beside the base projections, and `summary_embedding.weight` [m, h].
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ksa_model.config import ModelConfig, ModelConfigError
from ksa_model.hf.configs import Source

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SUMMARY_EMBEDDING = ("model.summary_embedding.weight", "summary_embedding.weight")
_TOP = {"embedding.weight": EMBEDDING, "summary_embedding": SUMMARY_EMBEDDING[0], "norm.weight": "model.norm.weight",
        "head.weight": HEAD}  # fmt: skip
_IN_BLOCK = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.summary_query": "self_attn.q_proj_summary",
    "attention.summary_key": "self_attn.k_proj_summary",
    "attention.summary_value": "self_attn.v_proj_summary",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    # Of gated delta nets (`G`), which no export has: names under which our own checkpoints are read.
    "attention.gate": "self_attn.g_proj",
    "attention.beta": "self_attn.b_proj",
    "attention.decay": "self_attn.a_proj",
    "attention.convolution": "self_attn.conv1d",
    "attention.decay_rate": "self_attn.A_log",
    "attention.step_bias": "self_attn.dt_bias",
    "attention.output_norm": "self_attn.o_norm",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Origin:
    """What one of our tensors is made of: a weighted sum of Hugging Face tensors of its shape.

    Rows are taken from `first_row` on. `rows` of them exist there; ours beyond are vocabulary padding, zero. Or every
    row of ours is the row `repeated_row` there, or the mean of the first `mean_rows`.
    """

    terms: tuple[tuple[float, str], ...]
    first_row: int = 0
    rows: int | None = None
    repeated_row: int | None = None
    mean_rows: int | None = None


def hf_name(name: str) -> str:
    """Our parameter name -> the Hugging Face one."""
    if name in _TOP:
        return _TOP[name]
    _, layer, inside = name.split(".", 2)
    return f"model.layers.{layer}.{_IN_BLOCK[inside.removesuffix('.weight')]}.weight"


def exported_shapes(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our name -> (Hugging Face name, shape there) for an export: vocabulary padding is left out."""
    shapes = {}
    for name, (shape, _) in config.parameter_shapes().items():
        rows = config.vocab_size if name in ("embedding.weight", "head.weight") else shape[0]
        assert rows is not None
        shapes[name] = (hf_name(name), (rows, *shape[1:]))
    return shapes


def origins(source: Source, target: ModelConfig, held: Collection[str], summary_row: int | None) -> dict[str, Origin]:
    """Where every parameter of `target` comes from in a checkpoint that holds the tensors `held`.

    Summary parameters that it has not got start as copies: projections of the base ones, embedding rows of the
    vocabulary row `summary_row`, or of the mean of all rows where that is None. Raises `ModelConfigError` that names
    missing tensors and those that have no place in the model.
    """
    found, missing = {}, []
    for name in target.parameter_shapes():
        origin = _origin(name, source, held, summary_row)
        missing += [their for _, their in origin.terms if their not in held]
        found[name] = origin
    if missing:
        raise ModelConfigError(f"the checkpoint lacks {_list(missing)}, which {source.kind} with this shape must have")
    used = {their for origin in found.values() for _, their in origin.terms}
    extra = [name for name in sorted(set(held) - used) if not _may_stay_unread(name, source, target)]
    if extra:
        raise ModelConfigError(
            f"the checkpoint holds {_list(extra)}, which this model has no place for; it is of another architecture"
        )
    return found


def _origin(name: str, source: Source, held: Collection[str], summary_row: int | None) -> Origin:
    vocab = source.config.vocab_size
    if name == "embedding.weight":
        return Origin(((1.0, EMBEDDING),), rows=vocab)
    if name == "head.weight":
        return Origin(((1.0, EMBEDDING if source.config.tie_embeddings else HEAD),), rows=vocab)
    if name == "summary_embedding":
        own = [their for their in SUMMARY_EMBEDDING if their in held]
        if own:
            return Origin(((1.0, own[0]),))
        if source.summary_row is not None:
            return Origin(((1.0, EMBEDDING),), first_row=source.summary_row)
        if summary_row is not None:
            # The summaries of a chunk all start alike; their positions tell them apart.
            return Origin(((1.0, EMBEDDING),), repeated_row=summary_row)
        return Origin(((1.0, EMBEDDING),), mean_rows=vocab)
    their = hf_name(name)
    if "attention.summary_" in name:
        base = hf_name(name.replace("summary_", ""))
        if their not in held:
            return Origin(((1.0, base),))
        if source.mix != 1.0:
            return Origin(((source.mix, their), (1 - source.mix, base)))
    return Origin(((1.0, their),))


def _may_stay_unread(name: str, source: Source, target: ModelConfig) -> bool:
    # A layer whose summaries nobody reads has no use for their projections; a tied head repeats the embedding.
    return "summary" in name or "rotary_emb" in name or (name == HEAD and target.tie_embeddings)


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
