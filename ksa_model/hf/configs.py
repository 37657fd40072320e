"""config.json of a Hugging Face checkpoint <-> `ModelConfig`. Pure: mappings in, mappings out.

Three kinds of checkpoint are read: `Qwen3ForCausalLM`; exports of this project (`ksa`); and published KSA checkpoints,
with the keys `use_summary_attention`, `summary_chunk_size`, `summary_sliding_chunk_num` and others.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ksa_model.config import MAX_INT32, MIXERS, ModelConfig, ModelConfigError, RopeScaling
from ksa_model.hf.fields import Fields
from ksa_model.layers.rope import attention_factor, rope_base

MODELING_FILE, TOKENIZER_FILE = "modeling_ksa.py", "tokenization_ksa.py"
_MAX_LAYERS = 4096
_KSA_KEYS = ("layer_pattern", "chunk_size", "summary_tokens", "window_tokens", "independent_qkv",
             "full_layers_update_summaries", "qk_norm", "rotate_far", "rotate_full_layers")  # fmt: skip
# What must agree for a model to take the tensors of a checkpoint. The model may choose everything else.
_SHAPE = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size", "qk_norm",
          "norm_eps")  # fmt: skip


@dataclass(frozen=True)
class CheckpointSpec:
    """What a checkpoint to import contains.

    `summary_share`: how much of a summary's queries, keys and values comes from the summaries' own projections, the
    rest from those of text (1: all); published as `mix_coeff`. `summary_row`: the vocabulary row that is the summary
    embedding, if that has no tensor of its own. `embedding_rows`: rows of its embedding and head; None: `vocab_size` or
    more. `is_complete`: it has every summary parameter of `config`, so that a missing one is damage.
    """

    kind: str
    config: ModelConfig
    max_positions: int
    summary_share: float = 1.0
    summary_row: int | None = None
    embedding_rows: int | None = None
    is_complete: bool = False

    @property
    def mix_coeff(self) -> float:
        """The annealing weight by which a model with these tensors must mix, see `Decoder.anneal`.

        With QK-norm, queries and keys are normed before they are mixed, and no projection gives such a mixture.
        """
        return self.summary_share if self.config.qk_norm and 0 < self.summary_share < 1 else 1.0

    @property
    def folded_share(self) -> float:
        """The share of the summaries' own projections in those that are read, the rest being text's. Without QK-norm
        the mixture is linear, so projections that are mixed once compute the same."""
        return self.summary_share if self.mix_coeff == 1 else 1.0

    def mix_coeff_in(self, target: ModelConfig) -> float:
        """`mix_coeff`, where `target` has the summary projections that it is about."""
        return self.mix_coeff if target.has_summaries and target.independent_qkv else 1.0


def read_config(config: Mapping[str, Any]) -> CheckpointSpec:
    """Read a config.json. Raises `ModelConfigError` for an architecture that this project does not compute."""
    fields = Fields(config)
    named = config.get("architectures") or ["none"]
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ModelConfigError(f"config.json has architectures={named!r}, which must be a list of names; correct it")
    architecture, kind = named[0], fields.text("model_type", None, null=True)
    if config.get("quantization_config"):
        raise ModelConfigError(
            "config.json has a quantization_config, and this project reads only weights that are not quantized; "
            "convert the checkpoint first"
        )
    if kind == "ksa":
        model, share = ModelConfig(**_shape(config), **_ksa(config)), fields.number("mix_coeff", 1.0, least=0, most=1)
        return CheckpointSpec(
            "a KSA export", model, _positions(config), share, embedding_rows=model.vocab_size, is_complete=True
        )
    if fields.flag("use_summary_attention", False, null=True):
        return _published(config)
    if architecture == "Qwen3ForCausalLM" or (architecture == "none" and kind == "qwen3"):
        model = ModelConfig(**_shape(config), layer_pattern="F")
        return CheckpointSpec("Qwen3ForCausalLM", model, _positions(config), embedding_rows=model.vocab_size)
    raise ModelConfigError(
        f"config.json has architectures={architecture}, model_type={kind}; supported are "
        "Qwen3ForCausalLM, published KSA checkpoints (use_summary_attention) and exports of this project (ksa)"
    )


def _ksa(config: Mapping[str, Any]) -> dict[str, Any]:
    """`ModelConfig` arguments from the keys that exports of this project add."""
    fields, given = Fields(config), {}
    given["layer_pattern"] = fields.text("layer_pattern", None)
    for key in ("chunk_size", "summary_tokens", "window_tokens"):
        given[key] = fields.integer(key, None)
    for key in ("independent_qkv", "full_layers_update_summaries", "qk_norm", "rotate_far", "rotate_full_layers"):
        given[key] = fields.flag(key, None)
    window = config.get("window_chunks", 128)
    if isinstance(window, list):
        each = [Fields({"window_chunks": one}).integer("window_chunks", least=0) for one in window]
        given["window_chunks"] = tuple(each)
    else:
        given["window_chunks"] = fields.integer("window_chunks", 128, least=0)
    return {key: value for key, value in given.items() if value is not None}


def check_same_shape(source: CheckpointSpec, target: ModelConfig) -> None:
    """Raise `ModelConfigError` unless `target` has the shape of `source`. Patterns, chunks and windows may differ."""
    differ = {n: getattr(source.config, n) for n in _SHAPE if getattr(source.config, n) != getattr(target, n)}
    if differ:
        raise ModelConfigError(
            "the checkpoint has another shape: "
            + ", ".join(f"{name} is {value}, not {getattr(target, name)}" for name, value in differ.items())
            + "; set " + " ".join(f"model.{name}={str(value).lower()}" for name, value in differ.items())
        )  # fmt: skip
    if target.tie_embeddings and not source.config.tie_embeddings:
        raise ModelConfigError(
            "the checkpoint has an output head of its own, and model.tie_embeddings=true has none; set "
            "model.tie_embeddings=false"
        )
    summaries = source.config.has_summaries and target.has_summaries
    if summaries and source.config.summary_tokens != target.summary_tokens:
        raise ModelConfigError(
            f"the checkpoint has {source.config.summary_tokens} summaries per chunk, and the model has "
            f"model.summary_tokens={target.summary_tokens}; set model.summary_tokens={source.config.summary_tokens}"
        )


def exported_config(
    config: ModelConfig, max_positions: int, eos_token: int | None, dtype: str, mix_coeff: float = 1.0
) -> dict[str, Any]:
    """config.json of an export: `Qwen3ForCausalLM` if that is the model, see `is_plain`, otherwise `ksa`."""
    check_exportable(config)
    assert config.vocab_size is not None
    rope = _rope_parameters(config)
    if rope["rope_type"] == "yarn":  # some releases of transformers compute the factor from the two lengths
        max_positions = round(rope["factor"] * rope["original_max_position_embeddings"])
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "max_position_embeddings": max_positions,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos_token,
        "dtype": dtype,
        "torch_dtype": dtype,  # for releases before 4.56
    }
    if is_plain(config):
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **shared,
            **({} if rope["rope_type"] == "default" else {"rope_scaling": rope}),  # for releases before 5
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
        }
    window = config.window_chunks
    return {
        "architectures": ["KsaForCausalLM"],
        "model_type": "ksa",
        "auto_map": {"AutoConfig": "modeling_ksa.KsaConfig", "AutoModelForCausalLM": "modeling_ksa.KsaForCausalLM"},
        **shared,
        **{key: getattr(config, key) for key in _KSA_KEYS},
        "window_chunks": list(window) if isinstance(window, tuple) else window,
        **({} if mix_coeff == 1 else {"mix_coeff": mix_coeff}),
    }


def check_exportable(config: ModelConfig) -> None:
    """Raise `ModelConfigError` for a model that neither transformers nor `modeling_ksa.py` computes."""
    unknown = [f"{MIXERS[letter]} layers ({letter})" for letter in "GHP" if config.has_mixer(letter)]
    if unknown:
        raise ModelConfigError(
            f"model.layer_pattern={config.layer_pattern!r} has {' and '.join(unknown)}, which the "
            "exported model code does not compute; use format=safetensors to export weights with this project's names"
        )


def is_plain(config: ModelConfig) -> bool:
    """Whether transformers computes this model without `modeling_ksa.py`."""
    return set(config.layer_pattern) == {"F"} and config.qk_norm and config.rotate_full_layers


def parse_pattern(value: Any, key: str, num_layers: int) -> list[int]:
    """One integer per layer, from an integer, a list, or an expression such as `([128]*3+[16768])*9`.

    The expression is parsed, never evaluated. It may contain lists of integers, `+` between lists, and `*` between a
    list and an integer. Raises `ModelConfigError` that names `key`.
    """
    if isinstance(value, str):
        try:
            value = _walk(ast.parse(value.strip(), mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ModelConfigError(
                f"{key}={value!r} is not a pattern of lists of integers, + and * ({error})"
            ) from None
    layers = [value] * num_layers if isinstance(value, int) else value
    if not isinstance(layers, list) or not all(isinstance(x, int) and not isinstance(x, bool) for x in layers):
        raise ModelConfigError(f"{key}={value!r} must be an integer, a list of integers or a pattern of lists")
    if len(layers) != num_layers:
        raise ModelConfigError(f"{key} has {len(layers)} layers, and num_hidden_layers={num_layers}")
    return layers


def _walk(node: ast.expr) -> Any:
    """The value of a pattern's syntax tree; raises `ValueError` for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_walk(item) for item in node.elts]
    if isinstance(node, ast.BinOp):
        left, right = _walk(node.left), _walk(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            result = left + right
        elif isinstance(node.op, ast.Mult) and isinstance(left, list) != isinstance(right, list):
            items, times = (left, right) if isinstance(left, list) else (right, left)
            result = items * min(times, _MAX_LAYERS)
        else:
            raise ValueError("an operator other than + and *, or wrong operands")
        if len(result) > _MAX_LAYERS:
            raise ValueError(f"more than {_MAX_LAYERS} layers")
        return result
    raise ValueError(f"it contains a {type(node).__name__}")


def _published(config: Mapping[str, Any]) -> CheckpointSpec:
    """A published KSA checkpoint."""
    shape, fields = _shape(config), Fields(config)
    required = {
        "summary_chunk_position_ids_type": ("inner_chunk", "origin"),
        "summary_token_position_ids_type": ("zeros", "last_chunk_slice_right"),
        "summary_independent_attention_layernorm": (False, False),
        "summary_independent_qk_norm": (False, False),
    }
    for key, (default, computed) in required.items():
        if config.get(key, default) != computed:
            raise ModelConfigError(
                f"config.json has {key}={config.get(key, default)!r}, and this project supports only {computed!r}"
            )
    chunk, m = fields.integer("summary_chunk_size"), fields.integer("summary_token_num")
    pattern, windows, updates = _published_layers(config, shape["num_layers"], chunk)
    independent = fields.flag("summary_independent_qkv", None, null=True)
    if independent is None:
        independent = fields.flag("summary_independent_parameters", False, null=True)
    share, rows = fields.number("mix_coeff", 1.0, least=0, most=1), shape["vocab_size"]
    row = fields.integer("summary_token_begin", None, least=0, null=True)
    if row is not None and row + m > rows:
        raise ModelConfigError(
            f"config.json has summary_token_begin={row} and summary_token_num={m}, which reach beyond vocab_size={rows}"
        )
    if row is not None and row + m == shape["vocab_size"]:
        shape["vocab_size"] = row  # the last rows of the vocabulary are the summaries, which are not tokens here
    model = ModelConfig(
        **shape,
        layer_pattern=pattern,
        window_chunks=windows,
        chunk_size=chunk,
        summary_tokens=m,
        independent_qkv=independent and share > 0,
        full_layers_update_summaries=updates,
    )
    return CheckpointSpec("a published KSA checkpoint", model, _positions(config), share, row, rows)


def _published_layers(config: Mapping[str, Any], n: int, chunk: int) -> tuple[str, int | tuple[int, ...], bool]:
    """(pattern, windows, whether full layers update summaries). A layer whose window covers all positions is `F`."""
    windows = parse_pattern(config.get("summary_sliding_chunk_num", 0), "summary_sliding_chunk_num", n)
    frequency = config.get("summary_layer_freq", 0)
    if isinstance(frequency, int):
        frequency = Fields(config).integer("summary_layer_freq", 0, least=0)
        treats = [frequency == 0 or i % frequency == 0 for i in range(n)]
    else:
        treats = [bool(x) for x in parse_pattern(frequency, "summary_layer_freq", n)]
    if any(not 0 <= window <= MAX_INT32 for window in windows):
        raise ModelConfigError(
            f"config.json has summary_sliding_chunk_num={config.get('summary_sliding_chunk_num')!r}, whose windows "
            f"must be from 0 to {MAX_INT32} chunks; correct it"
        )
    wide = [window * chunk >= _positions(config) for window in windows]
    letters = ["K" if t and not w else "F" for t, w in zip(treats, wide)]
    last = max((i for i, letter in enumerate(letters) if letter == "K"), default=0)
    full = {t for t, letter in zip(treats[:last], letters) if letter == "F"}
    if len(full) > 1:
        raise ModelConfigError(
            "config.json has full-attention layers that update summaries (a window as wide as the context) and others "
            "that do not (summary_layer_freq); this project supports one kind per model"
        )
    pairs = [(letter, window if letter == "K" else 0) for letter, window in zip(letters, windows)]
    period = next(p for p in range(1, n + 1) if n % p == 0 and pairs == pairs[:p] * (n // p))
    unit = pairs[:period]
    of_ksa = {window for letter, window in unit if letter == "K"}
    one = of_ksa.pop() if len(of_ksa) == 1 else None
    return "".join(letter for letter, _ in unit), tuple(w for _, w in unit) if one is None else one, full != {False}


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """`ModelConfig` arguments from the keys that all kinds share; `ModelConfigError` for values with no counterpart."""
    for key, computed in (("attention_bias", False), ("hidden_act", "silu"), ("use_sliding_window", False)):
        if config.get(key, computed) != computed or type(config.get(key, computed)) is not type(computed):
            raise ModelConfigError(
                f"config.json has {key}={config[key]!r}, and this project supports only {computed!r}"
            )
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ModelConfigError(
            f"config.json has layer_types={kinds!r}, and this project supports only 'full_attention' there"
        )
    fields = Fields(config)
    heads = fields.integer("num_attention_heads")
    shape = dict(
        hidden_size=fields.integer("hidden_size"),
        num_layers=fields.integer("num_hidden_layers", most=_MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads, null=True),
        head_dim=fields.integer("head_dim", 128, null=True),
        ffn_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size", least=2),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        init_std=fields.number("initializer_range", 0.02),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )
    base, scaling = _rope(config)
    return shape | dict(rope_base=base, rope_scaling=scaling)


# Kind -> key of transformers' `rope_parameters` -> field of `RopeScaling`. `ntk` is exported as a larger `rope_theta`.
_ROPE_KEYS = {
    "linear": {"factor": "factor"},
    "yarn": {"factor": "factor", "original_max_position_embeddings": "original_max_positions",
             "beta_fast": "beta_fast", "beta_slow": "beta_slow", "attention_factor": "attention_factor"},
    "llama3": {"factor": "factor", "original_max_position_embeddings": "original_max_positions",
               "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
}  # fmt: skip
_ROPE_SHARED = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """The `rope_parameters` of transformers."""
    scaling, theta = config.rope_scaling, rope_base(config)
    if scaling is None or scaling.kind == "ntk":
        return {"rope_type": "default", "rope_theta": theta}
    values = {key: getattr(scaling, field) for key, field in _ROPE_KEYS[scaling.kind].items()}
    if scaling.kind == "yarn":
        values["attention_factor"] = attention_factor(scaling)
    return {"rope_type": scaling.kind, "rope_theta": theta, **values}


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """RoPE base and scaling, from `rope_scaling` or, if that is missing, from `rope_parameters`."""
    fields = Fields(config)
    given = fields.group("rope_scaling") or fields.group("rope_parameters")
    scaled, shared = Fields(given, "config.json: rope_parameters"), Fields(fields.group("rope_parameters"))
    base = scaled.number("rope_theta", None, null=True) or shared.number("rope_theta", None, null=True)
    base = base or fields.number("rope_theta", 10_000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if (
        not isinstance(kind, str)
        or kind not in ("default", *_ROPE_KEYS)
        or partial != 1.0
        or any(isinstance(v, Mapping) for v in given.values())
    ):
        raise ModelConfigError(
            f"config.json scales its positions with {given}; supported are rope_type default, {', '.join(_ROPE_KEYS)}, "
            "for all features of a head and the same in every layer"
        )
    names = _ROPE_KEYS.get(kind, {})
    values: dict[str, Any] = {}
    for key, field in names.items():
        if given.get(key) is not None:
            values[field] = scaled.integer(key) if field == "original_max_positions" else scaled.number(key)
            del given[key]
    if "original_max_position_embeddings" in names and "original_max_positions" not in values:
        values["original_max_positions"] = fields.integer("original_max_position_embeddings", _positions(config))
    if kind == "yarn":
        values.setdefault("factor", _positions(config) / values["original_max_positions"])
        if given.get("truncate") is True:  # the only rule that is computed here
            del given["truncate"]
        scales = [scaled.number(key, None, least=0, null=True) for key in ("mscale", "mscale_all_dim")]
        given = {key: value for key, value in given.items() if key not in ("mscale", "mscale_all_dim")}
        if all(scales) and "attention_factor" not in values:
            log = 0.1 * math.log(max(1.0, values["factor"]))
            values["attention_factor"] = (scales[0] * log + 1) / (scales[1] * log + 1)
    left = {key: value for key, value in given.items() if key not in (*_ROPE_SHARED, *names) and value is not None}
    if left:
        raise ModelConfigError(f"config.json has {left} for rope_type={kind!r}, which is not supported")
    if kind == "default":
        return base, None
    if "factor" not in values:
        raise ModelConfigError(f"config.json has rope_type={kind!r} without a factor")
    return base, RopeScaling(kind, **values)


def _positions(config: Mapping[str, Any]) -> int:
    return Fields(config).integer("max_position_embeddings", 32768)
