"""A script that measures lower bounds on the time of each part of a step on this machine.

    python floor_peer.py ORDER.json

ORDER has the form of trl_peer.py. The script prints the seconds of the bare matrix products of a
step, of a bare engine for the same requests, and of one copy of the weights.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MARK = "PEER "


def median_s(call: Callable[[], object], repeats: int = 5) -> float:
    seconds = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def products(order: dict, tokens: int) -> dict[str, float]:
    """The seconds of the matrix products of a step, without attention.

    Per weight and token, the forward pass needs 2 operations and the backward pass 4; the head
    needs 8NVH (student, teacher, dHidden, dHead). The forward products of one layer are timed. The
    backward products are assumed to be as fast, because they are the same ones transposed.

    Args:
        tokens: the number of tokens of the batch, including prompts.
    """
    model = AutoModelForCausalLM.from_pretrained(
        order["student"], dtype=getattr(torch, order["dtype"])
    )
    layer = model.base_model.layers[0]
    weights = [p.detach() for p in layer.parameters() if p.ndim == 2]
    inputs = [torch.randn(tokens, w.shape[1]).to(w.dtype) for w in weights]
    layer_s = median_s(lambda: [x @ w.T for x, w in zip(inputs, weights, strict=True)])
    head = model.get_output_embeddings().weight.detach()
    rows = order["prompts"] * order["samples"] * order["max_new_tokens"]
    hidden = torch.randn(rows, head.shape[1]).to(head.dtype)
    head_s = median_s(lambda: hidden @ head.T)
    forward_s = layer_s * len(model.base_model.layers)
    buffer = torch.empty(
        sum(p.numel() * p.element_size() for p in model.parameters()), dtype=torch.uint8
    )
    target = torch.empty_like(buffer)
    return {
        "student_products_s": 3 * forward_s,
        "teacher_products_s": forward_s,
        "head_products_s": 4 * head_s,
        "body_gflops": 2 * tokens * sum(w.numel() for w in weights) / layer_s / 1e9,
        "head_gflops": 2 * rows * head.numel() / head_s / 1e9,
        "weights_copy_s": median_s(lambda: target.copy_(buffer)),
        "weights_bytes": buffer.numel(),
        "tokens": tokens,
    }


def bare_engine(order: dict, prompts: list[list[int]]) -> list[float]:
    """The seconds of a bare vLLM loop for the requests of each step, with our sampling
    parameters.
    """
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    length = order["max_new_tokens"]
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=order["student"],
            dtype=order["dtype"],
            max_model_len=max(map(len, prompts)) + length,
            enforce_eager=True,
            max_num_seqs=len(prompts),
            distributed_executor_backend="uni",
            kv_cache_memory_bytes=2**28,
            disable_log_stats=True,
        ),
        enable_multiprocessing=False,
    )
    seconds = []
    for turn in range(order["steps"]):
        started = time.perf_counter()
        for i, ids in enumerate(prompts):
            params = SamplingParams(
                temperature=1.0,
                max_tokens=length,
                seed=i,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(
                f"{turn}/{i}", TokensPrompt(prompt_token_ids=ids, cache_salt=str(turn)), params
            )
        while engine.has_unfinished_requests():
            engine.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def main(order: dict) -> None:
    torch.set_num_threads(order["threads"])
    tokenizer = AutoTokenizer.from_pretrained(order["student"])
    rows = [
        json.loads(line)
        for line in Path(order["problems"]).read_text().splitlines()[: order["prompts"]]
    ]
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows for _ in range(order["samples"])]
    results = products(order, sum(map(len, prompts)) + len(prompts) * order["max_new_tokens"])
    print(MARK + json.dumps(results | {"engine_s": bare_engine(order, prompts)}), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
