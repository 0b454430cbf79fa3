"""What collect.main wires up: responses as they were drawn, votes of a reward model, labels (wires.py)."""

import json
import math
from itertools import combinations

import pytest
import torch
import wires
from runs import WORLD, write_lines
from wires import asked, example, spy, user

import collect
from nanoalign.checkpoint import load_scalar

OFF = {  # every flag that has a say in what is computed, off its default
    "samples": 4, "count": 3, "max_new_tokens": 6, "temperature": 0.8, "top_k": 400, "top_p": 0.97, "seed": 4,
    "rank": False, "device": "cpu:0",
}  # fmt: skip


@pytest.fixture
def config(tiny, tmp_path):
    prompts = write_lines(tmp_path / "asked.jsonl", [*asked(4), wires.prompt_of(45)])
    return collect.Config(
        policy=f"{tiny}/policy.pt",
        prompts=prompts,
        annotator=f"rm:{tiny}/rm.pt",
        **OFF,
        out=f"{tmp_path}/x.jsonl",
    )


def read(path):
    return [json.loads(line) for line in open(path)]


def reward(model, comparison, text):
    ids, _ = example(comparison["prompt"], text, wires.SHAPE.context)
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].item()


def expected(comparisons, model, std=1.7):
    """P(the first is better) = σ(std (r_a − r_b)); an unfinished response loses to a finished one."""
    votes = []
    for c in comparisons:
        a, b = (reward(model, c, text) for text in c["responses"])
        p = 1 / (1 + math.exp(-std * (a - b)))
        votes.append(p if c["ended"][0] == c["ended"][1] else float(c["ended"][0]))
    return votes


@pytest.mark.parametrize("rank", [False, True], ids=["pairs", "ranking"])
def test_pairs_are_what_the_reward_model_says_of_what_was_drawn(config, monkeypatch, capsys, rank):
    config.rank = rank
    drawn, loads = (
        spy(monkeypatch, collect, "respond"),
        [spy(monkeypatch, collect, n) for n in ("load_policy", "load_scalar")],
    )
    collect.main(config)
    [call] = drawn
    rows = [asked(4)[i * 4 // 3] for i in range(3)]
    wires.assert_on("cpu:0", *loads)
    assert call.model is loads[0][0].result[0] and (call.max_new_tokens, call.seed) == (6, 4)
    assert [p.tolist() for p in call.prompts] == [
        WORLD.prompt(user(row["prompt"])).tolist() for row in rows for _ in range(4)
    ]
    given = {name: call.options[name] for name in ("temperature", "top_k", "top_p")}
    assert given == {"temperature": 0.8, "top_k": 400, "top_p": 0.97}
    texts, ended = (list(x) for x in call.result)
    pairs = [*combinations(range(4), 2)] if rank else [(0, 1), (2, 3)]
    due = []
    for n, row in enumerate(rows):
        for i, j in ((4 * n + i, 4 * n + j) for i, j in pairs):
            if texts[i] != texts[j]:
                due.append((user(row["prompt"]), [texts[i], texts[j]], [ended[i], ended[j]]))
    votes = read(config.out.replace(".jsonl", ".votes.jsonl"))
    assert [(c["prompt"], c["responses"], c["ended"]) for c in votes] == due
    assert any(a != b for _, _, (a, b) in due)
    model, found = load_scalar(config.annotator[3:])[0], []
    for c, p in zip(votes, expected(votes, model)):
        [vote] = c["votes"]
        assert vote["annotator"] == config.annotator and vote["p"] == pytest.approx(p, abs=1e-4)
        found.append(vote["p"])
    written = read(config.out)
    assert len(written) == len(votes)
    for pair, c, p in zip(written, votes, found):
        chosen = c["responses"][0 if p >= 0.5 else 1]
        assert pair["chosen"] == chosen and pair["rejected"] != chosen
        assert pair.get("probability", 1.0) == pytest.approx(max(p, 1 - p), abs=1e-4)
    out = capsys.readouterr().out
    alike = 3 * len(pairs) - len(due)
    assert f"collect: {len(due)} pairs of 3 prompts ({alike} more: alike)" in out
    assert f"labels of {len(written)} of {len(votes)} pairs" in out


def test_certain_labels_and_agreement_reach_the_pairs_and_a_second_vote_is_added(config, tiny, capsys):
    least = 0.502
    collect.main(wires.replaced(config, soft=False, min_agreement=least))
    votes = read(config.out.replace(".jsonl", ".votes.jsonl"))
    clear = [c for c in votes if max(c["votes"][0]["p"], 1 - c["votes"][0]["p"]) >= least]
    assert any(0 < c["votes"][0]["p"] < 1 for c in clear)  # else there is nothing that could be soft
    written = read(config.out)
    assert 0 < len(clear) < len(votes) and len(written) == len(clear)
    assert not any("probability" in pair for pair in written)
    again = wires.replaced(config, annotator=f"rm:{tiny}/critic.pt", resume=True)
    collect.main(again)
    second = read(config.out.replace(".jsonl", ".votes.jsonl"))
    model = load_scalar(f"{tiny}/critic.pt")[0]
    for c, before, p in zip(second, votes, expected(votes, model)):
        assert c["votes"][0] == before["votes"][0]
        assert c["votes"][1]["annotator"] == again.annotator and c["votes"][1]["p"] == pytest.approx(
            p, abs=1e-4
        )
    collect.main(again)  # it has voted
    assert read(config.out.replace(".jsonl", ".votes.jsonl")) == second


def test_a_functions_thumbs_go_into_a_file_of_their_own(config, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def shorter(rows, drawn, pairs, flags):\n"
        "    compared = [c for row, texts in zip(rows, drawn) for i, j, c in pairs(row, texts)]\n"
        "    for c in compared:\n"
        "        a, b = c['responses']\n"
        "        c['votes'].append({'annotator': 'shorter', 'p': float(len(a) < len(b))})\n"
        "    thumbs = [{'prompt': row['prompt'], 'completion': texts[0][0] or 'x', 'label': i % 3 > 0}\n"
        "              for i, (row, texts) in enumerate(zip(rows, drawn))]\n"
        "    return compared, thumbs\n"
    )
    collect.main(wires.replaced(config, annotator=f"{tmp_path}/mine.py:shorter"))
    for pair in read(config.out):
        assert len(pair["chosen"]) < len(pair["rejected"]) or len(pair["chosen"]) == len(pair["rejected"])
    thumbs = read(config.out.replace(".jsonl", ".thumbs.jsonl"))
    assert [row["label"] for row in thumbs] == [False, True, True]
    assert "collect: 2 thumbs up, 1 down" in capsys.readouterr().out


def test_a_person_is_told_where_the_pairs_wait(config, tmp_path, capsys):
    collect.main(wires.replaced(config, annotator="human"))
    out, record = capsys.readouterr().out, config.out.replace(".jsonl", ".votes.jsonl")
    assert f"python -m lab.annotate --votes {record} --out {config.out}" in out
    assert all(c["votes"] == [] for c in read(record)) and not (tmp_path / "x.jsonl").exists()


def test_an_ai_judge_is_asked_by_the_constitution_with_the_runs_seed(config, tmp_path, monkeypatch):
    asked_for = []

    def ai_votes(*given):
        asked_for.append(given)
        return [0.75] * len(given[1])

    monkeypatch.setattr(collect, "ai_votes", ai_votes)
    (tmp_path / "rules.txt").write_text("Be brief.\nBe kind.\n", encoding="utf-8")
    rules = str(tmp_path / "rules.txt")
    collect.main(wires.replaced(config, annotator="ai:judge.pt", constitution=rules, own=0.7))
    [(path, comparisons, device, principles, seed, own)] = asked_for
    assert (path, str(device), principles, seed) == ("judge.pt", "cpu:0", ["Be brief.", "Be kind."], 4)
    assert own == 0.7
    written = read(config.out)
    assert len(written) == len(comparisons) and all(pair["probability"] == 0.75 for pair in written)
