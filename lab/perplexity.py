"""Perplexity of language models on questions as plain text: exp of a token's mean negative log-prob.

    python -m lab.perplexity --checkpoints out/real/smollm2.pt --prompts gsm8k_test.jsonl

Its ± is a standard error over texts (delta method). Bits a byte compare models of different tokenizers.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lab.scoreboard import table
from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.data import collate
from nanoalign.logprobs import token_logprobs
from nanoalign.rows import read_rows
from nanoalign.statistics import clustered_error
from nanoalign.training import setup


@dataclass
class Config:
    checkpoints: tuple = ("out/demo/base.pt",)  # the models
    prompts: str = ""  # prompt rows; their last turns are read
    count: int = 100  # of them
    max_length: int = 256  # tokens of one
    batch_size: int = 8  # of them at a time
    seed: int = 0  # of nothing: a perplexity is not drawn
    device: str = "auto"  # auto, cpu, cuda, …


@torch.no_grad()
def negative_logprobs(policy, tokenizer, texts: list[str], config: Config, device) -> np.ndarray:
    """Texts → of each the sum of −log p, how many tokens that is of, and bytes (N, 3)."""
    found = []
    ids = [[*tokenizer.start, *tokenizer.encode(text)][: config.max_length] for text in texts]
    for at in range(0, len(ids), config.batch_size):
        batch = ids[at : at + config.batch_size]
        padded, mask = collate([(np.array(x), np.ones(len(x), dtype=bool)) for x in batch], tokenizer.pad)
        logp = token_logprobs(policy, padded.to(device), mask).sum(-1).tolist()
        for one, x in zip(logp, batch):
            found.append((-one, len(x) - 1, len(tokenizer.decode(x[1:]).encode())))
    return np.array(found)


def ratio(top: np.ndarray, bottom: np.ndarray) -> tuple[float, float]:
    """Σ top / Σ bottom over texts (N,), and its standard error."""
    mean = top.sum() / bottom.sum()
    return float(mean), clustered_error((top - mean * bottom) / bottom.mean(), range(len(top)))


def main(config: Config) -> None:
    if not config.prompts:
        raise UserError("name the questions: --prompts rows.jsonl.")
    device, autocast = setup(config)
    rows = read_rows(config.prompts, "prompts")[: config.count]
    texts, found = [row["prompt"][-1]["content"] for row in rows], []
    for path in config.checkpoints:
        policy, tokenizer, _ = load_policy(path, device)
        with autocast:
            sums, tokens, size = negative_logprobs(policy, tokenizer, texts, config, device).T
        nats, error = ratio(sums, tokens)
        level, (bits, spread) = math.exp(nats), (x / math.log(2) for x in ratio(sums, size))
        of, each = f"{level:.2f} ± {error * level:.2f}", f"{bits:.3f} ± {spread:.3f}"
        found.append([Path(path).stem, f"{len(texts)}", f"{int(tokens.sum()):,}", of, each])
    table(["", "texts", "tokens", "perplexity", "bits a byte"], found)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
