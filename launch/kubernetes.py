"""target=kubernetes: a TrainingRuntime and the TrainJob that uses it, of Kubeflow Trainer v2 (trainer.kubeflow.org).

The runtime holds the settings of the cluster (volumes, shared memory, names of secrets, restarts), the job those of the
run (image, command, size). The trainer's controller sets PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and
PET_MASTER_PORT, which torchrun reads as its own options, so the agent's command line contains none of them.

How the set of pods ends depends on the exit code of a pod:

    75, or an evicted pod      all pods start again; this does not count as a restart
    one of `agent.FINAL`       the job fails
    any other                  all pods start again, `launch.restarts` times
"""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from launch import runs
from launch.agent import FINAL, GRACE
from launch.config import Launch
from launch.errors import LaunchError
from launch.runs import Run
from launch.settings import KubernetesSettings
from train.distributed.signals import REQUEUE

STEP = "node"  # Kubeflow's name of the replicated job that trains, and of its container
LABEL = "trainer.kubeflow.org/trainjob-ancestor-step"


def submit(launch: Launch, members: Sequence[Run], directory: Path, command: list[str]) -> int:
    """Print the manifest, write it to `launch.output`, or apply it; then record the jobs. Raises `LaunchError`.

    `directory`: of the run, or of the sweep that the runs belong to, as seen from this machine. `command`: the
    launcher's arguments, for the record.
    """
    text = "---\n".join(manifest(launch, run.name, run.overrides) for run in members)
    if launch.settings.dry_run:
        print(text, end="")
        return 0
    if launch.settings.output:
        _write(launch.directory / launch.settings.output, text)
    else:
        print(_kubectl(["apply", "-f", "-"], text), end="")
    jobs = {run.directory: f"{launch.settings.namespace}/{object_name(run.name)}" for run in members}
    for job in jobs.values():
        for verb, line in _lines(job).items():
            print(f"{verb:<7} {shlex.join(['kubectl', *line])}", file=sys.stderr)
    for each, its_jobs in {directory: list(jobs.values()), **{d: [job] for d, job in jobs.items()}}.items():
        _record(each, runs.Record("kubernetes", command, its_jobs, runs.now()))
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"launch.output: {path} cannot be written ({error.strerror}); give a file's path") from None
    print(f"wrote {path}; submit with kubectl apply -f {shlex.quote(str(path))}")


def _record(directory: Path, record: runs.Record) -> None:
    """Write the record. The jobs are submitted by now, so a directory that exists only in the pods is no error."""
    try:
        runs.write_record(directory, record)
    except (OSError, LaunchError) as error:
        print(f"no record for python -m launch; use the kubectl commands above: {error}", file=sys.stderr)


# -- submitted jobs ---------------------------------------------------------------------------------------------------


def _lines(job: str) -> dict[str, list[str]]:
    """Verb -> arguments of kubectl, for a job NAMESPACE/NAME of a record."""
    namespace, _, name = job.partition("/")
    selector = f"jobset.sigs.k8s.io/jobset-name={name}"
    return {
        "status": ["-n", namespace, "get", "trainjob", name],
        "logs": ["-n", namespace, "logs", "-l", selector, "--prefix", "--tail=200", "-f"],
        "cancel": ["-n", namespace, "delete", "trainjob,trainingruntime", name],
    }


def manage(verb: str, record: runs.Record) -> int:
    """Run `status`, `logs` or `cancel` with kubectl for every job of the record.

    Raises `LaunchError` if kubectl fails for one of them, or is missing; then the message has the commands to run.
    """
    lines = [[part for part in _lines(job)[verb] if part != "-f"] for job in record.jobs]  # print the logs and return
    if shutil.which("kubectl") is None:
        commands = "; ".join(shlex.join(["kubectl", *line]) for line in lines)
        raise LaunchError(f"kubectl is not on PATH; on a machine that has it, run {commands}")
    failed = []
    for line in lines:  # all of them: a job that is gone must not stop the others of a sweep from being cancelled
        try:
            print(_kubectl(line), end="")
        except LaunchError as error:
            failed.append(str(error))
    if failed:
        raise LaunchError("; ".join(failed))
    return 0


def _kubectl(arguments: list[str], text: str | None = None) -> str:
    """Run kubectl; returns its output. Raises `LaunchError` with its error message."""
    if shutil.which("kubectl") is None:
        raise LaunchError("target=kubernetes needs kubectl on PATH, or launch.output=FILE to write the manifest only")
    done = subprocess.run(["kubectl", *arguments], input=text, text=True, capture_output=True)
    if done.returncode:
        message = "; ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        raise LaunchError(f"{shlex.join(['kubectl', *arguments])}: {message or f'exit code {done.returncode}'}")
    return done.stdout


# -- the manifest -----------------------------------------------------------------------------------------------------


def object_name(run_name: str) -> str:
    """A DNS label that is unique to the run's name, whatever characters the name contains."""
    readable = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")[:24].strip("-")
    return "-".join(p for p in ("ksa", readable, hashlib.sha256(run_name.encode()).hexdigest()[:6]) if p)


def manifest(launch: Launch, run_name: str, overrides: Sequence[str]) -> str:
    """The TrainingRuntime and the TrainJob of a run, as YAML."""
    name = object_name(run_name)
    dump = [
        yaml.safe_dump(part, sort_keys=False, width=120)
        for part in (runtime(launch, name), job(launch, name, overrides))
    ]
    return "---\n".join(dump)


def job(launch: Launch, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The TrainJob `name`."""
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
                # Exec form: no shell interprets the overrides.
                "command": [_escaped(launch.settings.python or "python"), "-m", "launch.agent", "--signals=forward"],
                "args": ["-m", "train", *map(_escaped, overrides)],
                "resourcesPerNode": _resources(launch),
            },
        },
    }


def runtime(launch: Launch, name: str) -> dict[str, Any]:
    """The TrainingRuntime `name`."""
    replicated_job = {
        "name": STEP,
        "replicas": 1,
        "template": {
            "metadata": {"labels": {LABEL: "trainer"}},
            "spec": {
                "backoffLimit": 0,
                "podFailurePolicy": _pod_failure_policy(),
                "template": {"spec": _pod(launch)},
            },
        },
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {"name": name, "namespace": launch.settings.namespace},
        "spec": {
            "mlPolicy": {"numNodes": launch.nodes, "torch": {}},
            "template": {
                "spec": {"failurePolicy": _failure_policy(launch), "replicatedJobs": [replicated_job]},
            },
        },
    }


def _pod_failure_policy() -> dict[str, Any]:
    """The Job fails with reason PodFailurePolicy and a message that ends with the index of the rule that matched."""

    def on_exit_codes(codes: Sequence[int]) -> dict[str, Any]:
        requirement = {"containerName": STEP, "operator": "In", "values": list(codes)}
        return {"action": "FailJob", "onExitCodes": requirement}

    evicted = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return {"rules": [on_exit_codes(FINAL), on_exit_codes([REQUEUE]), evicted]}


def _failure_policy(launch: Launch) -> dict[str, Any]:
    """What the JobSet does when its Job has failed; the first rule that matches decides.

    Only the message tells the rules of `_pod_failure_policy` apart (onJobFailureMessagePatterns, JobSet 0.10).
    """

    def rule(name: str, action: str, **more: list[str]) -> dict[str, Any]:
        reason = {"onJobFailureReasons": ["PodFailurePolicy"], "targetReplicatedJobs": [STEP]}
        return {"name": name, "action": action, **reason, **more}

    return {
        "maxRestarts": launch.settings.restarts,
        "rules": [
            rule("final", "FailJobSet", onJobFailureMessagePatterns=["matching FailJob rule at index 0$"]),
            rule("saved", "RestartJobSetAndIgnoreMaxRestarts"),
        ],
    }


def _pod(launch: Launch) -> dict[str, Any]:
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
    return pod


def _resources(launch: Launch) -> dict[str, Any]:
    amounts = {"cpu": str(launch.settings.cpus_per_rank * launch.ranks_per_node), "memory": launch.settings.memory}
    if launch.gpus_per_node:
        amounts[launch.settings.gpu_resource] = str(launch.gpus_per_node)
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _environment(launch: Launch) -> list[dict[str, Any]]:
    plain: dict[str, str] = {**launch.environment, GRACE: str(launch.settings.grace_seconds)}
    entries: list[dict[str, Any]] = [{"name": name, "value": _escaped(value)} for name, value in sorted(plain.items())]
    for name, reference in sorted(launch.settings.secrets.items()):
        secret, key = reference.split("/")
        entries.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}}})
    return entries


def _mount(volume: tuple[str, str]) -> dict[str, Any]:
    name, text = volume
    return {"name": name, "mountPath": text.split(":")[1], **({"readOnly": True} if text.endswith(":ro") else {})}


def _volume(volume: tuple[str, str]) -> dict[str, Any]:
    name, text = volume
    return {"name": name, "persistentVolumeClaim": {"claimName": text.split(":")[0]}}


def _escaped(text: str) -> str:
    """Escape $: Kubernetes replaces $(NAME) in commands, arguments and values, and reads $$ as $."""
    return text.replace("$", "$$")
