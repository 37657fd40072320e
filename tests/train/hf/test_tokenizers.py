"""Weights keep their tokenizer: in imports, runs, shards and exports; another one is refused."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from data_pipeline import DataConfig, DataError, Tokenizer
from data_pipeline.text.prepare import prepare
from tests.data_pipeline.text.test_end_token import CHAT, make_json
from tests.ksa_model.test_model import small_config
from tests.ranks import run_on_ranks
from tests.train.hf.interop import add_tokenizer, make_qwen, make_run, run_command
from tests.train.runs import make_config
from train import export as export_command
from train import generate
from train import import_hf as import_command
from train.checkpoint import locate
from train.checkpoint.storage import CheckpointError, finished
from train.config.errors import ConfigError
from train.distributed.signals import BAD_INPUT
from train.hf import export, tokenizers
from train.start import Import, Inherit, tokenizer_of, with_tokenizer


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A Qwen3 directory whose tokenizer.json ends documents with token 0."""
    directory = tmp_path_factory.mktemp("tokenizers") / "qwen"
    make_qwen(directory, tied=True, vocab_size=512, num_hidden_layers=2)
    make_json(directory, "<|endoftext|>", "<|turn|>", "<|pad|>")
    described = {"eos_token": "<|turn|>", "pad_token": "<|pad|>", "chat_template": CHAT}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    return directory


MODEL = dict(
    model__hidden_size=32, model__num_layers=2, model__num_kv_heads=2, model__head_dim=16, model__ffn_size=48,
    model__vocab_size=512, model__layer_pattern="KF", model__tie_embeddings=True,
)  # fmt: skip


@pytest.fixture
def config(corpus, tmp_path):
    return lambda **changes: make_config(corpus, tmp_path, **MODEL, **changes)


def chosen(config, start):
    return with_tokenizer(config, tokenizer_of(config, start)).data.tokenizer


def test_an_import_brings_its_tokenizer(config, qwen, capsys):
    asked = config(init_from=f"hf:{qwen}")
    assert chosen(asked, Import()) == str(qwen / "tokenizer.json")
    code, said = run_command(import_command, qwen, capsys=capsys)
    assert code == 0 and f"data.tokenizer={qwen}/tokenizer.json" in said.split()
    named = config(init_from=f"hf:{qwen}", data__tokenizer=str(qwen / "tokenizer.json"))
    assert with_tokenizer(named, tokenizer_of(named, Import())) is named


@pytest.mark.parametrize("data", [dict(data__source="synthetic", data__path=None, data__validation_fraction=0.01)])
def test_every_source_of_text_takes_it(config, qwen, data, corpus):
    assert chosen(config(init_from=f"hf:{qwen}", **data), Import()) == str(qwen / "tokenizer.json")
    text = dict(name="a", source="jsonl", path=str(corpus))
    mixture = dict(data__source="mixture", data__path=None, data__corpora=[text], data__validation_fraction=0.01)
    assert chosen(config(init_from=f"hf:{qwen}", **mixture), Import()) == str(qwen / "tokenizer.json")


def test_another_tokenizer_is_refused(config, qwen, tmp_path, corpus):
    (tmp_path / "other").mkdir()
    other = add_tokenizer(tmp_path / "other", corpus)
    asked = config(init_from=f"hf:{qwen}", data__tokenizer=str(other))
    with pytest.raises(ConfigError, match=r"data.tokenizer=.*other/tokenizer.model is not the tokenizer of .*qwen"):
        chosen(asked, Import())
    larger = json.loads((qwen / "tokenizer.json").read_text())
    larger["added_tokens"].append(larger["added_tokens"][0] | {"id": 300, "content": "<|new|>"})
    (tmp_path / "larger.json").write_text(json.dumps(larger))  # the same ids, and one more
    asked = config(init_from=f"hf:{qwen}", data__tokenizer=str(tmp_path / "larger.json"))
    assert chosen(asked, Import()) == str(tmp_path / "larger.json")


def test_shards_of_another_tokenizer_are_refused(config, qwen, tmp_path, corpus):
    """They have a tokenizer of their own, which is compared once they are open; one with the same vocabulary fits."""
    text = DataConfig(source="jsonl", path=str(corpus), cache_dir=str(tmp_path / "cache"), vocab_size=400)
    again = json.loads((qwen / "tokenizer.json").read_text())
    (tmp_path / "again.json").write_text(json.dumps(again, indent=7))
    fits = prepare(dataclasses.replace(text, tokenizer=str(tmp_path / "again.json")))
    wrong = prepare(text)
    for prepared in (fits, wrong):
        shards = dict(data__source="shards", data__path=str(prepared.directory), data__validation_fraction=0.01)
        asked = config(init_from=f"hf:{qwen}", **shards)
        owned = tokenizer_of(asked, Import())
        assert chosen(asked, Import()) is None
        if prepared is fits:
            tokenizers.check(owned, prepared.tokenizer_path, "the tokenizer of the data")
            continue
        with pytest.raises(ConfigError, match="the tokenizer of the data is not the tokenizer of"):
            tokenizers.check(owned, prepared.tokenizer_path, "the tokenizer of the data")
        from train.trainer import train

        with pytest.raises(ConfigError, match=r"the tokenizer of the data, .* is not the tokenizer of"):
            train(asked)
        assert not asked.run.directory.exists()


def test_weights_without_a_tokenizer_need_one(config, tmp_path, qwen, capsys):
    make_qwen(tmp_path / "bare", tied=True, vocab_size=512, num_hidden_layers=2)
    with pytest.raises(ConfigError, match=r"data.tokenizer is not set, and .*bare does not come with its tokenizer"):
        chosen(config(init_from=f"hf:{tmp_path}/bare"), Import())
    named = config(init_from=f"hf:{tmp_path}/bare", data__tokenizer=str(qwen / "tokenizer.json"))
    assert chosen(named, Import()) == str(qwen / "tokenizer.json")
    code, said = run_command(import_command, tmp_path / "bare", f"out={tmp_path}/run", capsys=capsys)
    assert code == 0, said
    (found,) = finished(tmp_path / "run/checkpoints")
    with pytest.raises(ConfigError, match=r"data.tokenizer is not set, and .* does not come with its tokenizer"):
        chosen(config(init_from=f"{tmp_path}/run"), Inherit(found, locate.read_state(found)))


def test_an_imported_run_keeps_its_tokenizer(config, qwen, tmp_path, capsys, corpus):
    code, said = run_command(import_command, qwen, f"out={tmp_path}/run", capsys=capsys)
    assert code == 0, said
    (found,) = finished(tmp_path / "run/checkpoints")
    state, tokenizer = locate.read_state(found), Tokenizer(qwen / "tokenizer.json")
    assert state["tokenizer_sha256"] == tokenizer.fingerprint
    assert state["vocabulary_sha256"] == tokenizer.vocabulary_sha256
    asked = config(init_from=f"{tmp_path}/run")
    assert chosen(asked, Inherit(found, locate.read_state(found))) == str(tmp_path / "run/tokenizer.model")
    (tmp_path / "other").mkdir()
    other = add_tokenizer(tmp_path / "other", corpus)
    with pytest.raises(CheckpointError, match=r"give the tokenizer.model of that run as data.tokenizer"):
        chosen(
            config(init_from=f"{tmp_path}/run", data__tokenizer=str(other)), Inherit(found, locate.read_state(found))
        )
    (tmp_path / "run/tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=r"does not come with the tokenizer of sha256"):
        chosen(asked, Inherit(found, locate.read_state(found)))


def test_a_run_that_trained_its_tokenizer_is_left_alone(config, world, tmp_path):
    make_run(world, tmp_path / "run", small_config())
    (found,) = finished(tmp_path / "run/checkpoints")
    assert chosen(config(init_from=f"{tmp_path}/run"), Inherit(found, locate.read_state(found))) is None


def test_a_run_with_another_tokenizer_is_not_used(world, tmp_path, capsys, qwen, corpus):
    (tmp_path / "hf").mkdir()
    add_tokenizer(tmp_path / "hf", corpus)
    facts = dict(tokenizer_sha256=Tokenizer(qwen / "tokenizer.json").fingerprint)
    make_run(world, tmp_path / "run", small_config(vocab_size=400), tmp_path / "hf/tokenizer.model", **facts)
    for use in (lambda: export.open_run(tmp_path / "run"), lambda: generate.load(tmp_path / "run", world, "fp32")):
        with pytest.raises(CheckpointError, match=r"tokenizer.model has sha256 .* copy that tokenizer there"):
            use()


def test_an_export_whose_tokenizer_was_replaced_is_refused(world, tmp_path, capsys, qwen, corpus):
    run = tmp_path / "run"
    make_run(world, run, small_config(vocab_size=400), qwen / "tokenizer.json")
    code, said = run_command(export_command, run, f"out={tmp_path}/out", capsys=capsys)
    assert code == 0, said
    assert tokenizers.find_tokenizer(tmp_path / "out") == tmp_path / "out/tokenizer.json"
    make_json(tmp_path / "out", "<|endoftext|>", "<|other|>")
    code, said = run_command(import_command, tmp_path / "out", f"out={tmp_path}/again", capsys=capsys)
    assert code == BAD_INPUT and "tokenizer.json holds the vocabulary of sha256" in said
    assert len(said.strip().splitlines()) == 1 and not (tmp_path / "again").exists()


def test_a_run_says_which_tokenizer_it_takes(config, qwen, tmp_path, capsys):
    """Before the data are opened, which may take hours."""
    from train.trainer import train

    with pytest.raises(DataError, match="no such file"):
        train(config(init_from=f"hf:{qwen}", data__path=str(tmp_path / "nowhere.jsonl")))
    assert f"data.tokenizer={qwen}/tokenizer.json: the tokenizer of {qwen}\n" in capsys.readouterr().err


def test_training_from_a_run_takes_its_tokenizer(qwen, tmp_path, corpus):
    from tests.train.runs import run_training

    assert import_command.main([str(qwen), f"out={tmp_path}/base"]) == 0
    for steps in (1, 2):  # the second one resumes
        changes = MODEL | dict(init_from=f"{tmp_path}/base", run__steps=steps, run__name="next")
        run_on_ranks(1, run_training, str(corpus), str(tmp_path), changes)
    run = tmp_path / "next"
    assert (run / "tokenizer.model").read_bytes() == (qwen / "tokenizer.json").read_bytes()
    assert Tokenizer(run / "tokenizer.model").description["chat_template"] == CHAT
    state = locate.read_state(finished(run / "checkpoints")[-1])
    assert state["step"] == 2
    assert state["vocabulary_sha256"] == Tokenizer(qwen / "tokenizer.json").vocabulary_sha256


# -- what an export says about its tokenizer --------------------------------------------------------------------------


def add_bos(path, wrapped):
    """Let a tokenizer.json begin and end every text with special tokens, as many do."""
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|turn|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]}
                           for i, t in enumerate(("<|endoftext|>", "<|turn|>"))},
    }  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    held = json.loads(path.read_text())
    held["post_processor"] = {"type": "Sequence", "processors": [level, template]} if wrapped else template
    path.write_text(json.dumps(held))


@pytest.mark.parametrize("wrapped", [False, True])
def test_exports_begin_as_training_does(world, tmp_path, capsys, qwen, wrapped):
    """An imported chat model: no token before a text, and its template, ends and padding go along."""
    import shutil

    import transformers

    shutil.copytree(qwen, tmp_path / "hf")
    add_bos(tmp_path / "hf/tokenizer.json", wrapped)
    ours = Tokenizer(tmp_path / "hf/tokenizer.json")
    before = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert before("hello")["input_ids"][0] == 1, "a tokenizer that adds nothing would prove nothing"
    for module, source, target in ((import_command, "hf", "run"), (export_command, "run", "out")):
        code, said = run_command(module, tmp_path / source, f"out={tmp_path}/{target}", capsys=capsys)
        assert code == 0, said
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("hello there", "caf\u00e9\n"):
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    inputs = theirs("hello", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    assert (theirs.eos_token, theirs.pad_token, theirs.chat_template) == ("<|turn|>", "<|pad|>", CHAT)
    assert theirs.apply_chat_template([{"content": "hello"}], tokenize=False) == "hello<|turn|>"
    assert model.generation_config.eos_token_id == [0, 1] and model.generation_config.pad_token_id == 2
    assert model.config.eos_token_id == 0  # which ended the documents of the training
    assert Tokenizer(tmp_path / "out/tokenizer.json").vocabulary_sha256 == ours.vocabulary_sha256
    for source in ("hf", "run", "out"):
        assert set(generate.load(tmp_path / source, world, "fp32").stop_tokens) == {0, 1}


def test_a_tokenizer_that_adds_nothing_is_exported_as_it_is(qwen):
    content = (qwen / "tokenizer.json").read_bytes()
    assert export.without_added_tokens(content) == content


def test_generated_text_keeps_its_first_space(world, tmp_path, capsys):
    """A tokenizer with a dummy prefix drops the space before the first word of whatever it decodes."""
    import sentencepiece

    from tests.data_pipeline.conftest import write_corpus

    texts = write_corpus(tmp_path / "c.jsonl", 300)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "plain"), vocab_size=80, minloglevel=3
    )
    tokenizer = Tokenizer(tmp_path / "plain.model")
    whole = "window attention window"
    ids = tokenizer.encode(whole).tolist()
    for cut in range(1, len(ids)):
        prompt = tokenizer.decode(ids[:cut])
        assert prompt + generate.continuation(tokenizer, ids[:cut], ids[cut:]) == whole
        stream = generate.TextStream(tokenizer, ids[:cut])
        assert prompt + "".join([*map(stream.add, ids[cut:]), stream.add(None)]) == whole
    space = tokenizer.encode("a b")[-2:].tolist()

    def say_a_word(model, prompts, sampling, show):
        for token in space:
            show([token] * len(prompts))
        return [space] * len(prompts), type("Cache", (), {"lengths": [9], "allocated_bytes": 1})()

    make_run(world, tmp_path / "run", small_config(vocab_size=80), tmp_path / "plain.model")
    session = generate.load(tmp_path / "run", world, "fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "generate", say_a_word)
        for prompts in (["attention"], ["attention", "window"]):
            capsys.readouterr()
            generate.answer(session, prompts, generate.GenerateConfig(max_tokens=2))
            expected = tokenizer.decode([*tokenizer.encode("attention").tolist(), *space])
            assert expected.startswith("attention ") and capsys.readouterr().out.startswith(expected)
    assert torch.is_tensor(session.model.embedding.weight)
