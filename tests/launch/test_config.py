"""The launcher's command line: what it accepts, and the one line it says about what it does not."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import check, local, runs, slurm, ssh
from launch.config import CONFIGS, TARGETS, Launch, LaunchError, parse
from tests import commands
from tests.launch.conftest import python

SLURM = ["target=slurm", "launch.partition=gpu"]
NASTY = 'it\'s; touch pwned $(touch pwned) `touch pwned` & "x" *'


def test_settings_come_from_default_then_target_then_command_line():
    launch = parse(
        [*SLURM, "nodes=2", "gpus_per_node=8", "launch.time=2-00:00:00", "launch.env.NCCL_IB_HCA=mlx5", "--", "a=b"]
    )
    assert (launch.world_size, launch.ranks_per_node, launch.overrides) == (16, 8, ("a=b",))
    assert launch.settings.restarts == yaml.safe_load((CONFIGS / "launch/default.yaml").read_text())["restarts"]
    assert launch.settings.cpus_per_rank == 8  # slurm.yaml's, over default.yaml's 1
    assert launch.settings.time == "2-00:00:00"
    assert launch.environment["NCCL_IB_HCA"] == "mlx5" and launch.environment["NCCL_DEBUG"] == "WARN"
    assert launch.environment["OMP_NUM_THREADS"] == "8"
    assert "NCCL_DEBUG" not in parse([*SLURM, "launch.env.NCCL_DEBUG=null"]).environment


@pytest.mark.parametrize("target", TARGETS)
def test_yaml_names_every_setting(target):
    """A setting that no file names would have no default; one that no dataclass has would do nothing."""
    named = set()
    for name in ("default", target):
        named |= set(yaml.safe_load((CONFIGS / f"launch/{name}.yaml").read_text()))
    assert named == {f.name for f in dataclasses.fields(TARGETS[target])}


def test_every_setting_is_read():
    code = "\n".join(p.read_text() for p in (CONFIGS.parent / "launch").glob("*.py"))
    for settings in TARGETS.values():
        for f in dataclasses.fields(settings):
            assert f"settings.{f.name}" in code or f"self.{f.name}" in code, f.name


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["target=slrm"], ["'slrm'", "did you mean slurm", "kubernetes"]),
        ([], ["target=NAME is missing"]),
        (["target=slurm"], ["launch.partition", "slurm.yaml"]),
        (["target=kubernetes"], ["launch.image", "kubernetes.yaml"]),
        (["target=ssh"], ["launch.hosts"]),
        (["target=ssh", "launch.hosts=[a,b]", "nodes=3"], ["nodes=3", "names 2"]),
        (["target=ssh", "launch.hosts=[a;reboot]"], ["a;reboot", "not a host name"]),
        (["target=local", "node=2"], ["node", "did you mean nodes"]),
        (["target=local", "run.steps=3"], ["run.steps", "after `--`"]),
        (["target=local", "launch.partition=x"], ["launch.partition", "target=local"]),
        (["target=local", "launch.restart=1"], ["did you mean launch.restarts"]),
        (["target=local", "launch.restarts=many"], ["launch.restarts='many'", "an integer"]),
        (["target=local", "launch.restarts=-1"], ["at least 0"]),
        (["target=local", "nodes=0"], ["nodes=0", "at least 1"]),
        (["target=local", "launch.env.A-B=1"], ["'A-B'"]),
        (["target=local", "gpus_per_node=64"], ["gpus_per_node=64", "this machine shows"]),
        ([*SLURM, "gpus_per_node=4", "ranks_per_node=2"], ["gpus_per_node=4", "ranks_per_node=2"]),
        ([*SLURM, "launch.time=soon"], ["launch.time='soon'"]),
        ([*SLURM, "launch.qos=a b"], ["launch.qos='a b'"]),
        ([*SLURM, "launch.continuation=maybe"], ["requeue, chain"]),
        ([*SLURM, "launch.chain_jobs=3"], ["launch.continuation=chain"]),
        ([*SLURM, "launch.sbatch_args=[--nodelist=n1,n2]"], ["'n2'", "launch.sbatch_args", '["--NAME=A,B"]']),
        ([*SLURM, "launch.sbatch_args=[--constraint=[a|b]]"], ["[--constraint=[a|b]]", "quote an entry"]),
        ([*SLURM, "launch.sbatch_args=[--a"], ["launch.sbatch_args='[--a'", "[A,B]"]),
        ([*SLURM, "launch.sbatch_args=[--a: b]"], ["launch.sbatch_args", "quote an entry"]),
        (["target=kubernetes", "launch.image=i", "launch.volumes.x=claim"], ["CLAIM:/MOUNT"]),
        (["target=kubernetes", "launch.image=i", "launch.secrets.TOKEN=abc"], ["SECRET/KEY"]),
        (["target=kubernetes", "launch.image=i", "launch.shm_size=much"], ["launch.shm_size='much'"]),
    ],
)
def test_bad_input_is_one_clear_line(arguments, words):
    with pytest.raises(LaunchError) as caught:
        parse(arguments)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[]", ()),
        ("[--exclusive, -w n1]", ("--exclusive", "-w n1")),
        ('["--nodelist=n1,n2",--exclusive]', ("--nodelist=n1,n2", "--exclusive")),
        ("['--constraint=[a|b]']", ("--constraint=[a|b]",)),
        ("--a,--b", ("--a", "--b")),
    ],
)
def test_lists_may_quote_what_holds_a_comma(text, expected):
    assert parse([*SLURM, f"launch.sbatch_args={text}"]).settings.sbatch_args == expected
    assert parse(["target=ssh", "launch.hosts=[10,true]"]).settings.hosts == ("10", "true")  # texts, whatever they hold


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["run.steps=abc"], ["run.steps='abc'", "an integer"]),
        (["run=null"], ["run=None", "run.name=NAME"]),
        (["run.name=null"], ["run.name=None", "a text"]),
    ],
)
def test_what_the_launcher_reads_itself_has_its_type_unchecked_too(overrides, words):
    with pytest.raises(LaunchError) as caught:
        check.check(parse(["target=local", "launch.check=false", "--", *overrides]))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("place", ["run.root={file} run.name=a", "run.root={folder} run.name=file"])
def test_a_run_directory_that_cannot_be_made(place, tmp_path):
    (tmp_path / "file").touch()
    overrides = place.format(file=tmp_path / "file", folder=tmp_path).split()
    code, _, err = commands.run("launch", "target=local", "launch.check=false", "--", *overrides)
    said = err.splitlines()[-1]
    assert code == 2
    assert said.startswith(f"error: {tmp_path}/file") and "choose another run.root or run.name" in said


@pytest.mark.parametrize(
    "size, overrides, words",
    [
        (["ranks_per_node=3"], ["parallel.tensor=2"], ["3 ranks", "parallel.tensor=2"]),
        (["ranks_per_node=2"], [], ["run.samples_per_step=1", "2 data-parallel"]),
        ([], ["model.chunk_sise=4"], ["model.chunk_sise", "did you mean model.chunk_size"]),
        ([], ["model.chunk_size=4,8"], ["launch.sweep"]),
        ([], ["--multirun"], ["--multirun", "KEY=VALUE"]),
        ([], ["seq_len=1001"], ["seq_len=1001"]),
        ([], ["run.name='a\nb'"], ["control character"]),
    ],
)
def test_training_configuration_is_checked_for_the_layout(size, overrides, words):
    with pytest.raises(LaunchError) as caught:
        check.check(parse(["target=local", *size, "--", *overrides]))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_memory_is_estimated_for_the_layout():
    """The trainer's plan, for the launch's ranks: ZeRO shares the optimizer out, and too much is called so."""
    big = [
        "model=hybrid_1b9",
        "model.vocab_size=151936",
        "run.samples_per_step=8",
        "seq_len=8192",
        "run.precision=bf16",
    ]
    told = {}
    for nodes in (1, 8):
        launch = parse([*SLURM, f"nodes={nodes}", "gpus_per_node=1", "--", *big])
        told[nodes] = check.check(launch).memory
        assert f"{nodes} ranks" in told[nodes] and "together" in told[nodes]
    optimizer = {n: float(re.search(r"optimizer +([\d.]+) GiB", text)[1]) for n, text in told.items()}
    assert optimizer[1] == pytest.approx(8 * optimizer[8], rel=0.01)
    longer = check.check(parse([*SLURM, "gpus_per_node=1", "--", *big, "seq_len=1048576"])).memory
    assert "does NOT fit" in longer
    assert "memory of a rank: about" in check.check(parse(["target=local"])).memory


def test_exit_codes_and_dry_run():
    """2 for bad input; a dry run prints the job and leaves nothing behind."""
    wrong = python("launch", "target=slurm")
    assert (wrong.returncode, wrong.stdout) == (2, "") and wrong.stderr.startswith("error: target=slurm needs")
    dry = python("launch", *SLURM, "launch.dry_run=true", "--", "run.name=never-started")
    assert dry.returncode == 0 and "#!/bin/bash" in dry.stdout and "parameters" in dry.stderr
    assert not Path("runs/never-started").exists()


@pytest.mark.parametrize("target", [SLURM, ["target=local"], ["target=kubernetes", "launch.image=i"]])
def test_dry_run_without_the_check_needs_no_torch(target):
    code = "import sys, launch.__main__ as m; m.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    line = [sys.executable, "-c", code, *target, "launch.dry_run=true", "launch.check=false"]
    done = subprocess.run(line, cwd=CONFIGS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- metacharacters ---------------------------------------------------------------------------------------------------


def nasty_launch(target: list[str], directory: Path) -> Launch:
    return dataclasses.replace(
        parse([*target, f"launch.env.NOTE={NASTY}", "--", f"data.text_key={NASTY}"]), directory=directory
    )


def overrides_of(script: str, tmp_path: Path, tail: str) -> list[str]:
    """Run the script's own assignments in a real bash, and see what its array holds."""
    path = tmp_path / "script"
    path.write_text(script + tail)
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, cwd=tmp_path, env={"SLURM_JOB_ID": "7"})
    assert not list(tmp_path.rglob("pwned")), done.stderr
    return done.stdout.split("\0")[:-1]


def test_slurm_script_quotes_what_it_is_given(tmp_path):
    launch = nasty_launch(SLURM, tmp_path)
    run = tmp_path / f"runs/{NASTY.replace('/', '')}%j"
    text = slurm.script(launch, [slurm.Point(launch.overrides, run)])
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    head = text.split("cd --")[0]
    got = overrides_of(head, tmp_path, '\nprintf "%s\\0" "$run_directory" "$log" "$NOTE" "${overrides[@]}"\n')
    assert got == [str(run), str(run).replace("%", "%%") + "/launch/logs/%j-%N.log", NASTY, f"data.text_key={NASTY}"]
    name = slurm.job_name(run)
    assert name.replace("-", "").replace(".", "").replace("_", "").isalnum()
    assert name != slurm.job_name(tmp_path / "other" / run.name)  # equal names elsewhere do not wait for each other


def test_slurm_refuses_a_backslash_in_the_log_path(tmp_path):
    launch = parse(SLURM)
    with pytest.raises(LaunchError, match="backslash"):
        slurm.submit(launch, [slurm.Point([], tmp_path / "a\\b")], tmp_path, [])


def test_ssh_script_quotes_and_the_remote_line_holds_no_user_text(tmp_path):
    launch = nasty_launch(["target=ssh", "launch.hosts=[node1,node2]", "ranks_per_node=2"], tmp_path)
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/python"  # prints what it was given
    fake.write_text('#!/bin/bash\nprintf "%s\\0" "$NOTE" "$@"\n')
    fake.chmod(0o755)
    settings = dataclasses.replace(launch.settings, python=str(fake))
    script = ssh.rank_script(dataclasses.replace(launch, settings=settings))
    assert overrides_of(script, tmp_path, "") == [NASTY, "-m", "train", f"data.text_key={NASTY}"]
    assert ssh.hostfile(launch) == "node1 slots=2\nnode2 slots=2\n"
    line = ssh.command(dataclasses.replace(launch, directory=Path("/work")), Path("/work/runs/plain"))
    assert not any("pwned" in word for word in line)
    with pytest.raises(LaunchError, match="remote shells"):
        ssh.command(launch, tmp_path / NASTY)


def test_local_command_has_no_shell(tmp_path):
    launch = nasty_launch(["target=local", "nodes=2", "ranks_per_node=3"], tmp_path)
    first, second = local.commands(launch, 0, 29400)
    assert first == second and first[-1] == f"data.text_key={NASTY}" and "--nproc-per-node=3" in first
    assert shlex.split(local.describe(launch, tmp_path).splitlines()[0].split("   #")[0])[-1] == first[-1]


def test_local_keeps_the_python_path_of_the_launch(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/outer")
    path = local.child_environment(parse(["target=local", "launch.env.PYTHONPATH=/my/plugins"]))["PYTHONPATH"]
    assert path.split(":") == [str(CONFIGS.parent), "/my/plugins"]  # as Slurm's script and ssh's export it
    assert local.child_environment(parse(["target=local"]))["PYTHONPATH"].split(":") == [str(CONFIGS.parent), "/outer"]


# -- Slurm's commands as stubs ----------------------------------------------------------------------------------------


def stub(folder: Path, monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    """Shell scripts that stand before the real commands in PATH."""
    folder.mkdir(exist_ok=True)
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


SETUPS = {
    "conda": ('PATH_BEFORE="$CONDA_PREFIX$NOBODY_SET_THIS"\nexport FROM_SETUP=yes\nset -e', 0),
    "fails": ("export FROM_SETUP=yes\nmodule load x 2>/dev/null", 127),
    "leaves": ("exit 9", 9),
    "stops": ("set -e\nfalse\necho not reached", 1),
}


@pytest.mark.parametrize("name", SETUPS)
def test_slurm_setup_script(name, tmp_path, monkeypatch):
    """Sourced without `set -u`, from where it was checked and not from PATH; a failure is noted and is bad input."""
    text, code = SETUPS[name]
    decoy = "touch decoy"
    stub(tmp_path / "bin", monkeypatch, srun='echo "ranks: $FROM_SETUP"', scontrol="echo node1", **{"setup.sh": decoy})
    work = tmp_path / "it's work"
    work.mkdir()
    (work / "setup.sh").write_text(f"{text}\n")
    run = tmp_path / "run"
    (run / "launch/logs").mkdir(parents=True)
    launch = dataclasses.replace(parse([*SLURM, "launch.setup_script=setup.sh"]), directory=work)
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NAME": "x"}
    job = slurm.script(launch, [slurm.Point([], run)])
    done = subprocess.run(["bash"], input=job, text=True, capture_output=True, env=environment)
    history = (run / "launch/history.log").read_text()
    assert not (work / "decoy").exists()
    if code == 0:
        assert done.returncode == 0 and "ranks: yes" in done.stdout and "ended with 0" in history, done.stderr
    else:
        assert done.returncode == 2 and "ranks" not in done.stdout, done.stderr
        assert f"launch.setup_script={work}/setup.sh ended with {code}" in history


def test_slurm_status_says_when_the_queue_does_not_answer(tmp_path, monkeypatch):
    """A job that left the queue and a queue that is not reached are two things."""
    record = runs.Record("slurm", [], ["41", "42"], "")
    queue = (
        'echo "41 41 41 RUNNING None node1 0:10/1:00"; echo "99 42 42_3 PENDING Priority  0:00/1:00"; echo "7 7 7 X"'
    )
    stub(tmp_path, monkeypatch, squeue=queue, sacct="exit 1")
    assert slurm.status(record).splitlines() == [
        "job 41 RUNNING None node1 0:10/1:00",
        "job 42_3 PENDING Priority  0:00/1:00",
    ]
    assert slurm.running_jobs(record)
    stub(tmp_path, monkeypatch, squeue="exit 0", sacct="exit 1")
    assert "job 42: no longer in the queue" in slurm.status(record)
    stub(tmp_path, monkeypatch, squeue='echo "Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(LaunchError, match=r"squeue exited with 1 \(Unable to contact.*41, 42"):
        slurm.status(record)


def test_a_chain_that_is_refused_half_way_leaves_no_job_behind(tmp_path, monkeypatch):
    """A queue limit lets the first link in and refuses the second: no record would name the first."""
    commands = {
        "sbatch": f'[ -e {tmp_path}/full ] && {{ echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }}\n'
        f"touch {tmp_path}/full\necho 41",
        "scancel": f'echo "$@" >> {tmp_path}/cancelled',
    }
    stub(tmp_path, monkeypatch, **commands)
    launch = parse([*SLURM, "launch.continuation=chain", "launch.chain_jobs=3", "--", "run.steps=1"])
    with pytest.raises(LaunchError, match="sbatch refused the job: sbatch: error: QOSMaxSubmitJobPerUserLimit"):
        slurm.submit(launch, [slurm.Point(launch.overrides, tmp_path / "run")], tmp_path / "run", [])
    assert (tmp_path / "cancelled").read_text() == "41\n"
    assert not (tmp_path / "run/launch/launch.json").exists()
