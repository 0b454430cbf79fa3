"""The laboratory's tables of memory: what is computed for a GPU, and what is reported of runs."""

import json

import pytest

from lab import memory
from nanoalign.model import GPT, PRESETS, GPTConfig, parameter_count

SHAPE = GPTConfig(vocab_size=5000, context=1024, layers=2, width=256, heads=4)


LEARNT = [script for script in memory.SCRIPTS if script != "rm"]  # whose largest moment is reading


@pytest.mark.parametrize("script", LEARNT)
def test_adapters_take_less_than_all_weights_and_checkpointing_less_than_none(script):
    full, again, lora, both = (memory.computed(script, SHAPE, **flags) for flags in memory.WAYS.values())
    assert both <= lora < full and both <= again <= full


def test_a_large_model_takes_at_least_sixteen_bytes_a_parameter_where_all_are_trained():
    shape = PRESETS["gpt2"]
    N = parameter_count(GPT(shape))
    found = memory.computed("sft", shape, checkpointing=True)
    assert 16 * N < found < 32 * N
    assert memory.computed("sft", shape, lora=16, base_dtype="bf16", checkpointing=True) < 10 * N


def test_ppo_holds_four_models_and_trains_two():
    shape, flags = PRESETS["gpt2"], {"checkpointing": True}
    N = parameter_count(GPT(shape))
    assert memory.computed("ppo", shape, **flags) > 4 * N * 4 + 2 * N * 12
    assert memory.computed("ppo", shape, **flags) > memory.computed("grpo", shape, **flags)


def test_the_report_is_of_all_files_and_says_how_far_plans_are_off(tmp_path, capsys):
    names = []
    for i, peak in enumerate((100, 200)):
        row = {"script": "sft", "model": "slim", "flags": "--lora 2", "planned": 110, "while": "forward"}
        rows = [memory.setting(0), row | {"peak": peak, "as it is": 2 * peak, "empty": 300 + i}]
        names.append(str(tmp_path / f"{i}.jsonl"))
        (tmp_path / f"{i}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    memory.report(names)
    said = capsys.readouterr().out
    assert "| sft | slim | `--lora 2` | 110, forward | 100 | +10% | 200 |" in said
    assert "2 runs: off by -45% to +10%" in said and "300 to 301 MB" in said and "2.00 to" in said
