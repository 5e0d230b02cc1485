"""Knowledge tasks: passages in the question, several accepted answers; from the file to a score."""

import json

import pytest
import torch
from conftest import ROOT, make_lm, prompt_cfg, save_folder
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import eval as evaluation
import hrpo
from common import (
    completion_hidden,
    completion_logprobs,
    encode_prompts,
    grade,
    load_problems,
    taught_answer,
)
from hyrea import lay_out

FILE = str(ROOT / "tests" / "data" / "passages_mini.jsonl")
FLAGS = ["--train", FILE, "--eval_data", FILE, "--answer_marker", "####", "--instruction", "",
         "--max_prompt_length", "400", "--max_completion_length", "10"]


def word_tokenizer(texts):
    """One token per word, digit, sign and space of the texts."""
    split = pre_tokenizers.Split(Regex(r"\s|[A-Za-z]+|\d|[^\sA-Za-z\d]"), "isolated")
    found = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    words = ["<pad>", "<bos>", "<eos>", *sorted(found | {"#", " "})]
    text = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    text.pre_tokenizer = split
    text.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=text, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Folder of a model that has learned to write the marker and some answer of the file."""
    problems = load_problems(FILE)
    tokenizer = word_tokenizer([problem["question"] for problem in problems])
    problems = problems[::3]
    answers = [taught_answer(problem) for problem in problems]
    lm = make_lm(vocab_size=len(tokenizer), max_position_embeddings=512)
    lm.num_tokens = len(tokenizer)
    problems = encode_prompts(tokenizer, problems, prompt_cfg("####", 400, instruction=""))
    ends = tokenizer([f"#### {answer}<eos>" for answer in answers])["input_ids"]
    batch = lay_out(ends, [problem["prompt_ids"] for problem in problems], lm)
    optimizer = torch.optim.Adam(lm.parameters(), 0.01)
    for _ in range(25):
        optimizer.zero_grad()
        embeds = lm.get_input_embeddings()(batch["completion_ids"])
        hidden = completion_hidden(lm, batch, embeds)
        logprobs, _ = completion_logprobs(
            lm, hidden, batch["completion_ids"], batch["completion_mask"])
        (-logprobs.sum() / len(ends)).backward()
        optimizer.step()
    return save_folder(tmp_path_factory.mktemp("reader"), lm, tokenizer)


def test_the_passages_and_all_accepted_answers_of_a_row_are_kept():
    problems = load_problems(FILE)
    assert len(problems) == 30
    for problem in problems:
        assert problem["question"].count("\n[") == 3 and "\n\nQuestion: " in problem["question"]
        assert problem["row"]["answer"] == problem["answer"]
    assert problems[0]["answer"] == ["Ilse Brandal", "Brandal"]


@pytest.mark.parametrize("text, right", [
    ("#### Brandal", True), ("It was her. #### the ILSE Brandal.", True),
    ("#### Ilse", False), ("#### Petra Lohm", False), ("Brandal", False)])
def test_an_answer_counts_if_it_is_one_of_the_accepted_without_case_and_articles(text, right):
    problem = load_problems(FILE, limit=1)[0]
    tokenizer = word_tokenizer([text])
    ids = torch.tensor([tokenizer(f"{text}<eos>")["input_ids"]])
    batch = {"completion_ids": ids, "lengths": torch.tensor([ids.shape[1]]),
             "finished": torch.tensor([True]), "latent_mask": torch.zeros_like(ids)}
    record, = grade(batch, [problem], tokenizer, "####")
    assert record["correct"] == right and record["format_ok"] == ("####" in text)


def test_hrpo_trains_on_passages_and_is_evaluated(reader, tmp_path, capsys):
    last = hrpo.main([*FLAGS, "--model", reader, "--preset", "tiny", "--steps", "2",
                      "--num_prompts", "8", "--group_size", "8", "--eval_every", "2",
                      "--kl_coef", "0.005", "--warmup_steps", "0",
                      "--out_dir", str(tmp_path / "run")])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    assert len(rows) == 2 and all(row["latent_steps"] > 0 and row["kl"] > 0 for row in rows)
    assert 0 < sum(row["reward"] for row in rows) < 2  # some answers of a group are accepted
    table = evaluation.main([str(tmp_path / "run"), "--data", FILE, "--out", str(tmp_path / "out")])
    assert table[0]["n"] == 30 and table[0]["accuracy"] == pytest.approx(last["accuracy"])
    records = [json.loads(line) for line in next((tmp_path / "out").glob("*.jsonl")).open()]
    assert any(isinstance(record["gold"], list) for record in records)
