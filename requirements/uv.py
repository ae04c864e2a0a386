"""Run uv with the pip settings of this machine, which uv does not read by itself.

Behind a mirror or a company's certificate pip is usually set up already. What it is told, in its
files or in PIP_*, is passed on wherever uv's own variable is not set.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# pip's name, uv's variable, what joins several values
SETTINGS = [
    ("index-url", "UV_DEFAULT_INDEX", " "),
    ("extra-index-url", "UV_INDEX", " "),
    ("no-index", "UV_NO_INDEX", " "),
    ("find-links", "UV_FIND_LINKS", ","),
    ("trusted-host", "UV_INSECURE_HOST", " "),
    ("cert", "SSL_CERT_FILE", " "),
    ("proxy", "ALL_PROXY", " "),
    ("timeout", "UV_HTTP_TIMEOUT", " "),
    ("default-timeout", "UV_HTTP_TIMEOUT", " "),
]


def pip_settings() -> dict[str, str]:
    """What pip is told on this machine, by the names of its options."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    found = dict(line.split("=", 1) for line in listing.splitlines() if "=" in line)
    settings: dict[str, str] = {}
    for section in ("global.", "install.", ":env:."):  # the last one wins, as in pip
        for key, value in found.items():
            if key.startswith(section):
                settings[key.removeprefix(section)] = ast.literal_eval(value)
    return settings


def environment(given: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    """The environment for uv: what is given wins over what pip is told."""
    result = dict(given)
    for name, variable, separator in SETTINGS:
        if name in settings:
            result.setdefault(variable, separator.join(settings[name].split()))
    # Like newer pip: trust what the system trusts.
    result.setdefault("UV_SYSTEM_CERTS", "1")
    return result


def main() -> int:
    uv = Path(sys.executable).with_name("uv")
    return subprocess.run(
        [uv, *sys.argv[1:]], env=environment(os.environ, pip_settings())
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
