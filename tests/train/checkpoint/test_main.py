"""`python -m train.checkpoint`."""

import os

import pytest
import torch

from tests.train.checkpoint.plain import PlainEngine, same, save
from train.checkpoint import __main__ as command
from train.checkpoint import locate, storage
from train.checkpoint import tensors as checkpoint_tensors
from train.checkpoint.storage import CheckpointError


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
        assert command.main(["list", str(run_directory)]) == 0
        shown = capsys.readouterr().out
        assert "3 finished" in shown and "step-00000005  500 tokens" in shown and "ranks=1" in shown
        assert "step-00000001.damaged  not used" in shown

    def test_verify(self, run_directory, capsys):
        assert command.main(["verify", str(run_directory)]) == 0
        os.truncate(run_directory / "checkpoints" / "step-00000004" / "__0_0.distcp", 9)
        assert command.main(["verify", str(run_directory)]) == command.DAMAGED
        shown = capsys.readouterr()
        assert "step-00000004  DAMAGED" in shown.out and "step-00000005  whole" in shown.out

    def test_reshape(self, run_directory, open_run, capsys):
        out = run_directory / "reshaped"
        assert command.main(["reshape", str(run_directory), f"out={out}", "files=3"]) == 0
        (made,) = storage.finished(out)
        assert sum(name.endswith(".distcp") for name in made.entries()) == 3
        run = open_run(PlainEngine(seed=5))
        run.load(run.choose(str(made)))
        assert same(run.engine.everything(), self.states[-1])

    def test_what_is_there_is_not_replaced(self, run_directory, capsys):
        own = run_directory / "checkpoints"
        before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
        for words in (["average", f"out={run_directory}"], ["reshape", f"out={own}", "moments=false"]):
            assert command.main([words[0], str(run_directory), *words[1:]]) == 2
            assert "already holds a checkpoint of step 5" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before

    def test_a_store_that_is_not_reached_is_named(self, monkeypatch, capsys):
        from fsspec.implementations.memory import MemoryFileSystem

        def refuse(*_, **__):
            raise RuntimeError("Unable to locate credentials")  # as botocore's, no OSError

        monkeypatch.setattr(MemoryFileSystem, "ls", refuse)
        monkeypatch.setattr(MemoryFileSystem, "exists", refuse)
        assert command.main(["list", "memory://bucket/run"]) == 2
        assert "bucket/run" in (said := capsys.readouterr().err) and "locate credentials" in said

    def test_a_run_whose_checkpoints_are_elsewhere(self, run_directory, tmp_path, capsys):
        away = tmp_path / "away"
        away.mkdir()
        (run_directory / "checkpoints").rename(away / "name")
        settings = f"run: {{name: name}}\ncheckpoint: {{dir: {away}}}\n"
        (run_directory / "config.yaml").write_text(settings)
        assert command.main(["list", str(run_directory)]) == 0
        assert "3 finished" in capsys.readouterr().out
        assert locate.find(str(run_directory), "").name == "step-00000005"

    def test_average(self, run_directory, open_run):
        (run_directory / "config.yaml").write_text("run: {}")
        out = run_directory / "mean"
        assert command.main(["average", str(run_directory), "last=2", f"out={out}"]) == 0
        (made,) = storage.finished(out / "checkpoints")
        key = "master/0.weight"
        want = (self.states[-1][key].double() + self.states[-2][key].double()) / 2
        assert torch.equal(checkpoint_tensors.read_tensor(made, key).flatten(), want.float())
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
        assert command.main(arguments) == 2
        assert words in capsys.readouterr().err
