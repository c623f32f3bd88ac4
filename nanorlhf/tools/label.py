"""Ask people what they think of responses: on a page in the browser, or in the terminal."""

import sys
import time
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from nanorlhf.config import arg, die, note, reason
from nanorlhf.data.files import format_of, write_records
from nanorlhf.human import simulated, terminal, web
from nanorlhf.human.journal import KINDS, Journal
from nanorlhf.human.questions import read_questions
from nanorlhf.human.samples import SampleConfig, read_samples, sampled
from nanorlhf.human.survey import Survey

GUIDELINES = (
    "A good reply does what was asked, says what is true and harms nobody. Of two good ones, the "
    "better is the one that you would rather have been given."
)


@dataclass
class Config(SampleConfig):
    """Judge responses: of models, which answer first, or of a file that `sample` wrote. Each answer
    is in --to, for `train_rm.py --data`, as soon as it is given."""

    IDLE = "host allow_host port once: terminal"
    to: str = arg("", "file that answers are added to; default: out/feedback/MODELS-FEEDBACK.jsonl")
    feedback: str = arg("comparisons", "what is asked for", choices=tuple(KINDS))
    repeat: float = arg(0.0, "share of the questions that are asked a second time", high=1)
    guidelines: str = arg("", "a text file, shown beside each question; default: a sentence")
    labeler: str = arg("", "your name; 'simulated': a labeler of the embedded world answers")
    terminal: bool = arg(False, "ask here, and not on a page")
    once: bool = arg(False, "end when a labeler has answered everything")
    host: str = arg("127.0.0.1", "address to listen at; beyond this machine the page needs a token")
    allow_host: list[str] = arg([], "names by which a proxy shows the page; needs the token, too")
    port: int = arg(8000, "port of the page; 0: a free one", low=0, high=65535)


def main(cfg):
    with redirect_stdout(sys.stderr):  # the first line of stdout is the page's address
        survey, guidelines = prepare(cfg)
    if cfg.labeler == "simulated":
        return simulated.answer_all(survey, cfg.labeler, cfg.seed)
    if cfg.terminal:
        with suppress(EOFError):  # the end of input leaves
            terminal.ask(survey, cfg.labeler, guidelines)
        return
    app = web.survey_app(survey, guidelines)
    server, address = web.listen(app, cfg.host, cfg.port, cfg.labeler, cfg.allow_host)
    print(address, flush=True)
    note(f"answers go to {survey.journal.path}; Ctrl-C ends, and the same command goes on later")
    Thread(target=server.run, daemon=True).start()
    while not (cfg.once and any(not survey.todo(name) for name in list(survey.journal.ids))):
        time.sleep(1)  # a signal ends it
    time.sleep(3)  # the page hears that nothing is left


def prepare(cfg):
    """(Survey, the guidelines' text)."""
    if not cfg.terminal and cfg.labeler != "simulated":
        web.check_packages()
    try:
        guidelines = Path(cfg.guidelines).read_text("utf-8") if cfg.guidelines else GUIDELINES
    except (OSError, ValueError) as error:
        die(f"--guidelines {cfg.guidelines}: {reason(error)}")
    names = "-".join(Path(m.removesuffix(".jsonl")).name for m in cfg.models)
    to = Path(cfg.to or f"out/feedback/{names}-{cfg.feedback}.jsonl")
    journal = Journal(to, cfg.feedback)
    questions = read_questions(samples_of(cfg, to), cfg.feedback)
    return Survey(questions, journal, cfg.feedback, cfg.seed, cfg.repeat), guidelines


def samples_of(cfg, to):
    """The file of samples that is asked about: the one that is named, or one beside --to that is
    made now, unless it is there."""
    if len(cfg.models) == 1 and Path(cfg.models[0]).is_file() and format_of(cfg.models[0]):
        return cfg.models[0]
    path = to.with_suffix(".samples.jsonl")
    if not path.exists():
        write_records(path, sampled(cfg))
        return path
    first = next(read_samples(path))
    if set(first["models"]) != set(cfg.models) or first["seed"] != cfg.seed:
        die(f"{path}: samples of other models, or another --seed; remove it, or name another --to")
    note(f"asks about {path}, sampled before; remove it to sample anew")
    return path
