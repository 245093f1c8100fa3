"""Workers that fail as they are told; a file of its own, so that their process imports nothing heavy."""

import os


class Failing:
    """Raises, or ends its process, where it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        if error is not None:
            raise error

    def ping(self) -> str:
        return "here"

    def take(self, value: object) -> None: ...

    def die(self) -> None:
        os._exit(7)


class AsyncFailing(Failing):
    async def ping(self) -> str:
        return "here"
