"""What scores a response: one expression, one function.

    reward = make_reward("out/demo/rm.pt - 0.02*length", tokenizer, device)
    scores = reward(rows, rollout)                       # (B,) fp32, on the rollout's device; dense: (B, T)

An expression (expressions.py reads it) is a signed sum of terms, each `name` or `number*name`; + and − stand
between spaces:

    out/demo/rm.pt                 a reward model's score of the response, read at its last token
    mean:out/demo/rm.*.pt          an ensemble (a glob, or names joined by commas): its mean,
    min:out/demo/rm.*.pt           its minimum (Coste et al. 2023, worst-case optimisation),
    mean-2std:out/demo/rm.*.pt     or its mean less 2 standard deviations
    prm-min:out/demo/prm.pt        a process reward model: the minimum over the response's steps of the
                                   probability that the step is right; prm-product and prm-last likewise
    prm-steps:out/demo/prm.pt      densely: each step's probability, at the token that ends it
    answer                         1 where the final answer is the one in meta (answers.py says what is read)
    length                         the number of response tokens
    file.py:function               a reward of your own (below); file.py:function(text) hands it the text too
    judge                          short for nanoalign/world/verdicts.py:utility: the built-in world's judge

A reward of your own is a function in a Python file, which is code and is run as such:

    def brevity(rows: list[dict], texts: list[str], ended: list[bool]) -> list[float]:
        return [-len(text.split()) for text in texts]       # rows: prompt and meta of each response
"""

import functools
import re
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanoalign import UserError
from nanoalign.answers import answers
from nanoalign.checkpoint import load_scalar
from nanoalign.cli import Progress
from nanoalign.data import collate, join, prompt_key
from nanoalign.expressions import FUNCTION, Term, find, parse_reward
from nanoalign.generate import Rollout
from nanoalign.logprobs import last_scored
from nanoalign.model import GPT
from nanoalign.scalar import ScalarGPT, response_scores, share_reader
from nanoalign.steps import aggregate, step_probabilities
from nanoalign.tokenizer import Tokenizer
from nanoalign.training import freeze

Reward = Callable[[list[dict], Rollout], Tensor]


def reward_files(expression: str) -> list[str]:
    """The files that a reward expression reads, its code included."""
    return [file for term in parse_reward(expression) for file in term.files]


def reward_models(expression: str) -> list[str]:
    """The checkpoints that a reward expression reads."""
    files = [(term.kind, file) for term in parse_reward(expression) for file in term.files]
    return [file for kind, file in files if kind != "function" or file.endswith(".pt")]


def make_reward(expression: str, tokenizer: Tokenizer, device, ref: GPT | None = None) -> Reward:
    """An expression → reward(rows, rollout) → scores (B,), or (B, T) if a term is dense: the others then
    stand on the last token. rows: the prompt rows of the rollout's rows. ref: a frozen model that is
    in memory anyway, to take the place of a reward model's reader that is the same. reward.files: what it
    reads; reward.held: the models that it holds.

    Raises UserError for an unknown term, a reward model of another tokenizer, and scores that are not finite.
    """
    held: list[ScalarGPT] = []
    terms = [(term.weight, _scorer(term, tokenizer, device, ref, held)) for term in parse_reward(expression)]

    def reward(rows: list[dict], rollout: Rollout) -> Tensor:
        parts = [weight * score(rows, rollout) for weight, score in terms]
        if any(part.dim() == 2 for part in parts):
            parts = [part if part.dim() == 2 else on_last_token(part, rollout.mask) for part in parts]
        scores = sum(parts)
        if not scores.isfinite().all():
            broken = f"{int((~total(scores).isfinite()).sum())} of {len(rows)} responses"
            why = "its checkpoint is broken, or was trained with too high an --lr"
            raise UserError(f"the reward {expression!r} is not a finite number for {broken}: {why}.")
        return scores

    reward.files = [Path(file) for file in reward_files(expression)]
    reward.models, reward.held = reward_models(expression), held
    return reward


def _scorer(term: Term, tokenizer: Tokenizer, device, ref: GPT | None, held: list) -> Reward:
    if term.kind == "length":
        return lambda rows, rollout: rollout.mask.sum(-1).float()
    if term.kind == "answer":
        return partial(_text_scores, answers, "answer", tokenizer)
    if term.kind == "function":
        return partial(_text_scores, load_function(term.path), term.path, tokenizer)
    process = term.kind.startswith("prm-")
    models = [_load(path, tokenizer, device, "prm" if process else "rm") for path in term.files]
    held += models
    for model in models:
        share_reader(model, ref)
    if process:
        return partial(_process_scores, models[0], term.kind.removeprefix("prm-"), tokenizer)
    if term.kind == "rm":
        return model_reward(models[0])
    if len(models) < 2:
        name = f"{term.kind}:{term.path}"
        raise UserError(f"{name} names {len(models)} checkpoint; an ensemble needs two or more.")
    return partial(_ensemble_scores, [model_reward(model) for model in models], term.kind)


def _load(path: str, tokenizer: Tokenizer, device, stage: str) -> ScalarGPT:
    model, own, _ = load_scalar(path, device, (stage,))
    if own.name != tokenizer.name:
        what = f"{path} reads tokens of {own.name!r}, the policy writes tokens of {tokenizer.name!r}"
        raise UserError(f"{what}: train a reward model from the policy's own SFT checkpoint.")
    return freeze(model)


def model_reward(model: ScalarGPT) -> Reward:
    """A reward model in memory, as a reward."""

    @torch.no_grad()
    def reward(rows: list[dict], rollout: Rollout) -> Tensor:
        seen = rollout.read_by(model.reader)
        return response_scores(model, rollout.ids, rollout.mask, rollout.hidden(model, seen=seen))

    return reward


def _process_scores(model: ScalarGPT, how: str, tokenizer: Tokenizer, rows: list, rollout: Rollout) -> Tensor:
    p, ends = step_probabilities(model, rollout, tokenizer)
    return p.masked_fill(~ends, 0.0) if how == "steps" else aggregate(p, ends, how)


def _ensemble_scores(members: list[Reward], kind: str, rows: list[dict], rollout: Rollout) -> Tensor:
    spread = 0.0 if kind in ("mean", "min") else float(kind[len("mean-") : -len("std")])
    scores = torch.stack([member(rows, rollout) for member in members])  # (K, B)
    return scores.amin(0) if kind == "min" else scores.mean(0) - spread * scores.std(0)


def _text_scores(function: Callable, name: str, tokenizer: Tokenizer, rows: list, rollout: Rollout) -> Tensor:
    texts = [tokenizer.decode_response(response) for response in rollout.responses()]
    try:
        scores = torch.tensor(function(rows, texts, rollout.ended.tolist()), dtype=torch.float32)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the reward {name} failed: {type(error).__name__}: {error}.") from error
    if scores.shape != (len(rows),):
        raise UserError(f"the reward {name} gave {tuple(scores.shape)} scores for {len(rows)} responses.")
    return scores.to(rollout.ids.device)


# ------------------------------------------------------------------------------------------ your own


@functools.cache
def run_file(path: Path) -> dict:
    """Run a Python file → its names."""
    try:
        return runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {error}.") from None


def load_function(name: str) -> Callable:
    """ "file.py:function" → that function; file.py:function(text) → it with the text. Runs the file."""
    parts = re.fullmatch(FUNCTION, name)
    if not parts:
        raise UserError(f"{name!r} names no function: expected file.py:function.")
    function = run_file(find(parts[1])).get(parts[2])
    if not callable(function):
        raise UserError(f"{parts[1]} defines no function {parts[2]}.")
    return function if parts[3] is None else lambda *args: function(*args, parts[3])


# ------------------------------------------------------------------------------------------------- scores


def on_last_token(score: Tensor, mask: Tensor) -> Tensor:
    """Scores (B,) → (B, T): each on the last scored token of its row, 0 elsewhere."""
    return score.new_zeros(mask.shape).scatter(1, last_scored(mask)[:, None], score[:, None])


def total(score: Tensor) -> Tensor:
    """Scores (B,), or dense ones (B, T) → (B,)."""
    return score if score.dim() == 1 else score.sum(-1)


def unless_unfinished(score: Tensor, rollout: Rollout, missing_eos_score: float) -> Tensor:
    """The scores, (B,) or (B, T), but `missing_eos_score` where a response has no end token."""
    missing = torch.full_like(rollout.ended, missing_eos_score, dtype=score.dtype)
    if score.dim() == 1:
        return torch.where(rollout.ended, score, missing)
    return torch.where(rollout.ended[:, None], score, on_last_token(missing, rollout.mask))


def score_compared(
    reward: Reward, comparisons: list[dict], tokenizer: Tokenizer, max_length: int, device, what: str = ""
) -> Tensor:
    """Comparisons → the scores of both responses (N, 2) on the CPU, NaN where there is no room; each response
    to a prompt is read once."""
    asked = {(prompt_key(c), text): (c, text) for c in comparisons for text in c["responses"]}
    scores = score_texts(reward, *zip(*asked.values()), tokenizer, max_length, device, what)
    number = dict(zip(asked, range(len(asked))))
    return scores[torch.tensor([[number[prompt_key(c), t] for t in c["responses"]] for c in comparisons])]


@torch.no_grad()
def score_texts(
    reward: Reward, rows: list[dict], texts: list[str], tokenizer: Tokenizer, max_length: int, device,
    what: str = "", ended: list[bool] | None = None,
) -> Tensor:  # fmt: skip
    """Responses (texts) to prompt rows → scores (N,) on the CPU; NaN where a prompt leaves no room for one.

    A response that is cut short at `max_length` tokens counts as not ended, and so does one of which `ended`
    says so. what: a name for the progress line; empty for none.
    """
    both = [(tokenizer.prompt(row["prompt"]), tokenizer.response(text)) for row, text in zip(rows, texts)]
    examples = [join(prompt, response, max_length) for prompt, response in both]
    scores = torch.full((len(texts),), torch.nan)
    order = sorted((i for i, e in enumerate(examples) if e is not None), key=lambda i: len(examples[i][0]))
    progress = Progress(what, len(order)) if what else None
    for start in range(0, len(order), 256):
        batch = order[start : start + 256]
        ids, mask = collate([examples[i] for i in batch], tokenizer.pad)
        whole = [examples[i][0][-1] == tokenizer.end and (ended is None or ended[i]) for i in batch]
        rollout = Rollout(*(x.to(device) for x in (ids, mask, torch.zeros(ids.shape), torch.tensor(whole))))
        scores[batch] = total(reward([rows[i] for i in batch], rollout)).to(scores)
        if progress:
            progress.advance(len(batch))
    return scores
