"""Where the storage of a manifest lies on this machine.

`pvc://CLAIM/path` is `DIR/path` with `--volume CLAIM=DIR`, else `./volumes/CLAIM/path`; `file://`
is for local runs only. Relative paths start at the current directory.
"""

import difflib
import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from cptjob_api.storage import Storage
from cptjob_trainer.errors import MissingInputError, UsageError


class Volumes:
    """Claims and the directories that stand for them here."""

    def __init__(self, directories: Mapping[str, Path], base: Path) -> None:
        self._directories = dict(directories)
        self._base = base

    @classmethod
    def parse(cls, options: Iterable[str], base: Path | None = None) -> "Volumes":
        """From `CLAIM=DIR` words. Raises UsageError, or MissingInputError for a directory."""
        base = base or Path.cwd()
        directories: dict[str, Path] = {}
        for option in options:
            claim, equals, directory = option.partition("=")
            if not (claim and equals and directory):
                raise UsageError(f"--volume {option}: write --volume CLAIM=DIR")
            if claim in directories:
                raise UsageError(f"--volume {claim}: given twice")
            path = (base / Path(directory).expanduser()).absolute()
            if not path.is_dir():
                raise MissingInputError(f"--volume {option}: {path} is not a directory")
            directories[claim] = path
        return cls(directories, base)

    def check_claims(self, uris: Iterable[str]) -> None:
        """Refuse directories for claims that none of a manifest's `uris` names. UsageError."""
        places = (Storage.parse(uri) for uri in uris)
        claims = sorted({storage.place for storage in places if storage.scheme == "pvc"})
        for claim in sorted(self._directories.keys() - set(claims)):
            near = difflib.get_close_matches(claim, claims, n=1)
            known = (
                f"did you mean {near[0]}?" if near else f"it names {', '.join(claims) or 'none'}"
            )
            raise UsageError(f"--volume {claim}: the manifest names no such claim; {known}")

    def locate(self, uri: str) -> Path:
        """The path that ``uri`` stands for, there or not. Raises ConfigError for a remote one."""
        return Path(os.path.normpath(Storage.parse(uri).local(self._directories, self._base)))

    def locate_input(self, field: str, uri: str) -> Path:
        """`locate` for something that must be there; ``field`` names it in the message."""
        path = self.locate(uri)
        try:
            path.stat()
        except OSError as error:
            raise MissingInputError(self._explain(field, uri, path, error)) from error
        return path

    def _explain(self, field: str, uri: str, path: Path, error: OSError) -> str:
        here = f"{field}: {uri} is {path} here"
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            return f"{here}, which cannot be read: {error.strerror}; check its permissions"
        storage = Storage.parse(uri)
        if storage.scheme != "pvc":
            advice = "put it there or correct the path"
        elif storage.place in self._directories:
            advice = f"put it there, or correct the path or --volume {storage.place}"
        else:
            advice = f"put it there or give --volume {storage.place}=DIR"
        return f"{here}, and there is no such path; {advice}"
