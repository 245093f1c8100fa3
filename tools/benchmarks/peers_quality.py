"""Compares accuracy and KL after equal numbers of steps of TRL 1.16's trainers and of this package.

All begin with the same tiny student, prompts, batch size, learning rate and optimizer, for several
seeds. Every student is judged by the same code: greedy accuracy on held-out Countdown problems, and
KL(student || teacher) over the whole vocabulary on held-out responses that the initial student
sampled once. For --trl-python see `tools/bench peers`.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import watched
from benchmarks.peer_inputs import PAIRS, write_problems
from hybridrl.data.problem_sources import load_problems
from hybridrl.models.loading import load_model, load_tokenizer, resolve
from hybridrl.rewards.countdown import countdown
from hybridrl.settings.run import DataConfig

HERE = Path(__file__).parent
LENGTH = 16
HELDOUT = 512
REWARD = f"{HERE.parent.parent / 'hybridrl' / 'rewards' / 'countdown.py'}:countdown"
SAME_AS_GRPO = [
    "algorithm=dr_grpo",
    "algorithm.scale=group_std",
    "algorithm.normalizer=token_mean",
]  # TRL's default loss, dapo
OURS = {
    "ours-distillation": ["algorithm=opd_full"],
    "ours-reward": SAME_AS_GRPO,
    "ours": ["algorithm=hybrid"],
}
TRL = {"trl-distillation": "distillation", "trl-grpo": "grpo"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trl-python", help="an interpreter with trl 1.16; without it TRL's rows are left out"
    )
    for name, default in {"steps": 40, "prompts": 96, "samples": 4, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument(
        "--under", default="", help='a command in front of each process, e.g. "taskset -c 0,1"'
    )


def run(options: argparse.Namespace) -> dict:
    pair = PAIRS["tiny"]
    judge = Judge(pair.student, pair.teacher)
    rows = [*(TRL if options.trl_python else ()), *OURS]
    results = {
        "initial": [judge.judge(str(resolve(pair.student)))],
        "teacher": [judge.judge(str(resolve(pair.teacher)))],
    }
    versions: dict[str, str] = {}  # of packages in TRL's interpreter
    for seed in options.seeds:  # all rows of a seed train on the same problems
        for row in rows:
            with tempfile.TemporaryDirectory(prefix="peers-") as folder:
                if row in TRL:
                    student, versions = trained_by_trl(Path(folder), row, options, seed)
                else:
                    student = trained_by_us(Path(folder), row, options, seed)
                results.setdefault(row, []).append(judge.judge(str(student)))
            print(f"seed {seed}  {described(row, results[row][-1:])}", flush=True)
    print("\n".join(described(row, each) for row, each in results.items()), flush=True)
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "picture")}
    return {"settings": settings, "heldout": HELDOUT, "trl_versions": versions, "rows": results}


def described(row: str, each: list[dict[str, float]]) -> str:
    """A line with the means of a row over its seeds."""
    accuracy, kl = ([values[key] for values in each] for key in ("accuracy", "kl"))
    return (
        f"{row:18s} accuracy {mean(accuracy):6.1%}   KL to the teacher {mean(kl):.4f} nats a "
        f"token   of {len(each)} seeds"
    )


def trained_by_trl(
    folder: Path, row: str, options: argparse.Namespace, seed: int
) -> tuple[Path, dict[str, str]]:
    pair = PAIRS["tiny"]
    work = folder / row
    work.mkdir()
    problems = write_problems(
        work, pair.instruction, options.prompts * options.steps, HELDOUT, seed
    )
    order = {
        "work": str(work),
        "student": str(resolve(pair.student)),
        "teacher": str(resolve(pair.teacher)),
        "dtype": pair.dtype,
        "problems": str(problems),
        "reward": REWARD,
        "prompts": options.prompts,
        "samples": options.samples,
        "max_new_tokens": LENGTH,
        "steps": options.steps,
        "lr": options.lr,
        "betas": [0.9, 0.95],
        "threads": options.threads,
        "seed": seed,
        "save": str(work / "saved"),
    }
    (work / "order.json").write_text(json.dumps(order))
    command = [options.trl_python, str(HERE / "trl_peer.py"), TRL[row], str(work / "order.json")]
    env = {"PYTHONPATH": "", "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    output = watched.run(command, under=options.under, env=env).printed()
    return work / "saved", output["versions"]


def trained_by_us(folder: Path, row: str, options: argparse.Namespace, seed: int) -> Path:
    run_dir = folder / row
    settings = [
        f"run.dir={run_dir}",
        "experiment=quickstart",
        *OURS[row],
        f"run.seed={seed}",
        f"train.steps={options.steps}",
        f"train.prompts_per_step={options.prompts}",
        f"data.num_train={options.prompts * options.steps}",
        f"train.samples_per_prompt={options.samples}",
        f"train.lr={options.lr}",
        "train.lr_warmup_steps=0",
        "train.lr_end=null",
        "eval.every=0",
        "eval.teacher=false",
        "checkpoint.every=0",
        "tracking.wandb=disabled",
        "cluster.device=cpu",
        f"cluster.threads_per_worker={options.threads}",
    ]
    watched.run(
        [sys.executable, "-m", "hybridrl.cli", "train", *settings],
        under=options.under,
        env={"RAY_ADDRESS": ""},
    )
    return next((run_dir / "export").iterdir())


class Judge:
    """Judges students by held-out problems, and by one response to each that the initial student
    sampled.
    """

    def __init__(self, student: str, teacher: str) -> None:
        _, self.problems = load_problems(
            DataConfig(task="countdown", num_train=1, num_heldout=HELDOUT), seed=0
        )
        self.tokenizer = load_tokenizer(student)
        self.prompts = self.tokenizer(
            [p.prompt for p in self.problems],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        self.teacher = load_model(teacher)
        torch.manual_seed(0)
        self.fixed = self.respond(load_model(student), greedy=False)  # [P, T]

    def respond(self, model: PreTrainedModel, *, greedy: bool) -> Tensor:
        """[P, T] the token ids of prompts and sampled responses, with padding after the end
        token.
        """
        how = (
            {"do_sample": False}
            if greedy
            else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        )
        inputs = {
            "input_ids": self.prompts.input_ids,
            "attention_mask": self.prompts.attention_mask,
        }
        return model.generate(
            **inputs, max_new_tokens=LENGTH, pad_token_id=self.tokenizer.pad_token_id, **how
        )

    @torch.no_grad()
    def judge(self, student: str) -> dict[str, float]:
        model = load_model(student)
        width = self.prompts.input_ids.shape[1]
        texts = self.tokenizer.batch_decode(
            self.respond(model, greedy=True)[:, width:], skip_special_tokens=True
        )
        columns = {key: [p.columns[key] for p in self.problems] for key in ("numbers", "target")}
        live = (self.fixed != self.tokenizer.pad_token_id)[:, width:]
        logp, logq = (self.logprobs(m)[:, width - 1 : -1] for m in (model, self.teacher))
        kl = (logp.exp() * (logp - logq)).sum(-1)[live].mean()
        return {"accuracy": sum(countdown(texts, **columns)) / len(texts), "kl": float(kl)}

    def logprobs(self, model: PreTrainedModel) -> Tensor:
        """[P, T, V] the model's log-probs on the fixed responses."""
        mask = (self.fixed != self.tokenizer.pad_token_id).long()
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return torch.log_softmax(
            model(input_ids=self.fixed, attention_mask=mask, position_ids=positions).logits.float(),
            -1,
        )


def draw(results: dict, picture: Path) -> None:
    """Draw accuracy against KL, with one point per row and seed."""
    os.environ["MPLBACKEND"] = "Agg"
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6, 4))
    for row, each in results["rows"].items():
        kl = [values["kl"] for values in each]
        accuracy = [100 * values["accuracy"] for values in each]
        panel.scatter(kl, accuracy, s=20, alpha=0.7, label=row)
    panel.set(xlabel="KL(student || teacher), nats a token", ylabel="held-out accuracy, %")
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
