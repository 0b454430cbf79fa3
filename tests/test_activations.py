"""The MLP that makes its activations again, beside autograd's: as exact, and fewer numbers are kept."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from nanoalign.activations import ActivatedLinear
from nanoalign.lora import add
from nanoalign.model import GPT, MLP, GPTConfig

GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True}
SMALL = {"vocab_size": 40, "context": 16, "layers": 2, "width": 24, "heads": 4}
family = pytest.mark.parametrize("style", [{}, GPT2, {"bias": True}], ids=["swiglu", "gelu", "biased"])


def plainly(mlp: MLP, x: torch.Tensor) -> torch.Tensor:
    """The definition, by autograd."""
    x = mlp.up(x)
    if not mlp.gated:
        return mlp.down(F.gelu(x, approximate="tanh"))
    gate, up = x.chunk(2, dim=-1)
    return mlp.down(F.silu(gate) * up)


def gradients(function, mlp: MLP, x: torch.Tensor, weights: torch.Tensor, bf16: bool = False):
    """→ what the function gives, and the gradients of x and the parameters that are trained."""
    x = x.clone().requires_grad_()
    trained = [p for p in mlp.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = function(mlp, x)
    return y, torch.autograd.grad((y.float() * weights).sum(), [x, *trained])


@family
@pytest.mark.parametrize("shape", [(5,), (2, 5)], ids=["rows", "batch"])
def test_gradients_are_those_of_finite_differences(style, shape, double):
    torch.manual_seed(0)
    gated, bias = style.get("mlp") != "gelu", torch.randn(3, requires_grad=True) if style else None
    x = torch.randn(*shape, 8 if gated else 4, requires_grad=True)
    weight = torch.randn(3, 4, requires_grad=True)
    given = (x, weight, bias, gated)
    assert torch.autograd.gradcheck(ActivatedLinear.apply, given)
    assert torch.autograd.gradcheck(ActivatedLinear.apply, (x, weight.detach(), bias, gated))


@family
@pytest.mark.parametrize("lora", [0, 2], ids=["full", "lora"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_mlp_is_that_of_autograd_to_the_last_bit_and_its_gradients_to_rounding(style, lora, bf16):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, **style))
    if lora:
        add(model, lora, 4.0)
        torch.nn.init.normal_(model.blocks[0].mlp.down.B)
    mlp, x, weights = model.blocks[0].mlp, torch.randn(3, 7, 24), torch.randn(3, 7, 24)
    found, expected = (gradients(f, mlp, x, weights, bf16) for f in (MLP.forward, plainly))
    assert found[0].equal(expected[0]) and found[0].dtype == (torch.bfloat16 if bf16 else torch.float32)
    for own, due in zip(found[1], expected[1]):
        assert own.dtype == due.dtype == torch.float32
        torch.testing.assert_close(own, due, rtol=0, atol=(1e-2 if bf16 else 1e-6) * due.abs().max().item())


@family
def test_only_the_first_matrix_result_is_kept(style):
    mlp, counts = GPT(GPTConfig(**SMALL, **style)).blocks[0].mlp, []
    x = torch.randn(3, 7, 24, requires_grad=True)
    own = {p.data_ptr() for p in (x, *mlp.parameters())}
    for function in (plainly, MLP.forward):
        kept = {}
        with saved_tensors_hooks(
            lambda t, kept=kept: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            y = function(mlp, x)
        counts.append(sum(n for place, n in kept.items() if place not in own))
        assert y.requires_grad  # and its graph is alive: no two numbers had the same place
    assert counts[1] == 21 * mlp.up.out_features
    assert counts[0] > 1.5 * counts[1]


@pytest.mark.parametrize("style", [{}, GPT2], ids=["swiglu", "gelu"])
def test_recomputed_blocks_and_a_compiled_forward_have_the_same_gradients(style):
    torch.manual_seed(0)
    model, ids, found = GPT(GPTConfig(**SMALL, **style)), torch.randint(40, (3, 9)), []
    compiled = torch.compile(model.hidden, backend="aot_eager")
    for how in ("plain", "checkpointing", "compiled"):
        model.checkpointing = how == "checkpointing"
        loss = (compiled if how == "compiled" else model.hidden)(ids).square().sum()
        found.append(torch.autograd.grad(loss, list(model.blocks.parameters())))
    for other in found[1:]:
        for own, due in zip(other, found[0]):
            torch.testing.assert_close(own, due, rtol=1e-4, atol=1e-5)
