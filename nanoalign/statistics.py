"""Means and changes over prompts, their standard errors and tables; how strong players are."""

import numpy as np

from nanoalign.seeds import derived_seed
from nanoalign.terminal import visible

POINTS = 400 / np.log(10)  # Elo's scale: 400 points are odds of ten to one


def clustered(pulls: np.ndarray, groups) -> np.ndarray:
    """Deviations (N, D) from what was fitted, of which those of a group (N,) depend on each other and groups
    do not → the covariance (D, D) of their sum (Liang & Zeger 1986); NaN for a single group."""
    number: dict = {}
    group = [number.setdefault(name, len(number)) for name in groups]
    sums, G = np.zeros((len(number), pulls.shape[1])), len(number)
    np.add.at(sums, group, pulls)
    return sums.T @ sums * (G / (G - 1) if G > 1 else np.nan)


def clustered_error(values: np.ndarray, groups) -> float:
    """The standard error of the mean of values (N,), of which those of one group (a prompt) depend on each
    other; where each is a group of its own, the ordinary one: standard deviation (by N − 1) over √N."""
    deviations = (values - values.mean())[:, None]
    return float(clustered(deviations, groups)[0, 0] ** 0.5 / len(values))


def over_samples(values: np.ndarray) -> np.ndarray:
    """Values (prompts, samples) → each prompt's mean over the samples that say something; NaN: none does."""
    said = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(said, values, 0.0).sum(axis=1) / said.sum(axis=1)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Values (prompts, samples) → mean, and its standard error over prompts. NaN: says nothing."""
    each = over_samples(values)
    each = each[~np.isnan(each)]
    if not len(each):
        return float("nan"), float("nan")
    return float(each.mean()), clustered_error(each, range(len(each)))


def change(values: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    """Values (prompts, samples) of a policy and of its baseline → mean difference, and its standard error:
    smaller than that of two unrelated means, for the prompts are the same."""
    return mean_and_error((over_samples(values) - over_samples(baseline))[:, None])


def pairwise_wins(utilities: np.ndarray) -> np.ndarray:
    """Utilities (players, prompts, samples) → (prompts, players, players): the share of pairs of samples in
    which the row's player beats the column's, ties half."""
    a, b = utilities[:, None, :, :, None], utilities[None, :, :, None, :]
    return ((a > b) + 0.5 * (a == b)).mean(axis=(-2, -1)).transpose(2, 0, 1)


def elo(wins: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple:
    """Wins (N, P, P) of row over column in each of N independent groups (prompts), ties half to each →
    Elo ratings (P,) whose mean is 1000, and their 95 % intervals (2, P), bootstrapped over groups: Bradley
    and Terry's maximum likelihood, P(i beats j) = 1 / (1 + 10^((R_j − R_i) / 400)). A player who never loses
    gets a rating that is thousands of points off."""
    N, P, _ = wins.shape
    first, second = np.triu_indices(P, 1)
    features = np.eye(P)[first] - np.eye(P)[second]  # (P(P−1)/2, P)

    def rate(total: np.ndarray) -> np.ndarray:
        won, lost = total[..., first, second], total[..., second, first]
        theta = logistic(features, won, won + lost)
        return 1000 + POINTS * (theta - theta.mean(axis=-1, keepdims=True))

    drawn = np.random.default_rng(derived_seed(seed, "elo")).multinomial(N, np.full(N, 1 / N), size=draws)
    resampled = rate(np.einsum("dn,nij->dij", drawn, wins))  # (draws, P)
    return rate(wins.sum(axis=0)), np.quantile(resampled, (0.025, 0.975), axis=0)


def logistic(features: np.ndarray, wins: np.ndarray, trials=1.0) -> np.ndarray:
    """Features (M, D), wins (…, M), which may be fractions, of so many trials → the θ (…, D) under which
    P(win) = σ(features θ) makes them likeliest, by Newton's method. A ridge of 1e-6 keeps θ finite where no
    maximum exists, and settles what the data leaves open (a constant added to all ratings)."""
    ridge = 1e-6 * np.eye(features.shape[1])
    theta = np.zeros((*wins.shape[:-1], len(ridge)))
    for _ in range(200):
        p = 0.5 * (1 + np.tanh(0.5 * (theta @ features.T)))  # σ (…, M)
        slope = (wins - trials * p) @ features - theta @ ridge
        weight = trials * p * (1 - p)
        curvature = np.einsum("...m,mi,mj->...ij", weight, features, features) + ridge
        step = np.linalg.solve(curvature, slope[..., None])[..., 0].clip(-2, 2)
        theta = theta + step
        if np.abs(step).max() < 1e-9:
            break
    return theta


def print_table(header: list[str], lines: list[tuple[str, list]]) -> None:
    """A cell is (mean, standard error), and a mark if there is one."""
    header = [visible(name) for name in header]

    def text(cell) -> str:
        if cell is None or np.isnan(cell[0]):
            return "– "
        error = "–" if np.isnan(cell[1]) else f"{cell[1]:.3f}"
        return f"{cell[0]:.3f} ± {error}{cell[2] if cell[2:] else ' '}"

    width = max(17, *(len(name) + 3 for name in header))
    print(f"{'':24}" + "".join(f"{name + ' ':>{width}}" for name in header))
    for name, cells in lines:
        print(f"{visible(name):24}" + "".join(f"{text(cell):>{width}}" for cell in cells))


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive (N,) scores above a negative, ties half (Mann & Whitney 1947), or NaN."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # of equal scores the mean rank
    P, N = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - P * (P + 1) / 2) / (P * N)) if P and N else float("nan")


def calibration_error(p: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Probabilities and labels (N,) → the expected calibration error (Guo et al. 2017, eq. 3)."""
    index = np.digitize(p, np.linspace(0, 1, bins + 1)[1:-1])
    gaps = np.abs(np.bincount(index, p, bins) - np.bincount(index, labels, bins))
    return float(gaps.sum() / len(p))
