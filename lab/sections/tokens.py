"""The token view: what each token of a few rows became more or less likely by, and what PPO made of a sample."""

from dataclasses import replace

import torch
from torch import Tensor

from lab.sections.models import Models, last_words, quietly
from lab.sections.page import Html, el, missing, number, said, table
from nanoalign.data import collate, join
from nanoalign.generate import Rollout, rollout
from nanoalign.logprobs import last_scored, token_logprobs
from nanoalign.rewards import unless_unfinished
from train_ppo import gae, shape_rewards

STRONG = 2.0  # nats at which a token's colour is full
CONTINUED = 24  # how often each state is continued for its value


def piece(tokenizer, token: int) -> str:
    """How a token is shown: line breaks by a sign, special tokens by their names."""
    return tokenizer.decode([token], specials=True).replace("\n", "⏎")


def coloured(tokenizer, ids: list[int], mask: list[bool], ratio: list[float]) -> Html:
    """A row of tokens: the prompt grey, scored ones coloured by log π − log π_ref."""
    parts = []
    for token, scored, r in zip(ids, mask, ratio):
        if scored:
            strength = f"--s: {min(abs(r) / STRONG, 1) * 55:.0f}%"
            kind = "up" if r >= 0 else "down"
            parts.append(said(piece(tokenizer, token), "span", class_=f"token {kind} said", style=strength,
                              title=f"log π − log π_ref = {number(r, 3)}"))  # fmt: skip
        else:
            parts.append(said(piece(tokenizer, token), "span", class_="token prompt said"))
    return el("p", parts, class_="tokens")


def ratios(policy, ref, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """log π − log π_ref (B, T) and log π, 0 outside mask."""
    with torch.no_grad():
        logp = token_logprobs(policy, ids, mask)
        return logp - token_logprobs(ref, ids, mask), logp


def pairs(models: Models, name: str, title: str, most: int = 2) -> Html:
    """Held-out pairs by a policy that learnt from pairs."""
    if not models.has(name, "sft") or not models.held_out_pairs:
        return missing(f"{name}.pt, sft.pt or held-out pairs", "make demo")
    (policy, tokenizer, *_), (ref, *_) = models.policy(name), models.policy("sft")
    rows = models.held_out_pairs
    parts = []
    for row in rows[:: max(1, len(rows) // most)][:most]:
        prompt = tokenizer.prompt(row["prompt"])
        examples = [join(prompt, tokenizer.response(row[side]), policy.config.context) for side in ("chosen", "rejected")]
        if None in examples:
            continue
        ids, mask = collate(examples, tokenizer.pad)
        ratio, _ = ratios(policy, ref, ids, mask)
        for side, own, scored, values, example in zip(("chosen", "rejected"), ids, mask, ratio, examples):
            n = len(example[0])
            strip = coloured(tokenizer, own[:n].tolist(), scored[:n].tolist(), values[:n].tolist())
            total = number(values.sum().item(), 3)
            parts.append(el("div", el("h4", side, " ", el("span", f"Σ = {total} nats", class_="value")), strip))
    return el("article", el("h3", f"{title}: two pairs"), parts, id=f"tokens-{name}")


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
    whole = new.mask | ((columns >= start[:, None]) & (columns < torch.tensor([len(b) for b in begun])[:, None]))
    answer = replace(new, mask=whole, read={})
    with torch.no_grad():
        score = unless_unfinished(reward([row] * len(begun), answer), answer, config["missing_eos_score"])
        logp, ref_logp = (token_logprobs(model, new.ids, whole) for model in (policy, ref))
    shaped = shape_rewards(score, logp, ref_logp, whole, config["beta"])
    to_come = shaped.masked_fill(~new.mask, 0).sum(-1).view(len(at), CONTINUED).mean(1)
    return torch.zeros(1, len(ids)).index_copy(1, torch.tensor(at), to_come[None])


def sample(models: Models) -> Html:
    """A sample of the PPO policy, token by token: ratio, reward, value, advantage."""
    if not models.has("ppo", "sft", "rm") or not models.prompts:
        return missing("ppo.pt, sft.pt, rm.pt or held-out prompts", "make demo")
    (policy, tokenizer, _, content), (ref, *_) = models.policy("ppo"), models.policy("sft")
    config, row = content["config"], models.prompts[min(2, len(models.prompts) - 1)]
    prompt = tokenizer.prompt(row["prompt"])
    drawn = quietly(rollout, policy, tokenizer, [prompt], config["max_new_tokens"], models.seed)
    ids, mask = drawn.ids, drawn.mask
    ratio, logp = ratios(policy, ref, ids, mask)
    reward = models.reward()
    with torch.no_grad():
        score = unless_unfinished(reward([row], drawn), drawn, config["missing_eos_score"])
    shaped = shape_rewards(score, logp, logp - ratio, mask, config["beta"])
    values = continued(policy, ref, reward, tokenizer, row, drawn, config, models.seed + 1)
    advantages, _ = gae(shaped, values, mask, config["gamma"], config["lam"])
    lines, last = [], int(last_scored(mask)[0])
    for t in mask[0].nonzero().flatten().tolist():
        cells = (logp, ratio, shaped, values, advantages)
        lines.append([said(piece(tokenizer, int(ids[0, t])), "code"), *(number(x[0, t].item(), 2) for x in cells)])
    names = ["token", "log π", "log π − log π_ref", "reward", "value", "advantage"]
    strip = coloured(tokenizer, ids[0].tolist(), mask[0].tolist(), ratio[0].tolist())
    words = (
        f"The reward of a token is −β (log π − log π_ref) with β = {number(config['beta'])}, and on the last one "
        f"the score too: {number(score.item(), 3)}. The value is what was still to come, in the mean of "
        f"{CONTINUED} continuations from there; the advantage is GAE’s with γ = {number(config['gamma'])} and "
        f"λ = {number(config['lam'])}, before it is whitened."
    )
    assert last < ids.shape[1]
    return el("article", el("h3", "PPO: a sample, token by token"), el("p", said(last_words(row)), class_="quiet"),
              strip, el("p", words), table(names, lines, "of each token, in nats"), id="tokens-ppo")  # fmt: skip


def section(models: Models) -> Html:
    lead = el(
        "p", "The prompt is grey. A scored token is ",
        el("span", "green", class_="token up", style="--s: 40%"), " where training made it likelier than the SFT "
        "model had it, and ", el("span", "underlined", class_="token down", style="--s: 40%"),
        " where it made it less likely; the number stands in its title.", class_="lead",
    )  # fmt: skip
    parts = pairs(models, "dpo", "DPO"), sample(models)
    return el("section", el("h2", "Token view"), lead, parts, id="tokens")
