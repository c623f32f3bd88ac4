"""sample: models answer prompts, and the file says who wrote what."""

import json

from nanorlhf.data.split import is_held_out
from nanorlhf.data.values import prompt
from nanorlhf.human import samples
from nanorlhf.human.questions import read_questions
from nanorlhf.tools import sample
from tests.helpers import refused
from tests.tools.test_evaluate import make_gpt, save


def config(models, **flags):
    limits = {"device": "cpu", "dtype": "float32", "max_new_tokens": 4}
    return sample.Config(models=list(models), **limits, **flags)


def file(tmp_path, *records):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_each_prompt_gets_as_many_responses_of_each_model_as_asked(model, tmp_path):
    data = file(tmp_path, {"prompt": "hi"}, {"prompt": "yo"})
    cfg = config([model, f"{model}/step_1"], data=[data], responses=3)
    found = samples.sampled(cfg)
    assert [r["prompt"] for r in found] == ["hi", "yo"]
    for record in found:
        assert record["models"] == [model] * 3 + [f"{model}/step_1"] * 3 and record["seed"] == 1
        one, other = record["responses"][:3], record["responses"][3:]
        assert one == other  # the same weights and noise
        assert len(set(one)) > 1
    assert samples.sampled(cfg) == found
    assert samples.sampled(config([model], data=[data], seed=2)) != found


def test_a_prompt_is_written_so_that_it_is_read_as_it_was(model, tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns += [{"role": "user", "content": "c"}]
    # one turn that spells the marks of turns is no dialogue
    marked = [{"role": "user", "content": "\n\nHuman: a\n\nAssistant:"}]
    listed = [{"role": "user", "content": '[{"role": "user", please'}]
    told = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    prompts = (turns, marked, told, listed)
    data = file(tmp_path, *({"prompt": p} for p in prompts))
    found = samples.sampled(config([model], data=[data], responses=1))
    assert [prompt(r) for r in found] == [prompt({"prompt": p}) for p in prompts]
    assert found[2]["prompt"] == told and found[3]["prompt"] == listed


def test_the_worlds_prompts_have_some_to_hold_out(monkeypatch, model, tmp_path):
    found = samples.prompts_of(config([model], prompts=30))
    held_out = [is_held_out(example.first_turn) for example in found]
    assert len(found) == 30 and sum(held_out) == 3


def test_the_file_is_what_label_asks_about(model, tmp_path, capsys):
    to = tmp_path / "new" / "s.jsonl"
    data = file(tmp_path, {"prompt": "hi"}, {"prompt": "yo"})
    sample.main(config([model], data=[data], to=str(to)))
    assert "responses to 2 prompts" in capsys.readouterr().out
    assert {q.models for q in read_questions(to, "comparisons")} == {(model, model)}


def test_what_cannot_be_asked_is_said(model, tmp_path, capsys):
    base = tmp_path / "base"
    save(base, "gpt", make_gpt(1), chat=False)
    assert "base model" in refused(capsys, samples.sampled, config([str(base)]))
    assert "each model once" in refused(capsys, samples.sampled, config([model, model]))


def test_a_long_prompt_loses_its_left_and_is_shown_whole(model, tmp_path, capsys):
    long = "x" * 60 + "hi"
    data = file(tmp_path, {"prompt": long})
    (found,) = samples.sampled(config([model], data=[data]))
    assert found["prompt"] == long and "cut from the left" in capsys.readouterr().err
