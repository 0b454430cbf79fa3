"""A model in parts: each process keeps one of every weight, gradient and moment, and gathers a block's
weights while they are needed (FSDP2; ZeRO: Rajbhandari et al. 2020, stage 3). docs/distributed.md.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor


def sharded(x: Tensor) -> bool:
    return hasattr(x, "full_tensor")  # a DTensor


def home(model: nn.Module) -> torch.device:
    """Where a model computes: with --offload its parts lie elsewhere."""
    own = next(model.parameters())
    return torch.device(own.device_mesh.device_type) if sharded(own) else own.device


def full(x):
    """A sharded tensor as a whole, on the CPU, one after another where dicts and lists hold several; whatever
    else there is stays as it is. All processes have to ask."""
    if isinstance(x, dict):
        return {name: full(own) for name, own in x.items()}
    if isinstance(x, list):
        return [full(own) for own in x]
    return x.detach().full_tensor().cpu() if sharded(x) else x


def part(x: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return x.to_local() if sharded(x) else x


def like(own: dict, values: dict) -> dict:
    """Whole tensors, each cut as that of its name in `own` is."""

    def cut(x, value):
        if not sharded(x) or not value.dim():
            return value
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(x.device), x.device_mesh, x.placements, src_data_rank=None)

    return {name: cut(own.get(name), value) for name, value in values.items()}


def moments_like(optimizer: torch.optim.Optimizer, saved: dict) -> dict:
    """The optimiser's state from a file, cut as the weights are that it belongs to."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: like(dict.fromkeys(x, own[i]), x) for i, x in saved["state"].items()}
    return {**saved, "state": state}


def shard(model: nn.Module, bf16: bool, offload: bool) -> None:
    """FSDP2 for every GPT in a model, a block at a time, and what is beside: a root each. bf16: blocks are
    gathered in bf16; gradients are added up in fp32. offload: parts, and AdamW, stay on the CPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )  # fmt: skip

    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    kept = CPUOffloadPolicy(torch.cuda.is_available()) if offload else OffloadPolicy()
    options = {"mesh": mesh, "offload_policy": kept}
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for gpt in [m for m in model.modules() if hasattr(m, "blocks") and not hasattr(m, "unshard")]:
        for block in gpt.blocks:
            fully_shard(block, mp_policy=mixed if bf16 else MixedPrecisionPolicy(), **options)
        fully_shard(gpt, reshard_after_forward=False, **options)  # its head is used after it
        register_fsdp_forward_method(gpt, "hidden")
    for layer in list(model.modules()):
        if any(not sharded(p) for p in layer.parameters(recurse=False)):  # a scalar head
            fully_shard(layer, **options)
    for layer in model.modules():
        if hasattr(layer, "unshard"):
            layer.set_gradient_divide_factor(1.0)  # sums, not means
            layer.set_force_sum_reduction_for_comms(True)


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """While this lasts every process has all weights of a sharded model: for sampling, of which each takes
    as many steps as its rows need."""
    parts = [layer for layer in model.modules() if hasattr(layer, "unshard")]
    for layer in parts:
        layer.set_reshard_after_forward(False, recurse=False)
        layer.unshard()
    yield
    for layer in parts:
        layer.set_reshard_after_forward(layer is not model, recurse=False)
        layer.reshard()
