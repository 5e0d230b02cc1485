"""eval.py plot: which rows become which curve, the figure, and the numbers beside it."""

import json
import sys

import pytest

import eval as evaluation


def make_run(folder, name, seed, values, broken=False):
    """A run folder: accuracy at steps 0, 20, ... is `values`, reward at steps 1, 2 half of it."""
    path = folder / name
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"method": "lepo", "seed": seed}))
    rows = [{"kind": "eval", "step": 20 * i, "accuracy": v, "length": None}
            for i, v in enumerate(values)]
    rows += [{"kind": "train", "step": i + 1, "reward": v / 2, "length": 3.0}
             for i, v in enumerate(values[:2])]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "metrics.jsonl").write_text(text + '{"kind": "eval", "st' * broken)
    return str(path)


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path, "lepo-0", 0, [0.5, 0.7, 0.9]),
            make_run(tmp_path, "lepo-s1", 1, [0.3, 0.5, 0.6], broken=True),
            make_run(tmp_path, "grpo-tau-32", 0, [0.1, 0.2])]


def draw(tmp_path, *argv, out="figures/a.png"):
    """-> what the .json beside the figure holds."""
    file = tmp_path / out
    evaluation.main(["plot", *map(str, argv), "--out", str(file)])
    assert file.stat().st_size > 5000
    return json.loads(file.with_suffix(".json").read_text())


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["plot", *map(str, argv)])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_runs_are_grouped_by_their_name_without_the_seed(runs, tmp_path):
    pytest.importorskip("matplotlib")
    figure = draw(tmp_path, *runs)
    assert figure["y"] == "accuracy" and len(figure["runs"]) == 3
    labels = [run["label"] for run in figure["runs"]]
    assert labels == ["lepo", "lepo", "grpo-tau-32"]  # its seed is 0, so 32 is a part of the name
    assert figure["runs"][1] == {"run": "lepo-s1", "label": "lepo", "seed": 1, "method": "lepo",
                                 "steps": [0, 20, 40], "values": [0.3, 0.5, 0.6]}


def test_a_metric_of_the_training_rows_is_drawn_if_evaluations_lack_it(runs, tmp_path):
    pytest.importorskip("matplotlib")
    figure = draw(tmp_path, runs[0], "--y", "reward")
    assert figure["runs"][0]["steps"] == [1, 2] and figure["runs"][0]["values"] == [0.25, 0.35]
    figure = draw(tmp_path, runs[0], "--y", "reward,accuracy", out="figures/b.png")
    assert [run["label"] for run in figure["runs"]] == ["lepo reward", "lepo accuracy"]


def test_the_numbers_beside_a_figure_draw_it_again(runs, tmp_path):
    pytest.importorskip("matplotlib")
    first = draw(tmp_path, *runs)
    again = draw(tmp_path, tmp_path / "figures/a.json", out="b.png")
    assert first == again and draw(tmp_path, tmp_path / "figures/a.json") == first
    assert (tmp_path / "figures/a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    more = draw(tmp_path, make_run(tmp_path, "lepo-2", 2, [0.4]), tmp_path / "b.json", out="c.png")
    assert [run["run"] for run in more["runs"]][-1] == "lepo-2" and len(more["runs"]) == 4


def test_a_curve_is_the_mean_over_seeds_and_the_band_their_range(runs, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    drawn, save = [], figure.Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure.Figure, "savefig", lambda self, file: drawn.append(self))
        runs_read = evaluation.read_curves(runs, "")[1]
        evaluation.draw_curves("accuracy", runs_read, tmp_path / "a.png")
    assert figure.Figure.savefig is save
    axes = drawn[0].axes[0]
    lepo, grpo = axes.lines
    assert lepo.get_xdata().tolist() == [0, 20, 40]
    assert lepo.get_ydata() == pytest.approx([0.4, 0.6, 0.75])
    band, = axes.collections  # none for one seed
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert (low, high) == (0.3, 0.9)
    assert [t.get_text() for t in drawn[0].legends[0].texts] == [
        "lepo (2 seeds)", "grpo-tau-32 (1 seed)"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "accuracy")


def test_what_cannot_be_drawn_is_refused_in_one_line(runs, tmp_path, capsys):
    out = ("--out", tmp_path / "a.png")
    assert "no nonsense; it has accuracy, length, reward" in refusal(
        capsys, runs[0], "--y", "nonsense", *out)
    assert "has no kind" in refusal(capsys, runs[0], "--y", "kind", *out)
    assert "is not a run folder" in refusal(capsys, tmp_path, *out)
    assert "No such file" in refusal(capsys, tmp_path / "x.json", *out)
    assert "does not hold curves" in refusal(capsys, f"{runs[0]}/config.json", *out)
    assert "must end in" in refusal(capsys, runs[0], "--out", "a.json")
    twice = make_run(tmp_path / "other", "lepo-0", 0, [0.5])
    assert "lepo, seed 0: is there twice" in refusal(capsys, runs[0], twice, *out)
    (tmp_path / "a.json").write_text("{}")
    assert "another --out" in refusal(capsys, runs[0], *out)
    assert not (tmp_path / "a.png").exists()


def test_seeds_without_a_common_step_are_refused(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "lepo-s1" / "metrics.jsonl"
    path.write_text(json.dumps({"kind": "eval", "step": 7, "accuracy": 0.5}) + "\n")
    assert "no step in common" in refusal(capsys, *runs, "--out", tmp_path / "a.png")


def test_without_matplotlib_one_line_says_what_to_install(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = refusal(capsys, *runs, "--out", tmp_path / "a.png")
    assert "pip install matplotlib" in message


def test_results_of_out_become_pass_at_k_curves(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"model": "runs/a", "data": "d", "mode": "trained", "script": "lepo", "seed": 0,
           "given": {"num_samples": 4, "noise_scale": 0.5}, "accuracy": 0.25, "pass@2": 0.5,
           "pass@4": 0.75}
    (tmp_path / "a.json").write_text(json.dumps(row))
    evaluation.main(["plot", str(tmp_path / "a.json"), "--out", str(tmp_path / "f.png")])
    figure = json.loads((tmp_path / "f.json").read_text())
    run, = figure["runs"]
    assert figure["y"] == "pass@k" and run["label"] == "a noise_scale=0.5"
    assert run["steps"] == [1, 2, 4] and run["values"] == [0.25, 0.5, 0.75]
    assert (tmp_path / "f.png").stat().st_size > 5000


def test_x_draws_a_point_for_each_group_of_models(tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    files = []
    for model, seed, accuracy, length in (("runs/a-0", 0, 0.5, 10), ("runs/a-1", 1, 0.9, 14.0),
                                          ("tiny", None, 0.25, 13.0)):
        files.append(tmp_path / f"{model[-1]}.json")
        files[-1].write_text(json.dumps({
            "model": model, "data": "d", "mode": "trained", "script": "lepo", "given": {},
            "seed": 0, "train_seed": seed, "accuracy": accuracy, "total_length": length,
            "--lr": 1.0, "pass@2": 0.5}))
    drawn, save = [], figure.Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure.Figure, "savefig", lambda self, file: (
            drawn.append(self), save(self, file)))
        first = draw(tmp_path, *files, "--x", "total_length")
    assert (first["y"], first["x"]) == ("accuracy", "total_length")
    assert first["runs"][1] == {"run": "runs/a-1", "label": "a, d", "seed": "1",
                                "method": "lepo", "steps": [14.0], "values": [0.9]}
    axes = drawn[0].axes[0]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]
    assert points == [pytest.approx((12.0, 0.7)), (13.0, 0.25)]
    bar, = axes.collections  # none for one seed
    assert bar.get_paths()[0].vertices[:, 1].min() == 0.5
    assert bar.get_paths()[0].vertices[:, 1].max() == 0.9
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("total length", "accuracy")
    assert draw(tmp_path, tmp_path / "figures/a.json", out="b.png") == first
    assert (tmp_path / "figures/a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    curves = draw(tmp_path, files[0], out="c.png")  # without --x: pass@k, as ever
    assert curves["y"] == "pass@k" and "x" not in curves
    other = draw(tmp_path, *files, "--x", "accuracy", "--y", "pass@2", out="d.png")
    assert other["runs"][0]["steps"] == [0.5] and other["y"] == "pass@2"


def test_x_that_cannot_be_drawn_is_refused_in_one_line(runs, tmp_path, capsys):
    row = {"model": "m", "data": "d", "mode": "trained", "script": "lepo", "given": {}, "seed": 0,
           "accuracy": 0.5, "greedy": True, "--lr": 1.0}
    (tmp_path / "r.json").write_text(json.dumps(row))
    out = ("--out", tmp_path / "a.png")
    for x in ("nonsense", "greedy", "data"):
        assert refusal(capsys, tmp_path / "r.json", "--x", x, *out).endswith(
            f"r.json: has no {x}; it has accuracy, seed")
    assert "over seed" in refusal(capsys, runs[0], "--x", "seed", *out)
    assert "is there twice" in refusal(
        capsys, tmp_path / "r.json", tmp_path / "r.json", "--x", "seed", *out)
    (tmp_path / "f.json").write_text('{"y": "accuracy", "runs": []}')
    assert "over seed" in refusal(capsys, tmp_path / "f.json", "--x", "seed", *out)
