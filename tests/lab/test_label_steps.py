"""Step labels: by continuations that reach the answer; what is cut off is no step; a whole run."""

import itertools

import pytest

from lab import label_steps
from nanoalign import UserError
from nanoalign.checkpoint import save
from nanoalign.model import GPT, GPTConfig
from nanoalign.rows import read_rows, write_rows
from nanoalign.seeds import derived_seed
from nanoalign.tokenizer import get_tokenizer

WORLD = get_tokenizer("world")
META = {"kind": "arithmetic", "answer": 32, "steps": ["7 + 5 = 12", "12 * 3 = 36", "36 - 4 = 32"]}


def asked(text):
    return [{"role": "user", "content": text}]


def test_monte_carlo_labels_are_the_share_of_continuations_that_reach_the_answer(monkeypatch):
    row = {"prompt": asked("Q"), "meta": {"answer": 4}}
    solutions = [
        (row, ["1 + 1 = 2", "2 + 2 = 4", "Answer: 4"]),
        (row, ["1 + 1 = 2", "2 + 3 = 5", "Answer: 5"]),
    ]
    shares, prefixes = {" 1 + 1 = 2\n": 3, " 1 + 1 = 2\n2 + 2 = 4\n": 4, " 1 + 1 = 2\n2 + 3 = 5\n": 0}, []

    def respond(policy, tokenizer, prompts, seed, what, **sampling):
        assert seed == derived_seed(0, "continue")  # not the seed of the solutions
        assert sampling["temperature"] == 0.9
        texts = []
        for prefix, group in itertools.groupby(
            WORLD.decode(ids[len(WORLD.prompt(asked("Q"))) :]) for ids in prompts
        ):
            prefixes.append(prefix)
            assert len(list(group)) == 4
            texts += ["Answer: 4"] * shares[prefix] + ["Answer: 7"] * (4 - shares[prefix])
        return texts, [True] * len(texts)

    monkeypatch.setattr(label_steps, "respond", respond)
    config = label_steps.Config(continuations=4, temperature=0.9)
    labels = label_steps.monte_carlo(None, WORLD, solutions, [True, False], config)
    assert labels == [[0.75, 1.0, 1.0], [0.75, 0.0, 0.0]]
    assert sorted(prefixes) == sorted(shares)  # a shared prefix is continued once


def test_a_beginning_is_shared_by_solutions_to_one_prompt_only(monkeypatch):
    rows = [{"prompt": [{"role": "system", "content": s}, *asked("Q")], "meta": {"answer": 4}} for s in "ab"]
    solutions = [(row, ["1 + 1 = 2", "Answer: 4"]) for row in (*rows, rows[0])]
    counted = []

    def respond(policy, tokenizer, prompts, **options):
        counted.append(len(prompts))
        return ["Answer: 4"] * 2 + ["Answer: 5"] * 2, [True] * 4

    monkeypatch.setattr(label_steps, "respond", respond)
    config = label_steps.Config(continuations=2)
    labels = label_steps.monte_carlo(None, WORLD, solutions, [True] * 3, config)
    assert counted == [4] and labels == [[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]


def test_a_solution_cut_off_loses_its_unfinished_last_line():
    row = {"prompt": asked("Q"), "meta": META}
    drawn = [("7 + 5 = 12\n12 * 3 = 3", False), ("7 + 5 = 12\n12 * 3 = 36", True), ("7 + 5", False)]
    rows = label_steps.label_steps(None, WORLD, [row] * 3, drawn, label_steps.Config())
    assert [(r["completions"], r["labels"]) for r in rows] == [
        (["7 + 5 = 12"], [True]),
        (["7 + 5 = 12", "12 * 3 = 36"], [True, True]),
    ]


@pytest.fixture
def label(tmp_path):
    """label(…) → the rows of a run on three problems by a policy that says random words."""
    policy, prompts = str(tmp_path / "solver.pt"), str(tmp_path / "problems.jsonl")
    model = GPT(GPTConfig(WORLD.vocab_size, context=64, layers=1, width=16, heads=2))
    save(policy, model, stage="sft", tokenizer=WORLD, config=label_steps.Config(), step=1)
    write_rows(prompts, [{"prompt": f"Sum {i}?", "meta": META} for i in range(3)])

    def label(**flags):
        flags = {"policy": policy, "prompts": prompts, "max_new_tokens": 8, **flags}
        out = str(tmp_path / "steps.jsonl")
        label_steps.main(label_steps.Config(out=out, **flags))
        return read_rows(out, "steps")

    return label


@pytest.fixture
def lines(monkeypatch):
    """Whatever is sampled is a right solution, of one wrong step and a right answer all the same."""
    text = "7 + 5 = 13\n13 * 3 = 39\n39 - 4 = 35\nAnswer: 32"
    patched = lambda policy, tokenizer, ids, **options: ([text] * len(ids), [True] * len(ids))  # noqa: E731
    monkeypatch.setattr("collect.respond", patched)
    monkeypatch.setattr(label_steps, "respond", patched)


def test_a_run_writes_rows_of_steps_and_says_how_many_were_lucky(label, lines, capsys):
    rows = label(samples=2)
    assert len(rows) == 6 and rows[0]["labels"] == [False, True, True, False] and rows[0]["label"] is True
    out = capsys.readouterr().out
    assert (
        "6 solutions, 24 steps" in out and "100.0% reach the right answer, 100.0% of these by a wrong" in out
    )
    rows = label(by="rollouts", samples=1, continuations=2)
    assert len(rows) == 3 and rows[0]["labels"] == [1.0] * 4


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"by": "people"}, "--by people is unknown; choose checker or rollouts"),
        ({"samples": 0}, "at least 1"),
        ({"by": "rollouts", "continuations": 0}, "at least 1"),
    ],
)
def test_what_cannot_work_is_one_sentence(label, flags, said):
    with pytest.raises(UserError, match=said):
        label(**flags)


@pytest.mark.parametrize("by", ["checker", "rollouts"])
@pytest.mark.parametrize(
    "meta, said",
    [
        ({}, "final answer to 'Hi'.*missing"),
        ({"kind": "fact", "relation": "capital", "subject": "Japan"}, "final answer to 'Hi'.*missing"),
        ({"answer": "soon", "steps": META["steps"]}, "final answer to 'Hi'.*soon"),
        ({"answer": 4}, "checker knows its sums only.*None"),
        ({"answer": 4, "steps": []}, "checker knows its sums only"),
        ({"answer": 4, "steps": ["2x = 8", "x = 4"]}, "checker knows its sums only.*2x = 8"),
        ({"answer": 4, "steps": [3]}, "checker knows its sums only"),
        ({"answer": 4, "steps": {"a": 1}}, "checker knows its sums only"),
    ],
)
def test_prompts_that_cannot_be_labelled_are_refused_before_sampling(
    label, tmp_path, monkeypatch, by, meta, said
):
    """The exact checker needs the steps that are due; rollouts need the final answer only."""

    def sample(*args, **options):
        raise RuntimeError("sampled")

    monkeypatch.setattr("collect.respond", sample)
    write_rows(
        str(tmp_path / "other.jsonl"), [{"prompt": "Sum?", "meta": META}, {"prompt": "Hi", "meta": meta}]
    )
    refused = by == "checker" or "final answer" in said
    with pytest.raises(UserError if refused else RuntimeError, match=said if refused else "sampled"):
        label(prompts=str(tmp_path / "other.jsonl"), by=by)
