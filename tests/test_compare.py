"""The measures of examples/compare.py against what they are by hand."""

import math

import torch

from examples import compare
from nanorlhf.data import dialogue
from nanorlhf.data.dialogue import Prompt
from nanorlhf.data.files import write_records
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.tokenizer import byte_tokenizer
from tests.helpers import refused

PROMPTS = [Prompt([i], str(i), "", {}) for i in range(20)]
EOS = 99


def test_the_best_of_several_replies_belongs_to_its_own_prompt():
    asked, ids = [p for p in PROMPTS[:2] for _ in range(3)], [[1], [9], [5], [8], [2], [7]]
    reward = lambda asked, ids: torch.tensor([float(row[0]) for row in ids])
    assert compare.best_of(reward, asked, ids, 3) == [[9], [8]]


def test_the_best_constant_is_best_over_all_prompts_and_not_where_it_was_given():
    def reward(asked, ids):  # reply 3 suits its own prompt only, reply 7 all a little; 5 never ends
        assert len(asked) == len(ids)
        pairs = [(p.ids, r[0]) for p, r in zip(asked, ids)]
        return torch.tensor(
            [9.0 if p == [r] == [3] else {7: 1.0, 5: 8.0}.get(r, 0.0) for p, r in pairs]
        )

    replies = [[i, EOS] if i != 5 else [5] for i in range(20)]
    scored = list(zip(replies, reward(PROMPTS, replies).tolist()))
    assert compare.best_constant(reward, PROMPTS, scored, EOS, 20) == [7, EOS]
    assert compare.best_constant(reward, PROMPTS, scored, EOS, 1) == [3, EOS]  # the only candidate
    assert compare.best_constant(reward, PROMPTS, [([5], 8.0)] * 20, EOS, 1) is None


def test_loss_is_the_mean_over_all_tokens_of_all_replies():
    torch.manual_seed(1)
    tokenizer = byte_tokenizer()
    gpt = GPT(
        GPTConfig(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2, d_model=8)
    )
    prompts, replies = [[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10]]
    nats = []
    for prompt, reply in zip(prompts, replies):
        for i, token in enumerate(reply):
            logits = gpt(torch.tensor([prompt + reply[:i]]))[0, -1]
            nats.append(-logits.log_softmax(-1)[token].item())
    found = compare.loss(gpt, tokenizer, prompts, replies)
    assert math.isclose(found, sum(nats) / 6, rel_tol=1e-5)


def test_a_reply_over_several_turns_is_read_whole():
    tokenizer = byte_tokenizer()
    asked = [("user", "q")]
    turns = [("assistant", "a"), ("user", "b"), ("assistant", "c")]
    for reply, said in ((turns, asked + turns), ("a", [*asked, ("assistant", "a")])):
        ids = compare.reply_ids(tokenizer, asked, reply)
        whole = dialogue.encode_pair(tokenizer, said[:-1], said[-1][1])
        assert dialogue.encode_prompt(tokenizer, asked) + ids == whole
        assert ids[-1] == tokenizer.eos_id


def test_where_rows_cannot_be_written_is_said_before_anything_is_sampled(tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("model,n\nsft,2\n")
    for to, why in ((table, "names other columns"), (tmp_path / "no" / "t.csv", "No such file")):
        cfg = compare.Config(to=str(to), models=["nowhere"])
        assert why in refused(capsys, compare.main, cfg)
    table.write_bytes(b"\xff\xfe\n")
    assert "--to" in refused(capsys, compare.main, compare.Config(to=str(table)))
    assert table.read_bytes() == b"\xff\xfe\n"


def test_variety_counts_repetitions_within_a_text_and_between_texts():
    found = compare.variety(["a b a b", "a b c d e", "a b c d f", "a b a b"])
    assert found == {"bigrams": (2 / 3 + 1 + 1 + 2 / 3) / 4, "distinct": 3 / 4, "starts": 2 / 4}
    assert compare.variety(["", "word"])["bigrams"] == 0


def test_people_are_shown_by_what_they_preferred(tmp_path):
    pairs = [{"prompt": "q", "chosen": "good", "rejected": "bad"}]
    thumbs = [{"prompt": "q", "completion": c, "label": n} for c, n in (("like", 1), ("hate", 0))]
    for name, records, texts in (
        ("pairs", pairs, ["good", "bad"]),
        ("thumbs", thumbs, ["like", "hate"]),
    ):
        files = [write_records(tmp_path / f"{name}.jsonl", records)]
        found = list(compare.people(compare.Config(data=files, val_data=files)))
        assert [t for _, _, (t,) in found] == texts
        assert [name for name, *_ in found] == ["preferred", "not preferred"]
