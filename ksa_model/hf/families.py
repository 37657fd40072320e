"""The model families of transformers that need no model code of ours: how they differ, and what each may not have.

All are pre-norm decoders with RMSNorm, RoPE, grouped-query attention and SwiGLU. They differ in the norm of queries and
keys, in the biases of their projections, in which layers have sliding windows, and in the defaults of missing keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ksa_model.config import ModelConfig, ModelConfigError
from ksa_model.hf.fields import Fields

_LAYER_TYPES = {"full_attention": "F", "sliding_attention": "S"}
# Features of related models, which no family here has. They are off where a key is missing, null, false, 0 or empty.
_FEATURES = {
    "mlp_bias": "biases in the MLP",
    "final_logit_softcapping": "a soft-cap on logits",
    "attn_logit_softcapping": "a soft-cap on attention scores",
    "num_experts": "experts",
    "num_local_experts": "experts",
    "n_routed_experts": "experts",
    "layer_norm_eps": "a LayerNorm",
    "layer_norm_epsilon": "a LayerNorm",
    "no_rope_layers": "layers without RoPE",
    "attention_chunk_size": "chunked attention",
    "parallel_attn": "attention beside the MLP",
    "alibi": "ALiBi positions",
}


@dataclass(frozen=True)
class Family:
    """One family. `windows`: `none`; `all`: `sliding_window`, unless null, is the window of every layer; `upper`: with
    `use_sliding_window` it is the window of the layers from `max_window_layers` on, or of those that `layer_types`
    names. `defaults` are those of transformers for keys that a config.json may lack."""

    architecture: str
    model_type: str
    qk_norm: bool = False
    qkv_bias: bool = False
    windows: str = "none"
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`ModelConfig` arguments in which families differ, from a config.json with its defaults filled in.

        Raises `ModelConfigError` for what the family may not have.
        """
        check_features(config, allow_bias=self.qkv_bias)
        fields = Fields(config)
        layers = fields.integer("num_hidden_layers")
        return dict(qk_norm=self.qk_norm, qkv_bias=self.qkv_bias, **self._attention(fields, layers))

    def _attention(self, fields: Fields, layers: int) -> dict[str, Any]:
        """`layer_pattern`, and `window_tokens` where a layer has a window."""
        window = fields.integer("sliding_window", None, null=True)
        uses = fields.flag("use_sliding_window", None, null=True)
        kinds = fields.values.get("layer_types")
        if kinds is not None and (
            not isinstance(kinds, list)
            or len(kinds) != layers
            or not all(isinstance(kind, str) and kind in _LAYER_TYPES for kind in kinds)
        ):
            raise ModelConfigError(
                f"config.json has layer_types={_short(kinds)}, which must be a list of {layers} names, each one of "
                f"{', '.join(_LAYER_TYPES)}; correct it"
            )
        named = "".join(_LAYER_TYPES[kind] for kind in kinds or ())
        if self.windows == "upper":
            letters = named or "F" * layers
            if uses and window and not named:
                full = min(fields.integer("max_window_layers", least=0), layers)
                letters = "F" * full + "S" * (layers - full)
            if "S" in letters and not (uses and window):
                raise ModelConfigError(
                    f"config.json has sliding layers in layer_types, use_sliding_window={uses} and "
                    f"sliding_window={window}, which contradict each other; correct it"
                )
        else:
            letters = ("S" if window and self.windows == "all" else "F") * layers
            if uses not in (None, letters[0] == "S") or named not in ("", letters):
                raise ModelConfigError(
                    f"config.json has use_sliding_window={uses} and layer_types={_short(kinds)}, and every layer of "
                    f"{self.architecture} has {'a window' if letters[0] == 'S' else 'no window'} with "
                    f"sliding_window={window}; correct it"
                )
            if window and self.windows == "none":
                raise ModelConfigError(
                    f"config.json has sliding_window={window}, and {self.architecture} has no windows; set it to null"
                )
        shared = {} if "S" not in letters else {"window_tokens": window}
        return {"layer_pattern": shortest_pattern(letters), **shared}

    def computes(self, config: ModelConfig) -> bool:
        """Whether transformers computes `config` with this family's class."""
        letters = config.layer_pattern * (config.num_layers // len(config.layer_pattern))
        full = len(letters.rstrip("S"))
        if set(letters[:full]) - {"F"} or (full and not config.rotate_full_layers):
            return False
        allowed = {"none": full == len(letters), "all": full == 0, "upper": True}[self.windows]
        # transformers refuses other hidden sizes of Llama, although its heads have a size of their own.
        divides = self.model_type != "llama" or config.hidden_size % config.num_heads == 0
        return allowed and divides and (config.qk_norm, config.qkv_bias) == (self.qk_norm, self.qkv_bias)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a config.json in which families differ; the opposite of `read`."""
        letters = config.layer_pattern * (config.num_layers // len(config.layer_pattern))
        full = letters.count("F")
        keys: dict[str, Any] = {"hidden_act": "silu"}
        if not self.qkv_bias and self.windows != "all":
            keys["attention_bias"] = False
        keys["attention_dropout"] = 0.0
        if self.model_type == "llama":
            keys["mlp_bias"] = False
        elif self.windows == "all":
            keys["sliding_window"] = config.window_tokens
        else:
            keys["use_sliding_window"] = full < len(letters)
            if full < len(letters):
                names = {letter: kind for kind, letter in _LAYER_TYPES.items()}
                keys |= {"sliding_window": config.window_tokens, "max_window_layers": full}
                keys["layer_types"] = [names[letter] for letter in letters]
        return keys


_WINDOWS = {"sliding_window": 4096, "max_window_layers": 28}
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, **_WINDOWS}
# At most one of them computes a model.
FAMILIES = (
    Family("LlamaForCausalLM", "llama", defaults={"max_position_embeddings": 2048}),
    Family(
        "MistralForCausalLM", "mistral", windows="all",
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True, windows="upper", defaults=_QWEN),
    Family("Qwen3ForCausalLM", "qwen3", qk_norm=True, windows="upper", defaults={**_QWEN, "head_dim": 128}),
)  # fmt: skip


def family_named(architecture: str, model_type: str | None) -> Family | None:
    """The family of a config.json; None for another. Raises `ModelConfigError` if its two names contradict."""
    for family in FAMILIES:
        if architecture == family.architecture and model_type not in (None, family.model_type):
            raise ModelConfigError(
                f"config.json has architectures={architecture} and model_type={model_type}, which are two kinds of "
                f"model; {architecture} has model_type={family.model_type}"
            )
        if architecture == family.architecture or (architecture == "none" and model_type == family.model_type):
            return family
    return None


def family_of(config: ModelConfig) -> Family | None:
    """The family whose class computes `config` in transformers, or None."""
    return next((family for family in FAMILIES if family.computes(config)), None)


def check_features(config: Mapping[str, Any], allow_bias: bool = False) -> None:
    """Raise `ModelConfigError` that names a feature which no family has. `allow_bias`: queries, keys and values have
    biases whatever `attention_bias` says."""
    if config.get("hidden_act", "silu") != "silu":
        raise ModelConfigError(
            f"config.json has hidden_act={_short(config['hidden_act'])}, and this project supports only 'silu'"
        )
    bias = config.get("attention_bias", False)
    if bias is not False and not allow_bias:
        raise ModelConfigError(
            f"config.json has attention_bias={_short(bias)}, and this project supports only False: the output "
            "projection would have a bias too"
        )
    for key, meaning in _FEATURES.items():
        if value := config.get(key):
            raise ModelConfigError(f"config.json has {key}={_short(value)}: {meaning}, which this project lacks")


def shortest_pattern(letters: str) -> str:
    """The shortest pattern whose repetition is `letters`."""
    n = len(letters)
    return next(letters[:p] for p in range(1, n + 1) if n % p == 0 and letters == letters[:p] * (n // p))


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
