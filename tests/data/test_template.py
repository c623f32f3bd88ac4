"""Chat templates: what transformers makes of theirs, where loss is, and which one a folder has."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nanorlhf
import train_ppo
import train_rm
import train_sft
from nanorlhf import speaker
from nanorlhf.config import TrainConfig
from nanorlhf.data import dialogue
from nanorlhf.data.dialogue import TEMPLATES
from nanorlhf.data.examples import Example
from nanorlhf.data.files import write_records
from nanorlhf.data.values import turns
from nanorlhf.hf import tokenizer as hf
from nanorlhf.hf.tokenizer import own_template, read_tokenizer
from nanorlhf.loading import load_gpt
from nanorlhf.tokenizer import EOS
from nanorlhf.tools import chat, data, evaluate, export
from tests.helpers import refused
from tests.test_llama import TEXT, made, saved, steps_of

jinja2 = pytest.importorskip("jinja2")
tokenizers = pytest.importorskip("tokenizers")
CHATML = (  # as SmolLM2 and Qwen2.5 have it
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (  # as Meta-Llama-3-8B-Instruct has it
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
THEIRS = {
    "chatml": (CHATML, "Be kind.", ["<|im_start|>", "<|im_end|>"], "<|endoftext|>"),
    "llama3": (
        LLAMA3,
        "",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
    ),
}
each = pytest.mark.parametrize("style", THEIRS)


def folder_of(folder, style, template=None, eos=None):
    """A folder with a tokenizer that has the special tokens of a template, which it brings."""
    source, _, special, bos = THEIRS[style]
    folder.mkdir(exist_ok=True)
    own = made(folder, steps_of("llama 3"), TEXT, None, (EOS,))
    own.add_special_tokens(special)
    own.save(str(folder / "tokenizer.json"))
    about = {"bos_token": bos, "eos_token": eos or dialogue.ENDS[style]}
    about |= {"chat_template": source if template is None else template}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return own


def read(folder):
    return read_tokenizer(folder, 400, True, None, *own_template(folder))


words = st.sampled_from(["\n", " a", "yes", "\n\nno", "12", "", " \t"]) | st.text(max_size=5)
spoken = st.lists(words, min_size=1, max_size=4).map("".join)
rounds = st.lists(st.tuples(spoken, spoken), max_size=2)


@each
def test_tokens_are_those_of_transformers_template(tmp_path, style):
    """Of any dialogue that spells no special token; what is said may begin with white space, which
    their tokenizer joins with the template's."""
    own = folder_of(tmp_path, style)
    found = read(tmp_path)
    assert (found.style, found.system) == (style, THEIRS[style][1])
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write = hf._renderer(about["chat_template"], about)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.none() | spoken.filter(str.strip), rounds, spoken)
    def check(system, rounds, last):
        messages = [("system", system)] if system else []
        for asked, answered in rounds:
            messages += [("user", asked), ("assistant", answered)]
        messages.append(("user", last))
        ids = own.encode(write(messages), add_special_tokens=False).ids
        ours = turns([{"role": role, "content": text} for role, text in messages])
        assert dialogue.encode_prompt(found, ours) == ids

    check()


@each
def test_loss_is_on_what_the_assistant_says_and_on_its_end(tmp_path, style):
    folder_of(tmp_path, style)
    found = read(tmp_path)
    messages = [("user", "hi"), ("assistant", "yes 12"), ("user", "why"), ("unlearned", "no")]
    messages += [("user", "so"), ("assistant", "bye")]
    ids, is_loss = dialogue.encode_dialogue(found, messages)
    learned = [i for i, flag in zip(ids, is_loss) if flag]
    assert learned == [*found.encode("yes 12"), found.eos_id, *found.encode("bye"), found.eos_id]
    prompt = dialogue.encode_prompt(found, messages[:-1])
    assert (
        ids[: len(prompt)] == prompt
        and is_loss[len(prompt)]
        and not any(is_loss[-8:][-1:]) == (style == "chatml")
    )
    pair = dialogue.encode_pair(found, messages[:-1], "bye")
    assert pair == [*prompt, *found.encode("bye"), found.eos_id]  # read at its end token
    mark = dialogue.assistant_mark(found)
    assert mark in ids and mark not in found.encode("yes bye")


@each
def test_what_is_too_long_loses_its_left(tmp_path, style):
    folder_of(tmp_path, style)
    found = read(tmp_path)
    example = Example([("user", "x y z " * 30), ("assistant", "bye")], "f:1")
    [(ids, is_loss, _)] = dialogue.encode_demonstrations(found, [example], 24)
    assert len(ids) == 24 and sum(is_loss) == len(found.encode("bye")) + 1


@each
def test_a_style_is_saved_and_exported(tmp_path, style):
    folder_of(tmp_path / "theirs", style)
    found = read(tmp_path / "theirs")
    again = type(found).load(saved(found, tmp_path / "a.json"))
    assert again == found and (again.style, again.system) == (style, THEIRS[style][1])
    assert found.user_id is None and "<|user|>" not in found.special  # none is added
    (tmp_path / "ours").mkdir()
    for name, content in hf.tokenizer_files(found, 64, True).items():
        (tmp_path / "ours" / name).write_text(json.dumps(content))
    assert own_template(tmp_path / "ours") == (style, THEIRS[style][1])
    back = read(tmp_path / "ours")
    for text in ("a fox", "12\n\n"):
        assert back.encode(text) == found.encode(text)
    other = type(found).load(tmp_path / "a.json")
    other.system = "another"
    assert other != found  # a reward model must read what the policy writes


def test_our_own_template_is_recognised(tmp_path):
    folder_of(tmp_path, "chatml", hf.CHAT_TEMPLATE.strip().replace(EOS, "<|im_end|>"))
    assert own_template(tmp_path) == ("nanorlhf", "")


NONE = {
    "another": "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
    "chatml without its line ends": CHATML.replace("\n", ""),
    "chatml that strips": CHATML.replace("message['content']", "message['content'] | trim"),
    "no Jinja": "{% for",
    "one that refuses": "{{ raise_exception('no') }}",
    "one that would not end": "{% for i in range(999999999) %}{% endfor %}",
    "one that reaches out": "{{ ''.__class__.__mro__ }}",
}


@pytest.mark.parametrize("what", NONE)
def test_a_template_that_is_none_of_ours_is_not_taken_for_one(tmp_path, what):
    folder_of(tmp_path, "chatml", NONE[what])
    assert own_template(tmp_path) == ("", "")


@pytest.mark.parametrize(
    "content", [b"{", b"[1]", b"\xff", b'{"eos_token": {}, "chat_template": 3}']
)
def test_a_damaged_configuration_is_one_line(tmp_path, capsys, content):
    own = folder_of(tmp_path, "chatml")
    sizes = {"vocab_size": own.get_vocab_size(), "num_hidden_layers": 1, "hidden_size": 16}
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**sizes, intermediate_size=24, num_attention_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    assert str(tmp_path) in refused(capsys, load_gpt, tmp_path)


def test_every_stage_offers_every_template():
    assert TrainConfig.__dataclass_fields__["template"].metadata["choices"] == ("", *TEMPLATES)


def test_a_folder_without_a_template_has_none(tmp_path):
    folder_of(tmp_path, "chatml", "")
    assert own_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text(CHATML)  # where newer folders keep it
    assert own_template(tmp_path) == ("chatml", "Be kind.")
    (tmp_path / "chat_template.jinja").unlink()
    folder_of(tmp_path, "chatml", [{"name": "default", "template": CHATML}])
    assert own_template(tmp_path) == ("chatml", "Be kind.")


# ---- the stages --------------------------------------------------------------------------------


@each
def test_the_stages_go_by_the_template_of_the_model_that_they_start_from(tmp_path, style, capsys):
    transformers = pytest.importorskip("transformers")
    start = tmp_path / "start"
    own = folder_of(start, style)
    config = transformers.LlamaConfig(
        vocab_size=own.get_vocab_size(),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(start)
    pairs = [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": f"w {i}"}]}
        | {"prompt": f"w {i}", "chosen": "aaa", "rejected": "b\n"}
        for i in range(40)
    ]
    demos = [{"messages": [*p["messages"], {"role": "assistant", "content": "a"}]} for p in pairs]
    pairs = [{k: v for k, v in p.items() if k != "messages"} for p in pairs]
    at = lambda name: str(tmp_path / name)
    demos, pairs = ([write_records(at(n), r)] for n, r in (("d.jsonl", demos), ("p.jsonl", pairs)))
    flags = {"device": "cpu", "dtype": "float32", "max_steps": 2, "batch_size": 4}
    flags |= {"max_new_tokens": 5}
    train_sft.main(train_sft.Config(at("sft"), init=str(start), data=demos, **flags))
    gpt, found = load_gpt(at("sft"))
    assert found.chat and found.tokenizer.style == style and found.tokenizer.template == style
    assert gpt.config.vocab_size == own.get_vocab_size()  # no token was added
    report = train_rm.main(train_rm.Config(at("rm"), init=at("sft"), data=pairs, **flags))
    assert report["score_unit"].endswith(("responses of " + str(found.path), "by itself"))
    flags |= {"minibatch_size": 2, "eval_prompts": 2}
    train_ppo.main(
        train_ppo.Config(at("ppo"), init=at("sft"), reward=at("rm"), data=pairs, **flags)
    )
    model, tokenizer = nanorlhf.load(at("ppo"), "cpu", "float32")
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "w 1"}]
    assert len(nanorlhf.generate(model, tokenizer, [asked, "w 2"], 4)) == 2
    export.main(export.Config(at("ppo"), at("out")))
    words = transformers.AutoTokenizer.from_pretrained(at("out"))
    ids = words.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert ids == dialogue.encode_prompt(tokenizer, turns(asked))
    assert "check failed" not in capsys.readouterr().err


def test_an_unknown_template_is_refused_and_a_flag_decides(tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    own = folder_of(tmp_path, "chatml", NONE["another"])
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"vocab_size": own.get_vocab_size(), "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    said = refused(capsys, load_gpt, tmp_path)
    assert "its chat template is not known here" in said and "--template" in said
    for style in ("chatml", "nanorlhf"):
        assert load_gpt(tmp_path, template=style)[1].tokenizer.style == style
    assert "<|eot_id|>" in refused(capsys, load_gpt, tmp_path, template="llama3")
    found, about = [], {"template": "chatml", "device": "cpu"}  # everybody who reads such a model
    found.append(nanorlhf.load(tmp_path, "cpu", template="chatml")[1])
    found.append(data.vocabulary(data.Config(init=str(tmp_path), template="chatml"))[0])
    ladder = evaluate.Config(out="nowhere", models=[f"a={tmp_path}"], **about)
    found.append(evaluate.load_models(ladder)[0]["a"][1].tokenizer)
    monkeypatch.setattr("builtins.input", lambda mark: next(iter(())))  # nothing is typed
    monkeypatch.setattr(speaker, "keeps_turns", lambda _, model: found.append(model.tokenizer))
    with pytest.raises(StopIteration):
        chat.main(chat.Config(model=str(tmp_path), **about))
    assert [tokenizer.style for tokenizer in found] == ["chatml"] * 4
    with pytest.raises(ValueError, match="choose from nanorlhf, chatml, llama3"):
        nanorlhf.load(tmp_path, template="alpaca")
