"""The prompt is the user's: instruction, chat template, its arguments, its date, and the end."""

import pytest
from conftest import make_tokenizer, prompt_cfg
from tokenizers import processors

from common import encode_prompts, render_prompt

CHATML = ("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
          "{% if add_generation_prompt %}[assistant]{% endif %}")
REFUSES = ("{% if messages[0]['role'] == 'system' %}"
           "{{ raise_exception('System role not supported') }}{% endif %}" + CHATML)
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{# system #}"
NO_SYSTEM = CHATML + "{# users only #}"
KNOWS_SYSTEM = CHATML + "{# a system turn is fine #}"


def tokenizer_with(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def refusal(capsys, template, **form):
    with pytest.raises(SystemExit) as stop:
        render_prompt(tokenizer_with(template), "1+1=", prompt_cfg(**form))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("template, instruction, prompt", [
    (KNOWS_SYSTEM, "End with {marker}", "[system]End with ##[user]1+1=[assistant]"),
    (REFUSES, "End with {marker}", "[user]End with ##\n\n1+1=[assistant]"),
    (NO_SYSTEM, "End with {marker}", "[user]End with ##\n\n1+1=[assistant]"),
    (None, "End with {marker}", "End with ##\n\nQuestion: 1+1=\nAnswer:"),
    (KNOWS_SYSTEM, r"Use \boxed{} or {x}", r"[system]Use \boxed{} or {x}[user]1+1=[assistant]"),
    (KNOWS_SYSTEM, "", "[user]1+1=[assistant]"), (REFUSES, "", "[user]1+1=[assistant]"),
    (NO_SYSTEM, "", "[user]1+1=[assistant]"), (None, "", "1+1=")])
def test_the_instruction_stands_where_the_template_takes_it(template, instruction, prompt):
    tokenizer = tokenizer_with(template)
    for suffix in ("", "<think>"):
        cfg = prompt_cfg("##", instruction=instruction, prompt_suffix=suffix)
        assert render_prompt(tokenizer, "1+1=", cfg) == prompt + suffix


def test_without_an_instruction_ours_names_the_marker():
    shown = render_prompt(tokenizer_with(KNOWS_SYSTEM), "1+1=", prompt_cfg())
    assert shown.startswith("[system]Think through") and shown.count("</think>") == 2


def test_template_args_reach_the_template():
    tokenizer = tokenizer_with(CHATML + "{% if thinking %}<think>{% endif %}{{ words|join }}")
    form = {"instruction": "", "template_args": '{"thinking": true, "words": ["a", "b"]}'}
    assert render_prompt(tokenizer, "1", prompt_cfg("#", **form)) == "[user]1[assistant]<think>ab"
    form["template_args"] = '{"add_generation_prompt": false}'
    assert render_prompt(tokenizer, "1", prompt_cfg("#", **form)) == "[user]1"


@pytest.mark.parametrize("text", ["{thinking: 1}", "[1]", "5", "[" * 9999, '{"tokenize": 1, "a"}',
                                  '{"chat_template": "x"}', '{"conversation": []}'])
def test_bad_template_args_end_in_one_line(capsys, text):
    line = refusal(capsys, CHATML, template_args=text)
    assert "--template_args" in line and text[:20] in line and len(line) < 500


@pytest.mark.parametrize("template, said", [
    ("{{ raise_exception('alternate roles') }}", "alternate roles"), ("{% if %}", "Expected"),
    ("{{ messages[0].content.x.y }}", "no attribute"), ("{{ 1 / 0 }}", "division"),
    ("{% for m in 5 %}{% endfor %}", "not iterable"), (CHATML + "{{ 'system' + 5 }}", "str")])
def test_any_error_of_a_template_ends_in_one_line(capsys, template, said):
    line = refusal(capsys, template)
    assert "chat template of --model" in line and said in line


@pytest.mark.parametrize("call", ["strftime_now('%d %b %Y')", 'strftime_now("%d %b %Y")',
                                  "strftime_now( format='%d %b %Y' )"])
def test_the_date_of_a_template_can_be_fixed(call):
    written = "{% if strftime_now is defined and not date_string is defined %}{% set date_string ="
    template = written + call + " %}{% endif %}{{ date_string }} " + CHATML
    tokenizer = tokenizer_with(template)
    form = {"instruction": "", "prompt_date": "2023-01-31"}
    shown = render_prompt(tokenizer, "1", prompt_cfg(**form))
    assert shown == "31 Jan 2023 [user]1[assistant]"
    form["template_args"] = '{"date_string": "never"}'
    assert render_prompt(tokenizer, "1", prompt_cfg(**form)) == "never [user]1[assistant]"


def test_a_date_that_is_none_is_refused(capsys):
    assert "31/01/2023" in refusal(capsys, CHATML, prompt_date="31/01/2023")


def test_encoding_uses_all_of_it():
    tokenizer = tokenizer_with(PLAIN + "{{ tail }}{{ strftime_now('%m') }}")
    form = {"instruction": "{marker} # ", "template_args": '{"tail": "b"}',
            "prompt_suffix": "<think>", "prompt_date": "2023-12-01"}
    problems = [{"question": "1+1", "answer": "2"}]
    problem, = encode_prompts(tokenizer, problems, prompt_cfg(**form))
    assert tokenizer.decode(problem["prompt_ids"]) == "<bos></think> # 1+1b12<think>"
    assert render_prompt(tokenizer, "1+1", prompt_cfg(**form)) == "<bos></think> # 1+1b12<think>"


def test_a_pad_that_is_the_bos_is_no_unknown_character(capsys):
    tokenizer = make_tokenizer(template=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.pad_token = "<bos>"
    form = {"instruction": ""}
    kept = encode_prompts(tokenizer, [{"question": "1+1", "answer": "2"}], prompt_cfg(**form))
    assert kept[0]["prompt_ids"][0] == 1 and not capsys.readouterr().err
    tokenizer.pad_token = "<pad>"  # which this tokenizer writes for what it does not know
    questions = [{"question": "1+1", "answer": "2"}, {"question": "1+Ω", "answer": "2"}]
    assert len(encode_prompts(tokenizer, questions, prompt_cfg(**form))) == 2
    assert "1 of 2 prompts hold characters" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        encode_prompts(tokenizer, questions[1:], prompt_cfg(**form))


def test_prompts_over_the_limit_are_counted(capsys):
    tokenizer = tokenizer_with(PLAIN)
    problems = [{"question": "1" * n, "answer": "2"} for n in (1, 5, 9)]
    form = {"instruction": ""}
    encoded = encode_prompts(tokenizer, problems, prompt_cfg("#", **form))
    lengths = [len(problem["prompt_ids"]) for problem in encoded]
    kept = encode_prompts(tokenizer, problems, prompt_cfg("#", lengths[1], **form))
    assert [p["question"] for p in kept] == ["1", "11111"]
    assert "dropped 1 of all 3 prompts" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        encode_prompts(tokenizer, problems, prompt_cfg("#", 1, **form))
    assert f"shortest has {lengths[0]} tokens" in capsys.readouterr().err


def test_a_marker_and_a_length_stand_for_a_config_with_the_usual_prompt(tokenizer):
    problems = [{"question": "1+1", "answer": "2"}, {"question": "1+1" * 199, "answer": "2"}]
    usual = encode_prompts(tokenizer, problems, prompt_cfg("#", 300))
    assert encode_prompts(tokenizer, problems, "#", 300) == usual and len(usual) == 1
