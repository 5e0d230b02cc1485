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
    more = ["--num_samples", 8, "--temperature", 9] * (method == "hyrea")  # it rarely switches
    rows = evaluate(folder, newest, newest / "hf", "--max_completion_length", 8, *more)
    assert [row["mode"] for row in rows] == ["trained"] * 3
    assert rows[0]["latent_steps"] > 0
    numbers = [{k: v for k, v in row.items() if k != "model"} for row in rows]
    assert numbers[0] == numbers[1] == numbers[2]


def configure(name, *flags):
    return evaluation.configure(str(name), evaluation.parse_args([str(name), *map(str, flags)]))


def refused(capsys, *argv):
    """The one line of an error with which eval.py refuses its arguments."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*map(str, argv)])
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "error" in line
    return line


def test_explicit_switches_the_latent_steps_off_and_other_models_have_none(run):
    _, folder, model = run
    own = evaluate(folder, "--mode", "explicit")[0]
    other = evaluate(model, "--max_completion_length", 8, "--answer_marker", "</think>")[0]
    assert own["mode"] == other["mode"] == "explicit" and own["latent_steps"] == 0


def test_soft_thinking_decodes_the_language_model_alone(run, tmp_path, capsys):
    _, folder, _ = run
    bare = shutil.copytree(common.latest_checkpoint(folder) / "hf", tmp_path / "hf")
    shutil.rmtree(bare / "latent")
    rows = evaluate(folder, bare, "--mode", "soft_thinking", "--max_completion_length", 8,
                    "--answer_marker", "</think>", "--max_prompt_length", 128)
    assert [row["mode"] for row in rows] == ["soft_thinking"] * 2 and rows[0]["latent_steps"] > 0
    assert [rows[0].pop("model"), rows[1].pop("model")] == [str(folder), str(bare)]
    assert [rows[0][name] for name in ("--temperature", "--top_k", "--top_p")] == [0.6, 10, 0.95]
    one, two = ({k: v for k, v in row.items() if k[:2] != "--" and k != "train_seed"}
                for row in rows)  # the bare folder does not know how it was trained
    assert one == two and one["script"] == "lepo" and not capsys.readouterr().err


def test_given_flags_replace_the_mode_which_replaces_what_was_saved(run):
    method, folder, _ = run
    script, cfg, mode, given = configure(folder)
    assert (script.METHOD, mode, given, cfg.lr) == (method, "trained", {}, 0.01)
    assert cfg.greedy and cfg.num_samples == 1 and cfg.max_completion_length == 12
    line = "--temperature 0.3 --top_p=0.5 --no-greedy --eval_batch 3"
    given = {"temperature": 0.3, "top_p": 0.5, "greedy": False, "eval_batch": 3}
    for mode in evaluation.MODES:
        _, cfg, found, names = configure(folder, "--mode", mode, *line.split())
        assert (found, names) == (mode, given) and cfg.max_completion_length == 12
        assert {name: getattr(cfg, name) for name in given} == given
        assert cfg.top_k == (10 if mode == "soft_thinking" else 0)
    assert not configure(folder, "--num_samples", 4)[1].greedy
    assert configure(folder, "--num_samples", 4, "--greedy")[1].greedy


def test_flags_change_how_a_checkpoint_is_decoded(run):
    method, folder, _ = run
    row, = evaluate(folder, "--max_completion_length", 3)
    assert row["total_length"] <= 3 and row["given"] == {"max_completion_length": 3}
    if method == "lepo":
        row, = evaluate(folder, "--latent_steps", 1, "--noise_scale", 0)
        assert row["latent_steps"] == 1 and row["mode"] == "trained"
        assert evaluate(folder, "--latent_steps", 0)[0]["mode"] == "explicit"


def test_the_floor_gives_the_marker_at_once(run):
    row, = evaluate(run[1], "--mode", "floor")
    assert row["script"] == "latent_grpo" and row["latent_steps"] == 0
    assert row["format_ok"] > 0.5  # nothing else writes a marker here
    assert evaluate(run[1], "--mode", "explicit")[0]["format_ok"] < 0.5


def test_a_foreign_model_thinks_in_mixtures_as_latent_grpo_decodes_it(run):
    import latent_grpo
    _, _, model = run
    line = "--mode latent_grpo --latent_top_k 5 --max_completion_length 9 --max_prompt_length 128"
    row, = evaluate(model, *line.split())
    assert (row["script"], row["mode"]) == ("latent_grpo", "latent_grpo")
    script, cfg, *_ = configure(model, *line.split())
    assert script is latent_grpo and cfg.latent and cfg.latent_top_k == 5 and cfg.lora_rank == 0
    policy, tokenizer = evaluation.load_policy(script, cfg)
    problems = common.load_problems("arithmetic:2", "test", 12)
    encoded = common.encode_prompts(tokenizer, problems, cfg)
    found = script.evaluate(policy, tokenizer, encoded, cfg, common.make_rng("cpu", 0))
    names = ("accuracy", "latent_steps", "total_length", "truncated_frac", "format_ok")
    assert [row[name] for name in names] == [found[name] for name in names]
    assert 0 < row["latent_steps"] < row["total_length"]


def test_the_length_of_finished_completions_leaves_out_what_is_cut_off():
    lengths = {4: False, 6: False, 20: True}
    record = dict(completion="", marker="</think>", gold="1", correct=False, format_ok=True,
                  unanswered=True, latent_steps=1, switches=1, set="")
    records = [{**record, "length": n, "truncated": cut} for n, cut in lengths.items()]
    row = evaluation.numbers(records, 1)
    assert (row["total_length"], row["finished_length"]) == (10, 5)
    assert "finished_length" not in evaluation.numbers(records[2:], 1)


def test_flags_that_do_not_fit_are_refused(run, capsys):
    for line, words in {
            "--nonsense 1": "--nonsense: is no flag of eval.py, nor of", "--top_k many": "--top_k",
            "--temperature 0": "--temperature", "--mode plain": "--mode", "--plain": "--plain",
            "--train gsm8k": "use --data", "--eval_limit 3": "use --limit", "--limit -1": "--limit",
            "--model x": "--model", "--preset paper": "own settings", "--top_p 1 x": ": x",
            "--mode soft_thinking --no-until_marker": "mode soft_thinking"}.items():
        assert words in refused(capsys, run[1], *line.split())


def test_what_a_mode_decides_is_no_flag_and_models_come_first(run, capsys):
    method, folder, model = run
    name, off = next(iter(import_module(method).PLAIN_GRPO.items()))
    flag = [f"--{name}"] if off is False else [f"--{name}", "4"]
    assert "mode explicit" in refused(capsys, folder, "--mode", "explicit", *flag)
    assert "hybrid" in refused(capsys, model, "--hybrid")
    assert "before the flags" in refused(capsys, "--top_k", "5", folder)


def test_ranks_and_presets_of_training_do_not_bind_an_evaluation(run, tmp_path, monkeypatch):
    _, folder, model = run
    hf = shutil.copytree(common.latest_checkpoint(folder) / "hf", tmp_path / "hf")
    settings = hf / "latent" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "preset": "mine"}))
    monkeypatch.setenv("WORLD_SIZE", "7")
    saved = configure(hf, "--mode", "soft_thinking")[1]
    assert saved.max_completion_length == 12 and configure(model)[1].answer_marker == "####"


def test_a_checkpoint_of_the_paper_preset_of_latent_grpo_evaluates(model, tmp_path):
    argv = flags(model, tmp_path / "run", "--preset paper --eval_limit 4 --answer_marker </think>")
    assert isinstance(train("latent_grpo", [*argv, "--max_extra_rollouts", "0"]), dict)
    row, = evaluation.main([str(tmp_path / "run"), "--data", "arithmetic:2", "--limit", "4"])
    assert row["n"] == 4  # its preset has 4 minibatches, which divide no number of prompts here


def test_a_checkpoint_evaluates_as_its_last_row_in_metrics(run):
    method, folder, model = run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    limit = rows[-1]["n"]
    row, = evaluation.main([str(folder), "--data", "arithmetic:2", "--limit", str(limit)])
    for name in ("accuracy", "latent_steps", "total_length", "truncated_frac", "format_ok"):
        assert row[name] == rows[-1][name]


def test_completions_are_written_so_that_anyone_can_grade_them_again(run, tmp_path, capsys):
    _, folder, _ = run
    argv = (folder, "--num_samples", 4, "--temperature", 1, "--out", tmp_path / "out")
    row, = evaluate(*argv)
    jsonl, = (tmp_path / "out").glob("*.jsonl")
    records = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert len(records) == 48 and row["n"] == 12
    again = [common.is_correct(r["completion"], r["gold"], r["marker"]) for r in records]
    assert again == [r["correct"] for r in records]
    assert row["accuracy"] == pytest.approx(sum(again) / 48)
    before = jsonl.read_bytes()
    assert evaluate(*argv) == [row]
    assert "not decoded again" in capsys.readouterr().out and jsonl.read_bytes() == before
    evaluate(folder, "--num_samples", 4, "--temperature", 2, "--out", tmp_path / "out")  # a sweep
    assert len(list((tmp_path / "out").glob("*.jsonl"))) == 2


def test_a_fork_of_a_script_is_evaluated_by_the_fork(run, tmp_path, monkeypatch):
    method, folder, _ = run
    name = f"my_{method}"
    (tmp_path / f"{name}.py").write_bytes((ROOT / f"{method}.py").read_bytes())
    (tmp_path / "eval.py").touch()
    monkeypatch.setattr(evaluation, "__file__", str(tmp_path / "eval.py"))
    monkeypatch.syspath_prepend(tmp_path)
    fork = shutil.copytree(common.latest_checkpoint(folder) / "hf", tmp_path / "hf")
    settings = fork / "latent" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "method": name}))
    assert evaluate(fork)[0]["script"] == name
    if method == "lepo":  # a fork of the mode's script decodes in that mode too
        assert configure(fork, "--mode", "soft_thinking")[0].METHOD == name


def test_a_checkpoint_as_model_brings_its_method_and_preset(run, tmp_path):
    method, folder, _ = run
    script = import_module(method)
    cfg = script.parse_config(["--model", str(folder)])
    assert cfg.preset == "tiny"
    policy = script.Policy(*common.load_model(str(folder)), cfg)
    own = {k: v.clone() for k, v in policy.state_dict().items() if not k.startswith(("lm", "tab"))}
    common.load_method(policy, str(folder), method)
    changed = [k for k, v in own.items() if not v.equal(policy.state_dict()[k])]
    assert changed or (not own and method != "hrpo")  # the others add no parameter


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


def test_every_problem_is_drawn_once_in_each_pass_over_the_data():
    problems = list(range(10))
    drawn = sum((common.next_problems(problems, 4, 7, step) for step in range(5)), [])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == problems
    assert drawn[:10] != drawn[10:]
    other = sum((common.next_problems(problems, 4, 8, step) for step in range(5)), [])
    assert other[:10] != drawn[10:] and other[:10] != drawn[:10]


def test_ranks_share_out_the_problems_of_a_step(monkeypatch):
    whole = common.next_problems(list(range(10)), 7, 0, 2)
    monkeypatch.setattr(common.dist, "get_world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(common.dist, "get_rank", lambda: rank)  # noqa: B023
        parts.append(common.next_problems(list(range(10)), 7, 0, 2))
    assert sum(parts, []) == whole and [len(part) for part in parts] == [2, 2, 3]
