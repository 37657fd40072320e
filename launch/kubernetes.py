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
from typing import Any

import yaml

from launch.agent import GRACE
from launch.config import KubernetesSettings, Launch, LaunchError
from train.signals import REQUEUE

STEP = "node"  # Kubeflow's name for the replicated job and the container that train
LABEL = "trainer.kubeflow.org/trainjob-ancestor-step"


def submit(launch: Launch, names_and_overrides: list[tuple[str, tuple[str, ...]]]) -> int:
    """Print the manifest, write it to `launch.output`, or apply it; two objects for each (run name, overrides)."""
    text = "---\n".join(manifest(launch, name, overrides) for name, overrides in names_and_overrides)
    if launch.settings.dry_run:
        print(text, end="")
        return 0
    names = [object_name(name) for name, _ in names_and_overrides]
    namespace = launch.settings.namespace
    if launch.settings.output:
        path = launch.directory / launch.settings.output
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}; submit with kubectl apply -f {shlex.quote(str(path))}")
    else:
        if shutil.which("kubectl") is None:
            raise LaunchError(
                "target=kubernetes needs kubectl on PATH, or launch.output=FILE to write the manifest only"
            )
        done = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True, capture_output=True)
        if done.returncode:
            raise LaunchError(f"kubectl apply: {'; '.join(done.stderr.split(chr(10))).strip('; ')}")
        print(done.stdout, end="")
    for name in names:
        print(
            f"status  kubectl -n {namespace} get trainjob {name}\n"
            f"logs    kubectl -n {namespace} logs -f -l jobset.sigs.k8s.io/jobset-name={name} --prefix\n"
            f"cancel  kubectl -n {namespace} delete trainjob,trainingruntime {name}",
            file=sys.stderr,
        )
    return 0


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
