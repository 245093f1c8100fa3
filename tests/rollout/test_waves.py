"""The chunks of a wave reach the engine together and in order."""

import asyncio

import pytest

from hybridrl.rollout.waves import Waves
from hybridrl.types import GenerateOrder


def order(chunk: int, wave: str = "w", num_chunks: int = 3) -> GenerateOrder:
    return GenerateOrder(
        wave=wave,
        chunk=chunk,
        num_chunks=num_chunks,
        group_size=1,
        temperature=1.0,
        max_new_tokens=4,
        seed=0,
    )


@pytest.mark.parametrize("arrival", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_the_engine_gets_the_chunks_of_a_wave_in_order_however_they_arrive(
    arrival: tuple[int, ...],
):
    submitted: list[int] = []
    waves = Waves(lambda chunk, prompts: submitted.append(chunk.chunk) or [prompts])

    async def run() -> list:
        tasks = [asyncio.create_task(waves.arrive(order(chunk), (chunk,))) for chunk in arrival]
        return [await task for task in tasks]

    assert asyncio.run(run()) == [[(chunk,)] for chunk in arrival], "each gets its own"
    assert submitted == [0, 1, 2]


def test_a_wave_waits_for_its_last_chunk_and_another_wave_does_not():
    submitted: list[str] = []
    waves = Waves(lambda chunk, prompts: submitted.append(f"{chunk.wave}{chunk.chunk}"))

    async def run() -> None:
        first = asyncio.create_task(waves.arrive(order(1, num_chunks=2), ()))
        await asyncio.sleep(0)
        await waves.arrive(order(0, wave="other", num_chunks=1), ())
        assert not first.done()
        await waves.arrive(order(0, num_chunks=2), ())
        await first

    asyncio.run(run())
    assert submitted == ["other0", "w0", "w1"]


def test_after_a_drop_a_wave_of_the_same_name_consists_of_new_chunks():
    submitted: list[tuple[int, ...]] = []
    waves = Waves(lambda chunk, prompts: submitted.append(prompts))

    async def run() -> None:
        old = asyncio.create_task(waves.arrive(order(0, num_chunks=2), (1,)))
        await asyncio.sleep(0)
        waves.drop()
        with pytest.raises(asyncio.CancelledError):
            await old
        first = asyncio.create_task(waves.arrive(order(1, num_chunks=2), (3,)))
        await asyncio.sleep(0)
        assert submitted == []
        await waves.arrive(order(0, num_chunks=2), (2,))
        await first

    asyncio.run(run())
    assert submitted == [(2,), (3,)]
