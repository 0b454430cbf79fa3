"""AI feedback: a model is asked to criticise, to revise and to judge, by the principles of a constitution.

critique.py and collect.py ask in these words, and the world's demonstrations (nanoalign/world/feedback.py)
teach them. They are short, for the world's models have a context of 128 tokens. An answer is quoted inside
the user's turn, so that an SFT run on demonstrations learns the critique and the revision, and not the answer
that had to be revised.

A chat model as a judge answers "A or B?" by a principle drawn for every pair, in both orders (RL-CAI: Bai et
al. 2022, §4.1; RLAIF: Lee et al. 2023):

    ℓ(a, b) = log π("A" | x, a, b, principle) − log π("B" | …)        P(a ≻ b) = σ((ℓ(a, b) − ℓ(b, a)) / 2)

Log-odds are averaged where Lee et al. average probabilities: what the model adds to the logit of "A" cancels,
and leaves no trace in how sure the label is. A small model that has a fact on the tip of its tongue does not
find it when it compares; it finds it when it speaks. So a judge may also consult itself, with weight w:

    P(a ≻ b) = σ((ℓ(a, b) − ℓ(b, a)) / 2 + w (log π(a | x) − log π(b | x)))
"""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanoalign import UserError
from nanoalign.checkpoint import load_policy
from nanoalign.cli import Progress
from nanoalign.data import collate, prompt_key
from nanoalign.generate import Rollout
from nanoalign.logprobs import next_token_logits, token_logprobs
from nanoalign.model import GPT
from nanoalign.rewards import score_compared
from nanoalign.statistics import clustered_error
from nanoalign.tokenizer import Tokenizer

CRITIQUE = "What is wrong with this answer? {principle}\nQuestion: {prompt}\nAnswer: {response}"
REVISION = "Now write a better answer."
JUDGEMENT = "Which answer is better, A or B? {principle}\nQuestion: {prompt}\nA: {a}\nB: {b}"


def transcript(prompt: list[dict]) -> str:
    """A prompt's messages as one text: a single one as it is, more of them with their roles in front."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def ask_for_critique(prompt: list[dict], response: str, principle: str) -> list[dict]:
    text = CRITIQUE.format(principle=principle, prompt=transcript(prompt), response=response)
    return [{"role": "user", "content": text}]


def ask_for_revision(asked: list[dict], critique: str) -> list[dict]:
    """The request for a critique, and what came of it → the conversation that asks for a revision."""
    return [*asked, {"role": "assistant", "content": critique}, {"role": "user", "content": REVISION}]


def ask_for_judgement(prompt: list[dict], a: str, b: str, principle: str) -> list[dict]:
    text = JUDGEMENT.format(principle=principle, prompt=transcript(prompt), a=a, b=b)
    return [{"role": "user", "content": text}]


def read_constitution(path: str) -> list[str]:
    """The principles in a plain text file, one a line; blank lines and those that begin with # do not count.

    Raises UserError for a file that is missing, holds no principle, or is no plain text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"there is no constitution {path}: write one, a principle on every line.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the constitution {path} cannot be read as UTF-8 text: {error}.") from None
    for number, line in enumerate(lines, start=1):
        if not line.replace("\t", " ").isprintable():
            raise UserError(f"{path}, line {number}: {line[:40]!r} is not plain text.")
    principles = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not principles:
        raise UserError(f"the constitution {path} holds no principle; write one on every line.")
    return principles


@torch.no_grad()
def choice_logprobs(model: GPT, tokenizer: Tokenizer, asked: list[list[dict]], batch_size=256) -> Tensor:
    """Requests for a judgement → the model's log-probs of answering "A" and of answering "B", (N, 2) on the
    CPU; NaN where a request leaves no room for an answer."""
    a, b = (tokenizer.response(letter)[0] for letter in "AB")
    prompts = [tokenizer.prompt(messages) for messages in asked]
    found, device = torch.full((len(prompts), 2), torch.nan), model.embed.weight.device
    order = [i for i in np.argsort([len(p) for p in prompts]) if len(prompts[i]) < model.config.context]
    progress, parts = Progress("judge", len(order)), []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = [(prompts[i], np.ones(len(prompts[i]), dtype=bool)) for i in rows]
        ids, mask = collate(batch, tokenizer.pad)
        last = (mask.sum(-1) - 1).to(device)
        hidden = model.hidden(ids.to(device))[torch.arange(len(rows), device=device), last]  # (B, D)
        parts.append(next_token_logits(model, hidden).log_softmax(-1)[:, [a, b]])
        progress.advance(len(rows))
    if parts:
        found[order] = torch.cat(parts).float().cpu()
    return found


def vote(comparison: dict, log_odds: float) -> float | None:
    """Log-odds that the first is better → P(first is better). An unfinished response loses to a finished
    one; None for NaN."""
    if log_odds != log_odds:
        return None
    first, second = comparison["ended"]
    if first != second:
        return float(first)
    return torch.tensor(log_odds, dtype=torch.float64).sigmoid().item()


def own_odds(model: GPT, tokenizer: Tokenizer, comparisons: list[dict], device) -> Tensor:
    """log π(a | x) − log π(b | x) of each comparison's two responses, (N,) float64 on the CPU."""

    def loglikelihood(rows: list[dict], drawn: Rollout) -> Tensor:
        return token_logprobs(model, drawn.ids, drawn.mask).sum(-1)

    both = score_compared(loglikelihood, comparisons, tokenizer, model.config.context, device, "consult")
    return (both[:, 0] - both[:, 1]).double()


def ai_votes(
    path: str, comparisons: list[dict], device, principles: list[str], seed: int, own: float = 0.0
) -> list:
    """A chat model's P(first is better) of each comparison, as above; None if the request is too long. Prints
    the judge's position bias before and after averaging."""
    model, tokenizer, _ = load_policy(path, device, chat=True)
    rng, asked = random.Random(f"principles-{seed}"), []
    for c in comparisons:
        (a, b), principle = c["responses"], rng.choice(principles)
        asked.append(ask_for_judgement(c["prompt"], a, b, principle))
        asked.append(ask_for_judgement(c["prompt"], b, a, principle))
    logp = choice_logprobs(model, tokenizer, asked).double()
    logp = logp.view(-1, 2, 2)  # (pair, order, "A" or "B")
    odds = logp[..., 0] - logp[..., 1]  # log-odds of what is shown first, (pair, order)
    averaged = (odds[:, 0] - odds[:, 1]) / 2  # of a
    known = ~averaged.isnan()
    if not known.any():
        raise UserError(f"{path} judges no pair: it is broken, or every request is longer than it reads.")
    after, n = averaged[known], int(known.sum())
    asked_of = [prompt_key(c) for c, seen in zip(comparisons, known.tolist()) if seen]
    error = clustered_error(after.numpy(), asked_of)  # pairs of a prompt share its responses
    torn = (odds[known].sign().prod(1) > 0).double().mean()
    said = logp[known].exp().sum(-1).mean()
    print(f'collect: the judge says "A" or "B" with probability {said:.1%}')
    print(
        f"collect: log-odds of preferring what comes first: {odds[known].mean():+.2f} in one order, "
        f"{after.mean():+.2f} ± {error:.2f} over both; the order alone decides {torn:.1%} of {n:,} pairs"
    )
    if own:
        averaged = averaged + own * own_odds(model, tokenizer, comparisons, device)
    return list(map(vote, comparisons, averaged.tolist()))
