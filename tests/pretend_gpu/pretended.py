"""A GPU that is not there: tensors that say they are on cuda:0, and compute on the CPU.

    with pretended_gpu() as gpu:       # needs torch's CUDA build, which imports without a driver
        script.main(script.Config(device="cuda", …))
    gpu.waits                          # where the host waited for the GPU, and how often

torch believes in the device: autocast's rules for CUDA hold, is_cuda is true, fused AdamW is chosen. What a
real one refuses is refused: an operation on tensors of two devices, a product of integers, numpy() without
cpu(). Its random numbers are its own. What compiles does not; a kernel's speed, rounding and memory are a
CPU's.

Backward passes are made by engine.py.
"""

import contextlib
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from engine import run_backward
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = f"{Path(__file__).parents[2]}/"
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
MEMORY = 2**36  # bytes, as of some real one

# the host waits for what only the GPU knows: a number, or how many there are
ASKS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "unique_dim", "_unique2"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "dot", "addmv"}
MIXES = {"copy_", "_to_copy"}  # what tensors of two devices are for
SCALARS = ("_foreach_", "_fused_adamw_", "fill_", "masked_fill")  # a number may come from the CPU
PUTS = {"index_put_", "index_put", "_index_put_impl_"}


class GPUTensor(torch.Tensor):
    """A tensor on cuda:0; `inner` is the one that computes."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        own = torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=CUDA, **layout)
        own.inner = inner
        return own

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function}: a tensor of a pretended GPU that is gone")

    def __tensor_flatten__(self):  # with it Module.to keeps what is tied tied
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return GPUTensor(inner["inner"])

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, how):
        return format(self.item() if self.dim() == 0 else repr(self), how)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = GPUTensor(self.inner.detach().clone()).requires_grad_(self.requires_grad)
            copied._is_param = getattr(self, "_is_param", False)
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        storage = self.inner.untyped_storage()
        _saved[storage._cdata] = storage  # kept, so that no other takes its place
        return self.inner.detach().__reduce_ex__(protocol)

    def __repr__(self):
        return f"GPUTensor({self.inner})"


_saved: dict[int, torch.UntypedStorage] = {}


def on_gpu(x) -> bool:
    return isinstance(x, GPUTensor)


def is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def site() -> str:
    """The line of this project that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename.removeprefix(ROOT)
        if path != frame.f_code.co_filename and not path.startswith(("tests/", ".venv")):
            return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "a test"


class GPU(TorchDispatchMode):
    """Runs every operation where its tensors are, and notes what a real GPU would make slow or inexact."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()  # (operation, line): the host waits until the GPU has come so far
        self.products = Counter()  # (dtype, line): matrix products, by what is multiplied
        self.random = torch.Generator().manual_seed(0).get_state()

    def waited(self, what: str) -> None:
        self.waits[what, site()] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = any(map(on_gpu, tensors))
        target = is_cuda(kwargs["device"]) if kwargs.get("device") is not None else ours
        if not ours and not target:
            return function(*args, **kwargs)
        if ours and name not in MIXES:
            must_be_together(function, name, args, tensors)
        self.note(name, args, kwargs, tensors, target)
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        plain, options = tree_map_only(GPUTensor, lambda x: x.inner, (args, kwargs))
        with self.own_random_numbers(function, options):
            result = compute(function, name, plain, options)
        if not target or not isinstance(result, (Tensor, tuple, list)):
            return result
        wrapped = tree_map_only(Tensor, GPUTensor, result)
        return return_and_correct_aliasing(function, args, kwargs, wrapped) if ours else wrapped

    def note(self, name, args, kwargs, tensors, target) -> None:
        """What a real one would wait for, or multiply."""
        if name in ASKS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.waited(name)
        elif name in ("index", *PUTS):
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            filled = name in PUTS and args[2].numel() == 1 and not on_gpu(args[2])
            if any(map(on_gpu, masks)) and not filled:  # it counts what is true
                self.waited(f"{name} by a mask")
            elif any(not on_gpu(x) for x in args[1] if x is not None):
                self.waited(f"{name} by the CPU's numbers")
        elif name in MIXES:
            source = args[1] if name == "copy_" else args[0]
            moved = on_gpu(source) != (on_gpu(args[0]) if name == "copy_" else target)
            free = args[2:3] == (True,) or kwargs.get("non_blocking")  # of pageable memory only one way
            if moved and not (free and not on_gpu(source)):
                self.waited("to the CPU" if on_gpu(source) else "to the GPU")
        elif name in PRODUCTS:
            dtype = tensors[-1].dtype
            if not dtype.is_floating_point:
                raise NotImplementedError(f"{name} of {dtype}: CUDA has none")
            self.products[dtype, site()] += 1

    @contextlib.contextmanager
    def own_random_numbers(self, function, options):
        """A GPU's random numbers come from a generator of its own."""
        drawn = torch.Tag.nondeterministic_seeded in function.tags and options.get("generator") is None
        if drawn:
            before = torch.get_rng_state()
            torch.set_rng_state(self.random)
        yield
        if drawn:
            self.random = torch.get_rng_state()
            torch.set_rng_state(before)


def must_be_together(function, name: str, args, tensors) -> None:
    """As CUDA: all on the GPU, but for numbers () of an elementwise operation, and for indices."""
    others = [x for x in tensors if not on_gpu(x)]
    if name in ("index", *PUTS) and on_gpu(args[0]):
        indices = [x for x in args[1] if x is not None]
        others = [x for x in others if not any(x is index for index in indices)]
    pointwise = torch.Tag.pointwise in function.tags or name.startswith(SCALARS) or name in PUTS
    if pointwise:
        others = [x for x in others if x.dim()]
    if others:
        shapes = ", ".join(str(tuple(x.shape)) for x in others)
        raise RuntimeError(
            f"{function}: Expected all tensors to be on the same device, but {shapes} on the CPU "
            f"met some on cuda:0, at {site()}"
        )


def compute(function, name: str, args, kwargs):
    """The operation on the CPU, which lacks some that CUDA has."""
    if name == "mm" and function._overloadname == "dtype":  # rounded inputs, products and sums in fp32
        a, b, dtype = args
        assert a.dtype == b.dtype
        return torch.mm(a.float(), b.float()).to(dtype)
    if name == "_fused_rms_norm_backward":
        return torch._decomp.decomposition_table[function](*args, **kwargs)
    return function(*args, **kwargs)


# ------------------------------------------------------------------------------------------ torch.cuda


class Generator(torch.Generator):
    """torch.Generator, on either device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        pass


def upload(make):
    """torch.tensor and its like, which go to the GPU by a way that no mode sees."""

    def made(*args, device=None, **options):
        result = make(*args, **options)
        return result.to(device) if is_cuda(device) else result

    return made


@contextlib.contextmanager
def pretended_gpu():
    """Within it there is a GPU → what happens on it (`GPU`)."""
    gpu = GPU()
    torch._C._ensureCUDADeviceGuardSet()  # one that does nothing: the streams of autograd's nodes

    def seed(value):
        gpu.random = torch.Generator().manual_seed(value).get_state()

    def set_state(state, device=None):
        gpu.random = state[0] if isinstance(state, list) else state

    in_math = torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp
    engine, tag = torch.autograd._engine_run_backward, torch.serialization.location_tag
    properties = SimpleNamespace(total_memory=MEMORY, name="pretended GPU", major=9, minor=0)
    answers = {
        **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True),
        **dict.fromkeys(("is_current_stream_capturing",), False),
        **dict.fromkeys(("device_count",), 1),
        **dict.fromkeys(("current_device", "max_memory_allocated", "memory_allocated"), 0),
        **dict.fromkeys(("reset_peak_memory_stats", "empty_cache", "_lazy_init", "init"), None),
        "get_device_name": "pretended GPU",
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "mem_get_info": (MEMORY, MEMORY),
    }
    replaced = {name: lambda *_, answer=answer, **__: answer for name, answer in answers.items()}
    replaced |= {
        "synchronize": lambda device=None: gpu.waited("synchronize"),
        "manual_seed": seed,
        "manual_seed_all": seed,
        "get_rng_state": lambda device=None: gpu.random,
        "get_rng_state_all": lambda: [gpu.random],
        "set_rng_state": set_state,
        "set_rng_state_all": set_state,
    }
    others = {
        (torch, "Generator"): Generator,
        (torch, "tensor"): upload(torch.tensor),
        (torch, "as_tensor"): upload(torch.as_tensor),
        (torch, "compile"): lambda function, **options: function,
        (torch.compiler, "cudagraph_mark_step_begin"): lambda: None,
        (torch._dynamo, "mark_static_address"): lambda *args, **options: None,
        (torch.autograd, "_engine_run_backward"): partial(run_backward, engine),
        (torch.serialization, "location_tag"): lambda x: "cuda:0" if x._cdata in _saved else tag(x),
    }
    with contextlib.ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        for (owner, name), function in others.items():
            stack.enter_context(mock.patch.object(owner, name, function))
        stack.callback(in_math, torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed())
        in_math(True)  # attention by its formula keeps to the dtype that it is given
        stack.callback(_saved.clear)
        stack.enter_context(gpu)
        yield gpu
