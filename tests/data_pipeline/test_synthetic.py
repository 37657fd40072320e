import hashlib
import re

import numpy as np
import pytest

from data_pipeline import IGNORE_INDEX, DataConfig, DataError, Loader, Tokenizer, open_data


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


def test_the_random_numbers_are_frozen(data):
    from data_pipeline.probe_tasks import TASKS, Numbers

    told = repr([TASKS[task](Numbers(42), 1024) for task in ("needle", "multikey", "variables")])
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "0c88a7dc251d4874"
