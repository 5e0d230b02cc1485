"""eval.py show and ask: what is shown of each step is what was fed, and no text does harm."""

import html.parser
import io
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import METHODS
from test_replay import PROMPTS, build, draw

import eval as evaluation
from common import grade, select_rows
from hrpo import soft_embedding

HOSTILE = ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "\x1b[31mred\x07",
           "a\nb", "\u202egnp.exe", "&amp;", "</div></body>", "' style='position:fixed", "   "]


def think(method, **changes):
    """-> script, policy, cfg, batch of 12 rows, their records with positions."""
    script, policy, cfg = build(method, **changes)
    cfg.num_samples, cfg.greedy = 3, False
    problems = [{"question": "1+1", "answer": "2", "prompt_ids": ids} for ids in PROMPTS]
    batches = []
    with pytest.MonkeyPatch.context() as patch:
        rollout = script.rollout
        patch.setattr(script, "rollout", lambda *args: batches.append(rollout(*args)) or batches[0])
        records = evaluation.decode_thoughts(
            script, policy, policy.tokenizer, problems, cfg, torch.Generator().manual_seed(0))
    return script, policy, cfg, batches[0], records


def thought(tokens, latent=True, gold="7", **changes):
    """A record with these tokens as positions, as decode_thoughts makes it."""
    positions = [{"token": token, "latent": latent, "marker": False,
                  "fed": [(token, 0.75), ("b", 0.25)] if latent else [],
                  "numbers": {"entropy": 0.5, "log-prob": -12.25, "gate_a": 0.98}}
                 for token in tokens]
    text = "".join(tokens)
    return {"question": text, "completion": text, "extracted": text,
            "gold": gold, "correct": False, "length": len(tokens), "latent_steps": 3, "data": "d",
            "index": 0, "sample": 0, "positions": positions, **changes}


@pytest.fixture(scope="module", params=METHODS)
def thoughts(request):
    return request.param, *think(request.param)


def test_every_step_of_a_completion_is_shown_with_its_token_and_score(thoughts):
    _, _, policy, _, batch, records = thoughts
    with torch.no_grad():
        outputs = policy(batch)
    assert len(records) == 12 and any(record["latent_steps"] for record in records)
    for row, record in enumerate(records):
        positions = record["positions"]
        assert (record["index"], record["sample"]) == (row // 3, row % 3)
        assert len(positions) == record["length"]
        wanted = batch["latent_mask"][row].tolist()[: len(positions)]
        assert [p["latent"] for p in positions] == wanted
        for t, position in enumerate(positions):
            numbers = position["numbers"]
            assert position["token"] == policy.tokenizer.decode([batch["completion_ids"][row, t]])
            assert ("log-prob" in numbers) == bool(batch["loss_mask"][row, t])
            for name, key in (("log-prob", "logprobs"), ("entropy", "entropy")):
                if batch["loss_mask"][row, t]:
                    assert numbers[name] == pytest.approx(outputs[key][row, t].item(), abs=1e-3)
            weights = [weight for _, weight in position["fed"]]
            assert bool(weights) == position["latent"] and len(weights) <= 5
            assert weights == sorted(weights, reverse=True) and sum(weights) < 1.001


def test_the_weights_are_those_of_what_the_rollout_fed(thoughts):
    method, script, policy, cfg, batch, records = thoughts
    with torch.no_grad():
        ids, weights = script.describe(policy, policy(batch), batch, cfg)
        latent = batch["latent_mask"]
        assert latent.sum() > 1
        if method == "hrpo":
            mixed, wanted = soft_embedding(weights, policy.table, ids), batch["soft_embeds"]
        elif method == "hyrea":
            mixed, wanted = weights.log(), policy.hidden(batch) @ policy.table.weight.T
            if not policy.lm.config.tie_word_embeddings:
                wanted = policy.lm.lm_head(policy.hidden(batch))
            wanted = wanted[..., : weights.shape[-1]].log_softmax(-1)
        else:
            mixed = (weights[..., None] * policy.table.weight[ids]).sum(2)
            wanted = policy.completion_embeds(batch)
    torch.testing.assert_close(mixed[latent], wanted[latent], rtol=1e-4, atol=1e-4)
    for row, t in latent.nonzero().tolist():
        weight, place = weights[row, t].max(0)
        heaviest = place if ids is None else ids[row, t, place]
        shown, share = records[row]["positions"][t]["fed"][0]
        assert shown == policy.tokenizer.decode([heaviest])
        assert share == pytest.approx(weight.item(), abs=1e-3)


def test_a_fork_without_describe_shows_tokens_and_numbers(monkeypatch):
    import lepo

    monkeypatch.delattr(lepo, "describe")
    monkeypatch.setattr(lepo, "METHOD_METRICS", ())
    records = think("lepo")[-1]
    evaluation.print_thought(records[0], lepo)
    latents = [p for record in records for p in record["positions"] if p["latent"]]
    assert latents and not any(p["fed"] for p in latents)
    assert all({"entropy", "log-prob", "mixture_size"} <= p["numbers"].keys() for p in latents)


def test_a_hidden_state_has_an_entropy_though_it_was_not_drawn():
    records = think("hyrea")[-1]
    latents = [p for record in records for p in record["positions"] if p["latent"]]
    assert latents and all(p["numbers"]["entropy"] > 0 for p in latents)
    assert not any("log-prob" in p["numbers"] for p in latents)


@pytest.mark.parametrize("latent_steps", [0, 5])
def test_soft_thinking_is_replayed_as_it_was_fed(latent_steps):
    script, policy, cfg, batch, records = think(
        "lepo", latent_steps=latent_steps, until_marker=True, top_k=6, top_p=0.9, noise_scale=0.0,
        cold_stop_entropy=3.0, cold_stop_length=3)
    assert batch["topk_ids"].shape[-1] == 6
    forced = batch["completion_mask"] & ~batch["loss_mask"]
    assert forced.any() and batch["latent_mask"].any() and not (forced & batch["latent_mask"]).any()
    inputs = []
    step = script.next_input
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "next_input", lambda *args: inputs.append(step(*args)) or inputs[-1])
        again = draw(script, policy, cfg, [PROMPTS[1]], 1)
    length = int(again["lengths"][0])
    fed = torch.cat([embeds for _, embeds, _, _ in inputs])  # [T, H]
    torch.testing.assert_close(policy.completion_embeds(again)[0, :length], fed[:length])
    for record in records:
        for position in record["positions"]:
            assert position["latent"] == (len(position["fed"]) > 1)


def test_tokens_that_hold_a_part_of_the_last_marker_are_marked():
    record = thought(["7", "##", "##", "1", "a#", "###", "8"], latent=False)
    evaluation.mark_answer(record, "####")
    assert [p["marker"] for p in record["positions"]] == [False] * 4 + [True, True, False]
    evaluation.mark_answer(record, "</think>")
    assert not any(p["marker"] for p in record["positions"])


class Reader(html.parser.HTMLParser):
    """Collects what a page holds."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.texts.append(text)


def test_a_hostile_completion_does_nothing_to_the_page():
    record = thought(HOSTILE)
    page = Reader(evaluation.write_page({HOSTILE[0]: [record]}))
    plain = Reader(evaluation.write_page({"m": [thought(["a"] * len(HOSTILE))]}))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    for (_, ours), (_, theirs) in zip(page.tags, plain.tags):
        assert ours.keys() == theirs.keys()
        assert ours == theirs or ours.keys() == {"class", "tabindex", "style"}
    for token in HOSTILE[:2]:
        assert token in page.texts
    assert "\\x1b[31mred\\x07" in page.texts and "a↵b" in page.texts and "␣␣␣" in page.texts
    assert not any(c in "".join(page.texts) for c in "\x1b\x07\u202e")


def test_a_page_stands_alone_and_every_box_can_be_reached_with_the_keyboard():
    page = evaluation.write_page({"m": [thought(["a", "b", "c"])]})
    tags = Reader(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object"}
    assert "http" not in page.replace("http-equiv", "") and "url(" not in page
    assert "@import" not in page and "default-src 'none'" in page
    boxes = [attributes for _, attributes in tags if attributes.get("class") == "box latent"]
    assert len([box for box in boxes if box.get("tabindex") == "0"]) == 3
    for word in ("prefers-color-scheme: dark", "@media print", ".box:focus .card"):
        assert word in page


def test_the_table_fits_into_80_columns_and_steers_no_terminal(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    record = thought([*HOSTILE, "a very long token indeed"] * 120)
    for position in record["positions"]:
        position["fed"] = [("a very long token", 0.9999), ("\x1b[2J", 0.5), ("b", 0.25)]
    evaluation.print_thought(record, SimpleNamespace(METHOD_METRICS=("gate_a", "other")))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1200 and max(map(len, lines[1:])) <= 80
    assert not any(c in "".join(lines) for c in "\x1b\x07\u202e")
    assert lines[2].split() == ["0L", "<script>", "0.50", "-12.25", "0.98", "a", "very", "l",
                                "1.00", "\\x1b[2J", ".50", "b", ".25"]


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    assert evaluation.paint("text", "31") == "text"
    monkeypatch.setattr(evaluation.sys, "stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert evaluation.paint("text", "31") == "\033[31mtext\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert evaluation.paint("text", "31") == "text"


FLAGS = ("--mode soft_thinking --max_completion_length 8 --answer_marker </think> "
         "--max_prompt_length 200 --num_samples 2").split()


def show(model, *argv):
    return evaluation.main(["show", model, *map(str, argv), *FLAGS])


def test_show_prints_tables_and_writes_a_page_or_the_numbers(model, tmp_path, capsys):
    shown = show(model, "--data", "arithmetic:2", "--limit", 2, "--out", tmp_path / "a.html")
    said = capsys.readouterr().out
    assert len(shown[model]) == 4 and said.count("problem 1  sample 1") == 1
    assert said.count("gold") == 4 and "positions are latent" in said
    assert max(map(len, said.splitlines())) < 400 and "\x1b" not in said
    page = (tmp_path / "a.html").read_text()
    assert page.count("<h2>") == 2 and page.count('tabindex="0"') == sum(
        record["length"] for record in shown[model])
    again = show(model, "--data", "arithmetic:2", "--limit", 2, "--out", tmp_path / "a.json")
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved[model] == json.loads(json.dumps(again[model])) == json.loads(
        json.dumps(shown[model]))


def test_a_question_of_the_user_is_neither_right_nor_wrong(model, tmp_path, capsys):
    show(model, "--question", "3+4=", "--out", tmp_path / "a.html")
    said = capsys.readouterr().out
    assert "3+4=" in said and "right" not in said and "wrong" not in said
    assert 'class="wrong"' not in (tmp_path / "a.html").read_text()


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*map(str, argv)])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_is_not_ours_is_not_overwritten(model, tmp_path, capsys):
    for name, words in (("a.html", "name another"), ("a.txt", "must end in"),
                        ("no/a.html/b.json", "cannot be written")):
        file = tmp_path / name
        if name.endswith(("a.html", "a.txt")):
            file.write_text("mine")
        else:
            (tmp_path / "no").write_text("mine")
        assert words in refused(capsys, "show", model, "--question", "1+1=", "--out", file)
    assert (tmp_path / "a.html").read_text() == "mine"
    show(model, "--question", "1+1=", "--out", tmp_path / "b.html")
    show(model, "--question", "2+1=", "--out", tmp_path / "b.html")
    assert "2+1=" in (tmp_path / "b.html").read_text()


def test_ask_prints_the_completion_and_the_answer_of_a_question(model, capsys):
    flags = ["--max_completion_length", "8", "--max_prompt_length", "200"]
    record = evaluation.main(["ask", model, "3+4=", *flags])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == record["completion"] and "steps are latent" in said[1] and len(said) == 2
    evaluation.main(["ask", model, "3+4=", "--show", *flags])
    assert len(capsys.readouterr().out.splitlines()) == 3 + record["length"]
    evaluation.main(["ask", model, "3+4=", *flags])
    assert capsys.readouterr().out.splitlines()[0] == record["completion"]  # nothing is left over


def test_ask_reads_questions_line_by_line_and_goes_on_after_a_bad_one(model, capsys, monkeypatch):
    monkeypatch.setattr(evaluation.sys, "stdin", io.StringIO("3+4=\n\n" + "1+" * 400 + "\n5-2="))
    evaluation.main(["ask", model, "--max_completion_length", "8", "--max_prompt_length", "200"])
    out, err = capsys.readouterr()
    assert out.count("steps are latent") == 2 and err.count("--max_prompt_length") == 1


def test_what_show_and_ask_cannot_do_is_refused(model, capsys):
    assert "quotation marks" in refused(capsys, "ask", model, "3+4=", "5=")
    assert "use show" in refused(capsys, "ask", model, "3+4=", "--num_samples", 2)
    assert "either" in refused(capsys, "show", model, "--question", "1=", "--data", "arithmetic")
    assert "no flag" in refused(capsys, "show", model, "--nonsense")
    assert "before the flags" in refused(capsys, "show")
    assert "no flag" in refused(capsys, "ask", model, "3=", "--limit", 3)


def test_a_character_of_several_tokens_is_printed_when_it_is_complete(capsys):
    pieces = {1: "a", 2: "\ufffd", 3: "€"}
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(
        pieces[i] for i in ids).replace("\ufffd€", "€"))
    step = evaluation.printing(lambda t: (torch.tensor([t]),), tokenizer)
    said = []
    for t in (1, 2, 3):
        step(t)
        said.append(capsys.readouterr().out)
    assert said == ["a", "", "€"]


def test_grade_and_select_rows_serve_one_completion_as_they_serve_many(thoughts):
    _, _, policy, cfg, batch, records = thoughts
    single = select_rows(batch, [5])
    problem = {"question": "1+1", "answer": "2"}
    record, = grade(single, [problem], policy.tokenizer, cfg.answer_marker)
    assert record["completion"] == records[5]["completion"]
