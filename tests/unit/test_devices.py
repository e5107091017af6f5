"""Which device a rank takes on machines with and without GPUs, good and bad; none is needed for it."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hvd_eurosat.cluster import device as devices
from hvd_eurosat.cluster import job, node
from hvd_eurosat.cluster.node import Place
from hvd_eurosat.cluster.world import World
from hvd_eurosat.diagnosis import checks
from hvd_eurosat.diagnosis.facts import Facts, Mpirun
from hvd_eurosat.errors import UserError
from hvd_eurosat.training import compilation
from hvd_eurosat.training.precision import choose_algorithms, precision_of

OLD = "The NVIDIA driver on your system is too old (found version 12020)"
KERNEL = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (root@host)\nGCC version: 12.3\n"
CORES = frozenset(range(64))

Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """machine(files, usable, reason, driver, chosen): so many GPUs in /dev, so many that torch can use, or why not."""

    def make(files: int, usable: int, reason: str = "", driver: str = "580.65.06", chosen: str | None = None) -> None:
        for number in range(files):
            (tmp_path / f"nvidia{number}").touch()
        (tmp_path / "nvidiactl").touch()
        (tmp_path / "version").write_text(KERNEL.format(driver))
        monkeypatch.setattr(devices, "FILES", tmp_path)
        monkeypatch.setattr(devices, "DRIVER", tmp_path / "version")
        monkeypatch.setattr(devices, "visible", lambda: (usable, reason))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_120"])
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if chosen is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)

    return make


@pytest.mark.parametrize(
    ("there", "wanted", "taken"),
    [
        ({"files": 0, "usable": 0}, "auto", "cpu"),
        ({"files": 8, "usable": 8}, "auto", "cuda:5"),
        ({"files": 8, "usable": 8}, "cuda", "cuda:5"),
        ({"files": 8, "usable": 1, "chosen": "3"}, "auto", "cuda:0"),  # each rank sees its own
        ({"files": 8, "usable": 8}, "cpu", "cpu"),
        ({"files": 8, "usable": 0, "reason": OLD, "driver": "535.104.05"}, "cpu", "cpu"),
        ({"files": 8, "usable": 0, "chosen": ""}, "auto", "cpu"),
        ({"files": 8, "usable": 0, "chosen": "-1"}, "auto", "cpu"),
        ({"files": 8, "usable": 0, "chosen": "NoDevFiles"}, "auto", "cpu"),
    ],
)
def test_the_device_of_a_rank(machine: Machine, there: dict[str, Any], wanted: str, taken: str) -> None:
    """The rank with local rank 5."""
    machine(**there)
    assert str(devices.choose(wanted, 5)) == taken


@pytest.mark.parametrize(
    ("there", "wanted", "words"),
    [
        ({"files": 0, "usable": 0}, "cuda", "has no NVIDIA GPU that this process may use; the cores do it with CUDA_"),
        ({"files": 8, "usable": 0, "chosen": ""}, "cuda", "has no NVIDIA GPU that this process may use; "),
        (
            {"files": 8, "usable": 0, "reason": OLD, "driver": "535.104.05", "chosen": "0,1"},
            "auto",
            f"has 8 NVIDIA GPUs, of which torch can use none (driver 535.104.05, torch for CUDA 13.0): {OLD}: install "
            "driver 580 or newer, or NVIDIA's cuda-compat package; the cores do it with CUDA_VISIBLE_DEVICES= (or "
            "--train.device cpu)",
        ),
        (
            {"files": 4, "usable": 0, "chosen": "7"},
            "auto",
            "has 4 NVIDIA GPUs, of which torch can use none with CUDA_VISIBLE_DEVICES=7 (driver 580.65.06, torch for "
            "CUDA 13.0): name GPUs that are there, or unset it; ",
        ),
        (
            {"files": 1, "usable": 0, "reason": "CUDA unknown error"},
            "auto",
            "has 1 NVIDIA GPU, of which torch can use none (driver 580.65.06, torch for CUDA 13.0): CUDA unknown "
            "error: look at nvidia-smi; a container needs --gpus all; ",
        ),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_an_error(
    machine: Machine, there: dict[str, Any], wanted: str, words: str
) -> None:
    machine(**there)
    with pytest.raises(UserError) as raised:
        devices.choose(wanted, 0)
    assert str(raised.value).startswith(f"{socket.gethostname()} {words}")


def test_a_cpu_build_of_torch_beside_gpus(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(files=2, usable=0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"can use none: it is a CPU build; launch/install\.sh brings the one for CUDA"):
        devices.choose("auto", 0)


def test_gpus_of_others_do_not_count(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's cgroup denies them; one whose driver does not answer does count."""
    machine(files=4, usable=0)
    really = os.open

    def open_(path: Any, *others: Any) -> int:
        if Path(path).name in ("nvidia1", "nvidia2"):
            raise PermissionError
        return really(path, *others)

    monkeypatch.setattr(os, "open", open_)
    assert devices.granted() == 2
    (tmp_path / "nvidia0").unlink()
    with socket.socket(socket.AF_UNIX) as unanswered:  # to open it is ENXIO, as to open a device without its driver
        monkeypatch.chdir(tmp_path)
        unanswered.bind("nvidia0")
        assert devices.granted() == 2
    for number in (0, 3):
        (tmp_path / f"nvidia{number}").unlink()
    assert str(devices.choose("auto", 0)) == "cpu"


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (8, 8)])
def test_the_ranks_that_a_machine_is_for(monkeypatch: pytest.MonkeyPatch, gpus: int, ranks: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    devices.visible.cache_clear()
    assert node.ranks_here() == ranks
    devices.visible.cache_clear()


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90"], False),  # V100
        ((7, 5), ["sm_75", "sm_80", "sm_90"], True),
        ((8, 9), ["sm_75", "sm_80", "sm_90a"], True),
        ((9, 0), ["sm_75", "sm_90a"], True),
        ((10, 0), ["sm_90", "sm_120"], False),
        ((10, 3), ["sm_90", "sm_100"], True),
        ((12, 1), ["sm_90", "compute_120"], True),
        ((6, 1), ["compute_75"], False),
    ],
)
def test_whether_torch_has_code_for_a_gpu(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    assert devices.has_code_for(capability, built) == runs


def test_a_gpu_that_is_too_old_for_torch(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(files=1, usable=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    with pytest.raises(UserError, match=r"no code for the Tesla V100, whose compute capability is 7\.0"):
        devices.choose("auto", 0)


def test_what_torch_says_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is not shown besides."""

    def unavailable() -> bool:
        warnings.warn(f"CUDA initialization: {OLD}. Please update your GPU driver (Triggered internally at x)")  # noqa: B028
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    devices.visible.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.visible() == (0, OLD)
    devices.visible.cache_clear()


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (
            [Place("a", CORES, "GPU-1", "0:1"), Place("a", CORES, "GPU-1", "0:1")],
            "2 ranks share 1 GPU of a: start one",
        ),
        (
            [Place("a", CORES, "MIG-1", "0:1"), Place("a", CORES, "MIG-2", "0:1")],
            "2 ranks share 1 GPU of a, of which MIG instances cannot train together: start one rank per GPU",
        ),
    ],
)
def test_ranks_that_share_a_gpu_are_refused(places: list[Place], words: str) -> None:
    with pytest.raises(UserError) as raised:
        node.check(places, len(places))
    assert str(raised.value).startswith(words)


def test_ranks_with_a_gpu_each_and_without_any_are_let_in() -> None:
    node.check([Place("a", CORES, f"GPU-{n}", f"0:{n}") for n in range(8)], 8)
    node.check([Place("a", CORES, "MIG-1", "0:1")], 1)
    node.check([Place("a", CORES)] * 2, 2)


def test_ranks_are_all_on_gpus_or_all_on_cores() -> None:
    gpu, cores = Place("a", CORES, "GPU-1", "0:1"), Place("b", CORES)
    assert node.alike([gpu, gpu]) is node.alike([cores, cores]) is None
    said = node.alike([gpu, gpu, cores])
    assert said
    assert said.startswith("rank 2 (b) of 3 has no GPU, which the others have: leave such hosts out, or train all on ")
    assert str(node.alike([gpu, cores, cores])).startswith("rank 1 (b) and 1 others of 3 have no GPU")


@pytest.mark.parametrize(("threads", "compilers"), [(3, "3"), (64, "8")])
def test_a_rank_has_few_compilers(threads: int, compilers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own number is 32 for each rank of a node."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(node, "threads", lambda _: threads)
    monkeypatch.setattr(node, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), threads=1)
    assert job._placed(world, "cpu").threads == threads
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == compilers


def test_a_gpu_wants_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    few = frozenset(range(8))
    (said,) = node.warnings([Place("a", few, f"GPU-{n}", f"0:{n}") for n in range(8)])
    assert said == "8 ranks with GPUs have 8 cores; 4 each are wanted: sbatch --cpus-per-task=8"
    assert not list(node.warnings([Place("a", few, "GPU-1", "0:1"), Place("a", few, "GPU-2", "0:2")]))
    assert not list(node.warnings([Place("a", few)] * 8))


@pytest.mark.parametrize(
    ("counted", "limit", "usage", "total"),
    [("", "memory.max", "memory.current", ""), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")],
)
def test_the_memory_that_a_job_or_a_container_leaves(
    counted: str, limit: str, usage: str, total: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By control groups of version 2 and 1; cached files make way."""
    job = tmp_path / counted / "slurm" / "job_1"
    job.mkdir(parents=True)
    (tmp_path / "own").write_text(f"1:{counted}:/slurm/job_1/step_0\n0:cpuset:/elsewhere\n")
    monkeypatch.setattr(node, "CGROUPS", tmp_path)
    monkeypatch.setattr(node, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))

    def may_have(folder: Path, most: str, has: int) -> None:
        (folder / limit).write_text(f"{most}\n")
        (folder / usage).write_text(f"{has}\n")
        (folder / "memory.stat").write_text(f"{total}inactive_file 50\n{total}active_file 30\nfile 200\n")

    assert (node.memory_limit(), node.available_memory()) == (None, 1000)
    may_have(tmp_path / counted, "max", 5000)
    assert (node.memory_limit(), node.available_memory()) == (None, 1000)
    may_have(tmp_path / counted, "3000", 2500)
    assert (node.memory_limit(), node.available_memory()) == (3000, 580)
    may_have(job, "900", 700)
    assert (node.memory_limit(), node.available_memory()) == (900, 280)
    may_have(job, "600", 700)
    assert (node.memory_limit(), node.available_memory()) == (600, 0)


def test_products_are_as_precise_as_they_are_called() -> None:
    """torch takes tf32 for convolutions unless it is told."""
    for name in ("tf32", "fp32", "tf32", "bf16"):
        assert precision_of(name, "fp32").name == name
        assert torch.backends.cudnn.allow_tf32 == (name == "tf32")
        assert torch.backends.cuda.matmul.allow_tf32 == (name == "tf32")
    assert precision_of("auto", "tf32").name == "tf32"
    precision_of("fp32", "fp32")


@pytest.mark.parametrize("deterministic", [False, True])
def test_algorithms_that_repeat(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, warn_only: asked.append((on, warn_only)))
    asked: list[tuple[bool, bool]] = []
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    filling: Any = torch.utils.deterministic
    fills = filling.fill_uninitialized_memory
    try:
        choose_algorithms(torch.device("cpu"), deterministic)
        assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == flags
        choose_algorithms(torch.device("cuda"), deterministic)
        assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (
            not deterministic,
            deterministic,
        )
        assert asked == [(True, True)] * deterministic
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = flags
        filling.fill_uninitialized_memory = fills


def facts(**given: Any) -> Facts:
    """Of a healthy host with four GPUs."""
    own, size = Mpirun("mpirun", "mpirun (Open MPI) 4.1.8"), 2**36
    healthy: dict[str, Any] = {
        "host": "a",
        "system": "Linux",
        "root": False,
        "versions": {"CUDA of torch": "13.0"},
        "libraries": {},
        "mpirun": own,
        "own_mpirun": own,
        "ssh": True,
        "nvidia_devices": 4,
        "driver": "580.65.06",
        "cuda_trouble": "",
        "gpus": ["NVIDIA H100"] * 4,
        "gpu": None,
        "cores": [0],
        "cores_given": 1,
        "memory": size,
        "memory_available": size,
        "open_files": 65536,
        "locked_memory": -1,
        "infiniband": True,
        "infiniband_usable": True,
        "shared_memory": size,
        "temporary": "/tmp",
        "temporary_writable": True,
        "interfaces": {},
        "settings": {},
    }
    return Facts(**healthy | given)


@pytest.mark.parametrize(
    ("given", "level", "what"),
    [
        ({}, None, ""),
        ({"gpus": [], "settings": {"CUDA_VISIBLE_DEVICES": ""}}, None, ""),
        (
            {"gpus": [], "cuda_trouble": OLD, "driver": "535.104.05"},
            "mend",
            f"4 NVIDIA devices here, of which torch sees 0 (driver 535.104.05): {OLD}",
        ),
        (
            {"gpus": ["NVIDIA H100"], "settings": {"CUDA_VISIBLE_DEVICES": "0,9"}},
            "mend",
            "2 NVIDIA devices in CUDA_VISIBLE_DEVICES=0,9, of which torch sees 1 (driver 580.65.06): driver or ",
        ),
        ({"cuda_trouble": "CUDA error: it is busy"}, "mend", "its GPU cannot be used: CUDA error: it is busy"),
        ({"infiniband_usable": False}, "warn", "InfiniBand that NCCL cannot use (no libibverbs.so.1, or no /dev/"),
        ({"infiniband_usable": False, "gpus": [], "nvidia_devices": 0}, None, ""),
    ],
)
def test_the_doctor_on_gpus(given: dict[str, Any], level: str | None, what: str) -> None:
    findings = list(checks.machine(facts(**given)))
    assert [finding.level for finding in findings] == [level] * bool(level)
    assert all(finding.what.startswith(what) for finding in findings)


@pytest.mark.parametrize(
    ("places", "shared"),
    [
        ([("a", "0"), ("a", "1"), ("b", "0")], []),
        ([("a", None), ("a", None)], []),
        ([("a", "0"), ("a", "1"), ("b", "0"), ("b", "0")], [("b", "2 ranks share 1 GPUs")]),
    ],
)
def test_the_doctor_on_ranks_that_share_a_gpu(
    places: list[tuple[str, str | None]], shared: list[tuple[str, str]]
) -> None:
    ranks = [facts(host=host, gpu=gpu, cores=[0, 1, 2, 3], cores_given=4) for host, gpu in places]
    assert [(one.where, one.what) for one in checks.across_ranks(ranks, len(ranks))] == shared


def test_compiling_for_gpus_wants_the_driver_where_triton_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[str]:
        raise AssertionError("libcuda.so cannot found!")

    monkeypatch.setattr(compilation, "_works", lambda *_: True)
    monkeypatch.setattr("triton.backends.nvidia.driver.libcuda_dirs", none)
    assert str(compilation._missing(torch.device("cuda"))).startswith(
        "libcuda.so.1 where Triton looks for it (ldconfig"
    )
    monkeypatch.setattr("triton.backends.nvidia.driver.libcuda_dirs", lambda: ["/usr/lib"])
    assert "libcuda" not in str(compilation._missing(torch.device("cuda")))
