"""`python -m train.generate RUN prompt=...`: continue texts with a trained model, from its compressed cache.

Several prompts stand one after the other: `prompt=... prompt=...`. Without a prompt it asks for them, one a line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from data_pipeline import Tokenizer
from ksa_model import cache
from ksa_model.cache import Sampling
from ksa_model.config import ModelConfig
from ksa_model.model import Decoder
from ksa_model.tensor_parallel import TensorParallel
from train import checkpoint, parallel
from train.config import USER_ERRORS, ConfigError, TrainConfig, from_mapping, unknown_key
from train.signals import BAD_INPUT


@dataclass(frozen=True)
class GenerateConfig:
    """Defaults that give readable samples of a small model; the names are those of `ksa_model.cache.Sampling`."""

    max_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def sampling(self, stop_token: int) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed, (stop_token,))


def run_config(directory: Path) -> TrainConfig:
    """What the run in `directory` was told."""
    path = directory / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{path} is missing: {directory} is not the directory of a run")
    return from_mapping(TrainConfig, yaml.safe_load(path.read_text(encoding="utf-8")))


def load_run(directory: Path, world: parallel.World) -> tuple[Decoder, Tokenizer]:
    """The newest checkpoint of a run as a bare fp32 model, and the run's tokenizer."""
    config, tokenizer_path = run_config(directory), directory / "tokenizer.model"
    if not tokenizer_path.is_file():
        raise ConfigError(f"{tokenizer_path} is missing: {directory} is not the directory of a run")
    own = checkpoint.own_directory(directory, config.checkpoint.dir, config.run.name)
    found = checkpoint.find(str(own), own)
    assert found is not None
    state = checkpoint.read_state(found)
    # The model as it was saved: annealing takes away some of what the run began with.
    settings = from_mapping(ModelConfig, state["config"]["model"], "model.")
    model = Decoder(settings, TensorParallel(world.tensor_group)).to(world.device).eval()
    checkpoint.load_weights(found, model, world)
    model.anneal(state.get("own_share", 1.0) if settings.independent_qkv else 1.0)
    return model, Tokenizer(tokenizer_path)


class TextStream:
    """Turns one request's tokens into text as they come; half a character waits for its other half."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, token: int | None) -> str:
        """The text that has become complete with `token` (None: nothing more comes)."""
        if token is not None:
            self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if token is not None:
            text = text.rstrip("\ufffd")
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new


def answer(model: Decoder, tokenizer: Tokenizer, prompts: list[str], config: GenerateConfig) -> None:
    """Print the continuations (a single one as it comes), then speed and cache size on stderr."""
    encoded = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    if not all(encoded):
        raise ConfigError("prompt is empty: give at least one character")
    stream = TextStream(tokenizer)

    def show(new: list[int | None]) -> None:
        print(stream.add(new[0]), end="", flush=True)

    began = time.perf_counter()
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
    said, kept = cache.generate(model, encoded, config.sampling(tokenizer.eos_id), show if len(prompts) == 1 else None)
    seconds = time.perf_counter() - began
    if len(prompts) == 1:
        print(stream.add(None))
    else:
        for prompt, tokens in zip(prompts, said):
            print(f"{prompt}{tokenizer.decode(tokens)}\n")
    count = sum(map(len, said))
    longest = max(kept.lengths)
    full = len(prompts) * model.config.num_layers * longest * 2 * model.config.num_kv_heads * model.config.head_dim * 4
    print(
        f"{count} tokens, {count / seconds:.1f} tokens/s with prefill; cache {kept.allocated_bytes / 1e6:.2f} MB, "
        f"full attention in every layer would hold {full / 1e6:.2f} MB",
        file=sys.stderr,
    )


def _parse(arguments: list[str]) -> tuple[Path, list[str], GenerateConfig]:
    if not arguments or "=" in arguments[0]:
        keys = " ".join(f"[{name}=...]" for name in GenerateConfig.__dataclass_fields__)
        raise ConfigError(f"usage: python -m train.generate RUN_DIRECTORY [prompt=TEXT ...] {keys}")
    prompts, values = [], {}
    for argument in arguments[1:]:
        key, _, value = argument.partition("=")
        if key == "prompt":
            prompts.append(value)
        elif key in GenerateConfig.__dataclass_fields__:
            values[key] = yaml.safe_load(value)
        else:
            raise unknown_key(key, ["prompt", *GenerateConfig.__dataclass_fields__])
    return Path(arguments[0]), prompts, from_mapping(GenerateConfig, values)


def _typed_prompts() -> Iterator[str]:
    """Lines typed at a prompt, or piped in, until the end of input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line:
            yield line.replace("\\n", "\n")


def main() -> int:
    try:
        directory, prompts, config = _parse(sys.argv[1:])
        config.sampling(0)  # refuse impossible settings before a model is loaded
        world = parallel.initialize(parallel.ParallelConfig(), parallel.pick_device("auto"))
        try:
            model, tokenizer = load_run(directory, world)
            if prompts:
                answer(model, tokenizer, prompts, config)
            else:
                for prompt in _typed_prompts():
                    answer(model, tokenizer, [prompt], config)
        finally:
            parallel.shutdown()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
