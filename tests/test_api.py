"""`import nanorlhf`: what the stages have made, from Python."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nanorlhf
from nanorlhf import scoring
from nanorlhf.bpe import train_bpe
from nanorlhf.config import Mistake, TrainConfig, die
from nanorlhf.data import dialogue
from nanorlhf.data.examples import Example
from nanorlhf.model import GPT, ActorCritic, GPTConfig, RewardModel
from nanorlhf.run import checkpoint
from nanorlhf.sampling import sample_responses
from nanorlhf.scoring import make_scorer
from nanorlhf.tokenizer import byte_tokenizer
from nanorlhf.tools import export

ROOT = Path(__file__).parents[1]
BYTES, CPU = byte_tokenizer(), torch.device("cpu")
CONTEXT = 48
PROMPTS = ["a fox", "", "tell me of the sea", "é🦊 <|user|>"]
TEXTS = ["once", "", "the end. " * 3, "<|endoftext|>"]
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye?"},
]
TURNS = [("user", "be brief\n\nhi"), ("assistant", "yo"), ("user", "bye?")]


def save(folder, stage, model):
    cfg = TrainConfig(out_dir=str(folder / stage))
    config = model.config if stage in ("gpt", "sft") else model.gpt.config
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    details = {"chat": stage != "gpt"}
    checkpoint.save(cfg, stage, 1, model.state_dict(), {}, BYTES, config, details=details)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with small checkpoints of all stages, and of a reward model that is not finished."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(1)
    new = lambda: GPT(GPTConfig(BYTES.vocab_size, CONTEXT, 2, 2, 16, dropout=0.5))
    judge = RewardModel(new())
    (folder / "unfinished").mkdir()
    save(folder / "unfinished", "rm", judge)
    judge.score_mean.fill_(0.5)
    judge.score_sd.fill_(2.0)
    models = {"gpt": new(), "sft": new(), "rm": judge, "ppo": ActorCritic(new())}
    for stage, model in models.items():
        save(folder, stage, model)
    return folder


def load(folder, dtype="float32"):
    return nanorlhf.load(folder, device="cpu", dtype=dtype)


# ---- load --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["gpt", "sft", "rm", "ppo"])
def test_load_gives_the_model_of_any_stage_ready_to_use(made, stage):
    model, tokenizer = load(made / stage, "bfloat16")
    assert type(model) is (RewardModel if stage == "rm" else GPT) and tokenizer == BYTES
    assert tokenizer.chat == (stage != "gpt")
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    weights = checkpoint.load(made / stage).weights
    name = "gpt.wte.weight" if stage in ("rm", "ppo") else "wte.weight"
    gpt = model.gpt if stage == "rm" else model
    assert torch.equal(gpt.wte.weight, weights[name].bfloat16())


def test_load_takes_a_step_folder_and_torchs_own_names(made):
    model, _ = nanorlhf.load(made / "sft" / "step_1", torch.device("cpu"), torch.float32)
    assert model.wte.weight.dtype == torch.float32


def test_load_takes_what_init_takes(made, tmp_path, capsys):
    for package in ("safetensors", "tokenizers", "jinja2"):
        pytest.importorskip(package)
    for stage in ("gpt", "ppo", "rm"):
        export.main(export.Config(str(made / stage), str(tmp_path / stage)))
    capsys.readouterr()
    for stage, chat in (("gpt", False), ("ppo", True)):
        model, tokenizer = load(tmp_path / stage)
        assert tokenizer.chat == chat and tokenizer.vocab_size == BYTES.vocab_size
        assert [tokenizer.encode(text) for text in TEXTS] == [BYTES.encode(text) for text in TEXTS]
        assert (tokenizer.pad_id, tokenizer.ends) == (BYTES.pad_id, BYTES.ends)
        assert tokenizer.dialogue(TURNS, answer=True) == BYTES.dialogue(TURNS, answer=True)
        assert torch.equal(model.wpe.weight, load(made / stage)[0].wpe.weight)
    one_line(capsys, "a reward model", lambda: load(tmp_path / "rm"))


# ---- generate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.5, "top_k": 9, "top_p": 0.9}])
def test_generate_is_what_sample_responses_writes(made, filters):
    model, tokenizer = load(made / "sft")
    ids = [dialogue.encode_prompt(BYTES, [("user", p)]) for p in PROMPTS]
    found = sample_responses(model, BYTES, ids, 12, 3, 0, **filters)
    wanted = [BYTES.decode(row) for row in found]
    assert nanorlhf.generate(model, tokenizer, PROMPTS, 12, seed=3, **filters) == wanted
    assert len(set(wanted)) == len(PROMPTS)


def test_the_noise_of_a_prompt_does_not_depend_on_the_others(made):
    model, tokenizer = load(made / "ppo")
    whole = nanorlhf.generate(model, tokenizer, PROMPTS, 12)
    assert nanorlhf.generate(model, tokenizer, PROMPTS[:2], 12) == whole[:2]
    others = [PROMPTS[0], "x" * 20, *PROMPTS[2:]]
    found = nanorlhf.generate(model, tokenizer, others, 12)
    assert found[0] == whole[0] and found[2:] == whole[2:]
    a, b = nanorlhf.generate(model, tokenizer, ["same", "same"], 12)
    assert a != b
    assert nanorlhf.generate(model, tokenizer, PROMPTS, 12, seed=2) != whole


def asked(monkeypatch, model, tokenizer, prompts, **flags):
    """The ids that the model is given."""
    given = []
    monkeypatch.setattr("nanorlhf.sampling.sample_responses", lambda *a, **k: given.append(a) or [])
    nanorlhf.generate(model, tokenizer, prompts, **flags)
    return given[0][2]


def test_a_chat_model_reads_the_template_and_a_base_model_plain_text(made, monkeypatch):
    prompts = ["hi", CHAT]
    chat = asked(monkeypatch, *load(made / "sft"), prompts, max_new_tokens=8)
    assert chat == [dialogue.encode_prompt(BYTES, t) for t in ([("user", "hi")], TURNS)]
    base = asked(monkeypatch, *load(made / "gpt"), prompts, max_new_tokens=8)
    text = "be brief\n\nhi\nyo\nbye?"
    assert base == [[BYTES.eos_id, *BYTES.encode(words)] for words in ("hi", text)]


def test_a_prompt_that_does_not_fit_loses_its_left(made, monkeypatch):
    for stage in ("sft", "gpt"):
        (ids,) = asked(monkeypatch, *load(made / stage), ["x" * 99 + "end"], max_new_tokens=40)
        assert len(ids) == CONTEXT - 40 and BYTES.decode(ids).endswith("end")


def test_numbers_may_be_numpys_and_no_prompts_give_no_texts(made):
    model, tokenizer = load(made / "sft")
    flags = {"top_p": np.float32(0.5), "top_k": np.int64(3), "seed": np.int64(2**32 - 1)}
    found = nanorlhf.generate(model, tokenizer, ["a"], np.int64(5), np.float64(2), **flags)
    assert found == nanorlhf.generate(model, tokenizer, ["a"], 5, 2, 3, 0.5, 2**32 - 1)
    assert nanorlhf.generate(model, tokenizer, [], 5) == []


# ---- score -------------------------------------------------------------------------------------


def test_score_is_what_ppo_sees(made):
    init = checkpoint.load(made / "sft")
    scorer = make_scorer(str(made / "rm"), init, CPU, torch.float32)
    dialogues = [[("user", p)] for p in PROMPTS] + [TURNS]
    prompts = dialogue.encode_prompts(BYTES, [Example(d, "") for d in dialogues], CONTEXT)
    texts = [*TEXTS, "ok"]
    ids = [[*BYTES.encode(text), BYTES.eos_id] for text in texts]
    wanted = scorer(prompts, ids, texts).tolist()
    found = nanorlhf.score(*load(made / "rm"), [*PROMPTS, CHAT], texts)
    assert found == wanted and len(set(found)) == 5
    assert nanorlhf.score(*load(made / "rm"), [], []) == []


def test_equal_texts_are_scored_once(made, monkeypatch):
    """In bfloat16 their scores would differ by their places, and a group of them would be no tie.
    Another prompt, or the same text without its end, is another text."""
    init, seen, score = checkpoint.load(made / "sft"), [], scoring.score_responses

    def spy(model, tokenizer, prompts, responses):
        prompts = list(prompts)
        seen.append(len(prompts))
        return score(model, tokenizer, prompts, responses)

    monkeypatch.setattr(scoring, "score_responses", spy)
    scorer = make_scorer(str(made / "rm"), init, CPU, torch.bfloat16)
    dialogues = [[("user", p)] for p in ("a", "b", "a", "a", "b", "a")]
    prompts = dialogue.encode_prompts(BYTES, [Example(d, "") for d in dialogues], CONTEXT)
    ids = [[*BYTES.encode(text), BYTES.eos_id] for text in ("x", "x", "yy", "x", "x", "x")]
    ids[5].pop()
    found = scorer(prompts, ids, None).tolist()
    assert seen == [4] and found[0] == found[3] and found[1] == found[4]
    places = [0, 1, 2, 5]
    alone = scorer([prompts[i] for i in places], [ids[i] for i in places], None).tolist()
    assert [found[i] for i in places] == alone and len(set(alone[:3])) == 3


def test_an_over_long_prompt_is_scored_without_its_left(made):
    model, tokenizer = load(made / "rm")
    end = "y" * (CONTEXT - 6)  # with <|assistant|>, "done" and the eos the whole context
    found = nanorlhf.score(model, tokenizer, ["x" * 99 + end, end, "y" + end], ["done"] * 3)
    assert found[0] == pytest.approx(found[2], abs=1e-5)


# ---- mistakes ----------------------------------------------------------------------------------

GENERATE = {
    "one string": ({"prompts": "hi"}, "prompts must be a list"),
    "one dialogue": ({"prompts": CHAT}, "prompts[0] must be a string or a list of messages"),
    "a number": ({"prompts": ["hi", 7]}, "prompts[1] must be"),
    "no messages": ({"prompts": [[]]}, "prompts[0]: "),
    "no content": ({"prompts": [[{"role": "user"}]]}, "'content'"),
    "a role of their own": ({"prompts": [[{"role": "me", "content": ""}]]}, "role 'me'"),
    "the assistant last": (
        {"prompts": ["hi", CHAT[:3]]},
        "prompts[1]: a prompt must end in a user",
    ),
    "too many tokens": ({"max_new_tokens": CONTEXT - 1}, "leaves no room for prompts"),
    "no token": ({"max_new_tokens": 0}, "--max_new_tokens: 0 is not a whole number from 1"),
    "half a token": ({"max_new_tokens": 1.5}, "--max_new_tokens: 1.5 is not"),
    "yes for a number": ({"top_k": True}, "--top_k: True is not"),
    "cold": ({"temperature": -1}, "--temperature: -1 is not a number from 0"),
    "a word for a number": ({"temperature": "1"}, "--temperature: '1' is not"),
    "not a number": ({"temperature": float("nan")}, "--temperature: nan is not"),
    "top_k below 0": ({"top_k": -1}, "--top_k: -1 is not"),
    "top_p of 0": ({"top_p": 0.0}, "--top_p: 0.0 is not a number from 1e-06 to 1"),
    "a seed too large": ({"seed": 2**32}, "--seed: 4294967296 is not"),
    "another tokenizer": ({"tokenizer": "gpt2"}, "the tokenizer must be the one"),
    "a reward model": ({"model": "rm"}, "generate needs a language model, not a RewardModel"),
    "no model": ({"model": None}, "not a NoneType"),
}
SCORE = {
    "one response": ({"responses": "yo"}, "responses must be a list"),
    "another length": ({"responses": ["a", "b"]}, "1 prompts, but 2 responses"),
    "ids for words": ({"responses": [[1, 2]]}, "responses[0] must be a string, not a list"),
    "one prompt": ({"prompts": "hi"}, "prompts must be a list"),
    "a long response": ({"responses": ["x" * (CONTEXT - 1)]}, "responses[0]: its 47 tokens"),
    "a language model": ({"model": "sft"}, "score needs a reward model, not a GPT"),
    "not finished": ({"model": "unfinished/rm"}, "not standardised"),
}
LOAD = {
    "nothing": (("nowhere",), "nowhere: no checkpoint there"),
    "a number": ((7,), "not 7"),
    "no folder": ((None,), "not None"),
    "another device": (("sft", "gpu"), "--device gpu: "),
    "another precision": (("sft", "cpu", "float16"), "--dtype float16: choose from"),
    "a torn file": (("torn",), "torn/step_1: not a whole checkpoint"),
}


def one_line(capsys, said, call):
    capsys.readouterr()
    with pytest.raises(ValueError) as mistake:
        call()
    assert said in str(mistake.value) and "\n" not in str(mistake.value)
    assert capsys.readouterr() == ("", "")


def changed(made, change, **flags):
    """Arguments of a call that works, but for what the change says."""
    name = change.get("model", flags.pop("stage"))
    flags["model"], flags["tokenizer"] = load(made / name) if name else (None, BYTES)
    return flags | {k: v for k, v in change.items() if k != "model"}


@pytest.mark.parametrize("name", GENERATE)
def test_a_mistake_in_generate_is_a_value_error_of_one_line(made, capsys, name):
    change, said = GENERATE[name]
    flags = changed(made, {"max_new_tokens": 4} | change, stage="sft", prompts=["hi"])
    one_line(capsys, said, lambda: nanorlhf.generate(**flags))


@pytest.mark.parametrize("name", SCORE)
def test_a_mistake_in_score_is_a_value_error_of_one_line(made, capsys, name):
    change, said = SCORE[name]
    flags = changed(made, change, stage="rm", prompts=["hi"], responses=["yo"])
    one_line(capsys, said, lambda: nanorlhf.score(**flags))


@pytest.mark.parametrize("name", LOAD)
def test_a_mistake_in_load_is_a_value_error_of_one_line(made, capsys, name, monkeypatch):
    monkeypatch.chdir(made)
    if name == "a torn file" and not Path("torn").exists():
        save(made, "torn", load("rm")[0])
        Path("torn/step_1/weights.pt").write_bytes(b"half")
    arguments, said = LOAD[name]
    one_line(capsys, said, lambda: nanorlhf.load(*arguments))


def test_two_vocabularies_do_not_go_together(made, capsys):
    model, _ = load(made / "sft")
    other = train_bpe(["a fox and a fox and a fox"], 270)
    one_line(capsys, "model of 260 ids", lambda: nanorlhf.generate(model, other, ["hi"]))


def test_a_mistake_ends_a_program_and_not_a_notebook(capsys):
    with pytest.raises(SystemExit) as stop:
        die("two\nlines")
    assert stop.value.code == 2 and str(stop.value) == "two lines"
    assert capsys.readouterr().err == "error: two lines\n"
    with pytest.raises(ValueError, match="^two lines$"), nanorlhf.mistakes_as_value_errors():
        die("two\nlines")
    assert capsys.readouterr().err == ""
    with pytest.raises(KeyboardInterrupt), nanorlhf.mistakes_as_value_errors():
        raise KeyboardInterrupt
    with pytest.raises(Mistake):  # and afterwards a program ends again, and says so
        die("again")
    assert capsys.readouterr().err == "error: again\n"


def test_importing_the_package_does_not_import_torch():
    code = "import sys, nanorlhf; assert not {'torch', 'numpy', 'tiktoken'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
