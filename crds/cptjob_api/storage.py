"""Where things lie: `pvc://CLAIM/path`, `s3://BUCKET/prefix`, `hf://ORG/NAME`, `file://PATH`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, cast

from cptjob_trainer.errors import ConfigError

Scheme = Literal["pvc", "s3", "hf", "file"]

# Go's RE2 and Python's re read these alike; the CRD's rules hold the same text.
PATTERNS: dict[str, str] = {
    "pvc": r"^pvc://[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?(/.*)?$",
    "s3": r"^s3://[a-z0-9][-a-z0-9.]{1,61}[a-z0-9](/.*)?$",
    "hf": r"^hf://[A-Za-z0-9][-A-Za-z0-9_.]{0,95}/[A-Za-z0-9][-A-Za-z0-9_.]{0,95}$",
    "file": r"^file://.+$",
}
# What is named to a person: s3:// and hf:// have their form, and cannot be read yet (unsupported.py).
FORMS = "pvc://CLAIM/path, or file:///path in a local run"


@dataclass(frozen=True)
class Storage:
    """A storage URI, taken apart.

    `place` is the claim, the bucket or the organisation ("" for file). `path` has no leading slash,
    but for an absolute file.
    """

    scheme: Scheme
    place: str
    path: str

    def __str__(self) -> str:
        if self.scheme == "file":
            return f"file://{self.path}"
        return f"{self.scheme}://{self.place}/{self.path}".rstrip("/")

    def __truediv__(self, name: str) -> "Storage":
        """The same place, one folder or file further down."""
        return Storage(self.scheme, self.place, str(PurePosixPath(self.path) / name))

    @classmethod
    def parse(cls, uri: str) -> "Storage":
        """Take a URI apart. Raises ConfigError that names the forms."""
        if not is_storage_uri(uri):
            raise ConfigError(f"{uri!r} is not a storage URI; write {FORMS}, without '..' in it")
        scheme, _, rest = uri.partition("://")
        if scheme == "file":
            return cls("file", "", rest)
        place, _, path = rest.partition("/")
        return cls(cast(Scheme, scheme), place, path.strip("/"))

    def local(self, volumes: Mapping[str, Path], base: Path) -> Path:
        """The directory on this machine.

        A claim is found in `volumes`, else in `volumes/CLAIM` under `base`; a relative file starts
        at `base`. Raises ConfigError for what is not on this machine.
        """
        if self.scheme == "file":
            return base / self.path
        if self.scheme == "pvc":
            return volumes.get(self.place, base / "volumes" / self.place) / self.path
        raise ConfigError(f"{self}: {self.scheme}:// cannot be read yet; copy it to a volume first")


def is_storage_uri(uri: str) -> bool:
    """True for one of the four forms without a way out of its place."""
    known = any(re.fullmatch(pattern, uri) for pattern in PATTERNS.values())
    return known and ".." not in uri.split("/")
