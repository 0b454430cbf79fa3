"""The pretended GPU itself: it refuses what a real one refuses, and counts what makes one wait."""

import copy
import io

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

if torch.version.cuda is None:
    pytest.skip("torch is a CPU build: make pretend-gpu installs the other", allow_module_level=True)

from pretended import CUDA, pretended_gpu

from nanoalign.training import make_optimizer, pick_device


@pytest.fixture
def gpu():
    with pretended_gpu() as gpu:
        yield gpu


def test_there_is_one_and_it_is_chosen(gpu):
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert pick_device("auto") == torch.device("cuda")
    x = torch.ones(3, device="cuda")
    assert x.device == CUDA and x.is_cuda and (x + 1).device == CUDA and x.cpu().device.type == "cpu"
    assert torch.tensor([1], device="cuda").device == torch.zeros_like(x).device == CUDA


def test_afterwards_there_is_none():
    with pretended_gpu():
        x = torch.ones(3, device="cuda")
    assert not torch.cuda.is_available()
    with pytest.raises(RuntimeError, match="that is gone"):
        x + 1


MIXED = {
    "sum": lambda here, there: here + there,
    "product": lambda here, there: there @ here,
    "where": lambda here, there: torch.where(there > 0, there, here),
    "cat": lambda here, there: torch.cat((there, here)),
    "stack of numbers": lambda here, there: torch.stack((there[0, 0], here[0, 0])),
    "mask": lambda here, there: there.masked_fill(here > 0, 0),
    "gather": lambda here, there: there.gather(1, here.long() * 0),
    "a GPU's index into a CPU's tensor": lambda here, there: here[there.long()[0]],
    "put": lambda here, there: there.index_put((torch.tensor([0], device="cuda"),), here[0]),
    "embedding": lambda here, there: F.embedding(here.long(), there),
}


@pytest.mark.parametrize("mix", MIXED)
def test_tensors_of_two_devices_do_not_mix(gpu, mix):
    here, there = torch.ones(3, 3), torch.ones(3, 3, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        MIXED[mix](here, there)


def test_a_number_and_an_index_may_come_from_the_cpu(gpu):
    here, there = torch.ones(3), torch.arange(3.0, device="cuda")
    assert (there + here[0]).tolist() == [1, 2, 3]
    assert there[torch.tensor([2, 0])].tolist() == [2, 0]


def test_what_cuda_cannot_do_is_refused(gpu):
    x = torch.ones(2, 2, device="cuda")
    with pytest.raises(NotImplementedError):
        x.long() @ x.long()
    with pytest.raises((RuntimeError, TypeError)):
        x.numpy()


WAITS = {
    "item": lambda x: x[0].item(),
    "int": lambda x: int(x.sum()),
    "if": lambda x: bool(x.isfinite().all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: (x > 0).nonzero(),
    "index by a mask": lambda x: x[x > 0],
    "put by a mask": lambda x: x.index_put((x > 0,), x[:1]),
    "upload": lambda x: torch.ones(2).to(x.device),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "print": lambda x: f"{x[0]:.2f}",
}
FREE = {
    "sums": lambda x: (x * 2).sum().exp(),
    "index": lambda x: x[torch.zeros(2, dtype=torch.long, device="cuda")],
    "fill by a mask": lambda x: x.masked_fill(x > 0, 0.0),
    "set by a mask": lambda x: x.__setitem__(x > 5, 0.0),
    "upload": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "factories": lambda x: torch.zeros(2, device="cuda") + torch.arange(2, device="cuda"),
    "shapes": lambda x: x.view(-1, 1).expand(-1, 2).numel(),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_the_host_waits_for_is_counted(gpu, what):
    x = torch.arange(3.0, device="cuda")
    WAITS[what](x)
    assert gpu.waits.total() == 1


@pytest.mark.parametrize("what", FREE)
def test_and_nothing_else_is(gpu, what):
    x = torch.arange(3.0, device="cuda")
    FREE[what](x)
    assert not gpu.waits


def test_products_are_counted_by_dtype(gpu):
    layer = nn.Linear(4, 4).to("cuda")
    layer(torch.ones(2, 4, device="cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        assert layer(torch.ones(2, 4, device="cuda")).dtype == torch.bfloat16
    assert {dtype: n for (dtype, _), n in gpu.products.items()} == {torch.float32: 1, torch.bfloat16: 1}


def test_its_random_numbers_are_its_own(gpu):
    torch.manual_seed(3)
    first = torch.rand(2, device="cuda").tolist(), torch.rand(2).tolist()
    torch.manual_seed(3)
    state = torch.cuda.get_rng_state_all()
    other = torch.rand(2).tolist(), torch.rand(2, device="cuda").tolist()
    assert first == other[::-1]
    torch.cuda.set_rng_state_all(state)
    assert torch.rand(2, device="cuda").tolist() == first[0]


def network() -> nn.Module:
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Embedding(9, 6), nn.RMSNorm(6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 9))
    tied[4].weight = tied[0].weight
    return tied


def test_a_module_moves_as_a_whole_and_what_is_tied_stays_so(gpu):
    moved = copy.deepcopy(network().to("cuda"))
    assert moved[4].weight is moved[0].weight and isinstance(moved[0].weight, nn.Parameter)
    assert {p.device for p in moved.parameters()} == {CUDA}


def test_a_backward_pass_and_an_update_are_those_of_a_cpu(gpu):
    found, ids = [], torch.arange(9)
    for device in ("cpu", "cuda"):
        model = network().to(device)
        optimizer = make_optimizer(model, 0.1, 0.1)
        for _ in range(3):
            for part in ids.split(4):  # gradients add up
                x = part.to(device)
                F.cross_entropy(model(x), x.roll(1)).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found.append([norm.cpu(), *(p.detach().cpu() for p in model.parameters())])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_what_is_saved_lies_on_the_gpu_until_it_is_read_to_a_cpu():
    model, file = network(), io.BytesIO()
    with pretended_gpu():
        torch.save(model.to("cuda").state_dict(), file)
    file.seek(0)
    with pytest.raises(RuntimeError, match="CUDA"):  # as of a real one, where none is
        torch.load(file, weights_only=True)
    file.seek(0)
    read = torch.load(file, map_location="cpu", weights_only=True)
    assert all(
        torch.equal(weights, due) for weights, due in zip(read.values(), network().state_dict().values())
    )
