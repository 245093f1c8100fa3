"""A script that trains with Hugging Face generation, a teacher, our loss and AdamW in one process.

    python bare_peer.py ORDER.json

ORDER has the form of trl_peer.py. The script prints the seconds of each step and of its parts.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridrl.kernels.head import HeadRule, hybrid_head_loss
from hybridrl.kernels.teacher_rows import HiddenTeacher
from hybridrl.kernels.token_columns import TokenColumns

MARK = "PEER "


class BareLoop:
    """Training steps with teacher and reward signal on one batch of prompts, which are padded on
    the left as generate() requires. The rewards are random numbers.
    """

    def __init__(self, order: dict) -> None:
        self.order = order
        dtype = getattr(torch, order["dtype"])

        def load(name):
            return AutoModelForCausalLM.from_pretrained(order[name], dtype=dtype).eval()

        self.student = load("student")
        self.teacher = load("teacher").requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(order["student"], padding_side="left")
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(),
            lr=order["lr"],
            betas=tuple(order["betas"]),
            weight_decay=0.0,
            fused=True,
        )
        rows = [json.loads(line) for line in Path(order["problems"]).read_text().splitlines()]
        prompts = [
            row["prompt"] for row in rows[: order["prompts"]] for _ in range(order["samples"])
        ]
        self.inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
        self.rule = HeadRule()
        self.spent: dict[str, list[float]] = {
            "rollout_s": [],
            "score_s": [],
            "learn_s": [],
            "step_s": [],
            "cpu_s": [],
        }

    def step(self) -> None:
        clock = [time.perf_counter()]
        cpu = time.process_time()
        width = self.inputs.input_ids.shape[1]
        length = self.order["max_new_tokens"]
        with torch.no_grad():
            ids = self.student.generate(
                **self.inputs,
                max_new_tokens=length,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
            assert ids.shape[1] == width + length, ids.shape
            clock.append(time.perf_counter())
            mask = torch.cat(
                [self.inputs.attention_mask, torch.ones(len(ids), length, dtype=torch.int64)], 1
            )
            body = {
                "input_ids": ids,
                "attention_mask": mask,
                "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
                "use_cache": False,
            }
            teacher_states = self.states(self.teacher.base_model(**body).last_hidden_state, width)
            clock.append(time.perf_counter())
        self.learn(
            self.states(self.student.base_model(**body).last_hidden_state, width),
            teacher_states,
            ids[:, width:].flatten(),
        )
        clock.append(time.perf_counter())
        for name, a, b in zip(self.spent, clock, clock[1:], strict=False):
            self.spent[name].append(b - a)
        self.spent["step_s"].append(clock[-1] - clock[0])
        self.spent["cpu_s"].append(time.process_time() - cpu)

    def states(self, hidden: Tensor, width: int) -> Tensor:
        """[R, H] the hidden states before each response token, from `hidden` [B, T, H].

        Args:
            width: the length of the padded prompts.
        """
        return hidden[:, width - 1 : -1].reshape(-1, hidden.shape[-1])

    def learn(self, hidden: Tensor, teacher_states: Tensor, drawn: Tensor) -> None:
        ones = torch.ones(len(drawn))
        terms = TokenColumns(
            token_ids=drawn,
            token_weight=ones / len(drawn),
            sparse=torch.randn(len(drawn)),
            value_slope=0 * ones,
            sampler_logprobs=0 * ones,
            old_logprobs=0 * ones,
        )
        teacher = HiddenTeacher(
            hidden=teacher_states, lm_head=self.teacher.get_output_embeddings().weight, weight=ones
        )
        loss, _ = hybrid_head_loss(
            hidden, self.student.get_output_embeddings().weight, (teacher,), terms, self.rule
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def main(order: dict) -> None:
    torch.set_num_threads(order["threads"])
    torch.manual_seed(0)
    loop = BareLoop(order)
    for _ in range(order["steps"]):
        loop.step()
    print(
        MARK
        + json.dumps(
            loop.spent
            | {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        ),
        flush=True,
    )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
