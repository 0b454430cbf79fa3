"""Will it fit? What a run needs at most, in bytes, from shapes alone and before it starts.

A run is largest in one of five moments. Weights and AdamW's two moments are there in all but the first.

    loading   every weight in fp32, and those of one model twice: it comes from a file
    learning  what the forward pass keeps for the backward pass, and the logits of a chunk of tokens
    stepping  all gradients, and what AdamW makes of the largest
    sampling  keys and values of what is written, and what picks one token of each row
    reading   a forward pass without gradient: held-out rows, rewards, old log-probs

docs/memory.md derives every term, and compares their sum with what runs took.
"""

import sys

import numpy as np
import torch.nn as nn

from nanoalign.extent import Batch, largest
from nanoalign.footprint import activations, in_fp32, passing, rounded, tensors
from nanoalign.hf import is_folder
from nanoalign.kernels import LARGE, _chunk_size
from nanoalign.model import GPT
from nanoalign.packing import FLEX_FROM
from nanoalign.training import in_bf16

SUMMED = ("base", "sft")  # their losses are sums over tokens: the gradient is formed in the forward pass
SHARED = ("dpo", "orpo", "rm", "grpo")  # sequences of one prompt share a row


def from_files(config, trained: nn.Module, own: list[nn.Module]) -> int:
    """Bytes that loading takes beside all weights: those of one file, and of a scalar model what it shares as
    soon as it is there. A folder is read one tensor after another."""
    more, every = [0], in_fp32(*own)
    for model in own:
        if isinstance(model, GPT):
            more += [0 if is_folder(getattr(config, "init", "hf:")) else in_fp32(model)]
        elif model is trained:  # a copy of a language model
            more += [in_fp32(model.gpt)]
        else:
            shared = in_fp32(model) + in_fp32(*(x for x in own if x is not model)) - every
            more += [in_fp32(model) + shared]
    return max(more)


def moments(
    config, stage: str, trained: nn.Module, held, batch: Batch, device, size: int, chunk: int = 0
) -> dict[str, dict[str, int]]:
    """The moments of a run → what is in memory then, by name, in bytes.

    held: models beside what is trained. size: bytes of a number in a matrix product. chunk: tokens whose
    logits exist at one time, by default as many as kernels.py takes on the device.
    """
    own = [*(trained if isinstance(trained, nn.ModuleList) else [trained]), *filter(None, held)]
    models = [part for model in own for part in model.modules() if isinstance(part, GPT)]
    learners = [x for x in dict.fromkeys(models) if any(p.requires_grad for p in x.parameters())]
    on_gpu, shape, head = device.type == "cuda", learners[0].config, learners[0].head.weight
    D, V = shape.width, shape.vocab_size
    chunk, eager = chunk or _chunk_size(V, 4, device), V < LARGE
    block = max(passing(model, size) for model in models)
    padded = not eager and V % 64 > 0
    copy = head.numel() * (size if on_gpu else 4) * (size == 2 or padded)  # of the head: rounded or padded

    def logits(tokens: int) -> int:  # of a chunk, fp32
        return 4 * V * min(tokens, chunk)

    def reading(tokens: int) -> int:  # the residual stream; then a block, or logits and their statistics
        return 4 * D * tokens + max(block * tokens, logits(tokens) * (3 if eager else 1) + copy)

    tokens, scored, learnt = batch.rows * batch.length, batch.scored, head.requires_grad
    gradient = head.nbytes * (scored > 0 and learnt)
    if stage in SUMMED:  # the head's gradient is there before the backward pass is
        kept, first = gradient, gradient
    else:
        kept, first = (scored > 0) * copy + logits(scored) * (scored <= chunk), 0
    forward = first + (scored > 0) * copy + logits(scored) * (2 if eager else 1)
    if stage in ("dpo", "kto") and len(own) > 1:  # the reference reads what the policy has just read
        forward = max(forward, kept + reading(tokens))
    backward = gradient + max(kept, tokens * block // 2)
    masked = stage in SHARED and batch.length < FLEX_FROM.get(device.type, batch.length + 1)
    masked = masked or getattr(config, "packing", False)
    saved = sum(activations(x, batch.rows, batch.length, size, on_gpu, masked) for x in learners)
    saved += 4 * D * (batch.apart + 2 * scored) + rounded(learners, size, graph=True)

    gradients = [p.nbytes for p in tensors(trained) if p.requires_grad]
    due, halves = sum(gradients), rounded(learners, size, graph=False)
    cache = 2 * size * shape.layers * shape.kv_heads * shape.head_dim * batch.drawn * batch.slots
    picking = 32 * V * batch.drawn + copy  # logits, log-probs, and in fp64 their cumulative sum
    always = {"weights": sum(x.nbytes for x in tensors(*own)), "optimiser": 2 * due}
    always |= {"cache": cache} if on_gpu else {}  # kept, for CUDA graphs are bound to it
    learn = {"gradients": due * (batch.pieces > 1), "activations": saved, "logits": max(forward, backward)}
    return {
        "loading": {"weights": in_fp32(*own), "files": 0 if on_gpu else from_files(config, trained, own)},
        "learning": always | learn,
        "stepping": always | {"gradients": due, "passing": 0 if on_gpu else 2 * max(gradients)},
        "sampling": always | {"cache": cache, "passing": halves + max(block * batch.asked, picking)},
        "reading": always | {"passing": halves + reading(batch.read)},
    }


def plan(config, stage: str, trained: nn.Module, held, order, made_from, steps: int) -> dict:
    """Say what a run needs at most → that, in bytes by name, and when. With --plan say all, and stop. The
    examples: what of made_from has as many parts as the order."""
    device, N = next(trained.parameters()).device, len(order.lengths)
    examples = next(x for x in made_from if isinstance(x, (list, np.ndarray)) and len(x) == N)
    batch = largest(config, stage, order, examples, steps)
    found = moments(config, stage, trained, held, batch, device, 2 if in_bf16(config, device) else 4)
    most = max(found, key=lambda name: sum(found[name].values()))

    def line(name: str) -> str:
        parts = {part: n / 2**20 for part, n in found[name].items() if n}
        told = " + ".join(f"{n:,.0f} {part}" for part, n in parts.items())
        return f"{sum(parts.values()):,.0f} MB while {name}: {told}"

    print(f"memory: at most {line(most)}")
    if config.plan:
        print(*(f"  {line(name)}" for name in found), sep="\n")
        print("  of", ", ".join(f"{name} {n:,}" for name, n in batch._asdict().items()))
        sys.exit()
    return {"moment": most, **found[most]}
