"""AI feedback: how a model is asked to criticise, to revise and to judge, and the constitution it is given.

These are the only places where the three requests are worded: critique.py and collect.py ask in these words,
and the world's demonstrations (nanoalign/world/feedback.py) teach them. They are short, for the world's
models have a context of 128 tokens. An answer is quoted inside the user's turn, so that an SFT run on
demonstrations learns the critique and the revision, and not the answer that had to be revised.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanoalign import UserError
from nanoalign.cli import Progress
from nanoalign.data import collate
from nanoalign.logprobs import next_token_logits
from nanoalign.model import GPT
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
def choice_logprobs(
    model: GPT, tokenizer: Tokenizer, asked: list[list[dict]], batch_size: int = 256
) -> Tensor:
    """Requests for a judgement → the model's log-probs of answering "A" and of answering "B", (N, 2) on the
    CPU; NaN where a request leaves no room for an answer."""
    (a,), (b,) = tokenizer.encode(" A"), tokenizer.encode(" B")  # as `Tokenizer.response` begins
    prompts = [tokenizer.prompt(messages) for messages in asked]
    found, device = torch.full((len(prompts), 2), torch.nan), model.embed.weight.device
    order = [i for i in np.argsort([len(p) for p in prompts]) if len(prompts[i]) < model.config.context]
    progress, parts = Progress("judge", len(order)), []
    for start in range(0, len(order), batch_size):
        batch = [prompts[i] for i in order[start : start + batch_size]]
        ids, _ = collate([(p, np.ones(len(p), dtype=bool)) for p in batch], tokenizer.pad)
        last = torch.tensor([len(p) - 1 for p in batch])
        hidden = model.hidden(ids.to(device))[torch.arange(len(batch), device=device), last.to(device)]
        parts.append(next_token_logits(model, hidden).log_softmax(-1)[:, [a, b]])
        progress.advance(len(batch))
    if parts:
        found[order] = torch.cat(parts).float().cpu()
    return found
