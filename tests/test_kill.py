"""Stopped from outside: signals, a dead rank, a dead launcher, kill -9 in the middle of a save."""

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT
from runs import METHODS, differences, flags, launch, rows, train, wait_until

import common

SLOW = "--steps 24 --max_completion_length 24 --save_every 1000 --eval_every 1000"
ENDLESS = SLOW.replace("24", "100000")


@pytest.fixture(params=METHODS)
def method(request):
    """Name of a script, unchanged: the runs here go on in other processes."""
    return request.param


def few_problems(spec, split="train", limit=0):
    """Quicker to tokenise."""
    return common.load_problems(spec, split, limit or 64)


def stop_in_the_middle(method, model, out, signum, ranks):
    """Start a run, send the signal to what the user started -> (exit code, seconds it took)."""
    job = launch(ROOT / f"{method}.py", flags(model, out, SLOW), out.parent / "log", ranks)
    try:
        wait_until(lambda: len(rows(out, "train")) >= 3)
        clock = time.time()
        job.send_signal(signum)
        code = job.wait(30)
    finally:
        job.kill()
    step = rows(out, "train")[-1]["step"]
    assert 3 <= step < 24, "the run ended before the signal; make it longer"
    assert common.latest_checkpoint(out).name == f"step_{step:06d}"  # nothing lost
    return code, time.time() - clock


@pytest.mark.parametrize("method, signum, code", [
    (METHODS[0], signal.SIGINT, 130), *[(method, signal.SIGTERM, 143) for method in METHODS]],
    indirect=["method"])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_ends_as_if_never_stopped(
        method, model, tmp_path, signum, code):
    out, whole = tmp_path / "run", tmp_path / "whole"
    found, seconds = stop_in_the_middle(method, model, out, signum, ranks=1)
    assert (found, seconds < 10) == (code, True)
    assert isinstance(train(method, flags(model, out, f"{SLOW} --resume auto")), dict)
    assert isinstance(train(method, flags(model, whole, SLOW)), dict)
    assert differences(out / "step_000024", whole / "step_000024") == []
    assert rows(out) == rows(whole)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_leaves_a_checkpoint_too(method, model, tmp_path, signum):
    out, whole = tmp_path / "run", tmp_path / "whole"
    code, seconds = stop_in_the_middle(method, model, out, signum, ranks=2)
    assert code != 0 and seconds < 20
    for folder, more in ((out, "--resume auto"), (whole, "")):
        argv = flags(model, folder, f"{SLOW} {more}")
        job = launch(ROOT / f"{method}.py", argv, tmp_path / "log", ranks=2)
        assert job.wait(120) == 0, (tmp_path / "log").read_text()
    assert differences(out / "step_000024", whole / "step_000024") == []
    assert rows(out) == rows(whole)


@pytest.mark.parametrize("moment", ["rollout", "evaluate", "update", "save_checkpoint"])
def test_a_signal_drops_the_rollout_or_evaluation_that_it_interrupts_and_nothing_else(
        method, model, tmp_path, monkeypatch, moment):
    script, out = import_module(method), tmp_path / "run"
    work, calls = getattr(script, moment), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == (3 if moment != "save_checkpoint" else 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return work(*args, **kwargs)

    monkeypatch.setattr(script, "load_problems", few_problems)
    monkeypatch.setattr(script, moment, interrupted)
    assert train(method, flags(model, out)) == 143
    # evaluations at 0, 2, 4, and their rollouts count; an update or a save is finished
    step = {"rollout": 1, "evaluate": 4, "update": 3, "save_checkpoint": 2}[moment]
    assert [r["step"] for r in rows(out, "train")] == [*range(1, step + 1)]
    assert [r["step"] for r in rows(out, "eval")] == [*range(0, step, 2)]
    assert common.latest_checkpoint(out).name == f"step_{step:06d}"
    monkeypatch.setattr(script, moment, work)
    assert isinstance(train(method, flags(model, out, "--resume auto")), dict)
    assert isinstance(train(method, flags(model, tmp_path / "whole")), dict)
    assert rows(out) == rows(tmp_path / "whole")


def test_a_second_ctrl_c_does_not_wait(method, model, tmp_path, monkeypatch):
    script = import_module(method)

    def stuck(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        raise AssertionError("still here")

    monkeypatch.setattr(script, "rollout", stuck)
    with pytest.raises(KeyboardInterrupt):
        train(method, flags(model, tmp_path / "run"))


def test_a_signal_ends_a_dry_run_quietly(method, model, tmp_path, monkeypatch):
    encode = import_module(method).encode_prompts
    monkeypatch.setattr(f"{method}.encode_prompts", lambda *args: (
        os.kill(os.getpid(), signal.SIGTERM), encode(*args))[1])
    assert train(method, flags(model, tmp_path / "run", "--dry_run")) == 143


def worker_pids(launcher):
    """Children of a process: the ranks of a torchrun."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True)
    return [int(pid) for pid in found.stdout.split()]


def alive(pid):
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "launcher"])
def test_when_a_rank_or_the_launcher_is_killed_the_whole_job_ends(method, model, tmp_path, victim):
    out, argv = tmp_path / "run", flags(model, tmp_path / "run", ENDLESS)
    job = launch(ROOT / f"{method}.py", argv, tmp_path / "log", ranks=2)
    workers = []
    try:
        wait_until(lambda: len(rows(out, "train")) >= 3)
        workers = worker_pids(job.pid)
        assert len(workers) == 2
        victims = {"launcher": job.pid, "rank 0": min(workers), "rank 1": max(workers)}
        os.kill(victims[victim], signal.SIGKILL)
        assert job.wait(30) != 0
        wait_until(lambda: not any(map(alive, workers)), 30)
        if victim == "launcher":  # the ranks notice, agree, and save
            assert common.latest_checkpoint(out).name != "step_000000"
    finally:
        for pid in [job.pid, *workers]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        job.wait()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts on ps")
@pytest.mark.parametrize("method", METHODS[:1], indirect=True)
def test_a_rank_that_hangs_ends_the_job_after_the_timeout_with_a_line_that_says_so(
        method, model, tmp_path):
    out = tmp_path / "run"
    argv = flags(model, out, f"{ENDLESS} --save_every 2 --dist_timeout 1")
    job = launch(ROOT / f"{method}.py", argv, tmp_path / "log", ranks=2)
    workers = []
    try:
        wait_until(lambda: len(rows(out, "train")) >= 3)
        workers = worker_pids(job.pid)
        os.kill(max(workers), signal.SIGSTOP)
        assert job.wait(60 + 60) != 0
        assert not any(map(alive, workers))
    finally:
        for pid in [job.pid, *workers]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        job.wait()
    said = (tmp_path / "log").read_text()
    assert "error: rank 0 waited for another one in vain; if none hangs, raise --dist_tim" in said
    assert common.latest_checkpoint(out)


def test_whenever_a_save_is_killed_the_newest_complete_checkpoint_loads(tmp_path):
    """In a process of its own, which forks one that saves and kills it, 24 times."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "kill_saves.py", "24", tmp_path],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "24 kills" in done.stdout, done.stdout + done.stderr
