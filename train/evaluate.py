"""Loss on held-out documents, and `python -m train.evaluate RUN [KEY=VALUE ...]`: what a trained model remembers.

    python -m train.evaluate runs/default                                everything, at the training length, 2x and 4x
    python -m train.evaluate runs/default tasks=needle,multikey lengths=2048,8192 samples=32 depths=11

Tasks are `perplexity` (by position, on held-out documents), `insight` (how much weight text gives to summaries) and the
probes of `data_pipeline.probe_tasks`. Everything runs through the training forward, several documents at a time. Writes
`evaluation.json` and pictures into the run's directory, or into `out=`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline import DataConfig, Loader, Samples, Tokenizer, open_data
from data_pipeline.config import TASKS
from data_pipeline.storage import write_json
from ksa_model.config import ModelConfig
from ksa_model.model import Decoder
from ksa_model.tensor_parallel import TensorParallel
from train import parallel
from train.batches import Batch, batch_maker
from train.config import USER_ERRORS, ConfigError, TrainConfig, from_mapping, key_values, make_directory, parsed
from train.parallel import World
from train.signals import BAD_INPUT

ALL_TASKS = ("perplexity", *TASKS, "insight")


class HeldOut:
    """The first packed samples of the validation split, the same at every call and on every layout."""

    def __init__(self, held_out: Samples | None, model_config: ModelConfig, world: World, num_samples: int):
        self._world = world
        self._batches: list[Batch] = []
        self._weights: list[int] = []
        if held_out is None or num_samples == 0:
            return
        wanted, ranks = min(num_samples, held_out.num_samples), world.data_size
        # Every rank runs as many forwards, since ZeRO-3 makes them collective; the last ones may weigh nothing.
        rounded = -(-wanted // ranks) * ranks
        maker = batch_maker(model_config, world.context_group.rank(), world.context_group.size())
        loader = Loader(
            held_out,
            samples_per_step=rounded,
            dp_rank=world.data_rank,
            dp_size=ranks,
            prefetch=rounded // ranks,
            transform=maker,
        )
        self._batches = loader.next_step()
        self._weights = [int(j * ranks + world.data_rank < wanted) for j in range(len(self._batches))]
        loader.close()

    def loss(self, model: Callable[..., torch.Tensor]) -> float | None:
        """Mean loss per token over all ranks, or None without validation samples. Collective."""
        if not self._batches:
            return None
        sums = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        with torch.no_grad():
            for batch, weight in zip(self._batches, self._weights):
                batch = batch.to(self._world.device)
                sums[0] += weight * model(batch.tokens, batch.labels, batch.layout)
                sums[1] += weight * batch.num_labels
        dist.all_reduce(sums, group=self._world.data_context_group)
        return (sums[0] / sums[1]).item()


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, and where to write it."""

    tasks: tuple[str, ...] = ALL_TASKS
    lengths: tuple[int, ...] = ()  # empty: the training length, two and four times that
    samples: int = 16  # probes of each task and length, packs of held-out documents of each length
    depths: int = 5  # places of the needle, from the beginning to the end
    rows: int = 32768  # text rows of one forward
    seed: int = 0
    out: str | None = None

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in ALL_TASKS:
                raise ConfigError(f"tasks={','.join(self.tasks)}: {task!r} is not one of {', '.join(ALL_TASKS)}")
        for name in ("samples", "depths", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if any(length < 1 for length in self.lengths):
            raise ConfigError(f"lengths={','.join(map(str, self.lengths))} must be at least 1")


def evaluate(
    model: Decoder, tokenizer: Tokenizer, run: TrainConfig, config: EvaluateConfig, device: torch.device
) -> dict[str, Any]:
    """Everything that `config` asks for, as plain values; accuracies are shares of 1, losses nats per token."""
    from train import probes  # it imports this module's neighbours, not the trainer's

    unit = run.alignment
    lengths = config.lengths or tuple(factor * run.seq_len for factor in (1, 2, 4))
    for length in lengths:
        if length % unit:
            raise ConfigError(f"lengths={length} is not a multiple of {unit}, on which documents start")
    chosen = [task for task in config.tasks if task in TASKS]
    result: dict[str, Any] = {
        "parameters": model.config.num_parameters()["total"],
        "layer_pattern": model.config.layer_pattern,
        "chunk_size": model.config.chunk_size,
        "summary_tokens": model.config.summary_tokens,
        "trained_at": run.seq_len,
        "lengths": list(lengths),
        "cache_bytes": {str(length): model.config.cache_bytes(length) for length in lengths},
        "chance": 1 / tokenizer.vocab_size,
    }
    scorer = probes.Scorer(model, tokenizer, device, config.rows)
    if chosen:
        result["tasks"] = {
            task: {str(n): scorer.score(task, n, config.samples, config.seed, config.depths) for n in lengths}
            for task in chosen
        }
    if "perplexity" in config.tasks or "insight" in config.tasks:
        result |= _on_documents(model, run, config, lengths, device)
    return result


def _on_documents(
    model: Decoder, run: TrainConfig, config: EvaluateConfig, lengths: tuple[int, ...], device: torch.device
) -> dict[str, Any]:
    from train import probes

    data = open_data(run.data)
    maker = batch_maker(model.config)
    result: dict[str, Any] = {}
    for length in lengths:
        held_out = data.samples("validation", length, run.alignment)
        if held_out is None:
            raise ConfigError(
                "tasks: perplexity and insight need held-out documents, and the run's data has none; leave them out"
            )
        packs = [maker(held_out.at(i)).to(device) for i in range(min(config.samples, held_out.num_samples))]
        if "perplexity" in config.tasks:
            result.setdefault("perplexity", {})[str(length)] = probes.loss_by_position(model, packs)
        if "insight" in config.tasks and model.config.has_summaries:
            result.setdefault("insight", {})[str(length)] = probes.weight_of_summaries(model, packs)
    return result


def load(directory: Path, world: World) -> tuple[Decoder, Tokenizer, TrainConfig]:
    """A run (its newest checkpoint) or a Hugging Face directory: model, tokenizer and configuration, to be evaluated.

    A directory brings no corpus: its held-out documents are of the standard library, and its training length is the
    longest that its config.json allows.
    """
    from train.generate import load_run
    from train.run_directory import read_config

    if (directory / "config.json").is_file() and not (directory / "config.yaml").is_file():
        return _load_hf(directory, world)
    config = read_config(directory)
    model, tokenizer = load_run(directory, world)
    if world.device.type == "cuda" and config.run.precision == "bf16":
        model = model.to(torch.bfloat16)  # as it was trained
    # Whether the data were prepared here or elsewhere, the tokenizer that the run kept is theirs.
    data = dataclasses.replace(config.data, tokenizer=config.data.tokenizer or str(directory / "tokenizer.model"))
    return model, tokenizer, dataclasses.replace(config, data=data)


def _load_hf(directory: Path, world: World) -> tuple[Decoder, Tokenizer, TrainConfig]:
    from train import import_hf

    tensors, source = import_hf.open_source(str(directory))
    path = import_hf.find_tokenizer(directory)
    if path is None:
        raise ConfigError(
            f"{directory} holds no {' and no '.join(import_hf.TOKENIZERS)}: evaluation needs its tokenizer"
        )
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    model = Decoder(source.config, TensorParallel(world.tensor_group, dtype=dtype))
    import_hf.load_model(model, import_hf.Weights(tensors, source, source.config), world)
    k = source.config.chunk_size
    data = DataConfig(source="stdlib", tokenizer=str(path))
    config = TrainConfig(model=source.config, seq_len=max(k, source.max_positions // k * k), data=data)
    return model.to(world.device).eval(), Tokenizer(path), config


def _parse(arguments: list[str]) -> tuple[Path, EvaluateConfig]:
    names = EvaluateConfig.__dataclass_fields__
    if not arguments or "=" in arguments[0]:
        keys = " ".join(f"[{name}=...]" for name in names)
        raise ConfigError(f"usage: python -m train.evaluate RUN_DIRECTORY|HF_DIRECTORY {keys}")
    lists = ("tasks", "lengths")
    values = dict(key_values(arguments[1:], list(names), texts=lists))
    for key in values.keys() & lists:
        values[key] = [parsed(key, item) for item in values[key].strip("[]").split(",") if item]
    return Path(arguments[0]), from_mapping(EvaluateConfig, values)


def main() -> int:
    try:
        directory, config = _parse(sys.argv[1:])
        out = Path(config.out or directory)
        if config.out is not None:
            make_directory("out", out)
        world = parallel.initialize(parallel.ParallelConfig(), parallel.pick_device("auto"))
        try:
            model, tokenizer, run = load(directory, world)
            result = evaluate(model, tokenizer, run, config, world.device)
        finally:
            parallel.shutdown()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    from train import evaluation_plots as plots

    write_json(out / "evaluation.json", {"run": str(directory), **result})
    print(plots.table(result))
    for path in [out / "evaluation.json", *plots.draw(result, out)]:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
