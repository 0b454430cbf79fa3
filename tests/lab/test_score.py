"""A reward model scores a file of responses."""

import json

import pytest
import torch

from lab.score import Config, main
from nanoalign import UserError
from nanoalign.checkpoint import load_scalar


def test_a_reward_model_scores_a_file_of_responses(rm, tmp_path, capsys):
    rows = [{"prompt": "Hi", "completion": text} for text in ("Hello!", "Go away.", "Hello!")]
    rows.append({"prompt": "word " * 200, "completion": "Too late."})
    (tmp_path / "said.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(Config(model=rm, data=str(tmp_path / "said.jsonl")))
    scored = [json.loads(line) for line in (tmp_path / "said.scored.jsonl").read_text().splitlines()]
    model, tokenizer, _ = load_scalar(rm)
    for row, said in zip(scored[:3], rows):
        prompt = tokenizer.prompt([{"role": "user", "content": "Hi"}])
        ids = [*prompt, *tokenizer.response(said["completion"])]
        assert row["score"] == pytest.approx(model(torch.tensor([ids]))[0, -1].item(), abs=1e-4)
    assert scored[3]["score"] is None and "1 prompts leave no room" in capsys.readouterr().out


ROW = {"prompt": "Hi", "completion": "Hello."}
ASKED = {"messages": [{"role": r, "content": "Hi"} for r in ("user", "assistant", "user")]}


@pytest.mark.parametrize(
    "model, row, said",
    [
        ("sft", ROW, "'sft' checkpoint; expected 'rm'"),
        ("rm", {"prompt": "Hi"}, "line 1: .*completion"),
        ("rm", ASKED, "do not end with an assistant's message"),
        ("rm", None, "--data"),
    ],
)
def test_what_cannot_be_scored_is_one_clear_sentence(model, row, said, request, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=said):
        main(Config(model=request.getfixturevalue(model), data=str(path) if row else ""))
