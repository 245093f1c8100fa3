"""E3: the gradient of a divergence on K tokens against that over the whole vocabulary."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from matplotlib.axes import Axes
from torch import Tensor

from hybridrl.data.countdown_puzzles import Countdown
from hybridrl.models.loading import load_model, load_tokenizer
from hybridrl.ops.divergence import Measure, dense, dense_on_support, tail_score
from hybridrl.settings.choices import Correction
from reproduction.curves import draw_mean
from reproduction.differences import values
from reproduction.estimate import estimate
from reproduction.experiment import Arm, Experiment, Judgement, Numbers, Runs, Setting, Verdict
from reproduction.lab import Lab

TASKS = ("countdown", "smollm2")
SIZES = {"countdown": (1, 2, 4, 8, 16), "smollm2": (1, 4, 16, 64, 128, 512)}
SOURCES = ("student", "teacher")
QUESTIONS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse.",
    "How do I make bread at home?",
    "Explain what a prime number is.",
    "What is the capital of France, and why is it known?",
    "Give me three tips for learning a language.",
    "Describe how a bicycle stays upright.",
    "What happens when water boils?",
)


@lru_cache(maxsize=4)  # the seeds of a task
def distributions(task: str, seed: int, prompts: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the student samples: log-probs of student and teacher [R, V], and the tokens [R].

    The student of smollm2 is the teacher with noise of a tenth of its spread on each matrix of the
    decoder layers; those of countdown are the two shipped models.
    """
    torch.manual_seed(seed)
    if task == "countdown":
        student = load_model("builtin:countdown-student", dtype="float32", setting="student")
        teacher = load_model("builtin:countdown-teacher", dtype="float32", setting="teacher")
        tokenizer = load_tokenizer("builtin:countdown-student")
        texts = [puzzle.prompt for puzzle in Countdown().heldout(prompts)]
    else:
        name = "builtin:smollm2-135m-instruct"
        student = load_model(name, dtype="float32", setting="student")
        teacher = load_model(name, dtype="float32", setting="teacher")
        tokenizer = load_tokenizer(name)
        for layer in student.model.layers:
            for weight in layer.parameters():
                if weight.ndim == 2:
                    weight.data += 0.1 * weight.std() * torch.randn_like(weight)
        texts = [
            str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}],
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
            for question in QUESTIONS[:prompts]
        ]
    logps, logqs, drawn = [], [], []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            whole = student.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                pad_token_id=tokenizer.eos_token_id,
            )
            at = slice(ids.shape[1] - 1, whole.shape[1] - 1)
            logps.append(torch.log_softmax(student(whole).logits[0, at].double(), -1))
            logqs.append(torch.log_softmax(teacher(whole).logits[0, at].double(), -1))
        drawn.append(whole[0, ids.shape[1] :])
    return torch.cat(logps), torch.cat(logqs), torch.cat(drawn)


def measure(settings: Mapping[str, Setting], seed: int, _lab: Lab) -> Numbers:
    """For each K: cosine and ratio of norms of the gradients at the logits of all tokens together,
    and the mass that student and teacher have on the K tokens.
    """
    logp, logq, drawn = distributions(
        str(settings["task"]), seed, int(settings["prompts"]), int(settings["tokens"])
    )
    of_measure = Measure()
    value, whole = dense(logp, logq, of_measure)
    correction = Correction(str(settings["correction"]))
    numbers = {"divergence": value.mean().item(), "tokens": float(len(logp))}
    ranked = logp if settings["source"] == "student" else logq
    for k in SIZES[str(settings["task"])]:
        ids = ranked.topk(k, dim=-1).indices
        _, gradient = dense_on_support(logp, ids, logq.gather(-1, ids), of_measure, correction)
        if correction is Correction.unbiased:
            at = drawn[:, None]
            cost = tail_score(
                logp.gather(1, at).squeeze(1),
                logq.gather(1, at).squeeze(1),
                (ids == at).any(-1),
                of_measure,
            )
            score = -logp.exp()
            score.scatter_add_(1, at, torch.ones_like(at, dtype=score.dtype))
            gradient = gradient + cost[:, None] * score
        product = float((gradient * whole).sum())
        norm = float(gradient.norm())
        numbers[f"cosine_{k}"] = product / (norm * float(whole.norm())) if norm > 1e-12 else 0.0
        numbers[f"norm_{k}"] = norm / float(whole.norm())
        numbers[f"student_mass_{k}"] = logp.gather(-1, ids).exp().sum(-1).mean().item()
        numbers[f"teacher_mass_{k}"] = logq.gather(-1, ids).exp().sum(-1).mean().item()
    return numbers


def name_of(task: str, source: str, correction: str) -> str:
    return f"{task}, {source}'s K, {correction}"


def arm(task: str, source: str, correction: Correction) -> Arm:
    settings = {
        "task": task,
        "source": source,
        "correction": str(correction),
        "prompts": 128 if task == "countdown" else len(QUESTIONS),
        "tokens": 16 if task == "countdown" else 64,
    }
    return Arm(
        name=name_of(task, source, str(correction)),
        settings=settings,
        small={"prompts": 1, "tokens": 4},
        measure=measure,
    )


def judge(runs: Runs) -> Judgement:
    def of(correction: str, number: str) -> Sequence[float]:
        return values(runs, name_of("smollm2", "student", correction), number)

    cosine = estimate(of("renormalize", "cosine_16"))
    lost = {
        correction: estimate([abs(1 - norm) for norm in of(correction, "norm_16")])
        for correction in ("renormalize", "tail_bucket")
    }
    better = lost["tail_bucket"].mean <= lost["renormalize"].mean
    single = max(of("renormalize", "norm_1"))
    parts = (cosine.low >= 0.98, better, single < 1e-9)
    verdict = Verdict.undecided
    if all(parts):
        verdict = Verdict.confirmed
    elif cosine.high < 0.98 or not better:
        verdict = Verdict.refuted
    large = estimate(of("renormalize", "cosine_512"))
    bucket = estimate(of("tail_bucket", "cosine_16"))
    return Judgement(
        verdict=verdict,
        effect=f"cosine at K=16, renormalised, of 49152 tokens: {cosine.text()}",
        reason=f"With the tail as one bucket it is {bucket.text()}; renormalised with K=512 "
        f"{large.text()}. The norm differs from the whole gradient's by "
        f"{lost['renormalize'].text(100, 1)} % renormalised and by "
        f"{lost['tail_bucket'].text(100, 1)} % with the bucket, at K=16. Renormalised with K=1 the "
        f"gradient is {single:.1g}.",
    )


def draw(axes: Axes, runs: Runs) -> None:
    shades = {
        Correction.unbiased: "#009E73",
        Correction.truncate: "#E69F00",
        Correction.tail_bucket: "#0072B2",
        Correction.renormalize: "#D55E00",
    }
    sizes = SIZES["smollm2"]
    for correction, colour in shades.items():
        for source, style in (("student", "o-"), ("teacher", "s--")):
            of = runs[name_of("smollm2", source, str(correction))]
            curves = [[run.numbers[f"cosine_{k}"] for k in sizes] for run in of]
            for curve in curves:
                axes.plot(sizes, curve, color=colour, alpha=0.2, linewidth=0.7)
            label = f"{correction}, {source}'s K"
            draw_mean(axes, sizes, curves, colour=colour, label=label, style=style)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("K of 49152 tokens")
    axes.set_ylabel("cosine with the whole gradient")
    axes.legend(frameon=False, fontsize=8)


EXPERIMENT = Experiment(
    id="E3",
    title="Top-K support: gradient against the whole vocabulary",
    claim="A few of the most likely tokens carry the gradient of the divergence: at K=16, "
    "renormalised, it has a cosine of at least 0.98 with the whole one; a bucket for the other "
    "tokens keeps its norm better; renormalised with K=1 nothing is learned.",
    source="arXiv 2512.23097, top-K approximation; the paper measures nothing",
    design="Reverse KL at the positions of responses that the student samples: 128 problems of "
    "Countdown with the two shipped models (23 tokens), and 8 questions x 64 tokens to "
    "SmolLM2-135M-Instruct (49152 tokens), whose student is the same model with noise of 0.1 times "
    "the spread of each matrix of its layers. The gradients are at the logits, of all tokens "
    "together, by the product's functions in float64; `truncate` leaves all but the K tokens out, "
    "`renormalize` scales their probabilities to a sum of 1, `tail_bucket` has one bucket for all "
    "others, `unbiased` adds the score of the drawn token. A seed draws responses and noise.",
    rule="Decided on SmolLM2 with the student's K. Confirmed if the 95 % interval of the cosine at "
    "K=16 renormalised lies at or above 0.98, the norm with the bucket is nearer to the whole "
    "gradient's than renormalised at K=16, and the gradient renormalised with K=1 is 0. Refuted if "
    "the interval lies below 0.98 or the bucket is not nearer, otherwise undecided.",
    columns={
        "divergence": "divergence, nats per token",
        **{f"cosine_{k}": f"cosine, K={k}" for k in (1, 4, 16, 128, 512)},
        **{f"norm_{k}": f"norm, K={k}" for k in (4, 16, 128)},
        "student_mass_16": "student's mass, K=16",
        "teacher_mass_16": "teacher's mass, K=16",
    },
    arms=tuple(
        arm(task, source, correction)
        for task in TASKS
        for source in SOURCES
        for correction in Correction
    ),
    seeds=(0, 1, 2),
    judge=judge,
    draw=draw,
    cuts="Students are trained to the end in E3T.",
)
