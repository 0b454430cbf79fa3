"""Rows packed into one: each has the hidden states and gradients that it has alone."""

import pytest
import torch
from test_model import family, lively, random_ids
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from nanoalign.model import GPT, GPTConfig
from nanoalign.packing import packed_hidden, segment_mask, segment_positions


@family
@pytest.mark.parametrize("shared", [True, False])
def test_rows_packed_into_one_have_the_hidden_states_and_gradients_they_have_alone(config, shared):
    torch.manual_seed(0)
    sizes, prompts, ends = [2, 1, 3], [3, 5, 1], [5, 12, 7, 2, 9, 4]  # the second fills the context
    ids = random_ids(6, 12)
    position, row = torch.arange(12), 0
    own = position < torch.tensor(ends)[:, None]
    for size, prompt in zip(sizes, prompts):
        if shared:
            ids[row : row + size, :prompt] = ids[row, :prompt].clone()
            own[row : row + size, :prompt] = False
        row += size
    model, read = lively(config), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[:2]))
    valid = (position < torch.tensor(ends)[:, None])[..., None]
    weights = torch.randn(6, 12, config.width, dtype=torch.float64) * valid
    results = []
    for hidden in (model.hidden(ids), packed_hidden(model, ids, own, sizes)):
        trained = [p for name, p in model.named_parameters() if not name.startswith("head")]
        results.append((hidden * valid, *torch.autograd.grad((weights * hidden).sum(), trained)))
    for plain, packed in zip(*results):
        torch.testing.assert_close(packed, plain)
    saved = [3, 0, 2 * 1] if shared else [0, 0, 0]  # the prompts not read again
    assert read == [(6, 12), (3, max(5 + 12 - saved[0], 7, 2 + 9 + 4 - saved[2]))]


SEGMENTS = torch.tensor([[0] * 3 + [1] * 4 + [2] * 5 + [4] * 8, [1] * 9 + [2] * 2 + [3] * 9])  # docs, padding


def seen(segments: Tensor) -> dict:
    return {"positions": segment_positions(segments), "visible": segment_mask(segments)}


@family
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_blocks_of_flex_attention_hide_what_the_dense_mask_hides(config, monkeypatch):
    """Without gradients, which FlexAttention has on a GPU only."""
    model, ids = lively(config), random_ids(2, 20)
    with torch.no_grad():
        due = model.hidden(ids, **seen(SEGMENTS))
        monkeypatch.setattr("nanoalign.packing.FLEX_FROM", {"cpu": 20})
        calls = []
        monkeypatch.setattr("nanoalign.model.flex", lambda *a: calls.append(1) or flex_attention(*a))
        torch.testing.assert_close(model.hidden(ids, **seen(SEGMENTS)), due)
        model.hidden(ids[:, :12], **seen(SEGMENTS[:, :12].contiguous()))  # too short
    assert len(calls) == config.layers


@pytest.mark.gpu  # FlexAttention has no backward pass on a CPU
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_row_packed_on_a_gpu_has_the_gradients_of_padded_rows(checkpointing):
    torch.manual_seed(0)
    config = GPTConfig(64, context=400, layers=2, width=64, heads=4, kv_heads=2, qk_norm=True)
    model, lengths = GPT(config).cuda(), torch.tensor([400, 37, 256, 1, 390, 128, 250])
    model.checkpointing = checkpointing
    ids = torch.randint(64, (7, 400), device="cuda")
    whole = torch.arange(400) < lengths[:, None]
    results = []
    for packed in (False, True):
        with torch.autocast("cuda", torch.bfloat16):
            hidden = packed_hidden(model, ids, whole, [7]) if packed else model.hidden(ids)
        loss = hidden.float()[whole.cuda()].square().mul(torch.linspace(0, 1, 64, device="cuda")).mean()
        trained = [p for name, p in model.named_parameters() if not name.startswith("head")]
        results.append((loss.detach(), *torch.autograd.grad(loss, trained)))
    for plain, flexed in zip(*results):
        torch.testing.assert_close(flexed, plain, rtol=0.05, atol=0.02 * plain.abs().max().item())
