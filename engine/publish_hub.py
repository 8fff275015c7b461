"""A model hub, through huggingface_hub: the token, one commit, and that commit downloaded into an empty cache.

The token is held by the object and goes nowhere but into requests: it stands in no message, no representation and no
variable of the environment, which it is taken out of.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from engine.errors import ConfigError, ExitCode, RunError
from engine.publish_compare import MADE_BY_HUBS
from engine.text import clean

INSTALL: Final = "pip install 'kdconsole[publish]'"
LOGIN: Final = "make a token with write access in the hub's settings, then run `hf auth login`, or set HF_TOKEN"
VARIABLES: Final = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
MAIN: Final = "main"
_REPO: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_NETWORK: Final = ("httpx", "httpcore", "requests", "urllib3")
"""Packages whose exceptions, whatever they are called in a version, mean that no answer came."""
_MOST_CAUSES: Final = 10
_MOST_REMARKS: Final = 10
_HIDDEN: Final = "[token]"


class HubError(RunError):
    """The hub refused, or answered something else than what was asked for."""


class HubUnreachable(HubError):
    """No answer came, or one that says to come back later."""

    exit_code = ExitCode.CONNECTION


@dataclass(frozen=True)
class Commit:
    """What a publication became."""

    id: str
    url: str


@dataclass(frozen=True)
class Ready:
    """A repository that takes a commit."""

    parent: str
    """Its last commit."""
    others: tuple[str, ...]
    """Files there that the publication does not have."""


def checked_repo(text: str) -> str:
    """ORG/NAME as an operator gives it.

    Raises:
        ConfigError: it is none.
    """
    if not _REPO.fullmatch(text) or ".." in text or "--" in text or text.endswith((".git", ".ipynb")):
        raise ConfigError(
            f"--repo {clean(repr(text), 200)}: no name of a repository",
            expected="ORG/NAME: letters, digits and ._- in both, as on the hub",
        )
    return text


def checked_revision(text: str) -> str:
    """The name of a branch.

    Raises:
        ConfigError: it is none, or that of a commit.
    """
    if not _REVISION.fullmatch(text) or ".." in text or _COMMIT.fullmatch(text) or text.startswith("refs/"):
        raise ConfigError(f"--revision {clean(repr(text), 200)}: no name of a branch", expected="one such as v1")
    return text


def take_token() -> tuple[str | None, str]:
    """The token, and where it was found: HF_TOKEN or huggingface_hub's own store. Takes it out of the environment.

    Raises:
        ConfigError: huggingface_hub is not installed.
    """
    os.environ["HF_XET_CHUNK_CACHE_SIZE_BYTES"] = "0"  # what comes back shall come from the hub
    try:
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars
        from huggingface_hub.utils import logging as hub_logging
    except ImportError:
        raise ConfigError("publishing to a hub needs the package huggingface_hub", do=INSTALL) from None
    disable_progress_bars()
    hub_logging.set_verbosity(logging.CRITICAL)  # its lines quote the hub, and say again what its errors say
    given = any(os.environ.get(name) for name in VARIABLES)
    token = huggingface_hub.get_token()
    forget_token()
    return token, "" if token is None else "HF_TOKEN" if given else "huggingface_hub's store"


def forget_token() -> None:
    """Takes the token out of this process's environment, which every child would be given."""
    for name in VARIABLES:
        os.environ.pop(name, None)


class Hub:
    """One repository of the hub.

    Args:
        token: of `take_token`.
        repo: ORG/NAME, of `checked_repo`.

    Raises:
        HubError: there is no token, or huggingface_hub is told to stay offline.
    """

    def __init__(self, token: str | None, repo: str) -> None:
        from huggingface_hub import HfApi, constants

        self._endpoint = str(constants.ENDPOINT).rstrip("/")
        self.host = clean(urlsplit(self._endpoint).hostname or self._endpoint, 200)
        if constants.HF_HUB_OFFLINE:
            raise HubError(
                f"hub {self.host}: HF_HUB_OFFLINE is set, and so nothing can be sent",
                do="unset it, or publish into a directory with --to DIR",
            )
        if token is None:
            raise HubError(f"hub {self.host}: there is no token", do=LOGIN)
        self._token, self._repo = token, repo
        self.remarks: list[str] = []
        """What the library warned of, safe to print."""
        self._api = HfApi(token=token, library_name="kdconsole")

    def __repr__(self) -> str:
        return f"Hub({self.host!r}, {self._repo!r})"

    def prepare(self, names: frozenset[str], *, private: bool, revision: str) -> Ready:
        """Makes the repository and the branch if they are missing, and looks at what is there.

        Args:
            names: of the files that are to be published.
            private: makes a new repository private.
            revision: the branch.

        Raises:
            HubError: the hub refuses; the repository is public although `private` is asked for.
            HubUnreachable: it cannot be reached.
        """
        with self._told("cannot make the repository"):
            self._api.create_repo(self._repo, private=True if private else None, exist_ok=True)
            if revision != MAIN:
                self._api.create_branch(self._repo, branch=revision, exist_ok=True)
            info = self._api.repo_info(self._repo, revision=revision)
            parent = self._commit_id(info.sha)
            there = self._api.list_repo_files(self._repo, revision=parent)
        if private and info.private is False:
            raise HubError(
                f"hub {self.host}: {self._repo} is public, and --private makes only a new repository private",
                do="change it in its settings on the hub, or choose another --repo",
            )
        others = sorted(clean(name, 200) for name in there if name not in names and name not in MADE_BY_HUBS)
        return Ready(parent, tuple(others))

    def upload(
        self, directory: Path, names: frozenset[str], ready: Ready, message: str, description: str, revision: str
    ) -> Commit:
        """Sends files as one commit on top of the one that was looked at; what is there already is not sent again.

        Args:
            directory: where the files are.
            names: of the files.
            ready: of `prepare`; its other files are removed by the same commit.
            message: of the commit.
            description: of the commit, below the message.
            revision: the branch.

        Raises:
            HubError, HubUnreachable: as those of `prepare`; nothing became visible.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(directory / name)) for name in sorted(names)),
            *(CommitOperationDelete(path_in_repo=name) for name in ready.others),
        ]
        with self._told("the upload failed"):
            done = self._api.create_commit(
                self._repo,
                operations,
                commit_message=message,
                commit_description=description,
                revision=revision,
                parent_commit=ready.parent,
            )
            commit = self._commit_id(done.oid)
        return Commit(commit, f"{self._endpoint}/{self._repo}/tree/{commit}")

    def download(self, commit: Commit, cache: Path) -> Path:
        """Downloads one commit into an empty cache; returns the directory.

        Raises:
            HubError, HubUnreachable: as those of `prepare`.
        """
        with self._told(f"commit {commit.id} stands there, and cannot be downloaded again"):
            return Path(self._api.snapshot_download(self._repo, revision=commit.id, cache_dir=str(cache)))

    def _commit_id(self, value: object) -> str:
        if not isinstance(value, str) or not _COMMIT.fullmatch(value):
            raise HubError(f"hub {self.host}: answers no commit", expected="40 hexadecimal digits")
        return value

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Makes one line of whatever the library raises; nothing of its own exceptions goes on."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                yield
                return
            except RunError:
                raise
            except Exception as error:  # noqa: BLE001 - what the library raises is not one class, and may hold requests
                told = self._error(what, error)
            finally:  # some quote the hub, which is not to be trusted with a terminal
                said = (str(each.message) for each in caught if issubclass(each.category, UserWarning))
                self.remarks += [self.clean(text, 500) for text in said][: _MOST_REMARKS - len(self.remarks)]
        raise told from None

    def _error(self, what: str, error: BaseException) -> HubError:
        where = f"hub {self.host}: {self._repo}: {what}"
        causes = _causes(error)
        answers = [answer for each in causes if (answer := getattr(each, "response", None)) is not None]
        status = next((code for each in answers if isinstance(code := getattr(each, "status_code", None), int)), None)
        said = next((text for each in causes if isinstance(text := getattr(each, "server_message", None), str)), None)
        if status is not None:
            kind, do = _ANSWERS.get(status, (HubError, "look at what the hub says, then publish again"))
            if status in (408, 429) or status >= 500:
                kind, do = HubUnreachable, "publish again later; what was sent is not sent again"
            words = f"{where}: {status}" + (f": {self.clean(said, 200)}" if said else "")
            return kind(words, do=do)
        if any(type(each).__name__ == "OfflineModeIsEnabled" for each in causes):
            return HubError(f"{where}: huggingface_hub is offline", do="unset HF_HUB_OFFLINE")
        reason = self.clean(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", 300)
        network = any(
            isinstance(each, (ConnectionError, TimeoutError)) or type(each).__module__.startswith(_NETWORK)
            for each in causes
        )
        if network or isinstance(error, OSError):
            do = "check the connection, then publish again; what was sent is not sent again"
            return HubUnreachable(f"{where}: {reason}", do=do)
        return HubError(f"{where}: {reason}", do="look at what it says, then publish again")

    def clean(self, text: str, limit: int) -> str:
        """A text of the library or the hub, safe to print, and without the token."""
        return clean(text.replace(self._token, _HIDDEN), limit)


_ANSWERS: Final[Mapping[int, tuple[type[HubError], str]]] = {
    401: (HubError, f"the token is not accepted: {LOGIN}"),
    403: (HubError, "this token may not write there: use one with write access, or choose another --repo"),
    404: (HubError, "there is no such repository or branch, or this token may not see it: check --repo and the token"),
    409: (HubError, "it was changed meanwhile, or is being changed: publish again"),
    412: (HubError, "it was changed meanwhile: publish again"),
}


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in found and len(found) < _MOST_CAUSES:
        found.append(each)
        each = each.__cause__ or each.__context__
    return found
