"""Records -> examples: what each stage takes from them."""

import re
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field

from nanorlhf.config import die, note, once, warn
from nanorlhf.data.files import read_records
from nanorlhf.data.values import ASKING, OF_COLUMNS, LeftOut, Misfit, all_said, as_turns, system_as

YES, NO = "1 1.0 true positive like", "0 0.0 false negative dislike"
LIKES = dict.fromkeys(YES.split(), 1.0) | dict.fromkeys(NO.split(), 0.0)
# what judgements are called
JUDGEMENT = r"(?i)reject|prefer|winner|better|rank|scor|rating|label|safe|judg|vote|thumb|\d$"
PLACE = re.compile(r":\d+$|\[\d+\]$")  # of a record in its file, at the end of its source
# what separates texts and turns in the templates of several models
SEPARATOR = re.compile(r"<\|\w+\|>|</s>|\[/?INST\]|<(?:start|end)_of_turn>")
TREE = {"message_id", "message_tree_id", "role", "text"}  # columns of a message of OpenAssistant's
# what `python -m nanorlhf label` notes beside a judgement, see human/journal.py
BOOKKEEPING = {"judgement_id", "models", "seed", "seconds", "time", "part", "repeat_of"}


# ---- reading -----------------------------------------------------------------------------------


def read(paths, stage, make, columns=()):
    """Yields make(source, record) for every record, in the keys of values.py and with its `shape`
    and its published `columns`. A Misfit exits 2. Warns of what is left out, and of judgements and
    separators that the stage makes no use of."""
    left_out, separators, unused = Counter(), defaultdict(Counter), defaultdict(set)
    for source, published in standing(read_records(paths, columns)):
        path = PLACE.sub("", source)
        separators[path].update(SEPARATOR.findall(str(published)))
        try:
            record = recognise(published, columns)
            unused[path] |= {record["kind"]} if "kind" in record else published.keys()
            yield make(source, record)
        except Misfit as misfit:
            die(f"{source}: {misfit}")
        except LeftOut as what:
            left_out[str(what)] += 1
    for path in separators:
        judgements = ", ".join(sorted(n for n in unused[path] if re.search(JUDGEMENT, n)))
        if judgements and stage in ("gpt", "sft", "ppo"):
            use = f"train_{stage}.py sees at most which reply is better; see --columns"
            once(warn, f"{path}: {judgements} may be judgements: {use}")
        if separators[path]:
            spelled = ", ".join(f"{mark} {n:,} times" for mark, n in separators[path].most_common())
            once(warn, f"{path}: text spells {spelled}: read as characters, and not as separators")
    for what, n in left_out.items():
        once(warn, f"{n} {what} left out")


def standing(records, keep=False):
    """Yields (source, record). Judgements that `python -m nanorlhf label` wrote come last, each
    once, however many copies of its file there are, without those that were taken back, and without
    BOOKKEEPING unless it is to be kept. So do messages that form trees, as one record for each
    prompt."""
    judgements, rows = defaultdict(dict), defaultdict(list)
    for source, record in records:
        if record.keys() >= TREE:
            rows[PLACE.sub("", source)].append((source, record))
        elif "judgement_id" not in record:
            yield source, record
        else:
            key = str(record["judgement_id"]), str(record.get("labeler"))
            if record.get("undone"):
                judgements.pop(key, None)
            elif not record.get("skipped") or keep and "ranks" in record:  # models that tie
                kept = {k: v for k, v in record.items() if keep or k not in BOOKKEEPING}
                # a rating and a thumb have a line for each reply
                if (reply := str(record.get("completion"))) in judgements[key]:
                    once(note, "judgements that are there twice, by their judgement_id, count once")
                judgements[key][reply] = source, kept
    for given in judgements.values():
        yield from given.values()
    for messages in rows.values():
        from nanorlhf.data.shapes import in_trees

        yield from in_trees(messages)


def recognise(published, columns=()):
    """A published record in the keys of values.py. Raises Misfit where no shape fits, or where a
    value is not what its column promises."""
    shape = OF_COLUMNS.get(frozenset(published.keys() - {"labeler"}))
    if shape is None:
        from nanorlhf.data.shapes import shape_of

        shape = shape_of(published, columns)
    try:
        return shape.read(published) | {"shape": shape, "columns": published}
    except (Misfit, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise Misfit(f"read as {shape.name!r} (columns {shape.keys}): {error}") from None


def read_texts(paths, columns=()):
    """Yields (key, text) for every document; any record is read as its text. Documents with the
    same key belong in the same split."""

    def make(source, record):
        messages = record.get("messages") or record.get("prompt") or []
        text = record["text"] if "text" in record else all_said(messages)
        return first_user_turn(messages) or text, text

    return read(paths, "gpt", make, columns)


def up_to(roles, dialogue):
    """The dialogue up to its last turn of one of the roles; nothing where it has none."""
    ends = [i for i, (role, _) in enumerate(dialogue, 1) if role in roles]
    return dialogue[: max(ends, default=0)]


def first_user_turn(messages):
    """What the user says first, by which the split is made: one question under several system texts
    is one. Where no user speaks, it is what the system says; "" where neither does."""
    turns = [*messages, *system_as("user", messages)]
    return next((content for role, content in turns if role == "user" and content), "")


# ---- examples ----------------------------------------------------------------------------------


@dataclass
class Example:
    """A dialogue: for SFT it ends with the assistant, for PPO and RM with the user. For RM also
    what was said to it, and what a labeler thinks of that."""

    messages: list  # [(role, content)]
    source: str
    completions: list = ()  # replies: text, or turns where one goes on over several
    target: list = ()  # a rank for each, 1 is best; or one rating (0..5) or label (0 or 1)
    labeler: str = ""
    columns: dict = field(default_factory=dict)  # of the file, under their new names

    @property
    def first_turn(self):
        """What the split goes by. Where the user says nothing, dialogues would all be one, so it is
        everything that is said."""
        replies = [turn for reply in self.completions for turn in as_turns(reply)]
        return first_user_turn(self.messages) or all_said(self.messages + replies)


def load_demonstrations(paths, columns=(), disliked="refuse"):
    """SFT: dialogues up to the last assistant turn that is learned. `disliked` says what becomes of
    replies that a person disliked: "refuse", "skip" or "learn"."""

    def make(source, record):
        if record.get("kind") == "thumbs" and disliked != "learn" and not like(record["target"][0]):
            if disliked == "skip":
                raise LeftOut("disliked replies")
            raise Misfit("a disliked reply: --disliked skip leaves such replies out, learn not")
        dialogue = record.get("messages", [])
        messages = up_to(("assistant",), dialogue)
        if not messages and any(role == "unlearned" for role, _ in dialogue):
            raise LeftOut("dialogues with no assistant turn to learn from")
        if not messages:
            raise Misfit("no assistant turn to learn from: no 'messages', 'completion' or 'chosen'")
        return Example(messages, source)

    examples = list(read(paths, "sft", make, columns))
    if n_silent := sum(role == "unlearned" for e in examples for role, _ in e.messages):
        once(warn, f"{n_silent} assistant turns carry no loss: they are empty, or have weight 0")
    if n_empty := sum(e.messages[-1] == ("assistant", "") for e in examples):
        once(warn, f"{n_empty} empty completions: only their end is learned")
    return examples


def load_prompts(paths, columns=()):
    """PPO: dialogues up to the last user turn, each once, with the columns of its first record."""

    def make(source, record):
        messages = up_to(ASKING, record.get("prompt") or record.get("messages") or [])
        if not messages:
            raise Misfit("no 'prompt' and no user turn to answer")
        return Example(messages, source, columns=record["columns"])

    prompts, first = list(read(paths, "ppo", make, columns)), {}
    for example in prompts:
        first.setdefault(str(example.messages), example)
    if repeated := len(prompts) - len(first):
        once(note, f"{repeated:,} of {len(prompts):,} prompts are repetitions, and left out")
    return list(first.values())


# ---- judgements --------------------------------------------------------------------------------


def load_feedback(paths, columns=()):
    """RM: (kind, examples), kind one of "rankings", "ratings", "thumbs"."""
    first = []

    def make(source, record):
        if "kind" not in record:
            needs = "chosen and rejected; or completions and ranks; or a completion and a rating"
            raise Misfit(f"no judgement in it; needs {needs} (0 to 5) or a label, like or dislike")
        kind, completions, target = record["kind"], record["completions"], record["target"]
        if any(as_turns(reply)[-1][0] in ASKING for reply in completions):
            raise Misfit("a judged reply must not end with a user turn")
        meaning = {"ratings": stars, "thumbs": like}.get(kind)
        target = [meaning(target[0])] if meaning else tied(completions, target)
        first[:] = first or [kind, source]
        if kind != first[0]:
            die(f"{source}: {kind}, but {first[1]} has {first[0]}; one kind of feedback per run")
        if kind == "rankings" and len(set(map(str, completions))) == 1:
            raise LeftOut("rankings of a text with itself, or alone,")
        return Example(record["prompt"], source, completions, target, record["labeler"])

    examples = list(read(paths, "rm", make, columns))
    return (first[0], examples) if examples else die(f"{paths[0]}: nothing to compare in it")


def tied(completions, ranks):
    """A text that is given twice is not better than itself: it gets the best of its ranks."""
    texts = list(map(str, completions))
    return [min(rank for text, rank in zip(texts, ranks) if text == mine) for mine in texts]


def stars(value):
    with suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and 0 <= float(value) <= 5:
            return float(value)
    raise Misfit(f"'rating' must be a number from 0 to 5, found {value!r}")


def like(value):
    if str(value).lower() not in LIKES:
        raise Misfit(f"'label' must be one of {', '.join(LIKES)}; found {value!r}")
    return LIKES[str(value).lower()]
