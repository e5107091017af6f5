"""What errors of Horovod, NCCL and CUDA mean, in one line with the cure."""

from __future__ import annotations

import ctypes
import os
import re
import sys

LOST = "lost the other ranks"  # the one that failed has said why
INTERFACE = "name the network that all hosts share by launch/mpirun.sh --interface (NCCL_SOCKET_IFNAME)"
MORE = "NCCL_DEBUG=INFO says more; doctor looks at the machines"
CURES = (  # the first that is found in the words
    (r"Duplicate GPU|same GPU/Partition", "one rank per GPU; MIG instances of one GPU cannot train together"),
    (r"no socket interface|No route|unreachable|Connection (refused|timed out)|connect to .* failed", INTERFACE),
    (r"shared memory|/dev/shm|No space left", "a larger /dev/shm: docker run --shm-size=1g, or --ipc=host"),
    (r"dlopen libcuda", "the driver's libcuda.so.1 is not found: docker run --gpus all, or ldconfig with its folder"),
    (r"driver version is insufficient|driver .*too old", "install a driver for this torch's CUDA; doctor names both"),
    (r"no kernel image|invalid device function", "this torch has no code for that GPU: install one for an older CUDA"),
    (r"device selection", "all ranks on GPUs, or all on cores: --train.device cpu"),
    (r"\bIPC\b|cuMem.*peer|peer access", "let each rank see all GPUs of its node: srun --gpu-bind=none"),
    (r"out of memory", "smaller batches (train.batch_size, valid.batch_size); nvidia-smi says who else is on the GPU"),
    (r"invalid device ordinal|busy or unavailable", "nvidia-smi says who is on the GPU, and in which compute mode"),
    (r"\bECC\b|uncorrectable|hardware|unspecified launch|fallen off", "look for Xid in dmesg; leave that host out"),
    (r"remote process|network error|system error|internal error", MORE),
)
OF_THE_DEVICE = re.compile("CUDA|cuda[A-Z]|cuDNN|CUDNN|cuBLAS|CUBLAS|NCCL|nccl|NVIDIA|NVML|libcuda|device selection")
ADVICE = re.compile(r" \(run with NCCL_DEBUG| CUDA kernel errors| For debugging| If reserved but| Search for `")
SOURCE = re.compile(r"\[/[^]]*\] *")  # a line of Gloo's
SHUT_DOWN = "Horovod has been shut down"


def explain(error: BaseException) -> str | None:
    """The words of an error of the device or between the ranks, with its cure, in a line; None for any other.

    LOST stands for what another rank has said before.
    """
    words = " ".join(str(error).split())
    from_horovod = type(error).__name__ == "HorovodInternalError"
    if not OF_THE_DEVICE.search(words):
        return _lost(words) if from_horovod else None
    if not isinstance(error, RuntimeError):
        return None
    words = ADVICE.split(words)[0]
    if from_horovod and (last := last_of_nccl()):
        words = f"{words}: {last}"
    cure = next((cure for pattern, cure in CURES if re.search(pattern, words, re.IGNORECASE)), None)
    if cure is None and not from_horovod:
        return None  # perhaps a mistake of the program: the traceback is wanted
    return f"{words.rstrip('. ')}: {cure or MORE}"


def _lost(words: str) -> str:
    """Gloo and MPI say which connection it was, Horovod nothing of use."""
    return LOST if SHUT_DOWN in words else f"{LOST} ({SOURCE.sub('', words)})"


def last_of_nccl() -> str:
    """The last warning of NCCL in this process, which tells what its status does not; "" where there is none."""
    try:
        library = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        library.ncclGetLastError.argtypes, library.ncclGetLastError.restype = [ctypes.c_void_p], ctypes.c_char_p
        said: bytes = library.ncclGetLastError(None) or b""
    except (OSError, AttributeError):
        return ""
    return " ".join(said.decode(errors="replace").split())


def say(text: str) -> None:
    """A message on standard error in one write, which launchers that label each rank's words keep together."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
