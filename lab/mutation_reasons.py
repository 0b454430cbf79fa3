"""By hand, for lab/mutation.py: what once survived, and why what still does computes the same."""

KNOWN = [  # (what is wrong, the file, the function, what stands there, what should not)
    ("the critic left out of the optimiser", "train_ppo", "main", "((policy, critic))", "((policy,))"),
    ("advantages not whitened", "train_ppo", "main", "whiten(advantages, mask)", "advantages"),
    ("γ and λ swapped", "train_ppo", "main", "config.gamma, config.lam)", "config.lam, config.gamma)"),
    (
        "the temperature left out of the reference's log-probs", "train_ppo", "main",
        "(ref, ids, scored, config.temperature)", "(ref, ids, scored)",
    ),
    (
        "the temperature left out of the update's log-probs", "train_ppo", "main",
        "forward(policy, critic, x, own, config.temperature)", "forward(policy, critic, x, own, 1.0)",
    ),
    (
        "policy and reference swapped in the price of KL", "train_ppo", "main",
        "(score, old_logp, ref_logp", "(score, ref_logp, old_logp",
    ),
    ("the logged KL's sign", "train_ppo", "main", "old_logp - ref_logp", "ref_logp - old_logp"),
    ("the same seed for every rollout", "train_ppo", "main", "seed=run.seed", "seed=config.seed"),
    ("the critic's head not zeroed", "nanoalign.training", "load_critic", "nn.init.zeros_(parameter)", "0"),
    ("the logged KL's sign", "train_grpo", "main", "old_logp - ref_logp", "ref_logp - old_logp"),
    ("the same seed for every rollout", "train_grpo", "main", "seed=run.seed", "seed=config.seed"),
    ("the policy in place of the reference", "train_grpo", "main", "(ref, ids,", "(policy, ids,"),
    ("no margin in the reward loss", "train_rm", "main", "m, smoothing,", "0.0, smoothing,"),
    ("nor label smoothing", "train_rm", "main", "m, smoothing,", "m, 0.0,"),
    ("nor centring", "train_rm", "main", "m, smoothing, c, p", "m, smoothing, 0.0, p"),
    (
        "the sign of the process model's language loss", "train_prm", "main",
        "loss - config.lm_weight", "loss + config.lm_weight",
    ),
    ("no soft labels in DPO's held-out loss", "train_dpo", "evaluate", "soft[i]", "torch.ones_like(soft[i])"),
    (
        "unfinished solutions keep their scores", "best_of_n", "draw",
        "aggregate(p, ends, how) * new.ended", "aggregate(p, ends, how)",
    ),
    ("and by the outcome model", "best_of_n", "draw", "orm(asked, new) * new.ended", "orm(asked, new)"),
    ("the search's count of tokens", "best_of_n", "search", "tokens += len(step)", "tokens += 1"),
    (
        "a dense reward without missing_eos_score", "nanoalign.rewards", "unless_unfinished",
        "torch.where(rollout.ended[:, None], score, on_last_token(missing, rollout.mask))", "score",
    ),
    (
        "the temperature left out of the scorecard's KL", "evaluate", "answer",
        "token_logprobs(m, ids, mask, T)", "token_logprobs(m, ids, mask)",
    ),
]  # fmt: skip

REASONS = {  # (the file, what a mutant's name matches) → why it computes the same
    ("train_.*", r"^config\.lr → config\.weight_decay|^make_optimizer.*config\.lr"): "Run.update sets the "
    "learning rate at every step: the optimiser's first one is never used.",
    ("train_(ppo|grpo)", r"^policy → ref$"): "Only the shape is read, which load_reference has compared.",
    ("train_ppo", r"^\(policy, critic\) → \(critic, policy\)"): "The same parameters, in another order.",
    ("train_.*", r"^prepare\("): "Each model is prepared alone, in whatever order.",
    (
        "train_.*",
        r"^\(?(policy|model), .*(pairs|examples|prompts|labels)",
    ): "What a run is made from, in another "
    "order: the fingerprint is another one, and tells runs apart as before.",
    ("train_(ppo|grpo)", r"seed=negated\(run\.seed\)"): "Another seed of each step's own.",
    (".*", r"^-1 → 1$"): "The last dimension of two is the first after the batch.",
    (".*", r"^int\("): "A tensor of one number in place of the number.",
    (".*", r"non_blocking=True\) → |^True → False$"): "How a copy is waited for, not what is copied.",
    (".*", r"^len\((\w+|order\[step\])\) → len\(negated|^ids → mask$"): "The length is the same.",
    (
        "train_(ppo|grpo)",
        r"negated\((kl|torch\.cat\(first\)|log_ratio|\(logp - old)",
    ): "The check, and what is logged of it, takes squares and absolute values.",
    ("train_(ppo|grpo)", r"^run\.log\(.*ratio_error"): "The error of the ratio is 0 here, whatever its sign.",
    ("train_grpo", r"negated\(group|^group → indices"): "All groups are of one size, in whatever order.",
    (
        "train_prm",
        r"^1 → 2$",
    ): "The largest of 1 and a count, which is at least 2; and run.count, by which shares "
    "that already add up to 1 are divided before the log is compared.",
    ("train_prm", r"hidden=hidden\) → "): "What is known already is computed once more.",
    (
        "train_pretrain",
        r"^abs\(|negated\(len\(blocks\)",
    ): "The size of a number; max(1, …) of fewer than 40 blocks.",
    ("train_pretrain", r"^np\.stack\(thin"): "An array of blocks as a list of them.",
    (
        ".*",
        r"negated\(config\.skip_bad_rows\)",
    ): "There is no bad row in the test; tests/test_data.py has some.",
    ("best_of_n", r"^np\.array\(|setdefault\(negated"): "The same numbers of another type, or sign.",
    (
        "evaluate",
        r"^checks_for|^config\.(prompts|reward) → ",
    ): "Named in an error only, or asked for where checks do not know a prompt: tests/test_scorecard.py.",
    ("evaluate", r"^Path\(path\) → |^found\.get"): "The progress line's name; a measure that all rows have.",
    ("collect", r"ai_votes|\('rm', 'ai'\)"): "An AI's votes have their tests in tests/test_collect.py.",
    (".*", r"^print\("): "A line on the terminal.",
    (
        ".*",
        r"^(min|max)\([^→]*, [^→]*\) → (min|max)\([^→]*, |^\('[^→]*\) → \('",
    ): "The same numbers or names, in another order.",
    (".*", r"^str\((record|beside)"): "A path in place of its name.",
    (
        ".*",
        r"^torch\.tensor\(\[.*device=device\) → |^labels\(batch|^load_policy\(.*device, chat",
    ): "The device of the test is the CPU, as is the default.",
    (
        "train_kto",
        r"soft := sum|^row\.get\('probability'|^1 → 2$|^rows → eval_rows",
    ): "A line on the terminal, for which tests/test_kto.py fails.",
    ("train_kto", r"^policy → ref$"): "Two copies of one model, before the first step.",
    (
        "train_(dpo|sft)",
        r"negated\(side\[0\]|^0 → 1$|^list\(map",
    ): "Of an example's ids and mask either has its length; and a list may be any other container.",
    ("train_dpo", r"negated\(config\.beta\)"): "Where a loss must start is the same for β and −β.",
    ("train_sft", r"hidden=hidden\) → "): "What is known already is computed once more.",
    ("train_prm", r"^config\.lm_weight → "): "A term of weight 0 is 0.",
    ("train_pretrain", r"'held-out'\) → "): "The words of an error.",
    ("collect", r"what='collect'"): "The progress line's name.",
    (
        "best_of_n",
        r"negated\(i\)|negated\(np\.zeros|^same\(",
    ): "The first is 0, as −0 is; equality has no order.",
    (
        "best_of_n",
        r"^numbers\.setdefault|^answer and",
    ): "tests/test_best_of_n.py fails: votes for equal numbers, tables.",
    ("evaluate", r"negated\(np\.nan\)"): "−NaN is NaN.",
    (
        "evaluate",
        r"tokenizers|^2 → 3$|^1 → 2$|^\(\*paths",
    ): "The words of an error, or when it is raised: there "
    "tests/test_scorecard.py fails; and numpy takes any negative number for the size left open.",
    (
        ".*",
        r"^read_rows\(.*, config\.fields\) → |^config\.skip_bad_rows → ",
    ): "tests/wiring/test_wired_rows.py, which is of several scripts, fails.",
    (
        "evaluate",
        r"^own_seed|^config\.seed → |^not plain → |^ref → policy|^dict\.fromkeys|^config\.skip_bad_rows → ",
    ): "tests/test_scorecard.py fails, or the seed is another one of the checkpoint's own.",
}
