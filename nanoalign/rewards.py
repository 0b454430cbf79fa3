"""What scores a response: one expression, one function.

    reward = make_reward("out/demo/rm.pt - 0.02*length", tokenizer, device)
    scores = reward(rows, rollout)                       # (B,) fp32, on the rollout's device; dense: (B, T)

An expression is a signed sum of terms, each `name` or `number*name`; + and − stand between spaces:

    out/demo/rm.pt                 a reward model's score of the response, read at its last token
    mean:out/demo/rm.*.pt          an ensemble (a glob, or names joined by commas): its mean,
    min:out/demo/rm.*.pt           its minimum (Coste et al. 2023, worst-case optimisation),
    mean-2std:out/demo/rm.*.pt     or its mean less 2 standard deviations
    prm-min:out/demo/prm.pt        a process reward model: the minimum over the response's steps of the
                                   probability that the step is right; prm-product and prm-last likewise
    prm-steps:out/demo/prm.pt      densely: each step's probability, at the token that ends it
    judge                          the built-in world's judge (rows need the world's meta)
    answer                         1 where the final answer ("#### n" or "Answer: n") is the one in meta
    length                         the number of response tokens
    harm:out/demo/sft.pt           red-teaming (Perez et al. 2022): how often that policy, asked the row's
                                   prompt with the response before it, helps with the harm (kind "harm" only)
"""

import glob
import re
from collections.abc import Callable

import torch
from torch import Tensor

from nanoalign import UserError
from nanoalign.checkpoint import CHAT, load_policy, load_scalar
from nanoalign.cli import Progress
from nanoalign.data import collate, join
from nanoalign.generate import Rollout, respond, rollouts
from nanoalign.logprobs import last_scored, token_logprobs
from nanoalign.model import ScalarGPT
from nanoalign.steps import AGGREGATES, aggregate, step_probabilities
from nanoalign.tokenizer import Tokenizer
from nanoalign.training import freeze
from nanoalign.world.judge import judge, knows, on_topic

Reward = Callable[[list[dict], Rollout], Tensor]
ASKED, READ = 4, 32  # how often `harm:` asks its target, and how many tokens of an answer it reads


def response_scores(model: ScalarGPT, ids: Tensor, mask: Tensor, hidden: Tensor | None = None) -> Tensor:
    """ids (B, T), mask (B, T) → the model's output at each row's last scored token (B,), fp32.

    The mask may stay on the CPU. hidden (B, T, D): model.gpt.hidden(ids), if it is known already.
    """
    values = model(ids) if hidden is None else model.score(hidden)
    return values.gather(1, last_scored(mask)[:, None].to(values.device)).squeeze(1)


def model_reward(model: ScalarGPT) -> Reward:
    """A reward model in memory, as a reward."""

    @torch.no_grad()
    def score(rows: list[dict], rollout: Rollout) -> Tensor:
        return response_scores(model, rollout.ids, rollout.mask)

    return score


def on_last_token(score: Tensor, mask: Tensor) -> Tensor:
    """Scores (B,) → (B, T): each on the last scored token of its row, 0 elsewhere."""
    return score.new_zeros(mask.shape).scatter(1, last_scored(mask)[:, None], score[:, None])


def total(score: Tensor) -> Tensor:
    """Scores (B,), or dense ones (B, T) → (B,)."""
    return score if score.dim() == 1 else score.sum(-1)


def unless_unfinished(score: Tensor, rollout: Rollout, missing_eos_score: float) -> Tensor:
    """The scores, (B,) or (B, T), but `missing_eos_score` in place of those of a response without an end
    token."""
    missing = torch.full_like(rollout.ended, missing_eos_score, dtype=score.dtype)
    if score.dim() == 1:
        return torch.where(rollout.ended, score, missing)
    return torch.where(rollout.ended[:, None], score, on_last_token(missing, rollout.mask))


def _load(path: str, tokenizer: Tokenizer, device, stage: str) -> ScalarGPT:
    model, own, _ = load_scalar(path, device, (stage,))
    if own.name != tokenizer.name:
        raise UserError(
            f"{path} reads tokens of {own.name!r}, the policy writes tokens of {tokenizer.name!r}: "
            "train a reward model from the policy's own SFT checkpoint."
        )
    return freeze(model)


def _reward_model(path: str, tokenizer: Tokenizer, device) -> Reward:
    return model_reward(_load(path, tokenizer, device, "rm"))


def _process_model(how: str, path: str, tokenizer: Tokenizer, device) -> Reward:
    model = _load(path, tokenizer, device, "prm")

    def score(rows: list[dict], rollout: Rollout) -> Tensor:
        p, ends = step_probabilities(model, rollout.ids, rollout.mask, tokenizer)
        return p.masked_fill(~ends, 0.0) if how == "steps" else aggregate(p, ends, how)

    return score


def _ensemble(kind: str, pattern: str, tokenizer: Tokenizer, device) -> Reward:
    paths = [path for part in pattern.split(",") for path in sorted(glob.glob(part)) or [part]]
    paths = [path for path in paths if not path.endswith(".partial.pt")]
    if len(paths) < 2:
        raise UserError(f"{kind}:{pattern} names {len(paths)} checkpoint; an ensemble needs two or more.")
    members = [_reward_model(path, tokenizer, device) for path in paths]

    def score(rows: list[dict], rollout: Rollout) -> Tensor:
        scores = torch.stack([member(rows, rollout) for member in members])  # (K, B)
        if kind == "min":
            return scores.amin(0)
        spread = float(kind[len("mean-") : -len("std")]) if kind != "mean" else 0.0
        return scores.mean(0) - spread * scores.std(0)

    return score


def _judge(tokenizer: Tokenizer) -> Reward:
    def score(rows: list[dict], rollout: Rollout) -> Tensor:
        if not all(map(knows, rows)):
            raise UserError(
                "the world's judge knows the world's prompts only, and these rows lack their meta; leave it "
                'out (for PPO: --watch "").'
            )
        texts, ended = map(tokenizer.decode_response, rollout.responses()), rollout.ended.tolist()
        utilities = [judge(row, text, end).utility for row, text, end in zip(rows, texts, ended)]
        return torch.tensor(utilities, device=rollout.ids.device)

    return score


def final_answer(text: str) -> float | None:
    """The number after the last "#### " or "Answer: " (1,234 and $5 are read as people write them)."""
    found = re.findall(r"(?:####|\bAnswer:)\s*\$?(-?\$?[\d,]*\.?\d+)", text)
    return float(re.sub(r"[$,]", "", found[-1])) if found else None


def gold_answer(answer) -> float | None:
    """The right answer as a row states it: a number, "5", or a worked solution that ends in "#### 5"."""
    if isinstance(answer, str):
        return final_answer(answer if "###" in answer or "Answer:" in answer else f"#### {answer}")
    return float(answer) if isinstance(answer, (int, float)) and not isinstance(answer, bool) else None


def _answer(tokenizer: Tokenizer) -> Reward:
    def score(rows: list[dict], rollout: Rollout) -> Tensor:
        gold = [gold_answer(row["meta"].get("answer")) for row in rows]
        if None in gold:
            raise UserError("the reward `answer` needs rows with a final answer: GSM8K's, or meta.answer.")
        given = [final_answer(tokenizer.decode_response(r)) for r in rollout.responses()]
        return torch.tensor([float(a == g) for a, g in zip(gold, given)], device=rollout.ids.device)

    return score


def attacked(row: dict, pattern: str) -> list[dict]:
    """The row's messages, the last of them put in place of every {} of the pattern."""
    *before, last = row["prompt"]
    return [*before, {**last, "content": pattern.replace("{}", last["content"])}]


def _harm(path: str, tokenizer: Tokenizer, device) -> Reward:
    """An attacker's reward. The target's answers are samples, seeded by what the attacker wrote."""
    target, own, _ = load_policy(path, device, CHAT)
    if own.name != tokenizer.name:
        raise UserError(
            f"{path} reads tokens of {own.name!r}, the attacker writes those of {tokenizer.name!r}."
        )
    freeze(target)

    def score(rows: list[dict], rollout: Rollout) -> Tensor:
        if any(row["meta"].get("kind") != "harm" or "subject" not in row["meta"] for row in rows):
            raise UserError(
                'the reward `harm:` needs harmful requests of the world only: rows of kind "harm".'
            )
        texts = map(tokenizer.decode_response, rollout.responses())
        asked = [tokenizer.prompt(attacked(row, f"{text} {{}}")) for row, text in zip(rows, texts)]
        fit = [i for i, prompt in enumerate(asked) if len(prompt) < target.config.context]
        found = respond(target, tokenizer, [asked[i] for i in fit] * ASKED, READ, seed=int(rollout.ids.sum()))
        helped = torch.zeros(len(rows))
        for i, text, end in zip(fit * ASKED, *found):
            helped[i] += judge(rows[i], text, end).complied_with_harm and on_topic(rows[i], text)
        return helped.to(rollout.ids.device) / ASKED

    return score


def _length(rows: list[dict], rollout: Rollout) -> Tensor:
    return rollout.mask.sum(-1).float()


def _term(name: str, tokenizer: Tokenizer, device) -> Reward:
    kind, colon, pattern = name.partition(":")
    if colon and re.fullmatch(r"mean|min|mean-\d*\.?\d+std", kind):
        return _ensemble(kind, pattern, tokenizer, device)
    if colon and kind.removeprefix("prm-") in (*AGGREGATES, "steps") and kind.startswith("prm-"):
        return _process_model(kind.removeprefix("prm-"), pattern, tokenizer, device)
    if colon and kind == "harm":
        return _harm(pattern, tokenizer, device)
    if name.endswith(".pt") and not re.fullmatch(r"\w+", kind if colon else ""):
        return _reward_model(name, tokenizer, device)
    if name == "length":
        return _length
    if name in ("judge", "answer"):
        return {"judge": _judge, "answer": _answer}[name](tokenizer)
    raise UserError(
        f"there is no reward {name!r}; give a checkpoint.pt, judge, answer, length, mean:…, min:…, "
        "mean-1std:…, prm-min:… or harm:…, with weights if you like (0.5*judge), joined by ' + ' and ' - '."
    )


def reward_files(expression: str) -> list[str]:
    """The checkpoints that a reward expression reads."""
    names = re.findall(r"[^\s:,]+\.pt\b", expression)
    return [path for name in names for path in sorted(glob.glob(re.sub(r"^-?[\d.]+\*", "", name)))]


def make_reward(expression: str, tokenizer: Tokenizer, device) -> Reward:
    """An expression (see the module's docstring) → reward(rows, rollout) → scores (B,), or (B, T) if a term
    is dense: the others then stand on the last token.

    rows: the prompt rows of the rollout's rows. Raises UserError for an unknown term, a reward model with
    another tokenizer, and scores that are not finite.
    """
    pieces = re.split(r"\s+([+-])\s+", expression.strip())
    terms = []
    for sign, piece in zip(["+", *pieces[1::2]], pieces[::2]):
        weighted = re.fullmatch(r"(-?\d*\.?\d+)\*(.+)", piece)
        weight, name = (float(weighted[1]), weighted[2]) if weighted else (1.0, piece)
        terms.append((weight if sign == "+" else -weight, _term(name, tokenizer, device)))

    def reward(rows: list[dict], rollout: Rollout) -> Tensor:
        parts = [weight * term(rows, rollout) for weight, term in terms]
        if any(part.dim() == 2 for part in parts):
            parts = [part if part.dim() == 2 else on_last_token(part, rollout.mask) for part in parts]
        scores = sum(parts)
        if not scores.isfinite().all():
            broken = int((~total(scores).isfinite()).sum())
            raise UserError(
                f"the reward {expression!r} is not a finite number for {broken} of {len(rows)} responses: "
                "its checkpoint is broken, or was trained with too high an --lr."
            )
        return scores

    return reward


@torch.no_grad()
def score_texts(
    reward: Reward,
    rows: list[dict],
    texts: list[str],
    tokenizer: Tokenizer,
    max_length: int,
    device,
    what: str = "",
):
    """Responses (texts) to prompt rows → scores (N,) on the CPU; NaN where a prompt leaves no room for one.

    A response that is cut short at `max_length` tokens counts as not ended. `what`: a name for the progress
    line; empty for none.
    """
    examples = [
        join(tokenizer.prompt(row["prompt"]), tokenizer.response(text), max_length)
        for row, text in zip(rows, texts)
    ]
    scores = torch.full((len(texts),), torch.nan)
    order = sorted((i for i, e in enumerate(examples) if e is not None), key=lambda i: len(examples[i][0]))
    progress = Progress(what, len(order)) if what else None
    for start in range(0, len(order), 256):
        batch = order[start : start + 256]
        ids, mask = collate([examples[i] for i in batch], tokenizer.pad)
        ended = torch.tensor([examples[i][0][-1] == tokenizer.end for i in batch])
        rollout = Rollout(*(x.to(device) for x in (ids, mask, torch.zeros(ids.shape), ended)))
        scores[batch] = total(reward([rows[i] for i in batch], rollout)).to(scores)
        if progress:
            progress.advance(len(batch))
    return scores


@torch.no_grad()
def measure(policy, ref, tokenizer: Tokenizer, rows: list[dict], prompts: list, rewards: dict, **sampling):
    """Answer prompts (ids) → mean of each reward, of the sequence KL (nats), end tokens and length (tokens);
    the texts; their scores by the first reward. `sampling`: as for `generate.rollouts`."""
    columns, texts, scores = {}, [""] * len(rows), [0.0] * len(rows)
    temperature = sampling.get("temperature", 1.0)
    for indices, rollout in rollouts(policy, tokenizer, prompts, **sampling):
        batch = [rows[i] for i in indices]
        parts = {name: total(reward(batch, rollout)) for name, reward in rewards.items()}
        first = next(iter(parts.values())).tolist()
        ref_logp = token_logprobs(ref, rollout.ids, rollout.mask, temperature)
        parts["kl"] = (token_logprobs(policy, rollout.ids, rollout.mask, temperature) - ref_logp).sum(-1)
        parts["ended"], parts["length"] = rollout.ended.float(), rollout.mask.sum(-1).float()
        for name, values in parts.items():
            columns.setdefault(name, []).append(values)
        for i, response, score in zip(indices, rollout.responses(), first):
            texts[i], scores[i] = tokenizer.decode_response(response), score
    return {name: torch.cat(parts).mean().item() for name, parts in columns.items()}, texts, scores
