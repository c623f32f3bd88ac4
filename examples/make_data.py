"""Make the files of the docs' runs on real data, from what their authors publish.

    python examples/make_data.py                       # everything, into data/
    python examples/make_data.py data --only chitchat  # one of chitchat, hh, text, sentiment

Downloads are kept in FOLDER/published under the names in published.txt, and are not fetched again:
on a machine without a network, put the files there yourself. docs/data.md says who made what, and
under which licence.

    chitchat/   demonstrations, rankings, prompts_test, answers (.jsonl)
    hh/         harmless-base.jsonl.gz
    text/       childrens_classics.txt.gz, fairytales.txt.gz, fairytale_questions.jsonl.gz
    sentiment/  rt_polarity.jsonl.gz, vader_lexicon.txt
"""

import csv
import gzip
import io
import json
import random
import re
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from nanorlhf.config import arg, die, from_cli, reason
from nanorlhf.machine import durable

FOLDERS = ("chitchat", "hh", "text", "sentiment")
VOICES = ("professional", "friendly", "witty", "caring", "enthusiastic")
BEST_FIRST = ("caring", "friendly", "enthusiastic", "professional", "witty")
# matches parts of words, as it did for the recorded runs: a question with "speech" is left out too
RUDE = re.compile(r"poop|fart|pee|shit|kill|sex|bang|screw|suicide|ass\b", re.I)
# file name -> address, a line each, with a tab between them
LINES = Path(__file__).with_name("published.txt").read_text().splitlines()
PUBLISHED = dict(line.split("\t") for line in LINES)
CLASSICS = [name for name in PUBLISHED if name.endswith(".md")]


@dataclass
class Config:
    """Download the public data of the docs' runs and write it as the stages read it."""

    folder: str = arg("data", "where the files go", positional=True)
    only: list[str] = arg([], "which; default: all", choices=FOLDERS)


def main(cfg):
    folder = Path(cfg.folder)
    makers = dict(zip(FOLDERS, (chitchat, hh, text, sentiment)))
    for name in cfg.only or FOLDERS:
        for file, content in makers[name](folder / "published").items():
            path = folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(content, mtime=0) if file.endswith(".gz") else content)
            print(f"{path}: {len(content):,} bytes{' unpacked' if file.endswith('.gz') else ''}")


def published(folder, name):
    """The bytes of a published file, which is downloaded if it is not in the folder yet."""
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with urllib.request.urlopen(PUBLISHED[name], timeout=60) as page:
                durable.write(path, lambda partial: partial.write_bytes(page.read()))
        except OSError as error:
            die(f"{PUBLISHED[name]}: {reason(error)}; or put the file at {path} yourself")
    return path.read_bytes()


def json_lines(records):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


# ---- one function per folder: {file: bytes} ----------------------------------------------------


def chitchat(folder):
    """Questions that people put to bots. Each of 89 intents has several questions, and an answer in
    each of five voices. A demonstration is one of the five, at random. A ranking has six: the
    answers in the order of BEST_FIRST, a rule made up here and no person's judgement, and last an
    answer to another question."""
    sheets = {v: questions_and_answers(published(folder, f"qna_chitchat_{v}.qna")) for v in VOICES}
    answer = {v: {q: a for questions, a in sheet for q in questions} for v, sheet in sheets.items()}
    rng, demonstrations, rankings, tests, answers = random.Random(1), [], [], [], []
    taken = set()  # a question that two intents share belongs to the first
    for questions, _ in sheets["witty"]:
        voices = {v: answer[v][questions[0]] for v in VOICES}
        answers.append({"intent": len(answers), **voices})
        for question in questions:
            if RUDE.search(question) or question in taken:
                continue
            taken.add(question)
            if crc32(question.encode()) % 10 == 0:
                tests.append({"prompt": question, "intent": len(answers) - 1})
                continue
            style = rng.choice(VOICES)
            demonstrations.append({"prompt": question, "completion": voices[style], "style": style})
            other, _ = rng.choice([s for s in sheets["witty"] if s[0] is not questions])
            best_first = [voices[v] for v in BEST_FIRST] + [answer[rng.choice(VOICES)][other[0]]]
            order = rng.sample(range(6), 6)
            ranking = {"prompt": question, "completions": [best_first[i] for i in order]}
            rankings.append(ranking | {"ranks": [i + 1 for i in order]})
    rng.shuffle(demonstrations)
    rng.shuffle(rankings)
    files = {"demonstrations": demonstrations, "rankings": rankings}
    files |= {"prompts_test": tests, "answers": answers}
    return {f"{name}.jsonl": json_lines(records) for name, records in files.items()}


def questions_and_answers(qna):
    """[(questions, answer)] of a .qna file. An entry is a line `# ? question`, lines `- another
    wording`, filters, and the answer between two fences."""
    entries = []
    for block in re.split(r"^# \? ", qna.decode("utf-8-sig"), flags=re.M)[1:]:
        head, _, rest = block.partition("```markdown\n")
        lines = head.split("**Filters")[0].splitlines()
        questions = [line.strip().removeprefix("- ") for line in lines if line.strip()]
        entries.append((questions, rest.partition("\n```")[0].strip()))
    return entries


def hh(folder):
    """Pairs of replies of which people found one less harmful, as they are published."""
    pairs = gzip.decompress(published(folder, "harmless-base-test.jsonl.gz"))
    return {"harmless-base.jsonl.gz": pairs}


def text(folder):
    books = [plain_text(published(folder, name).decode()) for name in CLASSICS]
    tales, questions = fairy_tales(published(folder, "FairytaleQAData.tar.gz"))
    return {
        "childrens_classics.txt.gz": documents(books),
        "fairytales.txt.gz": documents(tales),
        "fairytale_questions.jsonl.gz": json_lines(questions),
    }


def documents(texts):
    return "\n<|endoftext|>\n".join(texts).encode() + b"\n"


def plain_text(markdown):
    """A book without its title page and without Markdown's marks."""
    body = markdown.partition("\n-------\n")[2] or markdown
    body = re.sub(r"^#+ *(.*)\n+", r"\1\n", body, flags=re.M)
    body = re.sub(r"(?<!\w)([_*]+)(\S(?:.*?\S)?)\1(?!\w)", r"\2", body)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", body, flags=re.M)).strip()


def unpacked(tarball):
    """{name: bytes} of the files in it."""
    with tarfile.open(fileobj=io.BytesIO(tarball)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def fairy_tales(tarball):
    """(tales, questions) of the training and validation sets. A question's prompt begins with the
    sections of the tale that it is about."""
    one_line = lambda words: " ".join(words.split())
    rows = lambda table: csv.DictReader(io.StringIO(table.decode("utf-8-sig"), newline=""))
    tales, questions, files = [], [], unpacked(tarball)
    for split in ("train", "val"):
        for path in sorted(p for p in files if f"-train-split/section-stories/{split}/" in p):
            sections = {row["section"]: one_line(row["text"]) for row in rows(files[path])}
            tales.append("\n".join(sections.values()))
            sheet = path.replace("section-stories", "questions").replace("-story.", "-questions.")
            for row in rows(files[sheet]):
                numbers = [s.strip() for s in row["cor_section"].split(",")]
                passage = "\n".join(sections[s] for s in numbers if s in sections)
                prompt = f"{passage}\n\n{one_line(row['question'])}"
                questions.append({"prompt": prompt, "completion": one_line(row["answer1"])})
    return tales, questions


def sentiment(folder):
    """Sentences of film reviews with what their writers thought, and VADER's lexicon."""
    records, files = [], unpacked(published(folder, "rt-polaritydata.tar.gz"))
    of_suffix = {Path(name).suffix: content for name, content in files.items()}
    for suffix, label in ((".pos", True), (".neg", False)):
        lines = of_suffix[suffix].decode("cp1252", errors="replace").split("\n")
        records += [{"text": x.strip(), "label": label} for x in lines if x.strip()]
    lexicon = published(folder, "vader_lexicon.txt")
    return {"rt_polarity.jsonl.gz": json_lines(records), "vader_lexicon.txt": lexicon}


if __name__ == "__main__":
    main(from_cli(Config))
