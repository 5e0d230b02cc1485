"""tests/gpu_run.py: parts that crash or hang end alone, facts stay, the report shows them."""

import json
import sys
import time

import gpu_pack
import gpu_real
import gpu_run
import pytest
import torch
from conftest import ROOT, make_lm, save_folder

from common import load_model


def facts_of(folder, table=""):
    lines = (folder / "gpu.jsonl").read_text(encoding="utf-8").splitlines()
    return [fact for fact in map(json.loads, lines) if table in ("", fact["table"])]


def python(code):
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("argv, message", [
    ([], "--out FOLDER"), (["--out", "x", "--only", "speed"], "invalid choice: 'speed'"),
    (["--out", "x", "--minutes", "soon"], "--minutes")])
def test_wrong_arguments_are_named(argv, message, capsys):
    with pytest.raises(SystemExit):
        gpu_run.main(argv)
    assert message in capsys.readouterr().err


def test_a_part_that_crashes_or_hangs_is_a_line_and_the_next_one_starts(tmp_path, monkeypatch):
    hang = "import subprocess, sys; subprocess.run(['sleep', '600'])"
    codes = {"right": "print(1)\nraise ValueError('broken')", "decode": hang,
             "update": "import os; os.kill(os.getpid(), 9)", "real": "print('fine')"}
    monkeypatch.setattr(gpu_run, "command", lambda part, limit, args: python(codes[part]))
    monkeypatch.setattr(gpu_run, "LIMITS", dict.fromkeys(codes, 8))
    start = time.time()
    gpu_run.main(["--out", str(tmp_path), "--minutes", "1"])
    assert time.time() - start < 30
    found = {fact["part"]: fact["error"] for fact in facts_of(tmp_path, "failures")}
    assert found == {"right": "ended with code 1 ValueError: broken",
                     "decode": "stopped at its limit of 1 s", "update": "ended with code -9"}
    assert [fact["code"] for fact in facts_of(tmp_path, "end")] == [1, None, -9, 0]
    assert (tmp_path / "real.log").read_text() == "fine\n"


def test_what_a_part_started_ends_with_it(tmp_path):
    sign = tmp_path / "sign"
    child = f"import time\nwhile True: open({str(sign)!r}, 'a').write('.'); time.sleep(0.02)"
    parent = (f"import os, subprocess, sys, time\n"
              f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
              f"while not os.path.exists({str(sign)!r}): time.sleep(0.01)")
    gpu_run.run_part("real", python(parent), 60, tmp_path)
    size = sign.stat().st_size
    time.sleep(0.3)
    assert sign.stat().st_size == size > 0


def test_the_last_part_has_the_time_that_is_left(tmp_path, monkeypatch):
    limits = {}
    monkeypatch.setattr(gpu_run, "run_part", lambda part, command, limit, out: limits.update(
        {part: limit}))
    gpu_run.main(["--out", str(tmp_path), "--minutes", "16", "--only", "right", "real"])
    assert limits["right"] == 180 and 959 < limits["real"] <= 960


def test_a_fact_is_on_the_disk_at_once_and_an_error_is_a_fact(tmp_path):
    facts = gpu_run.Facts(tmp_path / "gpu.jsonl", "update")

    def too_large():
        facts.tell("update", seconds=1.5)
        assert facts_of(tmp_path) == [{"part": "update", "table": "update", "seconds": 1.5}]
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    assert facts.attempt("1.5B", too_large) is None
    assert facts_of(tmp_path)[1] == {"part": "update", "table": "failures", "where": "1.5B",
                                     "error": "CUDA out of memory."}


def test_the_report_shows_each_table_and_leaves_out_a_torn_line(tmp_path):
    for part, values in (("machine", {"device": "X"}), ("machine", {"device": "X"}),
                         ("update", {"a_b": 0.12345, "ok": False}), ("update", {"c": 2})):
        gpu_run.Facts(tmp_path / "gpu.jsonl", part).tell("t", **values)
    with open(tmp_path / "gpu.jsonl", "a", encoding="utf-8") as f:
        f.write('{"part": "update", "tab')
    text = gpu_run.report(tmp_path)
    assert text.startswith("# Run on a CPU") and "\n0 of 1 checks hold." in text
    assert text.count("| X |") == 1
    assert "| a b | ok | c |" in text and "commands" not in text
    assert "| 0.123 | **no** |  |" in text and "|  |  | 2 |" in text


def test_docs_are_the_report_of_what_was_measured():
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert text == gpu_run.report(ROOT / "docs")
    assert (ROOT / "docs" / "gpu.jsonl").exists() or "tests/gpu_run.py --out" in text


class Job:
    """A run that logs a step whenever it is looked at, until it is told to stop."""

    def __init__(self, out, seconds):
        self.out, self.seconds, self.code = out, seconds, None
        out.mkdir()

    def poll(self):
        row = {"kind": "train", "seconds": self.seconds}
        with open(self.out / "metrics.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n" if self.code is None else "")
        return self.code

    def terminate(self):
        self.code = 143


def test_all_methods_make_as_many_updates_as_the_slowest_can(tmp_path):
    outs = {name: tmp_path / name for name in ("fast", "slow")}
    jobs = {name: (Job(outs[name], 0.1 if name == "fast" else 2.0), None) for name in outs}
    gpu_real.train_equally(jobs, outs, time.time() + 20)
    steps = [len(gpu_real.train_rows(out)) for out in outs.values()]
    assert max(steps) - min(steps) <= 2 and 8 < min(steps) < 24


# === packs ========================================================================================


def test_a_pack_gives_back_a_model_close_to_the_packed_one(tmp_path, capsys):
    source = save_folder(tmp_path / "model", make_lm(tie_word_embeddings=True))
    rows = [{"question": f"{a}+{a}=", "answer": str(2 * a), "steps": [f"={2 * a}"],
             "solution": f"+{a}={2 * a}"}
            for a in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gpu_pack.main([str(tmp_path / "pack"), "--model", source, "--train", str(
        tmp_path / "rows.jsonl"), "--test", str(tmp_path / "rows.jsonl")])
    assert gpu_pack.unpack(source, tmp_path / "none") == source
    lm, tokenizer = load_model(source)
    other, other_tokenizer = load_model(gpu_pack.unpack(tmp_path / "pack", tmp_path / "again"))
    assert tokenizer.get_vocab() == other_tokenizer.get_vocab()
    for (name, one), two in zip(lm.named_parameters(), other.parameters()):
        size = one.square().mean().sqrt()
        assert one.shape == two.shape and (one - two).square().mean().sqrt() < 0.4 * size, name
    gpu_pack.main([str(tmp_path / "pack"), "--model", source, "--compare", "8"])
    whole, rounded = capsys.readouterr().out.splitlines()[-2:]
    assert whole.startswith(f"{source}: ") and whole.endswith("of 8 solutions")
    losses = [float(line.split(": ")[1].split()[0]) for line in (whole, rounded)]
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.5
    assert (tmp_path / "pack" / "train" / "rows.jsonl").read_text() == (
        tmp_path / "pack" / "test" / "rows.jsonl").read_text() != ""


def test_rounding_makes_up_for_errors_where_inputs_are_correlated():
    torch.manual_seed(0)
    inputs = torch.randn(500, 8) @ torch.randn(8, 96) + 0.1 * torch.randn(500, 96)
    weight = torch.randn(16, 96)

    def error(product):
        levels, scale = gpu_pack.quantise(weight, 0.5, product)
        return (inputs @ (levels * scale.float()[:, None] - weight).T).square().mean().item()

    assert error(inputs.T @ inputs) < 0.3 * error(None)


@pytest.mark.slow
def test_all_parts_run_small_and_find_nothing_wrong(tmp_path):
    gpu_run.main(["--out", str(tmp_path), "--small", "--minutes", "40"])
    found = facts_of(tmp_path)
    assert [fact["code"] for fact in facts_of(tmp_path, "end")] == [0] * 4
    assert not facts_of(tmp_path, "failures")
    assert len([fact for fact in found if "ok" in fact]) > 20
    assert all(fact["ok"] for fact in found if "ok" in fact)
    assert len(facts_of(tmp_path, "greedy accuracy")) == 2 * (
        len(gpu_real.STARTS) + len(gpu_real.METHODS))
    assert "greedy accuracy" in gpu_run.report(tmp_path)
