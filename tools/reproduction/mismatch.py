"""E9: how far a student is from its expert, and how good it is."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from matplotlib.axes import Axes

from reproduction.curves import COLOURS
from reproduction.differences import difference, paired, points, values
from reproduction.estimate import estimate
from reproduction.examination import examine
from reproduction.experiment import Arm, Experiment, Judgement, Numbers, Runs, Setting, Verdict
from reproduction.lab import Lab
from reproduction.made_models import with_made_models
from reproduction.scatter import draw_arm
from reproduction.trained import TEACHER, numbers_of, trained_arm

STEPS = 200
ONLINE = "on-policy"
OFFLINE = "SFT"
FAR = 0.2
NO_LOSS = 0.02
STATISTICS = ("length", "spaces", "symbols")


def statistics_of(texts: Sequence[str]) -> Mapping[str, list[Hashable]]:
    """Of each response its length, its number of spaces, and how often each operator and the
    parenthesis occur in it.
    """
    return {
        "length": [len(text) for text in texts],
        "spaces": [text.count(" ") for text in texts],
        "symbols": [tuple(text.count(symbol) for symbol in "+-*(") for text in texts],
    }


def total_variation(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """Between the empirical distributions of two samples.

    Example: of (a, a, b, b) and (a, b, b, b) it is 0.25.
    """
    a, b = Counter(one), Counter(other)
    return sum(abs(a[x] / len(one) - b[x] / len(other)) for x in {*a, *b}) / 2


def measure(settings: Mapping[str, Setting], seed: int, lab: Lab) -> Numbers:
    """Train, and compare 2048 responses of the student with as many of its expert.

    Returns:
        besides those of trained.measure: expert_reward; tv_length, tv_spaces and tv_symbols, the
        total variation between both models' statistics_of, and tv, the largest of them. But for the
        samples' noise each is a lower bound of that between the distributions of responses.
    """
    given = with_made_models(settings, lab.folder / "made")
    expert = str(given["teachers.main.path"])
    of_expert = examine(expert, expert, problems=lab.problems)
    with lab.run(given, seed) as trained:
        of_student = examine(trained.model, expert, problems=lab.problems)
        ours, theirs = statistics_of(of_student.texts), statistics_of(of_expert.texts)
        found = {f"tv_{name}": total_variation(ours[name], theirs[name]) for name in STATISTICS}
        return {
            **numbers_of(trained, of_student),
            "expert_reward": of_expert.reward,
            **found,
            "tv": max(found.values()),
        }


def arm(name: str, algorithm: str) -> Arm:
    settings = {
        "algorithm": algorithm,
        "train.steps": STEPS,
        "train.lr": 5e-4,
        "eval.every": 50,
        "model.path": TEACHER,
        "teachers.main.path": "made:two-styles",
    }
    return trained_arm(name, settings, {"teachers.main.path": TEACHER}, measure)


def judge(runs: Runs) -> Judgement:
    farther = difference(runs, ONLINE, OFFLINE, "tv")
    better = paired(values(runs, ONLINE, "reward"), values(runs, ONLINE, "expert_reward"))
    verdict = Verdict.undecided
    if farther.low > FAR and better.low > -NO_LOSS:
        verdict = Verdict.confirmed
    elif farther.high < FAR or better.high < -NO_LOSS:
        verdict = Verdict.refuted
    far = {arm: estimate(values(runs, arm, "tv")) for arm in (ONLINE, OFFLINE)}
    rewards = {arm: estimate(values(runs, arm, "reward")) for arm in (ONLINE, OFFLINE)}
    return Judgement(
        verdict=verdict,
        effect=f"estimated total variation to the expert {far[ONLINE].text()} on-policy, "
        f"{far[OFFLINE].text()} by SFT; reward of on-policy minus that of the expert: "
        f"{points(better)}",
        reason=f"The rewards are {points(rewards[ONLINE])} on-policy, {points(rewards[OFFLINE])} "
        f"by SFT and {points(estimate(values(runs, ONLINE, 'expert_reward')))} of the expert.",
    )


def draw(axes: Axes, runs: Runs) -> None:
    for colour, arm in zip(COLOURS, (ONLINE, OFFLINE), strict=False):
        x = values(runs, arm, "tv")
        y = [100 * value for value in values(runs, arm, "reward")]
        draw_arm(axes, x, y, colour=colour, label=arm)
    expert = estimate(values(runs, ONLINE, "expert_reward")).mean
    axes.axhline(100 * expert, color="black", linewidth=0.8, linestyle=":", label="expert")
    axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("lower bound of the total variation to the expert")
    axes.set_ylabel("reward of sampled responses, per cent")


EXPERIMENT = Experiment(
    id="E9",
    title="Far from the expert, and as good",
    claim="A student can be far from its expert in the distribution of responses and be as good: "
    "bounds by the distance to the expert are too pessimistic where the reward does not see the "
    "difference.",
    source="arXiv 2606.30445, figure 2",
    design="The expert was made as the shipped Countdown teacher, but writes every second solution "
    "with spaces around its operators, which the reward does not see. The student begins as the "
    f"shipped teacher, of whose samples 48.7 % are right, and never writes spaces. {STEPS} steps "
    "of 128 responses: on-policy by the reverse KL over the whole vocabulary (algorithm=opd_full), "
    "which may keep to one of the two styles, and SFT on the expert's responses (algorithm=seqkd), "
    "which learns both. The total variation between student and expert is at least that between "
    "the distributions of a statistic, over 2048 responses of each: the length, the number of "
    "spaces, and the counts of the operators and parentheses; the largest of the three counts. "
    "Between two samples it is a little larger than between their distributions.",
    rule="With 95 % intervals over the seeds. Confirmed if the lower bound of the total variation "
    f"is more than {FAR} larger on-policy than by SFT, and the on-policy student's reward is less "
    f"than {100 * NO_LOSS:.0f} points below the expert's. Refuted if the bound is less than {FAR} "
    f"larger, or that reward more than {100 * NO_LOSS:.0f} points below the expert's. Otherwise "
    "undecided.",
    columns={
        "reward": "reward",
        "expert_reward": "expert's reward",
        "tv": "lower bound of the total variation",
        "tv_length": "by length",
        "tv_spaces": "by spaces",
        "tv_symbols": "by symbols",
        "divergence": "KL to the expert, nats",
    },
    arms=(arm(ONLINE, "opd_full"), arm(OFFLINE, "seqkd")),
    seeds=(0, 1, 2, 3, 4),
    judge=judge,
    draw=draw,
    cuts="The two styles are ours; the experts of the paper differ in many ways at once. The "
    "student begins 5 points better than the expert and as far from it as it ends, so that it "
    "would have been confirmed before training too: training keeps the distance and loses 3.9 "
    "points. What is estimated after SFT is about what two samples of one distribution give. "
    "On-policy learns from whole distributions and SFT from drawn tokens.",
)
