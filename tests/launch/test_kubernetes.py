"""The manifests against the published schemas, offline, and against a golden copy."""

import copy
import dataclasses
import functools
import json
import os
import re
from pathlib import Path

import pytest
import yaml

from launch import kubernetes, runs
from launch.__main__ import main
from launch.agent import FINAL
from launch.config import Launch, parse
from launch.errors import LaunchError
from launch.runs import Run
from tests.launch.conftest import put_on_path, python
from train.distributed.signals import REQUEUE

GOLDEN = Path(__file__).parent / "golden_trainjob.yaml"
# A missing package is a failure where the tests must all run, and a skip elsewhere.
if os.environ.get("CI") == "true":
    import kubeflow_trainer_api.models as trainer
    import kubernetes_validate
else:
    trainer = pytest.importorskip("kubeflow_trainer_api.models")
    kubernetes_validate = pytest.importorskip("kubernetes_validate")


def launch() -> Launch:
    arguments = (
        "target=kubernetes nodes=4 gpus_per_node=8 launch.image=registry.example/ksa:1 launch.namespace=research "
        "launch.volumes.data=corpus:/data:ro launch.node_selector.gpu=h100 launch.tolerations=[nvidia.com/gpu] "
        "launch.image_pull_secret=pull launch.service_account=trainer launch.priority_class=low "
        "launch.secrets.HF_TOKEN=hf/token"
    ).split()
    return parse(
        [*arguments, "--", "model=hybrid_1b9", "run.name=Big_Run 1", "data.text_key='$(HOME) $$(x); touch pwned'"]
    )


def objects() -> list[dict]:
    return list(yaml.safe_load_all(kubernetes.manifest(launch(), "Big_Run 1", launch().overrides)))


def problems(document: dict) -> list[str]:
    """Violations of the schemas. The models of the custom kinds ignore unknown fields, which a round trip reveals."""
    model = getattr(trainer, f"TrainerV1alpha1{document['kind']}")
    try:
        read = model.from_dict(document).to_dict()
    except ValueError as error:
        return [str(error)]
    found = differences(document, read)
    for job in document["spec"].get("template", {}).get("spec", {}).get("replicatedJobs", []):
        body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job["template"]["spec"]}
        try:
            kubernetes_validate.validate(body, "1.31", strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(str(error.message))
    return found


def differences(a, b, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in a.keys() | b.keys() for d in differences(a.get(key), b.get(key), f"{path}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [f"{path}: {a!r} was read as {b!r}"]


def test_both_objects_follow_the_schemas():
    runtime, job = objects()
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert problems(runtime) == [] and problems(job) == []
    smallest = parse(["target=kubernetes", "launch.image=i"])
    for document in yaml.safe_load_all(kubernetes.manifest(smallest, "x", ())):
        assert problems(document) == []


def container(documents):
    return documents[0]["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]


MUTATIONS = {
    "nodes as text": lambda d: d[1]["spec"]["trainer"].update(numNodes="4"),
    "unknown key of the trainer": lambda d: d[1]["spec"]["trainer"].update(nodes=4),
    "no runtime": lambda d: d[1]["spec"].pop("runtimeRef"),
    "misspelt volume mounts": lambda d: container(d).update(volumemounts=container(d).pop("volumeMounts")),
    "environment value as number": lambda d: container(d)["env"][0].update(value=1),
    "memory as list": lambda d: container(d)["resources"]["limits"].update(memory=["1Gi"]),
    "no container name": lambda d: container(d).pop("name"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_validation_can_fail(name):
    documents = copy.deepcopy(objects())
    MUTATIONS[name](documents)
    assert [p for document in documents for p in problems(document)]


def test_golden_copy():
    """A change of the manifest shows in the diff of the golden file; update that file when the change is intended."""
    assert kubernetes.manifest(launch(), "Big_Run 1", launch().overrides) == GOLDEN.read_text(encoding="utf-8")


def test_what_the_pieces_must_agree_on():
    runtime, job = objects()
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    name = job["metadata"]["name"]
    assert runtime["metadata"]["name"] == name == job["spec"]["runtimeRef"]["name"]
    assert len(name) <= 50 and name == name.lower() and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert kubernetes.object_name("Big_Run 1") != kubernetes.object_name("big-run-1")
    assert {m["name"] for m in container([runtime])["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert container([runtime])["resources"]["limits"]["nvidia.com/gpu"] == "8"
    by_name = {e["name"]: e for e in container([runtime])["env"]}
    assert by_name["HF_TOKEN"] == {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token", "optional": True}},
    }
    assert pod["terminationGracePeriodSeconds"] > int(by_name["LAUNCH_GRACE_SECONDS"]["value"])


def outcome(runtime: dict, code: int | None) -> str:
    """The action of the JobSet after a pod ended with `code`, or was evicted (None).

    Uses the Job controller's messages and takes the first rule that matches, as the Job and the JobSet controller do.
    """
    spec = runtime["spec"]["template"]["spec"]
    rules = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    matches = (code is None if "onPodConditions" in r else code in r["onExitCodes"]["values"] for r in rules)
    index = next((i for i, match in enumerate(matches) if match), None)
    if index is None:
        return "RestartJobSet"  # the reason is BackoffLimitExceeded, which no rule names
    message = f"Container node for pod research/x failed with exit code {code} matching FailJob rule at index {index}"
    for rule in spec["failurePolicy"]["rules"]:
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
        if any(re.search(p, message) for p in rule.get("onJobFailureMessagePatterns", [""])):
            return rule["action"]
    return "RestartJobSet"


def test_what_follows_each_exit_code():
    runtime, _ = objects()
    assert {code: outcome(runtime, code) for code in FINAL} == dict.fromkeys(FINAL, "FailJobSet")
    assert outcome(runtime, REQUEUE) == outcome(runtime, None) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(runtime, 1) == outcome(runtime, 137) == "RestartJobSet"
    assert runtime["spec"]["template"]["spec"]["failurePolicy"]["maxRestarts"] == 3


def expanded(text: str) -> str:
    """An argument as Kubernetes expands it: $$ is $, $(NAME) is the variable's value."""
    out, i = "", 0
    while i < len(text):
        if text.startswith("$$", i):
            out, i = out + "$", i + 2
        elif text.startswith("$(", i) and ")" in text[i:]:
            out, i = out + "<value>", text.index(")", i) + 1
        else:
            out, i = out + text[i], i + 1
    return out


def test_arguments_arrive_as_given():
    _, job = objects()
    assert [expanded(a) for a in job["spec"]["trainer"]["args"]] == ["-m", "train", *launch().overrides]
    for text in ("$(A)", "$$(A)", "$$$(A)", "a$", "$", "$$", "cost: 5$ (about)"):
        assert expanded(kubernetes._escaped(text)) == text


def test_written_to_a_file_or_refused_without_kubectl(tmp_path, monkeypatch):
    to_file = dataclasses.replace(launch(), directory=tmp_path)
    to_file = dataclasses.replace(to_file, settings=dataclasses.replace(to_file.settings, output="deep/job.yaml"))
    members = [Run(name, [f"x={name}"], tmp_path / "s" / name) for name in ("a", "b")]
    assert kubernetes.submit(to_file, members, tmp_path / "s", ["target=kubernetes"]) == 0
    kinds = [d["kind"] for d in yaml.safe_load_all((tmp_path / "deep/job.yaml").read_text())]
    assert kinds == ["TrainingRuntime", "TrainJob"] * 2
    records = [runs.read_record(tmp_path / name) for name in ("s", "s/a", "s/b")]
    assert [len(r.jobs) for r in records] == [2, 1, 1] and records[0].jobs == records[1].jobs + records[2].jobs
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"kubectl.*launch.output"):
        kubernetes.submit(launch(), members, tmp_path / "s", [])


def test_command_line_prints_the_manifest():
    arguments = [
        "launch",
        "target=kubernetes",
        "launch.image=i",
        "launch.dry_run=true",
        "launch.check=false",
        "--",
        "run.name=r",
    ]
    printed = python(*arguments)
    assert [d["kind"] for d in yaml.safe_load_all(printed.stdout)] == ["TrainingRuntime", "TrainJob"]


def test_a_kubernetes_run_is_found_again(tmp_path, monkeypatch, capsys):
    """The record names the job; the verbs call kubectl or, without it, print the commands."""
    monkeypatch.chdir(tmp_path)
    kubectl = functools.partial(put_on_path, tmp_path, monkeypatch)
    kubectl(
        kubectl=f'printf "%s\\n" "$*" >> {tmp_path}/called; [ "$1" = apply ] && cat > {tmp_path}/applied; echo answer'
    )
    target = ["target=kubernetes", "launch.image=i", "launch.namespace=research", "launch.check=false"]
    assert main([*target, "--", "run.name=a"]) == 0
    record = json.loads((tmp_path / "runs/a/launch/launch.json").read_text())
    (job,) = record["jobs"]
    namespace, _, name = job.partition("/")
    assert record["target"] == "kubernetes" and namespace == "research"
    assert f"name: {name}" in (tmp_path / "applied").read_text()
    capsys.readouterr()
    for verb in ("status", "logs", "cancel"):
        assert main([verb, "a"]) == 0
        assert "answer" in capsys.readouterr().out
    called = (tmp_path / "called").read_text().splitlines()
    assert called == [
        "apply -f -",
        f"-n research get trainjob {name}",
        f"-n research logs -l jobset.sigs.k8s.io/jobset-name={name} --prefix --tail=200",
        f"-n research delete trainjob,trainingruntime {name}",
    ]
    kubectl(kubectl='echo "Error from server" >&2; exit 1')
    assert main(["cancel", "a"]) == 2
    assert "Error from server" in capsys.readouterr().err
    kubectl(kubectl='case "$*" in *gone*) echo "not found" >&2; exit 1;; *) echo "deleted";; esac')
    both = runs.Record("kubernetes", [], ["research/gone", "research/other"], "")
    with pytest.raises(LaunchError, match="trainingruntime gone: not found"):
        kubernetes.manage("cancel", both)
    assert capsys.readouterr().out == "deleted\n"
    monkeypatch.setenv("PATH", str(tmp_path / "runs"))
    assert main(["cancel", "a"]) == 2
    assert f"run kubectl -n research delete trainjob,trainingruntime {name}" in capsys.readouterr().err


def test_a_kubernetes_run_whose_folder_is_in_the_pods_alone(tmp_path, monkeypatch, capsys):
    """The job is submitted: a record that cannot be written is reported and is no failure."""
    (tmp_path / "file").touch()
    arguments = ["target=kubernetes", "launch.image=i", "launch.check=false", f"launch.output={tmp_path / 'job.yaml'}"]
    assert main([*arguments, "--", f"run.root={tmp_path / 'file'}"]) == 0
    assert "no record" in capsys.readouterr().err and (tmp_path / "job.yaml").is_file()
    assert main([*arguments, f"launch.output={tmp_path}", "--"]) == 2
    assert f"launch.output: {tmp_path} cannot be written" in capsys.readouterr().err
