import re
from collections import Counter

import numpy as np
import pytest

from data_pipeline import IGNORE_INDEX, DataConfig, DataError, Loader, Tokenizer, open_data
from data_pipeline.corpora.synthetic import evaluation_probes
from tests.data_pipeline.corpora.test_probe_tasks import solve


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    cache = tmp_path_factory.mktemp("synthetic")
    return open_data(DataConfig(source="synthetic", vocab_size=512, cache_dir=str(cache)))


def text_and_answers(data, sample):
    """The text before the answers of a sample, and the answers, as they are labelled."""
    length = int(sample.doc_lengths[0])
    tokenizer = data.tokenizer
    where = np.flatnonzero(sample.labels != IGNORE_INDEX)
    assert np.array_equal(sample.labels[where], sample.tokens[where + 1])
    runs = np.split(where, np.flatnonzero(np.diff(where) > 1) + 1)
    answers = [tokenizer.decode(sample.labels[run]) for run in runs]
    assert sample.tokens[length - 1] == tokenizer.eos_id and not sample.tokens[length:].any()
    return tokenizer.decode(sample.tokens[:length]), answers


@pytest.mark.parametrize("seq_len", [512, 4096, 20_000])
def test_the_answers_are_what_the_text_says(data, seq_len):
    samples = data.samples("train", seq_len, 8)
    tasks = []
    for index in range(9):
        sample = samples.at(index)
        text, answers = text_and_answers(data, sample)
        assert sample.doc_lengths[0] > seq_len - 40 and sample.index == index
        numbers = dict(re.findall(r"The number of (\w+) is (\d{6})\.\n", text))
        questions = re.findall(r"What is the number of (\w+)\?", text)
        if questions:
            assert answers == [f" {numbers[key]}" for key in questions]
            tasks.append("needle" if len(numbers) == 1 else "multikey")
            assert len(numbers) in (1, seq_len // 128)
        else:
            values = {}
            for name, told in re.findall(r"VAR (\w+) = (\d{6}|VAR \w+)\n", text):
                values[name] = told if told.isdigit() else values[told[4:]]  # told before it is used
            (asked,) = re.findall(r"Which variables hold (\d{6})\?", text)
            (answer,) = answers
            assert sorted(answer.split()) == sorted(name for name, value in values.items() if value == asked)
            assert len(values) == 12
            tasks.append("variables")
    assert tasks == ["needle", "multikey", "variables"] * 3


def test_a_sample_is_a_function_of_seed_and_index(data, tmp_path):
    samples, again = data.samples("train", 1024, 8), data.samples("train", 1024, 8)
    one = [samples.at(index).tokens.tobytes() for index in (0, 5, 10**12)]
    assert one == [again.at(index).tokens.tobytes() for index in (0, 5, 10**12)] and len(set(one)) == 3
    other = open_data(
        DataConfig(source="synthetic", tokenizer=str(data.tokenizer_path), cache_dir=str(tmp_path), seed=1)
    )
    assert other.samples("train", 1024, 8).at(0).tokens.tobytes() != one[0]
    assert data.samples("validation", 1024, 8).at(0).tokens.tobytes() != one[0]
    loader = Loader(samples, samples_per_step=2, dp_rank=1, dp_size=2)
    loader.next_step()
    state = loader.state()
    loader.load_state(state)
    assert loader.next_step()[0].index == 3
    loader.close()
    loader = Loader(other.samples("train", 1024, 8), samples_per_step=2, dp_rank=0, dp_size=1)
    with pytest.raises(DataError, match="seed was 0 and is 1"):
        loader.load_state(state)
    loader.close()


def test_depths_are_spread_over_the_sample(data):
    samples = data.samples("train", 2048, 8)
    depths = []
    for index in range(0, 300, 3):
        text, _ = text_and_answers(data, samples.at(index))
        depths.append(text.index("The number of") / len(text))
    assert 0.4 < np.mean(depths) < 0.6 and min(depths) < 0.05 and max(depths) > 0.9


def test_one_task_a_foreign_tokenizer_and_what_does_not_fit(model_path, tmp_path):
    config = DataConfig(source="synthetic", tokenizer=str(model_path), cache_dir=str(tmp_path), tasks=["variables"])
    data = open_data(config)
    assert data.vocab_size == Tokenizer(model_path).vocab_size
    text, _ = text_and_answers(data, data.samples("train", 4096, 8).at(0))
    assert "VAR " in text
    with pytest.raises(DataError, match=r"data.tasks: variables needs \d+ tokens and does not fit into seq_len=64"):
        data.samples("train", 64, 8).at(0)
    with pytest.raises(DataError, match="seq_len=60 must be a multiple of alignment=8"):
        data.samples("train", 60, 8)
    with pytest.raises(DataError, match=r"data.tasks=.* must be a list of needle, multikey, multiquery"):
        DataConfig(source="synthetic", tasks=["haystack"])


def test_a_needle_goes_where_it_is_put(data):
    for depth in (0.0, 0.3, 1.0):
        (probe,) = evaluation_probes(data.tokenizer, "needle", 4096, 1, seed=0, depth=depth)
        (begin, _), (distance,) = probe.answers[0], probe.distances
        assert (begin - distance) / begin == pytest.approx(depth, abs=0.02)


def test_evaluation_and_training_have_no_probe_in_common(data):
    trained = {
        data.samples(split, 512, 8).at(i).tokens.tobytes() for split in ("train", "validation") for i in range(9)
    }
    asked = evaluation_probes(data.tokenizer, "needle", 512, 9, seed=0)
    assert not trained & {np.pad(probe.tokens, (0, 512 - probe.tokens.size)).tobytes() for probe in asked}


def test_packs_of_shorter_probes(data, tmp_path):
    config = dict(source="synthetic", tokenizer=str(data.tokenizer_path), cache_dir=str(tmp_path))
    packed = open_data(DataConfig(**config, tasks=["multiquery"], probe_tokens=(128, 2048))).samples("train", 2048, 16)
    lengths = Counter()
    for index in range(40):
        sample = packed.at(index)
        assert not (sample.doc_starts % 16).any() and sample.doc_starts[-1] + sample.doc_lengths[-1] > 2048 - 128 - 40
        for start, length in zip(sample.doc_starts, sample.doc_lengths):
            tokens, labels = sample.tokens[start : start + length], sample.labels[start : start + length]
            lengths[1 << (int(length) + 60).bit_length() - 1] += 1
            answers = np.flatnonzero(labels != IGNORE_INDEX)
            assert answers.size and np.array_equal(labels[answers], tokens[answers + 1])
            text = data.tokenizer.decode(tokens[:-1])
            told = "".join(word for answer in solve(text) for word in answer)
            assert data.tokenizer.decode(labels[answers]).replace(" ", "") == told
    assert {128, 256, 512, 1024} <= set(lengths)
    for wrong in ((0, 8), (9, 8), (8,)):
        with pytest.raises(DataError, match=r"data.probe_tokens=.* must be two lengths, least and most, or null"):
            DataConfig(source="synthetic", probe_tokens=wrong)


def test_probes_are_part_of_a_mixture(model_path, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        (text / f"{number}.txt").write_text(f"document {number} " * 200)
    corpora = [
        dict(name="text", source="text", path=str(text), weight=0.75, validation_fraction=0.2),
        dict(name="probes", source="synthetic", weight=0.25, tasks=["multikey"], probe_tokens=[256, 512]),
    ]
    config = dict(source="mixture", tokenizer=str(model_path), cache_dir=str(tmp_path / "cache"))
    data = open_data(DataConfig(**config, corpora=corpora))
    samples = data.samples("train", 512, 8)
    asked = [
        b"What is the number" in data.corpora["text"].tokenizer.decode(samples.at(i).tokens).encode() for i in range(64)
    ]
    assert 8 <= sum(asked) <= 24  # of 16 expected
    held_out = data.samples("validation", 512, 8)
    texts = [data.corpora["text"].tokenizer.decode(held_out.at(i).tokens) for i in range(held_out.num_samples)]
    assert not any("What is the number" in text for text in texts)
    assert any("probes" in line for line in data.report())
    with pytest.raises(DataError, match=r"data.corpora\[probes\]: probes have no size: give a weight"):
        DataConfig(source="mixture", corpora=[dict(name="probes", source="synthetic")])
