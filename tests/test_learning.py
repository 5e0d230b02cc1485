"""Does it learn? The built-in task, from the trained `tiny` model (trained at first use)."""

import json
import random
from importlib import import_module

import pytest
from conftest import METHODS
from runs import OFF


def train(method, tmp_path, *flags):
    """First and last evaluation of a run."""
    script = import_module(method)
    out = tmp_path / "-".join((method, *flags)).replace("/", "-")
    flags = ["--out_dir", str(out), "--eval_limit", "512", "--save_every", "1000", *flags]
    last = script.main(flags)
    rows = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(rows[0])
    assert first["step"] == 0 and first["kind"] == "eval"
    return first["accuracy"], last["accuracy"]


@pytest.mark.parametrize("method", [  # half a minute each; a supervised stage takes a minute more
    METHODS[0], *[pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:]]])
def test_thirty_steps_on_the_default_task_raise_held_out_accuracy_by_25_points(method, tmp_path):
    before, after = train(method, tmp_path, "--steps", "30", "--eval_every", "30")
    assert 0.35 < before < 0.65  # the plateau of imitation
    assert after >= before + 0.25


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["11", "12", "13"])
@pytest.mark.parametrize("off", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_default_run_ends_above_85_percent(method, off, seed, tmp_path):
    before, after = train(method, tmp_path, "--seed", seed, *(OFF[method].split() if off else ()))
    assert after >= 0.85 and after >= before + 0.25


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_negated_advantages_make_it_worse(method, tmp_path, monkeypatch):
    script = import_module(method)
    original = script.group_advantages
    monkeypatch.setattr(script, "group_advantages", lambda *args: -original(*args))
    before, after = train(method, tmp_path, "--steps", "20")
    assert after < before - 0.2


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_random_rewards_do_not_teach(method, tmp_path, monkeypatch):
    script = import_module(method)
    draws = random.Random(0)
    monkeypatch.setattr(script, "reward", lambda record: float(draws.random() < 0.5))
    before, after = train(method, tmp_path, "--steps", "40")
    assert after < before + 0.1
