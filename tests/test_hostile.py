"""Nothing gets in: pickles, code, paths, templates and secrets stay where they are."""

import builtins
import json
import os
import re
import shutil

import pytest
import torch
from conftest import METHODS, ROOT, make_tokenizer, prompt_cfg, save_folder
from runs import flags, train, tree

import common
import eval as evaluation

CODE = "import os\nos.mkdir({!r})\n"


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("file, changes, loads", [
    ("config.json", {"model_type": "mine", "architectures": ["Mine"], "auto_map": {
        "AutoConfig": "code.Conf", "AutoModelForCausalLM": "code.Model"}}, False),
    ("config.json", {"auto_map": {"AutoConfig": "code.Conf",
                                  "AutoModelForCausalLM": "code.Model"}}, True),
    ("tokenizer_config.json", {"tokenizer_class": "Mine", "auto_map": {
        "AutoTokenizer": ["code.Mine", "code.Mine"]}}, None)])
def test_code_in_a_model_folder_never_runs(
        model, tmp_path, monkeypatch, capsys, file, changes, loads):
    folder, executed = shutil.copytree(model, tmp_path / "m"), tmp_path / "executed"
    (folder / "code.py").write_text(CODE.format(str(executed)))
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **changes}))
    monkeypatch.setattr(builtins, "input", lambda *args: "y")  # what transformers may ask
    try:
        common.load_model(str(folder))
        assert loads is not False  # with the library's own class
    except SystemExit as stop:
        assert stop.code == 2 and not loads and "--model" in capsys.readouterr().err
    assert not executed.exists()


@pytest.mark.parametrize("method", METHODS)
def test_pickled_weights_are_never_opened(method, model, tmp_path, capsys):
    folder, executed = shutil.copytree(model, tmp_path / "m"), tmp_path / "executed"
    (folder / "model.safetensors").rename(folder / "model.bin")
    torch.save({"x": Evil(executed)}, folder / "pytorch_model.bin")
    assert train(method, flags(folder, tmp_path / "run")) == 2
    assert "--model" in capsys.readouterr().err
    assert not executed.exists() and not (tmp_path / "run").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the trap is a real one
    assert executed.exists()


def test_a_chat_template_cannot_leave_its_sandbox(tmp_path, capsys):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ("{{ cycler.__init__.__globals__.os.mkdir('%s') }}"
                               % (tmp_path / "executed"))
    problems = common.load_problems("arithmetic:2", "test", 2)
    with pytest.raises(SystemExit):
        common.encode_prompts(tokenizer, problems, prompt_cfg())
    line, = capsys.readouterr().err.splitlines()
    assert "chat template" in line and "unsafe" in line
    assert not (tmp_path / "executed").exists()


def test_no_source_opens_a_pickle_or_runs_a_text():
    banned = (r"(?<!\.)\beval\(|\bexec\(|pickle\.loads?\b|\byaml\b|np\.load|allow_pickle|sympy"
              r"|os\.system|shell=True|weights_only=False|trust_remote_code\W+True|__import__")
    for name in [*METHODS, "common", "eval"]:
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        assert not re.findall(banned, text), name
        for call in re.findall(r"torch\.load\(.*", text):
            assert "weights_only=True" in call
        for call in re.findall(r"\.from_pretrained\([^)]*\)", text):
            assert "**code" in call, f"{name}: {call} does not refuse a folder's own code"


@pytest.mark.parametrize("method", METHODS)
def test_no_text_of_the_data_is_used_as_a_path_and_no_secret_is_written(
        method, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_unwritten")
    monkeypatch.chdir(tmp_path)
    data, place = tmp_path / "data" / "in" / "a.jsonl", "../../out"
    data.parent.mkdir(parents=True)
    rows = [{"question": "1+1=", "answer": "2"}, *(
        {"question": f"{place} 1+{i}=", "answer": "1", "id": place, "source": place,
         "file": f"{tmp_path}/out", "steps": [place]} for i in range(7))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = flags(model, tmp_path / "run" / "x", f"--train {data} --eval_data {data}")
    assert isinstance(train(method, argv), dict)
    evaluation.main([str(tmp_path / "run" / "x"), "--data", "data/in/../in/a.jsonl", "--out",
                     str(tmp_path / "results" / "x")])
    assert {p.name for p in tmp_path.iterdir()} == {"data", "run", "results"}
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["x"]
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["x"]
    assert not any(b"hf_unwritten" in (text or b"") for text in tree(tmp_path).values())


def test_a_checkpoint_that_names_a_module_as_its_method_imports_nothing(tmp_path, capsys):
    folder = tmp_path / "hf" / "latent"
    folder.mkdir(parents=True)
    for name in ("os.path", "../code", "shutil", "__main__"):
        (folder / "config.json").write_text(json.dumps({"method": name, "train": "arithmetic"}))
        with pytest.raises(SystemExit) as stop:
            evaluation.main([str(tmp_path)])
        assert stop.value.code == 2 and "not beside eval.py" in capsys.readouterr().err


def test_settings_of_a_checkpoint_are_numbers_and_words_to_a_script(model, tmp_path):
    """What eval.py takes from a foreign latent/config.json goes through the script's checks."""
    save_folder(tmp_path / "hf")
    (tmp_path / "hf" / "latent").mkdir()
    settings = {"method": "hrpo", "train": "arithmetic:2", "temperature": -1.0}
    (tmp_path / "hf" / "latent" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as stop:
        evaluation.configure(str(tmp_path), evaluation.parse_args([str(tmp_path)]))
    assert stop.value.code == 2
