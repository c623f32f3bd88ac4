"""Other people's chat templates: token ids are transformers' own, and loss is on what is said."""

import json
import random
import re

import pytest

from nanorlhf.data.dialogue import encode_pair, encode_prompt
from nanorlhf.hf.load import read_tokenizer
from nanorlhf.hf.template import OURS, ChatTemplate
from nanorlhf.tokenizer import byte_tokenizer
from tests.helpers import refused
from tests.hf.folders import (
    CHATML,
    CHATML_ASKS,
    CHATML_SPECIAL,
    CHATML_TURN,
    END,
    TEMPLATES,
    TURNS,
    byte_level,
    chat_folder,
    transformers,
    write,
)

each = pytest.mark.parametrize("name", TEMPLATES)
WORDS = ["the fox", " a", "\n", "\n\n", "é", "e\u0301", "🦊", "12", "  ", " ", "user", "system"]
WORDS += ["assistant", "Hello!", "\tif x:", "don't", "<think>", "</think>", "\n</think>\n\n"]
WORDS += ["ACME", "content", "日本語", "model", "[INST]", "Be kind."]


def read(folder, template=""):
    return read_tokenizer(folder, json.loads((folder / "config.json").read_text()), template)


def dialogues(n, takes_system, words=WORDS):
    """Of one to three rounds; the last turn is the user's or the assistant's. What is said may be
    empty, or begin and end in white space."""
    rng = random.Random(5)
    said = lambda low=0: "".join(rng.choices(words, k=rng.randint(low, 6)))
    for i in range(n):
        turns = [("system", said(1))] if takes_system and rng.random() < 0.4 else []
        for _ in range(rng.randint(1, 3)):
            turns += [("user", said()), ("assistant", said())]
        yield turns[: -1 if i % 2 else None]


def messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


def theirs_of(theirs, turns, answer):
    return theirs.apply_chat_template(
        messages(turns), add_generation_prompt=answer, enable_thinking=False, return_dict=False
    )


@each
def test_ids_are_those_of_apply_chat_template(tmp_path, name):
    theirs, takes_system = chat_folder(tmp_path, name)
    ours = read(tmp_path)
    assert ours.chat
    for turns in dialogues(100, takes_system):
        answer = turns[-1][0] == "user"
        ids, is_loss = ours.dialogue(turns, answer)
        assert ids == theirs_of(theirs, turns, answer), turns
        assert len(is_loss) == len(ids)


@each
def test_loss_is_on_what_the_assistant_says_and_on_what_ends_it(tmp_path, name):
    theirs, _ = chat_folder(tmp_path, name)
    ours = read(tmp_path)
    turns = [("user", "hi"), ("assistant", "yes 12"), ("user", "why"), ("unlearned", "no")]
    turns += [("user", "so\n"), ("assistant", "  the red cat")]
    ids, is_loss = ours.dialogue(turns)
    runs, before = [], False
    for i, flag in zip(ids, is_loss):
        if flag:
            runs = runs if before else [*runs, []]
            runs[-1].append(i)
        before = flag
    assert [ours.decode(run).strip() for run in runs] == ["yes 12", "the red cat"]
    assert [run[-1] for run in runs] == [ours.eos_id] * 2
    assert all(ours.eos_id not in run[:-1] for run in runs)
    assert sum(map(len, runs)) == sum(is_loss)
    prompt, (pair, _) = encode_prompt(ours, turns[:1]), encode_pair(ours, turns[:1], "yes 12")
    assert pair[: len(prompt)] == prompt and pair[-1] == ours.eos_id
    assert ours.decode(pair[len(prompt) :]).strip() == "yes 12"


@each
def test_an_empty_answer_is_its_end_alone(tmp_path, name):
    chat_folder(tmp_path, name)
    ours = read(tmp_path)
    for words in ("", " \n"):
        ids, is_loss = ours.dialogue([("user", " hi \n"), ("assistant", words)])
        learned = [i for i, flag in zip(ids, is_loss) if flag]
        assert learned[-1] == ours.eos_id and not ours.decode(learned).strip()


@each
def test_a_text_that_spells_a_special_token_is_text(tmp_path, name):
    """Where only the template writes these tokens, there are as many of them as without it."""
    theirs, takes_system = chat_folder(tmp_path, name)
    ours, special = read(tmp_path), list(theirs.get_added_vocab())
    special = [name for name in special if name in ours.special]
    plain = dialogues(40, takes_system, ["a fox", " ", "12", "\n"])
    spelled = dialogues(40, takes_system, ["a fox" + special[0], *special, "\n" + special[-1]])
    for turns, tricks in zip(plain, spelled):
        tricks = [(role, trick) for (role, _), (_, trick) in zip(turns, tricks)]
        turns, n = turns[: len(tricks)], ours.special.values()
        count = lambda ids: sorted(i for i in ids if i in n)
        assert count(ours.dialogue(tricks)[0]) == count(ours.dialogue(turns)[0])
        assert ours.eos_id not in ours.encode("".join(special))


@pytest.mark.parametrize("words", ["<tool_response>x</tool_response>", "<tool_response>x"])
def test_a_template_that_looks_how_a_text_begins_is_followed_or_refused(tmp_path, capsys, words):
    source = (
        "{%- for m in messages -%}{%- set is_tool = m.content.startswith('<tool_response>') -%}"
        "{{- '<|im_start|>' + ('tool' if is_tool else m.role) + '\n' -}}"
        "{{- m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    )
    theirs = write(tmp_path, byte_level("qwen2", CHATML_SPECIAL), source, **CHATML)
    turns = [("user", words), ("assistant", "so"), ("user", " b "), ("assistant", "")]
    assert read(tmp_path).dialogue(turns)[0] == theirs_of(theirs, turns, False)
    (tmp_path / "chat_template.jinja").write_text(
        source.replace("startswith('<tool_response>')", "split('x') | length > 1").replace(
            "m.content +", "m.content | length | string +"
        )
    )
    said = refused(capsys, read, tmp_path)
    assert "does not write once what the turn of the user says in user, assistant" in said


def test_the_date_is_the_one_of_the_first_load(tmp_path):
    chat_folder(tmp_path, "a date, and words are trimmed")
    ours = read(tmp_path)
    ours.settings["date"] = "2020-02-03T00:00:00"
    (tmp_path / "step").mkdir()
    ours.save(tmp_path / "step")
    again = type(ours).load(tmp_path / "step")
    assert "Today: 03 Feb 2020" in again.template.write([("user", "a")])[0][1]
    assert again == ours != read(tmp_path)


def test_what_is_said_at_load(tmp_path, capsys):
    wanted = {"roles are plain text": "roles as plain text", "the system speaks": "plain text"}
    wanted |= {"thoughts": "without thoughts", "a date": "", "a default": "", "a system": ""}
    for name in TEMPLATES:
        chat_folder(tmp_path / name, name)
        capsys.readouterr()
        read(tmp_path / name)
        said = "".join(capsys.readouterr())
        part = next(words for start, words in wanted.items() if name.startswith(start))
        assert part in said and bool(part) == bool(said), (name, said)
    read(tmp_path / name, "nanorlhf")  # its roles become special tokens
    assert "".join(capsys.readouterr()) == ""


def test_a_refused_role_and_a_vanishing_turn_are_named(tmp_path, capsys):
    chat_folder(tmp_path / "a", "a system turn is refused, and the assistant has another name")
    turns = [("system", "s"), ("user", "a")]
    said = refused(capsys, read(tmp_path / "a").dialogue, turns)
    assert "refuses the turns system, user: no system role" in said
    source = (
        "{%- for m in messages if m.role != 'system' -%}{{- m.content + eos_token -}}{%- endfor -%}"
    )
    write(tmp_path / "b", byte_level("qwen2", CHATML_SPECIAL), source, **CHATML)
    said = refused(capsys, read(tmp_path / "b").dialogue, turns)
    assert "does not write once what the turn of the system says" in said


BAD = {
    "no Jinja": ("{% for", "no Jinja"),
    "it refuses everything": (
        "{{ raise_exception('no') }}",
        "refuses the turns user, assistant: no",
    ),
    "it would not end": ("{% for i in range(999999999) %}{% endfor %}", "refuses the turns"),
    "it reaches out": ("{{ ''.__class__.__mro__ }}", "refuses the turns"),
    "no end": ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no special token behind"),
    "twice": ("{% for m in messages %}{{ m.content * 2 + eos_token }}{% endfor %}", "write once"),
}


PLAIN = TURNS + CHATML_TURN.replace("m.content", "(WORDS)") + END + CHATML_ASKS


@pytest.mark.parametrize(
    "start, names",
    [
        ("{{ sep_token + cls_token + mask_token }}", {}),
        ("{{ think_token }}", {"extra_special_tokens": {"think_token": "<sep>"}}),
        ("{% if bos_token is defined %}<cls>{% endif %}", {}),
        ("{% if bos_token is defined %}<cls>{% endif %}", {"bos_token": "<sep>"}),
        ("{% if unk_token is not defined %}<cls>{% endif %}{{ unk_token }}", {}),
        ("{% if eos_token is not defined %}<cls>{% endif %}{{ eos_token }}", {"eos_token": None}),
    ],
)
def test_a_template_is_told_the_names_that_transformers_tells_it(tmp_path, start, names):
    names = CHATML | {f"{x}_token": f"<{x}>" for x in ("sep", "cls", "mask")} | names
    names = {key: name for key, name in names.items() if name}
    engine = byte_level("qwen2", (*CHATML_SPECIAL, "<sep>", "<cls>", "<mask>"))
    theirs = write(tmp_path, engine, start + PLAIN.replace("WORDS", "m.content"), **names)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    ours = read(tmp_path)
    for turns in dialogues(10, True):
        answer = turns[-1][0] == "user"
        assert ours.dialogue(turns, answer)[0] == theirs_of(theirs, turns, answer)
    assert ours.eos_id == 2 and theirs.convert_ids_to_tokens(2) == "<|im_end|>"


@pytest.mark.parametrize(
    "changed",
    "m.content|upper m.content|capitalize m.content|escape m.content[:100] m.content|truncate(50) "
    "m.content.replace('\\n\\n','\\n') m.content.replace('\\r\\n','\\n') "
    "m.content.replace('\\t','.')".split(),
)
def test_a_template_that_changes_what_is_said_is_refused(tmp_path, capsys, changed):
    source = PLAIN.replace("WORDS", changed)
    write(tmp_path, byte_level("qwen2", CHATML_SPECIAL), source, **CHATML)
    assert "does not write once what the turn of the user says" in refused(capsys, read, tmp_path)


def test_an_end_that_the_file_calls_no_special_token_is_one(tmp_path):
    """transformers writes such files after add_tokens, and reads them so."""
    source = PLAIN.replace("WORDS", "m.content").replace("'<|im_end|>\n'", "eos_token")
    write(tmp_path, byte_level("qwen2", CHATML_SPECIAL), source, **CHATML)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"][2]["special"] = False
    assert content["added_tokens"][2]["content"] == "<|im_end|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), read(tmp_path)
    for turns in dialogues(10, True):
        answer = turns[-1][0] == "user"
        assert ours.dialogue(turns, answer)[0] == theirs_of(theirs, turns, answer)
    assert ours.decode([ours.eos_id]) == "" and ours.eos_id == theirs.eos_token_id


@pytest.mark.parametrize("what", BAD)
def test_a_template_that_cannot_be_used_is_one_line(tmp_path, capsys, what):
    source, named = BAD[what]
    write(tmp_path, byte_level("qwen2", CHATML_SPECIAL), source, **CHATML)
    said = refused(capsys, read, tmp_path)
    assert named in said and str(tmp_path) in said


def test_where_the_template_is_kept(tmp_path):
    """In a file of its own, in the configuration, or there among others."""
    theirs = write(tmp_path, byte_level("qwen2", CHATML_SPECIAL), "{{ 'x' }}", **CHATML)
    path, source = tmp_path / "tokenizer_config.json", TEMPLATES["a default system text"][0]
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads(path.read_text())
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": source}]
    for value in (source, named, {"default": source}):
        path.write_text(json.dumps(config | {"chat_template": value}))
        assert read(tmp_path).own_template == source
    path.write_text(json.dumps(config))
    assert not read(tmp_path).chat
    theirs.chat_template = source
    theirs.save_pretrained(tmp_path)
    assert read(tmp_path).own_template == source


def test_our_own_template_in_jinja_is_the_tokenizers(tmp_path):
    """A base model learns it: ids of the roles, words and ends are as of a Tokenizer of ours."""
    ours, names = byte_tokenizer(), {"eos_token": "<|endoftext|>"}
    template = ChatTemplate(OURS, names, "2020-01-01", "here")
    for turns in dialogues(100, True):
        for answer in (False, True):
            text = "".join(piece for _, piece in template.write(turns, answer))
            pieces = re.split(r"(<\|user\|>|<\|assistant\|>|<\|endoftext\|>)", text)
            parts = [[ours.special[p]] if p in ours.special else ours.encode(p) for p in pieces]
            assert sum(parts, []) == ours.dialogue(turns, answer)[0]
    engine = byte_level("gpt2", ["<|endoftext|>"])
    write(tmp_path, engine, None, "gpt2", **names)
    base = read(tmp_path)
    assert not base.chat and base.added == ["<|pad|>", "<|user|>", "<|assistant|>"]
    ids, is_loss = base.dialogue([("system", "s"), ("user", "a"), ("assistant", "b")])
    special = base.special
    user = [special["<|user|>"], *base.encode("s\n\na"), special["<|assistant|>"]]
    assert ids == [*user, *base.encode("b"), base.eos_id]
    assert is_loss == [False] * len(user) + [True, True]


def test_the_flag_names_a_template_a_file_or_is_refused(tmp_path, capsys):
    folder = tmp_path / "a"
    write(folder, byte_level("qwen2", CHATML_SPECIAL), "{{ 'x' }}", **CHATML)
    source = TEMPLATES["a default system text"][0]
    (tmp_path / "mine.jinja").write_text(source)
    mine = read(folder, str(tmp_path / "mine.jinja"))
    assert mine.source == source and mine.chat
    chatml = read(folder, "chatml")
    text = "".join(piece for _, piece in chatml.template.write([("user", "a")], True))
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert "<|user|>" in read(folder, "nanorlhf").special
    assert "choose from nanorlhf, chatml" in refused(capsys, read, folder, "alpaca")
    write(tmp_path / "b", byte_level("gpt2", ["<|endoftext|>"]), eos_token="<|endoftext|>")
    assert "no special token behind" in refused(capsys, read, tmp_path / "b", "chatml")
