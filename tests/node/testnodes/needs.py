"""What a machine must have to run real nodes. `python -m testnodes.needs` installs it (Debian, root)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

CNI = Path("/usr/lib/cni")  # where Debian's package puts the plugins
#: A program or file that is needed, and the Debian package that has it.
NEEDS = {
    "containerd": "containerd",
    "runc": "runc",
    str(CNI / "bridge"): "containernetworking-plugins",
    "iptables": "iptables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
}
FREE_GB = 25  # the images in buildah's store, once in containerd's, and on the way between them


class NeedError(Exception):
    """Something that real nodes need is not here; the message says what and how to get it."""


def missing() -> list[str]:
    """The Debian packages of what is not here."""
    return sorted({package for need, package in NEEDS.items() if shutil.which(need) is None})


def check() -> None:
    """Raises NeedError."""
    if os.geteuid() != 0:
        raise NeedError("real nodes need root: namespaces, mounts and cgroups; run it with sudo")
    if lacking := missing():
        packages = " ".join(lacking)
        raise NeedError(f"real nodes need {packages}: apt-get install {packages}")


def check_space(folder: Path, needed: float) -> None:
    """Raises NeedError when fewer than `needed` GB are free."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < needed:
        raise NeedError(f"{folder} has {free:.0f} GB free; the images need {needed:.0f} GB there")


def main() -> int:
    lacking = missing()
    if lacking and os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"installing {' '.join(lacking)}", flush=True)
        # No service is to be started: each node starts its own containerd.
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        install = ["apt-get", "install", "--quiet=2", "--yes", "--no-install-recommends", *lacking]
        for command in (["apt-get", "update", "--quiet=2"], install):
            subprocess.run(command, env=environment, check=False)
    try:
        check()
    except NeedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
