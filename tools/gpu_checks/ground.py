"""The options of the checks: the device, the folders and the user's models."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """The options of the checks, which are passed to the process of each part as JSON."""

    device: str  # cuda, or cpu for a reduced form of steps 1 to 3
    folder: str  # the folder for runs, logs and results
    model: str | None = None  # a student for the comparison with the plan; None: a shipped model
    teacher: str | None = None  # its teacher; None: the student before training
    shared: str | None = None  # a folder that all nodes of a cluster can access

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def root(self) -> Path:
        return Path(self.folder)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Ground":
        return Ground(**json.loads(text))
