"""The manifests against the published schemas, offline, and against a golden copy."""

import copy
import dataclasses
import os
from pathlib import Path

import pytest
import yaml

from launch import kubernetes, runs
from launch.config import Launch, LaunchError, parse
from tests.launch.conftest import python

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
    """What the schemas object to. The models of the custom kinds ignore unknown fields: a round trip shows those."""
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


def differences(a, b, place: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in a.keys() | b.keys() for d in differences(a.get(key), b.get(key), f"{place}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{place}[{i}]")]
    return [] if a == b else [f"{place}: {a!r} was read as {b!r}"]


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
    """A change of the manifest shows in the diff of the golden file; write it there when it is meant."""
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


def expanded(text: str) -> str:
    """What Kubernetes makes of an argument: $$ is $, $(NAME) is the variable's value."""
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
    points = [kubernetes.Point(name, (f"x={name}",), tmp_path / "s" / name) for name in ("a", "b")]
    assert kubernetes.submit(to_file, points, tmp_path / "s", ["target=kubernetes"]) == 0
    kinds = [d["kind"] for d in yaml.safe_load_all((tmp_path / "deep/job.yaml").read_text())]
    assert kinds == ["TrainingRuntime", "TrainJob"] * 2
    records = [runs.read_record(tmp_path / place) for place in ("s", "s/a", "s/b")]
    assert [len(r.jobs) for r in records] == [2, 1, 1] and records[0].jobs == records[1].jobs + records[2].jobs
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"kubectl.*launch.output"):
        kubernetes.submit(launch(), points, tmp_path / "s", [])


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
