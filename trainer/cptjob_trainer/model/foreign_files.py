"""What lies in the place of a model: encrypted, compressed, in another format. Told by the name and
the first bytes.
"""

from pathlib import Path

from cptjob_trainer.errors import DataError, MissingInputError

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar", ".zst", ".gz")
_OTHER_FORMATS = {
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".onnx": "ONNX",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".nemo": "NeMo",
}
_ENCRYPTED = {
    b"age-encryption.org/": "age",
    b"-----BEGIN AGE": "age",
    b"-----BEGIN PGP": "PGP",
    b"Salted__": "openssl",
}
_ENCRYPTED_SUFFIXES = (".age", ".gpg", ".pgp", ".asc", ".enc", ".crypt")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}


def head(path: Path) -> bytes:
    """The first bytes of a file. Raises MissingInputError."""
    try:
        with path.open("rb") as file:
            return file.read(32)
    except OSError as error:
        raise MissingInputError(
            f"{path}: cannot be read: {error.strerror}; check its permissions"
        ) from error


def ends(name: str, suffixes: tuple[str, ...]) -> bool:
    """True when a name ends so, in whatever case."""
    return name.lower().endswith(suffixes)


def encrypted(path: Path) -> DataError | None:
    """An encrypted file may have kept its name, so what it starts with decides."""
    start = head(path)
    found = [kind for magic, kind in _ENCRYPTED.items() if start.startswith(magic)]
    if not found and not ends(path.name, _ENCRYPTED_SUFFIXES):
        return None
    how = f" ({found[0]})" if found else ""
    return DataError(f"{path}: the model is encrypted{how}; decrypt it first")


def compressed(start: bytes) -> str | None:
    """The name of the compression that a file begins with."""
    return next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)


def instead_of_directory(path: Path) -> DataError:
    """A file where a directory is needed; most likely an archive."""
    fault = encrypted(path)
    if fault is not None:
        return fault
    if compressed(head(path)) or ends(path.name, _ARCHIVES):
        return DataError(
            f"{path}: the model is compressed; unpack it and name the directory with config.json"
        )
    return _other_format(path) or DataError(
        f"{path}: a file; name the directory that holds config.json and the weights"
    )


def among(path: Path, names: list[str]) -> DataError | None:
    """The first file of a directory that is a model in another form."""
    for name in names:
        if ends(name, _ARCHIVES):
            return DataError(
                f"{path / name}: the model is compressed; unpack it into this directory"
            )
        fault = _other_format(path / name)
        if fault is not None:
            return fault
    return None


def _other_format(path: Path) -> DataError | None:
    kind = _OTHER_FORMATS.get(path.suffix.lower())
    if kind is None:
        return None
    return DataError(
        f"{path}: the model is in {kind} format; convert it to a Hugging Face directory with "
        "safetensors and name that"
    )
