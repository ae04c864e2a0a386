"""Write what is made from the types, or check that it is not stale.

python -m cptjob_api.generate [--check]
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from cptjob_api import crd, reference
from cptjob_api.job import GROUP, PLURAL

ROOT = Path(__file__).resolve().parents[2]
GENERATED: dict[str, Callable[[], str]] = {
    f"crds/{GROUP}_{PLURAL}.yaml": crd.text,
    "docs/cptjob.md": reference.text,
}


def stale(root: Path) -> list[str]:
    """Generated files under `root` that are not what the types say now."""
    return [
        name
        for name, make in GENERATED.items()
        if not (root / name).is_file() or (root / name).read_text(encoding="utf-8") != make()
    ]


def write(root: Path) -> None:
    """Write every generated file."""
    for name, make in GENERATED.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(make(), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 when `--check` finds a stale file."""
    parser = argparse.ArgumentParser(prog="python -m cptjob_api.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="look only, and exit 1 when stale")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.check:
        write(options.root)
        return 0
    found = stale(options.root)
    for name in found:
        print(f"{name} is stale: run `make generate`", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
