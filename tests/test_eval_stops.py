"""eval.py beside another one, in a folder that takes nothing, and killed in the middle."""

import os
import random
import signal
import time

import pytest
from conftest import ROOT, save_folder
from runs import METHODS, flags, launch, train, wait_until

import common
import eval as evaluation

LINE = "--data arithmetic:2-4 --limit 40 --eval_batch 1 --num_samples 2 --temperature 1"


@pytest.fixture(scope="module", params=METHODS)
def folder(request, tmp_path_factory):
    """A trained run of a random model."""
    path = tmp_path_factory.mktemp("stops")
    argv = flags(save_folder(path / "model"), path / "run")
    assert isinstance(train(request.param, argv), dict)
    return str(path / "run")


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_second_evaluation_of_the_same_into_the_same_folder_is_refused(
        folder, tmp_path, capsys):
    argv = [folder, *LINE.split(), "--limit", "4", "--out", str(tmp_path / "out")]
    evaluation.main(argv)
    stem = next((tmp_path / "out").glob("*.json"))
    whole = contents(tmp_path / "out")
    stem.unlink()
    held = common.lock_file("--out", stem.with_suffix(".part.jsonl"))  # as the first one does
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(argv)
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "--out" in line and "in use by another process" in line
    held.close()
    evaluation.main(argv)
    assert contents(tmp_path / "out") == whole


def test_a_folder_that_cannot_be_made_is_named(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for place in ("/proc/none", str(tmp_path / "file" / "out"), str(tmp_path / "file")):
        with pytest.raises(SystemExit) as stop:
            evaluation.main([folder, *LINE.split(), "--limit", "4", "--out", place])
        line, = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and place in line and "cannot be written" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_an_evaluation_killed_again_and_again_ends_as_if_it_never_was(folder, tmp_path):
    rng, argv = random.Random(0), [folder, *LINE.split(), "--out"]
    out = tmp_path / "out"
    for lines in (1, 20, 50):  # of a header and 80 completions
        job = launch(ROOT / "eval.py", [*argv, str(out)], tmp_path / "log")
        wait_until(lambda n=lines: any(len(p.read_bytes().splitlines()) > n for p in out.glob(
            "*.part.jsonl")))
        time.sleep(rng.random() * 0.03)
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait(30) != 0, "it ended before the signal; make it longer"
    evaluation.main([*argv, str(out)])
    evaluation.main([*argv, str(tmp_path / "whole")])
    assert contents(out) == contents(tmp_path / "whole") and len(contents(out)) == 2
