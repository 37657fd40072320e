"""Export of a run's weights: a Hugging Face directory, or safetensors under this project's names.

`python -m train.export` is the command. One tensor is in memory at a time, and rows of vocabulary padding are left out.
Needs no GPU, no process group and no transformers.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

import ksa_model.hf
from data_pipeline import Tokenizer
from ksa_model.config import ModelConfig
from ksa_model.hf import naming
from ksa_model.hf.configs import MODELING_FILE, TOKENIZER_FILE, check_exportable, exported_config, is_plain
from train.checkpoint import locate, storage
from train.checkpoint.storage import CheckpointError, CheckpointPath
from train.config.conversion import expand_home, to_mapping
from train.config.errors import ConfigError
from train.config.run_directory import read_config
from train.config.schema import TrainConfig, from_saved
from train.hf.files import write_safetensors
from train.hf.import_weights import RunTensors, spec_of_run
from train.hf.tokenizers import VOCABULARY, run_tokenizer
from train.logs.metrics import read_records

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_NAMES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class ExportConfig:
    """What to write and where."""

    out: str
    format: str = "hf"  # hf | safetensors
    step: int | None = None  # null: the newest checkpoint
    dtype: str = "bf16"  # bf16 | fp32

    def __post_init__(self) -> None:
        if self.format not in ("hf", "safetensors"):
            raise ConfigError(f"format={self.format!r} is not one of hf, safetensors")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not one of {', '.join(_DTYPES)}")


@dataclass(frozen=True)
class Run:
    """What an export needs of a run: a checkpoint, its configuration and state.json, and the tokenizer or None."""

    directory: Path
    checkpoint: CheckpointPath
    config: TrainConfig
    tokenizer: Path | None
    state: dict[str, Any]


def open_run(directory: Path, step: int | None = None) -> Run:
    """A run's newest checkpoint, or that of `step`; verified. Raises `ConfigError`."""
    written = read_config(directory)
    own = locate.checkpoint_directory(directory, written.checkpoint.dir, written.run.name)
    finished = storage.finished(own)
    chosen = [checkpoint for checkpoint in finished if step is None or checkpoint.step == step]
    if not chosen:
        steps = ", ".join(str(checkpoint.step) for checkpoint in finished) or "none"
        what = "there is no finished checkpoint" if step is None else f"step={step} is not a checkpoint"
        raise CheckpointError(f"{what} below {own}; there are: {steps}")
    storage.verify(chosen[-1])
    state = locate.read_state(chosen[-1])
    # Not config.yaml: that has no vocabulary size, and a later start may have changed it.
    config = from_saved(state["config"])
    return Run(directory, chosen[-1], config, run_tokenizer(directory, chosen[-1], state), state)


def export(run: Run, config: ExportConfig) -> list[str]:
    """Write the export to `config.out`, which appears only once it is complete; returns the names of its files."""
    if config.format == "hf":
        check_exportable(run.config.model)
    out = Path(expand_home(config.out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out} exists and is not an empty directory: choose another")
    incomplete = out.with_name(out.name + ".incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    incomplete.mkdir(parents=True)
    try:
        _write_weights(run, incomplete, config)
        if config.format == "hf":
            _write_hf_files(run, incomplete, config.dtype)
        else:
            text = yaml.safe_dump(to_mapping(run.config), sort_keys=False)  # as the checkpoint holds it
            (incomplete / "config.yaml").write_text(text, encoding="utf-8")
        if out.exists():
            out.rmdir()
        incomplete.rename(out)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)
    return sorted(path.name for path in out.iterdir())


def _write_weights(run: Run, directory: Path, config: ExportConfig) -> None:
    spec, wanted = spec_of_run(run.state), naming.exported_shapes(run.config.model)
    source = RunTensors(run.checkpoint, spec.folded_share)
    size = sum(math.prod(shape) for _, shape in wanted.values())
    with tqdm(total=size, unit=" elements", unit_scale=True, desc=directory.name, file=sys.stderr) as bar:
        tensors = [
            (theirs if config.format == "hf" else ours, shape, partial(source.read, theirs, [0] * len(shape), shape))
            for ours, (theirs, shape) in wanted.items()
        ]
        facts = {} if spec.mix_coeff == 1 else {"mix_coeff": repr(spec.mix_coeff)}
        write_safetensors(directory, tensors, _DTYPES[config.dtype], bar.update, facts=facts)


def _write_hf_files(run: Run, directory: Path, dtype: str) -> None:
    tokenizer = None if run.tokenizer is None else Tokenizer(run.tokenizer)
    eos = None if tokenizer is None else tokenizer.eos_id
    model = run.config.model
    vocabulary = {} if tokenizer is None else {VOCABULARY: tokenizer.vocabulary_sha256}
    exported = exported_config(model, run.config.seq_len, eos, _NAMES[dtype], spec_of_run(run.state).mix_coeff)
    _json(directory / "config.json", exported | vocabulary)
    # Only stable keys: transformers refuses contradictions such as a temperature without sampling.
    generation = {"do_sample": True, "temperature": 0.8, "top_k": 50}
    if tokenizer is not None:
        generation |= _generation_ends(tokenizer)
    _json(directory / "generation_config.json", generation)
    ours = Path(ksa_model.hf.__file__).parent
    if not is_plain(model):
        shutil.copyfile(ours / MODELING_FILE, directory / MODELING_FILE)
    if tokenizer is not None:
        assert run.tokenizer is not None
        _write_tokenizer(run.tokenizer, tokenizer, directory, run.config.seq_len, ours)
    (directory / "README.md").write_text(_model_card(run, tokenizer), encoding="utf-8")


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens of an export: those that came with the tokenizer, else the token that ends documents."""
    end, known = tokenizer.token(tokenizer.eos_id), set(tokenizer.vocabulary)
    given = {key: tokenizer.description.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    held = {key: token for key, token in given.items() if token in known}
    return {"eos_token": end, "pad_token": held.get("eos_token", end)} | held


def _generation_ends(tokenizer: Tokenizer) -> dict[str, Any]:
    """`eos_token_id` and `pad_token_id`: a text ends where training ended documents, or where the tokenizer says so."""
    tokens = _special_tokens(tokenizer)
    ends, pad = list(tokenizer.ends), tokenizer.vocabulary.index(tokens["pad_token"])
    return {"eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": pad}


def _write_tokenizer(path: Path, tokenizer: Tokenizer, directory: Path, max_positions: int, ours: Path) -> None:
    settings: dict[str, Any] = {
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        # Releases before 5 would add token_type_ids, which `generate` refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "add_bos_token": False,  # training adds no token at the beginning, and ends documents itself
        "add_eos_token": False,
        **_special_tokens(tokenizer),
    }
    if "chat_template" in tokenizer.description:
        settings["chat_template"] = tokenizer.description["chat_template"]
    if tokenizer.kind == "SentencePiece":
        shutil.copyfile(path, directory / "tokenizer.model")
        shutil.copyfile(ours / TOKENIZER_FILE, directory / TOKENIZER_FILE)
        settings |= {
            "tokenizer_class": "KsaTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_ksa.KsaTokenizer", None]},
        }
    else:
        (directory / "tokenizer.json").write_bytes(without_added_tokens(path.read_bytes()))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    _json(directory / "tokenizer_config.json", settings)


def without_added_tokens(content: bytes) -> bytes:
    """A tokenizer.json that adds no token before or after a text, as training does; the same bytes where none is added.

    Its vocabulary and the ids of a text stay.
    """
    held = json.loads(content)
    added = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
    processor = held.get("post_processor")
    if not isinstance(processor, dict):
        return content
    if processor.get("type") in added:
        held["post_processor"] = None
    elif any(step.get("type") in added for step in processor.get("processors", ())):
        kept = [step for step in processor["processors"] if step.get("type") not in added]
        held["post_processor"] = processor | {"processors": kept} if kept else None
    else:
        return content
    return json.dumps(held, ensure_ascii=False).encode()


def _model_card(run: Run, tokenizer: Tokenizer | None) -> str:
    model, counts = run.config.model, run.config.model.num_parameters()
    losses = [r for r in read_records(run.directory / "metrics.jsonl") if "validation_loss" in r]
    losses = [r for r in losses if r["step"] <= run.state["step"]]
    origin = run.state.get("made_by") or (f"weights of {run.config.init_from}" if run.config.init_from else "scratch")
    facts = {
        "parameters": f"{counts['total']:,} ({counts['summary']:,} of the summaries)",
        "layers": f"{model.num_layers}, pattern `{model.layer_pattern}`",
        "began with": origin,
        "optimizer steps": f"{run.state['step']:,}",
        "tokens": f"{run.state['tokens']:,}",
        "held-out loss": f"{losses[-1]['validation_loss']:.4f} nats a token, step {losses[-1]['step']}"
        if losses
        else "-",
        "sequence length": f"{run.config.seq_len:,}",
        "data": f"{run.config.data.source} {run.config.data.path or ''}".strip(),
        "data fingerprint": str(run.state.get("data_fingerprint", "-")),
        "learning rate": f"{run.config.optim.lr:g}, {run.config.optim.schedule}",
        "precision": run.config.run.precision,
        "seed": str(run.config.run.seed),
        "tokenizer": "-" if tokenizer is None else f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens",
        "saved": str(run.state.get("saved_at", "-")),
        "versions": ", ".join(f"{name} {version}" for name, version in run.state.get("versions", {}).items()) or "-",
    }
    trust = (
        ""
        if is_plain(model) and (tokenizer is None or tokenizer.kind != "SentencePiece")
        else ", trust_remote_code=True"
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {run.config.run.name}

{_about(model)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoModelForCausalLM.from_pretrained("."{trust})
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

| training | |
|---|---|
""" + "".join(f"| {name} | {value} |\n" for name, value in facts.items())


def _about(model: ModelConfig) -> str:
    if not model.has_summaries:
        return "A decoder language model trained with ksa-train."
    window = model.window_chunks if isinstance(model.window_chunks, int) else list(model.window_chunks)
    return (
        "A decoder language model with Kwai Summary Attention (arXiv 2604.24432), trained with ksa-train: "
        f"{model.summary_tokens} summary token(s) after every {model.chunk_size} text tokens, windows of {window} "
        "chunks of text. Inputs, positions and logits are those of the text alone, and `generate()` decodes from the "
        "compressed cache."
    )


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
