import pytest

from tests.train.runs import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A JSONL corpus; what is prepared from it lies beside it and serves every test of the session."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")
