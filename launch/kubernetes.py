"""target=kubernetes: a TrainingRuntime and the TrainJob that uses it, of Kubeflow Trainer v2 (trainer.kubeflow.org).

The runtime holds what belongs to the cluster (volumes, shared memory, secrets by name, restarts), the job what belongs
to the run (image, command, size). The trainer's controller sets PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and
PET_MASTER_PORT, which torchrun reads as its own options; so the agent's command line names none of them.

A pod that is evicted gets SIGTERM, saves and ends with 75; that restarts the whole set without counting. Any other
failure counts towards `launch.restarts`.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch import runs
from launch.agent import GRACE
from launch.config import KubernetesSettings, Launch, LaunchError
from train.signals import REQUEUE

STEP = "node"  # Kubeflow's name for the replicated job and the container that train
LABEL = "trainer.kubeflow.org/trainjob-ancestor-step"


@dataclass(frozen=True)
class Point:
    """One training run, a TrainJob of its own."""

    name: str
    overrides: tuple[str, ...]
    run_directory: Path  # as seen from here: its record is kept there


def submit(launch: Launch, points: Sequence[Point], home: Path, command: list[str]) -> int:
    """Print the manifest, write it to `launch.output`, or apply it; then note the jobs. `home`: run or sweep."""
    text = "---\n".join(manifest(launch, point.name, point.overrides) for point in points)
    if launch.settings.dry_run:
        print(text, end="")
        return 0
    if launch.settings.output:
        _write(launch.directory / launch.settings.output, text)
    else:
        print(_kubectl(["apply", "-f", "-"], text), end="")
    jobs = {point.run_directory: f"{launch.settings.namespace}/{object_name(point.name)}" for point in points}
    for job in jobs.values():
        for verb, line in _lines(job).items():
            print(f"{verb:<7} {shlex.join(['kubectl', *line])}", file=sys.stderr)
    for directory, own in {home: list(jobs.values()), **{d: [job] for d, job in jobs.items()}}.items():
        _note(directory, runs.Record("kubernetes", command, own, runs.now()))
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"launch.output: {path} cannot be written ({error.strerror}); name a file") from None
    print(f"wrote {path}; submit with kubectl apply -f {shlex.quote(str(path))}")


def _note(directory: Path, record: runs.Record) -> None:
    """The jobs are submitted: a folder that exists in the pods alone is no reason to end badly."""
    try:
        runs.write_record(directory, record)
    except (OSError, LaunchError) as error:
        print(f"no record for `python -m launch status|logs|cancel`, use the lines above: {error}", file=sys.stderr)


# -- looking after jobs -----------------------------------------------------------------------------------------------


def _lines(job: str) -> dict[str, list[str]]:
    """verb -> kubectl's arguments, for a record's NAMESPACE/NAME."""
    namespace, _, name = job.partition("/")
    selector = f"jobset.sigs.k8s.io/jobset-name={name}"
    return {
        "status": ["-n", namespace, "get", "trainjob", name],
        "logs": ["-n", namespace, "logs", "-l", selector, "--prefix", "--tail=200", "-f"],
        "cancel": ["-n", namespace, "delete", "trainjob,trainingruntime", name],
    }


def look_after(verb: str, record: runs.Record) -> int:
    """Run the verb's kubectl line for every job of the record; without kubectl say the lines, for where it is."""
    lines = [[part for part in _lines(job)[verb] if part != "-f"] for job in record.jobs]  # what there is, and return
    if shutil.which("kubectl") is None:
        said = "; ".join(shlex.join(["kubectl", *line]) for line in lines)
        raise LaunchError(f"kubectl is not on PATH; where it is: {said}")
    failed = []
    for line in lines:  # every one: a job that is gone must not keep a sweep's others from being cancelled
        try:
            print(_kubectl(line), end="")
        except LaunchError as error:
            failed.append(str(error))
    if failed:
        raise LaunchError("; ".join(failed))
    return 0


def _kubectl(arguments: list[str], text: str | None = None) -> str:
    """What kubectl prints, or `LaunchError` with what it says."""
    if shutil.which("kubectl") is None:
        raise LaunchError("target=kubernetes needs kubectl on PATH, or launch.output=FILE to write the manifest only")
    done = subprocess.run(["kubectl", *arguments], input=text, text=True, capture_output=True)
    if done.returncode:
        said = "; ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        raise LaunchError(f"{shlex.join(['kubectl', *arguments])}: {said or f'exited with {done.returncode}'}")
    return done.stdout


# -- the manifest -----------------------------------------------------------------------------------------------------


def object_name(run_name: str) -> str:
    """A DNS label of the run's own, whatever its name holds."""
    readable = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")[:24].strip("-")
    return "-".join(p for p in ("ksa", readable, hashlib.sha256(run_name.encode()).hexdigest()[:6]) if p)


def manifest(launch: Launch, run_name: str, overrides: tuple[str, ...]) -> str:
    """Both objects as YAML."""
    name = object_name(run_name)
    dump = [
        yaml.safe_dump(part, sort_keys=False, width=120)
        for part in (runtime(launch, name), job(launch, name, overrides))
    ]
    return "---\n".join(dump)


def job(launch: Launch, name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    settings: KubernetesSettings = launch.settings
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name, "namespace": settings.namespace},
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name},
            "trainer": {
                "image": settings.image,
                "numNodes": launch.nodes,
                "numProcPerNode": launch.ranks_per_node,
                # Exec form: no shell reads the overrides. $$ is Kubernetes' own way to write a $.
                "command": [_escaped(launch.settings.python or "python"), "-m", "launch.agent", "--signals=forward"],
                "args": ["-m", "train", *map(_escaped, overrides)],
                "resourcesPerNode": _resources(launch),
            },
        },
    }


def runtime(launch: Launch, name: str) -> dict[str, Any]:
    settings: KubernetesSettings = launch.settings
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings.grace_seconds + 10,
        "containers": [
            {
                "name": STEP,
                "image": settings.image,
                "workingDir": settings.workdir,
                "env": _environment(launch),
                "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, *map(_mount, settings.volumes.items())],
                "resources": _resources(launch),
            }
        ],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm_size}},
            *map(_volume, settings.volumes.items()),
        ],
    }
    if settings.node_selector:
        pod["nodeSelector"] = dict(settings.node_selector)
    if settings.tolerations:
        pod["tolerations"] = [
            {"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in settings.tolerations
        ]
    if settings.image_pull_secret:
        pod["imagePullSecrets"] = [{"name": settings.image_pull_secret}]
    if settings.service_account:
        pod["serviceAccountName"] = settings.service_account
    if settings.priority_class:
        pod["priorityClassName"] = settings.priority_class
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {"name": name, "namespace": settings.namespace},
        "spec": {
            "mlPolicy": {"numNodes": launch.nodes, "torch": {}},
            "template": {
                "spec": {
                    "failurePolicy": {
                        "maxRestarts": settings.restarts,
                        "rules": [
                            {
                                "name": "saved",
                                "action": "RestartJobSetAndIgnoreMaxRestarts",
                                "onJobFailureReasons": ["PodFailurePolicy"],
                                "targetReplicatedJobs": [STEP],
                            }
                        ],
                    },
                    "replicatedJobs": [
                        {
                            "name": STEP,
                            "replicas": 1,
                            "template": {
                                "metadata": {"labels": {LABEL: "trainer"}},
                                "spec": {
                                    "backoffLimit": 0,
                                    "podFailurePolicy": {
                                        "rules": [
                                            {
                                                "action": "FailJob",
                                                "onExitCodes": {
                                                    "containerName": STEP,
                                                    "operator": "In",
                                                    "values": [REQUEUE],
                                                },
                                            },
                                            {
                                                "action": "FailJob",
                                                "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                                            },
                                        ]
                                    },
                                    "template": {"spec": pod},
                                },
                            },
                        }
                    ],
                }
            },
        },
    }


def _resources(launch: Launch) -> dict[str, Any]:
    amounts = {"cpu": str(launch.settings.cpus_per_rank * launch.ranks_per_node), "memory": launch.settings.memory}
    if launch.gpus_per_node:
        amounts[launch.settings.gpu_resource] = str(launch.gpus_per_node)
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _environment(launch: Launch) -> list[dict[str, Any]]:
    plain: dict[str, str] = {**launch.environment, GRACE: str(launch.settings.grace_seconds)}
    entries: list[dict[str, Any]] = [{"name": name, "value": _escaped(value)} for name, value in sorted(plain.items())]
    for name, place in sorted(launch.settings.secrets.items()):
        secret, key = place.split("/")
        entries.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}}})
    return entries


def _mount(volume: tuple[str, str]) -> dict[str, Any]:
    name, text = volume
    return {"name": name, "mountPath": text.split(":")[1], **({"readOnly": True} if text.endswith(":ro") else {})}


def _volume(volume: tuple[str, str]) -> dict[str, Any]:
    name, text = volume
    return {"name": name, "persistentVolumeClaim": {"claimName": text.split(":")[0]}}


def _escaped(text: str) -> str:
    """Kubernetes replaces $(NAME) in commands, arguments and values, and reads $$ as one $."""
    return text.replace("$", "$$")
