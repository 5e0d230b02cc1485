"""eval.py --out: stopped and started again; and --table: what it averages and what it refuses."""

import gc
import json
import os
import shutil
import signal
import statistics
import sys
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from conftest import save_folder
from runs import flags, launch, train

import common
import eval as evaluation

LINE = "--data arithmetic:2-4 --limit 13 --eval_batch 3 --seed 3"  # 5 chunks of one rank
SAMPLED = "--num_samples 4 --temperature 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained run of a random model, with latent steps."""
    path = tmp_path_factory.mktemp("files")
    assert isinstance(train("lepo", flags(save_folder(path / "model"), path / "run")), dict)
    return str(path / "run")


def evaluate(folder, out, *more):
    words = " ".join([LINE, *map(str, more)]).split()
    return evaluation.main([folder, *words, *(["--out", str(out)] if out else [])])


def stop_in(method, number):
    """Let the rollout with this number be interrupted by SIGTERM -> list with an item per call."""
    script, calls = import_module(method), []
    work = script.rollout

    def interrupted(*args):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(*args)

    script.rollout = interrupted
    return calls


@pytest.fixture
def interrupt(monkeypatch):
    """stop_in, undone after the test, as are the handlers of the signals."""
    monkeypatch.setattr(import_module("lepo"), "rollout", import_module("lepo").rollout)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield lambda number: stop_in("lepo", number)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def contents(out):
    """{ending: text} of the files in a folder that holds those of one data set."""
    return {path.suffix: path.read_text() for path in out.iterdir()}


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*map(str, argv)])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def half(folder, out, interrupt, *more, chunks=2):
    """Evaluate until SIGTERM in the chunk after `chunks` -> the part file."""
    interrupt(chunks + 1)
    with pytest.raises(SystemExit) as stop:
        evaluate(folder, out, *more)
    assert "stopped" in stop.value.code and "goes on from there" in stop.value.code
    part, = out.iterdir()
    assert part.name.endswith(".part.jsonl")
    return part


@pytest.mark.parametrize("more", [SAMPLED, "--greedy"])
def test_a_stopped_evaluation_goes_on_and_ends_as_if_never_stopped(
        folder, tmp_path, more, interrupt, capsys):
    part = half(folder, tmp_path / "out", interrupt, more)
    samples = 4 if more == SAMPLED else 1
    assert len(part.read_text().splitlines()) == 1 + 2 * 3 * samples
    common.SIGNALS.clear()
    calls = interrupt(0)
    row, = evaluate(folder, tmp_path / "out", more)
    assert len(calls) == 3 and f"after {6 * samples} of {13 * samples}" in capsys.readouterr().out
    assert evaluate(folder, tmp_path / "whole", more) == [row] == evaluate(folder, "", more)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert contents(tmp_path / "out").keys() == {".json", ".jsonl"}
    assert json.loads(contents(tmp_path / "out")[".json"]) == row
    records = map(json.loads, contents(tmp_path / "out")[".jsonl"].splitlines())
    places = [(r["index"], r["sample"]) for r in records]
    assert places == [(i, k) for i in range(13) for k in range(samples)]
    assert evaluate(folder, tmp_path / "out", more) == [row] and len(calls) == 13  # not again


def test_chunks_have_their_own_noise_and_greedy_decoding_does_not_see_them(folder, monkeypatch):
    monkeypatch.setattr(common, "is_correct", lambda text, gold, marker: len(text) % 2 > 0)
    asked = evaluation.parse_args([folder, *LINE.split()[4:]])
    script, cfg, *_ = evaluation.configure(folder, asked)
    policy, tokenizer = evaluation.load_policy(script, cfg)
    problems = common.encode_prompts(
        tokenizer, common.load_problems("arithmetic:2-4", "test", 13), cfg)
    once = script.evaluate(policy, tokenizer, problems, cfg, common.make_rng("cpu", 0))
    records = once.pop("records")
    assert [r["index"] for r in records] == list(range(13))
    row, = evaluate(folder, "")
    assert {key: row[key] for key in once} == once  # every number, to the last bit
    assert 0 < row["accuracy"] < 1
    records = [{**r, "marker": cfg.answer_marker} for r in records]
    assert evaluation.numbers(records, 1).items() <= row.items()
    seen, draw = [], evaluation.make_rng
    monkeypatch.setattr(evaluation, "make_rng", lambda *key: seen.append(key[1:]) or draw(*key))
    evaluate(folder, "", SAMPLED)
    assert seen == [(3, "eval", "arithmetic:2-4", start, 0) for start in (0, 3, 6, 9, 12)]


def test_a_torn_line_or_chunk_is_dropped(folder, tmp_path, interrupt):
    whole = evaluate(folder, tmp_path / "whole", SAMPLED)
    part = half(folder, tmp_path / "out", interrupt, SAMPLED, chunks=3)
    text = part.read_bytes()
    ends = [i + 1 for i, byte in enumerate(text) if byte == 10]  # 37 lines
    for size, kept in ((len(text) - 1, 24), (len(text), 36), (ends[30] + 7, 24), (ends[24], 24),
                       (ends[0], 0), (ends[0] - 1, 0), (0, 0)):
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        part.write_bytes(text[:size])
        calls = interrupt(2)
        common.SIGNALS.clear()
        with pytest.raises(SystemExit):  # stopped a second time, after one more chunk
            evaluate(folder, tmp_path / "out", SAMPLED)
        common.SIGNALS.clear()
        assert evaluate(folder, tmp_path / "out", SAMPLED) == whole
        assert len(calls) == 1 + 5 - kept // 12
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_lines_that_stand_twice_are_dropped(folder, tmp_path, interrupt):
    part = half(folder, tmp_path / "out", interrupt)
    header, *lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join([header, *lines, *lines]))
    common.SIGNALS.clear()
    assert evaluate(folder, tmp_path / "out")[0] == evaluate(folder, "")[0]


def test_a_part_or_result_of_another_evaluation_is_refused(folder, tmp_path, interrupt, capsys):
    part = half(folder, tmp_path / "out", interrupt, SAMPLED)
    before = part.read_bytes()
    argv = [folder, *LINE.split(), *SAMPLED.split(), "--out", tmp_path / "out"]
    common.SIGNALS.clear()
    assert "n 13 there and 12 here" in refused(capsys, *argv, "--limit", 12)
    assert part.read_bytes() == before
    header, rest = before.split(b"\n", 1)
    for name, value in {"model_sha": "0", "data_sha": "0", "ranks_with_noise": 2, "torch": "1",
                        "--latent_tau": 9.0, "--eval_batch": 2}.items():
        now = json.loads(header)
        part.write_bytes(json.dumps({**now, name: value}).encode() + b"\n" + rest)
        line = refused(capsys, *argv)
        assert f"{name} {value!r} there and {now[name]!r} here" in line and str(part) in line
    hf = shutil.copytree(common.latest_checkpoint(folder) / "hf", tmp_path / "hf")
    evaluate(str(hf), tmp_path / "out")
    tensors = common.load_file(hf / "model.safetensors")
    tensors = {name: tensor + torch.rand_like(tensor) for name, tensor in tensors.items()}
    common.save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    line = refused(capsys, hf, *LINE.split(), "--out", tmp_path / "out")
    assert "model_sha" in line and ".json: is another evaluation" in line


def test_two_ranks_go_on_where_they_were_stopped(folder, tmp_path):
    runs = {"out": (10, SAMPLED), "again": (0, SAMPLED), "whole": (0, SAMPLED), "greedy": (0, "")}
    for name, (number, more) in runs.items():
        out = tmp_path / name.replace("again", "out")
        argv = f"{number} {folder} {LINE} --limit 40 --eval_batch 1 {more} --out {out}".split()
        job = launch(__file__, argv, tmp_path / "log", ranks=2)
        assert (job.wait(120) == 0) == (name != "out"), (tmp_path / "log").read_text()
        text = (tmp_path / "log").read_text()
        assert ("stopped at" in text) == (name == "out")
        assert ("goes on after 64 of 160" in text) == (name == "again")
        if name == "out":  # 8 batches of 2 ranks are a chunk; the second was interrupted
            part, = out.iterdir()
            assert len(part.read_text().splitlines()) == 1 + 16 * 4
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    row, = evaluate(folder, tmp_path / "alone", "--limit 40 --eval_batch 1")
    assert contents(tmp_path / "greedy") == contents(tmp_path / "alone")


def result(path, model, accuracy, **more):
    row = {"model": model, "data": "arithmetic", "mode": "trained", "script": "lepo", "given": {},
           "seed": 0, "n": 100, "accuracy": accuracy, "stderr": 0.04, "flexible": accuracy,
           "latent_steps": 8 * accuracy, "visible_tokens": 3.0, "total_length": 13.0,
           "finished_length": 11.0, "switches": 1.0, "truncated_frac": 0.25,
           "unanswered_frac": 0.5, **more}
    path.write_text(json.dumps(row))
    return str(path)


def test_a_table_averages_what_differs_only_in_its_seed(tmp_path, capsys):
    scores = (0.5, 0.6, 0.8)
    files = [result(tmp_path / f"{i}.json", f"runs/lepo-{'s' * (i > 1)}{i}", score, train_seed=i,
                    given={"eval_batch": i}) for i, score in enumerate(scores)]
    files += [result(tmp_path / f"tau{tau}.json", f"grpo-tau-{tau}", 0.25, train_seed=0,
                     **{"pass@2": 0.375, "pass@16": 0.75}) for tau in (16, 32)]
    files += [result(tmp_path / f"step{i}.json", f"a-{i}/step_000100/hf", 0.25) for i in (0, 1)]
    files += [result(tmp_path / "data.json", "runs/lepo-0", 0.5, data="gsm8k", mode="explicit",
                     given={"top_k": 5})]
    evaluation.main(["--table", *files])
    head, rule, *lines, blank, caption = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    assert len({len(line) for line in (head, rule, *lines)}) == 1 and set(rule) == {*"|- "}
    assert rows[0] == ["model", "data", "n", "seeds", "accuracy", "pass@2", "pass@16", "flexible",
                       "latent steps", "visible tokens", "total length", "finished length",
                       "switches", "truncated frac", "unanswered frac"]
    average, std = statistics.mean(scores), statistics.stdev(scores)
    assert rows[1] == ["runs/lepo", "arithmetic", "100", "3", f"{average:.3f} ± {std:.3f}", "", "",
                       "0.633", f"{8 * average:.3f}", "3.000", "13.000", "11.000", "1.000", "0.250",
                       "0.500"]
    assert [row[0] for row in rows[2:]] == ["grpo-tau-16", "grpo-tau-32", "a/step_000100/hf",
                                            "runs/lepo explicit top_k=5"]
    assert rows[2][3:7] == ["1", "0.250 ± 0.040", "0.375", "0.750"] and rows[4][3] == "2"
    assert not blank and "sample std over seeds" in caption and "standard error" in caption
    (tmp_path / "rows.jsonl").write_text("\n".join(open(file).read() for file in files))
    evaluation.main(["--table", str(tmp_path / "rows.jsonl")])
    assert capsys.readouterr().out.splitlines() == [head, rule, *lines, blank, caption]


def test_what_is_no_result_or_does_not_belong_to_its_group_is_refused(tmp_path, capsys):
    file = result(tmp_path / "a.json", "runs/lepo-0", 0.5)
    assert "there with seed 0" in refused(capsys, "--table", file, file)
    other = result(tmp_path / "b.json", "runs/lepo-1", 0.5, n=5)
    assert "b.json" in (line := refused(capsys, "--table", file, other)) and "another n" in line
    for text in ('{"y": "accuracy", "runs": []}', "[]", "3"):
        (tmp_path / "c.json").write_text(text)
        assert "c.json: is no .json that --out wrote" in refused(
            capsys, "--table", file, tmp_path / "c.json")
    (tmp_path / "c.json").write_text("{")
    assert "c.json: " in refused(capsys, "--table", tmp_path / "c.json")
    assert "No such file" in refused(capsys, "--table", tmp_path / "d.json")
    assert "name .json files" in refused(capsys, "--table")


if __name__ == "__main__":  # one of two ranks: the number of the rollout to interrupt, then argv
    if os.environ["RANK"] == "1":
        stop_in("lepo", int(sys.argv[1]))
    evaluation.main(sys.argv[2:])
    dist.destroy_process_group()
    gc.collect()
