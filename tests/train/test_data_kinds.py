"""The trainer takes every kind of data the pipeline offers, and goes on where it stopped."""

import json

import pytest

from tests.ranks import run_on_ranks
from tests.train.runs import losses, run_training


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    """A tokenizer trained on the corpus, as a run would."""
    from data_pipeline import DataConfig, open_data

    cache = tmp_path_factory.mktemp("tokenizer")
    data = open_data(DataConfig(source="jsonl", path=str(corpus), vocab_size=400, cache_dir=str(cache)))
    return str(data.tokenizer_path)


@pytest.mark.parametrize("kind", ["synthetic", "stream", "mixture"])
def test_trains_and_resumes(kind, corpus, tokenizer, tmp_path):
    data = {
        "synthetic": dict(source="synthetic", path=None, tasks=["needle"]),
        "stream": dict(stream=True, validation_fraction=0.0),
        "mixture": dict(
            source="mixture",
            path=None,
            corpora=[
                {"name": "a", "source": "jsonl", "path": str(corpus), "weight": 0.75},
                {"name": "b", "source": "jsonl", "path": str(corpus), "weight": 0.25},
            ],
        ),
    }[kind]
    changes = {f"data__{key}": value for key, value in (data | dict(tokenizer=tokenizer)).items()}
    changes |= dict(run__steps=6, optim__decay_steps=2)
    straight = losses(run_on_ranks(1, run_training, str(corpus), str(tmp_path / "a"), changes)[0])
    run_on_ranks(1, run_training, str(corpus), str(tmp_path / "b"), changes | dict(run__stop_at_step=3))
    resumed = losses(run_on_ranks(2, run_training, str(corpus), str(tmp_path / "b"), changes)[0])
    assert len(straight) == 6 and resumed == pytest.approx(straight, rel=1e-5)
    state = json.loads(next((tmp_path / "b").glob("default/checkpoints/step-*6/state.json")).read_text())
    assert state["loader"]["next_sample"] == 24
