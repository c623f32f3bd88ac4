"""Chapter 4, a leash: the KL penalty.

Shapes: B responses, T tokens, V = 3 words.
"""

from types import SimpleNamespace

import torch

from nanorlhf import functional as f
from nanorlhf.course.exercises import Exercise, compare, must, near
from nanorlhf.machine.python_file import load_script

P, Q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])  # policy and reference


def three_estimates(kl_estimate):
    """Three estimates of one KL.

    The policy says three words with probabilities 0.6, 0.3 and 0.1, the reference says them with
    0.2, 0.3 and 0.5. A word is sampled from the policy; k1, k2 and k3 each estimate the KL from its
    two log-probabilities alone.

    Predict: which of the three can be negative for a single word, and for which word is it?

    Answer: k1 alone, for the third word, which the reference likes better. k1 and k3 have the KL,
    0.498 nats, as their mean over the policy's words; the mean of k2 is another number.

    Hint: write k1 first; the other two are functions of it.

    Hint: k3 is (r - 1) - log r for the ratio r = ref / pi, and log r is -k1.

    Run: python train_ppo.py --mistake k3_swapped --out_dir out/k3    (compare kl and kl_k3)
    """
    p, q = P.log(), Q.log()
    k1 = p - q
    swapped, kl = (float((P * x).sum()) for x in (k1.expm1() - k1, k1))
    mistakes = {"this is k1 with its arguments swapped: its mean is minus the KL": -k1}
    compare("k1", kl_estimate(p, q, "k1"), k1, mistakes)
    mistakes = {"this is twice k2: near the reference the KL is half the mean square": k1**2}
    compare("k2", kl_estimate(p, q, "k2"), k1**2 / 2, mistakes)
    mistakes = {
        f"this is k3 with its arguments swapped, as in trlx, ColossalChat and the RLHF Book: its "
        f"mean is {swapped:.3f} where the KL is {kl:.3f}": k1.expm1() - k1,
        "this is k3 without its - 1: it is 1 where the policies agree": (-k1).exp() + k1,
        "this is exp(-k1) - 1 without the + k1: its mean is 0, whatever the KL is": (-k1).expm1(),
    }
    compare("k3", kl_estimate(p, q, "k3"), (-k1).expm1() + k1, mistakes)


def exact_on_three_words(kl_exact):
    """The exact KL, word by word.

    With all logits at hand nothing has to be estimated: the KL is a sum over the vocabulary.
    Write it for logits (B, T, V), at a temperature.

    Predict: as the temperature rises, does the KL between two fixed sets of logits rise or fall?

    Answer: it falls. Dividing by a temperature makes both distributions flatter, and more alike.

    Hint: logits are no log-probabilities. `log_softmax` in functional.py makes them some.

    Hint: the weights of the sum are the policy's probabilities: those of the first argument.

    Run: python -m nanorlhf inspect    (the exact KL of each token of a rollout)
    """
    a, b = (x.log()[None, None] + 3 for x in (P, Q))
    p, q = f.log_softmax(a, 2.0), f.log_softmax(b, 2.0)
    right = (p.exp() * (p - q)).sum(-1)
    cold, warm = f.log_softmax(a), f.log_softmax(b)
    mistakes = {
        "this is the other direction, KL(ref || pi)": (q.exp() * (q - p)).sum(-1),
        "the temperature is forgotten": (cold.exp() * (cold - warm)).sum(-1),
        "this is the mean over the vocabulary; the KL is the sum": right / 3,
        "this takes logits for log-probabilities": (a.exp() * (a - b)).sum(-1),
    }
    compare("KL at temperature 2", kl_exact(a, b, 2.0), right, mistakes)
    logits = a.clone().requires_grad_()
    out = kl_exact(logits, b)
    must(out.requires_grad, "--kl_loss_coef needs its gradient: no detach, no no_grad, no item")


def rewards_of_tokens(shaped_rewards):
    """A score and a penalty become rewards.

    The judge gives one score to a whole response; the penalty is paid at every token. Responses of
    a batch have different lengths, and what stands behind their last token is padding.

    Predict: a response gets score 2, its tokens have KL 1, 0 and 3, kl_coef is 0.1. What do
    its rewards add up to?

    Answer: 2 - 0.1 * 4 = 1.6. A sum over its tokens does not care where the score is put; where it
    is put decides which token gets the credit, as chapter 5 shows.

    Hint: `response_mask.sum(1) - 1` is the place of the last response token in each row.

    Hint: compare that place with `torch.arange(T)` to get a mask of one True a row.

    Run: python train_ppo.py --mistake score_everywhere --out_dir out/everywhere
    """
    scores, kl = torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 0.5, 3.0], [0.2, 7.0, 7.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    right, last = torch.tensor([[-0.1, -0.05, 1.7], [-1.02, 0, 0]]), torch.tensor([0, 0, 1.0])
    each, penalty = scores[:, None], (-0.1 * kl).masked_fill(~mask, 0)
    mistakes = {
        "the score is on every token, as in ColossalChat: length earns it": penalty + each * mask,
        "the penalty is added: the policy is paid for leaving the reference": right - 2 * penalty,
        "the score is in the last column, a pad in short rows": penalty + each * last,
        "the score is in the last column, and pads pay the penalty": -0.1 * kl + each * last,
        "there is a penalty on padding": right + (-0.1 * kl).masked_fill(mask, 0),
        "the penalty is not multiplied by kl_coef": right + 9 * penalty,
    }
    compare("the reward", shaped_rewards(scores, kl, mask, 0.1), right, mistakes)
    nothing = shaped_rewards(scores, kl, mask & False, 0.1)
    must(near(nothing, 0 * kl), "a row without a response token must get no reward at all")


def hunt_for_a_temperature(measure):
    """Hunt: KL from nowhere.

    A run at --temperature 2 reports a KL before its first update. The policy is then still a copy
    of the reference, so the KL has to be 0. Find what is wrong in this function, and mend it.

    Predict: which other metrics does the mistake spoil, and which stay right?

    Answer: kl, kl_k2, kl_k3 and with them the rewards: the policy is punished for the temperature.
    kl_exact, entropy and the ratio stay right, which is how you find it.

    Hint: what is divided by the temperature must be divided by it everywhere.

    Hint: four numbers are made from two sets of logits; count the temperatures.

    Run: python train_ppo.py --mistake cold_samples --out_dir out/cold    (a sibling of it)
    """
    torch.manual_seed(0)
    mine, other = torch.randn(2, 2, 4, 3)
    rows = {"responses": torch.tensor([[0, 1, 2, 1], [2, 2, 0, 0]])}
    cfg, policy = SimpleNamespace(temperature=2.0), lambda rows: (mine, mine[..., 0])
    reference = SimpleNamespace(in_states=lambda rows: other, head=lambda hidden: hidden)
    got = measure(cfg, policy, reference, rows)
    right = {
        "logprobs": lambda t: f.logprobs_from_logits(mine, rows["responses"], t),
        "ref_logprobs": lambda t: f.logprobs_from_logits(other, rows["responses"], t),
        "entropy": lambda t: f.entropy_from_logits(mine, t),
        "kl_exact": lambda t: f.kl_exact(mine, other, t),
        "values": lambda t: mine[..., 0],
    }
    for name, at in right.items():
        must(name in got, f"{name} is gone")
        compare(name, got[name], at(2.0), {f"{name} is of temperature 1": at(1.0)})


PPO = load_script("train_ppo")
FORGOTTEN = r'(?<=ref_logits, rows\["responses"\]), temperature'
EXERCISES = [
    Exercise("4.1", three_estimates, f.kl_estimate),
    Exercise("4.2", exact_on_three_words, f.kl_exact),
    Exercise("4.3", rewards_of_tokens, f.shaped_rewards),
    Exercise("4.4", hunt_for_a_temperature, PPO.measure, FORGOTTEN, ""),
]
