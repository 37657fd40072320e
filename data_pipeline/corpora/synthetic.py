"""Long-context probes, generated on the fly: sample i is a function of (tokenizer, seed, seq_len, tasks, i).

A probe is one document of (nearly) a given number of tokens: facts hidden in filler, and questions at the end. Only the
tokens of the answers have labels, so the mean loss, or the share of answer tokens that are predicted correctly,
measures recall over the length of the probe. `data_pipeline.corpora.probe_tasks` describes the tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.config import SPLITS, DataConfig
from data_pipeline.corpora.probe_tasks import FILLER, TASKS, KeyedRandom, is_needed
from data_pipeline.errors import DataError
from data_pipeline.packing.order import derive_key
from data_pipeline.packing.samples import IGNORE_INDEX, PackedSample, Samples, TrainingData
from data_pipeline.store.files import fingerprint_of
from data_pipeline.text.tokenizer import Tokenizer, train_tokenizer_once

_SAMPLE, _EVALUATION = 7, 8  # the purposes of random keys
_ALGORITHM = 2
# The tasks whose texts train the tokenizer. A longer list would change every tokenizer that was trained before.
_TOKENIZER_TASKS = ("needle", "multikey", "multiquery", "multivalue", "variables", "common", "frequent")


@dataclass(frozen=True, eq=False)
class Probe:
    """One document with questions.

    Attributes:
        tokens: int64 [n], the end-of-text token last.
        answers: spans [begin, end) of `tokens`, one per question.
        distances: tokens from the end of the furthest fact that an answer needs to the answer, one per question.
    """

    tokens: np.ndarray
    answers: list[tuple[int, int]]
    distances: list[int]


class ProbeWriter:
    """Writes probes in a tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._filler = [tokenizer.encode(line) for line in FILLER]
        self._filler_lengths = np.array([line.size for line in self._filler])

    def write(self, task: str, random: KeyedRandom, num_tokens: int, depth: float | None = None) -> Probe:
        """A probe of at most `num_tokens` tokens, shorter by at most one line of filler.

        Args:
            task: a key of `TASKS`.
            random: chooses facts, questions and filler.
            num_tokens: length of the probe.
            depth: all facts stand at this share of the filler (0: the beginning, 1: before the questions); None: they
                are spread at random.

        Raises:
            DataError: the task does not fit.
        """
        facts, questions = TASKS[task](random, num_tokens)
        encode = self._tokenizer.encode
        # Parts are encoded separately, so an answer has the same tokens in its fact and after its question.
        encoded_facts = [np.concatenate([encode(part) for part in fact]) for fact in facts]
        encoded_questions: list[np.ndarray] = []
        spans: list[tuple[int, int]] = []  # from the beginning of the questions
        size = 0
        for question in questions:
            parts = [encode(question.text), encode(question.answer), encode("\n")]
            spans.append((size + parts[0].size, size + parts[0].size + parts[1].size))
            size += sum(part.size for part in parts)
            encoded_questions += parts
        room = num_tokens - 1 - size - sum(fact.size for fact in encoded_facts)
        if room < 0:
            raise DataError(
                f"data.tasks: {task} needs {num_tokens - room} tokens and does not fit into seq_len={num_tokens}; "
                f"raise seq_len, or leave the task out"
            )
        body, ends = self._hide_facts(encoded_facts, room, random, depth)
        text = np.concatenate([*body, *encoded_questions, np.array([self._tokenizer.eos_id])])
        first = text.size - 1 - size
        answers = [(first + begin, first + end) for begin, end in spans]
        distances = []
        for (begin, _), question in zip(answers, questions):
            needed = [end for end, fact in zip(ends, facts) if is_needed(fact, question)]
            distances.append(begin - min(needed))
        return Probe(text, answers, distances)

    def _hide_facts(
        self, facts: list[np.ndarray], room: int, random: KeyedRandom, depth: float | None
    ) -> tuple[list[np.ndarray], list[int]]:
        """Lines of filler of at most `room` tokens with the facts, in order, between them; and where each fact ends."""
        chosen = random.integers(room // int(self._filler_lengths.min()) + 1, len(self._filler))
        count = int(np.searchsorted(np.cumsum(self._filler_lengths[chosen]), room, side="right"))
        lines = [self._filler[number] for number in chosen[:count].tolist()]
        if depth is None:
            line_numbers = np.sort(random.integers(len(facts), count + 1)).tolist()
        else:
            line_numbers = [round(depth * count)] * len(facts)
        for line_number, fact in reversed(list(zip(line_numbers, facts))):
            lines.insert(line_number, fact)
        ends = np.cumsum([line.size for line in lines])
        return lines, [int(ends[line_number + number]) for number, line_number in enumerate(line_numbers)]


def evaluation_probes(
    tokenizer: Tokenizer, task: str, num_tokens: int, count: int, seed: int, depth: float | None = None
) -> list[Probe]:
    """`count` probes that are in no training sample of any seed. The other arguments are as in `ProbeWriter.write`."""
    writer = ProbeWriter(tokenizer)
    keys = [derive_key(_EVALUATION, seed, num_tokens, number) for number in range(count)]
    return [writer.write(task, KeyedRandom(key), num_tokens, depth) for key in keys]


class Synthetic(TrainingData):
    """The data of `data.source=synthetic`. Without `data.tokenizer`, one is trained on texts of all tasks."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.tokenizer_path = Path(config.tokenizer or _train_tokenizer(config))
        self.tokenizer = Tokenizer(self.tokenizer_path, config.end_token)
        self.vocab_size = self.tokenizer.vocab_size
        identity = [_ALGORITHM, self.tokenizer.fingerprint, config.seed, list(config.tasks), config.probe_tokens]
        self.fingerprint = fingerprint_of([*identity, *self.tokenizer.identity.values()])

    def _samples(self, split: str, seq_len: int, alignment: int) -> SyntheticSamples:
        # Both splits are endless and have no sample in common.
        if alignment < 1 or seq_len < alignment or seq_len % alignment:
            raise DataError(f"seq_len={seq_len} must be a multiple of alignment={alignment}")
        return SyntheticSamples(self.tokenizer, self.config, split, seq_len, alignment)

    def plan(self, split: str, seq_len: int, alignment: int) -> SyntheticSamples:
        """The samples of a split, for a draw of a mixture."""
        return self._samples(split, seq_len, alignment)

    def report(self) -> list[str]:
        """See `TrainingData`."""
        return [f"synthetic probes, generated: {', '.join(self.config.tasks)} in turn"]


class SyntheticSamples(Samples):
    """Sample i is a probe of task `tasks[i % len(tasks)]`, or with `data.probe_tokens` a pack of shorter probes."""

    num_samples = 1 << 62

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, split: str, seq_len: int, alignment: int) -> None:
        self._writer, self._tasks, self._split = ProbeWriter(tokenizer), config.tasks, SPLITS.index(split)
        self._seed, self.seq_len = config.seed, seq_len
        self._shortest, self._longest = config.probe_tokens or (seq_len, seq_len)
        self._alignment = alignment
        self.statistics: dict[str, dict[int, float]] = {"tokens_beyond": {}}
        self.identity = {
            "tokenizer": tokenizer.fingerprint,
            **tokenizer.identity,
            "seed": config.seed,
            "tasks": list(config.tasks),
            "split": split,
            "seq_len": seq_len,
            "algorithm": _ALGORITHM,
        }
        if config.probe_tokens is not None:
            self.identity |= {"probe_tokens": list(config.probe_tokens), "alignment": alignment}
        self.fingerprint = fingerprint_of(self.identity)

    def at(self, index: int) -> PackedSample:
        """Sample `index`. Raises DataError when its task does not fit."""
        random = KeyedRandom(derive_key(self._seed, _SAMPLE, self._split, index))
        tokens = np.zeros(self.seq_len, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORE_INDEX, dtype=np.int64)
        starts: list[int] = []
        lengths: list[int] = []
        start = 0
        while start == 0 or self.seq_len - start >= self._shortest:
            task = self._tasks[(index + len(starts)) % len(self._tasks)]
            probe = self._writer.write(task, random, self._length(random, self.seq_len - start))
            tokens[start : start + probe.tokens.size] = probe.tokens
            for begin, stop in probe.answers:
                labels[start + begin - 1 : start + stop - 1] = probe.tokens[begin:stop]
            starts.append(start)
            lengths.append(probe.tokens.size)
            start += -(-probe.tokens.size // self._alignment) * self._alignment
        return PackedSample(
            tokens=tokens,
            labels=labels,
            doc_starts=np.array(starts, dtype=np.int64),
            doc_lengths=np.array(lengths, dtype=np.int64),
            continuation=np.zeros(len(starts), dtype=bool),
            index=index,
        )

    def _length(self, random: KeyedRandom, room: int) -> int:
        """Tokens of the next probe: the shortest length, doubled a random number of times, uniformly distributed."""
        doublings = (self._longest // self._shortest).bit_length()
        length = self._shortest << int(random.integers(1, doublings)[0])
        return min(room, self._longest) if room - length < self._shortest else length


def _train_tokenizer(config: DataConfig) -> str:
    """Train a tokenizer on texts of `_TOKENIZER_TASKS`, or find it in the cache; returns its path."""
    request = [_ALGORITHM, config.tokenizer_type, config.vocab_size]
    directory = Path(config.cache_dir) / f"tokenizer-synthetic-{fingerprint_of(request)[:16]}"

    def texts() -> Iterator[str]:
        yield "".join(FILLER)
        for number in range(300):
            for task in _TOKENIZER_TASKS:
                facts, questions = TASKS[task](KeyedRandom(derive_key(_SAMPLE, number)), 1024)
                statements = ["".join(fact) for fact in facts]
                yield "".join([*statements, *(f"{question.text}{question.answer}\n" for question in questions)])

    return train_tokenizer_once(directory, texts, config)
