"""Long-context probes, generated on the fly: sample i is a function of (tokenizer, seed, seq_len, tasks, i).

A probe is one document of (nearly) a given number of tokens: facts hidden in filler, and questions at its end. Only the
tokens of the answers carry loss, so the mean loss, or the share of them predicted right, measures recall over the
length of the probe. What the tasks ask is told in `data_pipeline.probe_tasks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.data import TrainingData
from data_pipeline.errors import DataError
from data_pipeline.order import derive_key
from data_pipeline.probe_tasks import FILLER, TASKS, Numbers, holds_answer
from data_pipeline.samples import IGNORE_INDEX, PackedSample, Samples
from data_pipeline.sources import SPLITS
from data_pipeline.storage import build_once, fingerprint_of, write_json
from data_pipeline.tokenizer import Tokenizer, train_tokenizer

_SAMPLE, _EVALUATION = 7, 8
_ALGORITHM = 2


@dataclass(frozen=True, eq=False)
class Probe:
    """One document with questions.

    Attributes:
        tokens: int64 [n], the end-of-text token last.
        answers: spans [begin, end) of `tokens`, one per question.
        distances: tokens between the end of the furthest fact that an answer needs and the answer, one per question.
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

    def write(self, task: str, random: Numbers, num_tokens: int, depth: float | None = None) -> Probe:
        """A probe of at most `num_tokens`, and less by no more than a line of filler.

        `depth` puts all facts at that share of the filler (0 at the beginning, 1 before the questions); without it they
        are spread at random. Raises DataError when the task does not fit.
        """
        facts, questions = TASKS[task](random, num_tokens)
        encode = self._tokenizer.encode
        # Each part is encoded for itself, so an answer has the same tokens where it is told and where it is asked.
        told = [np.concatenate([encode(part) for part in fact]) for fact in facts]
        asked: list[np.ndarray] = []
        spans: list[tuple[int, int]] = []  # from the beginning of the questions
        size = 0
        for question, answer in questions:
            parts = [encode(question), encode(answer), encode("\n")]
            spans.append((size + parts[0].size, size + parts[0].size + parts[1].size))
            size += sum(part.size for part in parts)
            asked += parts
        room = num_tokens - 1 - size - sum(fact.size for fact in told)
        if room < 0:
            raise DataError(
                f"data.tasks: {task} needs {num_tokens - room} tokens and does not fit into seq_len={num_tokens}; "
                f"raise seq_len, or leave the task out"
            )
        body, ends = self._hide(told, room, random, depth)
        text = np.concatenate([*body, *asked, np.array([self._tokenizer.eos_id])])
        first = text.size - 1 - size
        answers = [(first + begin, first + end) for begin, end in spans]
        distances = []
        for (begin, _), (_, answer) in zip(answers, questions):
            needed = [end for end, fact in zip(ends, facts) if holds_answer(fact, answer)]
            distances.append(begin - min(needed))
        return Probe(text, answers, distances)

    def _hide(
        self, facts: list[np.ndarray], room: int, random: Numbers, depth: float | None
    ) -> tuple[list[np.ndarray], list[int]]:
        """Filler of at most `room` tokens with the facts, in order, between its lines; and where each fact ends."""
        chosen = random.numbers(room // int(self._filler_lengths.min()) + 1, len(self._filler))
        count = int(np.searchsorted(np.cumsum(self._filler_lengths[chosen]), room, side="right"))
        lines = [self._filler[number] for number in chosen[:count].tolist()]
        if depth is None:
            places = np.sort(random.numbers(len(facts), count + 1)).tolist()
        else:
            places = [round(depth * count)] * len(facts)
        for place, fact in reversed(list(zip(places, facts))):
            lines.insert(place, fact)
        after = np.cumsum([line.size for line in lines])
        return lines, [int(after[place + number]) for number, place in enumerate(places)]


def evaluation_probes(
    tokenizer: Tokenizer, task: str, num_tokens: int, count: int, seed: int, depth: float | None = None
) -> list[Probe]:
    """Probes that no training sample has been made of, whatever its seed."""
    writer = ProbeWriter(tokenizer)
    keys = [derive_key(_EVALUATION, seed, num_tokens, number) for number in range(count)]
    return [writer.write(task, Numbers(key), num_tokens, depth) for key in keys]


class Synthetic(TrainingData):
    """The data of `data.source=synthetic`. Without `data.tokenizer` one is trained on such texts."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.tokenizer_path = Path(config.tokenizer or _train(config))
        self.tokenizer = Tokenizer(self.tokenizer_path)
        self.vocab_size = self.tokenizer.vocab_size
        made_of = [_ALGORITHM, self.tokenizer.fingerprint, config.seed, list(config.tasks), config.probe_tokens]
        self.fingerprint = fingerprint_of(made_of)

    def _samples(self, split: str, seq_len: int, alignment: int) -> SyntheticSamples:
        # Both splits are without end and have no sample in common.
        if alignment < 1 or seq_len < alignment or seq_len % alignment:
            raise DataError(f"seq_len={seq_len} must be a multiple of alignment={alignment}")
        return SyntheticSamples(self.tokenizer, self.config, split, seq_len, alignment)

    def plan(self, split: str, seq_len: int, alignment: int) -> SyntheticSamples:
        """The samples of a split, as a source of a mixture."""
        return self._samples(split, seq_len, alignment)

    def report(self) -> list[str]:
        """See TrainingData."""
        return [f"synthetic probes, generated: {', '.join(self.config.tasks)} in turn"]


class SyntheticSamples(Samples):
    """Sample i is a probe of task `tasks[i % len(tasks)]`, or with `data.probe_tokens` a pack of shorter ones."""

    num_samples = 1 << 62

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, split: str, seq_len: int, alignment: int) -> None:
        self._writer, self._tasks, self._split = ProbeWriter(tokenizer), config.tasks, SPLITS.index(split)
        self._seed, self.seq_len = config.seed, seq_len
        self._shortest, self._longest = config.probe_tokens or (seq_len, seq_len)
        self._alignment = alignment
        self.statistics: dict[str, dict[int, float]] = {"tokens_beyond": {}}
        self.identity = {
            "tokenizer": tokenizer.fingerprint,
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
        """Sample `index`; DataError when its task does not fit."""
        random = Numbers(derive_key(self._seed, _SAMPLE, self._split, index))
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

    def _length(self, random: Numbers, room: int) -> int:
        """Tokens of the next probe: the shortest, doubled at random, so that every length has as many probes."""
        doublings = (self._longest // self._shortest).bit_length()
        length = self._shortest << int(random.numbers(1, doublings)[0])
        return min(room, self._longest) if room - length < self._shortest else length


def _train(config: DataConfig) -> str:
    """Train a tokenizer on texts of all tasks."""
    request = [_ALGORITHM, config.tokenizer_type, config.vocab_size]
    directory = Path(config.cache_dir) / f"tokenizer-synthetic-{fingerprint_of(request)[:16]}"

    def build(target: Path) -> None:
        texts = ["".join(FILLER)]
        for number in range(300):
            for task in TASKS.values():
                facts, questions = task(Numbers(derive_key(_SAMPLE, number)), 1024)
                told = ["".join(fact) for fact in facts]
                texts.append("".join([*told, *(f"{question}{answer}\n" for question, answer in questions)]))
        train_tokenizer(texts, target / "tokenizer.model", config.vocab_size, config.tokenizer_type)
        write_json(target / "finished.json", {"vocab_size": config.vocab_size})

    build_once(directory, "finished.json", build)
    return str(directory / "tokenizer.model")
