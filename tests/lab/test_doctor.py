"""The doctor: each sickness is provoked, by a short run where that is possible; healthy runs are not ill."""

import json
import random

import pytest

import train_dpo
import train_grpo
import train_kto
import train_orpo
import train_ppo
import train_pretrain
import train_prm
import train_rm
import train_sft
from lab import train_online_dpo
from lab.doctor import diagnose, diagnose_rows, main, read_run
from nanoalign import UserError
from nanoalign.rows import read_rows, write_rows

ON_POLICY = {
    "steps": 10, "batch_size": 16, "minibatch": 16, "max_new_tokens": 12, "eval_every": 10, "eval_prompts": 4,
}  # fmt: skip
OFF_POLICY = {"batch_size": 8, "warmup": 2, "log_every": 1, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def files(world, base, sft, pairs, rm, steps_file, tmp_path_factory):
    """Inputs by name: what the scripts read, and rows that can, and that cannot, be learnt from."""
    folder = tmp_path_factory.mktemp("doctor")
    draw, said = random.Random(0), ("Yes, sure.", "No idea.")
    clear = [{"prompt": f"{i} + 1?", "chosen": said[0], "rejected": said[1]} for i in range(100)]
    noise = [dict(zip(("chosen", "rejected"), draw.sample(said, 2)), prompt=f"{i} + 1?") for i in range(400)]
    briefly = [
        {"prompt": row["prompt"], "completion": " ".join(("Yes", "No", "Maybe")[: i % 3 + 1])}
        for i, row in enumerate(read_rows(f"{world}/prompts.jsonl", "prompts"))
    ]
    coin = [
        {**row, "labels": [float(draw.random() < 0.5) for _ in row["labels"]]}
        for row in read_rows(steps_file, "steps")
    ]
    rows = {
        "clear": clear, "noise": noise[:100], "noise_held_out": noise[100:], "coin": coin[:80],
        "coin_held_out": coin[80:], "brief": briefly,
    }  # fmt: skip
    for name, content in rows.items():
        write_rows(f"{folder}/{name}.jsonl", content)
    config = train_sft.Config(
        init=sft, data=f"{folder}/brief.jsonl", out=f"{folder}/brief.pt", epochs=3, lr=1e-2
    )
    config.batch_size, config.warmup = 16, 2
    train_sft.main(config)
    made = {name: f"{folder}/{name}.jsonl" for name in rows} | {"policy": f"{folder}/brief.pt"}
    return made | {
        "world": str(world),
        "base": base,
        "sft": sft,
        "pairs": pairs,
        "rm": rm,
        "steps": steps_file,
    }


@pytest.fixture
def names(files, tmp_path):
    """names(script, setting=…) → what a run of a dozen small steps is ill of; {x} in a setting is a file."""

    def names(script, **changes):
        out = str(tmp_path / "x.pt")
        default = ON_POLICY if script in (train_ppo, train_grpo) else OFF_POLICY
        if default is ON_POLICY:
            default = {"init": "{policy}", "prompts": "{world}/prompts.jsonl", "watch": "judge", **default}
        settings = {
            name: value.format(**files) if isinstance(value, str) else value
            for name, value in {**default, **changes}.items()
            if name in script.Config.__dataclass_fields__
        }
        try:
            script.main(script.Config(**settings, out=out))
        except UserError as error:
            assert "nothing was saved" in str(error)  # a loss that is not finite stops the run
        return [name for name, _, _ in diagnose(read_run(out.replace(".pt", ".metrics.jsonl")))]

    return names


LONG = {"reward": "0.1*length", "missing_eos_score": 2.0, "beta": 0.0, "lr": 4e-3}
PROVOKED = {
    "lr 0 (SFT)": (train_sft, {"init": "{base}", "data": "{clear}", "lr": 0.0}, {"the loss does not fall"}),
    "lr 1e30": (train_sft, {"init": "{base}", "data": "{clear}", "lr": 1e30}, {"the loss is not a number"}),
    "lr 0 (DPO)": (train_dpo, {"init": "{sft}", "data": "{clear}", "lr": 0.0}, {"the loss is stuck"}),
    "lr 0 (KTO)": (train_kto, {"init": "{sft}", "data": "{clear}", "lr": 0.0}, {"the loss is stuck"}),
    "lr 0.03 (DPO)": (
        train_dpo,
        {"init": "{sft}", "data": "{pairs}", "lr": 3e-2, "steps": 48, "batch_size": 16},
        {"the margin grows while both", "KL explodes"},
    ),
    "labels by a coin (pairs)": (
        train_rm,
        {"init": "{sft}", "data": "{noise}", "eval_data": "{noise_held_out}"},
        {"the reward model is at chance"},
    ),
    "labels by a coin (steps)": (
        train_prm,
        {"init": "{sft}", "data": "{coin}", "eval_data": "{coin_held_out}", "epochs": 2, "lr": 1e-3},
        {"the step reward model is at chance"},
    ),
    "lr 0 (PPO)": (train_ppo, {"reward": "{rm}", "lr": 0.0}, {"KL stays near 0"}),
    "β 0, paid for length": (
        train_ppo,
        LONG,
        {
            "KL explodes", "the reward rises while the judge falls", "the end-token rate collapses",
            "all lengths are at the limit", "responses grow long",
        },
    ),
    "β 0, paid for brevity": (
        train_grpo,
        {"reward": "-1*length", "group_size": 4, "missing_eos_score": -20.0, "beta": 0.0, "lr": 1e-2},
        {"entropy collapses"},
    ),
    "one score for all": (
        train_grpo,
        {"reward": "0*length", "group_size": 4, "missing_eos_score": 0.0},
        {"KL stays near 0", "most groups teach nothing"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("script, changes, due", PROVOKED.values(), ids=PROVOKED)
def test_a_sickness_that_training_provokes_is_named(script, changes, due, names):
    found = names(script, **changes)
    assert all(any(name.startswith(one) for name in found) for one in due), found


HEALTHY = {
    "pretrain": (train_pretrain, {"data": "{world}/pretrain.jsonl", "model": "world-tiny", "epochs": 0.1}),
    "sft": (train_sft, {"init": "{base}", "data": "{clear}"}),
    "orpo": (train_orpo, {"init": "{base}", "data": "{clear}"}),
    "dpo": (train_dpo, {"init": "{sft}", "data": "{clear}"}),
    "ipo": (train_dpo, {"init": "{sft}", "data": "{clear}", "loss": "ipo"}),
    "simpo": (train_dpo, {"init": "{sft}", "data": "{clear}", "loss": "simpo"}),
    "cdpo": (train_dpo, {"init": "{sft}", "data": "{clear}", "loss": "cdpo"}),
    "robust": (train_dpo, {"init": "{sft}", "data": "{clear}", "loss": "robust"}),
    "rpo": (train_dpo, {"init": "{sft}", "data": "{clear}", "sft_weight": 1.0}),
    "online": (
        train_online_dpo,
        {"init": "{policy}", "data": "{pairs}", "reward": "judge", "steps": 12, "online_every": 2},
    ),
    "kto": (train_kto, {"init": "{sft}", "data": "{clear}", "steps": 12}),
    "rm": (train_rm, {"init": "{sft}", "data": "{clear}"}),
    "prm": (train_prm, {"init": "{sft}", "data": "{steps}", "epochs": 2, "lr": 3e-3}),
    "ppo": (train_ppo, {"reward": "judge", "critic": "{rm}"}),
    **{
        kind: (train_grpo, {"reward": "judge", "group_size": 4, "kind": kind})
        for kind in ("grpo", "dr_grpo", "dapo", "rloo")
    },
}


@pytest.mark.parametrize("script, changes", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_run_gets_a_clean_bill(script, changes, names):
    assert names(script, **changes) == []


# ------------------------------------------------------------------------- excerpts, and sicknesses by hand

# every third iteration of the demo's PPO, every tenth step of its DPO (seed 0)
PPO = {
    "kl": [0.0, 0.0897, 0.485, 0.755, 1.11, 1.11, 1.07, 1.2, 1.28],
    "kl_error": [0.0, 0.0376, 0.102, 0.103, 0.141, 0.156, 0.114, 0.121, 0.123],
    "length": [15.9, 15.3, 16.6, 15.1, 16.6, 15.6, 15.2, 15.9, 16.8],
    "entropy": [0.412, 0.368, 0.384, 0.391, 0.377, 0.398, 0.377, 0.402, 0.357],
    "ended": [1.0, 1.0, 0.992, 1.0, 1.0, 1.0, 0.992, 0.977, 0.992],
    "at_limit": [0.0, 0.0, 0.00781, 0.0, 0.0, 0.0, 0.00781, 0.0234, 0.00781],
    "explained_variance": [0.0, 0.0178, -0.00418, 0.057, 0.125, 0.132, 0.298, 0.365, 0.385],
    "ratio_error": [2.86e-06, 2.86e-06, 3.81e-06, 2.86e-06, 3.34e-06, 2.86e-06, 8.58e-06, 3.81e-06, 2.86e-06],
    "loss": [0.016, 0.0111, 0.000929, 0.00477, 0.00229, 0.00343, 0.01, 0.00319, -7.61e-05],
    "grad_norm": [0.294, 0.283, 0.38, 0.309, 0.307, 0.357, 0.396, 0.526, 0.586],
}
DPO = {
    "loss": [0.693, 0.69, 0.685, 0.656, 0.697, 0.683, 0.67, 0.666, 0.702, 0.678, 0.655, 0.71, 0.674, 0.635],
    "reward_chosen": [
        0.0, 0.0013, -0.0105, -0.0366, -0.292, -0.0529, -0.0263, -0.081, -0.306, -0.18, -0.232, -0.197,
        -0.302, -0.0113,
    ],
    "reward_rejected": [
        0.0, -0.0045, -0.0272, -0.116, -0.299, -0.0795, -0.0826, -0.159, -0.304, -0.245, -0.334, -0.239,
        -0.371, -0.154,
    ],
}  # fmt: skip


def ills(run, **changes):
    """The names of what a run by columns is ill of, with some columns, or the end of one, changed."""
    run = {name: list(values) for name, values in run.items()}
    for name, values in changes.items():
        run[name][-len(values) :] = values
    rows = [dict(zip(run, values)) for values in zip(*run.values())]
    return [name for name, _, _ in diagnose_rows(rows)]


def test_excerpts_of_the_demo_are_healthy():
    assert ills(PPO) == [] and ills(DPO) == []


@pytest.mark.parametrize(
    "symptom, named",
    [
        ({"kl": [-1.0, -0.9]}, "KL is negative beyond noise"),
        ({"ratio_error": [0.2, 1e-6]}, "the ratio is off 1 at the first minibatch"),
        ({"ended": [0.2, 0.2]}, "the end-token rate collapses"),
        ({"ended": [0.9, 0.8]}, "the end-token rate collapses"),
        ({"at_limit": [0.95, 0.95]}, "all lengths are at the limit"),
        ({"kl": [8.0, 9.0]}, "KL explodes"),
        ({"length": [30.0, 31.0]}, "responses grow long"),
        ({"entropy": [0.1, 0.1]}, "entropy collapses"),
        ({"loss": [float("nan")]}, "the loss is not a number"),
        ({"grad_norm": [float("inf")]}, "the loss is not a number"),
    ],
)
def test_each_sickness_of_an_on_policy_run_has_its_own_name(symptom, named):
    assert ills(PPO, **symptom) == [named]


@pytest.mark.parametrize(
    "symptom",
    [
        {"kl": [-0.2]},  # two standard errors below 0
        {"ended": [0.95, 0.92]},
        {"kl": [4.0, 4.0]},  # 0.25 nats a token
        {"length": [22.0, 22.0]},
        {"entropy": [0.15, 0.15]},
        {"explained_variance": [-0.5]},
    ],
)
def test_noise_is_no_sickness(symptom):
    assert ills(PPO, **symptom) == []


def test_explained_variance_below_0_is_named_only_once_the_critic_had_time():
    run = {name: values + values for name, values in PPO.items()}
    assert ills(run, explained_variance=[-0.5] * 4) == ["explained variance is below 0"]
    assert ills(PPO, explained_variance=[-0.5] * 9) == []


def test_groups_without_spread_are_named_and_a_few_of_them_are_not():
    assert ills({**PPO, "equal_groups": [0.7] * 9}) == []
    assert ills({**PPO, "equal_groups": [0.9] * 9}) == ["most groups teach nothing"]


def test_both_log_probs_falling_is_named_only_where_the_margin_grows():
    down = {"reward_chosen": [-1.5] * 7, "reward_rejected": [-2.0] * 7}
    assert ills(DPO, **down) == ["the margin grows while both log-probs fall"]
    assert ills(DPO, **{**down, "reward_chosen": [0.5] * 7}) == []  # the chosen side rises
    assert ills(DPO, **{**down, "reward_rejected": [-1.5] * 7, "reward_chosen": [-1.6] * 7}) == []


def test_the_judge_is_compared_with_its_best_and_only_where_the_reward_rose():
    rows = [
        {"step": i, "eval_reward": s, "eval_judge": j} for i, (s, j) in enumerate([(0, 0), (1, 0.3), (2, 0)])
    ]
    assert [name for name, *_ in diagnose_rows(rows)] == ["the reward rises while the judge falls"]
    assert not diagnose_rows([{**row, "eval_reward": -row["step"]} for row in rows])
    same = [{**row, "eval_reward": row["eval_judge"]} for row in rows]
    assert not diagnose_rows(same)  # it is the reward


def test_a_model_of_rewards_or_of_steps_is_at_chance_within_its_noise():
    for accuracy, named in [
        (0.61, []),
        (0.53, ["the reward model is at chance"]),
        (0.3, ["the reward model is at chance"]),
    ]:
        assert ills({"eval_accuracy": [0.5, accuracy], "eval_accuracy_error": [0.02, 0.02]}) == named
    assert ills({"eval_auc": [0.5, 0.71], "eval_ece": [0.1, 0.1]}) == []
    assert ills({"eval_auc": [0.7, 0.5], "eval_ece": [0.1, 0.1]}) == ["the step reward model is at chance"]


def test_beta_weighs_the_kl_of_a_method_without_rollouts():
    rows = [{"config": {"beta": 0.1}}, {"step": 1, "eval_kl": 2.4}]
    assert not diagnose_rows(rows)
    assert [name for name, *_ in diagnose_rows([*rows, {"step": 2, "eval_kl": 12.0}])] == ["KL explodes"]
    assert not diagnose_rows([{"config": {"beta": 0.01}}, {"step": 2, "eval_kl": 12.0}])


def test_a_trend_needs_eight_steps_and_a_missing_column_is_not_asked_about():
    short = {name: values[:7] for name, values in PPO.items()}
    assert ills(short, length=[99.0] * 3, entropy=[0.01] * 3, kl=[30.0] * 3) == []
    flat = {"loss": [2.0] * 9}
    assert ills(flat) == ["the loss does not fall"]
    assert ills({**flat, "kl": PPO["kl"]}) == ills({**flat, "margin": flat["loss"]}) == []  # PPO's, an RM's


# ------------------------------------------------------------------------------------------- the command


def write_run(path, run):
    rows = [{"step": i + 1, **dict(zip(run, values))} for i, values in enumerate(zip(*run.values()))]
    path.write_text("\n".join(map(json.dumps, [{"event": "start", "config": {"beta": 0.1}}, *rows])))
    return str(path)


def test_the_command_reports_on_every_file(tmp_path, capsys):
    well = write_run(tmp_path / "well.metrics.jsonl", PPO)
    ill = write_run(tmp_path / "ill.metrics.jsonl", {**PPO, "at_limit": [1.0] * 9})
    main([well, ill])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and out[0].startswith(f"{well}: healthy, none of ") and "too few" not in out[0]
    assert out[1] == f"{ill}: all lengths are at the limit"
    assert "likely cause: the reward pays for length" in out[2] and "remedy: take 0.02*length off" in out[3]


def test_a_run_too_short_for_a_trend_says_so(tmp_path, capsys):
    short = {name: values[:3] for name, values in PPO.items()}
    main([write_run(tmp_path / "x.metrics.jsonl", short)])
    assert "only 3 steps were logged, too few for a trend" in capsys.readouterr().out


def test_a_file_that_was_cut_short_is_read_up_to_there(tmp_path):
    path = tmp_path / "x.metrics.jsonl"
    write_run(path, {**PPO, "at_limit": [1.0] * 9})
    path.write_text(path.read_text()[:-20])
    assert "all lengths are at the limit" in [name for name, *_ in diagnose(read_run(str(path)))]


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "config": 5}],
        [{"config": {"beta": "x"}}, {"step": 1, "eval_kl": 1.0}],
        [*[{"step": i, "reward_chosen": 1.0} for i in range(9)], {"step": 9, "reward_rejected": 1.0}],
    ],
)
def test_metrics_of_something_else_are_one_sentence(rows, tmp_path):
    path = tmp_path / "x.metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"x\.metrics\.jsonl holds metrics that do not fit together"):
        main([str(path)])


@pytest.mark.parametrize("content", [None, b"", b"[1]\n[2]", b'{"a": 1}', b"PK\x03\x04\xff\xfe"])
def test_what_is_no_metrics_file_is_one_sentence(content, tmp_path):
    path = tmp_path / "x.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt.*metrics"):
        main([str(path)])
