"""Damaged checkpoints, full disks, used folders, changed settings: what a run does then."""

import json
import pkgutil
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT, make_lm, save_folder
from runs import METHODS, differences, flags, launch, rows, train, tree, wait_until
from safetensors import SafetensorError

import common


@pytest.fixture
def run(method, model, tmp_path):
    """A finished run with checkpoints at steps 2 and 4."""
    assert isinstance(train(method, flags(model, tmp_path / "run")), dict)
    return tmp_path / "run"


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def fill_with_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = [(cut, "trainer.pt"), (cut, "hf/model.safetensors"), (flip_a_bit, "hf/model.safetensors"),
           (flip_a_bit, "trainer.pt"), (Path.unlink, "manifest.json"), (cut, "manifest.json"),
           (fill_with_zeros, "manifest.json"), (Path.unlink, "hf/latent/method.safetensors")]


@pytest.mark.parametrize("damage, name", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_by_name_and_set_aside(run, capsys, damage, name):
    damage(run / "step_000004" / name)
    before = tree(run)
    assert common.find_resume(run, "auto", {}, ())[0] == run / "step_000002"
    warning, = capsys.readouterr().err.splitlines()
    assert "step_000004" in warning and warning.startswith("warning: ") and tree(run) == before
    common.open_run(run, {}, __file__, 2)
    invalid, = run.glob("*.invalid")
    assert invalid.name.startswith("step_000004.")
    assert common.latest_checkpoint(run) == run / "step_000002"


def test_a_run_goes_on_from_the_older_checkpoint_to_the_same_end(method, model, run, tmp_path):
    shutil.copytree(run, tmp_path / "whole")
    flip_a_bit(run / "step_000004" / "trainer.pt")
    assert isinstance(train(method, flags(model, run, "--resume auto")), dict)
    assert differences(run / "step_000004", tmp_path / "whole" / "step_000004") == []
    assert rows(run) == rows(tmp_path / "whole")
    assert len([*run.glob("*.invalid")]) == 1


def test_without_any_valid_checkpoint_a_run_says_so_and_starts_again(
        method, model, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "whole")
    for folder in run.glob("step_*"):
        cut(folder / "trainer.pt")
    assert isinstance(train(method, flags(model, run, "--resume auto")), dict)
    assert "starting at the beginning" in capsys.readouterr().err
    assert len([*run.glob("*.invalid")]) == 2
    assert differences(run / "step_000004", tmp_path / "whole" / "step_000004") == []
    assert rows(run) == rows(tmp_path / "whole")


FULL = [("torch", "save", RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64")),
        ("torch", "save", OSError(28, "No space left on device")),
        ("common", "save_file", SafetensorError("I/O error: No space left on device")),
        ("transformers.PreTrainedTokenizerBase", "save_pretrained", Exception(
            "No space left on device"))]


@pytest.mark.parametrize("module, function, error", FULL)
def test_a_full_disk_keeps_the_old_checkpoint_and_training_goes_on_until_the_last_save(
        method, model, tmp_path, monkeypatch, capsys, module, function, error):
    out, saves = tmp_path / "run", []
    owner = pkgutil.resolve_name(module)
    write = getattr(owner, function)

    def fills_up(data, path, *args, **more):
        saves.append(path)
        if len(saves) > 1:
            path.with_suffix(".part").write_bytes(b"a part")
            raise type(error)(*error.args)  # a traceback kept alive would keep the lock
        return write(data, path, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, fills_up)
        code = train(method, flags(model, out, "--steps 6"))
    assert code not in (0, None, 2) and "could not be written" in str(code)
    assert len(saves) == 4 and len(rows(out, "train")) == 6  # the last one is tried twice
    assert [p.name for p in out.glob("step_*")] == ["step_000002"]
    assert not common.checkpoint_defect(out / "step_000002")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "NOT saved" in line]
    assert len(warnings) == 3 and "step_000004" in warnings[0] and "MiB free" in warnings[0]
    assert isinstance(train(method, flags(model, out, "--steps 6 --resume auto")), dict)


def test_a_used_folder_is_refused_and_left_as_it_was(method, model, run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    for folder in (run, tmp_path / "mine"):
        before = tree(folder)
        assert train(method, flags(model, folder)) == 2
        message, = capsys.readouterr().err.splitlines()
        assert "not empty" in message and "--resume auto" in message and "another" in message
        assert tree(folder) == before


def test_resume_refuses_changed_settings_by_name(method, model, run, tmp_path, monkeypatch, capsys):
    script, before = import_module(method), tree(run)
    other = save_folder(tmp_path / "other", make_lm(seed=1))

    def refused(*names, model=model, more=""):
        assert train(method, flags(model, run, f"--resume auto {more}")) == 2
        message, = capsys.readouterr().err.splitlines()
        assert all(f"{name}: saved" in message for name in names) and tree(run) == before

    refused("seed", "lr", more="--seed 1 --lr 0.02")
    refused("steps", "group_size", "train", more="--steps 5 --group_size 2 --train arithmetic:3")
    refused("model", model=other)
    with monkeypatch.context() as patch:  # the same path, other weights
        patch.setattr(script, "load_model", lambda name, *args: common.load_model(other, *args))
        refused("model_sha")
    with monkeypatch.context() as patch:  # the same name, other problems
        patch.setattr(script, "load_problems", lambda *args: common.load_problems(*args[:2], 63))
        refused("data_sha")
    with monkeypatch.context() as patch:
        patch.setattr(script, "METHOD", "another")
        refused("method")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("world_size")


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_there(
        method, model, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # the other process has all problems
    out, endless = tmp_path / "run", "--steps 100000 --save_every 100000 --eval_every 100000"
    train(method, flags(model, out, f"{endless} --stop_after 2"))
    argv = flags(model, out, f"{endless} --resume auto")
    first = launch(ROOT / f"{method}.py", argv, tmp_path / "log")
    try:
        wait_until(lambda: len(rows(out, "train")) > 4)
        capsys.readouterr()
        assert train(method, [*argv, "--stop_after", "6"]) == 2
        message, = capsys.readouterr().err.splitlines()
        assert "in use by another process" in message and first.poll() is None
    finally:
        first.kill()
        first.wait()
    lock = common.lock_run(out)  # the lock dies with its process
    lock.close()


def test_checkpoints_that_a_kill_left_after_the_rename_count_and_go_later(
        method, model, run, tmp_path):
    """As a kill between the rename and the deletion of older ones leaves them."""
    for step in (1, 3):
        shutil.copytree(run / "step_000002", run / f"step_00000{step}")
    (run / "step_000005.partial" / "hf").mkdir(parents=True)  # and one before its rename
    assert common.find_resume(run, "auto", {}, ())[0] == run / "step_000004"
    shutil.rmtree(run / "step_000004")
    shutil.rmtree(run / "step_000003")
    assert isinstance(train(method, flags(model, run, "--resume auto")), dict)
    assert sorted(p.name for p in run.glob("step_*")) == ["step_000002", "step_000004"]


def reseal(folder):
    """Write the manifest anew, as the script that saved a checkpoint would have."""
    path = folder / "manifest.json"
    names = json.loads(path.read_text())
    path.write_text(json.dumps({name: common.sha256(folder / name) for name in names}))


def test_a_checkpoint_of_an_older_script_is_refused_by_the_setting_it_lacks(
        method, model, run, capsys):
    config = run / "step_000004" / "hf" / "latent" / "config.json"
    settings = json.loads(config.read_text())
    del settings["top_p"]
    config.write_text(json.dumps(settings))
    reseal(run / "step_000004")
    assert train(method, flags(model, run, "--resume auto")) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "top_p: saved None, now 1.0" in line


def test_the_checkpoint_of_another_method_is_a_plain_language_model(method, run, tmp_path, capsys):
    other = next(name for name in METHODS if name != method)
    more = "--max_replaced_steps 0" if other == "hyrea" else ""
    assert isinstance(train(other, flags(run, tmp_path / "next", more)), dict)
    assert f"was trained by {method}: only its language model is used" in capsys.readouterr().err


def test_a_renamed_checkpoint_is_refused_in_one_line(method, model, run, capsys):
    (run / "step_000004").rename(run / "best")
    shutil.rmtree(run / "step_000002")
    assert train(method, flags(model, run, f"--resume {run / 'best'}")) == 2


def test_a_checkpoint_under_the_name_of_a_later_step_counts_as_what_it_holds(method, model, run):
    """Else the run would stop at the false name, believing that it has this step already."""
    whole = rows(run, "train")
    shutil.rmtree(run / "step_000004")
    (run / "step_000002").rename(run / "step_000004")
    assert isinstance(train(method, flags(model, run, "--resume auto")), dict)
    assert rows(run, "train") == whole
    assert common.checkpoint_step(run / "step_000004") == 4
    assert len([*run.glob("step_000004.*.invalid")]) == 1


def test_a_metrics_file_with_lines_that_are_no_rows_is_cleaned(method, model, run):
    whole = rows(run, "train")
    with open(run / "metrics.jsonl", "a") as f:
        f.write('[1, 2]\n7\nnull\n{"step": "x", "kind": "train"}\n{"kind": "train"}\n')
    assert isinstance(train(method, flags(model, run, "--resume auto")), dict)
    assert rows(run, "train") == whole


def test_a_disk_that_is_full_at_the_start_ends_in_one_line(
        method, model, tmp_path, monkeypatch, capsys):
    def full(*args, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy", full)
    assert train(method, flags(model, tmp_path / "run")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: --out_dir") and "No space left" in line
