"""Generation of text, with sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ksa_model.config import ModelConfigError
from ksa_model.decoding.cache import DecodingCache
from ksa_model.model import Decoder


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature=0` takes the most likely token; `top_k=0` and `top_p=1` have no
    effect."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ModelConfigError(
                f"max_tokens={self.max_tokens} must be at least 1, temperature={self.temperature} finite and, like "
                f"top_k={self.top_k}, not negative, top_p={self.top_p} above 0 and at most 1"
            )


def choose(logits: torch.Tensor, sampling: Sampling, random: torch.Generator) -> torch.Tensor:
    """The next tokens: logits [B, V] -> int64 [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores, order = logits.float().sort(dim=-1, descending=True)
    # The most likely token has score 0 at any temperature. fp32 cannot divide by a temperature below 1e-30.
    scores = (scores - scores[:, :1]) / max(sampling.temperature, 1e-30)
    if sampling.top_k:
        scores[:, sampling.top_k :] = float("-inf")
    weights = torch.softmax(scores, dim=-1)
    # A token is kept if the tokens before it do not reach top_p, so the first always is.
    weights[weights.cumsum(-1) - weights >= sampling.top_p] = 0.0
    return order.gather(1, torch.multinomial(weights, 1, generator=random))[:, 0]


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    on_tokens: Callable[[list[int | None]], None] | None = None,
) -> tuple[list[list[int]], DecodingCache]:
    """Continue every prompt. Returns the new tokens of each (a stop token ends it and is left out) and the cache.

    `on_tokens` is called after every step with each request's new token, None for a finished request, to stream text.
    """
    longest = max(len(prompt) for prompt in prompts)
    cache = DecodingCache(model, len(prompts), max_tokens=longest + sampling.max_tokens)
    logits = cache.prefill(prompts)
    random = torch.Generator(device=logits.device).manual_seed(sampling.seed)
    generated: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for step in range(sampling.max_tokens):
        tokens = choose(logits, sampling, random)
        new: list[int | None] = []
        for i, token in enumerate(tokens.tolist()):
            running[i] = running[i] and token not in sampling.stop_tokens
            new.append(token if running[i] else None)
            if running[i]:
                generated[i].append(token)
        if on_tokens is not None:
            on_tokens(new)
        if not any(running) or step + 1 == sampling.max_tokens:
            break
        logits = cache.step(tokens)
    return generated, cache
