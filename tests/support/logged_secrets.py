"""Workers that write secrets into their logs, in a file that a process imports quickly."""

import logging
import os

from hybridrl.runtime.host import build, log_of
from hybridrl.settings.rewards import RewardConfig, RewardFunctionConfig

CANARY = "canary-0123456789"
"""In every secret of a test."""


class Failing:
    """Its error has the secrets of the environment."""

    def __init__(self) -> None:
        raise RuntimeError(
            f"HF_TOKEN={os.environ['HF_TOKEN']}, others "
            f"{[n for n in os.environ if CANARY in os.environ[n]]}"
        )


class Judge:
    """Logs secrets, as the reward worker may when it logs a failed function's message."""

    def __init__(self, config: RewardConfig, seen: str) -> None:
        options = config.functions["judge"].options
        logging.getLogger("judge").warning(
            "%s refused, node had %s, %s",
            options["headers"]["auth_token"].split()[1],
            seen,
            options["url"],
        )


def build_judge(log: str) -> None:
    """Build a Judge with a key that no environment has; runs in a process of its own."""
    options = {"headers": {"auth_token": f"Bearer {CANARY}-judge"}, "url": "https://judge:8000"}
    config = RewardConfig(
        functions={"judge": RewardFunctionConfig(function="f.py:f", options=options)}
    )
    arguments = {"config": config, "seen": os.environ["DB_PASSWORD"]}
    log_of(log, arguments)
    build("tests.support.logged_secrets:Judge", arguments)
