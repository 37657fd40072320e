import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline import DataConfig, DataError, Tokenizer, build_plan
from data_pipeline.store.shards import ShardSet
from data_pipeline.text.prepare import open_prepared, prepare
from data_pipeline.text.sources import Corpus
from tests.data_pipeline.conftest import REPOSITORY, assert_same_files, upload, write_corpus


def files_below(directory):
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(directory).rglob("*") if path.is_file()
    }


def run(*arguments, **options):
    command = [sys.executable, "-m", "data_pipeline.prepare", *arguments]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_every_document_is_in_the_shards_in_order_with_its_end_token(config):
    data = prepare(replace(config, validation_fraction=0.2))
    tokenizer = Tokenizer(data.tokenizer_path)
    expected = {"train": [], "validation": []}
    for piece in Corpus(replace(config, validation_fraction=0.2)).pieces():
        expected[piece.split].append([*tokenizer.encode(piece.text).tolist(), tokenizer.eos_id])
    for split, prefixes in (("train", data.train), ("validation", data.validation)):
        shards = ShardSet(prefixes)
        found = [shards.read(i, 0, int(n)).tolist() for i, n in enumerate(shards.lengths)]
        assert found == expected[split] and len(found) > 5
        summary = data.manifest["splits"][split]
        assert summary["documents"] == len(found) and summary["tokens"] == sum(map(len, found))
        for bucket in summary["length_histogram"]:
            most = bucket["at_most_tokens"]
            inside = [len(tokens) for tokens in found if most // 2 < len(tokens) <= most]
            assert (bucket["documents"], bucket["tokens"]) == (len(inside), sum(inside))
        for shard in summary["shards"]:
            for ending in ("bin", "idx"):
                content = (data.directory / f"{shard['name']}.{ending}").read_bytes()
                assert hashlib.sha256(content).hexdigest() == shard[f"sha256_{ending}"]
    assert data.vocab_size == tokenizer.vocab_size == 400
    assert data.directory.parent == Path(config.cache_dir) and data.directory.name.startswith("corpus-")


def test_a_second_call_does_no_work(config):
    first = prepare(config)
    files = files_below(config.cache_dir)
    second = prepare(config)
    assert second == first and files_below(config.cache_dir) == files
    # Settings that do not change the tokens share them.
    assert prepare(replace(config, seed=9, prefetch_samples=1)).directory == first.directory


def test_a_trained_tokenizer_sees_the_training_split_only(config):
    data = prepare(replace(config, tokenizer=None, vocab_size=330, validation_fraction=0.0))
    assert data.validation == [] and data.vocab_size == 330
    held_out = Path(config.path).with_name("held_out.jsonl")
    held_out.write_text(json.dumps({"text": "ẅẍÿẑ " * 5000}) + "\n")
    other = prepare(replace(config, tokenizer=None, vocab_size=330, validation_path=str(held_out)))
    assert other.directory != data.directory
    assert Tokenizer(other.tokenizer_path).fingerprint == Tokenizer(data.tokenizer_path).fingerprint


def test_what_changes_the_tokens_changes_the_directory_and_the_fingerprint(config, tmp_path):
    first = prepare(config)
    time.sleep(0.01)
    write_corpus(Path(config.path), 100, seed=3)
    changed = prepare(config)
    assert changed.directory != first.directory and changed.fingerprint != first.fingerprint


def test_a_copied_corpus_has_the_same_fingerprint(config, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "corpus.jsonl"
    copy.write_bytes(Path(config.path).read_bytes())
    os.utime(copy, (1, 1))
    first, second = prepare(config), prepare(replace(config, path=str(copy)))
    assert first.directory != second.directory and first.fingerprint == second.fingerprint
    plans = [build_plan(data.train, 64, 8, 0, config.cache_dir) for data in (first, second)]
    assert plans[0].fingerprint == plans[1].fingerprint


def documents_of(prefixes):
    shards = ShardSet(prefixes)
    return [shards.read(i, 0, int(n)).tolist() for i, n in enumerate(shards.lengths)]


def test_a_large_corpus_goes_to_several_shards_of_both_splits(config):
    one = prepare(replace(config, validation_fraction=0.3))
    many = prepare(replace(config, validation_fraction=0.3, shard_mb=0.001))
    assert len(one.train) == len(one.validation) == 1 and len(many.train) > 5
    assert [path.name for path in many.train[:2]] == ["train-00000", "train-00001"]
    for split in ("train", "validation"):
        assert documents_of(getattr(many, split)) == documents_of(getattr(one, split))
        for key in ("documents", "tokens", "text_bytes", "length_histogram"):
            assert many.manifest["splits"][split][key] == one.manifest["splits"][split][key]


def test_documents_beyond_the_limit_are_left_out_and_counted(config):
    every = documents_of(prepare(config).train)
    data = prepare(replace(config, max_document_tokens=150, shard_mb=0.001))
    short = [tokens for tokens in every if len(tokens) <= 150]
    assert documents_of(data.train) == short and 10 < len(short) < len(every)
    skipped = data.manifest["source"]["skipped"]["too_long"]
    assert 0 < len(every) - len(short) <= skipped
    for shard in data.manifest["splits"]["train"]["shards"]:
        content = (data.directory / f"{shard['name']}.bin").read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256_bin"]


def test_processes_that_prepare_at_once_share_one_result(config):
    script = (
        "import os; from data_pipeline import DataConfig, build_plan; from data_pipeline.text.prepare import prepare;"
        f"data = prepare({config!r}); plan = build_plan(data.train, 64, 8, 0, data.directory.parent);"
        "print(data.directory, plan.fingerprint, os.stat(data.directory / 'manifest.json').st_ino)"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len(set(outputs)) == 1 and outputs[0]
    assert not [path for path in Path(config.cache_dir).rglob("*") if path.name.endswith(".tmp")]


def killed_when(config, out, is_due):
    """Run a prepare in a process of its own and kill it as soon as `is_due(seconds since its start)`; True when it had
    finished before."""
    child = run("source=jsonl", f"path={config.path}", "vocab_size=400", f"out={out}", f"shard_mb={config.shard_mb}")
    began = time.monotonic()
    while child.poll() is None and not is_due(time.monotonic() - began):
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    assert child.returncode in (0, -signal.SIGKILL)
    return child.returncode == 0


@pytest.mark.slow
def test_kill_9_at_20_random_moments_and_again(tmp_path):
    """Runs are killed again and again over the same output, which ends up byte for byte as if nothing had happened.

    Every other kill comes by the clock, the others soon after one of the next shards was begun: however busy the
    machine is, some meet the start, some the work.
    """
    write_corpus(tmp_path / "corpus.jsonl", 1500, seed=4, mean_words=200)
    out = tmp_path / "a"
    straight_config = DataConfig(
        source="jsonl", path=str(tmp_path / "corpus.jsonl"), vocab_size=400, cache_dir=str(out), shard_mb=0.06
    )
    began = time.monotonic()
    assert killed_when(straight_config, out, lambda seconds: False)
    whole = time.monotonic() - began
    straight = prepare(straight_config)  # finds it
    assert len(straight.train) > 10
    rng, kills, rounds, resumed = random.Random(7), 0, 0, 0

    def by_the_clock(out):
        moment = rng.uniform(0.3, 0.9) * whole
        return lambda seconds: seconds > moment

    def by_the_work(out):
        def shards():
            return len(list(out.glob("corpus-*/train-*.bin")))

        wanted, later, reached = shards() + rng.randint(1, 4), rng.uniform(0, 0.03), []

        def is_due(seconds):
            if not reached and shards() >= wanted:
                reached.append(seconds)
            return bool(reached) and seconds >= reached[0] + later

        return is_due

    while kills < 20:
        out = tmp_path / f"killed-{rounds}"
        rounds += 1
        while kills < 20:
            due = (by_the_clock if kills % 2 else by_the_work)(out)
            if killed_when(straight_config, out, due):
                break
            kills += 1
            resumed += bool(list(out.glob("corpus-*/progress.json")))
        assert_same_files(prepare(replace(straight_config, cache_dir=str(out))), straight)
    assert resumed > 3  # the moments were not all before the first shard


def test_a_restart_reads_only_what_is_not_finished(config, monkeypatch):
    config = replace(config, shard_mb=0.002)
    whole = prepare(replace(config, cache_dir=config.cache_dir + "-whole"))
    real, read, stop_at = Corpus.pieces, [], 60

    def pieces(self, *arguments):
        for piece in real(self, *arguments):
            read.append(piece.name)
            if len(read) == stop_at:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Corpus, "pieces", pieces)
    monkeypatch.setattr(
        "data_pipeline.text.encode._BATCH_CHARACTERS", 2000
    )  # so that shards are written before the end
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    first, stop_at = list(read), 0
    read.clear()
    again = prepare(config)
    assert 40 < len(read) < 95 and read[0] in first  # went on in the middle
    assert_same_files(again, whole)


def test_an_exchanged_tokenizer_is_refused_with_both_hashes(config, tmp_path):
    data = prepare(config)
    recorded = data.manifest["tokenizer"]["fingerprint"]
    good = data.tokenizer_path.read_bytes()
    data.tokenizer_path.write_bytes(good + b"x")
    found = hashlib.sha256(good + b"x").hexdigest()
    with pytest.raises(DataError) as error:
        prepare(config)
    assert recorded in str(error.value) and found in str(error.value)
    data.tokenizer_path.write_bytes(good)
    with pytest.raises(DataError) as error:
        open_prepared(data.directory, tokenizer_fingerprint="e" * 64)
    assert recorded in str(error.value) and "e" * 64 in str(error.value)
    assert open_prepared(data.directory, recorded) == data
    data.tokenizer_path.unlink()
    with pytest.raises(DataError, match=r"tokenizer.model: is missing"):
        prepare(config)


def test_nothing_left_to_train_on(tmp_path, model_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"held out")
    config = DataConfig(
        source="text", path=str(tmp_path), tokenizer=str(model_path), cache_dir=str(tmp_path / ".cache")
    )
    with pytest.raises(DataError, match=r"no document is left to train on \(1 held out, 1 empty\)"):
        prepare(replace(config, validation_fraction=1 - 1e-12))
    with pytest.raises(DataError, match="the training split holds no text"):
        prepare(replace(config, validation_fraction=1 - 1e-12, tokenizer=None))
    assert prepare(replace(config, validation_fraction=0.0)).manifest["source"]["skipped"] == {"empty": 1}


def test_a_cache_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot be built .*set another cache_dir"):
        prepare(replace(config, cache_dir=str(tmp_path / "file" / "cache")))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "text"])
def test_raw_text_is_prepared_from_there_as_from_here(flaky, model_path, tmp_path, kind):
    root = tmp_path / "in"
    root.mkdir()
    texts = write_corpus(root / "a.jsonl", 400, seed=6)
    source = "jsonl"
    if kind == "jsonl.gz":
        (root / "b.jsonl.gz").write_bytes(gzip.compress((root / "a.jsonl").read_bytes()))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": texts}), root / "a.parquet", row_group_size=64)
        (root / "a.jsonl").unlink()
        source = "parquet"
    elif kind == "text":
        shutil.rmtree(root)
        root.mkdir()
        for number, text in enumerate(texts[:20]):
            (root / f"{number}.txt").write_text(text)
        source = "text"
    url = upload(flaky, root, f"raw-{kind}")
    config = DataConfig(
        source=source, path=str(root), tokenizer=str(model_path), cache_dir=str(tmp_path / "near"), retries=20
    )
    near, far = prepare(config), prepare(replace(config, path=url, cache_dir=str(tmp_path / "far")))
    assert near.fingerprint == far.fingerprint
    assert near.manifest["splits"] == far.manifest["splits"]
    assert prepare(replace(config, path=url + "/*", cache_dir=str(tmp_path / "glob"))).fingerprint == near.fingerprint
    assert flaky.num_failures > 0
