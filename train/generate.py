"""`python -m train.generate RUN prompt=...`: continue a text with a trained model.

Runs the training forward over the whole text for every new token, without a cache: meant for looking at a small run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from data_pipeline import Tokenizer
from ksa_model import layout
from ksa_model.model import Decoder
from ksa_model.tensor_parallel import TensorParallel
from train import checkpoint, parallel
from train.config import USER_ERRORS, ConfigError, TrainConfig, from_mapping, unknown_key
from train.signals import BAD_INPUT


@dataclass(frozen=True)
class GenerateConfig:
    """`temperature=0` takes the most likely token; `top_k` samples among that many."""

    prompt: str = "def "
    max_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.top_k < 1 or self.temperature < 0:
            raise ConfigError(
                f"max_tokens={self.max_tokens} and top_k={self.top_k} must be at least 1, "
                f"temperature={self.temperature} not negative"
            )


def load_run(directory: Path, world: parallel.World) -> tuple[Decoder, Tokenizer]:
    """The newest checkpoint of a run as a bare fp32 model, and the run's tokenizer."""
    config_path, tokenizer_path = directory / "config.yaml", directory / "tokenizer.model"
    for path in (config_path, tokenizer_path):
        if not path.is_file():
            raise ConfigError(f"{path} is missing: {directory} is not the directory of a run")
    config = from_mapping(TrainConfig, yaml.safe_load(config_path.read_text(encoding="utf-8")))
    model = Decoder(config.model, TensorParallel(world.tensor_group)).to(world.device).eval()
    found = checkpoint.find(str(directory), directory)
    assert found is not None
    checkpoint.load_weights(found, model, world)
    return model, Tokenizer(tokenizer_path)


@torch.no_grad()
def generate(model: Decoder, tokens: list[int], config: GenerateConfig, stop_token: int) -> list[int]:
    """`tokens` continued by up to `config.max_tokens`, ended early by `stop_token` (which is not returned)."""
    device = model.embedding.weight.device
    random = torch.Generator(device=device).manual_seed(config.seed)
    tokens, k = list(tokens), model.config.chunk_size
    for _ in range(config.max_tokens):
        rows = -(-len(tokens) // k) * k
        pack = layout.build(np.array([0]), np.array([len(tokens)]), rows, k, model.config.summary_tokens)
        padded = torch.tensor(tokens + [0] * (rows - len(tokens)), device=device)
        logits = model.logits(padded, pack)[len(tokens) - 1].float()
        if config.temperature == 0:
            chosen = int(logits.argmax())
        else:
            best = logits.topk(min(config.top_k, len(logits)))
            weights = torch.softmax(best.values / config.temperature, dim=-1)
            chosen = int(best.indices[torch.multinomial(weights, 1, generator=random)])
        if chosen == stop_token:
            break
        tokens.append(chosen)
    return tokens


def _parse(arguments: list[str]) -> tuple[Path, GenerateConfig]:
    if not arguments or "=" in arguments[0]:
        raise ConfigError(
            "usage: python -m train.generate RUN_DIRECTORY [prompt=TEXT] [max_tokens=64] [temperature=0.8] "
            "[top_k=50] [seed=0]"
        )
    values: dict = {}
    for argument in arguments[1:]:
        key, _, value = argument.partition("=")
        if key not in GenerateConfig.__dataclass_fields__:
            raise unknown_key(key, list(GenerateConfig.__dataclass_fields__))
        values[key] = value if key == "prompt" else yaml.safe_load(value)
    return Path(arguments[0]), from_mapping(GenerateConfig, values)


def main() -> int:
    try:
        directory, config = _parse(sys.argv[1:])
        world = parallel.initialize(parallel.ParallelConfig(), parallel.pick_device("auto"))
        try:
            model, tokenizer = load_run(directory, world)
            prompt = tokenizer.encode(config.prompt).tolist()
            if not prompt:
                raise ConfigError("prompt is empty: give at least one character")
            print(tokenizer.decode(generate(model, prompt, config, tokenizer.eos_id)))
        finally:
            parallel.shutdown()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
