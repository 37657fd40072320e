"""Which tokenizer belongs to a checkpoint, and whether the data of a run were made with it.

Pretrained weights are bound to their tokenizer's ids. A run that begins with such weights, or goes on from a
checkpoint, and names no tokenizer takes that of the checkpoint; another one is refused.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import DataConfig, Tokenizer
from data_pipeline.config import RAW
from data_pipeline.store.files import sha256_of_file
from train.checkpoint.storage import CheckpointError, CheckpointPath
from train.config.errors import ConfigError
from train.config.schema import TrainConfig
from train.hf.files import CONFIG, HfError

TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # in the order in which they are taken
RUN_TOKENIZER = "tokenizer.model"
VOCABULARY = "vocabulary_sha256"  # in state.json, and in config.json of an export
IMPORTED = "python -m train.import_hf"  # how `made_by` begins in state.json of an imported run


def find_tokenizer(directory: Path) -> Path | None:
    """The tokenizer file of a Hugging Face directory that `data_pipeline.Tokenizer` reads, or None.

    Raises `HfError` if the config.json of one of our exports was written with another vocabulary.
    """
    found = next((directory / name for name in TOKENIZERS if (directory / name).is_file()), None)
    try:
        written = json.loads((directory / CONFIG).read_text(encoding="utf-8")).get(VOCABULARY)
    except (OSError, ValueError, AttributeError):
        return found  # which whoever reads the configuration says
    if found is not None and written is not None and (held := Tokenizer(found).vocabulary_sha256) != written:
        raise HfError(
            f"{found} holds the vocabulary of sha256 {held[:12]}, and {directory / CONFIG} was exported with "
            f"{str(written)[:12]}: copy the tokenizer of the export again"
        )
    return found


def run_tokenizer(directory: Path, checkpoint: CheckpointPath, state: dict[str, Any]) -> Path | None:
    """The tokenizer in a run directory, or None. Raises `CheckpointError` if `checkpoint` was trained with another."""
    path = directory / RUN_TOKENIZER
    if not path.exists():
        return None
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: copy the tokenizer of the run there")
    trained = state.get("tokenizer_sha256")
    if trained not in (None, held := sha256_of_file(path)):
        raise CheckpointError(
            f"{path} has sha256 {held[:12]}, and {checkpoint} was trained with the tokenizer of sha256 {trained[:12]}: "
            "copy that tokenizer there"
        )
    return path


@dataclass(frozen=True)
class Owned:
    """The tokenizer of what a run begins with.

    Attributes:
        owner: what it belongs to, for messages.
        path: its file; None: it is not there.
        needed: whether weights were trained with it that a tokenizer trained here cannot fit.
        exactly: sha256 of the file that the data must have been made with; None: the vocabulary alone must fit.
    """

    owner: str
    path: Path | None
    needed: bool
    exactly: str | None = None


def of_import(directory: str) -> Owned:
    """The tokenizer of `init_from=hf:DIRECTORY`."""
    return Owned(directory, find_tokenizer(Path(directory)), needed=True)


def of_checkpoint(checkpoint: CheckpointPath, state: dict[str, Any], *places: Path) -> Owned:
    """The tokenizer of a run's checkpoint with state.json `state`; it is looked for in run directories, `places`."""
    sha256 = state.get("tokenizer_sha256")
    try:
        named = state["config"]["data"]["tokenizer"]
    except (KeyError, TypeError):  # written before there was the key
        named = None
    needed = named is not None or str(state.get("made_by", "")).startswith(IMPORTED)
    files = [place / RUN_TOKENIZER for place in places] + ([Path(named)] if named else [])
    held = (file for file in files if sha256 is not None and file.is_file() and sha256_of_file(file) == sha256)
    return Owned(str(checkpoint), next(held, None), needed, sha256)


def choose(config: TrainConfig, owned: Owned) -> TrainConfig:
    """`config` with the tokenizer of what it begins with, where it names none and tokenizes text.

    Raises `ConfigError` if that is missing, or does not fit the one that `config` names.
    """
    named = config.data.tokenizer
    if named is not None:
        check(owned, Path(named), f"data.tokenizer={named}", config.data.end_token)
        return config
    if not owned.needed or not _tokenizes(config.data):
        return config
    if owned.path is None:
        what = f"the tokenizer of sha256 {owned.exactly[:12]}" if owned.exactly else "its tokenizer"
        raise ConfigError(
            f"data.tokenizer is not set, and {owned.owner} does not come with {what} ({', '.join(TOKENIZERS)}): its "
            "weights mean nothing on the ids of a tokenizer that is trained here; set data.tokenizer to the one that "
            "it was trained with"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(owned.path)))


def check(owned: Owned, tokenizer: Path, name: str, end_token: str | None = None) -> None:
    """Raise `ConfigError` unless the file `tokenizer`, called `name`, gives the ids that `owned` gives."""
    if owned.exactly is not None:
        if (held := sha256_of_file(tokenizer) if tokenizer.is_file() else owned.exactly) != owned.exactly:
            raise CheckpointError(
                f"{owned.owner} was trained with the tokenizer of sha256 {owned.exactly[:12]}, this run has "
                f"{held[:12]} ({name}): give the tokenizer.model of that run as data.tokenizer"
            )
        return
    if owned.path is None:
        return
    theirs, ours = Tokenizer(owned.path), Tokenizer(tokenizer, end_token)
    if theirs.vocabulary_sha256 == ours.vocabulary_sha256:
        return
    pairs = enumerate(zip(theirs.vocabulary, ours.vocabulary))
    differ = [(token_id, one, other) for token_id, (one, other) in pairs if one and other and one != other]
    if differ:
        token_id, one, other = differ[0]
        raise ConfigError(
            f"{name} is not the tokenizer of {owned.owner}: token {token_id} is {other!r} there and {one!r} in "
            f"{owned.path}, and {len(differ) - 1} more differ; use {owned.path}, and prepare the data with it"
        )


def _tokenizes(data: DataConfig) -> bool:
    """Whether the data are made from text, with `data.tokenizer` or one that is trained on it."""
    sources = [corpus.source for corpus in data.corpora] if data.source == "mixture" else [data.source]
    return any(source in (*RAW, "synthetic") for source in sources)
