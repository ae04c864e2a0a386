"""Build the project's images with docker, podman or buildah, whichever is here.

    python deploy/images.py [operator] [trainer] [--tool podman] [--base-image IMAGE] [--tag TAG]
                            [-- FLAGS OF THE TOOL]

The way to the package index that pip is set up with here (an index of one's own, a company's
certificate) is given to the build as a secret: it leaves no trace in an image.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "requirements"))

from uv import pip_settings  # noqa: E402

TOOLS = {
    "docker": ("docker", "build"),
    "podman": ("podman", "build", "--format", "oci"),
    "buildah": ("buildah", "build", "--format", "oci", "--layers"),
}
IMAGES = ("operator", "trainer")
# Settings of pip that tell where packages come from; the others are of this machine alone.
INDEX = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "default-timeout")
CA = "/run/secrets/ca"


def find_tool() -> str | None:
    """The first tool that is here and can build."""
    return next((name for name in TOOLS if shutil.which(name) and _answers(name)), None)


def _answers(tool: str) -> bool:
    """docker is often a client whose engine is not there."""
    return subprocess.run([tool, "info"], capture_output=True).returncode == 0


def pip_file(settings: Mapping[str, str], has_ca: bool) -> str:
    """pip's configuration inside of the build."""
    told = {name: " ".join(settings[name].split()) for name in INDEX if name in settings}
    if has_ca:
        told["cert"] = CA
    return "\n".join(["[global]", *(f"{name} = {value}" for name, value in told.items()), ""])


def command(
    tool: str,
    image: str,
    *,
    tag: str,
    revision: str,
    secrets: Mapping[str, Path],
    base_image: str | None = None,
    flags: Sequence[str] = (),
) -> list[str]:
    """What builds an image. `secrets`: files that the build may read and no image holds, by id."""
    arguments = {"VERSION": version(), "REVISION": revision}
    if base_image:
        arguments["BASE_IMAGE"] = base_image
    return [
        *TOOLS[tool],
        *("--file", f"deploy/Containerfile.{image}"),
        *("--tag", f"cptjob/{image}:{tag}"),
        *(part for item in arguments.items() for part in ("--build-arg", "=".join(item))),
        *(part for id_, file in secrets.items() for part in ("--secret", f"id={id_},src={file}")),
        *flags,
        ".",
    ]


def version() -> str:
    """The project's version; it is the default tag of the images too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def revision() -> str:
    """The commit that is built, marked when files differ from it."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return told.stdout.strip() or "unknown"


def parse() -> argparse.Namespace:
    own, flags = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, flags = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("images", nargs="*", help="operator, trainer; both when none is named")
    parser.add_argument("--tool", choices=TOOLS, help="the first that is here")
    parser.add_argument("--base-image", help="an image with Python 3.11 or newer")
    parser.add_argument("--tag", default=version(), help="of the images: %(default)s")
    options = parser.parse_args(own)
    options.flags = flags
    unknown = [name for name in options.images if name not in IMAGES]
    if unknown:
        parser.error(f"no image is named {unknown[0]}; there are {', '.join(IMAGES)}")
    return options


def main() -> int:
    options = parse()
    tool = options.tool or find_tool()
    if tool is None:
        print("none of docker, podman and buildah is here and works", file=sys.stderr)
        return 69
    with tempfile.TemporaryDirectory(prefix="cptjob-images-") as folder:
        secrets = {"pip": Path(folder) / "pip.conf"}
        settings = pip_settings()
        ca = os.environ.get("SSL_CERT_FILE") or settings.get("cert")
        if ca:
            secrets["ca"] = Path(ca)
        secrets["pip"].write_text(pip_file(settings, bool(ca)), encoding="utf-8")
        for image in options.images or IMAGES:
            built = subprocess.run(
                command(
                    *(tool, image),
                    tag=options.tag,
                    revision=revision(),
                    secrets=secrets,
                    base_image=options.base_image,
                    flags=options.flags,
                ),
                cwd=ROOT,
            )
            if built.returncode:
                return built.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
