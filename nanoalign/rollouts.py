"""Answers to many prompts, a batch at a time, in the prompts' order, shared out among processes."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanoalign import UserError
from nanoalign.cli import Progress
from nanoalign.generate import Rollout, generate, uniform
from nanoalign.logprobs import token_logprobs
from nanoalign.model import GPT
from nanoalign.parallel import fill, gather, share
from nanoalign.seeds import derived_seed
from nanoalign.sharding import whole
from nanoalign.tokenizer import Tokenizer


def rollouts(
    model: GPT, tokenizer: Tokenizer, prompts: list[np.ndarray], max_new_tokens: int, seed: int,
    batch_size: int = 256, what: str = "", group: int = 1, **sampling,
) -> Iterator[tuple[list[int], Rollout]]:  # fmt: skip
    """Sample one response per prompt (ids), a batch at a time → its indices into `prompts`, its Rollout.

    Prompts of similar length share a batch. `what`: a name for the progress line; empty for none. Of several
    processes each gets its share of each batch, `group` neighbours together: parallel.py.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    if order and not len(prompts[order[0]]):
        raise UserError("a prompt is empty: there is nothing to answer.")
    progress, device = Progress(what, len(prompts)) if what else None, model.embed.weight.device
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        mine = share(len(batch), group)
        rows = [batch[i] for i in mine]
        keys = [np.asarray(prompts[i]).tobytes() for i in rows]
        number = {key: n for n, key in enumerate(dict.fromkeys(keys))}  # each distinct prompt is read once
        of = None if len(number) == len(keys) else torch.tensor([number[key] for key in keys], device=device)
        asked = [torch.tensor(prompts[i]) for i in dict(zip(keys, rows)).values()]
        ids = pad_sequence(asked, True, tokenizer.pad).to(device)
        lengths = torch.tensor([len(prompt) for prompt in asked], device=device)
        end, pad = tokenizer.end, tokenizer.pad
        own = derived_seed(seed, "batch", start)
        numbers = uniform(len(batch), max_new_tokens, own, device)[torch.from_numpy(mine).to(device)]
        with whole(model):
            drawn = generate(model, ids, lengths, max_new_tokens, end, pad, of, numbers=numbers, **sampling)
        yield rows, drawn
        if progress:
            progress.advance(len(batch))


def rollout(
    model: GPT, tokenizer: Tokenizer, prompts: list[np.ndarray], max_new_tokens: int, seed: int, **sampling
) -> tuple[np.ndarray, Rollout]:
    """Sample one response per prompt (ids), all in one batch → this process's, and which those are: of one
    process all, in the order asked."""
    [(asked, drawn)] = rollouts(model, tokenizer, prompts, max_new_tokens, seed, len(prompts), **sampling)
    order = np.argsort(asked, kind="stable")
    back = torch.from_numpy(order).to(drawn.ids.device)
    rows = Rollout(drawn.ids[back], drawn.mask[back], drawn.logp[back], drawn.ended[back])
    return np.array(asked)[order], rows


def together(mine: np.ndarray, drawn: Rollout, *values: Tensor | None) -> tuple:
    """What `rollout` gave, and values of these rows → those of all processes, in the order asked."""
    ids, mask, logp, ended, *values = gather(mine, drawn.ids, drawn.mask, drawn.logp, drawn.ended, *values)
    return Rollout(ids, mask, logp, ended), *values


def respond(model: GPT, tokenizer: Tokenizer, prompts: list, max_new_tokens: int, seed: int, **options):
    """Answer every prompt (ids) → texts, and whether each ended by itself, both in the prompts' order."""
    texts, ended, mine = [""] * len(prompts), [False] * len(prompts), []
    for rows, rollout in rollouts(model, tokenizer, prompts, max_new_tokens, seed, **options):
        for i, response, has_ended in zip(rows, rollout.responses(), rollout.ended.tolist()):
            texts[i], ended[i] = tokenizer.decode_response(response), has_ended
            mine.append(i)
    fill(mine, texts, ended)
    return texts, ended


@torch.no_grad()
def sample_kl(policy: GPT, ref: GPT, tokenizer: Tokenizer, prompts: list, max_new_tokens: int, seed: int):
    """Sequence KL(policy ‖ ref) in nats, an unbiased estimate per prompt: log π − log π_ref of a sample.

    → (N,), on the CPU.
    """
    kl, mine = torch.zeros(len(prompts)), []
    for rows, r in rollouts(policy, tokenizer, prompts, max_new_tokens, seed):
        kl[rows] = (r.logp - token_logprobs(ref, r.ids, r.mask)).sum(-1).to(kl)
        mine += rows
    fill(mine, kl)
    return kl
