"""The meaning of the metrics of evaluations; glossary.py combines all metrics."""

from hybridrl.tracking.metric import section

HELD_OUT = (
    section(
        "Held-out problems",
        "Measured every eval.every steps.",
        (
            "eval/accuracy",
            "share",
            "mean of the first reward function on held-out problems; with routes, of the first "
            "that takes the problem",
            "rises, towards the teacher's or above it",
        ),
        (
            "eval/accuracy_stderr",
            "share",
            "its standard error over problems",
            "changes below twice this are noise",
        ),
        (
            "eval/accuracy_source/<name>",
            "share",
            "eval/accuracy of the held-out problems of one of data.sources alone",
            "shows which of them improves",
        ),
        (
            "eval/error_rate",
            "share",
            "responses without a reward (failed, or None); they do not count as wrong",
            "0",
        ),
        (
            "eval/loss",
            "",
            "pair/loss or train/loss on the held-out data's own responses; with data_fraction > 0",
            "falls; if it rises while the training loss falls, the student memorises the data",
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
    section(
        "Held-out sets",
        "For each eval.sets.NAME, measured with the held-out problems. Metrics of responses need "
        "a reward function; metrics of the data need algorithm.data_fraction > 0 and rows with "
        "responses.",
        (
            "eval/<set>/accuracy",
            "share",
            "avg@k: mean over problems of the mean reward of their k = samples responses",
            "rises",
        ),
        (
            "eval/<set>/accuracy_stderr",
            "share",
            "its standard error over problems, whose k responses count as one value",
            "changes below twice this are noise; more problems lower it more than more samples",
        ),
        (
            "eval/<set>/pass_at_<k>",
            "share",
            "mean over problems of 1 - C(n - c, k) / C(n, k), with c of n responses above 0.5 "
            "(arXiv 2107.03374); for k = 1, 2, 4, ... and n",
            "if it falls while accuracy rises, the student loses variety",
        ),
        (
            "eval/<set>/error_rate",
            "share",
            "responses without a reward (failed, or None); they do not count as wrong",
            "0",
        ),
        ("eval/<set>/length_mean", "tokens", "mean length, end token included", "steady"),
        (
            "eval/<set>/truncated_frac",
            "share",
            "responses cut off at rollout.max_new_tokens",
            "near 0; a response that is cut off has no answer to reward",
        ),
        (
            "eval/<set>/loss",
            "",
            "eval/loss on the responses of the rows of the set",
            "falls; if it rises while the training loss falls, the student memorises the data",
        ),
        (
            "eval/<set>/kl_token",
            "nats",
            "eval/kl_token on the responses of the rows of the set",
            "falls towards 0",
        ),
        (
            "eval/<set>/pair_accuracy",
            "share",
            "ranking accuracy: pair/accuracy on the pairs of the set",
            "rises from 0.5",
        ),
        ("eval/<set>/pair_margin", "", "pair/margin on the pairs of the set", "rises"),
    ),
)
