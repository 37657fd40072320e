"""Checkpoints: everything a run needs to go on as if it had never stopped, whatever layout it goes on with.

    step-00000020/
        .metadata  __0_0.distcp ...   tensors in torch.distributed.checkpoint's format: `master/NAME`, `exp_avg/NAME`,
                                      `exp_avg_sq/NAME` (fp32, full shape), `optimizer/steps`, `rng/RANK/GENERATOR`
        state.json                    step, tokens, loader state, health, configuration, layout, versions
        manifest.json                 size and sha256 of every file above; written last

Nothing in it depends on how many ranks wrote it. Saving copies this rank's part of the state to host memory, which is
all that training waits for; a thread then writes and commits it. The thread talks to the other ranks over a gloo group
of its own. `python -m train.checkpoint` lists, verifies, reshapes and averages checkpoints.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import yaml

from train import checkpoint_files as files
from train import checkpoint_parameters as parameters
from train import checkpoint_tensors as tensors
from train import stages
from train.checkpoint_files import MANIFEST, STATE, CheckpointError, Place, Saved
from train.checkpoint_tensors import Pieces
from train.parallel import World

if TYPE_CHECKING:  # the command line does without DeepSpeed and its seconds of imports
    from train.config import CheckpointConfig
    from train.engine import Engine

FORMAT = 2
READABLE = (1, 2)  # 1 had no generators, no count of optimizer steps and no health
_FAILED_THREAD_WAIT = 60.0  # seconds for a save in flight when the run is ending in an error


class SaveError(RuntimeError):
    """The last checkpoint of a run could not be written; the message says why."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: everything in a checkpoint that is not a tensor."""

    step: int  # optimizer steps done, skipped ones included
    tokens: int  # real tokens seen by all ranks
    loader: dict[str, Any]
    health: dict[str, Any] = field(default_factory=dict)


Omit = Callable[[str], bool]


def _nothing(name: str) -> bool:
    return False


class Checkpoints:
    """The checkpoints of one run: writes them, at most one at a time, and finds the one to go on from.

    Collective: every rank makes the same calls in the same order. Host memory while it saves: what this rank keeps of
    12 bytes per parameter, once, kept between saves.
    """

    def __init__(self, directory: Place, engine: Engine, world: World, config: CheckpointConfig, say: Callable):
        """`say` takes a line for people; it may be called from a thread."""
        self.directory = directory
        self._engine, self._world, self._config, self._say = engine, world, config, say
        # Waits are for storage here, which may take long; a rank that died ends them at once.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        self._host = tensors.HostMemory(pinned=world.device.type == "cuda")
        self.waiting: Callable[[], None] = lambda: None  # called every few seconds while training waits for a save
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        if world.is_main:
            for name in files.tidy(directory):
                say(f"removed {directory / name}: a save that was interrupted")
        dist.barrier(self._group)

    # -- saving --------------------------------------------------------------------------------------------------------

    def save(self, progress: Progress, facts: dict[str, Any], omit: Omit = _nothing) -> float:
        """Begin to save; returns the seconds that training stood still, waiting for the save before included.

        `facts` go into state.json as they are; parameters whose name `omit` accepts are left out. With
        `checkpoint.asynchronous=false` it is written before this returns.
        A failure is reported, and the run goes on: the next save is the next attempt.
        """
        began = time.perf_counter()
        self.wait()
        state = self._describe(progress, facts)
        if self._config.asynchronous:
            staged = self._stage(omit, copy=True)
            self._thread = threading.Thread(
                target=self._write, args=(progress.step, staged, state), name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._write(progress.step, self._stage(omit, copy=False), state)
        return time.perf_counter() - began

    def save_last(self, progress: Progress, facts: dict[str, Any], omit: Omit = _nothing) -> float:
        """Save and wait until it is written, trying twice. Raises `SaveError` on every rank."""
        began = time.perf_counter()
        for _ in range(2):
            self.save(progress, facts, omit)
            if self.wait() is None:
                return time.perf_counter() - began
        raise SaveError(f"step {progress.step} could not be saved below {self.directory}: {self._error}")

    def wait(self) -> str | None:
        """Wait for the save in flight, if any; returns why the last one failed, or None."""
        while self._thread is not None:
            self._thread.join(5)
            self.waiting()
            if not self._thread.is_alive():
                self._thread = None
        return self._error

    def close(self) -> None:
        """Give a save in flight the time to finish."""
        if self._thread is not None:
            self._thread.join(_FAILED_THREAD_WAIT)

    def _describe(self, progress: Progress, facts: dict[str, Any]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **asdict(progress),
            "contains": ["master", "exp_avg", "exp_avg_sq"],
            "layout": {"ranks": self._world.size, "tensor": self._world.tensor_group.size()},
            "saved_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": _versions(),
            **facts,
        }

    def _stage(self, omit: Omit, copy: bool) -> dict[str, Pieces]:
        """This rank's part of the state, on the host. With `copy` the training may go on at once."""
        staged: dict[str, Pieces] = {}
        group = self._world.data_context_group
        self._host.rewind()
        for i, owned in enumerate(self._engine.owned_state()):
            if omit(owned.name) or (owned.replicated and i % group.size() != group.rank()):
                continue
            for kind, flat in owned.state.items():
                there = self._host.take(flat) if copy or flat.device.type != "cpu" else flat
                staged[f"{kind}/{owned.name}"] = parameters.pieces(owned, there, self._world)
        self._host.arrived()
        staged["optimizer/steps"] = parameters.whole(self._engine.optimizer_steps().to("cpu", torch.float32, copy=True))
        for name, state in tensors.generators(self._world.device).items():
            staged[f"rng/{self._world.rank}/{name}"] = parameters.whole(state)
        return staged

    def _write(self, step: int, staged: dict[str, Pieces], state: dict[str, Any]) -> None:
        """Write and commit on all ranks or on none; leaves the reason in `_error`. Collective over the own group."""
        began, aside = time.perf_counter(), None
        try:
            aside = Place(self._on_main(lambda: str(files.begin(self.directory, step))))
            written = tensors.write(aside, staged, self._group)
            gathered: list[Any] = [None] * self._world.size
            dist.all_gather_object(gathered, written, group=self._group)
            everything = {name: print_ for part in gathered for name, print_ in part.items()}
            self._on_main(lambda: self._commit(aside, everything, state, began))
            self._error = None
        except BaseException as error:
            self._error = _reason(error)
            if self._world.is_main:
                self._say(
                    f"CHECKPOINT FAILED: step {step} could not be saved below {self.directory}: {self._error}; "
                    "training goes on, the next save point tries again"
                )
                if aside is not None:
                    _try(aside.remove)  # it may be what fills the disk

    def _commit(self, aside: Place, written: dict[str, Any], state: dict[str, Any], began: float) -> str:
        written[STATE] = (aside / STATE).write(json.dumps(state, indent=1).encode())
        seconds = {"write_seconds": round(time.perf_counter() - began, 3)}
        final = files.commit(aside, self.directory, written, seconds)
        try:
            files.prune(self.directory, self._config.keep_last, self._config.keep_every)
        except OSError as error:  # this checkpoint stands all the same
            self._say(f"an old checkpoint below {self.directory} could not be removed: {_reason(error)}")
        return str(final)

    def _on_main(self, action: Callable[[], str]) -> str:
        """What `action` returns on the main rank, on all ranks; its failure is raised on all."""
        answer: list[Any] = [None, None]
        if self._world.is_main:
            try:
                answer[0] = action()
            except BaseException as error:
                answer[1] = _reason(error)
        dist.broadcast_object_list(answer, src=0, group=self._group)
        if answer[1] is not None:
            raise CheckpointError(answer[1])
        return answer[0]

    # -- finding and loading -------------------------------------------------------------------------------------------

    def choose(self, resume: str, before: int | None = None) -> Place | None:
        """The verified checkpoint that `resume` (auto, never or a path) means; None: start afresh.

        A path counts where the run has no checkpoint that was written under the same `resume`: so the same command
        goes on from where it was interrupted. Damaged checkpoints of the run are set aside and the one before them is
        taken, or refused with `checkpoint.on_damage=fail`. `before`: only checkpoints of at most that step.
        """
        if resume == "never":
            return None
        own = [s for s in self._listed() if before is None or s.step <= before]
        if resume != "auto" and not self._began_with(own, resume):
            found = find(resume, self.directory)
            assert found is not None
            self.verify(found)
            return found
        damaged: list[tuple[Place, CheckpointError]] = []
        while own:
            place = own.pop().place
            try:
                self.verify(place)
            except CheckpointError as error:
                if self._config.on_damage == "fail":
                    raise CheckpointError(
                        f"{error}; checkpoint.on_damage=fallback sets it aside and takes the one before"
                    ) from error
                damaged.append((place, error))
                continue
            read_state(place)  # a format this version does not know is no damage
            for bad, reason in damaged:
                name = self._on_main(lambda bad=bad: files.set_aside(bad, "damaged"))  # type: ignore[misc]
                self._say(f"DAMAGED CHECKPOINT: {reason}; set aside as {name}, going on from {place}")
            return place
        if damaged:  # starting afresh must be somebody's decision
            raise CheckpointError(
                f"no checkpoint below {self.directory} can be used: {'; '.join(str(e) for _, e in damaged)}; "
                "resume=never starts afresh, resume=PATH takes another run's"
            )
        return None

    def load(self, checkpoint: Place, seed: int = 0) -> tuple[Progress, dict[str, Any]]:
        """Load weights, moments, generators and progress, whatever layout wrote them; also returns state.json.

        A rank that the checkpoint has no generators for, because the layout changed, seeds its own from `seed`.
        """
        state = read_state(checkpoint)
        if "exp_avg" not in state.get("contains", ["exp_avg"]):
            raise CheckpointError(
                f"{checkpoint} holds weights alone ({state.get('made_by', 'no optimizer state')}): it can be sampled "
                "and exported, and a run can begin with it (init_from=PATH); to resume, it takes one that a run wrote"
            )
        self._read_tensors(checkpoint, state, seed)
        known = {key: state[key] for key in ("step", "tokens", "loader")}
        return Progress(**known, health=state.get("health", {})), state

    def inherit(self, checkpoint: Place) -> None:
        """Begin with the weights of another run of the same model, and its optimizer's moments where it has them."""
        self.verify(checkpoint)
        state = read_state(checkpoint)
        self._read_tensors(checkpoint, state, None, moments="exp_avg" in state.get("contains", ["exp_avg"]))

    def _read_tensors(self, checkpoint: Place, state: dict[str, Any], seed: int | None, moments: bool = True) -> None:
        """Read this rank's part of all that a run goes on with, or without a `seed` weights and `moments` alone."""
        error, finish = None, None
        try:
            held = tensors.shapes(checkpoint)
            named = dict(self._engine.named_parameters())
            # What was annealed away is not there, and has no part in the model.
            gone = {name for name in named if stages.is_dropped(name, state.get("own_share", 1.0))} - parameters.names(
                held
            )
            parameters.check_shapes(checkpoint, held, named, self._world, gone)
            wanted = {
                f"{kind}/{owned.name}": parameters.pieces(owned, owned.state[kind], self._world)
                for owned in self._engine.owned_state()
                if owned.name not in gone
                for kind in (("master", "exp_avg", "exp_avg_sq") if moments else ("master",))
            }
            finish = self._read_rest(checkpoint, held, wanted, state, seed, moments)
        except CheckpointError as problem:
            error = problem
        self._agree(error)
        assert finish is not None
        finish()

    def _read_rest(
        self,
        checkpoint: Place,
        held: dict[str, Any],
        wanted: dict[str, Pieces],
        state: dict[str, Any],
        seed: int | None,
        moments: bool,
    ) -> Callable[[], None]:
        """Read `wanted` and what are no parameters; returns what remains to be done once all ranks have theirs."""
        steps = torch.full((1,), float(state["step"] if moments else 0))
        if moments and "optimizer/steps" in held:
            wanted["optimizer/steps"] = parameters.whole(steps)
        generators = tensors.generators(self._world.device) if seed is not None else {}
        keys = {name: f"rng/{self._world.rank}/{name}" for name in generators}
        stored = {name: key for name, key in keys.items() if held.get(key) == tuple(generators[name].shape)}
        wanted |= {key: parameters.whole(generators[name]) for name, key in stored.items()}
        tensors.read(checkpoint, wanted)

        def finish() -> None:
            self._engine.finish_loading(steps)
            if seed is None:
                return
            if stored.keys() == generators.keys():
                tensors.set_generators(generators, self._world.device)
            else:
                torch.manual_seed(hash((seed, state["step"], self._world.rank)) & 0x7FFFFFFF)

        return finish

    def abandon_after(self, step: int) -> None:
        """Set aside the run's checkpoints beyond `step`, from which it now goes on another way."""
        self.wait()
        for saved in self._listed():
            if saved.step > step:
                name = self._on_main(lambda place=saved.place: files.set_aside(place, "abandoned"))  # type: ignore[misc]
                self._say(f"set aside {name}: the run goes on from step {step}")

    def _listed(self) -> list[Saved]:
        names = self._on_main(lambda: json.dumps([(s.step, s.place.name) for s in files.finished(self.directory)]))
        return [Saved(step, self.directory / name) for step, name in json.loads(names)]

    def verify(self, checkpoint: Place) -> None:
        """Every rank reads its share of the files; all learn what is wrong."""
        error = None
        try:
            files.verify(checkpoint, self._world.rank, self._world.size)
        except CheckpointError as problem:
            error = problem
        self._agree(error)

    def _agree(self, error: CheckpointError | None) -> None:
        errors: list[Any] = [None] * self._world.size
        dist.all_gather_object(errors, None if error is None else str(error), group=self._group)
        for found in errors:
            if found is not None:
                raise CheckpointError(found)

    def _began_with(self, own: list[Saved], resume: str) -> bool:
        """Whether the newest checkpoint that can be read was written by a run that was told the same `resume`."""

        def written_under() -> str:
            for saved in reversed(own):
                try:
                    return json.loads((saved.place / STATE).read())["config"]["resume"]
                except (OSError, ValueError, KeyError, TypeError):
                    continue  # damaged: choosing it will say so
            return ""

        return self._on_main(written_under) == resume


# -- reading without a run --------------------------------------------------------------------------------------------


def own_directory(run_directory: Path, remote: str | None, run_name: str) -> Place:
    """Where a run keeps its checkpoints: below itself, or below `checkpoint.dir`."""
    return Place(run_directory / "checkpoints") if remote is None else Place(remote) / run_name


def directory_of(location: str) -> Place:
    """Where the run in directory `location` keeps its checkpoints; a directory that is no run's is one of them."""
    inner, settings = Place(location) / "checkpoints", Path(location) / "config.yaml"
    if inner.exists():
        return inner
    try:
        written = yaml.safe_load(settings.read_text(encoding="utf-8"))
        remote, name = written["checkpoint"]["dir"], written["run"]["name"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):  # no run, or one that says nothing of it
        return Place(location)
    return Place(location) if remote is None else own_directory(Path(location), remote, name)


def complete(directory: str | os.PathLike | Place) -> list[Place]:
    """Finished checkpoints below `directory`, oldest first; not verified."""
    place = directory if isinstance(directory, Place) else Place(directory)
    return [saved.place for saved in files.finished(place)]


def find(resume: str, own: str | os.PathLike | Place, key: str = "resume") -> Place | None:
    """The checkpoint that `resume` (auto, never, or a path) means for a run that keeps its own in `own`; not verified.

    A path may be a checkpoint, or a run directory, which stands for its newest checkpoint. None: start afresh.
    """
    if resume == "never":
        return None
    if resume == "auto":
        found = complete(own)
        return found[-1] if found else None
    path = Place(resume)
    for directory in (path, directory_of(resume)):
        if MANIFEST in directory.entries():
            return directory
        if complete(directory):
            return complete(directory)[-1]
    raise CheckpointError(
        f"{key}={resume}: neither a checkpoint (a directory with {MANIFEST}) nor a run directory that holds one; "
        "give such a path"
        + (", or resume=auto to continue this run, or resume=never to start afresh" if key == "resume" else "")
    )


def read_state(checkpoint: Place) -> dict[str, Any]:
    """state.json of a checkpoint, its format checked."""
    try:
        state = json.loads((checkpoint / STATE).read())
        made = state.get("format")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint / STATE} cannot be read: {error}") from error
    if made not in READABLE:
        versions = ", ".join(f"{name} {version}" for name, version in state.get("versions", {}).items())
        raise CheckpointError(
            f"{checkpoint} has checkpoint format {made}{f' (written with {versions})' if versions else ''}, this "
            f"version reads {', '.join(map(str, READABLE))}: use the version of this project that wrote it"
        )
    return state


def load_weights(checkpoint: Place, model: torch.nn.Module, world: World) -> None:
    """Load the fp32 weights alone into a bare model, for evaluation and sampling. Verifies first; raises
    `CheckpointError`."""
    files.verify(checkpoint)
    read_state(checkpoint)
    named = dict(model.named_parameters())
    parameters.check_shapes(checkpoint, tensors.shapes(checkpoint), named, world)
    flats = {name: torch.empty(p.numel()) for name, p in named.items()}
    tensors.read(
        checkpoint, {f"master/{n}": parameters.share(p, tuple(p.shape), flats[n], 0, world) for n, p in named.items()}
    )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(flats[name].view(parameter.shape))


# -- parts ------------------------------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    known = {"python": platform.python_version()}
    for name in ("ksa-train", "torch", "deepspeed", "megatron-core", "numpy"):
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass  # a checkout that was never installed
    return known


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)  # DCP gathers those of all ranks
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {_reason(cause)}"
    return f"{type(error).__name__}: {error}"


def _try(action: Callable[[], None]) -> None:
    try:
        action()
    except OSError:
        pass


if __name__ == "__main__":
    from train.checkpoint_tools import main

    raise SystemExit(main())
