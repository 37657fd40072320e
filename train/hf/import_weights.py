"""Weights of Hugging Face checkpoints, and of other runs, as the parameters of a model on any parallel layout.

`init_from=hf:DIR` reads them directly, each rank its own slices; `python -m train.import_hf` makes a run directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from data_pipeline import DataConfig, Tokenizer
from data_pipeline.store.files import sha256_of_file
from data_pipeline.text.end_token import copy_tokenizer
from ksa_model.config import ModelConfig
from ksa_model.hf import naming
from ksa_model.hf.configs import CheckpointSpec, check_same_shape
from ksa_model.model import Decoder
from train import stages
from train.checkpoint import locate, rewrite
from train.checkpoint import tensors as checkpoint_tensors
from train.checkpoint.storage import CheckpointPath
from train.checkpoint.tensors import Pieces, boxes
from train.config.conversion import to_mapping
from train.config.errors import ConfigError
from train.config.schema import TrainConfig, from_saved
from train.config.sections import RunConfig
from train.config.stage import ROTATION
from train.distributed.groups import World
from train.hf.files import HfDirectory, HfError
from train.hf.tokenizers import IMPORTED, RUN_TOKENIZER, TOKENIZERS, VOCABULARY, find_tokenizer

MEAN = "mean"
HF_PREFIX = "hf:"
_MEAN_ROWS = 8192  # rows of the embedding in memory at a time


class Tensors(Protocol):
    """Tensors under their Hugging Face names, any box of them as fp32."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> torch.Tensor: ...

    def where(self, name: str) -> str:
        """The file or checkpoint that holds a tensor, for messages."""
        ...


class RunTensors:
    """The weights of a checkpoint of ours under their Hugging Face names, with vocabulary padding.

    `folded_share` as in `CheckpointSpec`: how much `read` takes of a summary projection, the rest being text's.
    """

    def __init__(self, checkpoint: CheckpointPath, folded_share: float = 1.0):
        self._checkpoint, self._folded_share = checkpoint, folded_share
        held = checkpoint_tensors.shapes(checkpoint)
        ours = [name.removeprefix("master/") for name in held if name.startswith("master/")]
        self._ours = {naming.hf_name(name): f"master/{name}" for name in ours}
        self._shapes = {theirs: held[name] for theirs, name in self._ours.items()}

    def names(self) -> list[str]:
        return sorted(self._ours)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        own = self._stored(name, offset, size)
        if self._folded_share == 1 or "_proj_summary" not in name:
            return own
        base = self._stored(name.replace("_proj_summary", "_proj"), offset, size)
        return self._folded_share * own + (1 - self._folded_share) * base

    def _stored(self, name: str, offset: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        box = torch.empty(tuple(size))
        pieces = Pieces(self._shapes[name], box.view(-1), shape=tuple(size), offset=tuple(offset))
        checkpoint_tensors.read(self._checkpoint, {self._ours[name]: pieces})
        return box

    def where(self, name: str) -> str:
        return str(self._checkpoint)


class Weights:
    """Every parameter of `model`, computed from the tensors of a checkpoint, in boxes of our full tensors.

    `mix_coeff`: what `model.anneal` must be called with to compute what the checkpoint does.

    The constructor raises one of `USER_ERRORS` that names a shape that does not fit, or a missing or extra tensor.
    """

    def __init__(self, tensors: Tensors, source: CheckpointSpec, model: ModelConfig, summary_row: int | None = None):
        check_same_shape(source, model)
        self.source, self._tensors, self.mix_coeff = source, tensors, source.mix_coeff_in(model)
        if summary_row is not None and not 0 <= summary_row < (model.vocab_size or 0):
            raise ConfigError(f"summary token {summary_row} is not in the vocabulary of {model.vocab_size}")
        self._origins = naming.origins(source, model, set(tensors.names()), summary_row)
        self._means: dict[str, torch.Tensor] = {}
        self.shapes = {name: shape for name, (shape, _) in model.parameter_shapes().items()}
        for name, origin in self._origins.items():
            self._check(origin, self.shapes[name])
        self.unused = sorted(set(tensors.names()) - {name for o in self._origins.values() for _, name in o.terms})
        self._check_vocabulary()
        self._check_tied_head()

    def _check_vocabulary(self) -> None:
        """The embedding and the head have the rows that the configuration says, neither more nor less."""
        rows = self.source.embedding_rows
        for name in (naming.EMBEDDING, naming.HEAD):
            if rows is not None and name in self._tensors.names() and (held := self._tensors.shape(name)[0]) != rows:
                raise HfError(
                    f"{self._tensors.where(name)}: {name} has {held} rows, and config.json has {rows}: the embedding "
                    f"was resized after config.json was written; set vocab_size={held} there, or copy the checkpoint "
                    "again"
                )

    def _check_tied_head(self) -> None:
        """A head that is stored beside a tied embedding repeats it: releases of transformers differ on which to use."""
        held = self._tensors
        if not self.source.config.tie_embeddings or not {naming.EMBEDDING, naming.HEAD} <= set(held.names()):
            return
        shape = held.shape(naming.EMBEDDING)
        same = held.shape(naming.HEAD) == shape
        for first in range(0, shape[0] if same else 0, _MEAN_ROWS):
            box = (first, 0), (min(_MEAN_ROWS, shape[0] - first), shape[1])
            if not torch.equal(held.read(naming.EMBEDDING, *box), held.read(naming.HEAD, *box)):
                same = False
                break
        if not same:
            raise HfError(
                f"{held.where(naming.HEAD)} holds {naming.HEAD}, which differs from {naming.EMBEDDING}, and "
                "config.json has tie_word_embeddings=true: set it to false there to use the head, or remove the tensor"
            )

    def box(self, name: str, offset: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """The fp32 box of our parameter `name` at `offset`, of `size`."""
        origin = self._origins[name]
        if origin.mean_rows is not None or origin.repeated_row is not None:
            row = self._row(origin)[offset[1] : offset[1] + size[1]]
            return row.expand(tuple(size))
        filled = (
            size[0] if origin.rows is None else max(0, min(size[0], origin.rows - offset[0]))
        )  # the rest is padding
        box = torch.zeros(tuple(size))
        if filled:
            at, taken = (offset[0] + origin.first_row, *offset[1:]), (filled, *size[1:])
            parts = [weight * self._tensors.read(name, at, taken) for weight, name in origin.terms]
            box[:filled] = sum(parts[1:], start=parts[0])
        return box

    def describe_unused(self) -> str:
        """The end of a line for the user: which tensors the model does not take. Rotation tables need no word."""
        names = [name for name in self.unused if "rotary_emb" not in name and name != naming.HEAD]
        if not names:
            return ""
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"; the model has no place for {', '.join(names[:3])}{more}"

    def whole(self, name: str) -> torch.Tensor:
        return self.box(name, [0] * len(self.shapes[name]), self.shapes[name])

    def _row(self, origin: naming.Origin) -> torch.Tensor:
        ((_, name),) = origin.terms
        columns = self._tensors.shape(name)[1]
        if origin.repeated_row is not None:
            return self._tensors.read(name, (origin.repeated_row, 0), (1, columns))[0]
        assert origin.mean_rows is not None
        if name not in self._means:
            total = torch.zeros(columns, dtype=torch.float64)
            for first in range(0, origin.mean_rows, _MEAN_ROWS):
                rows = min(_MEAN_ROWS, origin.mean_rows - first)
                total += self._tensors.read(name, (first, 0), (rows, columns)).sum(0, dtype=torch.float64)
            self._means[name] = (total / origin.mean_rows).float()
        return self._means[name]

    def _check(self, origin: naming.Origin, shape: tuple[int, ...]) -> None:
        single = origin.mean_rows is not None or origin.repeated_row is not None
        for _, name in origin.terms:
            held = self._tensors.shape(name)
            rows = origin.mean_rows or (origin.repeated_row or 0) + 1 if single else origin.rows or shape[0]
            enough = held[0] >= origin.first_row + rows if single or origin.rows or origin.first_row else held == shape
            if not enough or held[1:] != shape[1:]:
                wanted = (origin.first_row + rows, *shape[1:])
                raise HfError(f"{name} is of shape {held}, this model needs {wanted}: config.json and tensors differ")


def open_source(directory: str | Path, allow_pickle: bool = False) -> tuple[Tensors, CheckpointSpec]:
    """The tensors of a Hugging Face directory, and which model they belong to."""
    held = HfDirectory(directory, allow_pickle)
    return held, held.spec()


def check(config: TrainConfig) -> None:
    """Raise one of `USER_ERRORS` if model or stage do not fit `init_from=hf:...`; reads no tensor."""
    if config.init_from is not None and config.init_from.startswith(HF_PREFIX):
        weights = _weights(config.init_from.removeprefix(HF_PREFIX), config.model, config.init_summary_from)
        stages.check_teacher(config.stage, config.model, config.init_from, vars(weights.source.config))
        if weights.mix_coeff != 1:
            raise ConfigError(
                f"init_from={config.init_from}: its config.json has mix_coeff={weights.mix_coeff:g}: it is from the "
                "middle of annealing, and with QK-norm no summary projections compute what its mixture does, so no run "
                "can begin with it; give a checkpoint whose annealing is finished, or set mix_coeff in a copy of "
                "config.json to 1, to begin with the summaries' own projections alone, or to 0, to begin with text's"
            )


def initialise(
    engine: Any, world: World, config: TrainConfig, run: tuple[CheckpointPath, dict[str, Any]] | None = None
) -> str:
    """Fill the fp32 weights that this rank owns, on any parallel layout; AdamW's moments stay zero. Collective.

    They come from `init_from=hf:...`, or from `run`, a verified checkpoint with its state.json. Returns a line for the
    log.
    """
    assert config.init_from is not None
    if run is None:
        weights = _weights(config.init_from.removeprefix(HF_PREFIX), config.model, config.init_summary_from)
    else:
        weights = _weights_of_run(*run, config)
    dims = {name: dim for name, (_, dim) in config.model.parameter_shapes().items()}
    for owned in engine.owned_state():
        shift, dim = [0] * len(owned.shape), dims[owned.name]
        if dim is not None:
            shift[dim] = owned.shape[dim] * world.tensor_rank
        flat, taken = owned.state["master"], 0
        for at, size in boxes(owned.shape, owned.start, owned.start + flat.numel()):
            count = torch.Size(size).numel()
            part = weights.box(owned.name, [a + s for a, s in zip(at, shift)], size)
            flat[taken : taken + count].copy_(part.reshape(-1))
            taken += count
    engine.finish_loading(engine.optimizer_steps())
    note = "".join(
        f"; model.{name}={getattr(config.model, name)} here, {getattr(weights.source.config, name)} there"
        for name in ROTATION
        if getattr(config.model, name) != getattr(weights.source.config, name)
    )
    return f"weights from {config.init_from}, {weights.source.kind}{note}{weights.describe_unused()}"


def load_model(model: Decoder, weights: Weights, world: World) -> None:
    """Fill a bare model, or this tensor rank's shard of one, and set its annealing weight."""
    dims = {name: dim for name, (_, dim) in model.config.parameter_shapes().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset, dim = [0] * parameter.ndim, dims[name]
            if dim is not None:
                offset[dim] = parameter.shape[dim] * world.tensor_rank
            parameter.copy_(weights.box(name, offset, parameter.shape))
    model.anneal(weights.mix_coeff)


def _weights(directory: str, model: ModelConfig, summary_from: str, allow_pickle: bool = False) -> Weights:
    tensors, source = open_source(directory, allow_pickle)
    return Weights(tensors, source, model, _summary_row(summary_from, directory))


def _weights_of_run(checkpoint: CheckpointPath, state: dict[str, Any], config: TrainConfig) -> Weights:
    row = _summary_row(config.init_summary_from, str(checkpoint))
    return Weights(RunTensors(checkpoint), spec_of_run(state), config.model, row)


def spec_of_run(state: Mapping[str, Any]) -> CheckpointSpec:
    """What a checkpoint of ours with the state.json `state` contains."""
    saved = from_saved(state["config"])
    return CheckpointSpec("a run", saved.model, saved.seq_len, state.get("own_share", 1.0), is_complete=True)


def _summary_row(summary_from: str, directory: str) -> int | None:
    """`mean`, a token id, or a token's text -> the row of the embedding, or None for mean."""
    if summary_from == MEAN:
        return None
    if summary_from.isascii() and summary_from.isdigit():
        return int(summary_from)
    path = find_tokenizer(Path(directory))
    if path is not None and summary_from and summary_from in (tokens := Tokenizer(path).vocabulary):
        return tokens.index(summary_from)
    raise ConfigError(
        f"init_summary_from={summary_from!r} is neither mean, nor a token id, nor a token of "
        f"{path or Path(directory) / TOKENIZERS[0]}; give one of them"
    )


def import_run(
    hf_directory: str, out: Path, model: ModelConfig, summary_from: str, allow_pickle: bool
) -> tuple[CheckpointPath, str]:
    """Write a run directory at step 0 with the weights of `hf_directory`; one tensor is in memory at a time.

    Returns its checkpoint and the end of a line for the user, see `Weights.describe_unused`.
    """
    weights = _weights(hf_directory, model, summary_from, allow_pickle)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"out={out} is not empty: choose a directory that does not exist yet")
    seq_len = max(model.chunk_size, weights.source.max_positions // model.chunk_size * model.chunk_size)
    run = RunConfig(name=out.name, root=str(out.parent))
    tokenizer, facts = find_tokenizer(Path(hf_directory)), {}
    data = DataConfig(tokenizer=None if tokenizer is None else str(out / RUN_TOKENIZER))
    if tokenizer is not None:
        facts = {"tokenizer_sha256": sha256_of_file(tokenizer), VOCABULARY: Tokenizer(tokenizer).vocabulary_sha256}
    config = TrainConfig(model=model, seq_len=seq_len, run=run, data=data)
    state = {
        "format": locate.FORMAT,
        "step": 0,
        "tokens": 0,
        "loader": {},
        "contains": ["master"],
        "own_share": weights.mix_coeff,
        "made_by": f"{IMPORTED}, from {weights.source.kind}",
        **facts,
        "saved_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": to_mapping(config),
    }
    stored = {f"master/{name}": _stored(weights, name) for name in weights.shapes}
    checkpoint = rewrite.write(CheckpointPath(out / "checkpoints"), state, stored, 1)
    (out / "config.yaml").write_text(yaml.safe_dump(to_mapping(config), sort_keys=False), encoding="utf-8")
    if tokenizer is not None:
        copy_tokenizer(tokenizer, out / RUN_TOKENIZER)
    return checkpoint, weights.describe_unused()


def _stored(weights: Weights, name: str) -> rewrite.StoredTensor:
    return rewrite.StoredTensor(weights.shapes[name], torch.float32, lambda: weights.whole(name).contiguous())
