"""The command line, the presets, what models are accepted, and the files of a run folder."""

import dataclasses
import json
import re
import resource
import subprocess
import sys
from importlib import import_module

import pytest
from conftest import ROOT
from runs import OFF, flags, rows, train, tree

from common import Progress, load_problems

EXTRA = {  # metrics of the method
    "hrpo": {"gate_a", "hidden_ratio"},
    "lepo": {"mixture_size", "survivors", "top_is_shown", "ratio_max"},
    "latent_grpo": {"margin", "crossed_frac", "top_weight", "ratio_max"},
    "hyrea": {"latent_size", "switch_entropy", "latent_reward", "ratio_max"}}


def refusal(method, argv, capsys):
    """main(argv) must exit with code 2 and one line on stderr -> that line."""
    assert train(method, argv) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("more, words", [
    ("--group_size 1", "--group_size 1 2 completions"), ("--temperature 0", "--temperature 0.0"),
    ("--temperature nan", "--temperature nan"), ("--top_p 0", "--top_p 0.0"),
    ("--steps 0", "--steps 0: at least 1"), ("--seed -1", "--seed -1: at least 0"),
    ("--dtype float16", "--dtype float32 bfloat16"), ("--preset big", "--preset big tiny paper"),
    ("--train arithmetic:99", "arithmetic:99 arithmetic:LO-HI"), ("--train no-such-set",
    "no-such-set"),
    ("--train missing.jsonl --eval_data missing.jsonl", "missing.jsonl"),
    ("--model no/such/folder",
    "--model no/such/folder"), ("--lora_rank 2 --train_embeddings", "--train_embeddings LoRA"),
    ("--max_prompt_length 3", "--max_prompt_length 3 all 64"),
    ("--lr -1", "--lr -1"), ("--lr nan", "--lr"),
    ("--kl_coef -1", "--kl_coef"),
    ("--max_grad_norm -1", "--max_grad_norm"),
    ("--device gpu", "--device gpu"), ("--train some.jsonl", "some.jsonl --eval_data"),
    ("--train a.jsonl,gsm8k", "a.jsonl,gsm8k --eval_data"), ("--adam_beta2 1", "--adam_beta2 1.0"),
    ("--lr inf", "--lr inf finite")])
def test_bad_values_end_in_one_line_that_names_them(method, model, tmp_path, capsys, more, words):
    line = refusal(method, flags(model, tmp_path / "run", more), capsys)
    assert all(word in line for word in words.split()) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", ["--update_epochs 2", "--minibatches 2", "--clip_eps 0.1"])
def test_hrpo_has_no_ratio_and_so_no_flag_for_one(model, tmp_path, capsys, more):
    assert train("hrpo", flags(model, tmp_path / "run", more)) == 2
    assert more.split()[0] in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_prompts_must_divide_by_the_ranks(method, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = refusal(method, flags(model, tmp_path / "run"), capsys)
    assert "--num_prompts 4" in line and "3" in line


@pytest.mark.parametrize("more", ["--no_such_flag 1", "--num_prom 4", "--steps many", "--group"])
def test_unknown_and_abbreviated_flags_are_refused(method, model, tmp_path, capsys, more):
    assert train(method, flags(model, tmp_path / "run", more)) == 2
    assert more.split()[0] in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("place, word", [
    ("file", "is a file"), ("file/run", "cannot be written"), ("/proc/none", "cannot be written")])
def test_an_out_dir_that_cannot_be_written_is_refused(
        method, model, tmp_path, capsys, place, word):
    (tmp_path / "file").write_text("mine")
    line = refusal(method, flags(model, tmp_path / place), capsys)
    assert "--out_dir" in line and word in line and tree(tmp_path) == {"file": b"mine"}


def test_overlong_prompts_are_dropped_and_counted(method, model, tmp_path, capsys):
    argv = flags(model, tmp_path / "run", "--train arithmetic:1-3 --max_prompt_length 7")
    assert isinstance(train(method, argv), dict)
    warnings = capsys.readouterr().err.splitlines()  # <bos> a + b = <think>: 6, 8 or 10 tokens
    counts = [int(line.split()[2]) for line in warnings if "dropped" in line]
    assert 0 < counts[0] < 64 and 0 <= 8 - counts[1] == rows(tmp_path / "run", "eval")[0]["n"]


def test_help_is_quick_and_explains_every_field(method):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([sys.executable, ROOT / f"{method}.py", "--help"], capture_output=True,
                           text=True, env={"COLUMNS": "200", "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert shown.returncode == 0 and seconds < 10  # of a processor; about 3
    source = (ROOT / f"{method}.py").read_text()
    for field in dataclasses.fields(import_module(method).Config):
        line = next(x for x in source.splitlines() if x.startswith(f"    {field.name}: "))
        comment = line.partition("  # ")[2]
        assert len(comment) > 3 and comment in shown.stdout
        assert re.search(rf"^  --{field.name}\b", shown.stdout, re.M)


@pytest.mark.parametrize("name, preset, train_set, marker", [
    ("tiny", "tiny", "arithmetic", "</think>"), ("tiny:arithmetic:3", "tiny", "arithmetic",
    "</think>"), ("Qwen/Qwen2.5-1.5B-Instruct", "paper", "gsm8k", "####"),
    ("./tiny-model", "paper", "gsm8k", "####")])
def test_the_model_decides_the_preset(method, name, preset, train_set, marker):
    script = import_module(method)
    cfg = script.parse_config(["--model", name])
    assert cfg.preset == preset
    if method == "hrpo":
        assert (cfg.train, cfg.answer_marker) == (train_set, marker)
    follow = {"sft_rounds"}  # 0 becomes the number that other settings ask for
    for key, value in script.PRESETS[preset].items():
        assert getattr(cfg, key) == value or key in follow, key
    other = {"tiny": "paper", "paper": "tiny"}[preset]
    cfg = script.parse_config(["--model", name, "--preset", other, "--lr", "0.5"])
    for key, value in {**script.PRESETS[other], "lr": 0.5}.items():
        assert getattr(cfg, key) == value or key in follow, key
    assert "auto" not in dataclasses.asdict(cfg).values()


def test_presets_list_only_fields_that_exist_and_differ_from_the_defaults(method):
    script = import_module(method)
    fields = {f.name: f.default for f in dataclasses.fields(script.Config)}
    assert {"tiny", "paper"} <= set(script.PRESETS) and script.PRESETS["tiny"] == {}
    for name, preset in script.PRESETS.items():
        same = [key for key, value in preset.items() if fields[key] == value]
        assert not same, f"--preset {name} repeats the defaults of {same}"


def test_help_shows_the_values_of_the_chosen_preset(method, capsys):
    script = import_module(method)
    for preset in ("tiny", "paper"):
        with pytest.raises(SystemExit):
            script.parse_config(["--preset", preset, "--help"])
        lr = script.PRESETS[preset].get("lr", script.Config.lr)
        line, = re.findall(r"^  --lr float +(.*)$", capsys.readouterr().out, re.M)
        assert line.endswith(f"({lr})")


TRAIN = ("kind step reward correct format_ok zero_std_frac length latent_steps truncated_frac kl "
         "entropy logprob_gap grad_norm lr tokens_per_s_rollout tokens_per_s_update "
         "peak_mem_gib seconds skipped")
EVAL = ("kind step accuracy n stderr latent_steps visible_tokens total_length truncated_frac "
        "format_ok unanswered_frac switches seconds")
SAMPLE = ("kind step question completion extracted gold unanswered correct format_ok truncated "
          "length latent_steps switches latent_spans set reward")


@pytest.mark.parametrize("more", ["", "OFF --kl_coef 0"])
def test_a_run_folder_holds_what_is_promised(method, model, tmp_path, more):
    out, more = tmp_path / "run", more.replace("OFF", OFF[method])
    result = train(method, flags(model, out, more))
    names = {"config.json", "metrics.jsonl", "samples.jsonl", "code", "step_000002", "step_000004"}
    assert {p.name for p in out.iterdir() if p.name != ".lock"} == names
    assert {p.name for p in (out / "code").iterdir()} == {f"{method}.py", "common.py"}
    assert {p.name for p in (out / "step_000004").iterdir()} == {
        "hf", "trainer.pt", "manifest.json"}
    assert {p.name for p in (out / "step_000004" / "hf").glob("*.safetensors")} == {
        "model.safetensors"}
    assert (out / "step_000004" / "hf" / "latent" / "config.json").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["method"] == method and config["world_size"] == 1 and config["lr"] == 0.01

    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(x["kind"], x["step"]) for x in lines] == [
        ("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4),
        ("eval", 4)]
    for line in lines:
        keys = {"train": {*TRAIN.split()} | EXTRA[method], "eval": {*EVAL.split()}}[line["kind"]]
        assert set(line) == keys
        assert all(isinstance(v, (int, float, str, type(None))) for v in line.values())  # flat
    last = {k: v for k, v in lines[-1].items() if k in result}
    assert result == last and result["total_length"] == pytest.approx(
        result["latent_steps"] + result["visible_tokens"])
    if more:
        assert lines[1]["kl"] is None and lines[1]["latent_steps"] == 0
    for line in rows(out, name="samples.jsonl"):
        more = {"reward_parts"} if method == "hyrea" else set()
        assert set(line) - {"index", "sample"} == {*SAMPLE.split()} | more
        spans = line["latent_spans"]
        assert line["latent_steps"] == sum(b - a for a, b in spans) <= line["length"]


@pytest.mark.parametrize("name, key, bad, good", [
    ("reward is 0", "reward", 0.0, 0.5), ("30 % are truncated", "truncated_frac", 0.5, 0.1),
    ("no position is plain", "latent_steps", 4.0, 3.5),
    ("rollout and update disagree", "logprob_gap", 0.011, 0.009)])
def test_ten_hopeless_steps_in_a_row_are_warned_of_once(capsys, name, key, bad, good):
    progress = Progress("test", 0, 30)
    fine = {"kind": "train", "reward": 0.5, "truncated_frac": 0.0, "length": 4.0,
            "latent_steps": 2.0, "zero_std_frac": 0.5, "logprob_gap": None, "seconds": 1.0}
    for step, value in enumerate([bad] * 9 + [good] + [bad] * 9, 2):
        progress.show({**fine, "step": step, key: value}, [])
    assert "warning" not in capsys.readouterr().err
    for step in (21, 22, 23):
        progress.show({**fine, "step": step, key: bad}, [])
    warning, = re.findall("warning: .*", capsys.readouterr().err)
    assert name in warning and "10 steps" in warning


def test_a_gap_that_bfloat16_explains_is_no_reason_to_warn(capsys):
    row = {"kind": "train", "step": 2, "logprob_gap": 0.1}
    for dtype, warned in (("bfloat16", False), ("float32", True)):
        progress = Progress("test", 0, 30, dtype)
        for _ in range(12):
            progress.show(row, [])
        assert ("disagree" in capsys.readouterr().err) == warned


def test_a_reward_of_your_own_sees_every_column_of_the_row(method, model, tmp_path, monkeypatch):
    """Partial credit by a column; samples.jsonl keeps no copy of the row."""
    script = import_module(method)
    rows_file = tmp_path / "mine.jsonl"
    rows_file.write_text("".join(json.dumps(
        {"question": f"{n}+1=", "answer": str(n + 1), "credit": n / 8}) + "\n" for n in range(8)))
    monkeypatch.setattr(script, "load_problems", load_problems)
    monkeypatch.setattr(script, "reward", lambda record: record["row"]["credit"])
    more = f"--train {rows_file} --eval_data {rows_file},{rows_file} --answer_marker 7"
    train(method, flags(model, tmp_path / "run", more))
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {s["reward"] for s in samples} <= {n / 8 for n in range(8)} and len(samples) > 8
    assert all(s["reward"] == int(s["question"][0]) / 8 and "row" not in s for s in samples)


def test_a_flag_that_is_no_text_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        import_module("hrpo").parse_config(["--instruction", "a\udc80"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: 'a\\udc80': is no UTF-8 text\n"
