import hashlib
import re
from collections import Counter

import pytest

from data_pipeline import DataConfig, open_data
from data_pipeline.corpora.probe_tasks import FILLER, TASKS, KeyedRandom
from data_pipeline.corpora.synthetic import evaluation_probes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    cache = tmp_path_factory.mktemp("synthetic")
    return open_data(DataConfig(source="synthetic", vocab_size=512, cache_dir=str(cache)))


def test_the_random_numbers_are_frozen(data):
    made = [TASKS[task](KeyedRandom(42), 1024) for task in ("needle", "multikey", "variables")]
    told = repr([(facts, [(question.text, question.answer) for question in asked]) for facts, asked in made])
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "0c88a7dc251d4874"


def solve(text):
    """Answers to all questions of a probe, from its text alone."""
    body, found = text, []
    numbers = dict(re.findall(r"The number of (\w+) is (\d{6})\.\n", body))
    several: dict[str, list[str]] = {}
    for name, number in re.findall(r"A number of (\w+) is (\d{6})\.\n", body):
        several.setdefault(name, []).append(number)
    counts = Counter(word for line in re.findall(r"Words: (.*)\.\n", body) for word in line.split(", "))
    holds: dict[str, str] = {}
    for name, told in re.findall(r"VAR (\w+) = (\d{6}|VAR \w+)\n", body):
        holds[name] = told if told.isdigit() else holds.get(told[4:], "")  # in `chain` the origin may come later
    friends = dict(re.findall(r"The friend of (\w+) is (\w+)\.\n", body))
    told = dict(re.findall(r"VAR (\w+) = (VAR \w+|\d{6})\n", body))
    seen = Counter(re.findall(r"Seen: (\w+)\.\n", body))
    for line in body.split("\n"):
        if match := re.match(r"What is the number of the friend of (\w+)\?", line):
            found.append([numbers[friends[match[1]]]])
        elif match := re.match(r"What number does VAR (\w+) hold\?", line):
            value = told[match[1]]
            while not value.isdigit():
                value = told[value[4:]]
            found.append([value])
        elif match := re.match(r"How often was (\w+) seen\?", line):
            found.append([str(seen[match[1]])])
        elif match := re.match(r"What is the number of (\w+)\?", line):
            found.append([numbers[match[1]]])
        elif match := re.match(r"Which are the numbers of (\w+)\?", line):
            found.append(several[match[1]])
        elif match := re.match(r"Which variables hold (\d+)\?", line):
            found.append([name for name, value in holds.items() if value == match[1]])
        elif line.startswith("Which three words are the most common"):
            found.append(sorted(word for word, _ in counts.most_common(3)))
        elif line.startswith("Which three words are the most frequent"):
            found.append([word for word, _ in counts.most_common(3)])
            assert len({count for _, count in counts.most_common(4)}) == 4
    return found


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_the_one_that_a_solver_finds(data, task):
    for num_tokens in (512, 1000, 3000):
        for probe in evaluation_probes(data.tokenizer, task, num_tokens, 3, seed=5):
            text = data.tokenizer.decode(probe.tokens[:-1])
            answers = [data.tokenizer.decode(probe.tokens[begin:end]).split() for begin, end in probe.answers]
            assert answers == solve(text) and num_tokens - 40 < probe.tokens.size <= num_tokens
            # Before an answer, as far back as its distance says, stands the last token of a fact.
            for (begin, _), distance in zip(probe.answers, probe.distances):
                before = data.tokenizer.decode(probe.tokens[: begin - distance])
                assert before.endswith("\n") and not before.endswith(tuple(FILLER))
    expected = {"multikey": 4, "multiquery": 16, "joint": 8, "chain": 4, "count": 4}.get(task, 1)
    assert len(probe.answers) == expected
