"""The tasks of probes. They follow long-context benchmarks (RULER, arXiv 2404.06654; MQAR, arXiv 2312.04927).

    needle      one fact, one question: "The number of K is V."
    multikey    many such facts, and questions about some of them
    multiquery  more facts and questions: the dense form, in which recall is learned fastest
    multivalue  several facts give one name a number each: all its numbers, in the order of the text
    variables   chains of "VAR b = VAR a" to follow: which variables hold V?
    common      lists in which three words are frequent and all others occur once: the three, in alphabetical order
    frequent    lists in which each word occurs half as often as the one before: the three most frequent, in that order
    joint       "The friend of A is B." and, elsewhere, "The number of B is V.": the number of A's friend. It takes two
                lookups, and only the first gives the key of the second.
    chain       chains of two to four "VAR b = VAR a" in random order: the number that the last variable holds
    count       words that occur one to nine times each: how often does one of them occur?

A task is a function of random numbers and a length. It returns facts, each in parts that are tokenized separately, and
questions with their answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_pipeline.packing.order import mix64

_SUBJECTS = "the old man,a small bird,the river,every morning train,her brother,the teacher,our garden,the north wind"
_VERBS = "watches,passes,remembers,follows,leaves behind,looks at,cannot find,waits for"
_OBJECTS = "the grey hills,an empty street,the white house,its own shadow,a letter,the harbour,two stones,the light"
FILLER = [
    f"{subject[0].upper()}{subject[1:]} {verb} {thing}.\n"
    for subject in _SUBJECTS.split(",")
    for verb in _VERBS.split(",")
    for thing in _OBJECTS.split(",")
]
_PAIR_TOKENS = 128  # multikey: tokens of the probe per fact
_DENSE_PAIR_TOKENS = 64  # multiquery: likewise
_MAX_PAIRS = 1024
_QUESTIONS, _DENSE_QUESTIONS, _HOPS, _CHAINS, _VALUES = 4, 16, 4, 3, 4
_WORD_TOKENS = 24  # common, frequent: tokens of the probe per word of a list
_MAX_WORDS, _WORDS_PER_LINE, _ASKED_WORDS = 512, 8, 3
_JOINT_TOKENS, _JOINT_QUESTIONS = 128, 8  # joint: tokens of the probe per pair of facts, and the most questions
_CHAIN_TOKENS, _MAX_CHAINS = 256, 4  # chain: tokens of the probe per chain, and the most chains
_COUNTED_TOKENS, _MAX_COUNTED, _MAX_COUNT = 256, 4, 9  # count: tokens per word, most words, most occurrences

Fact = tuple[str, ...]


class Question(NamedTuple):
    """A question at the end of a probe.

    Attributes:
        text: the question, up to where the answer begins.
        answer: what the model is to write.
        needs: words. The answer needs every fact that contains one of them; None: the words of the answer.
    """

    text: str
    answer: str
    needs: str | None = None


FactsAndQuestions = tuple[list[Fact], list[Question]]


class KeyedRandom:
    """Pseudo-random integers from a key, the same in all versions of all libraries."""

    def __init__(self, key: int) -> None:
        self._key, self._taken = np.uint64(key), 0

    def integers(self, count: int, below: int) -> np.ndarray:
        """int64 [count]: the next integers, each in range(below)."""
        counter = np.arange(self._taken, self._taken + count, dtype=np.uint64)
        self._taken += count
        return (mix64(counter ^ self._key) % np.uint64(below)).astype(np.int64)

    def distinct(self, count: int, below: int) -> list[int]:
        """`count` distinct integers in range(below), in random order."""
        found: dict[int, None] = {}
        while len(found) < count:
            found.update(dict.fromkeys(self.integers(count, below).tolist()))
        return list(found)[:count]


def is_needed(fact: Fact, question: Question) -> bool:
    """Whether the answer to a question needs a fact."""
    words = set("".join(fact).replace(",", " ").replace(".", " ").split())
    needs = question.answer if question.needs is None else question.needs
    return not words.isdisjoint(needs.replace(",", " ").split())


def _word(number: int) -> str:
    """A name of six letters, alternating consonants and vowels."""
    letters = []
    for alphabet in ("bcdfghjklmnprstvwz", "aeiou") * 3:
        number, letter = divmod(number, len(alphabet))
        letters.append(alphabet[letter])
    return "".join(letters)


_WORDS = (18 * 5) ** 3


def _pairs(random: KeyedRandom, num_pairs: int, num_questions: int) -> FactsAndQuestions:
    keys = [_word(number) for number in random.distinct(num_pairs, _WORDS)]
    values = [str(100_000 + number) for number in random.distinct(num_pairs, 900_000)]
    facts: list[Fact] = [(f"The number of {key} is", f" {value}", ".\n") for key, value in zip(keys, values)]
    asked = random.distinct(num_questions, num_pairs)
    return facts, [
        Question(f"What is the number of {keys[n]}? The number of {keys[n]} is", f" {values[n]}") for n in asked
    ]


def _needle(random: KeyedRandom, num_tokens: int) -> FactsAndQuestions:
    return _pairs(random, 1, 1)


def _multikey(random: KeyedRandom, num_tokens: int) -> FactsAndQuestions:
    num_pairs = min(max(num_tokens // _PAIR_TOKENS, 2), _MAX_PAIRS)
    return _pairs(random, num_pairs, min(_QUESTIONS, num_pairs))


def _multiquery(random: KeyedRandom, num_tokens: int) -> FactsAndQuestions:
    num_pairs = min(max(num_tokens // _DENSE_PAIR_TOKENS, 1), _MAX_PAIRS)
    return _pairs(random, num_pairs, min(_DENSE_QUESTIONS, num_pairs))


def _multivalue(random: KeyedRandom, num_tokens: int) -> FactsAndQuestions:
    keys = [_word(number) for number in random.distinct(3, _WORDS)]
    values = [str(100_000 + number) for number in random.distinct(3 * _VALUES, 900_000)]
    order = random.distinct(3 * _VALUES, 3 * _VALUES)
    facts: list[Fact] = [(f"A number of {keys[n % 3]} is", f" {values[n]}", ".\n") for n in order]
    asked = int(random.integers(1, 3)[0])
    told = [f" {values[n]}" for n in order if n % 3 == asked]
    return facts, [Question(f"Which are the numbers of {keys[asked]}? They are", "".join(told))]


def _variables(random: KeyedRandom, num_tokens: int) -> FactsAndQuestions:
    names = [_word(number) for number in random.distinct(_CHAINS * _HOPS, _WORDS)]
    values = [str(100_000 + number) for number in random.distinct(_CHAINS, 900_000)]
    chains = [names[n * _HOPS : (n + 1) * _HOPS] for n in range(_CHAINS)]
    lines = []
    for chain, value in zip(chains, values):
        tellings = [value, *(f"VAR {name}" for name in chain)]
        lines.append([(f"VAR {name} = {told}\n",) for name, told in zip(chain, tellings)])
    # The chains are interleaved; the lines of each keep their order.
    facts: list[Fact] = []
    while any(lines):
        waiting = [chain for chain in lines if chain]
        facts.append(waiting[int(random.integers(1, len(waiting))[0])].pop(0))
    asked = int(random.integers(1, _CHAINS)[0])
    answer = "".join(f" {name}" for name in chains[asked])
    return facts, [Question(f"Which variables hold {values[asked]}? They are", answer)]


def _lists(random: KeyedRandom, counts: list[int]) -> tuple[list[Fact], list[str]]:
    """Lines of words in random order, in which word n occurs `counts[n]` times; and the words."""
    words = [_word(number) for number in random.distinct(len(counts), _WORDS)]
    entries = [word for word, count in zip(words, counts) for _ in range(count)]
    entries = [entries[n] for n in random.distinct(len(entries), len(entries))]
    lines = [entries[n : n + _WORDS_PER_LINE] for n in range(0, len(entries), _WORDS_PER_LINE)]
    return [(f"Words: {', '.join(line)}.\n",) for line in lines], words


def _common(random: KeyedRandom, num_tokens: int) -> FactsAndQuestions:
    size = min(max(num_tokens // _WORD_TOKENS, 12), _MAX_WORDS)
    often = size // (2 * _ASKED_WORDS)
    facts, words = _lists(random, [often] * _ASKED_WORDS + [1] * (size - _ASKED_WORDS * often))
    asked = sorted(words[:_ASKED_WORDS])
    return facts, [
        Question("Which three words are the most common, by the alphabet? They are", "".join(f" {w}" for w in asked))
    ]


def _frequent(random: KeyedRandom, num_tokens: int) -> FactsAndQuestions:
    size = min(max(num_tokens // _WORD_TOKENS, 16), _MAX_WORDS)
    counts = []
    while size > 1:
        counts.append(size // 2)
        size -= size // 2
    facts, words = _lists(random, counts)
    told = "".join(f" {word}" for word in words[:_ASKED_WORDS])
    return facts, [Question("Which three words are the most frequent, the first first? They are", told)]


def _joint(random: KeyedRandom, num_tokens: int) -> FactsAndQuestions:
    pairs = min(max(num_tokens // _JOINT_TOKENS, 2), _MAX_PAIRS)
    words = [_word(number) for number in random.distinct(2 * pairs, _WORDS)]
    names, friends = words[:pairs], words[pairs:]
    values = [str(100_000 + number) for number in random.distinct(pairs, 900_000)]
    told: list[Fact] = [(f"The friend of {name} is", f" {friend}", ".\n") for name, friend in zip(names, friends)]
    told += [(f"The number of {friend} is", f" {value}", ".\n") for friend, value in zip(friends, values)]
    facts = [told[n] for n in random.distinct(len(told), len(told))]
    asked = random.distinct(min(_JOINT_QUESTIONS, pairs), pairs)
    return facts, [
        Question(f"What is the number of the friend of {names[n]}? It is", f" {values[n]}", f"{friends[n]} {values[n]}")
        for n in asked
    ]


def _chain(random: KeyedRandom, num_tokens: int) -> FactsAndQuestions:
    num_chains = min(max(num_tokens // _CHAIN_TOKENS, 1), _MAX_CHAINS)
    hops = (2 + random.integers(num_chains, 3)).tolist()
    names = [_word(number) for number in random.distinct(sum(hops), _WORDS)]
    values = [str(100_000 + number) for number in random.distinct(num_chains, 900_000)]
    chains = [[names.pop() for _ in range(count)] for count in hops]
    told: list[Fact] = []
    for chain, value in zip(chains, values):
        origins = [f" {value}", *(f" VAR {name}" for name in chain)]
        told += [(f"VAR {name} =", origin, "\n") for name, origin in zip(chain, origins)]
    facts = [told[n] for n in random.distinct(len(told), len(told))]
    return facts, [
        Question(f"What number does VAR {chain[-1]} hold? It is", f" {value}", " ".join([*chain, value]))
        for chain, value in zip(chains, values)
    ]


def _count(random: KeyedRandom, num_tokens: int) -> FactsAndQuestions:
    num_words = min(max(num_tokens // _COUNTED_TOKENS, 1), _MAX_COUNTED)
    words = [_word(number) for number in random.distinct(num_words, _WORDS)]
    counts = (1 + random.integers(num_words, _MAX_COUNT)).tolist()
    told: list[Fact] = [(f"Seen: {word}.\n",) for word, count in zip(words, counts) for _ in range(count)]
    facts = [told[n] for n in random.distinct(len(told), len(told))]
    return facts, [Question(f"How often was {w} seen? Count:", f" {n}", w) for w, n in zip(words, counts)]


TASKS: dict[str, Callable[[KeyedRandom, int], FactsAndQuestions]] = {
    "needle": _needle,
    "multikey": _multikey,
    "multiquery": _multiquery,
    "multivalue": _multivalue,
    "variables": _variables,
    "common": _common,
    "frequent": _frequent,
    "joint": _joint,
    "chain": _chain,
    "count": _count,
}
