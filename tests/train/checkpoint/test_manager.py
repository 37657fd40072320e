"""Checkpoints of one rank and a small torch model, without training."""

import errno
import os
import threading

import pytest
import torch

from tests.train.checkpoint.plain import FACTS, LOADER, PlainEngine, same, save
from train.checkpoint import manager, storage
from train.checkpoint import tensors as checkpoint_tensors
from train.checkpoint.manager import Progress, SaveError
from train.checkpoint.storage import CheckpointError


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
        run, gate, passed = open_run(), threading.Event(), []
        write = checkpoint_tensors.write
        monkeypatch.setattr(checkpoint_tensors, "write", lambda *a, **k: passed.append(gate.wait(60)) or write(*a, **k))
        want = run.engine.everything()
        run.save(Progress(3, 300, LOADER), FACTS)
        assert passed == [] and storage.finished(run.directory) == []  # the writer is still at the gate
        run.engine.train(2)
        # At most one in flight: the next save waits for this one.
        threading.Timer(0.3, gate.set).start()
        assert run.save(Progress(5, 500, LOADER), FACTS) > 0
        assert passed[0] and storage.finished(run.directory)[0].name == "step-00000003"
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
        assert [place.name for place in storage.finished(run.directory)] == ["step-00000003"]
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

    @pytest.fixture
    def full_disk(self, monkeypatch, tmp_path):
        """A disk with room for `room` checkpoints, whole or not: sets the number; writing one more fails."""
        own, write, make = tmp_path / "checkpoints", checkpoint_tensors.write, {"room": 2, "free": 0}

        def there():
            return [p for p in own.iterdir() if p.is_dir() and p.name.startswith("step-")]

        def write_if_there_is_room(*arguments):
            if len(there()) > make["room"]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*arguments)

        monkeypatch.setattr(checkpoint_tensors, "write", write_if_there_is_room)
        monkeypatch.setattr(storage, "free_bytes", lambda _: make["free"])
        monkeypatch.setattr(manager, "RETRY_AFTER", (1.0,))
        return make

    def test_keep_last_of_two_needs_room_for_two(self, open_run, full_disk):
        run = open_run(keep_last=2)
        for step in (1, 2, 3, 4):
            save(run, step)
        assert [place.step for place in storage.finished(run.directory)] == [3, 4]
        assert len(run.said) == 2 and "is full: removed step-00000001 before step 3 is saved" in run.said[0]
        assert "checkpoint.keep_last=2 needs room for one checkpoint more" in run.said[0]

    def test_a_save_in_the_middle_makes_room_too(self, open_run, full_disk):
        run = open_run(keep_last=2)
        for step in (1, 2, 3):
            run.save(Progress(step, 100 * step, LOADER), FACTS)
        assert run.wait() is None and [place.step for place in storage.finished(run.directory)] == [2, 3]

    def test_leftovers_go_first(self, open_run, full_disk, tmp_path):
        full_disk["room"] = 3
        run = open_run(keep_last=3)
        for step in (1, 2):
            save(run, step)
        (tmp_path / "checkpoints/step-00000009.removed").mkdir()  # the run was killed while it pruned
        save(run, 3)
        assert [place.step for place in storage.finished(run.directory)] == [1, 2, 3]

    def test_the_only_checkpoint_is_never_given_up(self, open_run, full_disk):
        full_disk.update(room=1, free=1234)
        run, waited = open_run(keep_last=1), []
        save(run, 1)
        run.on_wait = lambda: waited.append(1)
        with pytest.raises(SaveError) as failed:
            save(run, 2)
        assert [place.step for place in storage.finished(run.directory)] == [1] and waited
        said = str(failed.value)
        assert "\n" not in said and "step 2 could not be saved" in said and "No space left" in said
        needed = storage.size(storage.finished(run.directory)[0]) + storage.MARGIN
        assert f"it needs {needed:,} bytes and 1,234 are free" in said
        assert "(checkpoint.keep_last=1, keep_every=None)" in said and "continues from" in said
        assert "step-00000001" in said and all("training goes on" not in line for line in run.said)
        full_disk["room"] = 2
        assert save(run, 2).step == 2

    def test_healthy_checkpoints_are_not_given_up_for_a_bad_one(self, open_run, full_disk):
        full_disk["room"] = 3
        run = open_run(keep_last=2)
        for step in range(1, 8):
            progress = Progress(step, 100 * step, LOADER, {"last_finite_step": min(step, 3)})
            run.save(progress, FACTS)
        assert run.wait() is None
        assert [place.step for place in storage.finished(run.directory)] == [2, 3, 7]

    def test_an_error_of_another_kind_removes_nothing(self, open_run, full_disk, monkeypatch):
        run = open_run(keep_last=2)
        for step in (1, 2):
            save(run, step)
        full_disk["free"] = 1 << 40
        monkeypatch.setattr(checkpoint_tensors, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "lost")))
        with pytest.raises(SaveError, match="lost"):
            save(run, 3)
        assert [place.step for place in storage.finished(run.directory)] == [1, 2]

    @pytest.mark.parametrize("asynchronous", [True, False])
    def test_waiting_for_a_save_is_told(self, open_run, asynchronous):
        run, waited = open_run(asynchronous=asynchronous), []
        run.on_wait = lambda: waited.append(1)
        run.save(Progress(3, 300, LOADER), FACTS)
        assert asynchronous or waited
        run.wait()
        assert waited

    def test_each_finished_checkpoint_is_told(self, open_run):
        run, told = open_run(), []
        run.on_saved = lambda checkpoint, step: told.append((checkpoint.name, step))
        save(run, 3)
        assert told == [("step-00000003", 3)]

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
        assert [place.name[:13] for place in storage.finished(where)] == ["step-00000006", "step-00000009"]
        newest = storage.finished(where)[-1]
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
        assert len(storage.finished(tmp_path / "checkpoints")) == 3

    def test_another_model(self, open_run, saved):
        run = open_run(PlainEngine(width=6))
        with pytest.raises(CheckpointError, match=r"0.weight is \(7, 5\) there and \(7, 6\) here"):
            run.load(saved[2])

    def test_nothing_there(self, open_run, tmp_path):
        with pytest.raises(CheckpointError, match="neither a checkpoint"):
            open_run().choose(str(tmp_path / "nowhere"))
