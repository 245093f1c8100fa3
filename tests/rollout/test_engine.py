"""The real vLLM engine, in a process of its own because vLLM's CPU worker patches torch."""

import asyncio
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from hybridrl.models.loading import load_model
from hybridrl.rollout import engine as engine_module
from hybridrl.rollout.engine import end_with_core, engine_args
from hybridrl.rollout.rollouter import SingleTurn
from hybridrl.types import EngineStats, FinishReason, GenerateOrder, Prompt, RolloutBatch
from tests.support.graph import save_tiny, tiny_settings

OBSERVATION = (21, 6, 5)
SUPPORT = 3
STOP = 8  # the token of "4"
BLOCKS = 13  # blocks of 32 tokens in the KV cache, besides the one that vLLM leaves empty
PLACES = 12  # rollout.max_num_seqs


def test_an_engine_whose_core_has_ended_ends_too(monkeypatch: pytest.MonkeyPatch):
    resources = SimpleNamespace(engine_dead=False)
    engine = SimpleNamespace(engine_core=SimpleNamespace(resources=resources))
    seen: list[str | int] = []

    def sleep(seconds: float) -> None:
        seen.append("alive")
        resources.engine_dead = len(seen) == 3

    monkeypatch.setattr(engine_module, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(engine_module, "os", SimpleNamespace(_exit=seen.append))
    end_with_core(engine)
    assert seen == ["alive"] * 3 + [1]


class Sampled(NamedTuple):
    """The responses of one engine to the same order with one turn and with two, and its reports."""

    single: RolloutBatch
    double: RolloutBatch
    stopped: RolloutBatch
    """responses of one turn by an engine that also stops at STOP"""
    reports: tuple[EngineStats, ...]
    """the reports after `single`, after a crowd of requests, and after prompts of several blocks"""


def sampled(folder: Path) -> Sampled:
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from hybridrl.rollout.engine import Rollout
    from tests.support.scripted_engine import TwoTurns

    settings = tiny_settings(
        folder / "run",
        f"model.path={save_tiny(folder / 'model', 0)}",
        f"rollout.max_num_seqs={PLACES}",
        f"+rollout.engine={{block_size:32,num_gpu_blocks_override:{1 + BLOCKS}}}",
    )
    prompts = [
        Prompt(uid=f"p{i}", input_ids=(1, 4 + i, 8, 20, 6), text="", columns={}) for i in range(8)
    ]
    order = GenerateOrder(
        wave="w",
        chunk=0,
        num_chunks=1,
        group_size=2,
        temperature=1.0,
        max_new_tokens=24,
        seed=5,
        support=SUPPORT,
    )

    async def sample() -> Sampled:
        engine = Rollout(settings, model=settings.model, device="cpu", backend="object_store")
        header, single = await engine.generate(order, prompts)
        reports = [header.engine]
        engine.sampler.rollouter = TwoTurns(OBSERVATION)
        _, double = await engine.generate(order, prompts)
        engine.sampler.rollouter = SingleTurn()
        engine.sampler.stop_token_ids = (STOP,)
        _, stopped = await engine.generate(order, prompts)
        engine.sampler.stop_token_ids = ()
        long = [Prompt(uid="long", input_ids=(1,) * 33, text="", columns={})]
        short = replace(order, max_new_tokens=4, group_size=4)
        crowd = replace(order, max_new_tokens=43, group_size=4)
        for asked, of in ((crowd, prompts), (short, long)):
            header, _ = await engine.generate(asked, of)
            reports.append(header.engine)
        return Sampled(single, double, stopped, tuple(reports))

    return asyncio.run(sample())


@pytest.mark.graph
def test_the_engine_reports_what_a_plain_forward_pass_gives_with_one_turn_and_with_two(
    tmp_path: Path,
):
    """This holds for the most likely tokens and for the log-probs of drawn tokens."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        batches = pool.submit(sampled, tmp_path).result(timeout=240)
    model = load_model(str(tmp_path / "model"))
    for batch in batches[:3]:
        drawn = batch.input_ids[batch.response_mask]
        among = (batch.support_ids == drawn[:, None]).any(axis=1)
        assert among.any() and not among.all(), "both kinds of drawn token occur"
        for i in range(batch.num_sequences):
            row = batch.trajectory(i)
            ids = torch.from_numpy(row.input_ids.astype(np.int64))
            at = np.flatnonzero(row.response_mask)
            with torch.no_grad():
                logprobs = torch.log_softmax(model(ids[None]).logits[0], -1)[at - 1]
            assert row.support_ids.tolist() == logprobs.topk(SUPPORT).indices.tolist()
            drawn_logprobs = logprobs.gather(1, ids[at][:, None])[:, 0].numpy()
            assert np.abs(drawn_logprobs - row.rollout_logprobs[at]).max() < 1e-4
    first_turns_agree(batches)
    stops_earlier(batches)
    reports_its_cache_and_queue(batches)


def reports_its_cache_and_queue(batches: Sampled) -> None:
    """The cache has 13 blocks of 32 tokens, and 12 requests may run at once. A response without the
    crowd needs one block; some responses of the crowd need two.
    """
    calm, crowded, long = batches.reports
    assert calm == EngineStats(
        kv_use=1 - 1 / 13,  # all blocks but one are in use
        running=12,
        waiting=16 - 12,
        preemptions=0,
        prefix_queries=16 * 5,
        prefix_hits=0,  # the prompts are shorter than a block
    )
    assert crowded.preemptions > 0
    assert replace(crowded, preemptions=0) == EngineStats(
        kv_use=1.0, running=12, waiting=32 - 12, prefix_queries=32 * 5
    )
    # Four prompts of 33 tokens share a block with the first 32, which is found in the cache three
    # times. With it and the second blocks of all four, 8 blocks are free.
    assert long == EngineStats(
        kv_use=1 - 8 / 13, running=4, prefix_queries=4 * 33, prefix_hits=3 * 32
    )


def stops_earlier(batches: Sampled) -> None:
    """Each response equals that of an engine without STOP, up to and including its first STOP."""
    cut = 0
    for i in range(batches.single.num_sequences):
        response = batches.single.trajectory(i).response_ids.tolist()
        row = batches.stopped.trajectory(i)
        if STOP in response:
            cut += 1
            response = response[: response.index(STOP) + 1]
            assert row.finish_reason is FinishReason.stop
        assert row.response_ids.tolist() == response
    assert cut >= 2


def first_turns_agree(batches: Sampled) -> None:
    """Each first turn equals the response with a single turn; some responses have a second turn."""
    continued = 0
    for i in range(batches.single.num_sequences):
        response = batches.single.trajectory(i).response_ids.tolist()
        row = batches.double.trajectory(i)
        r = len(response)
        assert row.response_ids[:r].tolist() == response and row.response_mask[5 : 5 + r].all()
        if len(row.response_ids) > r + len(OBSERVATION):
            continued += 1
            observed = slice(r, r + len(OBSERVATION))
            assert row.response_ids[observed].tolist() == list(OBSERVATION)
            assert not row.response_mask[5:][observed].any()
    assert continued >= 4


@pytest.mark.parametrize(
    ("device", "overrides", "eager", "prefill", "chunked"),
    [
        ("cpu", [], True, 8192, False),
        ("cuda", [], False, 16384, None),
        ("cuda", ["rollout.enforce_eager=true"], True, 16384, None),
        ("cpu", ["rollout.enforce_eager=false"], False, 8192, False),
    ],
)
def test_the_defaults_of_an_engine_are_those_of_its_device(
    device: str,
    overrides: list[str],
    eager: bool,
    prefill: int,
    chunked: bool | None,
    tmp_path: Path,
):
    settings = tiny_settings(tmp_path, *overrides)
    args = engine_args(settings, settings.model, device, "object_store")
    assert args.enforce_eager is eager
    assert args.max_num_batched_tokens == prefill
    assert args.enable_chunked_prefill is chunked
    assert args.enable_sleep_mode is False


@pytest.mark.parametrize(("device", "sleeps"), [("cpu", False), ("cuda", True)])
def test_an_engine_that_takes_turns_can_sleep_where_vllm_has_that(
    device: str, sleeps: bool, tmp_path: Path
):
    turns = ("cluster.colocate=true", "cluster.take_turns=true")
    settings = tiny_settings(tmp_path, *turns)
    assert engine_args(settings, settings.model, device, "ipc").enable_sleep_mode is sleeps


def test_arguments_of_the_user_reach_the_engine_as_vllms_own_types(tmp_path: Path):
    settings = tiny_settings(
        tmp_path,
        "+rollout.engine={max_num_batched_tokens:4096,cpu_offload_params:[a,b],"
        "attention_backend:FLASH_ATTN,compilation_config:{cudagraph_capture_sizes:[1,8]},"
        "hf_overrides:{head_dtype:float32}}",
    )
    args = engine_args(settings, settings.model, "cuda", "object_store")
    assert args.max_num_batched_tokens == 4096
    assert args.cpu_offload_params == {"a", "b"}
    assert args.attention_backend.name == "FLASH_ATTN"
    assert args.compilation_config.cudagraph_capture_sizes == [1, 8]
    assert args.hf_overrides == {"head_dtype": "float32"}
