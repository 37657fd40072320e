"""`python -m train.generate RUN|HF_DIR prompt=...`: continue texts with a trained model, from its compressed cache.

Several prompts stand one after the other: `prompt=... prompt=...`. Without a prompt it asks for them, one a line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_pipeline import Tokenizer
from ksa_model import cache
from ksa_model.cache import Sampling
from ksa_model.config import ModelConfig
from ksa_model.model import Decoder
from ksa_model.tensor_parallel import TensorParallel
from train import checkpoint, import_hf, parallel
from train.config import USER_ERRORS, ConfigError, from_mapping, key_values
from train.run_directory import read_config
from train.signals import BAD_INPUT

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class GenerateConfig:
    """Defaults that give readable samples of a small model; the names are those of `ksa_model.cache.Sampling`."""

    max_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()  # besides the tokenizer's end of a document, and what the checkpoint names
    dtype: str = "fp32"  # fp32 | bf16

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not one of {', '.join(_DTYPES)}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2^63")

    def sampling(self, stop_tokens: tuple[int, ...]) -> Sampling:
        stop = (*stop_tokens, *self.stop_tokens)
        return Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed, stop)


@dataclass(frozen=True)
class Speaker:
    """A model ready to talk: `stop_tokens` end its answers, `max_positions` bounds prompt and answer together."""

    model: Decoder
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    max_positions: int


def load(directory: Path, world: parallel.World, dtype: str) -> Speaker:
    """The newest checkpoint of a run, or a Hugging Face checkpoint, as a bare model."""
    if (directory / "config.json").is_file():
        return _load_hf(directory, world, dtype)
    model, tokenizer = load_run(directory, world, _DTYPES[dtype])
    return Speaker(model, tokenizer, (tokenizer.eos_id,), read_config(directory).seq_len)


def load_run(directory: Path, world: parallel.World, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Tokenizer]:
    """The newest checkpoint of a run as a bare model, and the run's tokenizer."""
    config, tokenizer_path = read_config(directory), directory / "tokenizer.model"
    if not tokenizer_path.is_file():
        raise ConfigError(f"{tokenizer_path} is missing: {directory} is not the directory of a run")
    own = checkpoint.own_directory(directory, config.checkpoint.dir, config.run.name)
    if not (saved := checkpoint.complete(own)):
        raise ConfigError(f"{directory} has no finished checkpoint yet: there is none below {own}")
    found = saved[-1]
    state = checkpoint.read_state(found)
    # The model as it was saved: annealing takes away some of what the run began with.
    settings = from_mapping(ModelConfig, state["config"]["model"], "model.")
    model = Decoder(settings, TensorParallel(world.tensor_group, dtype=dtype)).to(world.device).eval()
    checkpoint.load_weights(found, model, world)
    model.anneal(state.get("own_share", 1.0) if settings.independent_qkv else 1.0)
    return model, Tokenizer(tokenizer_path)


def _load_hf(directory: Path, world: parallel.World, dtype: str) -> Speaker:
    tokenizer_path = import_hf.find_tokenizer(directory)
    if tokenizer_path is None:
        raise ConfigError(f"{directory} holds none of {', '.join(import_hf.TOKENIZERS)}: text needs a tokenizer")
    tokenizer = Tokenizer(tokenizer_path)
    tensors, source = import_hf.open_source(directory)
    weights = import_hf.Weights(tensors, source, source.config)
    model = Decoder(source.config, TensorParallel(world.tensor_group, dtype=_DTYPES[dtype])).to(world.device).eval()
    import_hf.load_model(model, weights, world)
    ends = {tokenizer.eos_id}
    for name in ("config.json", "generation_config.json"):
        if (directory / name).is_file():
            named = json.loads((directory / name).read_text(encoding="utf-8")).get("eos_token_id")
            ends |= set(named if isinstance(named, list) else [] if named is None else [named])
    return Speaker(model, tokenizer, tuple(sorted(ends)), source.max_positions)


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


def answer(speaker: Speaker, prompts: list[str], config: GenerateConfig) -> None:
    """Print the continuations (a single one as it comes), then speed and cache size on stderr."""
    model, tokenizer = speaker.model, speaker.tokenizer
    for prompt in prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # what the shell's bytes become that are none
            raise ConfigError(f"prompt={prompt!r} holds bytes that are not UTF-8")
    encoded = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    if not all(encoded):
        raise ConfigError("prompt is empty: give at least one character")
    longest = max(map(len, encoded))
    if longest + config.max_tokens > speaker.max_positions:
        raise ConfigError(
            f"a prompt of {longest} tokens and max_tokens={config.max_tokens} are more than the model's "
            f"{speaker.max_positions} positions; give a shorter prompt or fewer max_tokens"
        )
    stream, began, first, alone = TextStream(tokenizer), time.perf_counter(), 0.0, len(prompts) == 1

    def show(new: list[int | None]) -> None:
        nonlocal first
        first = first or time.perf_counter()
        if alone:
            print(stream.add(new[0]), end="", flush=True)

    if alone:
        print(prompts[0], end="", flush=True)
    said, kept = cache.generate(model, encoded, config.sampling(speaker.stop_tokens), show)
    ended = time.perf_counter()
    if alone:
        print(stream.add(None))
    else:
        for prompt, tokens in zip(prompts, said):
            print(f"{prompt}{tokenizer.decode(tokens)}\n")
    count, longest = sum(map(len, said)), max(kept.lengths)
    full = replace(model.config, layer_pattern="F", window_chunks=0).cache_bytes(
        longest, model.embedding.weight.itemsize
    )
    speed = f"{(count - len(said)) / (ended - first):.1f} tokens/s" if count > len(said) else "-"
    print(
        f"{sum(map(len, encoded))} tokens read in {first - began:.2f} s, {count} written at {speed}; cache "
        f"{kept.allocated_bytes / 1e6:.2f} MB, full attention in every layer would hold "
        f"{len(prompts) * full / 1e6:.2f} MB",
        file=sys.stderr,
    )


def _parse(arguments: list[str]) -> tuple[Path, list[str], GenerateConfig]:
    if not arguments or "=" in arguments[0]:
        keys = " ".join(f"[{name}=...]" for name in GenerateConfig.__dataclass_fields__)
        raise ConfigError(f"usage: python -m train.generate RUN|HF_DIR [prompt=TEXT ...] {keys}")
    given = key_values(arguments[1:], ["prompt", *GenerateConfig.__dataclass_fields__], texts=["prompt"])
    prompts = [value for key, value in given if key == "prompt"]
    values = {key: value for key, value in given if key != "prompt"}
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


def _converse(speaker: Speaker, config: GenerateConfig) -> None:
    for prompt in _typed_prompts():
        try:
            answer(speaker, [prompt], config)
        except ConfigError as error:
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr)  # whoever types can try again


def main() -> int:
    try:
        directory, prompts, config = _parse(sys.argv[1:])
        config.sampling(())  # refuse impossible settings before a model is loaded
        world = parallel.initialize(parallel.ParallelConfig(), parallel.pick_device("auto"))
        try:
            speaker = load(directory, world, config.dtype)
            if prompts:
                answer(speaker, prompts, config)
            else:
                _converse(speaker, config)
        finally:
            parallel.shutdown()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
