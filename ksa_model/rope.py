"""Rotary position embedding (arXiv 2104.09864): the frequencies of a model, scaled or not. No layer, no kernel.

Legend: d head dimension, i = 0 .. d/2 - 1 the pairs of features that turn together.
"""

from __future__ import annotations

import math

import torch

from ksa_model.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> tuple[torch.Tensor, float]:
    """Radians that pair i turns by from one position to the next, fp64 [d/2], and what cos and sin are multiplied by.

    Both are those of transformers' `ROPE_INIT_FUNCTIONS`, in float64: at position 10^6 a float32 product is off by 0.06
    radians.
    """
    d, scaling = config.head_dim, config.rope_scaling
    base = rope_base(config)
    plain = base ** (-torch.arange(0, d, 2, device=device, dtype=torch.float64) / d)
    if scaling is None or scaling.kind == "ntk":
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "yarn":
        share = _yarn_share(scaling, base, d, plain)
        return plain * (share + (1 - share) / scaling.factor), attention_factor(scaling)
    # Turns within the original positions: at most low_freq_factor are slowed down in full, from high_freq_factor on
    # nothing is.
    assert scaling.original_max_positions is not None
    turns = scaling.original_max_positions * plain / (2 * math.pi)
    share = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return plain * (share + (1 - share) / scaling.factor), 1.0


def rope_base(config: ModelConfig) -> float:
    """The base that frequencies are powers of: `model.rope_base`, or what `ntk` makes of it."""
    scaling, d = config.rope_scaling, config.head_dim
    if scaling is None or scaling.kind != "ntk":
        return config.rope_base
    return config.rope_base * scaling.factor ** (d / (d - 2))


def attention_factor(scaling: RopeScaling) -> float:
    """What YaRN multiplies queries and keys by; scores grow by its square (arXiv 2309.00071, equation 22)."""
    return 0.1 * math.log(scaling.factor) + 1 if scaling.attention_factor is None else scaling.attention_factor


def _yarn_share(scaling: RopeScaling, base: float, d: int, plain: torch.Tensor) -> torch.Tensor:
    """How much of each frequency stays as it was, fp64 [d/2]: 1 for those that turn often, 0 for those that do not."""
    assert scaling.original_max_positions is not None
    positions = scaling.original_max_positions

    def pair(turns: float) -> float:
        """The pair, a fraction, that turns so many times within the original positions."""
        return d * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    # Bounds on whole pairs and the clamp to d - 1, not d/2 - 1, are those of the paper's code and of transformers:
    # published weights were trained with them.
    low, high = max(math.floor(pair(scaling.beta_fast)), 0), min(math.ceil(pair(scaling.beta_slow)), d - 1)
    index = torch.arange(len(plain), device=plain.device, dtype=torch.float64)
    return 1 - ((index - low) / ((high - low) or 0.001)).clamp(0, 1)
