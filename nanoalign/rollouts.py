"""Answers to many prompts, a batch at a time, in the prompts' order; several processes share them."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from nanoalign import UserError
from nanoalign.cli import Progress
from nanoalign.generate import Rollout, generate, uniform
from nanoalign.model import GPT
from nanoalign.parallel import fill
from nanoalign.pieces import share
from nanoalign.seeds import derived_seed
from nanoalign.sharding import home, whole
from nanoalign.tokenizer import Tokenizer


def rollouts(
    model: GPT, tokenizer: Tokenizer, prompts: list[np.ndarray], max_new_tokens: int, seed: int,
    batch_size: int = 256, what: str = "", group: int = 1, into: Callable[[], tuple] = tuple, **sampling,
) -> Iterator[tuple[list[int], Rollout]]:  # fmt: skip
    """Sample one response per prompt (ids), a batch at a time → its indices into `prompts`, its Rollout.

    Prompts of similar length share a batch. `what`: a name for the progress line; empty for none. Of several
    processes each gets its share of every batch, `group` neighbours together; into() → columns (lists,
    arrays) of all prompts, which the caller fills at those indices: after the last batch they hold what the
    other processes have filled, too.
    """
    order, asked = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), []
    if order and not len(prompts[order[0]]):
        raise UserError("a prompt is empty: there is nothing to answer.")
    progress, device = Progress(what, len(prompts)) if what else None, home(model)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        mine = share(len(batch), group)
        rows = [batch[i] for i in mine]
        keys = [np.asarray(prompts[i]).tobytes() for i in rows]
        number = {key: n for n, key in enumerate(dict.fromkeys(keys))}  # each distinct prompt is read once
        of = None if len(number) == len(keys) else torch.tensor([number[key] for key in keys], device=device)
        read = [torch.tensor(prompts[i]) for i in dict(zip(keys, rows)).values()]
        ids = pad_sequence(read, True, tokenizer.pad).to(device)
        lengths = torch.tensor([len(prompt) for prompt in read], device=device)
        own = uniform(len(batch), max_new_tokens, derived_seed(seed, "batch", start), device)
        how = {"of": of, "group": group, "numbers": own[torch.from_numpy(mine).to(device)], **sampling}
        with whole(model):
            drawn = generate(model, ids, lengths, max_new_tokens, tokenizer.end, tokenizer.pad, **how)
        yield rows, drawn
        asked += rows
        if progress:
            progress.advance(len(batch))
    fill(asked, *into())


def rollout(
    model: GPT, tokenizer: Tokenizer, prompts: list[np.ndarray], max_new_tokens: int, seed: int, **sampling
) -> Rollout:
    """Sample one response per prompt (ids), all in one batch, in the order asked: of several processes each
    gets its `rows`, and `Rollout.together` all."""
    [(asked, drawn)] = rollouts(model, tokenizer, prompts, max_new_tokens, seed, len(prompts), **sampling)
    order = np.argsort(asked, kind="stable")
    back = torch.from_numpy(order).to(drawn.ids.device)
    own = drawn.ids[back], drawn.mask[back], drawn.logp[back], drawn.ended[back]
    return Rollout(*own, np.array(asked)[order], drawn.group, drawn.size)


def respond(model: GPT, tokenizer: Tokenizer, prompts: list, max_new_tokens: int, seed: int, **options):
    """Answer every prompt (ids) → texts, and whether each ended by itself, both in the prompts' order."""
    texts, ended = [""] * len(prompts), [False] * len(prompts)
    options["into"] = lambda: (texts, ended)
    for rows, rollout in rollouts(model, tokenizer, prompts, max_new_tokens, seed, **options):
        for i, response, has_ended in zip(rows, rollout.responses(), rollout.ended.tolist()):
            texts[i], ended[i] = tokenizer.decode_response(response), has_ended
    return texts, ended


@torch.no_grad()
def sample_kl(policy: GPT, ref: GPT, tokenizer: Tokenizer, prompts: list, max_new_tokens: int, seed: int):
    """Sequence KL(policy ‖ ref) in nats, an unbiased estimate per prompt: log π − log π_ref of a sample.

    → (N,), on the CPU.
    """
    kl = torch.zeros(len(prompts))
    for rows, r in rollouts(policy, tokenizer, prompts, max_new_tokens, seed, into=lambda: [kl]):
        kl[rows] = (r.logp - r.logprobs(ref, 1.0)).sum(-1).to(kl)
    return kl
