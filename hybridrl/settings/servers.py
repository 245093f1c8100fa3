"""Settings of a teacher on a server, which belongs to somebody else or to another job."""

from dataclasses import dataclass, field

from hybridrl.core.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ServedConfig:
    """How the server of a teacher is used; its address is teachers.NAME.url."""

    model: str | None = None
    """the server's name of the model; null: the only one in its list (GET /v1/models)"""
    tokenizer: str | None = None
    """a Hugging Face folder or name with the model's tokenizer, which is compared with the
    student's; null: the server decodes all of the student's tokens (POST /detokenize), and the
    texts are compared
    """
    fallbacks: list[str] = field(default_factory=list)
    """addresses of further servers with the same model; where a server does not answer, the next
    one scores the chunk and those after it
    """
    concurrency: int = 32
    """most requests that one replica of the scorer has under way; each is one sequence"""
    request_s: float = 60.0
    """timeout of one request in seconds, after which it is sent again"""
    retry_s: float = 120.0
    """seconds for which a request that fails is sent again, after growing pauses, before its server
    counts as lost
    """
    max_gap: float = 0.05
    """nats; largest mean |difference| between the log-probs of two answers about the same tokens;
    batching and half precision cause small differences, and a server with a larger one is refused
    """

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ConfigError(
                f"teachers.NAME.served.concurrency={self.concurrency}: must be at least 1"
            )
        if not self.request_s > 0:
            raise ConfigError(f"teachers.NAME.served.request_s={self.request_s}: must be positive")
        if not self.retry_s >= 0 or not self.max_gap >= 0:
            raise ConfigError(
                f"teachers.NAME.served.retry_s={self.retry_s}, "
                f"teachers.NAME.served.max_gap={self.max_gap}: neither may be negative"
            )
