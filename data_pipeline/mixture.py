"""Several corpora in one order of samples, by weight, and stages of different sample lengths one after the other.

Weights count samples, which are all about equally full, so they are shares of tokens. In every block of 1024 samples
each source has its exact number of them, at places that a keyed permutation chooses; so the n-th sample of a source is
in closed form a function of the global index, and any index can be reached at once.

A source is a corpus, or the documents of it in a range of lengths: a stage of million-token samples can draw half of
them from documents of 128k tokens and more. Each source is packed for itself. A document may be met again in another
stage (each has packs of its own); `report` says how often a source is repeated.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import RAW, DataConfig, StageConfig, corpus_config, named_corpus
from data_pipeline.data import TokenCorpus, TrainingData, open_corpus
from data_pipeline.errors import DataError
from data_pipeline.order import derive_key, permute
from data_pipeline.packing import Plan, Selection
from data_pipeline.remote import is_remote
from data_pipeline.samples import PackedSample, Samples
from data_pipeline.sources import TRAIN, VALIDATION, Corpus
from data_pipeline.storage import build_once, fingerprint_of, write_json
from data_pipeline.synthetic import Synthetic, SyntheticSamples
from data_pipeline.tokenizer import TRAINING_CHARACTERS, train_tokenizer

BLOCK_SAMPLES = 1024
_BLOCK_ORDER = 6
_ALGORITHM = 1


@dataclass(frozen=True)
class Source:
    """What one line of a stage draws from.

    Attributes:
        name: of the corpus.
        weight: share of the samples, relative to the others.
        selection: lengths of documents.
        plan: their packing.
    """

    name: str
    weight: float
    selection: Selection
    plan: Plan | SyntheticSamples


class Stage:
    """A stretch of samples of one length: a weighted choice of sources.

    Attributes:
        first_sample: its place in the global order.
        num_samples: None without end.
        counts: int64, samples of each source in a block of 1024.
    """

    def __init__(
        self, sources: list[Source], seq_len: int, first_sample: int, num_samples: int | None, seed: int
    ) -> None:
        self.sources, self.seq_len, self.seed = sources, seq_len, seed
        self.first_sample, self.num_samples = first_sample, num_samples
        self.counts = block_counts([source.weight for source in sources])
        for source, count in zip(sources, self.counts.tolist()):
            if not count:
                raise DataError(
                    f"data.corpora[{source.name}]: a weight of {source.weight:g} among {len(sources)} is less than one "
                    f"sample in {BLOCK_SAMPLES}; raise it, or leave the corpus out"
                )
        self._ends = np.cumsum(self.counts)

    def place(self, index: int) -> tuple[int, int]:
        """The source of sample `index` of the global order, by number, and which sample of that source it is."""
        block, position = divmod(index - self.first_sample, BLOCK_SAMPLES)
        # The key tells stages apart by where they begin, so that a stage appended later changes nothing before it.
        key = derive_key(self.seed, _BLOCK_ORDER, self.first_sample, block)
        slot = int(permute(np.array([position]), BLOCK_SAMPLES, key)[0])
        source = int(np.searchsorted(self._ends, slot, side="right"))
        first = int(self._ends[source - 1]) if source else 0
        return source, block * int(self.counts[source]) + slot - first

    def drawn(self) -> np.ndarray:
        """int64 [sources]: samples drawn from each in the whole stage, or in one block of a stage without end."""
        if self.num_samples is None:
            return self.counts
        whole, rest = divmod(self.num_samples, BLOCK_SAMPLES)
        last = [self.place(self.first_sample + whole * BLOCK_SAMPLES + i)[0] for i in range(rest)]
        return whole * self.counts + np.bincount(last, minlength=len(self.sources))


class MixtureSamples(Samples):
    """The samples of all stages. A run reads those of its own `seq_len`; the next stage is another run, which goes on
    from the state of this one."""

    def __init__(self, stages: list[Stage], seq_len: int, identity: dict[str, Any]) -> None:
        self.stages, self.seq_len, self.identity = stages, seq_len, identity
        self.fingerprint = fingerprint_of(identity)
        self._firsts = [stage.first_sample for stage in stages]
        last = stages[-1]
        self.num_samples = 1 << 62 if last.num_samples is None else last.first_sample + last.num_samples

    def at(self, index: int) -> PackedSample:
        """Sample `index`; DataError when it belongs to a stage of another length, or comes after the last stage."""
        number = bisect_right(self._firsts, index) - 1
        stage = self.stages[number]
        if index >= self.num_samples:
            raise DataError(f"sample {index} comes after the {self.num_samples} samples of data.stages: append a stage")
        if stage.seq_len != self.seq_len:
            raise DataError(
                f"sample {index} belongs to stage {number} of data.stages with seq_len={stage.seq_len}, this run has "
                f"seq_len={self.seq_len}: go on with seq_len={stage.seq_len}, resuming from this run's checkpoint"
            )
        source, count = stage.place(index)
        return replace(stage.sources[source].plan.at(count), index=index)

    def will_need(self, index: int) -> None:
        """See Samples."""
        stage = self.stages[bisect_right(self._firsts, index) - 1]
        if index < self.num_samples and stage.seq_len == self.seq_len:
            source, count = stage.place(index)
            stage.sources[source].plan.will_need(count)


class Mixture(TrainingData):
    """The data of `data.source=mixture`. Without `data.tokenizer` one is trained on all its texts together.

    Attributes:
        corpora: the corpora by name.
        weights: their weights, adding up to 1.
    """

    def __init__(self, config: DataConfig, *, progress: bool = False) -> None:
        self.config = config
        for corpus in config.corpora:  # all of them, before the first is tokenized for hours
            one = corpus_config(config, corpus, config.tokenizer)
            with named_corpus(corpus.name):
                _check_paths(one)
        tokenizer = config.tokenizer or _train_tokenizer(config)
        self.corpora: dict[str, TokenCorpus | Synthetic] = {}
        for corpus in config.corpora:
            one = corpus_config(config, corpus, tokenizer)
            with named_corpus(corpus.name):
                self.corpora[corpus.name] = _open(one, progress)
        first = next(iter(self.corpora.values()))
        self.tokenizer_path, self.vocab_size = first.tokenizer_path, first.vocab_size
        for name, opened in self.corpora.items():
            if opened.tokenizer.fingerprint != first.tokenizer.fingerprint:
                raise DataError(
                    f"data.corpora[{name}]: its shards were made with tokenizer {opened.tokenizer.fingerprint}, those "
                    f"of {config.corpora[0].name} with {first.tokenizer.fingerprint}; a mixture has one tokenizer"
                )
        self.fingerprint = fingerprint_of([[name, opened.fingerprint] for name, opened in self.corpora.items()])
        self.weights = self._weights()

    def _samples(self, split: str, seq_len: int, alignment: int) -> Samples | None:
        # Validation samples come from all corpora that hold documents out, by their weights.
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
            [stage.first_sample, stage.seq_len, [[s.name, s.plan.fingerprint] for s in stage.sources]]
            for stage in stages
        ]
        identity["weights"] = [stage.counts.tolist() for stage in stages]
        return MixtureSamples(stages, seq_len, identity)

    def report(self) -> list[str]:
        """See TrainingData."""
        lines = []
        for name, opened in self.corpora.items():
            lines.append(f"corpus {name}, weight {self.weights[name]:.4f}")
            lines += [f"  {line}" for line in opened.report()]
        return lines

    def report_stages(self, samples: MixtureSamples) -> list[str]:
        """What each stage draws, and how often that repeats its sources."""
        lines = []
        for number, stage in enumerate(samples.stages):
            length = "without end; of 1024 samples" if stage.num_samples is None else f"{stage.num_samples:,} samples"
            lines.append(f"stage {number}: seq_len {stage.seq_len:,}, from sample {stage.first_sample:,}, {length}")
            for source, drawn in zip(stage.sources, stage.drawn().tolist()):
                epochs = drawn / source.plan.num_samples
                beyond = source.plan.statistics["tokens_beyond"].items()
                limits = (source.selection.min_tokens, source.selection.max_tokens)
                chosen = "" if limits == (0, None) else f", documents of {limits[0]:,} to {limits[1] or 'any'} tokens"
                lines.append(
                    f"  {source.name}{chosen}: {drawn:,} of {source.plan.num_samples:,} samples, {epochs:.2f} epochs"
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
            raw = {name: max(n, 1) ** (1 / self.config.temperature) for name, n in tokens.items()}
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
            sources = []
            for name, opened in self.corpora.items():
                with named_corpus(name):
                    plan = opened.plan(TRAIN, seq_len, alignment)
                sources.append(Source(name, self.weights[name], Selection(), plan))
            stages = [Stage(sources, seq_len, 0, None, self.config.seed)]
        return stages

    def _stage(self, config: StageConfig, alignment: int, first: int, place: str) -> Stage:
        sources = []
        draws = [(draw.corpus, draw.weight, draw.min_tokens, draw.max_tokens) for draw in config.draws]
        for name, weight, least, most in draws or [(name, None, 0, None) for name in self.corpora]:
            limits = [limit for limit in (most, config.max_tokens) if limit is not None]
            selection = Selection(max(least, config.min_tokens), min(limits, default=None))
            opened = self.corpora[name]
            with named_corpus(name, place):
                if isinstance(opened, Synthetic):  # as long as they are asked for
                    plan: Plan | SyntheticSamples = opened.plan(TRAIN, config.seq_len, alignment)
                else:
                    plan = opened.plan(TRAIN, config.seq_len, alignment, selection)
            sources.append(Source(name, self.weights[name] if weight is None else weight, selection, plan))
        return Stage(sources, config.seq_len, first, config.samples, self.config.seed)

    def _validation_stages(self, seq_len: int, alignment: int) -> list[Stage]:
        sources = []
        for name, opened in self.corpora.items():
            # Probes have no end, and their loss is no loss of a text.
            plan = None if isinstance(opened, Synthetic) else opened.samples(VALIDATION, seq_len, alignment)
            if plan is not None:
                assert isinstance(plan, Plan)
                sources.append(Source(name, self.weights[name], Selection(), plan))
        if not sources:
            return []
        num_samples = sum(source.plan.num_samples for source in sources)
        return [Stage(sources, seq_len, 0, num_samples, self.config.seed)]


def block_counts(weights: list[float]) -> np.ndarray:
    """Whole numbers in proportion to weights that add up to a block: the largest remainders are rounded up."""
    shares = np.array(weights, dtype=np.float64) / sum(weights) * BLOCK_SAMPLES
    counts = np.floor(shares).astype(np.int64)
    for number in np.argsort(counts - shares, kind="stable")[: BLOCK_SAMPLES - int(counts.sum())]:
        counts[number] += 1
    return counts


def _check_paths(config: DataConfig) -> None:
    """Refuse local paths of a corpus where there is nothing. Only a look: the files are listed when it is opened."""
    import fsspec

    for name in ("path", "validation_path"):
        path = getattr(config, name)
        if path is None or config.source == "hf" or is_remote(path):
            continue
        system, root = fsspec.core.url_to_fs(path)
        # A prefix of shards (source=megatron) is no file by itself.
        if not any(system.exists(root + ending) for ending in ("", ".idx")) and not system.glob(root):
            raise DataError(f"data.{name}={path}: no such file or directory, and no file matches it as a glob")


def _open(config: DataConfig, progress: bool) -> TokenCorpus | Synthetic:
    if config.source != "synthetic":
        return open_corpus(config, progress=progress)
    if config.tokenizer is None:
        raise DataError(
            "probes are written in the tokens of the other corpora: give data.tokenizer, or a corpus of text to train "
            "one on"
        )
    return Synthetic(config)


def _train_tokenizer(config: DataConfig) -> str | None:
    """Train a tokenizer on the training splits of all corpora of text; None when there is no text."""
    corpora = []
    for corpus in config.corpora:
        if corpus.source in RAW:
            one = corpus_config(config, corpus, None)
            with named_corpus(corpus.name):
                corpora.append(Corpus(one))
    if not corpora:
        return None
    request = [[corpus.identity() for corpus in corpora], config.tokenizer_type, config.vocab_size, TRAINING_CHARACTERS]
    directory = Path(config.cache_dir) / f"tokenizer-{fingerprint_of(request)[:16]}"

    def build(target: Path) -> None:
        texts = (piece.text for corpus in corpora for piece in corpus.pieces() if piece.split == TRAIN)
        train_tokenizer(texts, target / "tokenizer.model", config.vocab_size, config.tokenizer_type)
        write_json(target / "finished.json", {"vocab_size": config.vocab_size})

    build_once(directory, "finished.json", build)
    return str(directory / "tokenizer.model")
