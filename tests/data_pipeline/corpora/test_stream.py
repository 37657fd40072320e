import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import DataConfig, DataError, Loader, Tokenizer, open_data
from data_pipeline.corpora import stream
from data_pipeline.store.shards import ShardSet
from tests.data_pipeline.conftest import same_sample, upload, write_corpus


@pytest.fixture
def config(tmp_path, model_path):
    (tmp_path / "in").mkdir()
    for number in range(5):
        write_corpus(tmp_path / "in" / f"{number}.jsonl", 60, seed=number)
    return DataConfig(
        source="jsonl",
        stream=True,
        path=str(tmp_path / "in"),
        tokenizer=str(model_path),
        cache_dir=str(tmp_path / "cache"),
        slab_mb=0.03,
        seed=3,
    )


def documents_in(samples, tokenizer):
    """The texts of whole documents in samples long enough to cut none."""
    texts = []
    for sample in samples:
        assert not sample.continuation.any()
        for start, length in zip(sample.doc_starts.tolist(), sample.doc_lengths.tolist()):
            tokens = sample.tokens[start : start + length]
            assert tokens[-1] == tokenizer.eos_id
            texts.append(tokenizer.decode(tokens))
    return texts


def take(samples, count, state=None, rank=0, size=1, per_step=4):
    loader = Loader(samples, samples_per_step=per_step, dp_rank=rank, dp_size=size)
    if state is not None:
        loader.load_state(json.loads(json.dumps(state)))
    taken = [sample for _ in range(count) for sample in loader.next_step()]
    state = loader.state()
    loader.close()
    return taken, state


def test_every_document_once_per_epoch_in_a_new_order(config):
    tokenizer = Tokenizer(config.tokenizer)
    samples = open_data(config).samples("train", 4096, 8)
    lines = [line for path in sorted(Path(config.path).iterdir()) for line in path.read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in lines]
    epochs, seen, index = [], [], 0
    while len(epochs) < 2:
        seen += documents_in([samples.at(index)], tokenizer)
        index += 1
        if len(seen) >= len(texts):
            assert len(seen) == len(texts)  # slabs end where the epoch does
            epochs.append(seen)
            seen = []
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(texts)
    assert epochs[0] != epochs[1] and epochs[0] != texts


def test_resume_on_other_ranks_and_a_fresh_machine_goes_on_exactly(config, tmp_path):
    straight, _ = take(open_data(config).samples("train", 256, 8), 20)
    tokens = [sample.tokens.tobytes() for sample in straight]
    assert [sample.index for sample in straight] == list(range(80))
    for steps in range(0, 16, 3):
        parts = [take(open_data(config).samples("train", 256, 8), steps, rank=rank, size=2) for rank in range(2)]
        assert parts[0][1] == parts[1][1]
        state = parts[0][1]
        before = [parts[i % 2][0][i // 2] for i in range(4 * steps)]
        fresh = open_data(replace(config, cache_dir=str(tmp_path / f"fresh-{steps}")))
        after = [take(fresh.samples("train", 256, 8), 3, state, rank, 4)[0] for rank in range(4)]
        rest = [after[i % 4][i // 4] for i in range(12)]
        assert [sample.tokens.tobytes() for sample in before + rest] == tokens[: 4 * steps + 12]
        # Nothing before the slab of the state was read again.
        slabs = list((tmp_path / f"fresh-{steps}").glob("stream-*/slab-*/slab.json"))
        assert 1 <= len(slabs) <= 4


def test_a_loader_may_go_back_and_ahead(config):
    straight, _ = take(open_data(config).samples("train", 256, 8), 24)
    loader = Loader(open_data(config).samples("train", 256, 8), samples_per_step=4, dp_rank=0, dp_size=1)
    states = []
    for _ in range(20):
        states.append(loader.state())
        loader.next_step()
    for step in (2, 15, 7, 0):
        loader.load_state(states[step])
        ahead = {**loader.state(), "next_sample": 4 * step + 16}  # as when samples are skipped
        for state, first in ((states[step], 4 * step), (ahead, 4 * step + 16)):
            loader.load_state(state)
            for sample, expected in zip(loader.next_step(), straight[first : first + 4]):
                assert sample.index == expected.index and np.array_equal(sample.tokens, expected.tokens)
    loader.close()


def test_the_cache_holds_a_few_slabs_only(config):
    samples = open_data(config).samples("train", 256, 8)
    for index in range(100):
        samples.at(index)
    samples._pool.shutdown()
    assert 2 <= len(list(Path(config.cache_dir).glob("stream-*/slab-*/slab.json"))) <= 4
    assert samples.bookmark(99)["stream"]["slab"] >= 3


def test_a_slab_deleted_by_a_rank_further_on_is_made_again(config, monkeypatch):
    """Right after it was made or found, before it is opened: the files go while a slow rank is on its way to them."""
    expected = [sample.tokens.tolist() for sample in take(open_data(config).samples("train", 256, 8), 3)[0]]
    build_once, deleted = stream.build_once, []

    def and_delete(directory, *arguments, **settings):
        build_once(directory, *arguments, **settings)
        if directory.name.startswith("slab-") and directory not in deleted:
            deleted.append(directory)
            shutil.rmtree(directory)

    monkeypatch.setattr(stream, "build_once", and_delete)
    found = take(open_data(config).samples("train", 256, 8), 3)[0]
    assert deleted and [sample.tokens.tolist() for sample in found] == expected


def test_what_changed_is_refused_by_name_or_accepted_on_demand(config, model_path, tmp_path):
    _, state = take(open_data(config).samples("train", 256, 8), 3)
    path = Path(config.path) / "0.jsonl"
    changes = [
        (replace(config, seed=4), 256, "seed was 3 and is 4"),
        (config, 512, "seq_len was 256 and is 512"),
        (replace(config, slab_mb=0.1), 256, "slab_mb was 0.03 and is 0.1"),
    ]
    for changed, seq_len, message in changes:
        with pytest.raises(DataError, match=message):
            take(open_data(changed).samples("train", seq_len, 8), 1, state)
    path.write_text(path.read_text() + '{"text": "one more"}\n')
    with pytest.raises(DataError, match=r"corpus was \w+ and is \w+; set it back"):
        take(open_data(config).samples("train", 256, 8), 1, state)
    willing = open_data(replace(config, accept_changes=True)).samples("train", 256, 8)
    loader = Loader(willing, samples_per_step=4, dp_rank=0, dp_size=1)
    loader.load_state(state)
    assert [sample.index for sample in loader.next_step()] == [12, 13, 14, 15]
    loader.close()


def test_held_out_documents_come_from_a_path_of_their_own(config, tmp_path):
    assert open_data(config).samples("validation", 256, 8) is None
    held_out = write_corpus(Path(config.path) / "held.jsonl", 20, seed=99)
    data = open_data(replace(config, validation_path=str(Path(config.path) / "held.jsonl")))
    assert len(data.corpus.files) == 5
    validation = data.samples("validation", 4096, 8)
    tokenizer = Tokenizer(config.tokenizer)
    texts = documents_in([validation.sample(row) for row in range(validation.num_samples)], tokenizer)
    assert sorted(texts) == sorted(held_out)


def test_bad_lines_and_empty_corpora_surface_in_next_step(config):
    (Path(config.path) / "9.jsonl").write_text('{"text": "fine"}\n{"body": 1}\n')
    loader = Loader(open_data(config).samples("train", 256, 8), samples_per_step=1, dp_rank=0, dp_size=1)
    with pytest.raises(DataError, match=r"9.jsonl:2: lacks the key 'text'"):
        for _ in range(200):
            loader.next_step()
    loader.close()
    shutil.rmtree(config.path)
    Path(config.path).mkdir()
    (Path(config.path) / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no document of at least 2 tokens in a whole epoch"):
        open_data(config).samples("train", 256, 8).at(0)
    with pytest.raises(DataError, match=r"data.stream=true needs data.tokenizer"):
        replace(config, tokenizer=None)


def test_a_slab_is_the_same_shard_as_prepare_makes(config):
    one = replace(config, slab_mb=100, seed=0)
    samples = open_data(one).samples("train", 256, 8)
    samples.at(0)
    samples._pool.shutdown()
    (slab,) = {path.parent for path in Path(one.cache_dir).glob("stream-*/slab-*/slab.json")} - {
        samples._directory(samples._begins[1][1])
    }
    documents = ShardSet([slab / "slab"])
    prepared = open_data(replace(one, stream=False, validation_fraction=0.0)).shards("train")
    lists = [
        sorted(shards.read(i, 0, int(n)).tobytes() for i, n in enumerate(shards.lengths))
        for shards in (documents, prepared)
    ]
    assert lists[0] == lists[1] and len(lists[0]) == 300
    assert np.sort(documents.lengths).tolist() == np.sort(prepared.lengths).tolist()


def test_a_stream_of_raw_text_is_the_same_from_there(flaky, model_path, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        write_corpus(tmp_path / "in" / f"{number}.jsonl", 60, seed=number)
    url = upload(flaky, tmp_path / "in", "stream-in")
    config = DataConfig(
        source="jsonl",
        stream=True,
        path=str(tmp_path / "in"),
        tokenizer=str(model_path),
        cache_dir=str(tmp_path / "near"),
        slab_mb=0.03,
        retries=20,
    )
    near = open_data(config).samples("train", 256, 8)
    far = open_data(replace(config, path=url, cache_dir=str(tmp_path / "far"))).samples("train", 256, 8)
    assert all(same_sample(near.at(index), far.at(index)) for index in range(120))
    assert flaky.num_failures > 0 and near.bookmark(100)["stream"]["slab"] > 2
    flaky.fail_every = 1
    late = open_data(replace(config, path=str(tmp_path / "in"), cache_dir=str(tmp_path / "late")))
    late.corpus.files = tuple(replace(file, path=f"{url}/{file.name}") for file in late.corpus.files)
    late.corpus._config = replace(config, retries=1)
    with pytest.raises(DataError, match=r"stream-in/\d.jsonl cannot be read after 2 attempts"):
        late.samples("train", 256, 8).at(0)
