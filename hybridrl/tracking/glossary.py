"""The meaning of every metric, from which metrics_page.py generates METRICS.md."""

from hybridrl.tracking.held_out_metrics import HELD_OUT
from hybridrl.tracking.machine_metrics import OF_WORKERS
from hybridrl.tracking.metric import Metric, section

SECTIONS = (
    section(
        "Training",
        "A step is a batch. If it has several updates (train.updates_per_batch, "
        "train.epochs_per_batch), the learner's metrics cover all of them: means and shares are "
        "over the tokens of all updates, so that a token of two epochs counts twice, and maxima "
        "are the largest; train/loss and train/grad_norm are means over the updates, and the other "
        "norms of gradients are root mean squares. An update that was left out is not counted.",
        (
            "train/step",
            "",
            "batches learned from",
            "the row of step 0 is the evaluation before training",
        ),
        (
            "train/updates",
            "",
            "optimizer updates of the step",
            "train.updates_per_batch * train.epochs_per_batch; less where updates were left out "
            "because their gradient was not finite, or where there were fewer groups than updates",
        ),
        (
            "train/loss",
            "",
            "sum of m (sum_i w_i D_i + G f(rho) log p(y))",
            "only its gradient is that of the objective J; its value need not fall",
        ),
        (
            "nll/token",
            "nats",
            "mean of -log p(y) over the tokens that the data or a teacher wrote",
            "falls; this is the loss of supervised fine-tuning",
        ),
        (
            "train/grad_norm",
            "",
            "norm of the gradient at the parameters, before clipping",
            "steady; a spike is a bad batch, which train.grad_clip limits",
        ),
        ("train/lr", "", "learning rate of the step", "as set by train.lr, its warm-up and lr_end"),
        (
            "train/tokens",
            "tokens",
            "response tokens of the groups that are trained on in the step",
            "the divisor of the loss under algorithm.normalizer=token_mean",
        ),
        (
            "value/loss",
            "",
            "mean of (V - target)^2 / 2; only with baseline=value",
            "falls; that of a good critic is far below the variance of the returns",
        ),
    ),
    section(
        "Two gradients",
        "The dense part is that of the imitation at every visited prefix, the sparse part that of "
        "the returns (REINFORCE). Unless stated otherwise, gradients are those at the logits, over "
        "the whole batch.",
        (
            "grad/dense_norm",
            "",
            "norm of the dense part of d loss / d logits",
            "falls as the student approaches its teacher",
        ),
        (
            "grad/sparse_norm",
            "",
            "norm of the sparse part",
            "0 means that only imitation is learned, e.g. because all rewards are equal",
        ),
        (
            "grad/dense_sparse_ratio",
            "",
            "dense_norm / sparse_norm",
            "far from 1, one of the parts has little effect; change algorithm.reward_weight",
        ),
        (
            "grad/logit_cosine",
            "",
            "cosine of the angle between both parts",
            "below 0, teacher and reward disagree on these responses",
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
            "cosine of the angle between both at the parameters; every diagnostics.every steps",
            "below 0, the parts oppose each other",
        ),
    ),
    section(
        "Schedules",
        "The weights of the two goals, imitation and reward, in the step.",
        (
            "schedule/lambda",
            "",
            "weight of the reward",
            "follows algorithm.reward_weight; with kind=feedback it should settle",
        ),
        (
            "schedule/imitation",
            "",
            "sum of the teachers' weights",
            "follows algorithm.imitation_weight and teachers.<name>.schedule",
        ),
    ),
    section(
        "Student and teacher",
        "p is the student's distribution, q the teacher's; means over response tokens. The metrics "
        "under teacher/ are computed every diagnostics.every steps.",
        (
            "kl/token",
            "nats",
            "mean of sum_i w_i D_i(p, q_i) / sum_i w_i, with the divergence and support that are "
            "trained; absent with support=sampled",
            "falls towards 0, which is a perfect copy",
        ),
        (
            "kl/sequence",
            "nats",
            "the same, summed over each response; mean over those with a teacher",
            "like kl/token times the length",
        ),
        (
            "kl/sampled",
            "nats",
            "mean of sum_i w_i (log p(y) - log q_i(y)) / sum_i w_i at the tokens that the student "
            "sampled",
            "equals a reverse kl/token up to noise",
        ),
        (
            "kl/clipped_frac",
            "share",
            "sampled tokens whose |log p - log q| exceeds algorithm.log_ratio_clip",
            "a few %; more means a large bias",
        ),
        (
            "teacher/forward_kl",
            "nats",
            "mean of KL(q || p)",
            "if it rises while the reverse KL falls, the student drops modes of its teacher",
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
            "rises; if it is low from the start, the student learns little from its own samples",
        ),
        ("teacher/overlap_mass_student", "share", "mass of p on that intersection", "0.97 to 0.99"),
        ("teacher/overlap_mass_teacher", "share", "mass of q on that intersection", "0.97 to 0.99"),
        (
            "teacher/overlap_advantage",
            "nats",
            "mean of sum pb (log qb - log pb); pb and qb are p and q, renormalised on that "
            "intersection",
            "rises to 0",
        ),
        ("teacher/entropy", "nats", "mean of H(q)", "the level that entropy/token moves towards"),
        ("teacher/entropy_gap", "nats", "mean of |H(q) - H(p)|", "falls to 0"),
    ),
    section(
        "Entropy",
        "The student's uncertainty about the next token.",
        (
            "entropy/token",
            "nats",
            "mean of H(p) over response tokens",
            "falls slowly; near 0 the student always writes the same response; a rise without end "
            "is a collapse",
        ),
        (
            "entropy/token_q<quarter>",
            "nats",
            "the same in the first (q1) to last (q4) quarter of each response",
            "in a collapse q4 rises first",
        ),
    ),
    section(
        "Advantages",
        "A = -(G minus its baseline) is the factor of grad log p(y), measured over response "
        "tokens. For pairs, A is minus the derivative of the loss with respect to the token's "
        "log-prob.",
        ("advantage/mean", "", "mean of A", "near 0 with a baseline from the same group"),
        (
            "advantage/std",
            "",
            "standard deviation of A",
            "0: nothing is learned from returns; about 1 with scale=batch",
        ),
        ("advantage/min", "", "smallest A", "a few standard deviations"),
        ("advantage/max", "", "largest A", "a few standard deviations"),
        (
            "advantage/positive_frac",
            "share",
            "tokens with A > 0",
            "near 0, the student learns only which tokens to avoid",
        ),
        (
            "advantage/abs_q<quarter>",
            "",
            "mean of |A| in the first (q1) to last (q4) quarter of each response",
            "equal; with gamma > 0 it is larger for early tokens, which more costs follow",
        ),
    ),
    section(
        "Reward",
        "Over the responses that reward functions scored; absent without such a function.",
        ("reward/mean", "", "mean of the weighted sum of all functions", "rises"),
        (
            "reward/stderr",
            "",
            "its standard error over responses",
            "changes below twice this are noise",
        ),
        (
            "reward/<name>/mean",
            "",
            "mean of one function alone, unweighted",
            "shows which of them improves",
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
            "if it falls while reward/mean rises, the student loses variety",
        ),
        (
            "reward/equal_groups_frac",
            "share",
            "groups whose K rewards are all equal",
            "near 1 there is nothing to learn from; use harder or easier prompts, or "
            "algorithm.dynamic_sampling",
        ),
    ),
    section(
        "Data sources",
        "For each of data.sources, by its name; absent with a single source.",
        (
            "data/<name>/share",
            "share",
            "prompts of the step that are of this source",
            "its weight over the sum of all weights, as exactly as whole prompts can have it",
        ),
        (
            "data/<name>/epochs",
            "",
            "its prompts that were drawn so far, over all that it has",
            "much above that of the others, a small source is repeated; lower its weight",
        ),
        (
            "data/<name>/reward_mean",
            "",
            "reward/mean of the responses to its prompts",
            "rises",
        ),
        (
            "data/<name>/length_mean",
            "tokens",
            "mean length of the responses to its prompts",
            "as rollout/length_mean",
        ),
        (
            "data/<name>/truncated_frac",
            "share",
            "responses to its prompts that were cut off at rollout.max_new_tokens",
            "near 0",
        ),
    ),
    *HELD_OUT,
    section(
        "Responses",
        "Over all responses of a step, sampled or from the data.",
        (
            "rollout/length_mean",
            "tokens",
            "mean length, end token included",
            "if it rises steadily to the limit, the reward favours length, or the student repeats "
            "itself",
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
            "responses cut off at rollout.max_new_tokens",
            "near 0; a response that is cut off has no answer to reward",
        ),
        (
            "rollout/eos_frac",
            "share",
            "responses that ended with the end token",
            "near 1; the others were cut off or aborted",
        ),
        (
            "rollout/compressed",
            "share",
            "mean of the size of a text after compression by zlib, over its size before",
            "a sudden fall shows repetition; short texts exceed 1 because of zlib's header",
        ),
        (
            "rollout/repeated",
            "share",
            "mean share of the 4-grams of tokens in a response that occurred in it before",
            "near 0; a rise shows repetition",
        ),
    ),
    section(
        "Sampler against learner",
        "rho = p(y) / mu(y), the learner's probability over the sampler's, at the sampled tokens; "
        "responses from the data have no sampler and do not count.",
        (
            "policy/logprob_gap",
            "nats",
            "mean of |log p(y) - log mu(y)| of responses that the student sampled with the "
            "weights that are trained; of the first update of the step",
            "1e-6 in fp32, up to 0.05 in bf16; above rollout.max_logprob_gap the run stops",
        ),
        (
            "policy/probe_gap",
            "nats",
            "the same over up to 32 tokens that each engine samples right after a sync; the "
            "largest of the engines",
            "like policy/logprob_gap; above rollout.max_logprob_gap the run stops before it learns "
            "from that engine",
        ),
        (
            "policy/logprob_gap_max",
            "nats",
            "largest |log p(y) - log mu(y)| of these tokens",
            "if it is far above the mean, single tokens disagree; see model.dtype",
        ),
        (
            "policy/kl_sampler",
            "nats",
            "mean of rho - 1 - log rho where the student sampled, an estimate (k3) of KL(mu || p)",
            "near 0; if larger, correct for it by algorithm.ratio",
        ),
        (
            "policy/kl_old",
            "nats",
            "mean of r - 1 - log r with r = p(y) / p_old(y), an estimate (k3) of KL(p_old || p), "
            "where p_old is the learner before the first update of the step; only with several "
            "updates and algorithm.ratio.kind=clip",
            "0.001 to 0.02; if it rises, take fewer updates or a smaller train.lr",
        ),
        ("policy/rho_mean", "", "mean of rho", "1"),
        (
            "policy/rho_max",
            "",
            "largest rho",
            "near 1 with current weights; outliers are single tokens in bf16",
        ),
        (
            "policy/ess",
            "share",
            "(sum rho)^2 / (n sum rho^2)",
            "near 1; at 0.5 the gradient is as noisy as with half of the samples",
        ),
        (
            "policy/bounded_frac",
            "share",
            "tokens at a bound of algorithm.ratio, or masked by it",
            "small; if larger, take smaller steps or fresher samples",
        ),
        (
            "policy/kept_frac",
            "share",
            "share of train/tokens whose weight is above 0",
            "1, minus the share of tokens that sequence ratios mask or that are in no pair",
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
            "the same, of the oldest token",
            "0 in the synchronous schedule",
        ),
    ),
    section(
        "Pairs",
        "Present with algorithm.pair.loss. s_w and s_l are the scores of the chosen and the "
        "rejected response: log p - log q, or log p without a reference, or the reward model's "
        "value; per token with algorithm.pair.average.",
        ("pair/loss", "", "mean of the pair loss itself", "falls; train/loss is a surrogate here"),
        ("pair/accuracy", "share", "pairs with s_w > s_l; a tie counts half", "rises from 0.5"),
        ("pair/margin", "", "mean of s_w - s_l", "rises"),
        (
            "pair/chosen_score",
            "",
            "mean of s_w",
            "if it is well below 0, the student unlearns good responses too",
        ),
        ("pair/rejected_score", "", "mean of s_l", "falls"),
        (
            "pair/score_max",
            "",
            "largest |s_w| or |s_l|",
            "below 20; above it a DIL loss is continued as a straight line (algorithm.pair.clamp)",
        ),
        ("pair/clamped_frac", "share", "pairs with a score above algorithm.pair.clamp", "0"),
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
            "does not fall",
        ),
        (
            "pair/rejected_logprob",
            "nats",
            "mean of log p per token of rejected responses",
            "falls, slowly",
        ),
    ),
    *OF_WORKERS,
)


def explain(key: str) -> Metric | None:
    """The most specific entry for a key of a row; None: the key is unknown."""
    matches = [metric for part in SECTIONS for metric in part.metrics if metric.covers(key)]
    return min(matches, key=lambda metric: metric.key.count("<"), default=None)
