"""docker/Dockerfile, built by buildah on a Debian base."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.system.hosts import Job

ROOT = Path(__file__).parents[2]
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PIP = Path("/etc/pip.conf")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


class Image:
    """The built image, in a store of its own, and a container of it."""

    def __init__(self, folder: Path) -> None:
        self._store = ("--root", str(folder / "root"), "--runroot", str(folder / "run"))
        self._make_base(folder / "debian.tar")
        arguments = ("--build-arg=BASE=localhost/base", "--build-arg=EXTRAS=openssh-server")
        build = ("bud", "--format=docker", *arguments, "--file=docker/Dockerfile")
        self.buildah(*build, f"--volume={CACHE}:/cache", "--tag=hvd_eurosat", str(ROOT))
        self._container = self.buildah("from", "hvd_eurosat").stdout.strip()
        self.config = json.loads(self.buildah("inspect", self._container).stdout)["Docker"]["config"]

    def _make_base(self, archive: Path) -> None:
        """Debian, and this machine's way to a package index."""
        options = ("--quiet", "--variant=minbase", "--dpkgopt=force-unsafe-io")  # the last as in Debian's own image
        subprocess.run(["mmdebstrap", *options, "bookworm", archive], check=True)
        base = self.buildah("from", "scratch").stdout.strip()
        self.buildah("add", base, str(archive), "/")
        self.buildah("copy", base, str(CERTIFICATES), "/host.crt")
        if PIP.exists():
            self.buildah("copy", base, str(PIP), "/etc/")
        variables = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_"))}
        variables |= {"PIP_CERT": "/host.crt", "SSL_CERT_FILE": "/host.crt"}
        self.buildah("config", *(f"--env={name}={value}" for name, value in variables.items()), base)
        self.buildah("commit", "--rm", base, "base")
        archive.unlink()

    def buildah(self, *words: str, check: bool = True) -> Job:
        """A finished buildah command."""
        environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
        words = ("buildah", *self._store, *words)
        job = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1200, check=False)
        assert job.returncode == 0 or not check, f"{job.stdout[-4000:]}\n{job.stderr[-4000:]}"
        return job

    def run(self, *words: object, options: tuple[str, ...] = (), entry: bool = True) -> Job:
        """As `docker run`: the entry point with these words, or these words alone."""
        entry_point = self.config["Entrypoint"] if entry else []
        return self.buildah("run", *options, self._container, "--", *entry_point, *map(str, words), check=False)

    def size(self) -> float:
        """Gigabytes."""
        images = json.loads(self.buildah("images", "--json", "hvd_eurosat").stdout)
        return float(images[0]["size"].split()[0])

    def remove(self) -> None:
        """Containers and images."""
        self.buildah("rm", "--all", check=False)
        self.buildah("rmi", "--all", "--force", check=False)
