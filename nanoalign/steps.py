"""Solutions in steps, as a process reward model reads them.

    <|user|>Start with 7 …<|end|><|assistant|> 7 + 5 = 12<|step|>12 * 3 = 36<|step|>Answer: 36<|step|>

A step ends where its line does. The token that ends it, a newline or the response's end token, is replaced by
<|step|>, which no text can spell, and there the model's output is the logit of "this step is right". So a
sampled response is read in place: the score of a step stands at the very token with which the policy closed
it. Nothing in a sample tells a line that ends a step from one inside it, so in training every line of a step
ends in such a token, too.
"""

import numpy as np
import torch
from torch import Tensor

from nanoalign.model import GPT
from nanoalign.scalar import ScalarGPT
from nanoalign.tokenizer import Tokenizer

UNLABELLED = -100.0
AGGREGATES = ("min", "product", "last")


def step_example(
    prompt: np.ndarray, steps: list[str], tokenizer: Tokenizer, max_length: int
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int]]]:
    """Prompt ids (P,), steps → ids (T,) and a mask true at the tokens that end a line, cut at max_length, as
    the steps are read when they are sampled; and of each step that is whole (its number, where it starts,
    where the token stands that ends it). Blank steps that one token ends together are one."""
    steps = [tokenizer.decode(tokenizer.encode(step)) for step in steps]  # as they are read: Unicode's form C
    text = "\n".join(steps)
    response = tokenizer.response(text)
    marks = np.isin(response, [*tokenizer.newlines, tokenizer.end])
    ids = np.concatenate((prompt, np.where(marks, tokenizer.step, response)))[:max_length]
    marks = np.concatenate((prompt < 0, marks))[:max_length]
    breaks = np.cumsum([len(step.encode()) + 1 for step in steps]) - 1  # the byte that ends each step's line,
    breaks += tokenizer.shift(text)
    reached = np.cumsum(tokenizer.lengths[response])  # bytes up to and with each token, the end token one
    ends = len(prompt) + np.searchsorted(reached[:-1], breaks, side="right")  # … the end token at the latest
    spans, start = [], len(prompt)
    for number, end in enumerate(ends.tolist()):
        if start <= end < max_length:
            spans.append((number, start, end))
        start = end + 1
    return ids, marks, spans


@torch.no_grad()
def read_as_line_breaks(policy: GPT, tokenizer: Tokenizer) -> None:
    """Let a policy, which knows what a line break means and nothing yet of <|step|>, read both alike."""
    for table in {policy.embed.weight, policy.head.weight}:
        table[tokenizer.step] = table[tokenizer.newlines[0]]


def step_ends(ids: Tensor, mask: Tensor, tokenizer: Tokenizer) -> Tensor:
    """ids and response mask (B, T) → bool (B, T): the response's tokens that end a step."""
    breaks = torch.tensor([*tokenizer.newlines, tokenizer.end], device=ids.device)
    return mask & torch.isin(ids, breaks)


@torch.no_grad()
def step_probabilities(model: ScalarGPT, drawn, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """A Rollout → P(step is right) (B, T) and where steps end, bool (B, T)."""
    ends = step_ends(drawn.ids, drawn.mask, tokenizer)
    hidden = drawn.hidden(model, drawn.ids.masked_fill(ends, tokenizer.step))
    return model.score(hidden).float().sigmoid(), ends


def aggregate(p: Tensor, ends: Tensor, how: str) -> Tensor:
    """P(step is right) (B, T) where steps end → one number per solution (B,), 0 where no step has ended.

    The minimum over the steps, their product (Lightman et al. 2023, §2.6), or the last step's value.
    """
    if how == "last":
        positions = torch.arange(p.shape[1], device=p.device)
        value = p.gather(1, positions.masked_fill(~ends, 0).amax(1, keepdim=True)).squeeze(1)
    else:
        ones = p.masked_fill(~ends, 1.0)
        value = ones.amin(1) if how == "min" else ones.prod(1)
    return value.masked_fill(~ends.any(1), 0.0)
