import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import DataConfig, DataError, Tokenizer, build_plan, prepare
from data_pipeline.prepare import _SplitWriter, open_prepared
from data_pipeline.shards import ShardSet
from data_pipeline.sources import Corpus
from data_pipeline.storage import build_once

from .conftest import write_corpus

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path, model_path):
    write_corpus(tmp_path / "corpus.jsonl", 100, seed=2)
    return DataConfig(
        source="jsonl",
        path=str(tmp_path / "corpus.jsonl"),
        tokenizer=str(model_path),
        cache_dir=str(tmp_path / "cache"),
    )


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
    for split, document in Corpus(replace(config, validation_fraction=0.2)).documents(Counter()):
        expected[split].append([*tokenizer.encode(document.text).tolist(), tokenizer.eos_id])
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


def test_a_large_split_goes_to_several_shards(tmp_path):
    documents = [np.arange(number % 7 + 2) for number in range(100)]
    with _SplitWriter(tmp_path, "train", np.dtype(np.uint16), shard_bytes=100) as writer:
        for tokens in documents:
            writer.add(tokens, num_bytes=3)
    summary = writer.summary()
    names = [shard["name"] for shard in summary["shards"]]
    assert len(names) > 5 and names[:2] == ["train-00000", "train-00001"]
    shards = ShardSet([tmp_path / name for name in names])
    assert [shards.read(i, 0, int(n)).tolist() for i, n in enumerate(shards.lengths)] == [d.tolist() for d in documents]
    assert (summary["documents"], summary["text_bytes"]) == (100, 300)


def test_processes_that_prepare_at_once_share_one_result(config):
    script = (
        "import os, sys; from data_pipeline import DataConfig, build_plan, prepare;"
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


def test_a_process_that_finds_another_building_waits_for_it(tmp_path):
    target = tmp_path / "work"
    script = (
        "import sys; from pathlib import Path; from data_pipeline.storage import build_once, write_json\n"
        "def build(directory):\n"
        "    print('building', flush=True); sys.stdin.readline(); write_json(directory / 'done', {})\n"
        f"build_once(Path({str(target)!r}), 'done', build)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "building\n"
    waited = []

    def on_wait():
        waited.append(True)
        child.stdin.write("\n")
        child.stdin.flush()

    build_once(target, "done", lambda directory: pytest.fail("built twice"), on_wait)
    child.communicate(timeout=60)
    assert waited == [True] and child.returncode == 0


def test_kill_9_in_the_middle_and_again(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", 2500, seed=4, mean_words=200)
    config = DataConfig(
        source="jsonl", path=str(tmp_path / "corpus.jsonl"), vocab_size=400, cache_dir=str(tmp_path / "a")
    )
    straight = prepare(config)
    for number, moment in enumerate(["corpus-*/", "corpus-*/tokenizer.model", "corpus-*/train-*.tmp"]):
        cache = tmp_path / f"killed-{number}"
        child = run("source=jsonl", f"path={config.path}", "vocab_size=400", f"out={cache}")
        while child.poll() is None and not list(cache.glob(moment)):
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL
        assert not list(cache.glob("corpus-*/manifest.json"))

        again = prepare(replace(config, cache_dir=str(cache)))
        assert again.manifest == straight.manifest
        names = {path.name for path in straight.directory.iterdir()}
        assert {path.name for path in again.directory.iterdir()} == names
        for name in names:
            assert (again.directory / name).read_bytes() == (straight.directory / name).read_bytes()


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


def test_damaged_results_are_refused(config):
    data = prepare(config)
    (data.directory / "train-00000.bin").write_bytes(b"12")
    with pytest.raises(DataError, match=r"train-00000.bin: has 2 bytes, but train-00000.idx describes"):
        build_plan(data.train, 64, 8, 0, config.cache_dir)
    (data.directory / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest.json: cannot be read"):
        prepare(config)
    (data.directory / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match=r"manifest.json: has format 99, expected 1"):
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


def test_the_command_line(config):
    child = run(f"path={config.path}", "source=jsonl", f"tokenizer={config.tokenizer}", f"out={config.cache_dir}")
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert "vocabulary 400" in out and "train" in out and "Warning" not in err
    assert str(prepare(config).directory) in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sorce=jsonl"], "error: unknown key 'sorce', the nearest is 'source'; the keys are source, path, "),
        (["jsonl"], "error: argument 'jsonl' must have the form key=value; the keys are source, path, "),
        (["vocab_size=many"], "error: vocab_size='many' must be a number"),
        (["source=jsonl"], "error: data.source=jsonl needs data.path"),
        (["source=jsonl", "path=/absent/x.jsonl"], "error: data.path=/absent/x.jsonl: no such file or directory"),
        (["tokenizer=/absent/model"], "error: /absent/model: cannot be used as a SentencePiece model"),
    ],
)
def test_the_command_line_refuses_in_one_line(arguments, message):
    child = run(*arguments)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 2 and out == ""
    assert err.startswith(message) and err.count("\n") == 1


def test_importing_the_package_is_light():
    heavy = ("torch", "sentencepiece", "fsspec", "pyarrow")
    script = f"import sys, data_pipeline; print([name for name in {heavy} if name in sys.modules])"
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout == "[]\n"
