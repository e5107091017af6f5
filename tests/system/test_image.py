"""docker/Dockerfile, built by buildah on a Debian base, and used as its user without privileges."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parallel.conftest import data as data
from tests.parallel.conftest import small, summary
from tests.system.conftest import ROOT, need
from tests.system.hosts import Job

pytestmark = pytest.mark.timeout(1800)
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


class Image:
    """The built image, in a store of its own, and a container of it."""

    def __init__(self, folder: Path) -> None:
        self._store = ("--root", str(folder / "root"), "--runroot", str(folder / "run"))
        self._make_base(folder / "debian")
        build = ("bud", "--format=docker", "--build-arg=BASE=localhost/base", "--file=docker/Dockerfile")
        self.buildah(*build, f"--volume={CACHE}:/cache", "--tag=hvd_eurosat", str(ROOT))
        self._container = self.buildah("from", "hvd_eurosat").stdout.strip()
        self.config = json.loads(self.buildah("inspect", self._container).stdout)["Docker"]["config"]

    def _make_base(self, folder: Path) -> None:
        """Debian, and this machine's way to a package index."""
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", folder], check=True, stdout=subprocess.DEVNULL)
        shutil.copy(CERTIFICATES, folder / "host.crt")
        if (pip := Path("/etc/pip.conf")).exists():
            shutil.copy(pip, folder / "etc")
        base = self.buildah("from", "scratch").stdout.strip()
        self.buildah("copy", base, str(folder), "/")
        variables = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_"))}
        variables |= {"PIP_CERT": "/host.crt", "SSL_CERT_FILE": "/host.crt"}
        self.buildah("config", *(f"--env={name}={value}" for name, value in variables.items()), base)
        self.buildah("commit", "--rm", base, "base")
        shutil.rmtree(folder)

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


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    need("buildah", "debootstrap")
    folder = tmp_path_factory.mktemp("image")
    try:
        built = Image(folder)
        yield built
        built.remove()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_what_is_in_it(image: Image) -> None:
    assert image.config["User"] == "trainer"
    assert set(image.config["Volumes"]) == {"/data", "/runs"}
    assert image.config["Labels"]["org.opencontainers.image.version"]
    assert image.config["Healthcheck"]["Test"][0] == "CMD"
    assert image.run(*image.config["Healthcheck"]["Test"][1:], entry=False).returncode == 0
    search = (
        "find / -xdev ( -name nvcc -o -name g++ -o -name cc1plus -o -name setup.log -o -path /opt/venv/build ) -print"
    )
    assert image.run(*search.split(), entry=False, options=("--user=root",)).stdout == ""
    assert image.run("id", "-u").stdout == "1000\n"
    assert image.size() < 7


def test_its_entry_point(image: Image) -> None:
    assert "python -m hvd_eurosat.<verb>" in image.run("--help").stdout
    assert "--train.epochs" in image.run("train", "--help").stdout
    assert image.run("echo", "any program").stdout == "any program\n"
    assert "build with EXTRAS" in image.run("node").stderr


def test_the_doctor_passes_in_it(image: Image) -> None:
    job = image.run("launch/mpirun.sh", "--np", 2, "doctor")
    assert job.returncode == 0, job.stdout + job.stderr
    assert "to be mended: nothing" in job.stdout


def test_training_in_it(image: Image, data: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    # buildah, unlike docker, lays the image's own /data and /runs over what is mounted there.
    volumes = (f"--volume={data}:/mnt/data:ro", f"--volume={tmp_path}:/mnt/runs")
    flags = small(Path("/mnt/data"), Path("/mnt/runs/small"), train__epochs=1, data__cache_dir="/tmp/packed")
    job = image.run("launch/mpirun.sh", "--np", 2, "train", *flags, options=volumes)
    assert job.returncode == 0, job.stdout + job.stderr
    assert summary(tmp_path / "small")["world_size"] == 2


def test_a_node_of_several(image: Image) -> None:
    """With an sshd in it: ranks start through the container's sshd, here its own."""
    install = "apt-get update && apt-get install --yes --no-install-recommends openssh-server"
    job = image.run("sh", "-c", install, options=("--user=root",), entry=False)
    assert job.returncode == 0, job.stderr
    script = """
mkdir -p ~/.ssh && cd ~/.ssh && ssh-keygen -q -t ed25519 -N '' -f id_ed25519 && cp id_ed25519.pub authorized_keys
printf 'Host *\\n Port 2222\\n StrictHostKeyChecking no\\n LogLevel ERROR\\n' > config
cd - >/dev/null
docker/entrypoint.sh node & node=$!
sleep 2
timeout 60 launch/mpirun.sh --hosts 127.0.0.1:2 python -c 'import os; print("rank", os.environ["OMPI_COMM_WORLD_RANK"])'
status=$?
kill $node
exit $status
"""
    job = image.run("sh", "-c", script)
    assert job.returncode == 0, job.stdout + job.stderr
    assert sorted(job.stdout.split("\n")[:2]) == ["rank 0", "rank 1"]
