"""Perplexity of a language model on texts, each read by itself: exp of a token's mean negative log-prob.

    python -m lab.perplexity --checkpoint out/real/smollm2.pt --data gsm8k_test.jsonl --field question

Its ± is a standard error over texts (delta method). Bits a byte compare models of different tokenizers.
"""

import json
import math
from dataclasses import dataclass

import numpy as np
import torch

from nanoalign import UserError, cli
from nanoalign.checkpoint import load_policy
from nanoalign.data import collate
from nanoalign.logprobs import token_logprobs
from nanoalign.training import setup


@dataclass
class Config:
    checkpoint: str = "out/demo/base.pt"  # the model
    data: str = ""  # JSONL
    field: str = "text"  # the field of a row that is read
    count: int = 100  # texts
    max_length: int = 256  # tokens of a text
    batch_size: int = 8  # texts at a time
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
    error = np.sqrt(np.square(top - mean * bottom).sum() * len(top) / max(1, len(top) - 1)) / bottom.sum()
    return float(mean), float(error)


def main(config: Config) -> None:
    if not config.data:
        raise UserError("name the texts: --data rows.jsonl --field text.")
    device, autocast = setup(config)
    policy, tokenizer, _ = load_policy(config.checkpoint, device)
    try:
        with open(config.data, encoding="utf-8") as file:
            texts = [json.loads(line)[config.field] for line in file if line.strip()][: config.count]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{config.data} has no texts in {config.field!r} ({type(error).__name__}).") from None
    with autocast:
        sums, tokens, size = negative_logprobs(policy, tokenizer, texts, config, device).T
    nats, error = ratio(sums, tokens)
    level = math.exp(nats)
    bits, spread = (x / math.log(2) for x in ratio(sums, size))
    print(f"{len(texts)} texts, {int(tokens.sum()):,} tokens: perplexity {level:.2f} ± {error * level:.2f}")
    print(f"{bits:.3f} ± {spread:.3f} bits a byte")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
