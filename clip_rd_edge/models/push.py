"""Upload a model's folder to the Hugging Face hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from clip_rd_edge.contract.bundle import MANIFEST, TOKENIZER
from clip_rd_edge.contract.checkpoint import (
    CONFIG_FILE,
    DISTILLATION_FILE,
    TRANSFORMERS_CONFIG,
    model_folder,
    training_record_path,
)
from clip_rd_edge.errors import ClipRdEdgeError, InputError, UnreachableError, UsageError, first_line
from clip_rd_edge.models.load import read_open_clip_config
from clip_rd_edge.utils.paths import exists, is_file
from clip_rd_edge.utils.printable import shown_sources
from clip_rd_edge.utils.structs import read_json_objects

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

# By name: the hub's client has changed its HTTP library more than once.
_UNREACHABLE = {"TransportError", "ConnectionError", "OfflineModeIsEnabled"}
_UNAUTHORISED = (401, 403)


def push_folder(
    folder: Path, repo: str, *, private: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Upload a folder as one commit to a model repository, which is created if it does not exist; return its address.

    Files that the repository has already are not uploaded again, and those that the folder lacks stay in it. A text
    tower of Hugging Face, which the folder's configuration names by its path, is named by the repository there. The
    token is that of `hf auth login` or HF_TOKEN, the server that of HF_ENDPOINT.

    Args:
        folder: an export with `--layout huggingface`, a student, the folder of a run, or a bundle.
        repo: `ORG/NAME`.
        private: create the repository as private; one that exists keeps its visibility.
        revision: the branch, which is created from the main one if it does not exist; None is the main one.
        message: of the commit.

    Raises:
        InputError: the folder is none of these.
        UsageError: the name is invalid, or there is no token that may write there.
        UnreachableError: the hub cannot be reached.
        ClipRdEdgeError: the hub refuses the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    source = _model_folder(folder)
    api = HfApi(library_name="clip-rd-edge")
    try:
        created = api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            _make_branch(api, created.repo_id, revision)
        with _for_hub(source, created.repo_id) as published:
            api.upload_folder(
                repo_id=created.repo_id,
                folder_path=published,
                revision=revision,
                commit_message=message or f"Upload {source.name} with clip-rd-edge",
            )
    except HFValidationError as error:
        raise UsageError(
            f"{repo!r} is no name of a repository: {_first_sentence(error)}.", hint="ORG/NAME, or NAME for your own"
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(repo, error) from error
    except Exception as error:
        if _UNREACHABLE.isdisjoint(kind.__name__ for kind in type(error).__mro__):
            raise
        raise UnreachableError(
            f"The hub at {api.endpoint} could not be reached to upload {folder}: {str(error).rstrip('.')}.",
            hint="run the same command again; files that arrived are not uploaded again",
        ) from error
    return str(created)


@contextmanager
def _for_hub(source: Path, repo: str) -> Iterator[Path]:
    """Yield the folder as it may be published.

    Its configuration names the repository where it named the folder itself, for the text tower, and its record of
    training, which earlier versions wrote as it was, has no secret in the addresses of data.
    """
    changed = dict[str, Any]()
    config = read_open_clip_config(source) if is_file(source / CONFIG_FILE) else {}
    text_cfg = config.get("model_cfg", {}).get("text_cfg", {})
    own = {"hf_model_name": source / TRANSFORMERS_CONFIG, "hf_tokenizer_name": source / TOKENIZER}
    if renamed := {name: repo for name, path in own.items() if name in text_cfg and is_file(path)}:
        text_cfg.update(renamed)
        changed[CONFIG_FILE] = config
    record = read_json_objects(path) if (path := training_record_path(source)) else None
    if (shown := shown_sources(record)) != record:
        changed[DISTILLATION_FILE] = shown
    if not changed:
        yield source
        return
    with TemporaryDirectory() as folder:
        published = Path(folder) / source.name
        shutil.copytree(source, published, copy_function=_link)
        for name, content in changed.items():
            (published / name).unlink()
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (published / name).write_text(f"{text}\n", encoding="utf-8")
        yield published


def _link(source: str, target: str) -> None:
    try:
        Path(target).symlink_to(source)
    except OSError:  # file systems without links, and users of Windows without the right to make them
        shutil.copy2(source, target)


def _first_sentence(error: Exception) -> str:
    """Return the hub client's own reason; what follows is about its Python interface."""
    return str(error).partition(". ")[0].rstrip(".")


def _model_folder(folder: Path) -> Path:
    """Return the folder to upload; raise InputError if there is no model, since a wrong path must publish nothing."""
    source = model_folder(str(folder)) or folder
    if not exists(folder):
        raise InputError(
            f"The folder {folder} does not exist.", hint="pass the folder of an export, a student or a run"
        )
    if not any(is_file(source / name) for name in (CONFIG_FILE, MANIFEST)):
        raise InputError(
            f"{folder} holds no model: it has neither {CONFIG_FILE} nor {MANIFEST}.",
            hint="clip-rd-edge export MODEL --layout huggingface -o FOLDER makes one",
        )
    return source.resolve()  # its name is in the commit's message, and `.` has none


def _make_branch(api: HfApi, repo: str, name: str) -> None:
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        api.repo_info(repo, revision=name)
    except RevisionNotFoundError:
        api.create_branch(repo, branch=name, exist_ok=True)


def _refusal(repo: str, error: HfHubHTTPError) -> ClipRdEdgeError:
    status = getattr(error.response, "status_code", None)  # older clients may have no response
    if status in _UNAUTHORISED:
        return UsageError(
            f"The hub does not let you write to {repo} (status {status}).",
            hint="hf auth login with a token that may write, or set HF_TOKEN",
        )
    reason = (error.server_message or first_line(error)).rstrip(".")
    return ClipRdEdgeError(f"The hub refused the upload to {repo}: {reason}.")
