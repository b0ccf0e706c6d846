"""Where the files of a saved model are: a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from surgery.errors import SourceError
from surgery.untrusted.documents import read_object
from surgery.untrusted.paths import check_inside, checked_file


class Store(ABC):
    """The files of one saved model."""

    @property
    @abstractmethod
    def label(self) -> str:
        """How the model is called in messages."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The local folder the files that were asked for lie in."""

    @property
    @abstractmethod
    def revision(self) -> str | None:
        """The commit the files belong to, or None for a local folder."""

    @property
    def caveat(self) -> str:
        """What to add where a file was not found: why it may be there after all."""
        return ""

    @abstractmethod
    def get(self, name: str) -> Path | None:
        """The local path of the file ``name``, fetched if needed; None where there is none.

        Raises:
            CheckpointError: it is no regular file, or a link that leads out of the folder.
        """

    @abstractmethod
    def names(self) -> list[str]:
        """The names of the files at hand, sorted."""

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in the file ``name``; None where there is no such file.

        Raises:
            CheckpointError: the file is not one JSON object, or is a link out of the folder.
        """
        path = self.get(name)
        return None if path is None else read_object(path, infinities=True)


@dataclass(frozen=True)
class LocalFolder(Store):
    """An existing folder."""

    path: Path

    @property
    def label(self) -> str:
        """See ``Store.label``."""
        return str(self.path)

    @property
    def folder(self) -> Path:
        """See ``Store.folder``."""
        return self.path

    @property
    def revision(self) -> str | None:
        """See ``Store.revision``."""
        return None

    def get(self, name: str) -> Path | None:
        """See ``Store.get``."""
        path = self.path / name
        if not path.exists() and not path.is_symlink():
            return None
        check_inside(path, self.path)
        checked_file(path)
        return path

    def names(self) -> list[str]:
        """See ``Store.names``."""
        return sorted(path.name for path in self.path.iterdir() if path.is_file())


@dataclass
class HubRepository(Store):
    """A repository of the hub; every file is fetched when asked for, all at one commit."""

    repository: str
    subfolder: str = ""
    requested: str | None = None
    _commit: str | None = field(default=None, init=False)
    _folder: Path | None = field(default=None, init=False)
    _offline: bool = field(default=False, init=False)

    @property
    def label(self) -> str:
        """See ``Store.label``."""
        return f"hub:{self.repository}" + (f"/{self.subfolder}" if self.subfolder else "")

    @property
    def folder(self) -> Path:
        """See ``Store.folder``."""
        if self._folder is None:
            raise SourceError(f"{self.label}: no file was fetched yet")
        return self._folder

    @property
    def revision(self) -> str | None:
        """See ``Store.revision``."""
        return self._commit

    @property
    def caveat(self) -> str:
        """See ``Store.caveat``."""
        if self._offline:
            return "; the hub cannot be reached, only the cache was searched"
        return f"; {self.label} may hold other files, in formats that are not asked for"

    def get(self, name: str) -> Path | None:
        """See ``Store.get``."""
        import huggingface_hub
        from huggingface_hub import errors

        try:
            fetched = cast("Any", huggingface_hub).hf_hub_download(
                self.repository,
                name,
                subfolder=self.subfolder or None,
                revision=self._commit or self.requested,
                local_files_only=self._offline,
            )
        except errors.LocalEntryNotFoundError as error:
            if self._folder is not None:
                # Another file of this commit is in the cache: what is not there may not exist.
                self._offline = True
                return None
            raise SourceError(
                f"{self.label}: {name} is not in the local cache and the hub cannot be reached",
                hint="check the network, or load a folder that holds the files",
            ) from error
        except errors.EntryNotFoundError:
            return None
        except errors.HFValidationError as error:
            raise SourceError(f"{self.label} is no repository id: {error}") from None
        except errors.GatedRepoError as error:
            raise SourceError(
                f"{self.label} is gated",
                hint="ask for access on its page, then run `hf auth login`",
            ) from error
        except errors.RevisionNotFoundError as error:
            raise SourceError(f"{self.label} has no revision {self.requested!r}") from error
        except errors.RepositoryNotFoundError as error:
            raise SourceError(
                f"{self.label}: no such repository, or it is private",
                hint="check the id; for a private repository run `hf auth login`",
            ) from error
        except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
            raise SourceError(f"{self.label}: the hub cannot be reached: {error}") from error
        return self._remember(Path(fetched))

    def _remember(self, path: Path) -> Path:
        # The cache lays files out as snapshots/<commit>/<subfolder>/<name>.
        self._folder = path.parent
        depth = len(Path(self.subfolder).parts) if self.subfolder else 0
        self._commit = path.parents[depth].name
        return path

    def names(self) -> list[str]:
        """See ``Store.names``."""
        # Only what was fetched: asking the hub for the rest can fail in ways that would hide the
        # error these names are listed in.
        return sorted(path.name for path in self.folder.iterdir())
