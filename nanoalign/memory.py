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
from nanoalign.footprint import Models, activations, from_files, in_fp32, rounded, tensors
from nanoalign.packing import FLEX_FROM
from nanoalign.sharding import home
from nanoalign.training import in_bf16

SUMMED = ("base", "sft")  # their losses are sums over tokens: the gradient is formed in the forward pass
SHARED = ("dpo", "orpo", "rm", "grpo")  # sequences of one prompt share a row
SAMPLED = ("ppo", "grpo")  # entropies are asked for, too: one more number of each logit
BESIDE = ("dpo", "kto")  # the reference reads a micro-batch when the policy's activations are there


def reading(models: Models, tokens: int, scored: int, numbers: int, beside: int = 0) -> int:
    """Bytes of a pass without gradient: the residual stream, and a block's numbers or those of logits."""
    stream = 4 * models.learners[0].config.width * (tokens + beside)
    return stream + max(models.block * tokens, models.head.passing(scored, numbers))


def learning(config, stage: str, models: Models, batch: Batch) -> tuple[int, int, int]:
    """→ bytes that a forward pass keeps; that log-probs take at its end; that the backward pass takes."""
    tokens, scored, head, size = batch.rows * batch.length, batch.scored, models.head, models.size
    dense = batch.length < FLEX_FROM.get("cuda" if models.on_gpu else "cpu", batch.length + 1)
    masked = dense and (stage in SHARED or getattr(config, "packing", False))
    width = models.learners[0].config.width
    saved, again = 4 * width * (batch.apart + 2 * scored) + rounded(models.learners, size, graph=True), 0
    for gpt in models.learners:
        block, beside = activations(gpt, batch.length, size, models.on_gpu, masked)
        saved += tokens * (gpt.config.layers * (4 * width if gpt.checkpointing else block) + beside)
        again = max(again, tokens * block * gpt.checkpointing)  # a block's, once it is computed again
    gradient = head.gradient * (scored > 0)
    formed = gradient * (stage in SUMMED)
    kept = formed or head.kept(scored)
    forward = formed + head.passing(scored, 2)
    if stage in BESIDE and len(models.own) > 1:
        forward = max(forward, kept + reading(models, tokens, scored, 2))
    of_head = formed or head.passing(scored, 1)  # logits of several chunks are made again, one by one
    return saved, forward, gradient + max(of_head, again + tokens * models.block // 2)


def moments(config, stage: str, models: Models, batch: Batch) -> dict[str, dict[str, int]]:
    """The moments of a run → what is in memory then, by name, in bytes."""
    own, head, shape = models.own, models.head, models.learners[0].config
    gradients = [p.nbytes for p in tensors(models.trained) if p.requires_grad]
    due, halves = sum(gradients), rounded(models.learners, models.size, graph=False)
    saved, forward, backward = learning(config, stage, models, batch)
    cache = 2 * models.size * shape.layers * shape.kv_heads * shape.head_dim * batch.drawn * batch.slots
    picking = 32 * head.tokens * batch.drawn + head.copy  # logits, log-probs, in fp64 their cumulative sum
    read, judged, numbers = batch.read, batch.judged, 3 if stage in SAMPLED else 2
    if any(getattr(model, "reader", None) for model in own):  # it asks for all, also while rm and prm learn
        apart, numbers = 0 if stage in SAMPLED else batch.apart, 3
        read, judged = max(batch.read, apart), max(batch.told, apart)
    on_cpu = not models.on_gpu
    always = {"weights": sum(x.nbytes for x in tensors(*own)), "optimiser": 2 * due}
    always |= {"cache": cache} if models.on_gpu else {}  # kept, for CUDA graphs are bound to it
    learn = always | {"gradients": due * (batch.pieces > 1), "activations": saved}
    return {
        "loading": {"weights": in_fp32(*own), "files": on_cpu * from_files(config, models.trained, own)},
        "forward": learn | {"logits": forward},
        "backward": learn | {"passing": backward},
        "stepping": always | {"gradients": due, "passing": on_cpu * 2 * max(gradients)},
        "sampling": always | {"cache": cache, "passing": halves + max(models.block * batch.asked, picking)},
        "reading": always | {"passing": halves + reading(models, read, judged, numbers, batch.beside)},
    }


def plan(config, stage: str, trained: nn.Module, held, order, made_from, steps: int) -> dict:
    """Say what a run needs at most → that, in bytes by name, and when. With --plan say all, and stop. The
    examples: what of made_from has as many parts as the order."""
    device, N = home(trained), len(order.lengths)
    examples = next(x for x in made_from if isinstance(x, (list, np.ndarray)) and len(x) == N)
    batch = largest(config, stage, order, examples, steps)
    models = Models.of(trained, held, 2 if in_bf16(config, device) else 4, device)
    found = moments(config, stage, models, batch)
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
