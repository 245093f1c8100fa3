"""The meaning of the metrics of workers, times and bytes; glossary.py combines all metrics."""

from hybridrl.tracking.metric import section

OF_THE_MACHINE = ("time/", "perf/", "memory/", "engine/")
"""Prefixes of the metrics that differ between two equal runs, because they depend on the machine
and its load.
"""

OF_WORKERS = (
    section(
        "Engines",
        "What the engines of vLLM report of the responses of a step, or of their scores: "
        "<workers> are those with this name in logs/, rollout for the student's, teacher for those "
        "that sample from a teacher, scorer-NAME for those that score. The largest values are of "
        "one engine after one of its steps. Evaluations are not counted.",
        (
            "engine/<workers>/kv_use",
            "share",
            "largest share of the KV cache in use",
            "well below 1; far below it, rollout.max_num_seqs may be larger. Requests that end in "
            "the step have left it, so an engine that scores in single steps has 0",
        ),
        (
            "engine/<workers>/running",
            "",
            "most requests in one step of an engine",
            "rollout.max_num_seqs where there are enough of them",
        ),
        (
            "engine/<workers>/waiting",
            "",
            "most requests that waited for a place",
            "0 where rollout.max_num_seqs holds all of them; others start as places become free",
        ),
        (
            "engine/<workers>/preemptions",
            "",
            "requests that lost their place because the KV cache was full, and are computed again; "
            "sum over the engines",
            "0; otherwise lower rollout.max_num_seqs, or raise rollout.kv_cache_bytes or "
            "rollout.gpu_memory_utilization",
        ),
        (
            "engine/<workers>/prefix_hit_rate",
            "share",
            "tokens of prompts that were found in the prefix cache, over those that were looked up",
            "with K responses to prompts of many blocks it approaches (K-1)/K; prompts shorter "
            "than a block have none",
        ),
    ),
    section(
        "Time and bytes",
        "Times are measured by the controller, unless stated otherwise; bytes are those of a step.",
        ("perf/tokens_per_s", "tokens/s", "response tokens of a step over its wall time", "steady"),
        ("time/step_s", "s", "wall time of a step, without evaluation and checkpoint", "steady"),
        (
            "time/<phase>_s",
            "s",
            "wall time that the controller waited in a phase; scoring overlaps with rollout, and "
            "sync includes probe; turn, a part of the others, is the time in which engines and "
            "learner freed memory for each other (cluster.take_turns)",
            "the largest is the bottleneck",
        ),
        (
            "time/checkpoint_s",
            "s",
            "time from the beginning of a checkpoint until it was committed, in the row of the "
            "next step; time/save_s is the part that held the run",
            "far below the time between two checkpoints",
        ),
        (
            "time/response_s_p50",
            "s",
            "time from the arrival of a request to the end of a response, by the engines' clocks; "
            "median",
            "if it is near p95, there are no stragglers",
        ),
        (
            "time/response_s_p95",
            "s",
            "the same, 95th percentile",
            "if it is far above the median, a few responses delay the step; see rollout.oversample",
        ),
        ("time/response_s_max", "s", "the same, slowest response", "what a step waits for"),
        (
            "time/scorers_busy_s",
            "s",
            "sum over the calls of the scorers, by their own clocks",
            "if it is above time/score_s, scoring overlapped with sampling or learning",
        ),
        (
            "time/learner_busy_s",
            "s",
            "duration of the update, by the learner's own clock",
            "below time/learn_s by the time for fetching the batch",
        ),
        (
            "perf/<workers>/tokens_per_s_mean",
            "tokens/s",
            "tokens of a worker over the seconds in which it was busy, by its own clock; mean over "
            "the workers with this name in logs/: response tokens, of a scorer all tokens of the "
            "sequences",
            "the slowest kind of worker limits the step; waiting is not included",
        ),
        (
            "perf/<workers>/tokens_per_s_min",
            "tokens/s",
            "the same, of the slowest of these workers",
            "near the mean; far below it, one worker has a slower machine or shares it",
        ),
        (
            "memory/<workers>/<phase>_bytes",
            "bytes",
            "largest memory of one of these workers in a phase: on a GPU that of torch's "
            "allocator, elsewhere resident memory, which counts shared pages too. The "
            "value for sync is of the sync before the step. Not measured: reward workers, whose "
            "functions run in separate processes, and engines over several GPUs",
            "below what the device has; see hybridrl plan",
        ),
        (
            "perf/weights_gb_per_s",
            "GB/s",
            "bytes of weights over the duration of the sync",
            "grows with the model towards the memory bandwidth",
        ),
        (
            "rollout/late_frac",
            "share",
            "prompt groups that were cancelled by rollout.oversample, or dropped as too old by "
            "pipeline.on_stale=drop",
            "0 without these settings; the prompts are drawn again",
        ),
        (
            "transfer/bytes_rollout",
            "bytes",
            "rollouts in the object store",
            "grows with the length of the responses",
        ),
        (
            "transfer/bytes_scores",
            "bytes",
            "scores in the object store",
            "2 H per token and teacher with teacher_signal=hidden in bf16",
        ),
        (
            "transfer/bytes_weights",
            "bytes",
            "weights sent to each engine",
            "the size of the model; with nccl or ipc a tied head is sent twice",
        ),
        (
            "transfer/token_bytes/<signal>",
            "bytes",
            "bytes per token: of rollouts per token of a sequence, of a teacher's signal per "
            "response token",
            "rollout: 13, and 4 per support token; teacher_hidden: 2 H in bf16; teacher_support: "
            "8 K",
        ),
        (
            "transfer/inflight_bytes",
            "bytes",
            "estimate of the object store's bytes that steps sampled ahead take, by the size of "
            "this step",
            "0 without pipeline.ahead; at most pipeline.max_inflight_bytes",
        ),
        (
            "cluster/restarts",
            "",
            "workers, other than learner ranks, that failed and were replaced since the start of "
            "the command",
            "0",
        ),
        (
            "controller/materialized_bytes",
            "bytes",
            "per-token data that the controller itself fetched",
            "always 0",
        ),
    ),
)
