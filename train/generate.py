"""`python -m train.generate RUN|HF_DIR prompt=...`: continue texts with a trained model and its compressed cache.

Give several prompts as `prompt=... prompt=...`. Without a prompt, the command reads prompts from its input, one per
line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_pipeline import Tokenizer, commands
from ksa_model.config import ModelConfig, RopeScaling
from ksa_model.decoding.generate import Sampling, generate
from ksa_model.layers.tensor_parallel import TensorParallel
from ksa_model.model import Decoder
from train.checkpoint import loading, locate, storage
from train.config.conversion import from_mapping, from_words, key_values
from train.config.errors import ConfigError
from train.config.run_directory import directory_argument, read_config
from train.config.schema import USER_ERRORS
from train.distributed import groups
from train.hf import import_weights, tokenizers
from train.hf.files import CONFIG, read_object

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class GenerateConfig:
    """How to sample; see `ksa_model.decoding.generate.Sampling`. The defaults suit a small model."""

    max_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()  # in addition to the end of a document and those that the checkpoint names
    dtype: str = "fp32"  # fp32 | bf16

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not one of {', '.join(_DTYPES)}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2^63")
        if any(token < 0 for token in self.stop_tokens):
            raise ConfigError(f"stop_tokens={','.join(map(str, self.stop_tokens))} must be token ids, at least 0")

    def sampling(self, stop_tokens: tuple[int, ...]) -> Sampling:
        """The settings for `generate`; `stop_tokens` are those of the model. Raises one of `USER_ERRORS`."""
        stop = (*stop_tokens, *self.stop_tokens)
        return Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed, stop)


@dataclass(frozen=True)
class GenerationSession:
    """A loaded model. `stop_tokens` end a continuation; `max_positions` limits the tokens of prompt and answer."""

    model: Decoder
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    max_positions: int


def load(directory: Path, world: groups.World, dtype: str) -> GenerationSession:
    """The newest checkpoint of a run, or a Hugging Face checkpoint, as a bare model."""
    if (directory / "config.json").is_file():
        return _load_hf(directory, world, dtype)
    model, tokenizer = load_run(directory, world, _DTYPES[dtype])
    return GenerationSession(model, tokenizer, tokenizer.ends, read_config(directory).seq_len)


def load_run(
    directory: Path,
    world: groups.World,
    dtype: torch.dtype = torch.float32,
    rope_scaling: RopeScaling | None = None,
) -> tuple[Decoder, Tokenizer]:
    """The newest checkpoint of a run as a bare model, and the run's tokenizer. `rope_scaling` replaces that of the
    checkpoint."""
    config = read_config(directory)
    if not (directory / tokenizers.RUN_TOKENIZER).is_file():
        missing = directory / tokenizers.RUN_TOKENIZER
        raise ConfigError(f"{missing} is missing: {directory} is not the directory of a run")
    own = locate.checkpoint_directory(directory, config.checkpoint.dir, config.run.name)
    if not (saved := storage.finished(own)):
        raise ConfigError(f"{directory} has no finished checkpoint yet: there is none below {own}")
    found = saved[-1]
    state = locate.read_state(found)
    tokenizer_path = tokenizers.run_tokenizer(directory, found, state)
    assert tokenizer_path is not None
    # The model as it was saved: annealing drops parameters that the run began with.
    settings = from_mapping(ModelConfig, state["config"]["model"], "model.")
    if rope_scaling is not None:
        settings = replace(settings, rope_scaling=rope_scaling)
    model = Decoder(settings, TensorParallel(world.tensor_group, dtype=dtype)).to(world.device).eval()
    loading.load_weights(found, model, world)
    model.anneal(state.get("own_share", 1.0) if settings.independent_qkv else 1.0)
    return model, Tokenizer(tokenizer_path)


def _load_hf(directory: Path, world: groups.World, dtype: str) -> GenerationSession:
    tokenizer_path = tokenizers.find_tokenizer(directory)
    if tokenizer_path is None:
        raise ConfigError(
            f"{directory} holds none of {', '.join(tokenizers.TOKENIZERS)}: generating text needs a tokenizer"
        )
    tokenizer = Tokenizer(tokenizer_path)
    tensors, source = import_weights.open_source(directory)
    weights = import_weights.Weights(tensors, source, source.config)
    model = Decoder(source.config, TensorParallel(world.tensor_group, dtype=_DTYPES[dtype])).to(world.device).eval()
    import_weights.load_model(model, weights, world)
    ends = {*tokenizer.ends, *_named_ends(directory)}
    return GenerationSession(model, tokenizer, tuple(sorted(ends)), source.max_positions)


def _named_ends(directory: Path) -> list[int]:
    """`eos_token_id` of config.json; that of generation_config.json comes with the tokenizer."""
    named = read_object(directory / CONFIG).get("eos_token_id")
    ends = named if isinstance(named, list) else [] if named is None else [named]
    if not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
        raise ConfigError(f"{directory / CONFIG}: eos_token_id={named!r} must be token ids; correct it")
    return ends


_CONTEXT_TOKENS = 64  # of the prompt, decoded together with the answer


class TextStream:
    """Turns the tokens of one continuation into text as they arrive. An incomplete UTF-8 character is held back.

    They are decoded behind the end of the prompt: many tokenizers drop the space before the first word of a text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._prompt = list(prompt)[-_CONTEXT_TOKENS:]
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, token: int | None) -> str:
        """The text that `token` completes; None ends the stream and gives what was held back."""
        if token is not None:
            self._tokens.append(token)
        text = continuation(self._tokenizer, self._prompt, self._tokens)
        if token is not None:
            text = text.rstrip("\ufffd")
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of `tokens`, which continue `prompt`."""
    context = [*prompt][-_CONTEXT_TOKENS:]
    before, together = tokenizer.decode(context), tokenizer.decode([*context, *tokens])
    # A decoder may change what stands before, such as an incomplete character.
    return together[len(before) :] if together.startswith(before) else tokenizer.decode(tokens)


def answer(session: GenerationSession, prompts: list[str], config: GenerateConfig) -> None:
    """Print the continuations of `prompts`, then speed and cache size on stderr. A single one is printed as it arrives.

    Raises `ConfigError` for a prompt that is empty, is not UTF-8, or leaves no room for `config.max_tokens`.
    """
    model, tokenizer = session.model, session.tokenizer
    for prompt in prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # undecodable bytes of the command line
            raise ConfigError(f"prompt={prompt!r} holds bytes that are not UTF-8")
    encoded = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    if not all(encoded):
        raise ConfigError("prompt is empty: give at least one character")
    longest = max(map(len, encoded))
    if longest + config.max_tokens > session.max_positions:
        raise ConfigError(
            f"a prompt of {longest} tokens and max_tokens={config.max_tokens} are more than the model's "
            f"{session.max_positions} positions; give a shorter prompt or fewer max_tokens"
        )
    stream, began, first, is_single = TextStream(tokenizer, encoded[0]), time.perf_counter(), 0.0, len(prompts) == 1

    def show(new: list[int | None]) -> None:
        nonlocal first
        first = first or time.perf_counter()
        if is_single:
            print(stream.add(new[0]), end="", flush=True)

    if is_single:
        print(prompts[0], end="", flush=True)
    continuations, cache = generate(model, encoded, config.sampling(session.stop_tokens), show)
    ended = time.perf_counter()
    if is_single:
        print(stream.add(None))
    else:
        for prompt, given, tokens in zip(prompts, encoded, continuations):
            print(f"{prompt}{continuation(tokenizer, given, tokens)}\n")
    count, longest = sum(map(len, continuations)), max(cache.lengths)
    full = replace(model.config, layer_pattern="F", window_chunks=0).cache_bytes(
        longest, model.embedding.weight.itemsize
    )
    speed = f"{(count - len(prompts)) / (ended - first):.1f} tokens/s" if count > len(prompts) else "-"
    print(
        f"{sum(map(len, encoded))} prompt tokens in {first - began:.2f} s, {count} new tokens at {speed}; cache "
        f"{cache.allocated_bytes / 1e6:.2f} MB, with full attention in every layer it would take "
        f"{len(prompts) * full / 1e6:.2f} MB",
        file=sys.stderr,
    )


def _parse(arguments: list[str]) -> tuple[Path, list[str], GenerateConfig]:
    keys = " ".join(f"[{name}=...]" for name in GenerateConfig.__dataclass_fields__)
    directory = directory_argument(arguments, f"python -m train.generate RUN|HF_DIR [prompt=TEXT ...] {keys}")
    given = key_values(arguments[1:], ["prompt", *GenerateConfig.__dataclass_fields__], ConfigError)
    prompts = [text for key, text in given if key == "prompt"]
    return directory, prompts, from_words(GenerateConfig, [f"{k}={v}" for k, v in given if k != "prompt"])


def _typed_prompts() -> Iterator[str]:
    """Lines that are typed or piped in, until the end of input; a typed `\\n` stands for a new line."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line:
            yield line.replace("\\n", "\n")


def _converse(session: GenerationSession, config: GenerateConfig) -> None:
    for prompt in _typed_prompts():
        try:
            answer(session, [prompt], config)
        except ConfigError as error:
            if not sys.stdin.isatty():
                raise
            commands.fail(str(error))  # the user can type another prompt


def _run(arguments: list[str]) -> None:
    directory, prompts, config = _parse(arguments)
    config.sampling(())  # refuses impossible settings before the model is loaded
    world = groups.initialize(groups.ParallelConfig(), groups.pick_device("auto"))
    try:
        session = load(directory, world, config.dtype)
        if prompts:
            answer(session, prompts, config)
        else:
            _converse(session, config)
    finally:
        groups.shutdown()


def main() -> int:
    """The command; returns its exit code."""
    return commands.run(lambda: _run(sys.argv[1:]), sys.argv[1:], USER_ERRORS)


if __name__ == "__main__":
    sys.exit(main())
