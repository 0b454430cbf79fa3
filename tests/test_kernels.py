"""The log-prob kernel against log_softmax and autograd in float64; its memory, and its compiled path."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.exc
import torch._inductor.exc
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanoalign import compiler, kernels
from nanoalign.kernels import linear_logprobs, linear_losses, pad_vocabulary
from nanoalign.logprobs import token_logprobs
from nanoalign.model import GPT, GPTConfig

N, D, V = 23, 16, 37
CHUNKS = (1, 5, N, 100)  # one by one; does not divide N; exactly all; more than all
on_gpu = pytest.mark.gpu


def inputs(dtype=torch.float64, n: int = N, d: int = D, v: int = V, device="cpu") -> tuple[Tensor, ...]:
    """hidden, weight, bias (leaves) and targets, with logits of standard deviation about 2."""
    g = torch.Generator().manual_seed(0)
    hidden, bias = torch.randn(n, d, generator=g), torch.randn(v, generator=g)
    weight = torch.randn(v, d, generator=g) * 2 / d**0.5
    leaves = (x.to(device, dtype).requires_grad_() for x in (hidden, weight, bias))
    return *leaves, torch.randint(v, (n,), generator=g).to(device)


def oracle(hidden, weight, bias, targets, temperature=1.0) -> tuple[Tensor, Tensor]:
    """log-prob and entropy by their definitions, in float64."""
    logits = hidden.double() @ weight.double().T
    logp = ((logits if bias is None else logits + bias.double()) / temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def gradients(outputs, leaves) -> tuple[Tensor, ...]:
    """Of a sum of the outputs in which every element has a weight of its own."""
    g = torch.Generator().manual_seed(1)
    loss = sum((x.double() * torch.randn(len(x), generator=g).to(x.device)).sum() for x in outputs)
    return torch.autograd.grad(loss, leaves, retain_graph=True)


def assert_close(actual, expected, dtype, roundings: int = 4 * D):
    """Equal up to `roundings` roundings of `dtype`, relative to the largest value. The default: a logit of
    size up to 16 is a sum of D products.
    """
    atol = roundings * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


# ---- the kernel


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_float64_autograd_of_the_formula(chunk, temperature, with_bias):
    hidden, weight, bias, targets = inputs()
    bias = bias if with_bias else None
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    expected = oracle(hidden, weight, bias, targets, temperature)
    logp = linear_logprobs(hidden, weight, targets, bias, temperature, chunk=chunk)
    both = linear_logprobs(hidden, weight, targets, bias, temperature, entropy=True, chunk=chunk)
    for outputs, wanted in (([logp], expected[:1]), (both, expected), (both[1:], expected[1:])):
        for ours, theirs in zip(outputs, wanted):
            assert_close(ours, theirs, torch.float64)
        for ours, theirs in zip(gradients(outputs, leaves), gradients(wanted, leaves)):
            assert_close(ours, theirs, torch.float64, N * D)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_log_sum_exp_and_its_gradient_equal_float64_autograd(chunk):
    *leaves, targets = inputs()
    hidden, weight, bias = leaves
    logits = (hidden @ weight.T + bias) / 0.7
    wanted = [*oracle(*leaves, targets, 0.7), logits.logsumexp(-1)]
    ours = linear_logprobs(hidden, weight, targets, bias, 0.7, entropy=True, chunk=chunk, lse=True)
    alone = linear_logprobs(hidden, weight, targets, bias, 0.7, chunk=chunk, lse=True)
    for outputs, expected in ((ours, wanted), (alone, wanted[::2])):
        for a, b in zip(outputs, expected, strict=True):
            assert_close(a, b, torch.float64)
        for a, b in zip(gradients(outputs, leaves), gradients(expected, leaves)):
            assert_close(a, b, torch.float64, N * D)


def clipped(logp: Tensor, *rest: Tensor) -> Tensor:
    """A loss with a kink, as PPO's: of logp, (the entropy,) old log-probs and advantages."""
    *entropy, old, advantage = rest
    ratio = (logp - old).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return loss - 0.1 * entropy[0] if entropy else loss


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_loss_formed_in_the_forward_pass_equals_float64_autograd(chunk, entropy, dtype):
    *leaves, targets = inputs(dtype)
    expected = oracle(*leaves, targets, 0.7)
    g = torch.Generator().manual_seed(3)
    noise, advantage = (torch.randn(N, dtype=torch.float64, generator=g) for _ in range(2))
    values = (expected[0].detach() + 0.5 * noise, advantage)
    ratio = (expected[0] - values[0]).exp()
    assert ((ratio < 0.75) & (advantage < 0)).any() and ((ratio - 1).abs() < 0.15).any()  # both sides
    wanted = clipped(*expected[: 1 + entropy], *values).sum()
    total, logp, H = linear_losses(
        *leaves[:2], targets, clipped, values, leaves[2], 0.7, entropy=entropy, chunk=chunk
    )
    fp32 = torch.promote_types(dtype, torch.float32)
    assert_close(total, wanted, fp32, N * D)
    assert_close(logp, expected[0], fp32)
    assert not entropy or H.sub(expected[1]).abs().max() < 1e-4
    assert not (logp.requires_grad or H.requires_grad)
    ours, theirs = (torch.autograd.grad(3 * loss, leaves) for loss in (total, wanted))
    for a, b in zip(ours, theirs):
        assert a.dtype == dtype
        assert_close(a, b, dtype, 4 if dtype == torch.bfloat16 else N * D)


def test_a_loss_formed_in_the_forward_pass_costs_nothing_without_gradients():
    hidden, weight, _, targets = inputs()
    with torch.no_grad():
        total, logp, _ = linear_losses(hidden, weight, targets, lambda logp: -logp, chunk=5)
    assert not total.requires_grad
    torch.testing.assert_close(total, -logp.sum())
    torch.testing.assert_close(total, -oracle(hidden, weight, None, targets)[0].sum())
    empty = linear_losses(hidden[:0], weight, targets[:0], lambda logp: -logp)
    empty[0].backward()
    assert empty[0] == 0 and (weight.grad == 0).all()


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_padded_vocabulary_changes_nothing(with_bias):
    hidden, weight, bias, targets = inputs()
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    wide, shifted = pad_vocabulary(weight, bias if with_bias else None, 64)
    assert wide.shape == (64, D) and shifted.shape == (64,)
    ours = linear_logprobs(hidden, wide, targets, shifted, 0.7, entropy=True, chunk=5, lse=True)
    theirs = linear_logprobs(hidden, weight, targets, bias if with_bias else None, 0.7, True, 5, True)
    for a, b in zip((*ours, *gradients(ours, leaves)), (*theirs, *gradients(theirs, leaves))):
        assert_close(a, b, torch.float64, N * D)


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("entropy", [True, False])
def test_gradients_agree_with_finite_differences(chunk, entropy):
    hidden, weight, bias, targets = inputs(n=3, d=2, v=4)

    def f(hidden, weight, bias):
        return linear_logprobs(hidden, weight, targets, bias, 0.7, entropy, chunk)

    assert torch.autograd.gradcheck(f, (hidden, weight, bias))


def test_only_the_gradients_asked_for_are_computed():
    hidden, weight, bias, targets = inputs()
    wanted = gradients(oracle(hidden, weight, bias, targets)[:1], (hidden, weight, bias))
    for i, leaf in enumerate((hidden, weight, bias)):  # the two others are frozen
        frozen = [x if x is leaf else x.detach() for x in (hidden, weight, bias)]
        logp = linear_logprobs(*frozen[:2], targets, frozen[2], chunk=5)
        assert_close(gradients([logp], [leaf])[0], wanted[i], torch.float64, N * D)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_16_bit_inputs_lose_nothing_beyond_fp32_rounding(dtype, device):
    *leaves, targets = inputs(dtype, device=device)
    outputs = linear_logprobs(*leaves[:2], targets, leaves[2], 0.7, entropy=True, chunk=5)
    expected = oracle(*leaves, targets, 0.7)  # of the very same bf16 numbers
    for ours, theirs in zip(outputs, expected):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs, torch.float32)
    for ours, theirs in zip(gradients(outputs, leaves), gradients(expected, leaves)):
        assert ours.dtype == dtype
        assert_close(ours, theirs, dtype, 2 if dtype == torch.bfloat16 else N * D)


@on_gpu
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_on_a_gpu_16_bit_products_are_exact_also_where_fp32_ones_are_rounded(precision):
    """Long sums, whose parts cuBLAS may add in bf16 where the result is bf16: then off by 2⁻⁹ of a part."""
    torch.set_float32_matmul_precision(precision)
    *leaves, targets = inputs(torch.bfloat16, d=4096, device="cuda")
    outputs = linear_logprobs(*leaves[:2], targets, leaves[2], 0.7, entropy=True, chunk=5)
    for ours, theirs in zip(outputs, oracle(*leaves, targets, 0.7)):
        assert_close(ours, theirs, torch.float32, roundings=8 * 64)  # √D of them at a time


@on_gpu
def test_on_a_gpu_fp32_products_are_rounded_to_11_bits_where_that_is_allowed_and_nowhere_else():
    *leaves, targets = inputs(torch.float32, device="cuda")
    expected, off = oracle(*leaves, targets)[0], {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        off[precision] = (linear_logprobs(*leaves[:2], targets, leaves[2]) - expected).abs().max().item()
    assert off["highest"] < 1e-4 < off["high"] < 1e-2


def test_a_weight_gradient_is_summed_in_fp32_over_chunks():
    """4096 chunks add 2⁻¹³ each: in bf16 such a sum stops growing long before it reaches ½."""
    n = 4096
    hidden = torch.full((n, 1), 2.0**-12, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)  # p = ½: ∂logp/∂z = ±½
    linear_logprobs(hidden, weight, torch.zeros(n, dtype=torch.long), chunk=1).sum().backward()
    assert weight.grad.flatten().tolist() == [0.5, -0.5]


def test_autocast_rounds_the_inputs_and_nothing_else():
    hidden, weight, _, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = linear_logprobs(hidden, weight, targets, temperature=0.7, entropy=True, chunk=5)
        assert torch.is_autocast_enabled("cpu")
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    expected = oracle(*rounded, None, targets, 0.7)
    for ours, theirs in zip(outputs, expected):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs, torch.float32)
    for ours, theirs in zip(gradients(outputs, (hidden, weight)), gradients(expected, rounded)):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs, torch.bfloat16, 2)


def test_huge_logits_stay_finite():
    hidden, weight, bias, targets = inputs(torch.float32)
    outputs = linear_logprobs(1e4 * hidden, weight, targets, bias, entropy=True)
    assert all(x.isfinite().all() for x in (*outputs, *gradients(outputs, (hidden, weight, bias))))
    assert (outputs[0] <= 0).all()


def test_no_tokens_give_no_logprobs_and_zero_gradients():
    hidden, weight, _, _ = inputs(torch.float32, n=0)
    logp, entropy = linear_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long), entropy=True)
    assert logp.shape == entropy.shape == (0,)
    assert linear_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long)).shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, D) and (weight.grad == 0).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    hidden, weight, bias, targets = inputs()
    with pytest.raises(ValueError, match="temperature must be positive"):
        linear_logprobs(hidden, weight, targets, bias, temperature)


# ---- memory


class Largest(TorchDispatchMode):
    """Records the element count of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("separable", [True, False])
def test_no_more_than_one_chunk_of_logits_ever_exists(entropy, dtype, separable):
    def largest(chunk):
        *leaves, targets = inputs(dtype, n=64, d=4, v=512)
        with Largest() as seen:
            if separable:
                options = {"bias": leaves[2], "temperature": 0.7, "entropy": entropy, "chunk": chunk}
                linear_losses(*leaves[:2], targets, lambda *x: sum(x), **options)[0].backward()
                return seen.numel, seen.numel
            outputs = linear_logprobs(*leaves[:2], targets, leaves[2], 0.7, entropy, chunk)
            sum(x.sum() for x in outputs) if entropy else outputs.sum()
            forward = seen.numel
            torch.autograd.backward(outputs, [torch.ones(64)] * 2 if entropy else torch.ones(64))
        return forward, seen.numel

    assert largest(64) == (64 * 512, 64 * 512)  # the recorder does see a whole N × V
    assert largest(8) == (8 * 512, 8 * 512)


def test_the_forward_pass_keeps_nothing_of_size_vocabulary_per_token():
    hidden, weight, bias, targets = inputs(torch.float32, n=64, d=4, v=512)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        logp, _ = linear_logprobs(hidden, weight, targets, bias, 0.7, entropy=True, chunk=8)
    assert hidden.numel() < sum(kept) <= sum(x.numel() for x in (hidden, weight, bias)) + 3 * 64
    assert logp.grad_fn.kept is None


def test_logits_that_fit_one_chunk_are_computed_once(monkeypatch):
    hidden, weight, _, targets = inputs(torch.float32)
    products = []
    logits = kernels._logits
    monkeypatch.setattr(kernels, "_logits", lambda *args: products.append(1) or logits(*args))

    def count(chunk):
        products.clear()
        linear_logprobs(hidden, weight, targets, chunk=chunk).sum().backward()
        return len(products)

    assert count(N) == 1 and count(12) == 2 * 2


def test_by_default_a_chunk_of_logits_fits_the_budget(monkeypatch):
    model = GPT(GPTConfig(vocab_size=1000, context=64, layers=1, width=8, heads=1, mlp_width=8))
    ids = torch.randint(1000, (4, 64), generator=torch.Generator().manual_seed(0))
    budget = 20_005 * 4  # of fp32; no multiple of V, and nothing else in the model is as large
    monkeypatch.setattr(kernels, "BUDGET", {"cpu": budget})
    with Largest() as seen:
        token_logprobs(model, ids).sum().backward()
    assert seen.numel <= budget / 4 < 4 * 64 * 1000
    monkeypatch.setattr(kernels, "BUDGET", {"cpu": 1})  # less than a token's: one at a time
    assert token_logprobs(model, ids[:, :3]).shape == (4, 3)


def test_chunks_follow_the_memory_that_is_there_and_not_what_is_free_of_it(monkeypatch):
    """So two runs round alike, and so does a resumed one, whatever else the machine is doing."""
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**34 // 4096, "SC_AVPHYS_PAGES": 0}
    memory = lambda: (pages["SC_AVPHYS_PAGES"] * 4096, pages["SC_PHYS_PAGES"] * 4096)  # noqa: E731
    properties = lambda device: SimpleNamespace(total_memory=memory()[1])  # noqa: E731
    monkeypatch.setattr(os, "sysconf", pages.get)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: memory())
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)

    def sizes():
        return [kernels._chunk_size(512, 4, torch.device(device)) for device in ("cpu", "cuda")]

    hidden, weight, _, targets = inputs(torch.float32, n=64, d=4, v=512)
    found, bits = [], []
    for free in (2**30, 2**25, 2**14):
        pages["SC_AVPHYS_PAGES"] = free // 4096
        found.append(sizes())
        bits.append(linear_logprobs(hidden, weight, targets))
    assert found == [[2**27 // 2048, 2**34 // 64 // 2048]] * 3
    assert all(torch.equal(bits[0], again) for again in bits)
    pages["SC_PHYS_PAGES"] = 2**26 // 4096  # a 64th of it is less than the budget
    assert sizes() == [512, 512]


@on_gpu
def test_peak_memory_does_not_grow_with_tokens_times_vocabulary():
    def peak(n, v=8191):
        *leaves, targets = inputs(torch.float32, n, 8, v, "cuda")
        torch.cuda.reset_peak_memory_stats()
        linear_logprobs(*leaves[:2], targets, leaves[2], 0.7, chunk=64).sum().backward()
        return torch.cuda.max_memory_allocated()

    peak(64)  # cuBLAS takes its workspace
    assert peak(4096) - peak(1024) < 3072 * 8191 * 4 / 10


# ---- compilation


@pytest.fixture
def fresh_compiler(monkeypatch):
    """As in a new process: nothing compiled yet, and no failure seen."""
    monkeypatch.setattr(compiler, "_works", True)
    kernels._body.cache_clear()
    yield
    kernels._body.cache_clear()


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_the_compiled_path_equals_the_eager_path(monkeypatch, fresh_compiler):
    v = kernels.LARGE
    *leaves, targets = inputs(torch.float32, n=8, d=4, v=v)
    compiled, real_compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compiled.append(f) or real_compile(f, **kw))

    def run():
        outputs = linear_logprobs(*leaves[:2], targets, leaves[2], 0.7, entropy=True, chunk=3)
        return *outputs, *gradients(outputs, leaves)

    fast = run()
    assert compiled == [kernels._statistics, kernels._into_logits] and compiler._works
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for n in (5, 7, 8, 2):  # another number of tokens is no reason to compile again
        linear_logprobs(leaves[0][:n], leaves[1], targets[:n], leaves[2], 0.7, True, 3)[0].sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    kernels._body.cache_clear()
    monkeypatch.setattr(kernels, "LARGE", v + 1)
    for ours, eager in zip(fast, run()):  # gradients are two sums of v products, in an order of their own
        assert_close(ours, eager, torch.float32, roundings=round((2 * v) ** 0.5))
    assert len(compiled) == 2  # the second run was eager


@pytest.mark.parametrize(
    "error",
    [torch._dynamo.exc.TorchDynamoException("no"), torch._inductor.exc.InductorError(OSError("no"), None)],
)
def test_without_a_working_compiler_it_runs_eager_and_says_so_once(
    monkeypatch, fresh_compiler, capsys, error
):
    def broken(function, **options):
        def call(*args):
            raise error

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(kernels, "LARGE", V)
    *leaves, targets = inputs()
    outputs = linear_logprobs(*leaves[:2], targets, leaves[2], 0.7, entropy=True, chunk=5)
    expected = oracle(*leaves, targets, 0.7)
    results, wanted = ((*x, *gradients(x, leaves)) for x in (outputs, expected))
    for ours, theirs in zip(results, wanted):
        assert_close(ours, theirs, torch.float64, N * D)
    printed = [line for line in capsys.readouterr().out.splitlines() if "at a time" not in line]
    assert len(printed) == 1 and "eager" in printed[0]
