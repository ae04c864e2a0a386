"""The project's images, built from its Containerfiles and brought into a store of containerd.

`python -m testnodes.images` does it ahead of the tests: building needs the package index, and the
nodes have no way out. A node's store is a copy of this one (`copy_store`).

BASE_IMAGE names the image to build on; without it, one is made of Debian packages.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from testnodes.needs import FREE_GB, NeedError, check, check_space
from testnodes.node import PAUSE_IMAGE
from testplane import binaries
from testplane.daemon import Daemon

ROOT = Path(__file__).parents[3]
NAMES = [f"{image}:{version('cptjob')}" for image in ("operator", "trainer")]

#: What pods name, and the image of buildah's that it is.
IMAGES = {
    **{f"docker.io/cptjob/{each}": f"localhost/cptjob/{each}" for each in NAMES},
    PAUSE_IMAGE: PAUSE_IMAGE,
}
BASE = "localhost/cptjob-test-base"
# As the Containerfiles ask of a base.
PACKAGES = "python3,python3-venv,python3-dev,ca-certificates"
CONTENT = "io.containerd.content.v1.content/blobs/sha256"
FLAGS = ("--isolation", "chroot", "--network", "host")
START_SECONDS = 60.0


def folder() -> Path:
    return binaries.cache_folder().with_name("nodes")


def store() -> Path:
    """containerd's data with all images in it; raises NeedError when it was not made."""
    found = folder() / "store"
    if not (folder() / "complete").is_file():
        raise NeedError(f"{found} is not complete: run `make e2e`, which builds the images")
    return found


def main() -> int:
    try:
        check()
        build()
        fill_store()
    except (NeedError, binaries.ToolError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


# --- building ---


def build() -> None:
    """Builds what changed; raises NeedError when the build fails."""
    here = _ids()
    if not any(name.startswith("localhost/cptjob/trainer:") for name in here):
        check_space(Path("/var/lib"), FREE_GB)
    base = os.environ.get("BASE_IMAGE") or _own_base(here)
    flags = ["--tool", "buildah", "--base-image", base, "--", *FLAGS]
    _do([sys.executable, str(ROOT / "deploy" / "images.py"), *flags], "building the images")
    pause = binaries.find(["inside"])["pause"]
    _do(
        ["buildah", "build", "--quiet", "--tag", PAUSE_IMAGE, "--file", "-", str(pause.parent)],
        "building the pause image",
        'FROM scratch\nCOPY pause /pause\nUSER 65535:65535\nENTRYPOINT ["/pause"]\n',
    )


def _own_base(here: dict[str, str]) -> str:
    if f"{BASE}:latest" in here:
        return BASE
    root = folder() / "base"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    release = _release()
    bootstrap = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", release, str(root)]
    _do(bootstrap, f"making a base image of Debian {release}")
    for cache in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / cache)
        (root / cache / "partial").mkdir(parents=True)
    _do(
        ["buildah", "build", "--quiet", "--tag", BASE, "--file", "-", str(root)],
        "packing it",
        "FROM scratch\nCOPY . /\n",
    )
    shutil.rmtree(root)
    return BASE


def _release() -> str:
    """The Debian release of this machine, which its package mirror has."""
    for line in Path("/etc/os-release").read_text("utf-8").splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    raise NeedError("no Debian release in /etc/os-release; set BASE_IMAGE to an image with Python")


def _ids() -> dict[str, str]:
    """Ids of buildah's images, by name."""
    listing = subprocess.run(
        ["buildah", "images", "--json"], capture_output=True, text=True, check=True
    ).stdout
    return {name: each["id"] for each in json.loads(listing) for name in each.get("names") or []}


def _do(command: list[str], what: str, stdin: str | None = None) -> None:
    """Runs it with its output shown. Raises NeedError."""
    started = time.monotonic()
    print(f"{what} ...", flush=True)
    done = subprocess.run(command, input=stdin, text=True, stdout=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise NeedError(f"{what} failed ({done.returncode}): {' '.join(command)}")
    print(f"{what}: {time.monotonic() - started:.0f} s", flush=True)


# --- the store ---


def fill_store() -> None:
    """Brings those images into it that are not there in their newest form."""
    ids = _ids()
    wanted = {name: ids[built] for name, built in IMAGES.items()}
    mark = folder() / "complete"
    if mark.is_file() and json.loads(mark.read_text()) == wanted:
        return
    known = json.loads(mark.read_text()) if mark.is_file() else {}
    mark.unlink(missing_ok=True)
    state = folder() / "state"
    state.mkdir(parents=True, exist_ok=True)
    settings = folder() / "containerd.toml"
    socket = state / "containerd.sock"
    settings.write_text(
        f'version = 2\nroot = "{folder() / "store"}"\nstate = "{state}"\n'
        f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\naddress = "{socket}"\n'
    )
    log = folder() / "containerd.log"
    daemon = Daemon("containerd", ["containerd", "--config", str(settings)], log)
    daemon.start()
    try:
        _until(socket.exists, daemon)
        for name, id_ in wanted.items():
            if known.get(name) != id_:
                _import(name, IMAGES[name], socket)
    finally:
        daemon.stop()
    mark.write_text(json.dumps(wanted))


def _until(happened: Callable[[], bool], daemon: Daemon) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not happened():
        daemon.check()
        if time.monotonic() > deadline:
            raise NeedError(f"{daemon.name} does not answer; see {daemon.log}")
        time.sleep(0.05)


def _import(name: str, built: str, socket: Path) -> None:
    """Brings an image over. What the store has already is neither packed nor unpacked again."""
    layout, content = folder() / "layout", folder() / "store" / CONTENT
    shutil.rmtree(layout, ignore_errors=True)
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    known = {path.name for path in content.glob("*")}
    for digest in known:
        (blobs / digest).hardlink_to(content / digest)
    _do(["buildah", "push", "--quiet", built, f"oci:{layout}:{name}"], f"packing {name}")
    new = [path for path in blobs.iterdir() if path.name not in known]
    started = time.monotonic()
    ctr = ["ctr", f"--address={socket}", "--namespace=k8s.io", "images", "import", "-"]
    with subprocess.Popen(ctr, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        with tarfile.open(fileobj=process.stdin, mode="w|") as tar:
            for path in (layout / "oci-layout", layout / "index.json", *new):
                tar.add(path, path.relative_to(layout))
        process.communicate()
    shutil.rmtree(layout)
    if process.returncode != 0:
        raise NeedError(f"containerd did not take {name} ({process.returncode})")
    print(f"unpacking {name}: {time.monotonic() - started:.0f} s", flush=True)


def copy_store(target: Path) -> None:
    """A store of a node's own. Files that are never written again are shared, as hard links."""
    shutil.copytree(store(), target, symlinks=True, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> str:
    if source.endswith(".db"):
        return str(shutil.copy2(source, target))
    os.link(source, target, follow_symlinks=False)
    return target


if __name__ == "__main__":
    sys.exit(main())
