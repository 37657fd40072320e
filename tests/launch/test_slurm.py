"""target=slurm: the batch script and the queue, with Slurm's commands replaced by scripts on PATH."""

import dataclasses
import os
import subprocess

import pytest

from launch import runs, slurm
from launch.agent import FINAL
from launch.config import parse
from launch.errors import LaunchError
from launch.runs import Run
from tests.launch.conftest import NASTY, SLURM, nasty_launch, put_on_path, words_of


def test_the_script_quotes_what_it_is_given(tmp_path):
    launch = nasty_launch(SLURM, tmp_path)
    run = tmp_path / f"runs/{NASTY.replace('/', '')}%j"
    text = slurm.script(launch, [Run("r", launch.overrides, run)])
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    head = text.split("cd --")[0]
    got = words_of(head, tmp_path, '\nprintf "%s\\0" "$run_directory" "$log" "$NOTE" "${overrides[@]}"\n')
    assert got == [str(run), str(run).replace("%", "%%") + "/launch/logs/%j-%N.log", NASTY, f"data.text_key={NASTY}"]
    name = slurm.job_name(run)
    assert name.replace("-", "").replace(".", "").replace("_", "").isalnum()
    assert name != slurm.job_name(tmp_path / "other" / run.name)  # equal names elsewhere do not wait for each other


def test_a_backslash_in_the_log_path_is_refused(tmp_path):
    launch = parse(SLURM)
    with pytest.raises(LaunchError, match="backslash"):
        slurm.submit(launch, [Run("r", [], tmp_path / "a\\b")], tmp_path, [])


SETUPS = {
    "conda": ('PATH_BEFORE="$CONDA_PREFIX$NOBODY_SET_THIS"\nexport FROM_SETUP=yes\nset -e', 0),
    "fails": ("export FROM_SETUP=yes\nmodule load x 2>/dev/null", 127),
    "leaves": ("exit 9", 9),
    "stops": ("set -e\nfalse\necho not reached", 1),
}


@pytest.mark.parametrize("name", SETUPS)
def test_setup_script(name, tmp_path, monkeypatch):
    """It is sourced without `set -u` and not looked up in PATH; a failure is noted and ends the job with 2."""
    text, code = SETUPS[name]
    decoy = "touch decoy"
    put_on_path(
        tmp_path / "bin", monkeypatch, srun='echo "ranks: $FROM_SETUP"', scontrol="echo node1", **{"setup.sh": decoy}
    )
    work = tmp_path / "it's work"
    work.mkdir()
    (work / "setup.sh").write_text(f"{text}\n")
    run = tmp_path / "run"
    (run / "launch/logs").mkdir(parents=True)
    launch = dataclasses.replace(parse([*SLURM, "launch.setup_script=setup.sh"]), directory=work)
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NAME": "x"}
    job = slurm.script(launch, [Run("r", [], run)])
    done = subprocess.run(["bash"], input=job, text=True, capture_output=True, env=environment)
    history = (run / "launch/history.log").read_text()
    assert not (work / "decoy").exists()
    if code == 0:
        assert done.returncode == 0 and "ranks: yes" in done.stdout and "ended with 0" in history, done.stderr
    else:
        assert done.returncode == 2 and "ranks" not in done.stdout, done.stderr
        assert f"launch.setup_script={work}/setup.sh ended with {code}" in history


def test_status_reports_a_queue_that_does_not_answer(tmp_path, monkeypatch):
    """A queue that does not answer is not the same as a job that has left the queue."""
    record = runs.Record("slurm", [], ["41", "42"], "")
    queue = (
        'echo "41 41 41 RUNNING None node1 0:10/1:00"; echo "99 42 42_3 PENDING Priority  0:00/1:00"; echo "7 7 7 X"'
    )
    put_on_path(tmp_path, monkeypatch, squeue=queue, sacct="exit 1")
    assert slurm.status(record).splitlines() == [
        "job 41 RUNNING None node1 0:10/1:00",
        "job 42_3 PENDING Priority  0:00/1:00",
    ]
    assert slurm.is_queued(record)
    put_on_path(tmp_path, monkeypatch, squeue="exit 0", sacct="exit 1")
    assert "job 42: no longer in the queue" in slurm.status(record)
    put_on_path(tmp_path, monkeypatch, squeue='echo "Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(LaunchError, match=r"squeue exited with 1 \(Unable to contact.*41, 42"):
        slurm.status(record)


def test_a_chain_that_is_refused_half_way_leaves_no_job_behind(tmp_path, monkeypatch):
    """A queue limit accepts the first job and refuses the second: no record would name the first."""
    commands = {
        "sbatch": f'[ -e {tmp_path}/full ] && {{ echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }}\n'
        f"touch {tmp_path}/full\necho 41",
        "scancel": f'echo "$@" >> {tmp_path}/cancelled',
    }
    put_on_path(tmp_path, monkeypatch, **commands)
    launch = parse([*SLURM, "launch.continuation=chain", "launch.chain_jobs=3", "--", "run.steps=1"])
    with pytest.raises(LaunchError, match="sbatch refused the job: sbatch: error: QOSMaxSubmitJobPerUserLimit"):
        slurm.submit(launch, [Run("r", launch.overrides, tmp_path / "run")], tmp_path / "run", [])
    assert (tmp_path / "cancelled").read_text() == "41\n"
    assert not (tmp_path / "run/launch/launch.json").exists()


@pytest.mark.parametrize("code", FINAL)
def test_a_final_exit_code_ends_the_job_and_its_chain(code, tmp_path, monkeypatch):
    """Neither another attempt nor a requeue follows, and the waiting jobs of the chain are cancelled."""
    put_on_path(
        tmp_path / "bin",
        monkeypatch,
        srun=f"echo started >> {tmp_path}/attempts; exit {code}",
        scontrol=f'[ "$1" = requeue ] && touch {tmp_path}/requeued; echo node1',
        scancel=f'echo "$@" >> {tmp_path}/cancelled',
        squeue="echo RUNNING",
    )
    run = tmp_path / "run"
    (run / "launch/logs").mkdir(parents=True)
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NAME": "x"}
    chain = ["launch.continuation=chain", "launch.chain_jobs=3"]
    for settings in ([], chain):
        job = slurm.script(parse([*SLURM, *settings]), [Run("r", [], run)])
        done = subprocess.run(["bash"], input=job, text=True, capture_output=True, env=environment)
        assert done.returncode == code, done.stderr
        assert (tmp_path / "cancelled").exists() == (settings is chain)
    assert (tmp_path / "attempts").read_text() == "started\n" * 2 and not (tmp_path / "requeued").exists()
    assert "--state=PENDING" in (tmp_path / "cancelled").read_text()
