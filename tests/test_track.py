"""--keep_best and --track."""

import json
import sys

import pytest
from runs import flags, rows, train

import hrpo
from eval import best_checkpoint, parse_args


def test_the_checkpoint_with_the_best_evaluation_stays_and_is_found(model, tmp_path, monkeypatch):
    scores = iter([0.0, 0.5, 0.9, 0.9, 0.1, 0.3])
    real = hrpo.evaluate
    monkeypatch.setattr(hrpo, "evaluate", lambda *args: {
        **real(*args), "accuracy": next(scores)})
    run = tmp_path / "run"
    more = "--steps 5 --eval_every 1 --save_every 1 --keep_checkpoints 1 --keep_best"
    train("hrpo", flags(model, run, more))
    assert sorted(p.name for p in run.glob("step_*")) == ["step_000002", "step_000005"]
    assert best_checkpoint(run) == run / "step_000002"
    args = parse_args([str(run), "--best"])
    assert args.models == [str(run / "step_000002")]


def test_best_needs_an_evaluated_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args([str(tmp_path), "--best"])
    assert stop.value.code == 2 and str(tmp_path) in capsys.readouterr().err


def test_the_best_checkpoint_is_saved_at_its_evaluation(model, tmp_path, monkeypatch):
    scores = iter([0.0, 0.5, 0.9, 0.1])
    real = hrpo.evaluate
    monkeypatch.setattr(hrpo, "evaluate", lambda *args: {
        **real(*args), "accuracy": next(scores)})
    run = tmp_path / "run"
    more = "--steps 6 --eval_every 2 --save_every 5 --keep_checkpoints 1 --keep_best"
    train("hrpo", flags(model, run, more))
    assert sorted(p.name for p in run.glob("step_*")) == ["step_000004", "step_000006"]


def test_tensorboard_shows_the_rows_of_the_metrics_also_after_a_resume(model, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train("hrpo", flags(model, run, "--track tensorboard --stop_after 3"))
    train("hrpo", flags(model, run, "--track tensorboard --resume auto"))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for kind in ("train", "eval"):
        for row in rows(run, kind):
            for key, value in row.items():
                if isinstance(value, int | float):
                    steps = {e.step: e.value for e in events.Scalars(f"{kind}/{key}")}
                    assert steps[row["step"]] == pytest.approx(value, rel=1e-6), (kind, key)
        steps = [e.step for e in events.Scalars(f"{kind}/length" if kind == "train" else
                                               "eval/accuracy")]
        assert steps == [row["step"] for row in rows(run, kind)]


WANDB = """
import json, os
def init(**args):
    print("WANDB", json.dumps(args, default=str))
    return Run()
class Run:
    def log(self, values, step):
        print("WANDB", json.dumps([step, values]))
"""


def test_wandb_gets_the_same_rows_and_goes_on_under_the_same_id(
        model, tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = tmp_path / "run"
    train("hrpo", flags(model, run, "--track wandb --stop_after 3"))
    train("hrpo", flags(model, run, "--track wandb --resume auto"))
    sys.modules.pop("wandb")
    found = [json.loads(line[6:]) for line in capsys.readouterr().out.splitlines()
             if line.startswith("WANDB")]
    starts = [args for args in found if isinstance(args, dict)]
    assert [args["resume"] for args in starts] == ["allow"] * 2
    assert starts[0]["id"] == starts[1]["id"] and len(starts[0]["id"]) > 8
    last = [values for values in found if isinstance(values, list)][-1]
    row = rows(run, "eval")[-1]
    assert last[0] == row["step"] == 4 and last[1]["eval/accuracy"] == row["accuracy"]


def test_a_tracker_that_is_not_installed_or_not_known_is_one_line(
        model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train("hrpo", flags(model, tmp_path / "run", "--track wandb")) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert train("hrpo", flags(model, tmp_path / "run", "--track mlflow")) == 2
    assert "tensorboard or wandb" in capsys.readouterr().err
