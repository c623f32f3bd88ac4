"""Exercises that check themselves: the real function passes, its usual mistakes are named, and the
command leads from a file with a hole to a tick."""

import re
import shlex

import pytest

from nanorlhf.config import from_cli
from nanorlhf.course.exercises import HOLE, Wrong, compare
from nanorlhf.machine.python_file import ROOT, load_function
from nanorlhf.tools import exercise as tool
from tests.test_readme import load, module_of

EXERCISES = {e.number: e for e in tool.EXERCISES if e.function}
WITH_CODE = pytest.mark.parametrize("exercise", EXERCISES.values(), ids=lambda e: e.number)

WRONG = [  # of an exercise: what stands in the solution, what stands there instead, what is said
    ("1.1", "if n < mask.numel():", "n.fill_(mask.numel())\n    if False:", "padding is in"),
    ("1.1", "total / n.clamp(min=1)", "total / mask.numel()", "costs nothing and is counted"),
    ("1.1", "total / n.clamp(min=1)", "total", "this is a sum"),
    ("1.1", "total / n.clamp(min=1)", "-total / n.clamp(min=1)", "to be minimised"),
    ("1.1", "n.clamp(min=1)", "n", "an empty mask"),
    ("1.2", "slots - pads", "slots + 0 * pads", "positions count the pads"),
    ("1.2", "slots - pads", "torch.arange(len(slots)) - pads", "starts again at 0"),
    ("1.2", "slots - pads", "slots - pads + 1", "from its start"),
    ("2.1", " - is_eos.long()", "", "the eos itself is masked out"),
    ("2.1", "is_eos.cumsum(1) - is_eos.long() == 0", "~is_eos", "only the eos is left out"),
    ("2.1", "is_eos.cumsum(1) - is_eos.long() == 0", "is_eos | True", "this is everything"),
    ("2.1", "is_eos.cumsum(1) - is_eos.long() == 0", "is_eos.cumsum(1) <= 1", "the second eos"),
    ("2.1", "is_eos.cumsum(1) - is_eos.long() == 0", "False", "a tensor of bool"),
    ("2.1", "is_end(responses, ends)", "is_end(responses, ends[-1:])", "several ends"),
    ("2.2", "* (len(words) + 1)", "* len(words) + [False]", "the eos carries no loss"),
    ("2.2", "[False] * (1 + len(words))", "[True] * (1 + len(words))", "is_loss is"),
    ("2.2", "[False] + [role ==", "[True] + [role ==", "the role token"),
    ("2.2", 'role == "assistant"', "True", "unlearned"),
    ("3.1", " & present[:, :, None]", "", "an absent response"),
    ("3.1", "ranks[:, :, None] < ranks", "ranks[:, :, None] > ranks", "the absent one, is in"),
    ("3.1", "ranks[:, :, None] < ranks", "ranks[:, :, None] <= ranks", "a tie is in"),
    (
        "3.2",
        "scores[:, :, None] - scores[:, None, :]",
        "scores[:, None, :] - scores[:, :, None]",
        "prefer the worse",
    ),
    (
        "3.2",
        "return _mean_over_prompts(losses, ordered_pairs(ranks))",
        "return losses[ordered_pairs(ranks)].mean()",
        "outvotes",
    ),
    ("3.2", "scores = scores.masked_fill(ranks == 0, 0)", "pass", "absent response"),
    ("3.3", "[e for e in examples if e.first_turn in held_out]", "examples[::10]", "both sides"),
    ("3.3", "e.first_turn not in held_out]", "e.first_turn in held_out]", "both sides"),
    ("3.3", "if not val_examples:", "if True:", "is not to be split"),
    ("3.3", "e.first_turn in held_out", "e.first_turn in sorted(held_out)[1:]", "on no side"),
    ("4.1", "torch.expm1(-k1) + k1", "torch.expm1(k1) - k1", "k3 with its arguments swapped"),
    ("4.1", "logprobs - ref_logprobs", "ref_logprobs - logprobs", "k1 with its arguments swapped"),
    ("4.1", "0.5 * k1**2", "k1**2", "twice k2"),
    ("4.1", "torch.expm1(-k1) + k1", "torch.expm1(-k1)", "its mean is 0"),
    ("4.2", "logp.exp() * (logp - ref_logp)", "ref_logp.exp() * (ref_logp - logp)", "other dir"),
    ("4.2", "logits, temperature)", "logits)", "the temperature is forgotten"),
    ("4.2", ".sum(-1)", ".mean(-1)", "mean over the vocabulary"),
    ("4.2", ".sum(-1)", ".sum(-1).detach()", "its gradient"),
    ("4.3", "scores[:, None] * is_last", "scores[:, None].expand_as(kl)", "every token"),
    ("4.3", "-kl_coef * kl", "kl_coef * kl", "paid for leaving"),
    ("4.3", "response_mask.sum(1) - 1", "response_mask.sum(1) * 0 + kl.shape[1] - 1", "the rew"),
    ("4.3", "-kl_coef * kl).masked_fill(~response_mask, 0)", "-kl_coef * kl)", "on padding"),
    ("4.4", 'ref_logits, rows["responses"], temperature', 'ref_logits, rows["responses"]', "ref_"),
    ("4.4", 'rows["responses"], temperature', 'rows["responses"]', "logprobs is of temperature 1"),
    ("4.4", "kl_exact(logits, ref_logits, temperature)", "kl_exact(logits, ref_logits)", "kl_e"),
    ("5.1", "values = values.masked_fill(~response_mask, 0)", "pass", "padding leaks in"),
    ("5.1", "gamma * lam * next_advantage", "gamma * next_advantage", "lambda is missing"),
    ("5.1", "gamma * next_value - values", "0 - values", "the next value is missing"),
    ("5.1", "advantages, advantages + values", "advantages, advantages", "advantages + values"),
    ("5.1", "advantages, advantages + values", "advantages", "two results"),
    ("5.1", "reversed(range(values.shape[1]))", "range(values.shape[1])", "the advantage in row 0"),
    ("5.2", "masked_mean((x - mean) ** 2, mask)", "((x - mean) ** 2)[mask].var()", "the result"),
    ("5.2", "masked_mean(x, mask)", "x.mean()", "the result"),
    ("5.2", "mean = masked_mean(x, mask)", "return (x - x.mean()) / x.std()", "padding counts"),
    ("5.2", ".masked_fill(~mask, 0)", "", "outside the mask"),
    ("5.2", "(x - mean) * torch", "x * torch", "the mean is still there"),
    ("5.2", "torch.rsqrt(variance + 1e-8)", "1 / (variance + 1e-8)", "square root"),
    ("5.2", ".masked_fill(~mask, 0)", " * mask", "inf * 0"),
    ("5.3", "torch.maximum", "torch.minimum", "still a gradient"),
    ("5.3", "torch.maximum(unclipped, clipped)", "clipped", "no gradient"),
    ("5.3", "-advantages * ratio", "advantages * ratio", "a sign"),
    (
        "5.3",
        "masked_mean(torch.maximum(unclipped, clipped), response_mask)",
        "torch.maximum(unclipped, clipped).mean()",
        "padding",
    ),
    (
        "5.4",
        "self.value_head, hidden",
        'self.value_head, at(self.gpt.hidden(rows["tokens"]), rows["states"] + 1)',
        "one late",
    ),
    (
        "5.4",
        "self.value_head, hidden",
        'self.value_head, at(self.gpt.hidden(rows["tokens"]), rows["states"] - 1)',
        "one early",
    ),
    ("5.4", 'rows["states"])[..., 0]', 'rows["states"] + 1)[..., 0]', "one late"),
    ("6.1", " - (n - 1) / n", "", "log n counts texts"),
    ("6.1", "(n - 1) / n", "(n - 1)", "not divided by n"),
    ("6.1", "math.log(n) - (n - 1) / n", "(math.log(n) - (n - 1) / n) / math.log(2)", "bits"),
    ("6.2", "max(i for i, x in enumerate(kl) if x <= 6)", "len(kl) - 1", "you never stop"),
    ("6.2", "max(i for i, x in enumerate(kl) if x <= 6)", "0", "you never start"),
    ("6.2", "max(i for i, x in enumerate(kl) if x <= 6)", "proxy.index(max(proxy))", "fooled"),
    ("6.2", "x <= 6", "x <= 40", "lost on average"),
    ("6.3", "scores - slope * x", "scores / lengths", "the mean score"),
    ("6.3", "scores - slope * x", "scores - 0.2 * x", "short answers win"),
    ("6.3", "scores - slope * x", "scores", "length still pays"),
    ("6.3", "scores - slope * x", "scores - slope * lengths", "the mean score"),
    ("6.3", ".clamp(min=1e-8)", "", "0 / 0"),
    ("7.1", "(R.sum(1, keepdim=True) - R) / (K - 1)", "R.mean(1, keepdim=True)", "holds the resp"),
    ("7.1", "mask, kl_coef", "mask, 0.0", "the KL penalty is missing"),
    ("7.1", "(R - (R.sum(1, keepdim=True) - R) / (K - 1))", "R", "no baseline"),
    ("7.1", "advantages.masked_fill(~mask, 0)", "advantages", "on padding"),
    (
        "7.2",
        "chosen - ref_chosen), beta * (rejected - ref_rejected)",
        "chosen), beta * rejected",
        "the reference is missing",
    ),
    ("7.2", "r[0] - r[1]", "r[1] - r[0]", "swapped"),
    ("7.2", "-F.logsigmoid(r[0] - r[1])", "-beta * F.logsigmoid((r[0] - r[1]) / beta)", "outside"),
    ("7.2", "F.logsigmoid(r[0] - r[1])", "torch.sigmoid(r[0] - r[1]).log()", "-inf"),
    ("7.3", "1 - comb(n - c, k) / comb(n, k)", "1 - (1 - c / n) ** k", "1 - (1 - c/n)^k"),
    ("7.3", "1 - comb(n - c, k) / comb(n, k)", "comb(n - c, k) / comb(n, k)", "none is right"),
    ("7.3", "1 - comb(n - c, k) / comb(n, k)", "comb(c, k) / comb(n, k)", "all k are right"),
    ("7.4", "(R - R.mean())", "(R.mean() - R)", "the sign"),
    ("7.4", "mask, kl_coef", "mask, 0.0", "the KL penalty"),
    ("7.4", "(R - R.mean())", "R", "not to 0.3010"),
]


def answer(exercise, text, folder):
    """The function of a reader's file that has this text in place of the stub."""
    path = folder / f"{exercise.number}.py"
    path.write_text(f"{exercise.imports()}\n\n\n{text}")
    return load_function(f"{path}:{exercise.function.__name__}", "exercise")


@WITH_CODE
def test_the_solution_passes(exercise, tmp_path):
    exercise.check(answer(exercise, exercise.source(), tmp_path))


@WITH_CODE
def test_what_is_handed_out_does_not_pass(exercise, tmp_path):
    with pytest.raises((Wrong, NotImplementedError)) as fault:
        exercise.check(answer(exercise, exercise.stub(), tmp_path))
    is_hunt = exercise.instead != HOLE
    assert isinstance(fault.value, Wrong if is_hunt else NotImplementedError)


@pytest.mark.parametrize("number, old, new, says", WRONG)
def test_a_wrong_answer_is_caught_and_named(number, old, new, says, tmp_path):
    exercise = EXERCISES[number]
    assert old in exercise.source()
    with pytest.raises(Wrong, match=re.escape(says)):
        exercise.check(answer(exercise, exercise.source().replace(old, new), tmp_path))


@pytest.mark.parametrize(
    "got, says",
    [
        ([[0.0] * 9, [0.5] * 8 + [0.1]], "it in row 1 is [0.5, "),
        ([[0.0] * 9], "it has the shape (1, 9), and should have (2, 9)"),
        (None, "it: your function returns None"),
    ],
)
def test_what_is_shown_is_where_the_answer_differs(got, says):
    with pytest.raises(Wrong, match=re.escape(says)):
        compare("it", got, [[0.0] * 9, [0.5] * 9], {})


def test_every_exercise_has_three_wrong_answers():
    wrong = [number for number, *_ in WRONG]
    assert {number: wrong.count(number) >= 3 for number in EXERCISES} == dict.fromkeys(
        EXERCISES, True
    )


@pytest.mark.parametrize("exercise", tool.EXERCISES, ids=lambda e: e.number)
def test_every_exercise_has_its_prediction_answer_hints_and_run(exercise):
    numbers = [len(exercise.parts(name)) for name in ("Predict", "Answer", "Hint", "Run")]
    assert numbers == [1, 1, 2, 1]
    assert len(exercise.title) < 60 and "\n\n" in exercise.question()


@pytest.mark.parametrize("exercise", tool.EXERCISES, ids=lambda e: e.number)
def test_what_is_to_be_run_is_a_command(exercise):
    words = shlex.split(exercise.parts("Run")[0].partition("    (")[0])
    if words[2] == "pytest":
        *files, option, word = words[3:]
        assert option == "-k"
        names = re.findall(r"def (test_\w+)", "".join((ROOT / f).read_text() for f in files))
        assert [name for name in names if word in name], words
    else:
        name, flags = module_of(words)
        from_cli(load(name).Config, flags)


# ---- the command -------------------------------------------------------------------------------


def run(capsys, number="4.1", status=0, **flags):
    """What the command says."""
    if status:
        with pytest.raises(SystemExit) as end:
            tool.main(tool.Config(number=number, **flags))
        assert end.value.code == status
    else:
        tool.main(tool.Config(number=number, **flags))
    return "".join(capsys.readouterr())


def test_from_a_hole_to_a_tick(tmp_path, capsys):
    folder = {"folder": str(tmp_path / "a")}
    path = tmp_path / "a" / "4.1.py"
    assert "an attempt first" in run(capsys, solution=True, status=2, **folder)
    assert "k1 first" in run(capsys, hint=1, **folder) and not path.exists()
    assert str(path) in run(capsys, **folder)
    assert "an attempt first" in run(capsys, solution=True, status=2, **folder)
    assert "PREDICTION" in run(capsys, status=2, **folder)
    text = path.read_text().replace('PREDICTION = ""', 'PREDICTION = "k1"')
    path.write_text(text)
    assert re.search(r"… 4\.1 .*\n  4\.2", run(capsys, "", **folder))


@pytest.mark.parametrize(
    "body, says, status",
    [
        (HOLE, "hole is still there", 2),
        ("return (logprobs - ref_logprobs).exp()", "k1 is", 1),
        ("return logprobs.nothing", "AttributeError", 2),
        ("return logprobs +", "SyntaxError", 2),
    ],
)
def test_what_is_filled_in_is_judged_in_one_line(tmp_path, capsys, body, says, status):
    text = EXERCISES["4.1"].file().replace('PREDICTION = ""', 'PREDICTION = "k1"')
    (tmp_path / "4.1.py").write_text(text.replace(HOLE, body))
    said = run(capsys, folder=str(tmp_path), status=status)
    assert says in said and said.count("\n") == 1
    assert not list(tmp_path.glob("*.solved"))
    assert "torch.expm1(-k1)" in run(capsys, folder=str(tmp_path), solution=True)


def test_a_right_answer_is_told_what_happens_and_what_to_run(tmp_path, capsys):
    exercise = EXERCISES["4.1"]
    text = exercise.file().replace('PREDICTION = ""', 'PREDICTION = "none of them"')
    (tmp_path / "4.1.py").write_text(text.replace(exercise.stub(), exercise.source()))
    said = run(capsys, folder=str(tmp_path))
    assert all(x in said for x in ("✓", "none of them", "0.498 nats", "python train_ppo.py"))
    assert "✓ 4.1" in run(capsys, "", folder=str(tmp_path))


def test_a_number_that_is_none_is_answered_with_those_that_are(capsys):
    assert "4.1" in run(capsys, "9.9", status=2)
    for flags in ({"hint": 1}, {"solution": True}):  # of no exercise
        assert "no exercise '' among 1.1, " in run(capsys, "", status=2, **flags)


@pytest.mark.parametrize("prediction, wanted", [("5", "5"), ("(1, 2)", "(1, 2)"), ("' '", "")])
@pytest.mark.parametrize("before", ["", "@torch.no_grad()\n"])  # a function of torch around it
def test_a_prediction_may_be_of_any_type(tmp_path, capsys, prediction, wanted, before):
    exercise = EXERCISES["4.1"]
    text = exercise.file().replace('PREDICTION = ""', f"PREDICTION = {prediction}")
    (tmp_path / "4.1.py").write_text(text.replace(exercise.stub(), before + exercise.source()))
    said = run(capsys, folder=str(tmp_path), status=0 if wanted else 2)
    assert f"you predicted: {wanted}\n" in said if wanted else "write into PREDICTION" in said


def test_an_attempt_that_is_no_utf8_is_an_attempt(tmp_path, capsys):
    text = EXERCISES["4.1"].file().replace('PREDICTION = ""', 'PREDICTION = "café"')
    (tmp_path / "4.1.py").write_bytes(text.encode("latin-1"))
    assert "torch.expm1(-k1)" in run(capsys, folder=str(tmp_path), solution=True)
    said = run(capsys, folder=str(tmp_path), status=2)
    assert "SyntaxError" in said and said.count("\n") == 1


def test_the_solution_of_a_question_on_paper_is_its_answer(capsys):
    (paper,) = (e for e in tool.EXERCISES if not e.function)
    assert paper.question() in run(capsys, paper.number)
    assert run(capsys, paper.number, solution=True) == paper.parts("Answer")[0] + "\n"
