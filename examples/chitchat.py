"""Count whose words a chitchat model speaks: right intent, and which of the five voices.

    python examples/chitchat.py data/chitchat out_chat/sft out_chat/ppo

The folder holds prompts_test.jsonl ({"prompt", "intent"}) and answers.jsonl ({"intent", and five
voices}), as examples/make_data.py writes them. One sample per prompt at temperature 1. An answer
counts in every voice whose text it equals; the last columns are over intents whose five texts
differ.
"""

import sys

from nanorlhf.config import die
from nanorlhf.data import dialogue
from nanorlhf.data.files import read_records
from nanorlhf.run import checkpoint
from nanorlhf.sampling import sample_responses

VOICES = ("professional", "friendly", "witty", "caring", "enthusiastic")


def main(folder, models):
    answers = {r["intent"]: r for _, r in read_records([f"{folder}/answers.jsonl"])}
    tests = [r for _, r in read_records([f"{folder}/prompts_test.jsonl"])]
    distinct = {i for i, a in answers.items() if len({a[v] for v in VOICES}) == 5}
    known = {a[v] for a in answers.values() for v in VOICES}
    print(
        f"{len(tests)} held-out questions; {len(distinct)} of {len(answers)} intents have five "
        "different answers"
    )
    print(
        "shares of right intent, of another intent, of no answer at all | by voice | by voice "
        "where the five differ"
    )
    for model in models:
        gpt, found = checkpoint.load_gpt(model)
        tokenizer = found.tokenizer
        prompts = [dialogue.encode_prompt(tokenizer, [("user", r["prompt"])]) for r in tests]
        sampled = sample_responses(gpt.eval(), tokenizer, prompts, 64, seed=1)
        texts = [tokenizer.decode(ids) for ids in sampled]
        own = [{answers[r["intent"]][v] for v in VOICES} for r in tests]
        n = len(texts)
        right = sum(text in mine for text, mine in zip(texts, own)) / n
        other = sum(text in known - mine for text, mine in zip(texts, own)) / n
        every = [(r["intent"], text) for r, text in zip(tests, texts)]
        some = [(intent, text) for intent, text in every if intent in distinct]
        shares = [
            [sum(answers[i][v] == text for i, text in pairs) / len(pairs) for v in VOICES]
            for pairs in (every, some)
        ]
        columns = "  |  ".join(
            " ".join(f"{v[:6]} {s:.3f}" for v, s in zip(VOICES, share)) for share in shares
        )
        print(f"{model:18} {right:12.3f} {other:12.3f} {1 - right - other:9.3f}  | {columns}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        die("usage: python examples/chitchat.py DATA_FOLDER MODEL [MODEL ...]")
    main(sys.argv[1], sys.argv[2:])
