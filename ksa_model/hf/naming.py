"""Parameter names of this project and of Hugging Face, and the origin of every parameter of an imported model.

Hugging Face names are those of Qwen3. Summaries use the names of the published KSA checkpoints: `q_proj_summary`,
`k_proj_summary` and `v_proj_summary` beside the base projections, and `summary_embedding.weight` [m, h].
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from ksa_model.config import ModelConfig, ModelConfigError
from ksa_model.hf.configs import CheckpointSpec

_SUMMARY_PROJECTION = re.compile(r"\.[qkv]_proj_summary\.(weight|bias)$")
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
    # Learned pooling (`H`) and gated delta nets (`G`) are never exported. These names are used when a run's own
    # checkpoint is imported.
    "attention.pool_score": "self_attn.pool_score",
    "attention.pool_bias": "self_attn.pool_bias",
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
    """How one parameter is made: a weighted sum of checkpoint tensors, `terms`.

    Rows are taken from `first_row` on. If the tensor has only `rows` rows, the remaining rows of the parameter are
    vocabulary padding, zero. Alternatively, every row of the parameter is a copy of row `repeated_row`, or the mean of
    the first `mean_rows` rows.
    """

    terms: tuple[tuple[float, str], ...]  # (weight, tensor name)
    first_row: int = 0
    rows: int | None = None
    repeated_row: int | None = None
    mean_rows: int | None = None


def hf_name(name: str) -> str:
    """Parameter name of this project -> Hugging Face name."""
    if name in _TOP:
        return _TOP[name]
    _, layer, inside = name.split(".", 2)
    kind = "bias" if inside.endswith(".bias") else "weight"
    return f"model.layers.{layer}.{_IN_BLOCK[inside.removesuffix(f'.{kind}')]}.{kind}"


def exported_shapes(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter name -> (Hugging Face name, shape in the export), without vocabulary padding."""
    shapes = {}
    for name, (shape, _) in config.parameter_shapes().items():
        rows = config.vocab_size if name in ("embedding.weight", "head.weight") else shape[0]
        assert rows is not None
        shapes[name] = (hf_name(name), (rows, *shape[1:]))
    return shapes


def origins(
    source: CheckpointSpec, target: ModelConfig, available: Collection[str], summary_row: int | None
) -> dict[str, Origin]:
    """The origin of every parameter of `target` in a checkpoint with the tensors `available`.

    Summary parameters that the checkpoint lacks start as copies: projections are copies of the base projections,
    embedding rows of the vocabulary row `summary_row`, or of the mean of all rows if that is None. Raises
    `ModelConfigError` that names missing tensors, and tensors that the model does not have.
    """
    found = {name: _origin(name, source, available, summary_row) for name in target.parameter_shapes()}
    used = [tensor for origin in found.values() for _, tensor in origin.terms]
    if source.is_complete:
        used += _summary_tensors(source, available)
    if missing := [tensor for tensor in used if tensor not in available]:
        raise ModelConfigError(f"the checkpoint lacks {_list(missing)}, which {source.kind} with this shape must have")
    if extra := [t for t in sorted(set(available) - set(used)) if not _may_be_unused(t, source, target)]:
        raise ModelConfigError(
            f"the checkpoint has {_list(extra)}, which {source.kind} with its configuration does not have; it is of "
            "another architecture"
        )
    return found


def _summary_tensors(source: CheckpointSpec, available: Collection[str]) -> list[str]:
    """The summary tensors that a complete checkpoint holds."""
    names = [hf_name(name) for name in source.config.parameter_shapes() if "attention.summary_" in name]
    if source.config.has_summaries and source.summary_row is None:
        names.append(next((tensor for tensor in SUMMARY_EMBEDDING if tensor in available), SUMMARY_EMBEDDING[0]))
    return names


def _origin(name: str, source: CheckpointSpec, available: Collection[str], summary_row: int | None) -> Origin:
    vocab = source.config.vocab_size
    if name == "embedding.weight":
        return Origin(((1.0, EMBEDDING),), rows=vocab)
    if name == "head.weight":
        return Origin(((1.0, EMBEDDING if source.config.tie_embeddings else HEAD),), rows=vocab)
    if name == "summary_embedding":
        if own := [tensor for tensor in SUMMARY_EMBEDDING if tensor in available]:
            return Origin(((1.0, own[0]),))
        if source.summary_row is not None:
            return Origin(((1.0, EMBEDDING),), first_row=source.summary_row)
        if summary_row is not None:
            # All summaries of a chunk start equal; they differ by their positions.
            return Origin(((1.0, EMBEDDING),), repeated_row=summary_row)
        return Origin(((1.0, EMBEDDING),), mean_rows=vocab)
    tensor = hf_name(name)
    if "attention.summary_" in name:
        base = hf_name(name.replace("summary_", ""))
        if tensor not in available:
            return Origin(((1.0, base),))
        if (share := source.folded_share) != 1.0:
            return Origin(((share, tensor), (1 - share, base)))
    return Origin(((1.0, tensor),))


def _may_be_unused(tensor: str, source: CheckpointSpec, target: ModelConfig) -> bool:
    """Whether a model computes the same without a tensor, or has been told to do without its summaries."""
    if tensor in SUMMARY_EMBEDDING:
        return source.config.has_summaries
    if _SUMMARY_PROJECTION.search(tensor):
        # The last `K` layer and those above it need none, and a share of 0 makes them text's.
        return source.config.has_summaries and (source.config.independent_qkv or source.summary_share == 0)
    return "rotary_emb" in tensor or (tensor == HEAD and target.tie_embeddings)  # a tied head repeats the embedding


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
