"""Workers that write secrets into their logs. This file has no heavy imports."""

import logging
import os

from hybridrl.runtime.host import build, log_of
from hybridrl.settings.rewards import RewardConfig, RewardFunctionConfig

CANARY = "canary-0123456789"
"""The text that every secret of a test contains."""


class Failing:
    """A worker whose constructor raises an error with a secret of the environment."""

    def __init__(self) -> None:
        raise RuntimeError(
            f"HF_TOKEN={os.environ['HF_TOKEN']}, others "
            f"{[n for n in os.environ if CANARY in os.environ[n]]}"
        )


class Judge:
    """A worker that logs secrets, as a reward worker may when it logs the message of a failure."""

    def __init__(self, config: RewardConfig, seen: str) -> None:
        options = config.functions["judge"].options
        logging.getLogger("judge").warning(
            "%s refused, node had %s, %s",
            options["headers"]["auth_token"].split()[1],
            seen,
            options["url"],
        )


def build_judge(log: str) -> None:
    """Build a Judge with a key that no environment variable has; to be called in a new process."""
    options = {"headers": {"auth_token": f"Bearer {CANARY}-judge"}, "url": "https://judge:8000"}
    config = RewardConfig(
        functions={"judge": RewardFunctionConfig(function="f.py:f", options=options)}
    )
    arguments = {"config": config, "seen": os.environ["DB_PASSWORD"]}
    log_of(log, arguments)
    build("tests.support.logged_secrets:Judge", arguments)
