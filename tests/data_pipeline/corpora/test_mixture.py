from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipeline import DataConfig, DataError, Loader, open_data
from data_pipeline.corpora.mixture import BLOCK_SAMPLES, Draw, Stage, block_counts
from data_pipeline.packing.plan import Selection
from tests.data_pipeline.conftest import write_corpus

SIZES = {"short": (200, 30), "long": (60, 400), "other": (120, 80)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    for number, (name, (documents, words)) in enumerate(SIZES.items()):
        write_corpus(root / f"{name}.jsonl", documents, seed=number, mean_words=words)
    return root


@pytest.fixture(scope="module")
def config(root, model_path):
    return make(root, model_path, {"short": 0.6, "long": 0.1, "other": 0.3})


def make(root, model_path, weights, **more):
    corpora = [
        {"name": name, "source": "jsonl", "path": str(root / f"{name}.jsonl"), "weight": weight}
        for name, weight in weights.items()
    ]
    return DataConfig(
        source="mixture", corpora=corpora, tokenizer=str(model_path), cache_dir=str(root / "cache"), **more
    )


def sources_of(samples, indices, stage=0):
    """How often each source is drawn, and whether its own samples come each once per epoch."""
    drawn = {}
    for index in indices:
        source, count = samples.stages[stage].locate(index)
        drawn.setdefault(samples.stages[stage].draws[source].name, []).append(count)
    return drawn


def test_every_block_has_the_exact_share_of_each_corpus_and_repeats_nothing(config):
    samples = open_data(config).samples("train", 256, 8)
    counts = block_counts([0.6, 0.1, 0.3])
    assert counts.tolist() == [614, 103, 307] and counts.sum() == BLOCK_SAMPLES
    for block in range(3):
        drawn = sources_of(samples, range(block * BLOCK_SAMPLES, (block + 1) * BLOCK_SAMPLES))
        for (name, numbers), count in zip(sorted(drawn.items()), counts[[1, 2, 0]].tolist()):
            assert sorted(numbers) == list(range(block * count, (block + 1) * count)), name
    first = [samples.stages[0].locate(index)[0] for index in range(64)]
    assert len(set(first)) == 3 and first != sorted(first)


def test_extreme_weights_draw_beyond_an_epoch_without_an_end(root, model_path):
    """Two equal corpora, one with 1023 of 1024 samples: its samples come again in every epoch, each once."""
    corpora = [
        {"name": name, "source": "jsonl", "path": str(root / "short.jsonl"), "weight": weight}
        for name, weight in (("rare", 0.001), ("often", 0.999))
    ]
    config = DataConfig(source="mixture", corpora=corpora, tokenizer=str(model_path), cache_dir=str(root / "cache"))
    samples = open_data(config).samples("train", 256, 8)
    stage = samples.stages[0]
    assert stage.counts.tolist() == [1, 1023]
    epoch = stage.draws[1].plan.num_samples
    draws = [stage.locate(index) for index in range(4 * BLOCK_SAMPLES)]
    numbers = [number for draw, number in draws if draw == 1]
    assert sorted(numbers) == list(range(4 * 1023)) and max(numbers) > 2 * epoch
    assert [number for draw, number in draws if draw == 0] == list(range(4))
    assert (samples.at(4 * BLOCK_SAMPLES - 1).tokens != 0).any()


def test_more_corpora_than_a_byte_numbers():
    plan = SimpleNamespace(fingerprint="", num_samples=5)
    stage = Stage([Draw(str(n), 1.0, Selection(), plan) for n in range(300)], 256, 0, None, seed=3)
    drawn = [stage.locate(index)[0] for index in range(BLOCK_SAMPLES)]
    assert set(drawn) == set(range(300)) and np.bincount(drawn).tolist() == stage.counts.tolist()


def test_a_sample_is_that_of_the_corpus_packed_alone(config):
    data = open_data(config)
    samples = data.samples("train", 256, 8)
    for index in range(0, 3000, 111):
        source, count = samples.stages[0].locate(index)
        alone = list(data.corpora.values())[source].samples("train", 256, 8).at(count)
        sample = samples.at(index)
        assert np.array_equal(sample.tokens, alone.tokens) and sample.index == index


def test_the_mixture_resumes_on_other_ranks(config):
    def read(size, steps, state=None):
        loaders = []
        for rank in range(size):
            samples = open_data(config).samples("train", 256, 8)
            loaders.append(Loader(samples, samples_per_step=4, dp_rank=rank, dp_size=size))
            if state is not None:
                loaders[-1].load_state(state)
        parts = [[sample for _ in range(steps) for sample in loader.next_step()] for loader in loaders]
        state = loaders[0].state()
        for loader in loaders:
            loader.close()
        return [parts[i % size][i // size].tokens.tobytes() for i in range(4 * steps)], state

    straight, _ = read(1, 12)
    first, state = read(2, 5)
    second, _ = read(4, 7, state)
    assert first + second == straight


def test_weights_by_temperature(root, model_path):
    by_size = open_data(make(root, model_path, dict.fromkeys(SIZES))).weights
    corpora = open_data(make(root, model_path, dict.fromkeys(SIZES))).corpora
    tokens = {name: int(corpus.lengths("train").sum()) for name, corpus in corpora.items()}
    for name, weight in by_size.items():
        assert weight == pytest.approx(tokens[name] / sum(tokens.values()))
    flat = open_data(make(root, model_path, dict.fromkeys(SIZES), temperature=1e9)).weights
    assert all(weight == pytest.approx(1 / 3, rel=1e-3) for weight in flat.values())


STAGES = [
    {"seq_len": 128, "samples": 40},
    {"seq_len": 512, "samples": 30, "min_tokens": 200},
    {
        "seq_len": 1024,
        "samples": 20,
        "draws": [
            {"corpus": "long", "weight": 3, "min_tokens": 500},
            {"corpus": "long", "weight": 1, "max_tokens": 499},
        ],
    },
]


def test_stages_follow_one_another_across_runs(root, model_path):
    config = make(root, model_path, {"short": 1, "long": 1, "other": 1}, stages=STAGES)
    state = None
    seen = []
    for seq_len, count in ((128, 40), (512, 30), (1024, 20)):
        data = open_data(config)
        samples = data.samples("train", seq_len, 8)
        loader = Loader(samples, samples_per_step=2, dp_rank=0, dp_size=1, prefetch=1)
        if state is not None:
            loader.load_state(state)
        for _ in range(count // 2):
            seen += loader.next_step()
        state = loader.state()
        with pytest.raises(DataError, match=r"belongs to stage|comes after the 90 samples of data.stages"):
            loader.next_step()
        loader.close()
    assert [sample.index for sample in seen] == list(range(90))
    assert [len(sample.tokens) for sample in seen] == [128] * 40 + [512] * 30 + [1024] * 20
    for sample in seen[40:70]:
        assert sample.doc_lengths[~sample.continuation].min(initial=200) >= 200
    lines = "\n".join(data.report_stages(samples))
    assert "stage 2: seq_len 1,024, from sample 70, 20 samples" in lines
    assert "long, documents of 500 to any tokens: 15 of" in lines and "epochs, repeated" in lines
    assert "tokens in documents longer than 8192: 0.0%" in lines
    assert "corpus long, weight 0.3333" in "\n".join(data.report())
    # A stage appended later changes nothing before it, but is a change that must be wanted.
    longer = replace(config, stages=(*config.stages, config.stages[0]))
    more = open_data(longer).samples("train", 128, 8)
    assert np.array_equal(more.at(7).tokens, seen[7].tokens)
    loader = Loader(more, samples_per_step=2, dp_rank=0, dp_size=1)
    with pytest.raises(DataError, match=r"stages was .* set it back"):
        loader.load_state(state)
    loader.close()
    with pytest.raises(DataError, match=r"seq_len=64 is none of the lengths of data.stages \(128, 512, 1024\)"):
        open_data(config).samples("train", 64, 8)


def test_changed_weights_and_corpora_are_refused_by_name(root, model_path, config):
    loader = Loader(open_data(config).samples("train", 256, 8), samples_per_step=1, dp_rank=0, dp_size=1)
    state = loader.state()
    loader.close()
    for weights, message in (
        ({"short": 0.5, "long": 0.2, "other": 0.3}, r"weights was \[\[614, 103, 307\]\] and is \[\[512, 205, 307\]\]"),
        ({"short": 0.6, "long": 0.4}, "corpora.other was .* and is None"),
    ):
        samples = open_data(make(root, model_path, weights)).samples("train", 256, 8)
        loader = Loader(samples, samples_per_step=1, dp_rank=0, dp_size=1)
        with pytest.raises(DataError, match=message):
            loader.load_state(state)
        loader.close()


def test_validation_comes_from_all_corpora_and_a_tokenizer_is_trained_on_all(root, model_path):
    config = replace(make(root, model_path, {"short": 1, "long": 1}), tokenizer=None, vocab_size=350)
    data = open_data(config)
    assert data.vocab_size == 350 and data.fingerprint == open_data(config).fingerprint
    assert data.samples("validation", 64, 8) is None or data.samples("validation", 64, 8).num_samples > 0


def stage_of(**changes):
    """A mixture of one corpus with one stage."""
    return {"corpora": [{"name": "a", "source": "stdlib"}], "stages": [{"seq_len": 64, "samples": 1} | changes]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"corpora": []}, "data.source=mixture needs data.corpora"),
        ({"corpora": [{"name": "a"}]}, "data.corpora[0].source must be given"),
        (
            {"corpora": [{"name": "a", "source": "text", "paht": "x"}]},
            "data.corpora[0].paht is not a configuration key; did you mean data.corpora[0].path?",
        ),
        ({"corpora": [{"name": "a", "source": "mixture"}]}, "data.corpora[a].source='mixture' must be one of stdlib"),
        ({"corpora": [{"name": "a", "source": "stdlib", "weight": 0}]}, "data.corpora[a].weight=0.0 must be above 0"),
        ({"corpora": [{"name": "a", "source": "stdlib"}] * 2}, "the name 'a' is given twice"),
        (
            {"corpora": [{"name": "a", "source": "stdlib", "weight": 1}, {"name": "b", "source": "stdlib"}]},
            "b lack a weight",
        ),
        (
            {"corpora": [{"name": "a", "source": "stdlib"}], "stages": [{"seq_len": 8, "samples": 0}]},
            "samples=0 must be at least 1",
        ),
        (
            {
                "corpora": [{"name": "abc", "source": "stdlib"}],
                "stages": [{"seq_len": 8, "samples": 1, "draws": [{"corpus": "abd"}]}],
            },
            "draw from 'abd', which is no corpus; the nearest is 'abc'",
        ),
        (
            {
                "corpora": [{"name": "a", "source": "stdlib"}],
                "stages": [{"seq_len": 8, "samples": 1, "min_tokens": 9, "max_tokens": 8}],
            },
            "min_tokens=9 and max_tokens=8 leave no length",
        ),
        ({"corpora": [{"name": 1, "source": "stdlib"}]}, "data.corpora[0].name=1 must be a string"),
        (
            {"corpora": [{"name": "a", "source": "stdlib", "weight": "x"}]},
            "data.corpora[0].weight='x' must be a number",
        ),
        (
            {"corpora": [{"name": "a", "source": "stdlib"}, {"name": "b", "source": "jsonl"}]},
            "data.corpora[b]: data.source=jsonl needs data.path",
        ),
        (
            {"corpora": [{"name": "b", "source": "synthetic", "weight": 1, "tasks": ["nedle"]}]},
            "data.corpora[b]: data.tasks=('nedle',) must be a list of needle",
        ),
        (
            {"corpora": [{"name": "b", "source": "synthetic", "weight": 1, "path": "x"}]},
            "data.corpora[b]: data.path='x' has no meaning for data.source=synthetic",
        ),
        (
            {"corpora": [{"name": "b", "source": "shards", "path": "x", "validation_path": "y"}]},
            "data.corpora[b]: data.validation_path='y' has no meaning for data.source=shards",
        ),
        (stage_of(seq_len="64"), "data.stages[0].seq_len='64' must be a whole number"),
        (stage_of(samples=10.5), "data.stages[0].samples=10.5 must be a whole number"),
        (stage_of(min_tokens="9"), "min_tokens='9' must be a whole number"),
        (stage_of(draws=[{"corpus": "a", "max_tokens": 9.5}]), "max_tokens=9.5 must be a whole number"),
        (stage_of(draws=[{"corpus": "a", "weight": "x"}]), "data.stages[0].draws[0].weight='x' must be a number"),
        (stage_of(draws=[{"corpus": 3}]), "data.stages[0].draws[0].corpus=3 must be a string"),
    ],
)
def test_bad_mixtures_are_named(values, message):
    with pytest.raises(DataError) as error:
        DataConfig(source="mixture", **values)
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"belong to data\.source=mixture, not stdlib"):
        DataConfig(corpora=[{"name": "a", "source": "stdlib"}])


def test_a_weight_too_small_for_a_block_is_refused(root, model_path):
    with pytest.raises(DataError, match=r"data.corpora\[long\]: a weight of .* less than one sample in 1024"):
        open_data(make(root, model_path, {"short": 1, "long": 0.0001})).samples("train", 256, 8)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({"source": "jsonl", "path": "absent.jsonl"}, "data.path=absent.jsonl: no such file or directory"),
        ({"source": "text", "path": "absent/*.txt"}, "data.path=absent/*.txt: no such file or directory"),
        ({"source": "shards", "path": "absent"}, "data.path=absent: no such file or directory"),
        ({"source": "megatron", "path": "absent"}, "data.path=absent: no such file or directory"),
    ],
)
def test_all_corpora_are_checked_before_the_first_is_tokenized(
    root, model_path, tmp_path, monkeypatch, corpus, message
):
    monkeypatch.chdir(tmp_path)
    corpora = [{"name": "a", "source": "jsonl", "path": str(root / "short.jsonl")}, {"name": "b", **corpus}]
    config = DataConfig(source="mixture", corpora=corpora, tokenizer=str(model_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError) as error:
        open_data(config)
    assert str(error.value).startswith(f"data.corpora[b]: {message}")
    assert not (tmp_path / "cache").exists()


def test_what_is_wrong_in_a_corpus_is_said_of_it(root, model_path, tmp_path):
    (tmp_path / "bad.jsonl").write_text("[]\n")
    corpora = [{"name": "b", "source": "jsonl", "path": str(tmp_path / "bad.jsonl")}]
    config = DataConfig(source="mixture", corpora=corpora, tokenizer=str(model_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"^data.corpora\[b\]: .*bad.jsonl:1: is not a JSON object"):
        open_data(config)


def test_a_stage_without_a_document_is_named(root, model_path):
    stages = [{"seq_len": 64, "samples": 1}, {"seq_len": 128, "samples": 1, "min_tokens": 10**6}]
    data = open_data(make(root, model_path, {"short": 1, "long": 1}, stages=stages))
    with pytest.raises(
        DataError, match=r"^data.stages\[1\], data.corpora\[short\]: no document .* 1000000 to any"
    ) as error:
        data.samples("train", 64, 8)
    assert "\n" not in str(error.value)
