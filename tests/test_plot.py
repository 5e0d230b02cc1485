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


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    run = make_run(tmp_path / "a", "lepo-0", 0, [0.25, 0.5])
    whole = evaluation.read_curve(run, "accuracy")
    path = tmp_path / "a" / "lepo-0" / "metrics.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        file.write('[1]\n5\n"text"\n{"kind": "eval", "st')  # a live run ends in half a line
    assert evaluation.read_curve(run, "accuracy") == whole


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
    assert figure["y"] == "pass@k" and run["label"] == "a noise_scale=0.5, d"
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


def result(folder, name, data, seed, values):
    """A .json of --out for the model NAME-SEED on a data set."""
    file = folder / f"{name}-{seed}-{data}.json"
    row = {"model": f"runs/{name}-{seed}", "data": data, "mode": "trained", "script": "lepo",
           "given": {"num_samples": 4}, "seed": 0, "train_seed": seed, "total_length": 5 * seed}
    passes = dict(zip(("accuracy", "pass@2", "pass@4"), values))
    file.write_text(json.dumps({**row, **passes}))
    return file


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, which are not saved."""
    module, drawn = pytest.importorskip("matplotlib.figure"), []
    monkeypatch.setattr(module.Figure, "savefig", lambda self, file: drawn.append(self))
    return drawn


def texts(figure):
    return [text.get_text() for text in figure.legends[0].texts]


def test_pass_at_k_of_several_data_sets_and_seeds(tmp_path, figures):
    files = [result(tmp_path, "a", data, seed, [0.1 * seed, 0.2, 0.4])
             for data in ("easy", "hard") for seed in (1, 2)]
    evaluation.main(["plot", *map(str, files), "--out", str(tmp_path / "f.png")])
    evaluation.main(["plot", *map(str, files[:3:2]), "--out", str(tmp_path / "g.png")])
    evaluation.main(["plot", *map(str, files[:2]), "--out", str(tmp_path / "h.png")])
    assert texts(figures[0]) == ["a, easy (2 seeds)", "a, hard (2 seeds)"]
    assert figures[0].axes[0].lines[0].get_ydata() == pytest.approx([0.15, 0.2, 0.4])
    assert texts(figures[1]) == ["a, easy", "a, hard"]
    assert texts(figures[2]) == ["a (2 seeds)"]  # what all have need not be said


def test_a_result_that_is_named_twice_is_refused_with_the_reason(tmp_path, capsys):
    file = result(tmp_path, "a", "easy", 1, [0.1])
    assert "a, easy, seed 1: is there twice; leave one out" in refusal(
        capsys, file, file, "--out", tmp_path / "a.png")


@pytest.mark.parametrize("length, number", [(4, 3), (30, 3), (30, 9), (60, 8), (8, 14)])
def test_a_legend_leaves_most_of_the_figure_to_the_curves(length, number, tmp_path, figures):
    runs = [{"label": f"{i}" * length, "seed": 0, "steps": [0, 1], "values": [i, i + 1]}
            for i in range(number)]
    evaluation.draw_curves("accuracy", runs, tmp_path / "a.png")
    figure = figures[0]
    figure.draw_without_rendering()
    axes, legend = figure.axes[0].get_position(), figure.legends[0].get_window_extent()
    assert axes.height > 0.6
    assert axes.width * figure.get_figwidth() > 3.9  # inches
    assert legend.x1 <= figure.bbox.x1 and legend.y0 >= 0


def test_points_have_no_line_and_short_runs_no_step_between_two(runs, tmp_path, figures):
    files = [result(tmp_path, name, "d", seed, [0.5]) for name in "ab" for seed in (1, 2)]
    evaluation.main(["plot", *map(str, files), "--x", "total_length", "--out",
                     str(tmp_path / "f.png")])
    for line in [*figures[0].axes[0].lines, *figures[0].legends[0].get_lines()]:
        assert line.get_linestyle() == "None" and line.get_marker() not in ("None", "")
    evaluation.draw_curves("reward", [
        {"label": "a", "seed": 0, "steps": [1, 2, 3], "values": [1, 2, 3]}], tmp_path / "b.png")
    ticks = figures[1].axes[0].get_xticks()
    assert len(ticks) > 2 and all(tick == round(tick) for tick in ticks)


def test_curves_that_end_at_the_same_place_are_named_there(tmp_path, figures):
    values = {"a": [0, 0.9], "b": [0.5, 0.901], "c": [0.7, 0.5], "d": [1, 0.1], "e": [0, 0.1]}
    runs = [{"label": name, "seed": 0, "steps": [0, 20], "values": v} for name, v in values.items()]
    evaluation.draw_curves("accuracy", runs, tmp_path / "a.png")
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["a, b", "d, e"]
