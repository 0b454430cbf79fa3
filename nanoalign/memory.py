"""Will it fit? What a run needs at most, in bytes, from shapes alone and before it starts.

A run is largest in one of six moments. Weights and AdamW's two moments are there in all but the first.

    loading   every weight in fp32, and those of one model twice: it comes from a file
    forward   what a forward pass keeps for the backward pass; the logits of a chunk of tokens
    backward  the same without the logits; gradients of the head and, on the way, of a block
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
    rounds = size == 2 or (V >= LARGE and V % 64 > 0)  # the head's weights: to bf16, or up to 64 rows
    copy = head.numel() * (size if on_gpu else 4) * rounds

    def logits(tokens: int) -> int:  # fp32, of the largest of equal parts, none above a chunk
        return 4 * V * -(-tokens // max(1, -(-tokens // chunk)))

    def reading(tokens: int, scored: int, numbers: int) -> int:  # a block, or so many numbers per logit
        head = logits(scored) * (numbers if eager else 1) + copy
        return 4 * D * tokens + max(block * tokens, head * (scored > 0))

    tokens, scored = batch.rows * batch.length, batch.scored
    masked = getattr(config, "packing", False) or (
        stage in SHARED and batch.length < FLEX_FROM.get(device.type, batch.length + 1)
    )
    saved, again = 4 * D * (batch.apart + 2 * scored) + rounded(learners, size, graph=True), 0
    for model in learners:
        of_block, beside = activations(model, batch.length, size, on_gpu, masked)
        layers = 4 * D if model.checkpointing else of_block
        saved += tokens * (shape.layers * layers + beside)
        again = max(again, tokens * of_block * model.checkpointing)  # one block's, in the backward pass

    gradient = head.nbytes * (scored > 0 and head.requires_grad)
    formed = gradient * (stage in SUMMED)
    kept = formed or (scored > 0) * copy + logits(scored) * (scored <= chunk)
    forward = formed + (scored > 0) * copy + logits(scored) * (2 if eager else 1)
    if stage in ("dpo", "kto") and len(own) > 1:  # the reference reads what the policy has just read
        forward = max(forward, kept + reading(tokens, scored, 2))
    backward = gradient + max(kept, again + tokens * block // 2)

    gradients = [p.nbytes for p in tensors(trained) if p.requires_grad]
    due, halves = sum(gradients), rounded(learners, size, graph=False)
    speaks = scored or any(getattr(model, "reader", None) for model in own)
    read = halves + reading(batch.read, batch.read * bool(speaks), 3)
    cache = 2 * size * shape.layers * shape.kv_heads * shape.head_dim * batch.drawn * batch.slots
    picking = 32 * V * batch.drawn + copy  # logits, log-probs, and in fp64 their cumulative sum
    always = {"weights": sum(x.nbytes for x in tensors(*own)), "optimiser": 2 * due}
    always |= {"cache": cache} if on_gpu else {}  # kept, for CUDA graphs are bound to it
    learn = always | {"gradients": due * (batch.pieces > 1), "activations": saved}
    return {
        "loading": {"weights": in_fp32(*own), "files": 0 if on_gpu else from_files(config, trained, own)},
        "forward": learn | {"logits": forward},
        "backward": learn | {"passing": backward},
        "stepping": always | {"gradients": due, "passing": 0 if on_gpu else 2 * max(gradients)},
        "sampling": always | {"cache": cache, "passing": halves + max(block * batch.asked, picking)},
        "reading": always | {"passing": read},
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
        return f"{sum(parts.values()):,.0f} MB, {name}: {told}"

    print(f"memory: at most {line(most)}")
    if config.plan:
        print(*(f"  {line(name)}" for name in found), sep="\n")
        print("  of", ", ".join(f"{name} {n:,}" for name, n in batch._asdict().items()))
        sys.exit()
    return {"moment": most, **found[most]}
