"""Runs a teacher that is divided over ranks: `python sharded_teacher_job.py RANKS:FOLDER ...`.

FOLDER holds the models `student` and `teacher`. Each rank scores a batch with each kind of evidence
and writes RANKS-RANK.json: the bytes of weights that it read and holds, and the error message when
the ranks get different batches. Rank 0 also writes the scores to RANKS-EVIDENCE.npz.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers.distributed.sharding_utils import DtensorShardOperation

from hybridrl.core.free_port import free_port
from hybridrl.runtime.scorer_group import scoring
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.scorer import Scorer
from hybridrl.teachers.sharded_model import ReplicaRank
from hybridrl.types import RolloutBatch
from tests.support.batches import make_batch
from tests.support.forked import fork_ranks

PROMPTS = [((1, 5, 6), [(7, 8, 2), (9, 2)]), ((1, 10), [(11, 2), (12, 13, 14, 2)])]
EVIDENCE = ("hidden", "vocabulary", "support", "drawn")


def settings_for(folder: Path, evidence: str) -> RunSettings:
    return load_config(
        [
            f"run.dir={folder}",
            "experiment=quickstart",
            f"model.path={folder}/student",
            f"teachers.main.path={folder}/teacher",
            f"+teachers.main.evidence={evidence}",
            "algorithm.topk.source=teacher",
            "algorithm.topk.k=3",
            "algorithm.gamma=1",
            "train.head_chunk=3",
            "scorer.max_tokens_per_micro_batch=8",
        ]
    )


def batch_of() -> RolloutBatch:
    return make_batch(PROMPTS)


class ReadBytes:
    """Counts the bytes of the weight shards that transformers reads from files for this rank."""

    def __init__(self) -> None:
        self.total = 0
        self.whole = DtensorShardOperation.shard_tensor

    def shard_tensor(self, operation: DtensorShardOperation, *args, **options) -> torch.Tensor:
        tensor = self.whole(operation, *args, **options)
        self.total += tensor.nbytes
        return tensor


def held_bytes(scorer: Scorer) -> int:
    parameters = scorer.model.model.parameters()
    local = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
    return sum(part.nbytes for part in local)


def main(rank: int, ranks: int, port: int, folder: Path) -> None:
    read = ReadBytes()
    DtensorShardOperation.shard_tensor = lambda *a, **k: read.shard_tensor(*a, **k)
    settings = settings_for(folder, "hidden")
    evidence, rule = scoring(settings, "main")
    place = ReplicaRank(rank=rank, ranks=ranks, master=("127.0.0.1", port))
    scorer = Scorer(
        settings, teacher="main", device="cpu", evidence=evidence, rule=rule, place=place
    )
    for kind in EVIDENCE:
        settings = settings_for(folder, kind)
        scorer.configure(settings, *scoring(settings, "main"))
        _, scores = scorer.score(batch_of())
        if rank == 0:
            columns = {"logprobs": scores.logprobs, "rows": scores.rows, "ids": scores.support_ids}
            np.savez(folder / f"{ranks}-{kind}.npz", **columns)
    figures = {"read": read.total, "held": held_bytes(scorer)}
    try:
        scorer.model.states(*(torch.full((1, 2 + rank), 3 + rank) for _ in range(3)))
    except RuntimeError as error:
        figures["different"] = str(error)
    (folder / f"{ranks}-{rank}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size, _, place in (argument.partition(":") for argument in sys.argv[1:]):
        arguments = {"ranks": int(size), "port": free_port(), "folder": Path(place)}
        fork_ranks(int(size), partial(main, **arguments), f"{place}/{{rank}}.log")
