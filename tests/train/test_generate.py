"""`python -m train.generate` on runs and on Hugging Face directories."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ksa_model.decoding.generate import generate as continue_tokens
from tests.ksa_model.test_model import small_config
from tests.train.hf.interop import make_run, our_logits
from train import export, generate
from train.config.errors import ConfigError
from train.distributed.signals import BAD_INPUT
from train.generate import GenerateConfig

ROOT = Path(__file__).resolve().parent.parent.parent
GREEDY = GenerateConfig(max_tokens=30, temperature=0.0)


@pytest.fixture(scope="module")
def sources(world, tmp_path_factory, corpus):
    """A run of a random model and its export."""
    from data_pipeline.text.tokenizer import train_tokenizer

    root = tmp_path_factory.mktemp("generate")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    train_tokenizer(texts, root / "tokenizer.model", 400)
    make_run(world, root / "run", small_config(vocab_size=400), root / "tokenizer.model", seq_len=128)
    assert export.main([str(root / "run"), f"out={root}/hf", "dtype=fp32"]) == 0
    return root / "run", root / "hf"


def printed(session, prompts, config, capsys):
    capsys.readouterr()
    generate.answer(session, prompts, config)
    return capsys.readouterr()


def test_an_export_continues_texts_as_its_run_does(world, sources, capsys):
    run, hf = (generate.load(source, world, "fp32") for source in sources)
    assert run.stop_tokens == hf.stop_tokens and run.max_positions == hf.max_positions == 128
    for prompts in (["def f("], ["def f(", "class Point:\n"]):
        one, other = (printed(session, prompts, GREEDY, capsys) for session in (run, hf))
        assert one.out == other.out and len(one.out) > len("".join(prompts)) + 10
        assert "tokens/s; cache" in one.err and "MB" in one.err


def test_half_precision(world, sources, capsys):
    session = generate.load(sources[0], world, "bf16")
    assert session.model.embedding.weight.dtype == torch.bfloat16
    assert printed(session, ["def f("], GREEDY, capsys).out.startswith("def f(")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gated_delta_nets(world, sources, tmp_path, capsys, dtype):
    config = small_config(vocab_size=400, layer_pattern="GKGF")
    make_run(world, tmp_path / "run", config, sources[0] / "tokenizer.model", seq_len=128)
    session = generate.load(tmp_path / "run", world, dtype)
    one, alone = (printed(session, prompts, GREEDY, capsys) for prompts in (["def f(", "class Point:\n"], ["def f("]))
    assert alone.out.startswith("def f(") and len(alone.out) > len("def f(") + 10
    assert dtype == "bf16" or alone.out.strip() in one.out  # what stands beside a request changes nothing


def test_stop_tokens_end_the_answer(world, sources, capsys):
    session = generate.load(sources[0], world, "fp32")
    tokens = session.tokenizer.encode("def f(").tolist()
    (whole,), _ = continue_tokens(session.model, [tokens], GREEDY.sampling(()))
    stop = whole[7]
    until = whole[: whole.index(stop)]
    shown = printed(session, ["def f("], dataclasses.replace(GREEDY, stop_tokens=(stop,)), capsys)
    assert shown.out.rstrip("\n") == ("def f(" + session.tokenizer.decode(until)).rstrip("\n")


def test_positions_are_not_exceeded(world, sources):
    session = generate.load(sources[1], world, "fp32")
    with pytest.raises(ConfigError, match="max_tokens=30 are more than the model's 128 positions"):
        generate.answer(session, ["x y " * 100], GREEDY)
    with pytest.raises(ConfigError, match="at least one character"):
        generate.answer(session, [""], GREEDY)


def test_the_command(sources):
    command = [sys.executable, "-m", "train.generate", str(sources[1])]
    options = ["max_tokens=12", "temperature=0", "stop_tokens=[3, 5]"]
    asked = subprocess.run(command + options, cwd=ROOT, text=True, capture_output=True, input="def f(\nclass A\n")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("def f(") and "class A" in asked.stdout and asked.stderr.count("tokens/s") == 2
    refused = subprocess.run([*command, "prompt=x", "dtype=int4"], cwd=ROOT, text=True, capture_output=True)
    assert refused.returncode == BAD_INPUT and refused.stderr == "error: dtype='int4' is not one of fp32, bf16\n"


LM_EVAL_TASK = """
task: arithmetic_of_ours
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.mark.slow
def test_letters_that_the_output_lacks_and_a_reader_that_leaves(sources):
    words = [sys.executable, "-m", "train.generate", str(sources[0]), "prompt=\u00e9t\u00e9", "max_tokens=2"]
    kept = {"cwd": ROOT, "capture_output": True, "timeout": 100}
    done = subprocess.run(words, env=os.environ | {"PYTHONIOENCODING": "ascii"}, **kept)
    assert done.returncode == 0 and done.stdout.startswith(rb"\xe9t\xe9"), done.stderr
    piped = subprocess.run(["bash", "-o", "pipefail", "-c", '"$@" | true', "-", *words], **kept)
    assert (piped.returncode, b"Traceback" in piped.stderr) == (128 + signal.SIGPIPE, False), piped.stderr


def test_the_kept_harness_runs_on_an_export(world, sources, tmp_path):
    """The command of docs/interop.md, on a task made here; its likelihoods are our model's."""
    pytest.importorskip("lm_eval")
    questions = [
        {"question": "def add(a, b):\n    return", "choices": [" a + b", " None", " self"], "answer": 0},
        {"question": "import", "choices": [" os", " 12", " :"], "answer": 0},
        {"question": "class A:\n    def", "choices": [" 7", " __init__"], "answer": 1},
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/ours.yaml").write_text(LM_EVAL_TASK.format(data=data))
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf"),
        *("--model_args", f"pretrained={sources[1]},trust_remote_code=True,dtype=float32"),
        *("--tasks", "arithmetic_of_ours", "--include_path", str(tmp_path / "tasks")),
        *("--device", "cpu", "--batch_size", "2", "--log_samples", "--output_path", str(tmp_path / "out")),
    ]
    # This process may look like a rank of a job; the harness would look for the others.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")
    }
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, text=True, capture_output=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "arithmetic_of_ours" in done.stdout
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    session = generate.load(sources[0], world, "fp32")
    compared = 0
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        for choice, response in zip(sample["doc"]["choices"], sample["filtered_resps"]):
            context = session.tokenizer.encode(sample["doc"]["question"]).tolist()
            tokens = session.tokenizer.encode(sample["doc"]["question"] + choice).tolist()
            if tokens[: len(context)] != context:
                continue
            scores = our_logits(session.model, tokens).log_softmax(-1)
            want = sum(float(scores[i - 1, tokens[i]]) for i in range(len(context), len(tokens)))
            assert float(response[0]) == pytest.approx(want, abs=1e-2)
            compared += 1
    assert compared >= 5
