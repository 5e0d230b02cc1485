"""--estimate, --keep_best and --track."""

import json
import re
import sys

import pytest
import torch
from conftest import make_lm
from runs import flags, rows, train

import common
import extras
import hrpo
import lepo
from eval import parse_args


def config_folder(folder, **changes):
    """A folder with a config.json and nothing else."""
    folder.mkdir()
    config = {"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28,
              "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
              "vocab_size": 152064, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def estimate(module, argv):
    cfg = module.parse_config(argv)
    return cfg, *extras.estimate(cfg, cfg.estimate)


SMALL = ["--preset", "tiny", "--device", "cpu", "--train", "arithmetic:2"]


def test_a_7b_model_is_estimated_from_its_config_alone(tmp_path, capsys):
    """Against shapes by hand: 6.53e9 parameters in the blocks, 1.09e9 in the two tables."""
    model = config_folder(tmp_path / "model")
    argv = ["--model", model, "--preset", "paper", "--device", "cuda", "--estimate", "8", "--zero"]
    with pytest.raises(SystemExit) as stop:
        lepo.main(argv)
    assert stop.value.code == 0
    lines = re.findall(r"^ +([0-9.]+)  (.+)$", capsys.readouterr().out, re.M)
    found = {name: float(size) for size, name in lines}
    assert len(found) == 12
    blocks = 28 * (3584 * (2 * 3584 + 2 * 512 + 3 * 18944) + 3584 + 1024 + 2 * 3584) + 3584
    tables = 2 * 152064 * 3584
    gib = 2**30
    assert found["weights"] == pytest.approx(4 * (blocks + tables) / gib, abs=0.01)
    assert found["gradients"] == pytest.approx(4 * blocks / gib, abs=0.01)
    assert found["optimizer"] == pytest.approx(8 * blocks / 8 / gib, abs=0.01)
    cfg = lepo.parse_config(argv)
    positions = cfg.num_prompts / 8 * cfg.group_size * (
        cfg.max_prompt_length + cfg.max_completion_length + 64)
    cache = positions * 28 * 2 * 4 * 128 * 2
    assert found["cache of the rollout"] == pytest.approx(cache / gib, abs=0.01)


def test_lora_and_bfloat16_halve_the_frozen_weights_and_shrink_the_rest(tmp_path):
    model = config_folder(tmp_path / "model", hidden_size=256, intermediate_size=512,
                          num_hidden_layers=4, num_attention_heads=4, vocab_size=1000)
    argv = [*SMALL, "--model", model, "--estimate", "1"]
    _, full, *_ = estimate(hrpo, argv)
    _, lora, *_ = estimate(hrpo, [*argv, "--lora_rank", "4", "--dtype", "bfloat16"])
    adapters = lora["gradients"]
    assert lora["weights"] == full["weights"] / 2 + adapters and adapters < full["gradients"] / 10
    assert lora["optimizer"] == 2 * adapters and lora["reference"] == 0 < full["reference"]
    assert lora["cache of the rollout"] == full["cache of the rollout"] / 2


def test_checkpointing_shared_prompts_and_micro_batches_lower_the_activations(tmp_path):
    model = config_folder(tmp_path / "model", hidden_size=256, intermediate_size=512,
                          num_hidden_layers=8, num_attention_heads=4, vocab_size=1000)
    argv = [*SMALL, "--model", model, "--estimate", "1"]
    found = [estimate(hrpo, [*argv, *more])[1]["activations of a micro-batch"] for more in (
        [], ["--micro_batch", "32"], ["--share_prompts"], ["--gradient_checkpointing"],
        ["--max_tokens", str(32 * 160)])]
    assert found[1] == pytest.approx(found[0] / 2, rel=0.01) and found[4] == found[1]
    assert found[2] < found[0] / 2 and found[3] < found[0] / 4


def test_activations_are_those_that_autograd_keeps(tmp_path):
    """The same count with real tensors, of an update's forward pass."""
    lm, held = make_lm(), {}
    lm.save_pretrained(tmp_path / "model")
    _, parts, *_ = estimate(hrpo, [*SMALL, "--model", str(tmp_path / "model"), "--estimate", "1",
                                   "--num_prompts", "2", "--group_size", "2"])
    weights = {p.data_ptr() for p in lm.parameters()}
    for table in (lm.get_input_embeddings(), lm.get_output_embeddings()):
        table.requires_grad_(False)

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes(), storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mask = torch.ones(4, 160).bool()
        mask[0, :3] = False  # without padding transformers keeps no mask
        common.lm_hidden(lm.train(), torch.randn(4, 160, 32), mask)
    real = sum(number for number, _ in held.values())
    assert parts["activations of a micro-batch"] == pytest.approx(real, rel=0.02)


def test_a_dry_run_begins_with_the_estimate(model, tmp_path, capsys):
    train("hrpo", flags(model, tmp_path / "run", "--dry_run"))
    out = capsys.readouterr().out
    assert out.startswith("memory estimated for each of 1 ranks") and "dry run" in out
    assert not (tmp_path / "run").exists()


def test_the_checkpoint_with_the_best_evaluation_stays_and_is_found(model, tmp_path, monkeypatch):
    scores = iter([0.0, 0.5, 0.9, 0.9, 0.1, 0.3])
    real = hrpo.evaluate
    monkeypatch.setattr(hrpo, "evaluate", lambda *args: {
        **real(*args), "accuracy": next(scores)})
    run = tmp_path / "run"
    more = "--steps 5 --eval_every 1 --save_every 1 --keep_checkpoints 1 --keep_best"
    train("hrpo", flags(model, run, more))
    assert sorted(p.name for p in run.glob("step_*")) == ["step_000002", "step_000005"]
    assert extras.best_checkpoint(run) == run / "step_000002"
    args = parse_args([str(run), "--best"])
    assert args.models == [str(run / "step_000002")]


def test_best_needs_an_evaluated_checkpoint(tmp_path, capsys):
    for changes in ("--eval_every 3 --save_every 2", "--eval_every 1 --save_every 2"):
        with pytest.raises(SystemExit) as stop:
            extras.prepare(hrpo.parse_config(["--keep_best", *changes.split()]))
        assert stop.value.code == 2 and "--save_every" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        parse_args([str(tmp_path), "--best"])
    assert stop.value.code == 2 and str(tmp_path) in capsys.readouterr().err


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
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert train("hrpo", flags(model, tmp_path / "run", "--track wandb")) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert train("hrpo", flags(model, tmp_path / "run", "--track mlflow")) == 2
    assert "tensorboard or wandb" in capsys.readouterr().err
