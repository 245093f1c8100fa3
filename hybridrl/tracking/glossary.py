"""What every metric is. `python -m hybridrl.tracking.glossary > hybridrl/tracking/METRICS.md`
writes the page of it.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One key of a row, or several of one form: <name> stands for anything but a slash."""

    key: str
    formula: str
    reading: str  # a healthy range, or what a change means
    unit: str = ""  # empty: a plain number

    def covers(self, key: str) -> bool:
        """Example: the metric reward/<name>/mean covers reward/countdown/mean."""
        return (
            re.fullmatch("[^/]+".join(map(re.escape, re.split(r"<\w+>", self.key))), key)
            is not None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    title: str
    text: str
    metrics: tuple[Metric, ...]


def _section(title: str, text: str, *rows: tuple[str, ...]) -> Section:
    """rows: (key, unit, formula, reading)."""
    metrics = (
        Metric(key=key, unit=unit, formula=formula, reading=reading)
        for key, unit, formula, reading in rows
    )
    return Section(title=title, text=text, metrics=tuple(metrics))


SECTIONS = (
    _section(
        "Training",
        "The optimizer step.",
        (
            "train/step",
            "",
            "optimizer steps done",
            "rows of step 0 are evaluations before training",
        ),
        (
            "train/loss",
            "",
            "sum of m (sum_i w_i D_i + G f(rho) log p(y))",
            "its gradient is the objective's, its value is not J: need not fall",
        ),
        (
            "nll/token",
            "nats",
            "mean of -log p(y) over the tokens that the data or a teacher wrote",
            "falls; the loss of supervised fine-tuning",
        ),
        (
            "train/grad_norm",
            "",
            "norm of the gradient at the parameters, before clipping",
            "steady; a spike is a bad batch, cut by train.grad_clip",
        ),
        ("train/lr", "", "learning rate of the step", "as set by train.lr, its warm-up and lr_end"),
        (
            "train/tokens",
            "tokens",
            "response tokens of the groups that are trained on",
            "the normaliser under token_mean",
        ),
        (
            "value/loss",
            "",
            "mean of (V - target)^2 / 2; with baseline=value",
            "falls; a good critic is far below the variance of the returns",
        ),
    ),
    _section(
        "Two gradients",
        "Dense: imitation at every visited prefix. Sparse: returns, REINFORCE. At the logits, "
        "over the whole batch.",
        (
            "grad/dense_norm",
            "",
            "norm of the dense part of d loss / d logits",
            "falls as the student comes near its teacher",
        ),
        (
            "grad/sparse_norm",
            "",
            "norm of the sparse part",
            "0: nothing but imitation is learned, e.g. all rewards are equal",
        ),
        (
            "grad/dense_sparse_ratio",
            "",
            "dense_norm / sparse_norm",
            "far from 1: one term hardly counts; move algorithm.reward_weight",
        ),
        (
            "grad/logit_cosine",
            "",
            "cosine of both parts",
            "below 0: teacher and reward disagree on these responses",
        ),
        (
            "grad/dense_parameter_norm",
            "",
            "norm of the dense gradient at the parameters; every diagnostics.every steps",
            "ZeRO stages 1 and 2 only",
        ),
        (
            "grad/sparse_parameter_norm",
            "",
            "norm of the sparse gradient at the parameters; every diagnostics.every steps",
            "ZeRO stages 1 and 2 only",
        ),
        (
            "grad/cosine",
            "",
            "cosine of both at the parameters; every diagnostics.every steps",
            "below 0: the terms work against each other",
        ),
    ),
    _section(
        "Schedules",
        "The weights of this step.",
        (
            "schedule/lambda",
            "",
            "weight of the reward",
            "as algorithm.reward_weight says; under feedback it should settle",
        ),
        (
            "schedule/imitation",
            "",
            "sum of the teachers' weights",
            "as algorithm.imitation_weight and teachers.<name>.schedule say",
        ),
    ),
    _section(
        "Student and teacher",
        "p student, q teacher; means over response tokens. Those under teacher/ every "
        "diagnostics.every steps.",
        (
            "kl/token",
            "nats",
            "mean of sum_i w_i D_i(p, q_i), in the divergence and support that are trained; none "
            "with support=sampled",
            "falls towards 0, a perfect copy",
        ),
        (
            "kl/sequence",
            "nats",
            "the same, summed over each response, mean over responses",
            "as kl/token times the length",
        ),
        (
            "kl/sampled",
            "nats",
            "mean of sum_i w_i (log p(y) - log q_i(y)) at the tokens that the student drew",
            "agrees with a reverse kl/token within noise",
        ),
        (
            "kl/clipped_frac",
            "share",
            "drawn tokens whose |log p - log q| is beyond algorithm.log_ratio_clip",
            "a few %; more is a large bias",
        ),
        (
            "teacher/forward_kl",
            "nats",
            "mean of KL(q || p)",
            "rises while the reverse KL falls: the student drops modes of its teacher",
        ),
        (
            "teacher/top1_agree",
            "share",
            "mean of 1 where p and q have the same most likely token",
            "rises",
        ),
        (
            "teacher/overlap",
            "share",
            "mean of |top-16(p) and top-16(q)| / 16",
            "rises; low from the start: distillation on own samples learns little",
        ),
        ("teacher/overlap_mass_student", "share", "mass of p on that intersection", "0.97 to 0.99"),
        ("teacher/overlap_mass_teacher", "share", "mass of q on that intersection", "0.97 to 0.99"),
        (
            "teacher/overlap_advantage",
            "nats",
            "mean of sum pb (log qb - log pb), both renormalised on that intersection",
            "rises to 0",
        ),
        ("teacher/entropy", "nats", "mean of H(q)", "the level that entropy/token moves to"),
        ("teacher/entropy_gap", "nats", "mean of |H(q) - H(p)|", "falls to 0"),
    ),
    _section(
        "Entropy",
        "How undecided the student is.",
        (
            "entropy/token",
            "nats",
            "mean of H(p) over response tokens",
            "falls slowly; near 0 it always says the same, a rise without end is a collapse",
        ),
        (
            "entropy/token_q<quarter>",
            "nats",
            "the same in the first (q1) to last (q4) quarter of each response",
            "in a collapse q4 rises first",
        ),
    ),
    _section(
        "Advantages",
        "A = -(G minus its baseline), what multiplies grad log p(y); over response tokens. For "
        "pairs: minus the loss's slope.",
        ("advantage/mean", "", "mean of A", "near 0 with a baseline of the siblings"),
        (
            "advantage/std",
            "",
            "standard deviation of A",
            "0: the step teaches nothing; about 1 under scale=batch",
        ),
        ("advantage/min", "", "smallest A", "a few standard deviations"),
        ("advantage/max", "", "largest A", "a few standard deviations"),
        (
            "advantage/positive_frac",
            "share",
            "tokens with A > 0",
            "near 0: all that is learned is what not to say",
        ),
        (
            "advantage/abs_q<quarter>",
            "",
            "mean of |A| in the first (q1) to last (q4) quarter of each response",
            "equal, but for gamma > 0, where early tokens answer for more",
        ),
    ),
    _section(
        "Reward",
        "Of the responses that reward functions scored; nothing without such a function.",
        ("reward/mean", "", "mean of the weighted sum of all functions", "rises"),
        (
            "reward/stderr",
            "",
            "standard error of it over responses",
            "changes below twice this are noise",
        ),
        (
            "reward/<name>/mean",
            "",
            "mean of one function alone, unweighted",
            "shows which one is being gained",
        ),
        (
            "reward/error_rate",
            "share",
            "failed or timed-out calls",
            "0; above reward.max_error_rate the run stops",
        ),
        (
            "reward/pass_at_k",
            "share",
            "groups with a reward above 0.5 for any of their K responses",
            "falls while reward/mean rises: the student loses variety",
        ),
        (
            "reward/equal_groups_frac",
            "share",
            "groups whose K rewards are all equal",
            "near 1 nothing is left to compare: harder or easier prompts, or dynamic sampling",
        ),
    ),
    _section(
        "Held-out problems",
        "Every eval.every steps.",
        (
            "eval/accuracy",
            "share",
            "mean of the first reward function on held-out problems",
            "rises, towards the teacher's or above it",
        ),
        (
            "eval/accuracy_stderr",
            "share",
            "its standard error over problems",
            "changes below twice this are noise",
        ),
        (
            "eval/error_rate",
            "share",
            "responses without a value (failed, or None); not counted as wrong",
            "0",
        ),
        (
            "eval/loss",
            "",
            "pair/loss or train/loss on the held-out data's own responses; with data_fraction > 0",
            "falls; when it rises while the training loss falls, the student learns rows by heart",
        ),
        (
            "eval/kl_token",
            "nats",
            "kl/token on the held-out data's own responses",
            "falls towards 0",
        ),
        ("eval/pair_accuracy", "share", "pair/accuracy on held-out pairs", "rises from 0.5"),
        ("eval/pair_margin", "", "pair/margin on held-out pairs", "rises"),
        (
            "eval/accuracy_teacher/<name>",
            "share",
            "a teacher's accuracy on the same problems, in row 0",
            "the level to compare with",
        ),
    ),
    _section(
        "Responses",
        "All of a step's, whoever wrote them.",
        (
            "rollout/length_mean",
            "tokens",
            "mean length, end token included",
            "a steady rise to the limit is a reward of length, or a loop",
        ),
        (
            "rollout/length_p95",
            "tokens",
            "95th percentile of the length",
            "below rollout.max_new_tokens",
        ),
        ("rollout/length_max", "tokens", "longest response", "at most rollout.max_new_tokens"),
        (
            "rollout/truncated_frac",
            "share",
            "cut at rollout.max_new_tokens",
            "near 0; what is cut has no answer to reward",
        ),
        (
            "rollout/eos_frac",
            "share",
            "ended by the end token",
            "near 1; the rest was cut or aborted",
        ),
        (
            "rollout/compressed",
            "share",
            "mean of bytes of the text after zlib over before",
            "a sudden fall: loops; short texts exceed 1 by zlib's header",
        ),
        (
            "rollout/repeated",
            "share",
            "mean share of a response's 4-grams of tokens that it had before",
            "near 0; a rise: loops",
        ),
    ),
    _section(
        "Sampler against learner",
        "rho = p(y) / mu(y), learner over sampler, at the drawn tokens; data has no sampler and "
        "does not count.",
        (
            "policy/logprob_gap",
            "nats",
            "mean of |log p(y) - log mu(y)| of responses that the student sampled with the "
            "weights that learn",
            "1e-6 in fp32, up to 0.05 in bf16; above rollout.max_logprob_gap the run stops",
        ),
        (
            "policy/probe_gap",
            "nats",
            "the same of a few tokens that each engine samples right after a sync, of the worst "
            "engine",
            "as policy/logprob_gap; above rollout.max_logprob_gap the run stops before it learns "
            "from that engine",
        ),
        (
            "policy/logprob_gap_max",
            "nats",
            "largest |log p(y) - log mu(y)| there",
            "far above the mean: single tokens disagree, look at model.dtype",
        ),
        (
            "policy/kl_sampler",
            "nats",
            "mean of rho - 1 - log rho where the student sampled, an estimate (k3) of KL(mu || p)",
            "near 0; more: correct by algorithm.ratio",
        ),
        ("policy/rho_mean", "", "mean of rho", "1"),
        (
            "policy/rho_max",
            "",
            "largest rho",
            "near 1 with fresh weights; outliers are single tokens in bf16",
        ),
        (
            "policy/ess",
            "share",
            "(sum rho)^2 / (n sum rho^2)",
            "near 1; 0.5 means that half of the samples count",
        ),
        (
            "policy/bounded_frac",
            "share",
            "tokens at a bound of algorithm.ratio, or masked by it",
            "small; more: smaller steps or fresher samples",
        ),
        (
            "policy/kept_frac",
            "share",
            "tokens with a weight above 0, of train/tokens",
            "1, less what whole-sequence ratios mask and what pairs leave out",
        ),
        (
            "policy/staleness_mean",
            "versions",
            "weight versions between sampling and learning, mean over tokens",
            "0 in the synchronous schedule",
        ),
        (
            "policy/staleness_max",
            "versions",
            "the same of the oldest token",
            "0 in the synchronous schedule",
        ),
    ),
    _section(
        "Pairs",
        "With algorithm.pair.loss. s_w, s_l: the scores of the chosen and the rejected response, "
        "log p - log q, log p without a reference, or the reward model's value; per token with "
        "algorithm.pair.average.",
        ("pair/loss", "", "mean of the pair loss itself", "falls; train/loss is a surrogate here"),
        ("pair/accuracy", "share", "pairs with s_w > s_l; a tie counts half", "rises from 0.5"),
        ("pair/margin", "", "mean of s_w - s_l", "rises"),
        (
            "pair/chosen_score",
            "",
            "mean of s_w",
            "falls well below 0: the student unlearns good responses too",
        ),
        ("pair/rejected_score", "", "mean of s_l", "falls"),
        (
            "pair/score_max",
            "",
            "largest |s_w| or |s_l|",
            "below 20; above it a DIL loss goes on as a straight line",
        ),
        ("pair/clamped_frac", "share", "pairs with a score above that clamp", "0"),
        (
            "pair/rejected_ratio",
            "",
            "mean of exp(s_l), an estimate of E_ref[p/q]",
            "near 1 if rejected responses follow the reference",
        ),
        (
            "pair/chosen_logprob",
            "nats",
            "mean of log p per token of chosen responses",
            "not falling",
        ),
        (
            "pair/rejected_logprob",
            "nats",
            "mean of log p per token of rejected responses",
            "falls, slowly",
        ),
    ),
    _section(
        "Time and bytes",
        "The controller's clock and what it knows of the transfers.",
        ("perf/tokens_per_s", "tokens/s", "response tokens of a step over its wall time", "steady"),
        ("time/step_s", "s", "wall time of a step, without evaluation and checkpoint", "steady"),
        (
            "time/<phase>_s",
            "s",
            "wall time that the controller waited in a phase; scoring overlaps with rollout, sync "
            "holds probe",
            "the largest is the bottleneck",
        ),
        (
            "time/response_s_p50",
            "s",
            "from its order's arrival to a response's end, engines' clocks: median",
            "near p95: no stragglers",
        ),
        (
            "time/response_s_p95",
            "s",
            "the same, 95th percentile",
            "far above the median: a long tail; see rollout.oversample",
        ),
        ("time/response_s_max", "s", "the same, the last response", "what a step waits for"),
        (
            "time/scorers_busy_s",
            "s",
            "sum over the scorers' calls, by their own clocks",
            "above time/score_s: scoring overlapped with sampling or learning",
        ),
        (
            "time/learner_busy_s",
            "s",
            "the update, by the learner's own clock",
            "below time/learn_s by what fetching the batch took",
        ),
        (
            "perf/weights_gb_per_s",
            "GB/s",
            "bytes of weights over the time of the sync",
            "grows with the model towards memory speed",
        ),
        (
            "rollout/late_frac",
            "share",
            "drawn prompt groups cancelled under rollout.oversample or too old under "
            "pipeline.on_stale=drop",
            "0 otherwise; their prompts come again",
        ),
        (
            "transfer/bytes_rollout",
            "bytes",
            "rollouts in the object store",
            "grows with the responses",
        ),
        (
            "transfer/bytes_scores",
            "bytes",
            "scores in the object store",
            "2 H a token per teacher with teacher_signal=hidden in bf16",
        ),
        (
            "transfer/bytes_weights",
            "bytes",
            "weights sent to each engine",
            "the model's size; by nccl or ipc a tied head goes twice",
        ),
        (
            "transfer/token_bytes/<signal>",
            "bytes",
            "per token: of rollouts over all tokens, of a teacher's signal over response tokens",
            "rollout 13 and 4 per support token; teacher_hidden 2 H in bf16; teacher_support 8 K",
        ),
        (
            "transfer/inflight_bytes",
            "bytes",
            "what the steps ahead take of the object store, by the size of this one",
            "0 unless pipeline.ahead; at most pipeline.max_inflight_bytes",
        ),
        (
            "cluster/restarts",
            "",
            "workers but the learner's that were lost and replaced since the command was given",
            "0",
        ),
        (
            "controller/materialized_bytes",
            "bytes",
            "per-token data that the controller itself fetched",
            "0, always",
        ),
    ),
)

HEAD = """# Metrics

Every key of metrics.jsonl, generated by `python -m hybridrl.tracking.glossary`. Means are over response tokens of the global
batch with a weight above 0, and exact: the ranks add up sums in float64. A key is absent where there was nothing to measure.
m is a token's weight, y the drawn token, G the return, w_i and D_i teacher i's weight and divergence.
"""


TABLE = "| metric | unit | formula | healthy, or what it tells |\n|---|---|---|---|"


def explain(key: str) -> Metric | None:
    """The metric of a row's key, the most particular one; None: unknown."""
    found = [metric for section in SECTIONS for metric in section.metrics if metric.covers(key)]
    return min(found, key=lambda metric: metric.key.count("<"), default=None)


def page() -> str:
    """METRICS.md."""
    parts = [HEAD]
    for section in SECTIONS:
        rows = "\n".join(" | ".join(_cells(m)).join(("| ", " |")) for m in section.metrics)
        parts.append(f"## {section.title}\n\n{section.text}\n\n{TABLE}\n{rows}\n")
    return "\n".join(parts)


def _cells(metric: Metric) -> list[str]:
    return [
        f"`{metric.key}`",
        *(cell.replace("|", "\\|") for cell in (metric.unit, metric.formula, metric.reading)),
    ]


if __name__ == "__main__":
    print(page(), end="")
