"""Count whose words a chitchat model speaks: right intent, and which of the five voices.

    python examples/chitchat.py data/chitchat out_chat/sft out_chat/ppo

The folder holds prompts_test.jsonl ({"prompt", "intent"}) and answers.jsonl ({"intent", and a text
for each voice}), as examples/make_data.py writes them. A model gives one sample per prompt at
temperature 1. The sample counts for every voice whose text it equals. As some voices share a text,
the last columns are over those intents whose five texts differ.
"""

import sys

from nanorlhf.config import die
from nanorlhf.data import dialogue
from nanorlhf.data.files import read_records
from nanorlhf.run import checkpoint
from nanorlhf.sampling import sample_responses

VOICES = ("professional", "friendly", "witty", "caring", "enthusiastic")


def main(folder, models):
    voices = {r["intent"]: r for _, r in read_records([f"{folder}/answers.jsonl"])}
    tests = [r for _, r in read_records([f"{folder}/prompts_test.jsonl"])]
    texts_of = {intent: {a[v] for v in VOICES} for intent, a in voices.items()}
    distinct = {intent for intent, texts in texts_of.items() if len(texts) == 5}
    all_texts = set().union(*texts_of.values())
    print(
        f"{len(tests)} held-out questions; {len(distinct)} of {len(voices)} intents have five "
        "different answers"
    )
    print(
        "shares of right intent, of another intent, of no answer at all | by voice | by voice "
        "where the five differ"
    )
    for model in models:
        gpt, loaded = checkpoint.load_model(model, "lm")
        tokenizer = loaded.tokenizer
        prompts = [dialogue.encode_prompt(tokenizer, [("user", r["prompt"])]) for r in tests]
        sampled = sample_responses(gpt.eval(), tokenizer, prompts, 64, seed=1)
        replies = [(r["intent"], tokenizer.decode(ids)) for r, ids in zip(tests, sampled)]
        right = share(text in texts_of[intent] for intent, text in replies)
        other = share(text in all_texts - texts_of[intent] for intent, text in replies)
        in_distinct = [(intent, text) for intent, text in replies if intent in distinct]
        columns = []
        for some in (replies, in_distinct):
            shares = {v: share(voices[intent][v] == text for intent, text in some) for v in VOICES}
            columns.append(" ".join(f"{v[:6]} {x:.3f}" for v, x in shares.items()))
        print(
            f"{model:18} {right:12.3f} {other:12.3f} {1 - right - other:9.3f}  "
            f"| {'  |  '.join(columns)}"
        )


def share(claims):
    """The part of the claims that is true."""
    claims = list(claims)
    return sum(claims) / len(claims)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        die("usage: python examples/chitchat.py DATA_FOLDER MODEL [MODEL ...]")
    main(sys.argv[1], sys.argv[2:])
