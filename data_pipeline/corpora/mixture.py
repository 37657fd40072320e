"""Mixtures: samples of several corpora in one order, by weight, in stages of different sample lengths.

Weights are shares of samples, and of tokens too, because samples are about equally full. Every block of 1024 samples
has an exact number of samples of each draw, in an order that a keyed permutation chooses. So the draw of any global
index, and the number of the sample within the draw, follow from the index alone.

A draw is a corpus, or its documents in a range of lengths: a stage of million-token samples can draw half of them from
documents of at least 128k tokens. Each draw of each stage is packed separately, so a document may occur again in
another stage. `report_stages` shows how often a draw is repeated.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import (
    RAW,
    TRAIN,
    VALIDATION,
    DataConfig,
    DrawConfig,
    StageConfig,
    corpus_config,
    errors_name_corpus,
)
from data_pipeline.corpora.synthetic import Synthetic, SyntheticSamples
from data_pipeline.corpora.tokens import TokenCorpus, open_corpus
from data_pipeline.errors import DataError
from data_pipeline.packing.order import derive_key, permute
from data_pipeline.packing.plan import Plan, Selection
from data_pipeline.packing.samples import PackedSample, Samples, TrainingData
from data_pipeline.store.files import fingerprint_of
from data_pipeline.store.remote import is_remote
from data_pipeline.text.sources import Corpus
from data_pipeline.text.tokenizer import TRAINING_CHARACTERS, train_tokenizer_once

BLOCK_SAMPLES = 1024
_BLOCK_ORDER = 6
_ALGORITHM = 1


@dataclass(frozen=True)
class Draw:
    """What a stage draws from one corpus.

    Attributes:
        name: of the corpus.
        weight: share of the samples, relative to the other draws.
        selection: range of document lengths.
        plan: the packed documents.
    """

    name: str
    weight: float
    selection: Selection
    plan: Plan | SyntheticSamples


class Stage:
    """A range of the global order with samples of one length, from weighted draws.

    Attributes:
        draws: what it draws from.
        seq_len: T of its samples.
        first_sample: global index of its first sample.
        num_samples: None: endless.
        seed: orders the draws.
        counts: int64 [draws], samples of each draw in a block of 1024.

    Raises:
        DataError: a weight is less than one sample in a block.
    """

    def __init__(self, draws: list[Draw], seq_len: int, first_sample: int, num_samples: int | None, seed: int) -> None:
        self.draws, self.seq_len, self.seed = draws, seq_len, seed
        self.first_sample, self.num_samples = first_sample, num_samples
        self.counts = block_counts([draw.weight for draw in draws])
        for draw, count in zip(draws, self.counts.tolist()):
            if not count:
                raise DataError(
                    f"data.corpora[{draw.name}]: a weight of {draw.weight:g} among {len(draws)} is less than one "
                    f"sample in {BLOCK_SAMPLES}; raise it, or leave the corpus out"
                )
        self._ends = np.cumsum(self.counts)

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the draw of global sample `index`, and the number of the sample within that draw."""
        block, position = divmod(index - self.first_sample, BLOCK_SAMPLES)
        # The key depends on where the stage begins, so a stage that is appended changes nothing before it.
        key = derive_key(self.seed, _BLOCK_ORDER, self.first_sample, block)
        slot = int(permute(np.array([position]), BLOCK_SAMPLES, key)[0])
        draw = int(np.searchsorted(self._ends, slot, side="right"))
        first = int(self._ends[draw - 1]) if draw else 0
        return draw, block * int(self.counts[draw]) + slot - first

    def samples_per_draw(self) -> np.ndarray:
        """int64 [draws]: samples of each draw in the whole stage, or in one block of an endless stage."""
        if self.num_samples is None:
            return self.counts
        whole, rest = divmod(self.num_samples, BLOCK_SAMPLES)
        last = [self.locate(self.first_sample + whole * BLOCK_SAMPLES + i)[0] for i in range(rest)]
        return whole * self.counts + np.bincount(last, minlength=len(self.draws))


class MixtureSamples(Samples):
    """The samples of all stages. A run reads those of its `seq_len`; the run of the next stage resumes its state."""

    def __init__(self, stages: list[Stage], seq_len: int, identity: dict[str, Any]) -> None:
        self.stages, self.seq_len, self.identity = stages, seq_len, identity
        self.fingerprint = fingerprint_of(identity)
        self._firsts = [stage.first_sample for stage in stages]
        last = stages[-1]
        self.num_samples = 1 << 62 if last.num_samples is None else last.first_sample + last.num_samples

    def at(self, index: int) -> PackedSample:
        """Sample `index`. Raises DataError if it is of a stage of another length, or after the last stage."""
        number = bisect_right(self._firsts, index) - 1
        stage = self.stages[number]
        if index >= self.num_samples:
            raise DataError(f"sample {index} comes after the {self.num_samples} samples of data.stages: append a stage")
        if stage.seq_len != self.seq_len:
            raise DataError(
                f"sample {index} belongs to stage {number} of data.stages with seq_len={stage.seq_len}, this run has "
                f"seq_len={self.seq_len}: continue with seq_len={stage.seq_len}, resuming from this run's checkpoint"
            )
        draw, number_in_draw = stage.locate(index)
        return replace(stage.draws[draw].plan.at(number_in_draw), index=index)

    def prefetch(self, index: int) -> None:
        """See `Samples`."""
        stage = self.stages[bisect_right(self._firsts, index) - 1]
        if index < self.num_samples and stage.seq_len == self.seq_len:
            draw, number_in_draw = stage.locate(index)
            stage.draws[draw].plan.prefetch(number_in_draw)


class Mixture(TrainingData):
    """The data of `data.source=mixture`. Without `data.tokenizer`, one is trained on the texts of all corpora.

    Attributes:
        corpora: the corpora by name.
        weights: their weights, which sum to 1.

    Raises:
        DataError: a corpus cannot be opened, or corpora have different tokenizers.
    """

    def __init__(self, config: DataConfig, *, progress: bool = False) -> None:
        self.config = config
        for corpus in config.corpora:  # check all, before tokenizing the first takes hours
            one = corpus_config(config, corpus, config.tokenizer)
            with errors_name_corpus(corpus.name):
                _check_paths(one)
        tokenizer = config.tokenizer or _train_tokenizer(config)
        self.corpora: dict[str, TokenCorpus | Synthetic] = {}
        for corpus in config.corpora:
            one = corpus_config(config, corpus, tokenizer)
            with errors_name_corpus(corpus.name):
                self.corpora[corpus.name] = _open(one, progress)
        first = next(iter(self.corpora.values()))
        self.tokenizer_path, self.vocab_size = first.tokenizer_path, first.vocab_size
        for name, opened in self.corpora.items():
            if opened.tokenizer.fingerprint != first.tokenizer.fingerprint:
                raise DataError(
                    f"data.corpora[{name}]: its shards were made with tokenizer {opened.tokenizer.fingerprint}, those "
                    f"of {config.corpora[0].name} with {first.tokenizer.fingerprint}; prepare all with one tokenizer"
                )
        self.fingerprint = fingerprint_of([[name, opened.fingerprint] for name, opened in self.corpora.items()])
        self.weights = self._weights()

    def _samples(self, split: str, seq_len: int, alignment: int) -> Samples | None:
        config = self.config
        if split == VALIDATION:
            stages = self._validation_stages(seq_len, alignment)
        else:
            stages = self._stages(seq_len, alignment)
        if not stages:
            return None
        if seq_len not in {stage.seq_len for stage in stages}:
            lengths = ", ".join(str(stage.seq_len) for stage in stages)
            raise DataError(f"seq_len={seq_len} is none of the lengths of data.stages ({lengths})")
        identity: dict[str, Any] = {"alignment": alignment, "seed": config.seed, "algorithm": _ALGORITHM}
        for name, opened in self.corpora.items():
            identity[f"corpora.{name}"] = opened.fingerprint
        identity["stages"] = [
            [stage.first_sample, stage.seq_len, [[draw.name, draw.plan.fingerprint] for draw in stage.draws]]
            for stage in stages
        ]
        identity["weights"] = [stage.counts.tolist() for stage in stages]
        return MixtureSamples(stages, seq_len, identity)

    def report(self) -> list[str]:
        """See `TrainingData`."""
        lines = []
        for name, opened in self.corpora.items():
            lines.append(f"corpus {name}, weight {self.weights[name]:.4f}")
            lines += [f"  {line}" for line in opened.report()]
        return lines

    def report_stages(self, samples: MixtureSamples) -> list[str]:
        """Lines of text: what each stage draws, and how often that repeats the documents."""
        lines = []
        for number, stage in enumerate(samples.stages):
            length = "endless; per 1024 samples" if stage.num_samples is None else f"{stage.num_samples:,} samples"
            lines.append(f"stage {number}: seq_len {stage.seq_len:,}, from sample {stage.first_sample:,}, {length}")
            for draw, count in zip(stage.draws, stage.samples_per_draw().tolist()):
                epochs = count / draw.plan.num_samples
                beyond = draw.plan.statistics["tokens_beyond"].items()
                limits = (draw.selection.min_tokens, draw.selection.max_tokens)
                lengths = "" if limits == (0, None) else f", documents of {limits[0]:,} to {limits[1] or 'any'} tokens"
                lines.append(
                    f"  {draw.name}{lengths}: {count:,} of {draw.plan.num_samples:,} samples, {epochs:.2f} epochs"
                    + (", repeated" if epochs > 1 else "")
                )
                shares = ", ".join(f"{limit}: {share:.1%}" for limit, share in beyond)
                lines.append(f"    tokens in documents longer than {shares}")
        return lines

    def _weights(self) -> dict[str, float]:
        given = {corpus.name: corpus.weight for corpus in self.config.corpora}
        if any(weight is None for weight in given.values()):
            sized = {name: opened for name, opened in self.corpora.items() if isinstance(opened, TokenCorpus)}
            tokens = {name: int(opened.lengths(TRAIN).sum()) for name, opened in sized.items()}
            temperature = self.config.temperature
            try:
                raw = {name: max(n, 1) ** (1 / temperature) for name, n in tokens.items()}
            except OverflowError:
                raw = {"": float("inf")}
            if not sum(raw.values()) < float("inf"):
                raise DataError(f"data.temperature={temperature:g} is too small for corpora of this size; raise it")
        else:
            raw = {name: float(weight or 0) for name, weight in given.items()}
        return {name: weight / sum(raw.values()) for name, weight in raw.items()}

    def _stages(self, seq_len: int, alignment: int) -> list[Stage]:
        stages: list[Stage] = []
        first = 0
        for config in self.config.stages:
            stages.append(self._stage(config, alignment, first, f"data.stages[{len(stages)}], "))
            first += config.samples
        if not stages:
            draws = []
            for name, opened in self.corpora.items():
                with errors_name_corpus(name):
                    plan = opened.plan(TRAIN, seq_len, alignment)
                draws.append(Draw(name, self.weights[name], Selection(), plan))
            stages = [Stage(draws, seq_len, 0, None, self.config.seed)]
        return stages

    def _stage(self, config: StageConfig, alignment: int, first: int, prefix: str) -> Stage:
        draws = []
        for draw in config.draws or [DrawConfig(name) for name in self.corpora]:
            name = draw.corpus
            limits = [limit for limit in (draw.max_tokens, config.max_tokens) if limit is not None]
            selection = Selection(max(draw.min_tokens, config.min_tokens), min(limits, default=None))
            opened = self.corpora[name]
            with errors_name_corpus(name, prefix):
                if isinstance(opened, Synthetic):  # probes have the length that is asked for
                    plan: Plan | SyntheticSamples = opened.plan(TRAIN, config.seq_len, alignment)
                else:
                    plan = opened.plan(TRAIN, config.seq_len, alignment, selection)
            draws.append(Draw(name, self.weights[name] if draw.weight is None else draw.weight, selection, plan))
        return Stage(draws, config.seq_len, first, config.samples, self.config.seed)

    def _validation_stages(self, seq_len: int, alignment: int) -> list[Stage]:
        """One stage of the held-out documents of all corpora, by weight; none when no corpus has any."""
        draws = []
        for name, opened in self.corpora.items():
            # Probes are endless, and their loss cannot be compared with that of text.
            plan = None if isinstance(opened, Synthetic) else opened.samples(VALIDATION, seq_len, alignment)
            if plan is not None:
                assert isinstance(plan, Plan)
                draws.append(Draw(name, self.weights[name], Selection(), plan))
        if not draws:
            return []
        num_samples = sum(draw.plan.num_samples for draw in draws)
        return [Stage(draws, seq_len, 0, num_samples, self.config.seed)]


def block_counts(weights: list[float]) -> np.ndarray:
    """int64 [weights]: counts in proportion to weights that sum to a block. The largest remainders are rounded up."""
    shares = np.array(weights, dtype=np.float64) / sum(weights) * BLOCK_SAMPLES
    counts = np.floor(shares).astype(np.int64)
    for number in np.argsort(counts - shares, kind="stable")[: BLOCK_SAMPLES - int(counts.sum())]:
        counts[number] += 1
    return counts


def _check_paths(config: DataConfig) -> None:
    """Raise DataError if a local path of a corpus does not exist. Its files are listed when the corpus is opened."""
    import fsspec

    for name in ("path", "validation_path"):
        path = getattr(config, name)
        if path is None or config.source == "hf" or is_remote(path):
            continue
        system, root = fsspec.core.url_to_fs(path)
        # A prefix of shards (source=megatron) is not a file itself.
        if not any(system.exists(root + ending) for ending in ("", ".idx")) and not system.glob(root):
            raise DataError(f"data.{name}={path}: no such file or directory, and no file matches it as a glob")


def _open(config: DataConfig, progress: bool) -> TokenCorpus | Synthetic:
    if config.source != "synthetic":
        return open_corpus(config, progress=progress)
    if config.tokenizer is None:
        raise DataError(
            "probes use the tokenizer of the other corpora: set data.tokenizer, or add a corpus of text to train one on"
        )
    return Synthetic(config)


def _train_tokenizer(config: DataConfig) -> str | None:
    """Train a tokenizer on the training splits of all corpora of text, or find it; None when there are none."""
    corpora = []
    for corpus in config.corpora:
        if corpus.source in RAW:
            one = corpus_config(config, corpus, None)
            with errors_name_corpus(corpus.name):
                corpora.append(Corpus(one))
    if not corpora:
        return None
    request = [[corpus.identity() for corpus in corpora], config.tokenizer_type, config.vocab_size, TRAINING_CHARACTERS]
    directory = Path(config.cache_dir) / f"tokenizer-{fingerprint_of(request)[:16]}"

    def texts() -> Iterator[str]:
        return (piece.text for corpus in corpora for piece in corpus.pieces() if piece.split == TRAIN)

    return train_tokenizer_once(directory, texts, config)
