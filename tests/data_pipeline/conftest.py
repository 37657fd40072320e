import json
import random
from pathlib import Path

import pytest

from data_pipeline import DataConfig, prepare
from data_pipeline.tokenizer import train_tokenizer

REPOSITORY = Path(__file__).parents[2]
WORDS = "attention summary chunk window token layer model tensor rank shard plan order sample loader pack index".split()


def write_corpus(path: Path, num_documents: int, seed: int = 0, mean_words: int = 60) -> list[str]:
    """A JSONL file of seeded texts of very different lengths; returns the texts."""
    rng = random.Random(seed)
    texts = []
    for number in range(num_documents):
        num_words = int(rng.expovariate(1 / mean_words)) + 1
        words = [rng.choice(WORDS) + rng.choice(["", "\n", "s", "ed", "()", " = 1"]) for _ in range(num_words)]
        texts.append(f"# document {number}\n" + " ".join(words))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return texts


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A small BPE model."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    texts = write_corpus(path.with_suffix(".jsonl"), 200)
    train_tokenizer(texts, path, 400)
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, model_path):
    """A prepared corpus of 300 documents."""
    root = tmp_path_factory.mktemp("prepared")
    write_corpus(root / "corpus.jsonl", 300, seed=1)
    return prepare(
        DataConfig(
            source="jsonl",
            path=str(root / "corpus.jsonl"),
            tokenizer=str(model_path),
            cache_dir=str(root / "cache"),
            validation_fraction=0.1,
        )
    )
