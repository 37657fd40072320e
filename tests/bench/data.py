"""Targets of the data pipeline: `python -m tests.bench.data [packing|prepare|memory|sample|wait ...]` (default: all).

Each part prints its numbers, which are medians, and replaces its entry in docs/results/data.json. Run it on an idle
machine; the load average is recorded.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_pipeline import DataConfig, build_plan, commands, open_data
from data_pipeline.packing.order import derive_key, permute
from data_pipeline.packing.plan import pack
from data_pipeline.store.shards import ShardWriter
from data_pipeline.text.encode import num_cores
from data_pipeline.text.prepare import prepare
from data_pipeline.text.sources import Corpus
from data_pipeline.text.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "docs/results/data.json"


def lognormal_lengths(count: int, mean: float, sigma: float = 1.2) -> np.ndarray:
    """Document lengths with a long tail."""
    rng = np.random.default_rng(0)
    return np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count), 2, 1 << 22).astype(np.int64)


def packing() -> dict:
    """Fill of 131,072-token samples, documents cut although they fit, and the time to pack ten million documents."""
    result: dict = {"bar": ">= 99.5 % real tokens at 131,072; 0 fitting documents cut; 1e7 documents in < 60 s"}
    for alignment in (8, 128):
        lengths = lognormal_lengths(1_000_000, 10_000)
        packed = pack(lengths, 131_072, alignment)
        segments = packed.segments
        num_pieces = np.bincount(segments["doc"].astype(np.int64), minlength=lengths.size)
        result[f"alignment_{alignment}"] = {
            "documents": lengths.size,
            "mean_tokens": round(float(lengths.mean()), 1),
            "real_tokens_share": round(int(segments["length"].sum()) / ((packed.row_ptr.size - 1) * 131_072), 6),
            "fitting_documents_cut": int((num_pieces[lengths <= 131_072] > 1).sum()),
        }
    lengths = lognormal_lengths(10_000_000, 10_000)
    for seq_len in (131_072, 1_048_576):
        began, cpu = time.perf_counter(), time.process_time()
        pack(lengths, seq_len, 8, permute(np.arange(lengths.size), lengths.size, derive_key(0, 1)))
        seconds = {"wall_seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        result[f"ten_million_documents_{seq_len}"] = {name: round(value, 2) for name, value in seconds.items()}
    return result


def _encode_share(arguments: tuple[str, list[str]]) -> float:
    import sentencepiece

    path, texts = arguments
    began = time.process_time()
    model = sentencepiece.SentencePieceProcessor(model_file=path)
    for text in texts:
        model.encode_as_numpy(text)
    return time.process_time() - began


def prepare_rate() -> dict:
    """MB/s of a whole prepare and of SentencePiece alone in as many processes, timed alternately on the same texts."""
    workers = num_cores()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        texts = [piece.text for piece in Corpus(DataConfig()).pieces() if piece.text]
        size = sum(len(text.encode()) for text in texts)
        (root / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        train_tokenizer(texts, root / "m.model", 32_768)
        # Shares of equal size: no process waits for another.
        shares: list[list[str]] = [[] for _ in range(workers)]
        sizes = [0] * workers
        for text in sorted(texts, key=len, reverse=True):
            least = sizes.index(min(sizes))
            shares[least].append(text)
            sizes[least] += len(text)
        turns = []
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            pool.map(_encode_share, [(str(root / "m.model"), [])] * workers)
            for turn in range(9):
                began = time.perf_counter()
                cpu = sum(pool.map(_encode_share, [(str(root / "m.model"), share) for share in shares], chunksize=1))
                theirs = [time.perf_counter() - began, cpu]
                config = DataConfig(
                    source="jsonl",
                    path=str(root / "corpus.jsonl"),
                    tokenizer=str(root / "m.model"),
                    cache_dir=str(root / f"cache-{turn}"),
                )
                began, cpu = time.perf_counter(), time.process_time()
                prepare(config)
                turns.append((time.perf_counter() - began, time.process_time() - cpu, *theirs))
    seconds = np.median(np.array(turns), axis=0)
    wall, cpu, their_wall, their_cpu = (round(size / 1e6 / value, 2) for value in seconds.tolist())
    return {
        "bar": "prepare >= 85 % of SentencePiece's own multi-process rate",
        "corpus_mb": round(size / 1e6, 1),
        "workers": workers,
        "prepare_mb_per_second": wall,
        "sentencepiece_mb_per_second": their_wall,
        "ratio": round(statistics.median(turn[2] / turn[0] for turn in turns), 3),
        "prepare_mb_per_cpu_second": cpu,
        "sentencepiece_mb_per_cpu_second": their_cpu,
        "ratio_of_cpu_seconds": round(statistics.median(turn[3] / turn[1] for turn in turns), 3),
        "turns_wall_seconds": [[round(turn[0], 2), round(turn[2], 2)] for turn in turns],
    }


_MEMORY = """
import json, sys, time
from data_pipeline import DataConfig
from data_pipeline.text.prepare import prepare
began = time.perf_counter()
data = prepare(DataConfig(**json.loads(sys.argv[1])))
# Not getrusage, whose peak includes the parent process.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"documents": data.manifest["splits"]["train"]["documents"],
                  "tokens": data.manifest["splits"]["train"]["tokens"],
                  "text_bytes": data.manifest["splits"]["train"]["text_bytes"],
                  "seconds": round(time.perf_counter() - began, 1),
                  "peak_memory_mb": round(int(peak.split()[1]) * 1024 / 1e6, 1)}))
"""


def memory() -> dict:
    """Peak memory while a single document of 2 GB is prepared, as a text file and as a line of JSONL."""
    result: dict = {"bar": "peak memory < 1500 MB with a single document of 2 GB"}
    texts = [piece.text for piece in Corpus(DataConfig()).pieces() if piece.text]
    block = "".join(texts)[:20_000_000]
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as directory:
        root = Path(directory)
        train_tokenizer(texts[:400], root / "m.model", 8_000, "unigram")  # the faster kind to encode
        for source in ("text", "jsonl"):
            path = root / f"big.{source}"
            with open(path, "w", encoding="utf-8") as file:
                file.write("" if source == "text" else '{"text": "')
                part = block if source == "text" else json.dumps(block)[1:-1]
                for _ in range(-(-2_000_000_000 // len(block.encode()))):
                    file.write(part)
                file.write("" if source == "text" else '"}\n')
            config = DataConfig(
                source=source,
                path=str(path),
                tokenizer=str(root / "m.model"),
                cache_dir=str(root / source),
                validation_fraction=0.0,
            )
            command = [sys.executable, "-c", _MEMORY, json.dumps(asdict(config))]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            result[source] = {"file_bytes": path.stat().st_size, **json.loads(done.stdout)}
            path.unlink()
    return result


def sample() -> dict:
    """Milliseconds to read one sample of a million tokens from local shards in the page cache."""
    with tempfile.TemporaryDirectory() as directory:
        root, rng = Path(directory), np.random.default_rng(0)
        lengths = lognormal_lengths(3_000, 21_600)
        with ShardWriter(root / "train-00000", np.dtype(np.uint16)) as writer:
            for length in lengths.tolist():
                writer.add(rng.integers(0, 32_000, length))
        result: dict = {"bar": "< 50 ms for 1,048,576 tokens", "tokens_in_shards": int(lengths.sum())}
        for seq_len in (131_072, 1_048_576):
            plan = build_plan([root / "train-00000"], seq_len, 8, 0, root, hashes=[["-", "-", "-"]])
            times = []
            for index in range(3 * plan.num_samples):
                began = time.perf_counter()
                plan.at(index)
                times.append(1000 * (time.perf_counter() - began))
            warm = times[plan.num_samples :]
            result[str(seq_len)] = {
                "median_ms": round(statistics.median(warm), 2),
                "slowest_ms": round(max(warm), 2),
                "samples": len(warm),
            }
    return result


def wait() -> dict:
    """The share of a training step that the default CPU run waits for data."""
    import dataclasses

    import torch

    from data_pipeline import Loader
    from tests.bench import workload
    from train import build, trainer
    from train.batches import batch_maker
    from train.distributed import groups
    from train.distributed.consensus import RankConsensus
    from train.logs.step_sums import StepSums

    config = workload.configured([])
    data = open_data(config.data)
    config = dataclasses.replace(config, model=build.with_vocabulary(config.model, data.vocab_size))
    world = groups.initialize(config.parallel, torch.device("cpu"))
    engine = build.build_engine(config, world)
    loader = Loader(
        data.samples("train", config.seq_len, config.alignment),
        samples_per_step=config.run.samples_per_step,
        dp_rank=0,
        dp_size=1,
        prefetch=config.data.prefetch_samples,
        transform=batch_maker(config.model, 0, 1),
    )
    sums, consensus, steps = StepSums(world), RankConsensus(world), []
    for _ in range(20):
        before, began = loader.wait_seconds, time.perf_counter()
        trainer.train_step(engine, loader.next_step(), world, sums, consensus, 1e-3)
        steps.append((time.perf_counter() - began, loader.wait_seconds - before))
    loader.close()
    steps = steps[5:]
    return {
        "bar": "< 1 % of step time",
        "step_seconds_median": round(statistics.median(step for step, _ in steps), 4),
        "wait_seconds_median": round(statistics.median(waited for _, waited in steps), 7),
        "wait_share": round(sum(waited for _, waited in steps) / sum(step for step, _ in steps), 6),
        "steps": len(steps),
    }


PARTS = {"packing": packing, "prepare": prepare_rate, "memory": memory, "sample": sample, "wait": wait}


def main() -> None:
    if unknown := [name for name in sys.argv[1:] if name not in PARTS]:
        sys.exit(commands.fail(f"{unknown[0]!r} is not a part; the parts are {', '.join(PARTS)}"))
    for name in sys.argv[1:] or PARTS:
        began = os.getloadavg()[0]
        entry = PARTS[name]()
        entry = {
            "command": f"python -m tests.bench.data {name}",
            **entry,
            "machine": f"{num_cores()} cores, {platform.machine()}, Python {platform.python_version()}",
            "load_average": [round(began, 1), round(os.getloadavg()[0], 1)],
        }
        print(json.dumps({name: entry}, indent=1), flush=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[name] = entry
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({part: results[part] for part in PARTS if part in results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
