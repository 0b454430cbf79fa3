"""What every logged metric is, in a line, and where it lies in a healthy run."""

# (what it is, where it is healthy); "run.metric" is of that run only, and eval_X without a line of its own is
# X on held-out rows. The order is the report's.
MEANINGS = {
    "loss": ("what is minimised, in nats", "falls, fast at first; held out it stays near the training one"),
    "dpo.loss": ("−log σ(β margin)", "starts at ln 2 = 0.693, exactly; held out it ends below"),
    "kto.loss": ("weighted 1 − value", "starts at half the mean weight; falls a little"),
    "rm.loss": ("−log P(chosen ≻ rejected)", "from about ln 2 down to what noisy labels leave"),
    "orpo.loss": ("NLL plus λ times the odds part", "falls as in SFT"),
    "ppo.loss": ("clipped surrogate plus value loss", "near 0: its size says nothing, its gradient does"),
    "grpo.loss": ("clipped surrogate", "near 0: advantages of a group sum to 0, so its size says nothing"),
    "prm.loss": ("cross-entropy of right and wrong steps", "falls; held out it may turn up again: then "
        "it overfits"),
    "perplexity": ("e^loss: among how many tokens it hesitates", "falls with the loss"),
    "accuracy": ("how often the chosen side has the higher score", "rises above one half; labels are "
        "noisy, so never to 1"),
    "prm.accuracy": ("how many steps it judges right", "well above the share of the commoner label"),
    "auc": ("P(a desirable row scores above an undesirable one)", "rises above one half"),
    "prm.auc": ("P(a right step scores above a wrong one)", "0.8 and more; 0.5 is a coin's"),
    "margin": ("chosen less rejected, in the loss's units", "grows from 0"),
    "reward": ("the reward of answers to held-out prompts", "rises; a second opinion should rise with it"),
    "judge": ("the exact judge of the same answers", "rises with the reward; falling beside it is hacking"),
    "rm": ("the reward model's score of the same answers", "rises with the judge"),
    "kl": ("log π − log π_ref of a response, in nats", "rises from 0 and settles: β prices it"),
    "score": ("the mean reward, as it is trained on", "rises"),
    "rm.score": ("the mean score, before it is normalised", "stays near 0: only differences mean anything"),
    "reward_chosen": ("β (log π − log π_ref) of the chosen side", "near 0 or above; falling below −1 is "
        "a warning"),
    "reward_rejected": ("β (log π − log π_ref) of the rejected side", "falls below the chosen one"),
    "logp_chosen": ("log π of the chosen response", "often falls, only less than the rejected one's"),
    "logp_rejected": ("log π of the rejected response", "falls"),
    "nll": ("mean negative log-prob of what is imitated", "falls as in SFT"),
    "odds_loss": ("−log σ(log-odds ratio)", "from about ln 2, slowly down"),
    "log_odds_ratio": ("log odds of chosen over rejected", "rises above 0"),
    "mean_logp_chosen": ("mean log-prob of a chosen token", "rises: answers are learnt"),
    "mean_logp_rejected": ("mean log-prob of a rejected token", "rises at first too, and less"),
    "z": ("KTO's reference point: KL on mismatched pairs", "small and above 0; it has no gradient"),
    "desirable": ("share of desirable rows in the batch", "the data's, whatever is learnt"),
    "entropy": ("nats of choice a token", "falls gently; a collapse ends exploration"),
    "length": ("tokens of a response", "about as at the start"),
    "ended": ("share of responses with an end token", "near 1"),
    "at_limit": ("share of responses at the length limit", "near 0"),
    "explained_variance": ("1 − Var(returns − values) / Var(returns)", "rises above 0; below it the "
        "critic misleads"),
    "value_loss": ("half the critic's squared error, clipped", "falls, then follows the rewards' spread"),
    "policy_loss": ("the clipped surrogate alone", "near 0"),
    "equal_groups": ("share of groups whose rewards are all alike", "well below 1: they teach nothing"),
    "clip_fraction": ("share of tokens whose ratio is cut off", "0.01 to 0.2"),
    "value_clip_fraction": ("share of values that moved beyond the clip", "small"),
    "approxkl": ("half the mean squared log-ratio within an iteration", "below 0.02"),
    "ratio": ("mean π/π_old over the minibatches", "near 1"),
    "ratio_error": ("how far the first minibatch's ratios are off 1", "rounding: below 0.001"),
    "ratio_max": ("the largest π/π_old of the iteration", "below 2"),
    "kl_error": ("standard error of the batch's KL", "well below the KL, later on"),
    "kl_loss": ("the KL term of the loss", "0 where KL is priced in the reward"),
    "beta": ("the price of a nat of KL", "as set, unless adaptive"),
    "ece": ("gap between confidence and accuracy", "below 0.1"),
    "right": ("share of right solutions that are called right", "high"),
    "exact": ("share of solutions whose first wrong step is found", "rises"),
    "clean": ("share of right solutions without a step called wrong", "rises"),
    "f1": ("harmonic mean of exact and clean", "rises"),
    "grad_norm": ("length of the gradient before clipping", "no rising trend; spikes are clipped"),
    "lr": ("the learning rate", "warms up, then falls on a half cosine"),
    "tokens_per_s": ("tokens through training a second", "level"),
    "peak_mb": ("peak memory, MB", "level after the first steps"),
}  # fmt: skip

# metrics that are shown at once, of each run, in this order; the others are behind a click
FIRST = {
    "base": ("loss", "perplexity"),
    "sft": ("loss",),
    "solver": ("loss",),
    "dpo": ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "kl"),
    "kto": ("loss", "reward_chosen", "reward_rejected", "auc", "kl", "z"),
    "orpo": ("loss", "nll", "odds_loss", "log_odds_ratio", "accuracy"),
    "rm": ("loss", "accuracy", "margin"),
    "ppo": ("score", "reward", "judge", "kl", "explained_variance", "entropy", "length"),
    "grpo": ("score", "reward", "judge", "kl", "equal_groups", "entropy", "length"),
    "prm": ("loss", "auc", "accuracy", "f1"),
}


def meaning(run: str, metric: str) -> tuple[str, str]:
    """(what it is, where it is healthy) of a run's metric, eval_ or not; empty texts of an unknown one."""
    name = metric.removeprefix("eval_")
    return MEANINGS.get(f"{run}.{name}") or MEANINGS.get(name) or ("", "")
