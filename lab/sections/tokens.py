"""The token view: by how much tokens became more or less likely, and what PPO made of a sample."""

from dataclasses import replace

import torch
from torch import Tensor

from lab.sections.models import Models, family, quietly
from lab.sections.page import Html, decimals, el, missing, number, said, table
from nanoalign.data import collate, join
from nanoalign.generate import Rollout
from nanoalign.logprobs import token_logprobs
from nanoalign.rewards import unless_unfinished
from nanoalign.rollouts import rollout
from train_ppo import gae, shape_rewards

STRONG, FAINT = 1.0, 0.05  # nats at which a token's colour is full, and below which it has none
READABLE = 5, 20  # tokens of a sample that is shown
CONTINUED = 16  # how often each state is continued for its value


def piece(tokenizer, token: int) -> str:
    """How a token is shown: line breaks by a sign, special tokens by their names."""
    return tokenizer.decode([token], specials=True).replace("\n", "⏎")


def coloured(tokenizer, ids: list[int], mask: list[bool], ratio: list[float]) -> Html:
    """A row of tokens: the prompt grey, scored ones coloured by log π − log π_ref."""
    parts = []
    for token, scored, r in zip(ids, mask, ratio):
        if scored:
            strength = f"--s: {min(abs(r) / STRONG, 1) * 55:.0f}%"
            kind = "" if abs(r) < FAINT else "up" if r > 0 else "down"
            parts.append(
                said(
                    piece(tokenizer, token),
                    "span",
                    class_=f"token {kind} said".replace("  ", " "),
                    style=strength,
                    title=f"log π − log π_ref = {number(r, 3)}",
                )
            )
        else:
            parts.append(said(piece(tokenizer, token), "span", class_="token prompt said"))
    return el("p", parts, class_="tokens")


def ratios(policy, ref, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """log π − log π_ref (B, T) and log π, 0 outside mask."""
    with torch.no_grad():
        logp = token_logprobs(policy, ids, mask)
        return logp - token_logprobs(ref, ids, mask), logp


def pairs(models: Models, name: str, title: str, most: int = 120) -> Html:
    """Two held-out pairs by a policy that learnt from pairs: where its margin grew most; a middling one."""
    head = el("h3", f"{title}: two held-out pairs")
    if not models.has(name, "sft") or not models.held_out_pairs:
        return el(
            "article", head, missing(f"{name}.pt, sft.pt or held-out pairs", "make demo"), id=f"tokens-{name}"
        )
    (policy, tokenizer, *_), (ref, *_) = models.policy(name), models.policy("sft")
    context, examples = policy.config.context, []
    for row in models.held_out_pairs[:most]:
        prompt = tokenizer.prompt(row["prompt"])
        both = [join(prompt, tokenizer.response(row[side]), context) for side in ("chosen", "rejected")]
        examples += both if None not in both else []
    ids, mask = collate(examples, tokenizer.pad)
    ratio, _ = ratios(policy, ref, ids, mask)
    order = (ratio.sum(-1)[::2] - ratio.sum(-1)[1::2]).argsort(descending=True)
    parts = []
    for what, i in (("where the margin grew most", order[0]), ("a middling one", order[len(order) // 2])):
        parts.append(el("p", what[0].upper() + what[1:], class_="quiet"))
        for side, k in (("chosen", 2 * i), ("rejected", 2 * i + 1)):
            n = len(examples[k][0])
            strip = coloured(tokenizer, ids[k, :n].tolist(), mask[k, :n].tolist(), ratio[k, :n].tolist())
            total = f"Σ = {number(ratio[k].sum().item(), 3)} nats"
            parts.append(el("div", el("h4", side, " ", el("span", total, class_="value")), strip))
    return el("article", head, parts, id=f"tokens-{name}")


def continued(policy, ref, reward, tokenizer, row: dict, drawn: Rollout, config: dict, seed: int) -> Tensor:
    """What is to come, on average, from before each token of one response (1, T) → values (1, T).

    The value by its definition: each state is continued `CONTINUED` times by the policy, and what follows is
    summed, KL's price and the score. (The critic that PPO trained is not kept in ppo.pt.)
    """
    ids, mask = drawn.ids[0], drawn.mask[0]
    at = mask.nonzero().flatten().tolist()
    begun = [ids[:t].numpy() for t in at for _ in range(CONTINUED)]
    limit = config["max_new_tokens"]
    new = quietly(rollout, policy, tokenizer, begun, limit, seed, temperature=1.0)
    start = torch.tensor([at[0]] * len(begun))
    columns = torch.arange(new.ids.shape[1])
    whole = new.mask | (
        (columns >= start[:, None]) & (columns < torch.tensor([len(b) for b in begun])[:, None])
    )
    answer = replace(new, mask=whole, read={})
    with torch.no_grad():
        score = unless_unfinished(reward([row] * len(begun), answer), answer, config["missing_eos_score"])
        logp, ref_logp = (token_logprobs(model, new.ids, whole) for model in (policy, ref))
    shaped = shape_rewards(score, logp, ref_logp, whole, config["beta"])
    to_come = shaped.masked_fill(~new.mask, 0).sum(-1).view(len(at), CONTINUED).mean(1)
    return torch.zeros(1, len(ids)).index_copy(1, torch.tensor(at), to_come[None])


def drawn_ones(models: Models, most: int) -> list[tuple[dict, Rollout]]:
    """Samples of PPO's policy on prompts of different families, of a length that can be read."""
    policy, tokenizer, _, content = models.policy("ppo")
    found: dict[str, tuple] = {}
    for row in models.prompts:
        prompt = tokenizer.prompt(row["prompt"])
        drawn = quietly(
            rollout, policy, tokenizer, [prompt], content["config"]["max_new_tokens"], models.seed
        )
        if READABLE[0] <= int(drawn.mask.sum()) <= READABLE[1]:
            found.setdefault(family(row), (row, drawn))
    telling = sorted(found, key=lambda name: name not in ("belief", "harm", "fact"))
    return [found[name] for name in telling[:most]]


def sample(models: Models, row: dict, drawn: Rollout) -> Html:
    """One sample, token by token: ratio, reward, value, advantage."""
    (policy, tokenizer, _, content), (ref, *_) = models.policy("ppo"), models.policy("sft")
    config, (ids, mask) = content["config"], (drawn.ids, drawn.mask)
    ratio, logp = ratios(policy, ref, ids, mask)
    reward = models.reward()
    with torch.no_grad():
        score = unless_unfinished(reward([row], drawn), drawn, config["missing_eos_score"])
    shaped = shape_rewards(score, logp, logp - ratio, mask, config["beta"])
    values = continued(policy, ref, reward, tokenizer, row, drawn, config, models.seed + 1)
    advantages, _ = gae(shaped, values, mask, config["gamma"], config["lam"])
    lines = []
    for t in mask[0].nonzero().flatten().tolist():
        cells = (logp, ratio, shaped, values, advantages)
        token = said(piece(tokenizer, int(ids[0, t])), "code")
        lines.append([token, *(decimals(x[0, t].item()) for x in cells)])
    strip = coloured(tokenizer, ids[0].tolist(), mask[0].tolist(), ratio[0].tolist())
    names = ["token", "log π", "log π/π_ref", "reward", "value", "advantage"]
    summed = f"{family(row)}: score {number(score.item(), 3)}, KL {number(ratio.sum().item(), 3)} nats"
    return el(
        "div",
        el("h4", summed),
        strip,
        el(
            "details",
            el("summary", "token by token"),
            table(names, lines, f"{family(row)}: of each token", class_="numbers"),
            open=True,
        ),
        class_="sample",
    )


def ppo(models: Models, most: int = 2) -> Html:
    head = el("h3", "PPO: samples, token by token")
    if not models.has("ppo", "sft", "rm") or not models.prompts:
        return el(
            "article",
            head,
            missing("ppo.pt, sft.pt, rm.pt or held-out prompts", "make demo"),
            id="tokens-ppo",
        )
    config = models.policy("ppo")[3]["config"]
    shown = [sample(models, row, drawn) for row, drawn in drawn_ones(models, most)]
    words = (
        f"The reward of a token is −β (log π − log π_ref) with β = {number(config['beta'])}, on the last "
        f"one with the score. The value is what was still to come, in the mean of {CONTINUED} continuations "
        "from there (the critic itself is not kept); the advantage is GAE’s with γ = "
        f"{number(config['gamma'])} and λ = {number(config['lam'])}, not whitened."
    )
    none = el("p", f"No sample has {READABLE[0]} to {READABLE[1]} tokens.", class_="missing")
    return el("article", head, el("p", words), shown or none, id="tokens-ppo")


def section(models: Models) -> Html:
    lead = el(
        "p",
        "The prompt is grey. A scored token is ",
        el("span", "green", class_="token up", style="--s: 40%"),
        " where training made it likelier than the SFT model had it, and ",
        el("span", "underlined", class_="token down", style="--s: 40%"),
        " where it made it less likely; the number stands in its title.",
        class_="lead",
    )
    parts = pairs(models, "dpo", "DPO"), ppo(models)
    return el("section", el("h2", "Token view"), lead, parts, id="tokens")
