"""Rotary position embedding (arXiv 2104.09864): the frequencies of a model, with or without scaling.

Legend: d head dimension, i = 0 .. d/2 - 1 the pairs of features that rotate together.
"""

from __future__ import annotations

import math

import torch

from ksa_model.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> tuple[torch.Tensor, float]:
    """The angle in radians between two positions for each pair, fp64 [d/2], and the factor of cos and sin.

    Both are those of transformers' `ROPE_INIT_FUNCTIONS`, but in fp64: at position 10^6 an angle in fp32 has an error
    of 0.06 radians.
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
    # Rotations within the original positions: pairs with up to low_freq_factor are divided by the whole factor, pairs
    # from high_freq_factor on stay unchanged.
    assert scaling.original_max_positions is not None
    turns = scaling.original_max_positions * plain / (2 * math.pi)
    share = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return plain * (share + (1 - share) / scaling.factor), 1.0


def rope_base(config: ModelConfig) -> float:
    """The base of the frequencies: `model.rope_base`, scaled with `ntk`."""
    scaling, d = config.rope_scaling, config.head_dim
    if scaling is None or scaling.kind != "ntk":
        return config.rope_base
    return config.rope_base * scaling.factor ** (d / (d - 2))


def attention_factor(scaling: RopeScaling) -> float:
    """YaRN's factor of queries and keys; scores grow by its square (arXiv 2309.00071, equation 22)."""
    return 0.1 * math.log(scaling.factor) + 1 if scaling.attention_factor is None else scaling.attention_factor


def _yarn_share(scaling: RopeScaling, base: float, d: int, plain: torch.Tensor) -> torch.Tensor:
    """The unscaled share of each frequency, fp64 [d/2]: 1 for high frequencies, 0 for low ones."""
    assert scaling.original_max_positions is not None
    positions = scaling.original_max_positions

    def pair(turns: float) -> float:
        """The (fractional) pair that rotates so many times within the original positions."""
        return d * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    # Whole pairs as bounds and the clamp to d - 1, not d/2 - 1, follow the paper's code and transformers: published
    # weights were trained with them.
    low, high = max(math.floor(pair(scaling.beta_fast)), 0), min(math.ceil(pair(scaling.beta_slow)), d - 1)
    index = torch.arange(len(plain), device=plain.device, dtype=torch.float64)
    return 1 - ((index - low) / ((high - low) or 0.001)).clamp(0, 1)
