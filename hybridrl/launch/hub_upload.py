"""`hybridrl export --push OWNER/NAME`: an export with its model card, on the Hugging Face hub."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hybridrl.core import redact
from hybridrl.core.errors import ConfigError, DataError, HubError, RunDirectoryError
from hybridrl.launch.export import Export
from hybridrl.models.loading import TEXT_FILES, resolve
from hybridrl.report.model_card import RunCard, is_hub_name
from hybridrl.settings.models import ModelConfig

REPLACED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)
"""Files that a loader reads and that an earlier upload may have but this one may lack. They are
removed, as a loader would take them for parts of the new model; the hub's history retains them.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubUpload:
    """A repository of the hub that an export is uploaded to.

    The token is the one of huggingface_hub: HF_TOKEN, or that of `hf auth login`.
    """

    repo: str  # OWNER/NAME
    public: bool = False
    message: str | None = None  # the commit message; None: one that names the step
    api: HfApi = field(default_factory=HfApi)

    @classmethod
    def requested(
        cls, repo: str | None, *, public: bool, message: str | None
    ) -> "HubUpload | None":
        """The upload that the options of the command describe; None: there is no --push.

        Raises:
            ConfigError: an option needs --push, or `repo` is not the name of a repository.
        """
        if repo is None:
            if public or message is not None:
                option = "--public" if public else "--message"
                raise ConfigError(f"{option}: has no effect without --push OWNER/NAME; add it")
            return None
        upload = cls(repo=repo, public=public, message=message)
        upload.check_name()
        return upload

    def check_name(self) -> None:
        """Raises ConfigError unless the repository has a name OWNER/NAME that the hub allows."""
        rule = ""
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            rule = f" ({error})"
        if rule or self.repo.count("/") != 1:
            raise ConfigError(
                f"--push {self.repo}: must be OWNER/NAME of letters, digits, '-', '_' and '.'"
                f"{rule}; OWNER is your name on the hub, or an organisation's"
            )

    def prepare(self) -> None:
        """Make the repository unless it exists. Only that shows whether the token may write, so it
        precedes an export, which may take minutes.

        Raises:
            ConfigError: offline mode is on, there is no token, the token may only read, or an
                existing repository is public and --public is not given, or private and it is.
            HubError: the hub refuses the token or the repository, or does not answer.
        """
        if constants.is_offline_mode():
            raise ConfigError(
                f"--push {self.repo}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, "
                "or leave --push out"
            )
        if not (self.api.token or get_token()):
            raise ConfigError(
                f"--push {self.repo}: no token for the hub was found; set HF_TOKEN to one that may "
                "write, or call 'hf auth login'"
            )
        with self._hub_errors("checking the token"):
            account = self.api.whoami()
        role = account.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise ConfigError(
                f"--push {self.repo}: the token of {account.get('name')} may only read; make one "
                "that may write, and set HF_TOKEN to it"
            )
        if not self._exists():
            with self._hub_errors("making the repository"):
                self.api.create_repo(self.repo, private=not self.public, exist_ok=True)

    def _exists(self) -> bool:
        """Whether the repository exists; it must be public if --public is given, else private.

        Raises:
            ConfigError: it exists and is not.
            HubError: the hub does not answer.
        """
        with self._hub_errors("looking for the repository"):
            try:
                private = self.api.model_info(self.repo).private
            except RepositoryNotFoundError:
                return False
        if private is False and not self.public:
            raise ConfigError(
                f"--push {self.repo}: the repository is public; add --public to show the model to "
                "everybody, or name another one"
            )
        if private and self.public:
            raise ConfigError(
                f"--push {self.repo}: the repository is private; leave --public out, and make it "
                "public on the hub once its contents are as you want them"
            )
        return True

    def licence(self, model: ModelConfig) -> str | None:
        """The licence that the hub states for the model; None: it states none."""
        if not is_hub_name(model.path):
            return None
        with self._hub_errors(f"reading the licence of {model.path}"):
            try:
                data = self.api.model_info(model.path, revision=model.revision).card_data
            except RepositoryNotFoundError:
                return None
        return None if data is None else data.get("license")

    def send(self, folder: Path, step: int) -> str:
        """Upload the folder; returns the address of the model.

        Raises:
            HubError: the hub refuses it, or does not answer.
        """
        message = self.message or f"Step {step} of a run of hybridrl"
        with self._hub_errors("uploading"):
            self.api.upload_folder(
                repo_id=self.repo,
                folder_path=folder,
                commit_message=redact.text(message),
                delete_patterns=list(REPLACED),
            )
        return f"{self.api.endpoint}/{self.repo}"

    @contextmanager
    def _hub_errors(self, action: str) -> Iterator[None]:
        """Turn an error of the client into one sentence."""
        try:
            yield
        except OfflineModeIsEnabled as error:
            raise ConfigError(f"--push {self.repo}: {error}") from error
        except Exception as error:  # the client passes on errors of its transport, of many types
            refusal = _refusal(error)
            if refusal is None:
                raise HubError(
                    f"--push {self.repo}: {action}: {self.api.endpoint} does not answer "
                    f"({_first_line(error)}); check the network and run the same command again"
                ) from error
            status = refusal.response.status_code
            remedy = {
                401: "the token is not valid; set HF_TOKEN to another one, or call 'hf auth login'",
                403: "the token may not write there; correct OWNER, or give it that right",
            }.get(status, "see the message, and run the same command again")
            raise HubError(
                f"--push {self.repo}: {action}: {self.api.endpoint} refused with status {status} "
                f"({_first_line(refusal)}); {remedy}"
            ) from error


def _refusal(error: BaseException | None) -> HfHubHTTPError | None:
    """The hub's refusal: the error itself or one of its causes; None: the hub did not refuse."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def export_with_card(
    source: Path,
    folder: Path | None,
    *,
    step: str | None,
    dtype: str | None,
    adapter: bool,
    upload: HubUpload | None,
) -> Iterator[str]:
    """Export a checkpoint with its model card and, where `upload` is given, upload both; yields the
    folder, and the address on the hub.

    Args:
        source, folder, step, dtype, adapter: as in Export.of.
        upload: the repository, which is checked before anything is written; None: no upload.

    Raises:
        ConfigError, CheckpointError, RunDirectoryError: as Export.of and Export.write.
        DataError: the metrics of the run are damaged, and there is an upload. Without an upload,
            the export has no card then, and stderr says so.
        HubError: as HubUpload.
    """
    export = Export.of(source, folder, step=step, dtype=dtype, adapter=adapter)
    card: RunCard | None = None
    try:
        card = RunCard.of(
            export.run_dir, export.settings, step=export.checkpoint.state.step, adapter=adapter
        )
    except (DataError, RunDirectoryError) as error:
        if upload is not None:
            raise
        print(f"hybridrl: no model card: {redact.text(str(error))}", file=sys.stderr)
    model = export.settings.model
    licence = None
    if upload is not None:
        upload.prepare()
        licence = upload.licence(model)
    written = export.write()
    if card is not None:
        name = upload.repo if upload else written.resolve().name
        card.write(written, name, licence or folder_licence(model))
    yield str(written)
    if upload is not None:
        yield upload.send(written, export.checkpoint.state.step)


def folder_licence(model: ModelConfig) -> str | None:
    """The licence in the model card of the start model's folder; None: it states none."""
    path = resolve(model.path, model.revision, files=TEXT_FILES) / "README.md"
    if not path.is_file():
        return None
    try:
        stated = ModelCard.load(path, ignore_metadata_errors=True).data.get("license")
    # The card is somebody else's, and may have no usable front matter.
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return None
    return stated if isinstance(stated, str) else None
