"""Flags: one dataclass field each, typed and documented; a user's mistake exits 2."""

import dataclasses
import os
import signal
import unicodedata
from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
import train_ppo
import train_rm
import train_sft
from experiments import train_dpo, train_lora, train_rft, train_rloo
from nanorlhf import config
from nanorlhf.config import TrainConfig, arg, die, from_cli, note, visible, warn
from nanorlhf.data import world
from nanorlhf.tools import agreement, bench, chat, evaluate, exercise, label, sample
from tests import helpers


@dataclass
class Config(TrainConfig):
    """Says what the stage does."""

    out_dir: str = arg("out/mine", "another default for a shared flag")
    data: list[str] = arg([], "files")
    sizes: list[int] = arg([1, 2], "numbers")
    gamma: float = arg(1.0, "discount per token")
    whiten: bool = arg(True, "a flag that starts on")
    kind: str = arg("k1", "an estimator", choices=("k1", "k2"))


@dataclass
class Chat:
    """A command that takes a folder."""

    model: str = arg("out/ppo", "checkpoint folder", positional=True)
    temperature: float = arg(1.0, "of sampling")


@pytest.fixture(autouse=True)
def keep_interrupt_handler():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        from_cli(Config, argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_no_flag_gives_the_defaults():
    assert from_cli(Config, []) == Config()
    assert from_cli(TrainConfig, []) == TrainConfig()


def test_a_flag_arrives_with_its_fields_type():
    cfg = from_cli(Config, ["--seed", "7", "--gamma", "1", "--out_dir", "3", "--kind", "k2"])
    assert [type(x) for x in (cfg.seed, cfg.gamma, cfg.out_dir)] == [int, float, str]
    assert (cfg.seed, cfg.gamma, cfg.out_dir, cfg.kind) == (7, 1.0, "3", "k2")
    assert from_cli(Config, ["--resume"]).resume is True
    assert from_cli(Config, ["--no-whiten", "--no-resume"]) == Config(whiten=False)


@pytest.mark.parametrize(
    "argv, data, sizes",
    [
        ("--data", [], [1, 2]),
        ("--data a --sizes 3 --data b c --sizes=4", ["a", "b", "c"], [3, 4]),
        ("--sizes 1 2 --sizes 1", [], [1, 2, 1]),  # given twice: all values, none of the default
    ],
)
def test_a_list_flag_takes_none_one_or_several_values_of_its_type(argv, data, sizes):
    cfg = from_cli(Config, argv.split())
    assert (cfg.data, cfg.sizes) == (data, sizes)


def test_a_positional_field_is_a_word_without_a_flag(capsys):
    assert from_cli(Chat, []) == Chat("out/ppo", 1.0)
    assert from_cli(Chat, ["out/sft"]).model == "out/sft"
    assert from_cli(Chat, ["--temperature", "0", "x"]) == Chat("x", 0.0)
    for argv in (["x", "y"], ["--model", "x"]):
        with pytest.raises(SystemExit) as stop:
            from_cli(Chat, argv)
        assert stop.value.code == 2


def test_a_stage_overrides_a_shared_default_and_keeps_the_others():
    assert Config().out_dir == "out/mine"
    shared = {field.name for field in dataclasses.fields(TrainConfig)} - {"out_dir"}
    assert all(getattr(Config(), name) == getattr(TrainConfig(), name) for name in shared)


def test_instances_do_not_share_their_lists():
    for make in (Config, lambda: from_cli(Config, [])):
        a, b = make(), make()
        a.sizes.append(3)
        a.data.append("x")
        assert b.sizes == [1, 2] and b.data == [] and Config().sizes == [1, 2]


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--nonsense", "1"], "--nonsense"),
        (["stray"], "stray"),
        (["--max_steps", "1e3"], "1e3"),
        (["--max_steps", "1.5"], "1.5"),
        (["--gamma", "high"], "high"),
        (["--sizes", "1", "two"], "two"),
        (["--learn", "0.1"], "--learn"),  # no abbreviations: a new flag would change their meaning
        (["--kind", "k3"], "k1"),
        (["--dtype", "float16"], "bfloat16"),
        (["--seed"], "--seed"),
        (["--resume=maybe"], "--resume"),
    ],
)
def test_a_bad_flag_exits_2_and_is_named(capsys, argv, named):
    assert named in refused(capsys, *argv)


@pytest.mark.parametrize("config_class", [TrainConfig, Config])
def test_help_lists_every_flag_with_its_help_and_default(config_class, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stop:
        from_cli(config_class, ["--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(config_class.__doc__ in line for line in lines)
    for field in dataclasses.fields(config_class):
        default = getattr(config_class(), field.name)
        wanted = (field.metadata["help"], f"(default: {default})")
        about = [line for line in lines if line.strip().startswith("--" + field.name)]
        assert about and field.metadata["help"], f"--{field.name} has no help"
        text = " ".join(lines[lines.index(about[0]) :][:2])  # long flags: the help is a line below
        assert all(w in text for w in wanted), (field.name, text)


def test_help_groups_the_flags_of_every_stage(capsys):
    """A name in a group is a flag of some stage; a flag in none is the stage's own."""
    configs = [m.Config for m in (train_gpt, train_sft, train_rm, train_ppo)]
    flags = {field.name for c in configs for field in dataclasses.fields(c)}
    assert {name for names in config.GROUPS.values() for name in names.split()} <= flags
    with pytest.raises(SystemExit):
        from_cli(train_ppo.Config, ["--help"])
    options = capsys.readouterr().out.split("options:")[1]
    places = [options.index(f"\n  {x} ") for x in ("--kl_coef", "--gamma", "--val_data", "--dtype")]
    titles = [options.index(f"\n{title}:") for title in config.GROUPS]
    assert sorted(places + titles) == [x for pair in zip(titles, places) for x in pair]


SFTS = [train_sft.Config, train_lora.Config]
RMS = [train_rm.Config, train_lora.RMConfig]
PPOS = [train_ppo.Config, train_lora.PPOConfig]
GPT, DPO, RFT = [train_gpt.Config], [train_dpo.Config], [train_rft.Config]
RLOO, EVALUATE, LABEL = [train_rloo.Config], [evaluate.Config], [label.Config]
IDLE = [  # programs, the words that are typed, the last flag of which nothing reads
    (GPT, "--init a --tokenizer bytes"),
    (GPT, "--init a --vocab_size 300"),
    (GPT, "--init a --arch llama"),
    (GPT, "--init a --n_layer 3"),
    (GPT, "--init a --n_head 8"),
    (GPT, "--init a --d_model 64"),
    (GPT, "--tokenizer gpt2 --vocab_size 300"),
    (GPT, "--tokenizer bytes --vocab_size 300"),
    (GPT, "--data a --documents 9"),
    (GPT, "--init= --template chatml"),
    (SFTS, "--data a --demonstrations 9"),
    ([*GPT, *SFTS, *RMS, *PPOS, *RLOO, *DPO, *RFT], "--data --columns a=b"),
    (SFTS, "--data --disliked skip"),
    (RFT, "--val_data --disliked skip"),
    ([*SFTS, *RMS, *DPO, *RFT], "--max_steps 9 --epochs 3"),
    (RMS, "--data a --feedback ratings"),
    ([*RMS, *RFT], "--data a --prompts 9"),
    (RMS, "--data a --heldout_prompts 9"),
    (PPOS, "--critic none --vf_coef 0.5"),
    (PPOS, "--critic none --cliprange_value 0.2"),  # its default, too, is typed in vain
    (PPOS, "--vf_coef 0 --cliprange_value 0.3"),
    ([*PPOS, *RLOO], "--kl_coef 0 --kl_target 6"),
    ([*PPOS, *RLOO], "--score_unended --missing_eos_score -2"),
    ([*PPOS, *RLOO], "--ptx_coef 0 --ptx_data a"),
    (EVALUATE, "--data a --labeler judge_1"),
    (EVALUATE, "--data a --shots 3"),
    (EVALUATE, "--data --val_data a"),
    (EVALUATE, "--data --lm a"),
    (EVALUATE, "--data a --best_of_prompts 9"),
    (LABEL, "--terminal --host a"),
    (LABEL, "--terminal --allow_host a"),
    (LABEL, "--terminal --port 9"),
    (LABEL, "--terminal --once"),
    ([*LABEL, sample.Config], "--data --columns a=b"),
    ([chat.Config], "--temperature 0 --seed 2"),
    ([chat.Config], "--temperature 0 --top_k 9"),
    ([chat.Config], "--temperature 0 --top_p 0.9"),
    ([bench.Config], "--init a --n_layer 2"),
    ([bench.Config], "--init a --d_model 64"),
    ([bench.Config], "--init a --n_head 2"),
    ([bench.Config], "--init a --vocab_size 300"),
    ([agreement.Config], "--reward= --device cpu"),
    ([agreement.Config], "--reward= --dtype float32"),
    ([exercise.Config], "--hint 1 --solution"),
]


@pytest.mark.parametrize("programs, words", IDLE, ids=[words for _, words in IDLE])
def test_a_flag_that_idles_beside_another_is_refused_and_both_are_named(programs, words, capsys):
    other, flag = [w.partition("=")[0] for w in words.split() if w.startswith("--")]
    words = words.replace("judge_1", next(iter(world.PANEL))).split()
    beside = words[: next(i for i, word in enumerate(words) if word.startswith(flag))]
    for program in programs:
        said = helpers.refused(capsys, from_cli, program, words)
        assert f"{flag} does nothing where {other} is " in said, program
        from_cli(program, beside)  # by itself the other one is taken, whatever the defaults are


def test_every_rule_of_idle_flags_is_typed_above():
    """And a program that is made in Python, or goes on, has them at their defaults."""
    rules = {}
    for programs, words in IDLE:
        for program in programs:
            flag = [w for w in words.split() if w.startswith("--")][1]
            rules.setdefault(program, set()).add(flag.partition("=")[0][2:])
    for program, typed in rules.items():
        offered = {field.name for field in dataclasses.fields(program) if field.init}
        tables = [vars(c)["IDLE"] for c in program.__mro__ if "IDLE" in vars(c)]
        flags = {f for t in tables for rule in t.split("; ") for f in rule.split(": ")[0].split()}
        assert flags & offered == typed, program
    assert train_ppo.Config(critic="none", vf_coef=0.5).vf_coef == 0.5


def test_die_is_one_line_on_stderr_and_exit_2(capsys):
    with pytest.raises(SystemExit) as stop:
        die("data.jsonl:3: not JSON")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: data.jsonl:3: not JSON\n")


def test_control_c_exits_130_with_one_line(capsys):
    from_cli(Config, [])
    with pytest.raises(SystemExit) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"  # a tool has nothing to resume


@given(st.text())
def test_what_is_visible_moves_no_cursor_and_is_otherwise_as_it_was(text):
    shown = visible(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    if text.isprintable():
        assert shown == text
    assert visible("a\tb\nشمس 👩\u200d🔬") == "a\tb\nشمس 👩\u200d🔬"


@pytest.mark.parametrize("say", [note, warn, die])
def test_what_a_program_says_of_a_file_is_not_obeyed(say, capsys):
    with suppress(SystemExit):
        say("f.jsonl: column '\x1b[2J'")
    printed = "".join(capsys.readouterr())
    assert "column '\\x1b[2J'" in printed and "\x1b" not in printed
