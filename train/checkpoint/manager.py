"""Checkpoints: everything a run needs to continue as if it had never stopped, on any parallel layout.

    step-00000020/
        .metadata  __0_0.distcp ...   tensors in torch.distributed.checkpoint's format: `master/NAME`, `exp_avg/NAME`,
                                      `exp_avg_sq/NAME` (fp32, full shape), `optimizer/steps`, `rng/RANK/GENERATOR`
        state.json                    step, tokens, loader state, health, configuration, parallel layout, versions
        manifest.json                 size and sha256 of every file above; written last

Nothing in a checkpoint depends on how many ranks wrote it. Saving copies this rank's part of the state to host memory,
which is all that training waits for; a thread then writes and commits it. `python -m train.checkpoint` lists, verifies,
reshapes and averages checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.checkpoint import loading, locate, owner, parameters, retention, storage, tensors
from train.checkpoint.collective import CheckpointGroup, describe_error
from train.checkpoint.locate import read_state
from train.checkpoint.storage import MANIFEST, STATE, CheckpointError, CheckpointPath, SaveError
from train.checkpoint.tensors import Pieces
from train.distributed.groups import World

if TYPE_CHECKING:  # the commands do without DeepSpeed, whose import takes seconds
    from train.config.sections import CheckpointConfig
    from train.distributed.engine import Engine

_NO_SPACE = tuple(f"[Errno {code}]" for code in (errno.ENOSPC, errno.EDQUOT))  # the disk, or a quota, is used up
RETRY_AFTER = (1.0, 5.0)  # seconds to wait before the last save is tried again
_CLOSE_TIMEOUT = 60.0  # seconds for a save in flight when the run ends in an error


@dataclass(frozen=True)
class Progress:
    """How far a run is: everything in a checkpoint that is not a tensor."""

    step: int  # optimizer steps done, skipped ones included
    tokens: int  # text tokens of all ranks so far, without padding
    loader: dict[str, Any]
    health: dict[str, Any] = field(default_factory=dict)


SkipParameter = Callable[[str], bool]  # the name of a parameter -> whether to leave it out of a checkpoint


def _skip_none(name: str) -> bool:
    return False


class Checkpoints:
    """The checkpoints of one run: writes them, at most one at a time, and chooses the one to continue from.

    Collective: every rank makes the same calls in the same order. While it saves it holds a host copy of this rank's
    part of the state (12 bytes per parameter), in memory that is kept between saves.
    """

    def __init__(
        self,
        directory: CheckpointPath,
        engine: Engine,
        world: World,
        config: CheckpointConfig,
        log: Callable[[str], object],
    ):
        """`log` takes a line for the user; a thread may call it."""
        self.directory = directory
        self.on_wait: Callable[[], None] = lambda: None  # called every few seconds while training waits for files
        # Called on the main rank with each checkpoint that is finished and its step; a thread may call it.
        self.on_saved: Callable[[CheckpointPath, int], None] = lambda checkpoint, step: None
        self._engine, self._world, self._config, self._log = engine, world, config, log
        self._keep = config.keep_last, config.keep_every
        self._group = CheckpointGroup(world)
        self._host = tensors.HostMemory(pinned=world.device.type == "cuda")
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._is_last = False  # whether the save in flight is the last of the run
        if world.is_main:
            for name in storage.tidy(directory):
                log(f"removed {directory / name}: a save that was interrupted")
        self._group.barrier()

    def claim(self, run_directory: Path) -> None:
        """Note that the run in `run_directory` writes here; see `train.checkpoint.owner`. Raises `CheckpointError`."""

        def claim() -> str:
            owner.claim(self.directory, run_directory)
            return ""

        self._group.on_main(claim)

    # -- saving --------------------------------------------------------------------------------------------------------

    def save(self, progress: Progress, facts: dict[str, Any], skip: SkipParameter = _skip_none) -> float:
        """Start to save; returns the seconds that training waited, also for an earlier save.

        `facts` are added to state.json. Parameters whose name `skip` accepts are left out. With
        `checkpoint.asynchronous=false` the checkpoint is written before this returns. A failure is logged and training
        continues: the next save is the next attempt. Where the disk is full, the checkpoints that this one replaces
        are removed first and it is tried again.
        """
        began = time.perf_counter()
        self.wait()
        state = self._describe(progress, facts)
        staged = self._stage(skip, copy=self._config.asynchronous)
        self._thread = threading.Thread(
            target=self._write, args=(progress.step, staged, state), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not self._config.asynchronous:
            self.wait()
        return time.perf_counter() - began

    def save_last(self, progress: Progress, facts: dict[str, Any], skip: SkipParameter = _skip_none) -> float:
        """Save and wait until it is written, in several attempts. Raises `SaveError` on every rank."""
        began, self._is_last = time.perf_counter(), True
        for pause in (0.0, *RETRY_AFTER):
            for _ in range(round(pause)):
                time.sleep(1)
                self.on_wait()
            self.save(progress, facts, skip)
            if self.wait() is None:
                return time.perf_counter() - began
        try:
            finished = self._finished()
            start = f"from {finished[-1]}" if finished else "from its beginning, because it has no other checkpoint"
        except CheckpointError:  # not even listed
            start = "from its newest checkpoint"
        raise SaveError(
            f"step {progress.step} could not be saved below {self.directory}: {self._error}. The steps since the last "
            f"checkpoint are lost; once that is mended, the same command continues {start}"
        )

    def wait(self) -> str | None:
        """Wait for the save in flight, if any; returns why the last one failed, or None."""
        while self._thread is not None:
            self._thread.join(5)
            self.on_wait()
            if not self._thread.is_alive():
                self._thread = None
        return self._error

    def close(self) -> None:
        """Give a save in flight up to a minute to finish."""
        if self._thread is not None:
            self._thread.join(_CLOSE_TIMEOUT)

    def _describe(self, progress: Progress, facts: dict[str, Any]) -> dict[str, Any]:
        """state.json."""
        return {
            "format": locate.FORMAT,
            **asdict(progress),
            "contains": ["master", "exp_avg", "exp_avg_sq"],
            "layout": {"ranks": self._world.size, "tensor": self._world.tensor_group.size()},
            "saved_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": _versions(),
            **facts,
        }

    def _stage(self, skip: SkipParameter, copy: bool) -> dict[str, Pieces]:
        """This rank's part of the state, in host memory. With `copy` training may change the original at once."""
        staged: dict[str, Pieces] = {}
        group = self._world.data_context_group
        self._host.rewind()
        for i, owned in enumerate(self._engine.owned_state()):
            if skip(owned.name) or (owned.replicated and i % group.size() != group.rank()):
                continue
            for kind, flat in owned.state.items():
                on_host = self._host.copy(flat) if copy or flat.device.type != "cpu" else flat
                staged[f"{kind}/{owned.name}"] = parameters.owned_pieces(owned, on_host, self._world)
        self._host.wait()
        steps = self._engine.optimizer_steps().to("cpu", torch.float32, copy=True)
        staged["optimizer/steps"] = parameters.whole(steps)
        for name, generator in tensors.generators(self._world.device).items():
            staged[f"rng/{self._world.rank}/{name}"] = parameters.whole(generator)
        return staged

    def _write(self, step: int, staged: dict[str, Pieces], state: dict[str, Any]) -> None:
        """Write and commit on all ranks or on none; stores why it failed in `_error`. Collective over `_group`."""
        error = self._attempt(step, staged, state)
        if error is not None:
            try:
                shortage = self._make_room(step, sum(pieces.num_bytes for pieces in staged.values()), state, error)
            except Exception as problem:  # a rank is gone: the watchdog will tell
                shortage = describe_error(problem)
            if shortage is None:
                error = self._attempt(step, staged, state)
            elif shortage:
                error = f"{error}; {shortage}"
        self._error = error
        if error is not None and self._world.is_main:
            then = "" if self._is_last else "; training goes on, the next save point tries again"
            self._log(f"CHECKPOINT FAILED: step {step} could not be saved below {self.directory}: {error}{then}")

    def _attempt(self, step: int, staged: dict[str, Pieces], state: dict[str, Any]) -> str | None:
        """Write and commit once; returns why it failed, or None."""
        began, incomplete = time.perf_counter(), None
        try:
            incomplete = CheckpointPath(self._group.on_main(lambda: str(storage.begin(self.directory, step))))
            written = tensors.write(incomplete, staged, self._group.group)
            fingerprints = {name: found for part in self._group.gather(written) for name, found in part.items()}
            self._group.on_main(lambda: self._commit(incomplete, fingerprints, state, began))
            return None
        except BaseException as error:
            if self._world.is_main and incomplete is not None:
                with contextlib.suppress(OSError):
                    incomplete.remove()  # it may be what fills the disk
            return describe_error(error)

    def _commit(
        self, incomplete: CheckpointPath, fingerprints: dict[str, Any], state: dict[str, Any], began: float
    ) -> str:
        fingerprints[STATE] = (incomplete / STATE).write(json.dumps(state, indent=1).encode())
        seconds = {"write_seconds": round(time.perf_counter() - began, 3)}
        final = storage.commit(incomplete, self.directory, fingerprints, seconds)
        self.on_saved(final, state["step"])
        try:
            storage.prune(self.directory, lambda steps: retention.kept(steps, *self._keep, state))
        except OSError as error:  # the new checkpoint is finished all the same
            self._log(f"an old checkpoint below {self.directory} could not be removed: {describe_error(error)}")
        return str(final)

    def _make_room(self, step: int, num_bytes: int, state: dict[str, Any], error: str) -> str | None:
        """After a failure with `error`: where the disk is full, remove what goes anyway once this save is finished.

        `num_bytes`: of this rank's part. Returns None if something was removed, else what is missing in words; an empty
        text where the disk is not full. Collective.
        """
        tensor_bytes = sum(self._group.gather(num_bytes))

        def remove() -> str:
            free = storage.free_bytes(self.directory)
            needed = storage.MARGIN + max([tensor_bytes, *map(storage.size, storage.finished(self.directory)[-1:])])
            if free is None or (free >= needed and not any(code in error for code in _NO_SPACE)):
                return json.dumps("")
            removed = storage.tidy(self.directory)
            going = retention.removable([c.step for c in storage.finished(self.directory)], *self._keep, state)
            removed += storage.prune(self.directory, lambda steps: set(steps) - set(going))
            if removed:
                self._log(
                    f"the disk of {self.directory} is full: removed {', '.join(removed)} before step {step} is saved, "
                    f"not after it (checkpoint.keep_last={self._keep[0]} needs room for one checkpoint more)"
                )
                return json.dumps(None)
            return json.dumps(
                f"it needs {needed:,} bytes and {free:,} are free there, and no other checkpoint can go while it is "
                f"written (checkpoint.keep_last={self._keep[0]}, keep_every={self._keep[1]}): make room there"
            )

        return json.loads(self._group.on_main(remove))

    # -- choosing ------------------------------------------------------------------------------------------------------

    def find(self, location: str, key: str, known: CheckpointPath | None = None) -> CheckpointPath:
        """The checkpoint that the path `location`, given as `key`, means to the main rank; not verified.

        That is `known`, a choice of before, while it is there: a run that still saves may have removed it.
        """

        def path() -> str:
            if known is not None and MANIFEST in known.entries():
                return str(known)
            return str(locate.find(location, self.directory, key))

        return CheckpointPath(self._group.on_main(path))

    def choose(
        self, resume: str, before: int | None = None, known: CheckpointPath | None = None
    ) -> CheckpointPath | None:
        """The verified checkpoint that `resume` (auto, never or a path) means; None: start from scratch.

        A path is used only while the run has no checkpoint that was written under the same `resume`, so that the same
        command continues where it was interrupted. Damaged checkpoints of the run are quarantined and the one before
        is used; with `checkpoint.on_damage=fail` they are an error. `before`: only checkpoints of at most that step.
        `known`: one whose state.json has been read already.
        """
        if resume == "never":
            return None
        own = [c for c in self._finished() if before is None or c.step <= before]
        if resume != "auto" and not self._began_with(own, resume):
            found = self.find(resume, "resume", known)
            self.verify(found)
            return found
        damaged: list[tuple[CheckpointPath, CheckpointError]] = []
        while own:
            checkpoint = own.pop()
            try:
                self.verify(checkpoint)
            except CheckpointError as error:
                if self._config.on_damage == "fail":
                    raise CheckpointError(
                        f"{error}; checkpoint.on_damage=fallback quarantines it and uses the one before"
                    ) from error
                damaged.append((checkpoint, error))
                continue
            if known is None or str(known) != str(checkpoint):
                read_state(checkpoint)  # an unknown format is an error, not damage
            for bad, reason in damaged:
                name = self._quarantine(bad, "damaged")
                self._log(f"DAMAGED CHECKPOINT: {reason}; set aside as {name}, going on from {checkpoint}")
            return checkpoint
        if damaged:  # starting from scratch must be the user's decision
            raise CheckpointError(
                f"no checkpoint below {self.directory} can be used: {'; '.join(str(e) for _, e in damaged)}; "
                "use resume=never to start from scratch, or resume=PATH to continue another run"
            )
        return None

    def verify(self, checkpoint: CheckpointPath) -> None:
        """Check sizes and hashes; every rank reads some of the files. Raises `CheckpointError` on all ranks."""
        error = None
        try:
            storage.verify(checkpoint, self._world.rank, self._world.size, progress=lambda _: self.on_wait())
        except CheckpointError as problem:
            error = problem
        self._group.raise_together(error)

    def newest_healthy(self, finite_step: int) -> CheckpointPath | None:
        """The newest finished checkpoint from which a later step trained; `finite_step` is the last that did."""
        self.wait()
        healthy = [checkpoint for checkpoint in self._finished() if checkpoint.step < finite_step]
        return healthy[-1] if healthy else None

    def quarantine_after(self, step: int) -> None:
        """Quarantine the run's checkpoints beyond `step`, from which it now continues differently."""
        self.wait()
        for checkpoint in self._finished():
            if checkpoint.step > step:
                self._log(f"set aside {self._quarantine(checkpoint, 'abandoned')}: the run goes on from step {step}")

    def _quarantine(self, checkpoint: CheckpointPath, reason: str) -> str:
        return self._group.on_main(lambda: storage.quarantine(checkpoint, reason))

    def _finished(self) -> list[CheckpointPath]:
        """The run's checkpoints as the main rank lists them, oldest first."""
        names = self._group.on_main(lambda: json.dumps([c.name for c in storage.finished(self.directory)]))
        return [self.directory / name for name in json.loads(names)]

    def _began_with(self, own: list[CheckpointPath], resume: str) -> bool:
        return self._group.on_main(lambda: str(locate.began_with(own, resume))) == str(True)

    # -- loading -------------------------------------------------------------------------------------------------------

    def load(
        self, checkpoint: CheckpointPath, seed: int = 0, state: dict[str, Any] | None = None
    ) -> tuple[Progress, dict[str, Any]]:
        """Load weights, moments, random generators and progress; also returns state.json, which `state` is if given.

        A rank that the checkpoint has no generators for (the parallel layout changed) seeds its own from `seed`.
        """
        state = read_state(checkpoint) if state is None else state
        if not _has_moments(state):
            raise CheckpointError(
                f"{checkpoint} holds weights alone ({state.get('made_by', 'no optimizer state')}): it can be sampled "
                "and exported, and a run can begin with it (init_from=PATH); to resume, it takes one that a run wrote"
            )
        loading.load_engine(checkpoint, state, self._engine, self._world, self._group, moments=True, seed=seed)
        known = {key: state[key] for key in ("step", "tokens", "loader")}
        return Progress(**known, health=state.get("health", {})), state

    def inherit(self, checkpoint: CheckpointPath, state: dict[str, Any]) -> None:
        """Verify and load the weights of another run of the same model, and AdamW's moments if it has them."""
        self.verify(checkpoint)
        moments = _has_moments(state)
        loading.load_engine(checkpoint, state, self._engine, self._world, self._group, moments=moments, seed=None)


def _has_moments(state: dict[str, Any]) -> bool:
    return "exp_avg" in state.get("contains", ["exp_avg"])


def _versions() -> dict[str, str]:
    """Versions of Python and the libraries; one that is not installed as a package is left out."""
    found = {"python": platform.python_version()}
    for name in ("ksa-train", "torch", "deepspeed", "megatron-core", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
