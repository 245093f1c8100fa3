"""Checks of the settings of teachers on servers."""

from urllib.parse import urlsplit

from hybridrl.core.errors import ConfigError
from hybridrl.settings.choices import EvidenceKind, SupportSource
from hybridrl.settings.models import AUTO
from hybridrl.settings.run import RunSettings
from hybridrl.settings.servers import ServedConfig


def check_servers(settings: RunSettings) -> None:
    """A teacher with an address runs on that server alone, which can give the evidence in time.

    Raises:
        ConfigError: one sentence about the first rule that is broken.
    """
    for name, teacher in settings.teachers.items():
        if teacher.url is None:
            _check_unserved(settings, name)
            continue
        _check_address(f"teachers.{name}.url", teacher.url)
        for url in teacher.served.fallbacks:
            _check_address(f"teachers.{name}.served.fallbacks", url)
        _check_alone(settings, name)
        check_reported(settings, name, f"teachers.{name}.url={teacher.url}", "a server")
        _check_time(settings, name)


def _check_unserved(settings: RunSettings, name: str) -> None:
    teacher = settings.teachers[name]
    if teacher.api_key is not None:
        raise ConfigError(
            f"teachers.{name}.api_key: is the key of a server, and teachers.{name}.url is not set; "
            "set it, or leave the key out"
        )
    if teacher.served != ServedConfig():
        raise ConfigError(
            f"teachers.{name}.served: describes a server, and teachers.{name}.url is not set; set "
            "it, or leave the section out"
        )


def _check_address(setting: str, url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{setting}={url}: must be an address such as http://HOST:8000/v1")
    if parts.query or parts.fragment:
        raise ConfigError(
            f"{setting}={url}: must end with the path, e.g. http://HOST:8000/v1; leave out what "
            "follows"
        )


def _check_alone(settings: RunSettings, name: str) -> None:
    """No other setting describes the model, which the server has."""
    teacher = settings.teachers[name]
    url = f"teachers.{name}.url={teacher.url}"
    if teacher.path is not None:
        raise ConfigError(
            f"{url}: cannot be combined with teachers.{name}.path={teacher.path}; leave one of "
            "them out (to name a folder with the tokenizer, set "
            f"teachers.{name}.served.tokenizer)"
        )
    if teacher.model is not None:
        raise ConfigError(
            f"{url}: cannot be combined with teachers.{name}.model={teacher.model}; leave one of "
            "them out"
        )
    if teacher.devices != 1:
        raise ConfigError(
            f"teachers.{name}.devices={teacher.devices}: divides a model that is loaded here, and "
            f"the server at teachers.{name}.url has its own; leave it out"
        )
    if teacher.dtype != AUTO:
        raise ConfigError(
            f"teachers.{name}.dtype={teacher.dtype}: the server at teachers.{name}.url has chosen "
            "its dtype; leave it out"
        )
    if settings.algorithm.teacher_fraction and name == next(iter(settings.teachers)):
        raise ConfigError(
            f"{url}: scores responses and writes none; set algorithm.teacher_fraction=0, or put "
            "another teacher first"
        )


def check_reported(settings: RunSettings, name: str, source: str, what: str) -> None:
    """Refuse a teacher from which the run needs more than vLLM reports.

    Args:
        source: the setting, with its value, that says where its log-probs come from.
        what: the kind of that source, "a server" or "an engine".

    Raises:
        ConfigError: it needs other evidence, or another temperature than 1.
    """
    if name not in settings.scored_teachers:
        return
    algorithm = settings.algorithm
    kind = settings.evidence_kind(name)
    own_topk = kind is EvidenceKind.support and algorithm.topk.source is SupportSource.teacher
    if kind is not EvidenceKind.drawn and not own_topk:
        needed = {
            EvidenceKind.hidden: "its hidden states",
            EvidenceKind.vocabulary: "its whole vocabulary",
            EvidenceKind.support: "tokens that the sampler chose",
        }[kind]
        raise ConfigError(
            f"{source}: {what} reports the log-probs of the drawn token and of its own most likely "
            f"tokens, and the run needs {needed}; set teachers.{name}.evidence=drawn, or "
            "evidence=support and algorithm.topk.source=teacher"
        )
    if algorithm.temperature != 1.0:
        raise ConfigError(
            f"algorithm.temperature={algorithm.temperature}: {what} ({source}) reports log-probs "
            "at temperature 1; set it to 1, or load the teacher here by "
            f"teachers.{name}.path alone"
        )


def _check_time(settings: RunSettings, name: str) -> None:
    """All servers of a teacher must have time to answer before its scorer counts as hung."""
    served = settings.teachers[name].served
    count = 1 + len(served.fallbacks)
    longest = count * (served.retry_s + served.request_s)
    if longest >= settings.deadlines.score_s:
        raise ConfigError(
            f"deadlines.score_s={settings.deadlines.score_s:g}: {count} servers of teachers.{name} "
            f"may take {longest:g} s before they count as lost (served.retry_s={served.retry_s:g} "
            f"and served.request_s={served.request_s:g} each); raise it above that, or lower those"
        )
