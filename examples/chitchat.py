"""Count whose words a chitchat model speaks: right intent, and which of the five voices.

    python examples/chitchat.py data/chitchat out_chat/sft out_chat/ppo

The folder holds prompts_test.jsonl ({"prompt", "intent"}) and answers.jsonl ({"intent", and a text
for each voice}), as examples/make_data.py writes them. A model gives one sample per prompt at
temperature 1. The sample counts for every voice whose text it equals. As some voices share a text,
the last columns are over those intents whose five texts differ.
"""

import sys
from statistics import fmean

from nanorlhf import generate
from nanorlhf.config import die
from nanorlhf.data.files import read_records
from nanorlhf.loading import load_gpt

VOICES = ("professional", "friendly", "witty", "caring", "enthusiastic")


def main(folder, models):
    voices = {r["intent"]: r for _, r in read_records([f"{folder}/answers.jsonl"])}
    tests = [r for _, r in read_records([f"{folder}/prompts_test.jsonl"])]
    texts_of = {intent: {a[v] for v in VOICES} for intent, a in voices.items()}
    differ = {intent for intent, texts in texts_of.items() if len(texts) == 5}
    all_texts = set().union(*texts_of.values())
    print(f"{len(tests)} held-out questions; in {len(differ)} of {len(voices)} intents all differ")
    print("shares of right intent, another intent, no answer at all | by voice | where all differ")
    for model in models:
        gpt, checkpoint = load_gpt(model)
        texts = generate(gpt.eval(), checkpoint.tokenizer, [r["prompt"] for r in tests], 64)
        replies = [(r["intent"], text) for r, text in zip(tests, texts)]
        right = fmean(text in texts_of[intent] for intent, text in replies)
        other = fmean(text in all_texts - texts_of[intent] for intent, text in replies)
        columns = [f"{right:12.3f} {other:12.3f} {1 - right - other:9.3f}"]
        for some in (replies, [(intent, text) for intent, text in replies if intent in differ]):
            shares = {v: fmean(voices[intent][v] == text for intent, text in some) for v in VOICES}
            columns.append(" ".join(f"{v[:6]} {share:.3f}" for v, share in shares.items()))
        print(f"{model:18} {'  |  '.join(columns)}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        die("usage: python examples/chitchat.py DATA_FOLDER MODEL [MODEL ...]")
    main(sys.argv[1], sys.argv[2:])
