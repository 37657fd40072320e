import json
import re
import subprocess
import sys

import pytest

from tests.data_pipeline.conftest import REPOSITORY, write_corpus


def run(module, *arguments, stdin=""):
    command = [sys.executable, "-m", f"data_pipeline.{module}", *arguments]
    stdin = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, input=stdin)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, model_path):
    root = tmp_path_factory.mktemp("inspect")
    write_corpus(root / "c.jsonl", 300, seed=8)
    return [
        "source=jsonl", f"path={root / 'c.jsonl'}", f"tokenizer={model_path}", f"cache_dir={root / 'cache'}"
    ]  # fmt: skip


def test_text_and_picture_of_a_corpus(corpus, tmp_path):
    code, out, err = run("inspect", *corpus, "seq_len=512", "sample=2", f"picture={tmp_path / 'p.png'}", "rows=6")
    assert code == 0, err
    assert re.search(r"train: 29\d documents, [\d,]+ tokens, \d\.\d\d bytes per token", out)
    assert "tokens per document: median" in out and "tokens in documents longer than 8192: 0.0%, 32768" in out
    assert re.search(r"packed into \d+ samples of 512 tokens at multiples of 8: 9\d\.\d+% real tokens", out)
    (fill,) = re.findall(r"sample 2: (\d+) documents", out)
    assert len(re.findall(r"^ +\d+  at", out, re.M)) == int(fill)
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_mixtures_and_synthetic_data_are_shown_too(corpus, tmp_path, model_path):
    path = corpus[1].removeprefix("path=")
    corpora = [{"name": n, "source": "jsonl", "path": path, "weight": w} for n, w in (("a", 1), ("b", 2))]
    stages = [{"seq_len": 256, "samples": 300}]
    common = [f"tokenizer={model_path}", f"cache_dir={tmp_path}"]
    code, out, err = run(
        "inspect", "source=mixture", f"corpora={json.dumps(corpora)}", f"stages={json.dumps(stages)}", "seq_len=256",
        *common,
    )  # fmt: skip
    assert code == 0, err
    assert "corpus b, weight 0.6667" in out and "stage 0: seq_len 256" in out and "epochs, repeated" in out
    code, out, err = run("inspect", "source=synthetic", "seq_len=1024", "sample=1", *common)
    assert code == 0 and "synthetic probes" in out and "sample 1: 1 documents" in out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seqlen=512"], "seqlen is not a configuration key; did you mean seq_len?"),
        (["source=mixture", "corpora=[{]"], "corpora='[{]' must be a list such as [A,B]"),
        (["part=test"], "part='test' must be one of train, validation"),
        (["verify=maybe"], "verify='maybe' must be true or false"),
        (["source=synthetic", "tasks=5"], "data.tasks=('5',) must be a list of needle"),
        (
            ["source=mixture", 'corpora=[{"name":"a","source":"stdlib"}]', 'stages=[{"seq_len":"64","samples":1}]'],
            "stages[0].seq_len='64' must be a whole number",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    code, out, err = run("inspect", *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
