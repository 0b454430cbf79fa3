"""A GPT with a scalar head: a reward model, a critic, a process reward model.

    ScalarGPT(config)(ids)   -> (B, T): one number per position

With a *reader*, the frozen language model that it starts from, the trunk is told of each token how likely the
reader found it. To judge "the capital of France is Rome" a scalar model would have to recall Paris and then
compare; a language model's head compares what was recalled with every token there is, and knows. From some
twenty thousand pairs a small trunk does not learn to do so itself: `make reader` measures what a reader is
worth here, and what more layers are. Large models need none.
"""

import math
from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor

from nanoalign.logprobs import last_scored, likelihoods
from nanoalign.model import GPT, GPTConfig


class ScalarHead(nn.Linear):
    """Hidden states (B, T, D) → one number per position (B, T), in the head's own dtype, autocast or not.

    Init N(0, 1/√(D+1)), no bias to start from (Stiennon et al. 2020, lm-human-preferences)."""

    def __init__(self, width: int):
        super().__init__(width, 1)
        nn.init.normal_(self.weight, std=1 / math.sqrt(width + 1))
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype)).squeeze(-1)


class ScalarGPT(nn.Module):
    """The same GPT with a scalar head: ids (B, T) → (B, T). reader: with room for a reader, see above."""

    def __init__(self, config: GPTConfig, reader: bool = False):
        super().__init__()
        self.config = config
        self.gpt = GPT(replace(config, tied=True))  # no output head of its own: it would never be used
        self.score = ScalarHead(config.width)
        self.reader = GPT(config).eval().requires_grad_(False) if reader else None
        self.read_in = nn.Linear(3, config.width, bias=False) if reader else None
        if reader:
            nn.init.normal_(self.read_in.weight, std=0.3)

    @classmethod
    def from_policy(cls, policy: GPT, reader: bool = False) -> "ScalarGPT":
        """A copy of the policy's trunk under a fresh head, with the policy as its reader if it has one."""
        model, trunk = cls(policy.config, reader).to(policy.embed.weight.device), policy.state_dict()
        if reader:
            model.reader.load_state_dict(trunk)
            print("reader: a frozen copy of the model reads along (a large one needs none: --no-reader)")
        trunk["head.weight"] = trunk["embed.weight"]  # the trunk's own output head is never used
        model.gpt.load_state_dict(trunk)
        return model

    def hidden(self, ids: Tensor, positions=None, visible=None, seen: Tensor | None = None) -> Tensor:
        """`GPT.hidden` of the trunk: (B, T, D). seen (B, T, 3): what the reader makes of ids, if it is known
        already; it must be where ids are several sequences in a row, for it is of each alone."""
        if self.reader is None:
            return self.gpt.hidden(ids, positions, visible)
        seen = likelihoods(self.reader, ids) if seen is None else seen
        return self.gpt.hidden(ids, positions, visible, extra=self.read_in(seen))

    def forward(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        return self.score(self.hidden(ids, seen=seen))


def same_weights(model: GPT, other: GPT) -> bool:
    both = model.state_dict().values(), other.state_dict().values()
    return model.config == other.config and all(map(torch.equal, *both))


def share_reader(model: ScalarGPT, ref: GPT | None) -> None:
    """Where the reference is what a scalar model's reader is, let them be one model in memory."""
    if model.reader is not None and ref is not None and same_weights(model.reader, ref):
        model.reader = ref


def response_scores(model: ScalarGPT, ids: Tensor, mask: Tensor, hidden: Tensor | None = None) -> Tensor:
    """ids (B, T), mask (B, T) → the model's output at each row's last scored token (B,), fp32.

    The mask may stay on the CPU. hidden (B, T, D): model.hidden(ids), if it is known already.
    """
    values = model(ids) if hidden is None else model.score(hidden)
    return values.gather(1, last_scored(mask)[:, None].to(values.device, non_blocking=True)).squeeze(1)
