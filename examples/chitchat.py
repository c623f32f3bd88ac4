"""Whose words a chitchat model speaks: right intent, and which of the five voices, as judges.

    export CHITCHAT=data/chitchat       # answers.jsonl is there, as examples/make_data.py writes it
    D=$CHITCHAT/demonstrations.jsonl P=$CHITCHAT/prompts_test.jsonl C=examples/chitchat.py
    python -m nanorlhf evaluate --data $D --val_data $P --models out_chat/sft out_chat/ppo \\
        --out out_chat --judge $C:right $C:other $C:caring

A response is judged by the text that it equals. Some voices share a text: the judges of voices
leave out all intents but those whose five texts differ.
"""

import json
import os
from functools import cache, partial


@cache
def answers():
    """{intent: {voice: text}}"""
    with open(os.path.join(os.environ.get("CHITCHAT", "data/chitchat"), "answers.jsonl")) as file:
        return {record.pop("intent"): record for record in map(json.loads, file)}


def right(responses, intent):
    """One of the five answers to the question."""
    return [float(text in answers()[i].values()) for text, i in zip(responses, intent)]


def other(responses, intent):
    """An answer to another question."""
    texts = {text for voices in answers().values() for text in voices.values()}
    return [float(text in texts) - x for text, x in zip(responses, right(responses, intent))]


def spoken(voice, responses, intent):
    """The answer to the question in this voice."""
    told = [(answers()[i], text) for text, i in zip(responses, intent)]
    return [float(a[voice] == text) if len({*a.values()}) == 5 else None for a, text in told]


professional, friendly = partial(spoken, "professional"), partial(spoken, "friendly")
witty, caring = partial(spoken, "witty"), partial(spoken, "caring")
enthusiastic = partial(spoken, "enthusiastic")
