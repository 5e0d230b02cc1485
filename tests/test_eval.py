"""eval.py: which model is decoded how, its numbers and files; and how problems are drawn."""

import itertools
import json
import shutil
from importlib import import_module

import pytest
from conftest import ROOT, save_folder
from runs import METHODS, flags, train

import common
import eval as evaluation


@pytest.fixture(scope="module", params=METHODS)
def run(request, tmp_path_factory):
    """A trained run of a random model: (script, folder of the run, folder of the model)."""
    folder = tmp_path_factory.mktemp("eval")
    model = save_folder(folder / "model")
    assert isinstance(train(request.param, flags(model, folder / "run")), dict)
    return request.param, folder / "run", model


def evaluate(*argv):
    return evaluation.main([*map(str, argv), "--data", "arithmetic:2", "--limit", "12"])


def test_a_run_a_checkpoint_and_its_hf_folder_are_the_same_model(run):
    method, folder, model = run
    newest = common.latest_checkpoint(folder)
    rows = evaluate(folder, newest, newest / "hf", "--max_completion_length", 8)
    assert [row["mode"] for row in rows] == [method] * 3
    assert rows[0]["latent_steps"] > 0
    numbers = [{k: v for k, v in row.items() if k != "model"} for row in rows]
    assert numbers[0] == numbers[1] == numbers[2]


def test_plain_switches_the_latent_steps_off_and_other_models_have_none(run):
    _, folder, model = run
    own = evaluate(folder, "--plain")[0]
    other = evaluate(model, "--max_completion_length", 8, "--answer_marker", "</think>")[0]
    assert own["mode"] == other["mode"] == "plain" and own["latent_steps"] == 0


def test_a_checkpoint_evaluates_as_its_last_row_in_metrics(run):
    method, folder, model = run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    limit = rows[-1]["n"]
    row, = evaluation.main([str(folder), "--data", "arithmetic:2", "--limit", str(limit)])
    for name in ("accuracy", "latent_steps", "total_length", "truncated_frac", "format_ok"):
        assert row[name] == rows[-1][name]


def test_completions_are_written_so_that_anyone_can_grade_them_again(run, tmp_path, capsys):
    _, folder, _ = run
    row, = evaluate(folder, "--num_samples", 4, "--temperature", 1, "--out", tmp_path / "out")
    jsonl, = (tmp_path / "out").glob("*.jsonl")
    records = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert len(records) == 48 and row["n"] == 12
    again = [common.is_correct(r["completion"], r["gold"], r["marker"]) for r in records]
    assert again == [r["correct"] for r in records] and row["accuracy"] == sum(again) / 48
    before = jsonl.read_bytes()
    with pytest.raises(SystemExit) as stop:
        evaluate(folder, "--num_samples", 4, "--out", tmp_path / "out")
    assert stop.value.code == 2 and "already has results" in capsys.readouterr().err
    assert jsonl.read_bytes() == before


def test_a_fork_of_a_script_is_evaluated_by_the_fork(run, tmp_path, monkeypatch):
    method, folder, _ = run
    (tmp_path / "my_fork.py").write_bytes((ROOT / f"{method}.py").read_bytes())
    (tmp_path / "eval.py").touch()
    monkeypatch.setattr(evaluation, "__file__", str(tmp_path / "eval.py"))
    monkeypatch.syspath_prepend(tmp_path)
    fork = shutil.copytree(common.latest_checkpoint(folder) / "hf", tmp_path / "hf")
    settings = fork / "latent" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "method": "my_fork"}))
    assert evaluate(fork)[0]["mode"] == "my_fork"


def test_a_checkpoint_as_model_brings_its_method_and_preset(run, tmp_path):
    method, folder, _ = run
    script = import_module(method)
    cfg = script.parse_config(["--model", str(folder)])
    assert cfg.preset == "tiny"
    policy = script.Policy(*common.load_model(str(folder)), cfg)
    own = {k: v.clone() for k, v in policy.state_dict().items() if not k.startswith(("lm", "tab"))}
    common.load_method(policy, str(folder), method)
    moved = any(not v.equal(policy.state_dict()[k]) for k, v in own.items())
    assert moved or (not own and method != "hrpo")  # it may add no weights


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for total, k in ((5, 2), (6, 3), (4, 4)):
        for correct in range(total + 1):
            subsets = list(itertools.combinations(range(total), k))
            share = sum(min(s) < correct for s in subsets) / len(subsets)
            assert evaluation.pass_at_k(correct, total, k) == pytest.approx(share)


@pytest.mark.parametrize("name, word", [("no/such/model", "no/such/model"), (".", "not a model")])
def test_a_folder_without_a_model_is_refused(name, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        evaluate(name)
    assert stop.value.code == 2 and word in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_every_problem_is_drawn_once_in_each_pass_over_the_data(method):
    draw = import_module(method).batch_indices
    indices = sum((draw(10, 4, 7, step) for step in range(5)), [])
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]
    other = sum((draw(10, 4, 8, step) for step in range(5)), [])
    assert other[:10] != indices[10:] and other[:10] != indices[:10]


@pytest.mark.parametrize("method", METHODS)
def test_extra_rollouts_replace_groups_of_equal_rewards(method, run, monkeypatch):
    script = import_module(method)
    cfg = script.parse_config(flags(run[2], "", "--max_extra_rollouts 3 --num_prompts 6"))
    policy = script.Policy(*common.load_model(run[2]), cfg)
    tokenizer = common.load_model(run[2])[1]
    problems = common.encode_prompts(
        tokenizer, common.load_problems("arithmetic:2-4", "train", 40), cfg.answer_marker, 64)
    counter = itertools.count()

    def reward(record):
        number = next(counter)
        return float(number // cfg.group_size % 3 == 0 and number % 2)  # every third group is live

    monkeypatch.setattr(script, "reward", reward)
    batch, records = script.collect_batch(policy, tokenizer, problems, cfg, 0)
    spread = batch["rewards"].view(6, -1).std(1) > 0
    assert len(records) == 3 * 6 * cfg.group_size and spread.all()  # 2 + 2 + 2 live groups
    assert len(batch["completion_ids"]) == 6 * cfg.group_size
    monkeypatch.setattr(script, "reward", lambda record: 0.0)
    batch, records = script.collect_batch(policy, tokenizer, problems, cfg, 0)
    assert len(batch["rewards"]) == 6 * cfg.group_size
    assert len(records) == 4 * 6 * cfg.group_size
