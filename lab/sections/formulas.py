"""The formulas that the explorers show: their sliders, what is computed, what is plotted."""

from dataclasses import dataclass, field

LOSSES = ("dpo", "cdpo", "robust", "ipo", "simpo")


@dataclass
class Slider:
    name: str  # as report.js calls it
    label: str
    low: float
    high: float
    step: float
    value: float


@dataclass
class Choice:
    name: str
    label: str
    options: tuple[str, ...]


@dataclass
class Explorer:
    name: str  # as report.js calls it
    title: str
    formula: str
    note: str
    controls: list
    outputs: dict[str, str]  # what report.js returns: how it is called
    plot: dict | None = None  # along: a slider's name, range, lines [[output, kind]…]
    bars: dict | None = None  # outputs or arrays side by side, names under the groups
    arrays: dict = field(default_factory=dict)  # fixed inputs


RATIO = (-6, 6, 0.05)
GAE = {"rewards": [0.0, 0.0, -0.2, 0.0, 0.0, 1.0], "values": [0.1, 0.2, 0.3, 0.2, 0.5, 0.8]}


def explorers(world: dict | None = None) -> list[Explorer]:
    """All of them. world: "reference" and "reward" of an enumerated prompt, for the optimum."""
    found = [
        Explorer(
            "bradley-terry",
            "Bradley–Terry: a gap of scores",
            "P(A ≻ B) = σ(r_A − r_B),  L = −(1−ε) log σ(gap) − ε log σ(−gap)",
            "With ε, the share of labels thought to be flipped, an ever larger gap no longer pays: the "
            "loss is least at the gap whose σ is 1 − ε.",
            [
                Slider("gap", "gap r_A − r_B", *RATIO, 1.0),
                Slider("smoothing", "ε, label noise", 0, 0.45, 0.01, 0.1),
            ],
            {"probability": "P(A ≻ B)", "loss": "loss, nats", "gradient": "dL / d gap"},
            {
                "along": "gap",
                "range": [-6, 6],
                "lines": [["loss", ""], ["probability", "second"], ["gradient", "third"]],
            },
        ),
        Explorer(
            "dpo",
            "DPO and its variants: two log-ratios",
            "h = (log π − log π_ref)(chosen) − (log π − log π_ref)(rejected);  dpo: L = −log σ(βh);  cdpo "
            "−(1−ε) log σ(βh) − ε log σ(−βh);  robust: L = (−(1−ε) log σ(βh) + ε log σ(−βh)) / (1−2ε);  "
            "ipo: L = (h − 1/(2β))²;  simpo: L = −log σ(βh − γ)",
            "Every variant is another function of the margin h. IPO’s and SimPO’s log-ratios are per "
            "token, and SimPO’s have no reference. IPO stops at 1/(2β); with label noise cDPO and robust "
            "DPO stop too, or turn.",
            [
                Choice("loss", "variant", LOSSES),
                Slider("chosen", "log-ratio, chosen", *RATIO, 0.5),
                Slider("rejected", "log-ratio, rejected", *RATIO, -0.5),
                Slider("beta", "β", 0.05, 3, 0.05, 1.0),
                Slider("smoothing", "ε of cdpo and robust", 0, 0.45, 0.01, 0.1),
                Slider("gamma", "γ of simpo", 0, 3, 0.05, 1.0),
            ],
            {
                "margin": "margin h",
                "loss": "loss",
                "gradient": "dL / dh",
                "rewardChosen": "implicit reward, chosen",
                "rewardRejected": "implicit reward, rejected",
            },
            {"along": "chosen", "range": [-6, 6], "lines": [["loss", ""], ["gradient", "third"]]},
        ),
        Explorer(
            "ppo",
            "PPO’s clip: one token",
            "L = max(−A ρ, −A clip(ρ, 1−ε, 1+ε)),  ρ = π / π_old",
            "A good token (A > 0) is pushed up until ρ is 1 + ε, a bad one down until 1 − ε; beyond that "
            "the gradient is 0. On the other side nothing is clipped: mistakes are undone in full.",
            [
                Slider("advantage", "advantage A", -3, 3, 0.1, 1.0),
                Slider("ratio", "ratio ρ", 0.05, 2.5, 0.01, 1.1),
                Slider("clip", "ε", 0.05, 0.5, 0.01, 0.2),
            ],
            {"loss": "loss", "gradient": "dL / d log π"},
            {"along": "ratio", "range": [0.05, 2.5], "lines": [["loss", ""], ["gradient", "third"]]},
        ),
        Explorer(
            "kto",
            "KTO’s value function: one row",
            "v = σ(± β (r − z)),  L = λ (1 − v),  r = log π − log π_ref",
            "Gains and losses are felt from the reference point z, and flatten out: a row that is far on "
            "either side teaches little.",
            [
                Choice("label", "label", ("desirable", "undesirable")),
                Slider("ratio", "log-ratio r", -20, 20, 0.5, 2.0),
                Slider("z", "reference point z", 0, 5, 0.05, 0.5),
                Slider("beta", "β", 0.02, 1, 0.02, 0.1),
                Slider("weight", "λ", 0.5, 2, 0.05, 1.0),
            ],
            {"value": "value v", "loss": "loss", "gradient": "dL / dr"},
            {
                "along": "ratio",
                "range": [-20, 20],
                "lines": [["value", "second"], ["loss", ""], ["gradient", "third"]],
            },
        ),
        Explorer(
            "orpo",
            "ORPO’s odds: two mean log-probs",
            "odds = p / (1 − p),  L = NLL − λ log σ(log odds(chosen) − log odds(rejected))",
            "p is the geometric mean of a response’s token probabilities. Near p = 1 the odds explode: a "
            "small difference between two likely answers is a large one in odds.",
            [
                Slider("chosen", "mean log-prob, chosen", -4, -0.02, 0.02, -0.4),
                Slider("rejected", "mean log-prob, rejected", -4, -0.02, 0.02, -0.8),
                Slider("nll", "NLL", 0, 3, 0.05, 0.5),
                Slider("lam", "λ", 0, 1, 0.05, 0.1),
            ],
            {
                "ratio": "log-odds ratio",
                "oddsLoss": "odds part",
                "loss": "loss",
                "gradientChosen": "dL / d chosen",
                "gradientRejected": "dL / d rejected",
            },
            {
                "along": "chosen",
                "range": [-4, -0.02],
                "lines": [["oddsLoss", ""], ["gradientChosen", "third"]],
            },
        ),
        Explorer(
            "kl",
            "Estimators of KL: k1, k2, k3",
            "d = log π_ref − log π,  k1 = −d,  k2 = d²/2,  k3 = e^d − 1 − d",
            "Of a sampled token. k1 is unbiased and may be negative; k2 never is, and is biased; k3 is "
            "both unbiased and never negative. As a loss their gradients differ: k2 has the true one of "
            "the next token.",
            [Slider("logp", "log π", -5, 0, 0.05, -1.0), Slider("reference", "log π_ref", -5, 0, 0.05, -1.5)],
            {
                "k1": "k1",
                "k2": "k2",
                "k3": "k3",
                "gradient1": "dk1 / d log π",
                "gradient2": "dk2 / d log π",
                "gradient3": "dk3 / d log π",
            },
            {"along": "logp", "range": [-5, 0], "lines": [["k1", ""], ["k2", "second"], ["k3", "third"]]},
        ),
        Explorer(
            "gae",
            "GAE’s λ: one response of six tokens",
            "A_t = Σ_l (γλ)^l δ_(t+l),  δ_t = R_t + γ V_(t+1) − V_t",
            "λ = 0 believes the critic and looks one token ahead: little noise, much bias. λ = 1 waits for "
            "what really came. Grey: the rewards; teal: the advantages; brown: the values.",
            [Slider("lam", "λ", 0, 1, 0.01, 0.95), Slider("gamma", "γ", 0.8, 1, 0.01, 1.0)],
            {"advantages": "advantages", "returns": "returns A + V"},
            None,
            {"outputs": ["rewards", "advantages", "values"], "names": ["1", "2", "3", "4", "5", "6"]},
            GAE,
        ),
    ]
    if world:
        found.insert(
            6,
            Explorer(
                "optimum",
                "The optimum over β: all responses to one prompt",
                "π*(y) = π_ref(y) exp(r(y)/β) / Z",
                "A world so small that all fifteen responses can be listed (lab/oracle.py): a and b are "
                "tokens, the point ends. Grey: the reference; teal: what every method of this project is "
                "to reach. The smaller β, the more of it goes to the one response with the highest reward, "
                "and the more KL it costs.",
                [Slider("beta", "β", 0.05, 5, 0.05, 1.0)],
                {"reward": "E[r]", "kl": "KL(π* ‖ π_ref), nats"},
                None,
                {"outputs": ["reference", "policy"], "names": world["names"]},
                {
                    "logReference": world["logReference"],
                    "reference": world["reference"],
                    "reward": world["reward"],
                },
            ),
        )
    return found
