"""Formats of checkpoints, and which one a path means."""

import json

import pytest
import torch.distributed.checkpoint as dcp

from tests.train.checkpoint.plain import FACTS, LOADER, PlainEngine, same, save
from train.checkpoint import storage
from train.checkpoint.manager import Progress
from train.checkpoint.storage import CheckpointError, CheckpointPath


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
        files = {p.name: storage._fingerprint(CheckpointPath(p), None) for p in old.iterdir()}
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
