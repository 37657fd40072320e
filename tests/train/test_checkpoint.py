"""Checkpoints by themselves: one rank, a small torch model, no training."""

import contextlib
import io
import json
import math
import os
import pickle
import random
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from train import checkpoint, checkpoint_files, checkpoint_tensors, checkpoint_tools, sharded_state
from train.checkpoint import Checkpoints, Progress, SaveError
from train.checkpoint_files import CheckpointError, Place
from train.checkpoint_tensors import boxes
from train.config import CheckpointConfig

LOADER = {"version": 1, "fingerprint": "f", "next_sample": 12}
FACTS = {"config": {"resume": "auto"}}


class PlainEngine:
    """AdamW without DeepSpeed: what `train.engine.Engine` is without ZeRO."""

    def __init__(self, seed=0, width=5):
        torch.manual_seed(seed)
        self.module = torch.nn.Sequential(torch.nn.Linear(width, 7), torch.nn.LayerNorm(7))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1, fused=True)

    def train(self, steps=1):
        for _ in range(steps):
            self.module(torch.ones(2, self.module[0].in_features)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def named_parameters(self):
        return self.module.named_parameters()

    def owned_state(self):
        return sharded_state.owned_state(self.module, self.optimizer)

    def optimizer_steps(self):
        return sharded_state.optimizer_steps(self.optimizer)

    def finish_loading(self, steps):
        sharded_state.finish_loading(self.optimizer, steps)

    def everything(self):
        state = {f"{k}/{o.name}": flat.clone() for o in self.owned_state() for k, flat in o.state.items()}
        return state | {"steps": self.optimizer_steps().clone()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def open_run(world, tmp_path):
    """A function that opens the checkpoints of a run in `tmp_path`; what it says is in `.said`."""

    def open_(engine=None, where=tmp_path / "checkpoints", **config):
        said = []
        engine = engine or PlainEngine().train(3)
        opened = Checkpoints(Place(where), engine, world, CheckpointConfig(**config), said.append)
        opened.engine, opened.said = engine, said
        return opened

    return open_


def save(run, step):
    run.save_last(Progress(step, 100 * step, LOADER, {"recent_losses": [1.5]}), FACTS)
    return checkpoint.complete(run.directory)[-1]


def test_boxes_worked_example():
    assert boxes((3, 4), 2, 9) == [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    assert boxes((3, 4), 4, 12) == [((1, 0), (2, 4))]
    assert boxes((3, 4), 5, 7) == [((1, 1), (1, 2))]
    assert boxes((5,), 1, 1) == []


def test_boxes_cover_every_run_once_and_in_order():
    draw = random.Random(0)
    for _ in range(300):
        shape = [draw.randint(1, 5) for _ in range(draw.randint(1, 4))]
        start, stop = sorted(draw.randint(0, math.prod(shape)) for _ in range(2))
        numbers = np.arange(math.prod(shape)).reshape(shape)
        found = [
            numbers[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))].ravel()
            for offsets, sizes in boxes(shape, start, stop)
        ]
        assert np.concatenate([*found, np.empty(0, int)]).tolist() == list(range(start, stop)), (shape, start, stop)


class TestSaving:
    def test_everything_comes_back(self, open_run):
        run = open_run()
        torch.manual_seed(99)
        save(run, 3)
        drawn, want = torch.rand(4), run.engine.everything()
        again = open_run(PlainEngine(seed=5))
        progress, state = again.load(again.choose("auto"))
        assert same(again.engine.everything(), want) and want["steps"] == 3
        assert torch.equal(torch.rand(4), drawn)
        assert progress == Progress(3, 300, LOADER, {"recent_losses": [1.5]})
        assert state["contains"] == ["master", "exp_avg", "exp_avg_sq"]
        assert same(again.engine.train(2).everything(), run.engine.train(2).everything())

    def test_training_goes_on_while_it_is_written(self, open_run, monkeypatch):
        run, gate = open_run(), threading.Event()
        write = checkpoint_tensors.write
        monkeypatch.setattr(checkpoint_tensors, "write", lambda *a, **k: gate.wait(20) and write(*a, **k))
        want = run.engine.everything()
        began = time.perf_counter()
        run.save(Progress(3, 300, LOADER), FACTS)
        assert time.perf_counter() - began < 5 and checkpoint.complete(run.directory) == []
        run.engine.train(2)
        # At most one in flight: the next save waits for this one.
        threading.Timer(0.3, gate.set).start()
        assert run.save(Progress(5, 500, LOADER), FACTS) > 0.2
        assert run.wait() is None
        again = open_run(PlainEngine(seed=5))
        again.load(again.choose("auto", before=3))
        assert same(again.engine.everything(), want)

    def test_host_memory_is_one_copy_kept_between_saves(self, open_run):
        run = open_run(PlainEngine(width=3000).train())
        for step in (1, 2, 3):
            save(run, step)
        held = sum(block.numel() for block in run._host._blocks)
        needed = 3 * sum(p.numel() for _, p in run.engine.named_parameters())
        assert needed <= held < 18 * needed  # blocks are cut generously for small models, once

    def test_synchronous_needs_no_copy_on_the_host(self, open_run):
        run = open_run(asynchronous=False)
        run.save(Progress(3, 300, LOADER), FACTS)
        assert [place.name for place in checkpoint.complete(run.directory)] == ["step-00000003"]
        assert run._host._blocks == []

    def test_a_failed_save_is_reported_and_the_next_one_works(self, open_run, tmp_path):
        run = open_run()
        (tmp_path / "checkpoints").write_text("in the way")
        run.save(Progress(3, 300, LOADER), FACTS)
        assert "in the way" not in str(run.wait()) and run.said[0].startswith("CHECKPOINT FAILED: step 3")
        with pytest.raises(SaveError, match="step 4 could not be saved"):
            save(run, 4)
        (tmp_path / "checkpoints").unlink()
        assert save(run, 5).name == "step-00000005"

    def test_a_step_that_is_reached_again_replaces_its_checkpoint(self, open_run):
        run = open_run()
        save(run, 3)
        run.engine.train()
        save(run, 3)
        again = open_run(PlainEngine(seed=5))
        again.load(again.choose("auto"))
        assert same(again.engine.everything(), run.engine.everything())

    def test_leftovers_of_a_crash_are_removed(self, open_run, tmp_path):
        save(open_run(), 3)
        own = tmp_path / "checkpoints"
        for name in ("step-00000004.incomplete", "step-00000002.removed"):
            (own / name).mkdir()
        (own / "step-00000003").rename(own / "step-00000005.replaced")  # died between the two renames
        run = open_run()
        assert [p.name for p in own.iterdir()] == ["step-00000005"]
        assert any("step-00000004.incomplete" in line for line in run.said)

    def test_remote(self, open_run):
        where = "memory://shelf/run"
        run = open_run(where=where, keep_last=2)
        for step in (3, 3, 6, 9):
            save(run, step)
        assert [place.name[:13] for place in checkpoint.complete(where)] == ["step-00000006", "step-00000009"]
        newest = checkpoint.complete(where)[-1]
        assert str(newest).startswith("memory://")
        newest._fs.pipe(f"{newest.path}/__0_0.distcp", b"cut")
        again = open_run(PlainEngine(seed=5), where=where)
        found = again.choose("auto")
        again.load(found)
        assert found.name.startswith("step-00000006") and "is damaged: 3 bytes" in again.said[0]
        assert same(again.engine.everything(), run.engine.everything())


class TestDamage:
    @pytest.fixture
    def saved(self, open_run):
        run = open_run(keep_last=3)
        return [save(run, step) for step in (1, 2, 3)]

    @staticmethod
    def flip(place):
        path = os.fspath(place / "__0_0.distcp")
        content = bytearray(open(path, "rb").read())
        content[len(content) // 2] ^= 1
        open(path, "wb").write(content)

    def test_the_one_before_is_used_and_the_damaged_one_set_aside(self, open_run, saved, tmp_path):
        self.flip(saved[2])
        (saved[1] / "state.json").remove()
        run = open_run()
        assert run.choose("auto").name == "step-00000001"
        assert f"{saved[2]}/__0_0.distcp is damaged" in run.said[0] and "step-00000003.damaged" in run.said[0]
        assert f"{saved[1]}/state.json is missing" in run.said[1]
        left = {p.name for p in (tmp_path / "checkpoints").iterdir()}
        assert left == {"step-00000001", "step-00000002.damaged", "step-00000003.damaged"}

    @pytest.mark.parametrize("harm", ["truncate", "no manifest", "cut manifest", "no file"])
    def test_each_harm_is_named(self, open_run, saved, harm):
        newest = saved[2]
        if harm == "truncate":
            os.truncate(newest / "__0_0.distcp", 100)
        elif harm == "no manifest":
            (newest / "manifest.json").remove()
        elif harm == "cut manifest":
            os.truncate(newest / "manifest.json", 30)
        else:
            (newest / "__0_0.distcp").remove()
        with pytest.raises(CheckpointError, match=r"step-00000003/(__0_0.distcp|manifest.json) .*on_damage=fallback"):
            open_run(on_damage="fail").choose("auto")
        assert open_run().choose("auto").name == "step-00000002"

    def test_without_any_good_one_nothing_is_touched(self, open_run, saved, tmp_path):
        for place in saved:
            self.flip(place)
        with pytest.raises(CheckpointError, match=r"no checkpoint below .* can be used"):
            open_run().choose("auto")
        assert len(checkpoint.complete(tmp_path / "checkpoints")) == 3

    def test_another_model(self, open_run, saved):
        run = open_run(PlainEngine(width=6))
        with pytest.raises(CheckpointError, match=r"0.weight is \(7, 5\) there and \(7, 6\) here"):
            run.load(saved[2])

    def test_nothing_there(self, open_run, tmp_path):
        with pytest.raises(CheckpointError, match="neither a checkpoint"):
            open_run().choose(str(tmp_path / "nowhere"))


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


class TestStrangers:
    """A checkpoint from a stranger, whose manifest is right, cannot run code here."""

    @pytest.fixture
    def saved(self, open_run):
        return save(open_run(), 3)

    def reads(self, open_run, place):
        run = open_run(PlainEngine(seed=5))
        with pytest.raises(CheckpointError) as error:
            run.load(place)
        return str(error.value)

    def test_code_in_the_metadata(self, open_run, saved, tmp_path):
        (saved / ".metadata").write(pickle.dumps(Evil(tmp_path / "ran")))
        assert "names posix.mkdir, which has no business there" in self.reads(open_run, saved)
        assert not (tmp_path / "ran").exists()
        with contextlib.suppress(Exception):  # what stock DCP does with the same file
            dcp.FileSystemReader(os.fspath(saved)).read_metadata()
        assert (tmp_path / "ran").exists()

    def test_attributes_of_a_known_class(self, open_run, saved):
        stream = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata.__init__.__globals__\n."
        (saved / ".metadata").write(stream)
        assert "has no business there" in self.reads(open_run, saved)

    def test_an_entry_that_dcp_would_unpickle(self, open_run, saved):
        metadata = pickle.loads((saved / ".metadata").read())
        metadata.state_dict_metadata["exp_avg/0.weight"] = BytesStorageMetadata()
        (saved / ".metadata").write(pickle.dumps(metadata))
        assert "exp_avg/0.weight as something other than a tensor" in self.reads(open_run, saved)

    def test_code_in_a_tensor(self, open_run, saved, tmp_path):
        metadata = pickle.loads((saved / ".metadata").read())
        file = io.BytesIO()
        torch.save({"t": Evil(tmp_path / "ran")}, file)
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, len(file.getvalue())
        (saved / "__0_0.distcp").write(file.getvalue())
        (saved / ".metadata").write(pickle.dumps(metadata))
        assert "cannot be read" in self.reads(open_run, saved)
        assert not (tmp_path / "ran").exists()

    def test_a_file_outside(self, open_run, saved):
        metadata = pickle.loads((saved / ".metadata").read())
        next(iter(metadata.storage_data.values())).relative_path = "../../secret"
        (saved / ".metadata").write(pickle.dumps(metadata))
        assert "names a file that is not of this checkpoint" in self.reads(open_run, saved)

    def test_missing_elements(self, open_run, saved):
        metadata = pickle.loads((saved / ".metadata").read())
        metadata.state_dict_metadata["exp_avg/0.weight"].chunks.clear()
        (saved / ".metadata").write(pickle.dumps(metadata))
        assert "has not every element of exp_avg/0.weight" in self.reads(open_run, saved)

    def test_stock_dcp_reads_what_is_written_here(self, open_run, saved):
        want = PlainEngine().train(3).everything()
        tensors = {"master/0.weight": torch.empty(7, 5)}
        dcp.load(tensors, checkpoint_id=os.fspath(saved), no_dist=True)
        assert torch.equal(tensors["master/0.weight"].flatten(), want["master/0.weight"])


class TestFormats:
    def test_format_1_goes_on(self, open_run, tmp_path):
        """As it was written before: DCP's own writer, no generators, no count of optimizer steps."""
        engine = PlainEngine().train(3)
        shapes = {name: p.shape for name, p in engine.named_parameters()}
        tensors = {k: v.view(shapes[k.split("/")[1]]) for k, v in engine.everything().items() if k != "steps"}
        old = tmp_path / "checkpoints" / "step-00000003"
        dcp.save(tensors, checkpoint_id=old, no_dist=True)
        state = {"format": 1, "step": 3, "tokens": 300, "loader": LOADER, **FACTS, "versions": {"torch": "2.9"}}
        (old / "state.json").write_text(json.dumps(state))
        files = {p.name: checkpoint_files._fingerprint(Place(p), None) for p in old.iterdir()}
        (old / "manifest.json").write_text(json.dumps({"files": files}))
        run = open_run(PlainEngine(seed=5))
        progress, _ = run.load(run.choose("auto"))
        assert progress == Progress(3, 300, LOADER)
        assert same(run.engine.everything(), engine.everything())

    def test_an_unknown_format_is_refused_with_its_versions(self, open_run):
        place = save(open_run(), 3)
        state = json.loads((place / "state.json").read()) | {"format": 99, "versions": {"ksa-train": "9.1"}}
        manifest = json.loads((place / "manifest.json").read())
        manifest["files"]["state.json"] = (place / "state.json").write(json.dumps(state).encode())
        (place / "manifest.json").write(json.dumps(manifest).encode())
        with pytest.raises(CheckpointError, match=r"format 99 \(written with ksa-train 9.1\), this version reads 1, 2"):
            open_run().choose("auto")
        assert place.exists()


class TestTools:
    @pytest.fixture
    def run_directory(self, open_run, tmp_path):
        run = open_run(keep_last=3)
        self.states = []
        for step in (3, 4, 5):
            save(run, step)
            self.states.append(run.engine.everything())
            run.engine.train()
        return tmp_path

    def test_list(self, run_directory, capsys):
        (run_directory / "checkpoints" / "step-00000001.damaged").mkdir()
        assert checkpoint_tools.main(["list", str(run_directory)]) == 0
        shown = capsys.readouterr().out
        assert "3 finished" in shown and "step-00000005  500 tokens" in shown and "ranks=1" in shown
        assert "step-00000001.damaged  not used" in shown

    def test_verify(self, run_directory, capsys):
        assert checkpoint_tools.main(["verify", str(run_directory)]) == 0
        os.truncate(run_directory / "checkpoints" / "step-00000004" / "__0_0.distcp", 9)
        assert checkpoint_tools.main(["verify", str(run_directory)]) == checkpoint_tools.DAMAGED
        shown = capsys.readouterr()
        assert "step-00000004  DAMAGED" in shown.out and "step-00000005  whole" in shown.out

    def test_reshape(self, run_directory, open_run, capsys):
        out = run_directory / "reshaped"
        assert checkpoint_tools.main(["reshape", str(run_directory), f"out={out}", "files=3"]) == 0
        (made,) = checkpoint.complete(out)
        assert sum(name.endswith(".distcp") for name in made.entries()) == 3
        run = open_run(PlainEngine(seed=5))
        run.load(run.choose(str(made)))
        assert same(run.engine.everything(), self.states[-1])

    def test_what_is_there_is_not_replaced(self, run_directory, capsys):
        own = run_directory / "checkpoints"
        before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
        for command in (["average", f"out={run_directory}"], ["reshape", f"out={own}", "moments=false"]):
            assert checkpoint_tools.main([command[0], str(run_directory), *command[1:]]) == 2
            assert "holds a checkpoint of step 5 already" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before

    def test_a_store_that_is_not_reached_is_named(self, monkeypatch, capsys):
        from fsspec.implementations.memory import MemoryFileSystem

        def refuse(*_, **__):
            raise RuntimeError("Unable to locate credentials")  # as botocore's, no OSError

        monkeypatch.setattr(MemoryFileSystem, "ls", refuse)
        monkeypatch.setattr(MemoryFileSystem, "exists", refuse)
        assert checkpoint_tools.main(["list", "memory://bucket/run"]) == 2
        assert "bucket/run" in (said := capsys.readouterr().err) and "locate credentials" in said

    def test_a_run_whose_checkpoints_are_elsewhere(self, run_directory, tmp_path, capsys):
        away = tmp_path / "away"
        away.mkdir()
        (run_directory / "checkpoints").rename(away / "name")
        settings = f"run: {{name: name}}\ncheckpoint: {{dir: {away}}}\n"
        (run_directory / "config.yaml").write_text(settings)
        assert checkpoint_tools.main(["list", str(run_directory)]) == 0
        assert "3 finished" in capsys.readouterr().out
        assert checkpoint.find(str(run_directory), "").name == "step-00000005"

    def test_average(self, run_directory, open_run):
        (run_directory / "config.yaml").write_text("run: {}")
        out = run_directory / "mean"
        assert checkpoint_tools.main(["average", str(run_directory), "last=2", f"out={out}"]) == 0
        (made,) = checkpoint.complete(out / "checkpoints")
        key = "master/0.weight"
        want = (self.states[-1][key].double() + self.states[-2][key].double()) / 2
        assert torch.equal(checkpoint_tensors.copy_of(made, key).flatten(), want.float())
        assert (out / "config.yaml").is_file()
        run = open_run(PlainEngine(seed=5))
        with pytest.raises(CheckpointError, match=r"holds weights alone .*average, of steps 4, 5"):
            run.load(made)

    @pytest.mark.parametrize(
        "arguments, words",
        [
            (["list"], "usage: python -m train.checkpoint"),
            (["verify", "/no/such"], "/no/such does not exist"),
            (["reshape", "."], "holds no finished checkpoint"),
        ],
    )
    def test_bad_input(self, arguments, words, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert checkpoint_tools.main(arguments) == 2
        assert words in capsys.readouterr().err
