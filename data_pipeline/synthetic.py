"""Long-context probes, generated on the fly: sample i is a function of (tokenizer, seed, seq_len, tasks, i).

Each sample is one document of (nearly) `seq_len` tokens: facts hidden in filler, and questions at its end. Only the
tokens of the answers carry loss, so the mean loss, or the share of them predicted right, measures recall over the
length of the sample. The tasks are those of long-context benchmarks (RULER, arXiv 2404.06654):

    needle      one fact at a random depth: "The number of K is V."
    multikey    many such facts, and questions about some of them
    variables   chains "VAR b = VAR a" to be followed: which variables hold V?
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.data import TrainingData
from data_pipeline.errors import DataError
from data_pipeline.order import derive_key, mix64
from data_pipeline.samples import IGNORE_INDEX, PackedSample, Samples
from data_pipeline.sources import SPLITS
from data_pipeline.storage import build_once, fingerprint_of, write_json
from data_pipeline.tokenizer import Tokenizer, train_tokenizer

_SAMPLE = 7
_ALGORITHM = 1
_SUBJECTS = "the old man,a small bird,the river,every morning train,her brother,the teacher,our garden,the north wind"
_VERBS = "watches,passes,remembers,follows,leaves behind,looks at,cannot find,waits for"
_OBJECTS = "the grey hills,an empty street,the white house,its own shadow,a letter,the harbour,two stones,the light"
_FILLER = [
    f"{subject[0].upper()}{subject[1:]} {verb} {thing}.\n"
    for subject in _SUBJECTS.split(",")
    for verb in _VERBS.split(",")
    for thing in _OBJECTS.split(",")
]
_PAIR_TOKENS = 128  # multikey: one fact for so many tokens of the sample,
_MOST_PAIRS = 1024  # and no more than this
_QUESTIONS, _HOPS, _CHAINS = 4, 4, 3


class Synthetic(TrainingData):
    """The data of `data.source=synthetic`. Without `data.tokenizer` one is trained on such texts."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.tokenizer_path = Path(config.tokenizer or _train(config))
        self.tokenizer = Tokenizer(self.tokenizer_path)
        self.vocab_size = self.tokenizer.vocab_size
        self.fingerprint = fingerprint_of([_ALGORITHM, self.tokenizer.fingerprint, config.seed, list(config.tasks)])

    def _samples(self, split: str, seq_len: int, alignment: int) -> Samples:
        # Both splits are without end and have no sample in common.
        if alignment < 1 or seq_len < alignment or seq_len % alignment:
            raise DataError(f"seq_len={seq_len} must be a multiple of alignment={alignment}")
        return SyntheticSamples(self.tokenizer, self.config, split, seq_len)

    def report(self) -> list[str]:
        """See TrainingData."""
        return [f"synthetic probes, generated: {', '.join(self.config.tasks)} in turn"]


class SyntheticSamples(Samples):
    """Sample i has task `tasks[i % len(tasks)]`."""

    num_samples = 1 << 62

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, split: str, seq_len: int) -> None:
        self._tokenizer, self._tasks, self._split = tokenizer, config.tasks, SPLITS.index(split)
        self._seed, self.seq_len = config.seed, seq_len
        self.identity = {
            "tokenizer": tokenizer.fingerprint,
            "seed": config.seed,
            "tasks": list(config.tasks),
            "split": split,
            "seq_len": seq_len,
            "algorithm": _ALGORITHM,
        }
        self.fingerprint = fingerprint_of(self.identity)
        self._filler = [tokenizer.encode(line) for line in _FILLER]
        self._filler_lengths = np.array([line.size for line in self._filler])

    def at(self, index: int) -> PackedSample:
        """Sample `index`; DataError when its task does not fit into `seq_len`."""
        task = self._tasks[index % len(self._tasks)]
        random = _Random(derive_key(self._seed, _SAMPLE, self._split, index))
        facts, questions = _TASKS[task](random, self.seq_len)
        encode = self._tokenizer.encode
        # Each part is encoded for itself, so an answer has the same tokens where it is told and where it is asked.
        told = [np.concatenate([encode(part) for part in fact]) for fact in facts]
        asked: list[np.ndarray] = []
        answers: list[tuple[int, int]] = []  # from the beginning of the questions
        size = 0
        for question, answer in questions:
            parts = [encode(question), encode(answer), encode("\n")]
            answers.append((size + parts[0].size, size + parts[0].size + parts[1].size))
            size += sum(part.size for part in parts)
            asked += parts
        room = self.seq_len - 1 - size - sum(fact.size for fact in told)
        if room < 0:
            raise DataError(
                f"data.tasks: {task} needs {self.seq_len - room} tokens and does not fit into seq_len={self.seq_len}; "
                f"raise seq_len, or leave the task out"
            )
        body = self._hide(told, room, random)
        end = np.array([self._tokenizer.eos_id])
        text = np.concatenate([*body, *asked, end])
        first = text.size - 1 - size
        tokens = np.zeros(self.seq_len, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORE_INDEX, dtype=np.int64)
        tokens[: text.size] = text
        for begin, stop in answers:
            labels[first + begin - 1 : first + stop - 1] = text[first + begin : first + stop]
        return PackedSample(
            tokens=tokens,
            labels=labels,
            doc_starts=np.zeros(1, dtype=np.int64),
            doc_lengths=np.array([text.size], dtype=np.int64),
            continuation=np.zeros(1, dtype=bool),
            index=index,
        )

    def _hide(self, facts: list[np.ndarray], room: int, random: _Random) -> list[np.ndarray]:
        """Filler of at most `room` tokens with the facts, in their order, between its lines."""
        chosen = random.numbers(room // int(self._filler_lengths.min()) + 1, len(self._filler))
        count = int(np.searchsorted(np.cumsum(self._filler_lengths[chosen]), room, side="right"))
        lines = [self._filler[number] for number in chosen[:count].tolist()]
        for depth, fact in reversed(list(zip(np.sort(random.numbers(len(facts), count + 1)).tolist(), facts))):
            lines.insert(depth, fact)
        return lines


class _Random:
    """Random numbers from a key, the same in every version of every library."""

    def __init__(self, key: int) -> None:
        self._key, self._taken = np.uint64(key), 0

    def numbers(self, count: int, below: int) -> np.ndarray:
        """int64 [count] in range(below)."""
        counter = np.arange(self._taken, self._taken + count, dtype=np.uint64)
        self._taken += count
        return (mix64(counter ^ self._key) % np.uint64(below)).astype(np.int64)

    def different(self, count: int, below: int) -> list[int]:
        """Different numbers in range(below), in random order."""
        found: dict[int, None] = {}
        while len(found) < count:
            found.update(dict.fromkeys(self.numbers(count, below).tolist()))
        return list(found)[:count]


def _word(number: int) -> str:
    """A name of six letters, consonant and vowel in turn."""
    letters = []
    for alphabet in ("bcdfghjklmnprstvwz", "aeiou") * 3:
        number, letter = divmod(number, len(alphabet))
        letters.append(alphabet[letter])
    return "".join(letters)


_WORDS = (18 * 5) ** 3
Parts = tuple[str, ...]
Task = tuple[list[Parts], list[tuple[str, str]]]


def _pairs(random: _Random, num_pairs: int, num_questions: int) -> Task:
    keys = [_word(number) for number in random.different(num_pairs, _WORDS)]
    values = [str(100_000 + number) for number in random.different(num_pairs, 900_000)]
    facts: list[Parts] = [(f"The number of {key} is", f" {value}", ".\n") for key, value in zip(keys, values)]
    asked = random.different(num_questions, num_pairs)
    return facts, [(f"What is the number of {keys[n]}? The number of {keys[n]} is", f" {values[n]}") for n in asked]


def _needle(random: _Random, seq_len: int) -> Task:
    return _pairs(random, 1, 1)


def _multikey(random: _Random, seq_len: int) -> Task:
    num_pairs = min(max(seq_len // _PAIR_TOKENS, 2), _MOST_PAIRS)
    return _pairs(random, num_pairs, min(_QUESTIONS, num_pairs))


def _variables(random: _Random, seq_len: int) -> Task:
    names = [_word(number) for number in random.different(_CHAINS * _HOPS, _WORDS)]
    values = [str(100_000 + number) for number in random.different(_CHAINS, 900_000)]
    chains = [names[n * _HOPS : (n + 1) * _HOPS] for n in range(_CHAINS)]
    lines = []
    for chain, value in zip(chains, values):
        tellings = [value, *(f"VAR {name}" for name in chain)]
        lines.append([(f"VAR {name} = {told}\n",) for name, told in zip(chain, tellings)])
    # The lines of a chain keep their order, the chains are mixed.
    facts: list[Parts] = []
    while any(lines):
        waiting = [chain for chain in lines if chain]
        facts.append(waiting[int(random.numbers(1, len(waiting))[0])].pop(0))
    asked = int(random.numbers(1, _CHAINS)[0])
    return facts, [(f"Which variables hold {values[asked]}? They are", "".join(f" {name}" for name in chains[asked]))]


_TASKS: dict[str, Callable[[_Random, int], Task]] = {
    "needle": _needle,
    "multikey": _multikey,
    "variables": _variables,
}


def _train(config: DataConfig) -> str:
    """Train a tokenizer on texts of all tasks."""
    request = [_ALGORITHM, config.tokenizer_type, config.vocab_size]
    directory = Path(config.cache_dir) / f"tokenizer-synthetic-{fingerprint_of(request)[:16]}"

    def build(target: Path) -> None:
        texts = ["".join(_FILLER)]
        for number in range(300):
            for task in _TASKS.values():
                facts, questions = task(_Random(derive_key(_SAMPLE, number)), 1024)
                told = ["".join(fact) for fact in facts]
                texts.append("".join([*told, *(f"{question}{answer}\n" for question, answer in questions)]))
        train_tokenizer(texts, target / "tokenizer.model", config.vocab_size, config.tokenizer_type)
        write_json(target / "finished.json", {"vocab_size": config.vocab_size})

    build_once(directory, "finished.json", build)
    return str(directory / "tokenizer.model")
