"""The image of docker/Dockerfile, used as its user without privileges."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.conftest import data as data
from tests.parallel.conftest import small, summary
from tests.system.image import Image

pytestmark = pytest.mark.timeout(1800)  # the first waits for the image


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


def test_it_has_the_libraries_of_infiniband(image: Image) -> None:
    """NCCL opens them as it starts, and in silence takes TCP where they are not."""
    libraries = ("libibverbs.so.1", "librdmacm.so.1", "libmlx5.so.1")  # the last is a driver's, of those that are many
    opened = image.run("python", "-c", f"import ctypes; list(map(ctypes.CDLL, {libraries}))")
    assert opened.returncode == 0, opened.stderr


def test_its_entry_point(image: Image) -> None:
    assert "python -m hvd_eurosat.<verb>" in image.run("--help").stdout
    assert "--train.epochs" in image.run("train", "--help").stdout
    assert image.run("echo", "any program").stdout == "any program\n"
    no_sshd = image.run("env", "PATH=/usr/bin:/bin", *image.config["Entrypoint"], "node", entry=False)
    assert no_sshd.returncode != 0
    assert "error: no sshd: build with EXTRAS=openssh-server\n" in no_sshd.stderr


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
    """Ranks start through the container's sshd, here its own."""
    script = """
mkdir -p ~/.ssh && cd ~/.ssh && ssh-keygen -q -t ed25519 -N '' -f id_ed25519 && cp id_ed25519.pub authorized_keys
printf 'Host *\\n Port 2222\\n StrictHostKeyChecking no\\n LogLevel ERROR\\n' > config
cd - >/dev/null
docker/entrypoint.sh node & node=$!
until ssh -o BatchMode=yes 127.0.0.1 true; do kill -0 $node || exit 1; sleep 0.2; done
timeout 240 launch/mpirun.sh --hosts 127.0.0.1:2 sh -c 'echo rank $OMPI_COMM_WORLD_RANK'
status=$?
kill $node
exit $status
"""
    job = image.run("sh", "-c", script)
    assert job.returncode == 0, job.stdout + job.stderr
    assert sorted(job.stdout.split("\n")[:2]) == ["rank 0", "rank 1"]
