"""launch/k8s/mpijob.yaml against the operator's schema, as far as we use it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

# kubeflow/mpi-operator, API kubeflow.org/v2beta1: name -> type, allowed values, or fields; a trailing * is required.
REPLICAS: dict[str, Any] = {
    "replicas": int,
    "restartPolicy": {"Never", "OnFailure", "Always", "ExitCode"},
    "template*": dict,  # a pod's, checked below
}
MPIJOB: dict[str, Any] = {
    "apiVersion*": {"kubeflow.org/v2beta1"},
    "kind*": {"MPIJob"},
    "metadata*": {"name*": str, "namespace": str, "labels": dict, "annotations": dict},
    "spec*": {
        "slotsPerWorker": int,
        "launcherCreationPolicy": {"AtStartup", "WaitForWorkersReady"},
        "mpiImplementation": {"OpenMPI", "Intel", "MPICH"},
        "runLauncherAsWorker": bool,
        "sshAuthMountPath": str,
        "runPolicy": {
            "cleanPodPolicy": {"", "All", "Running", "None"},
            "ttlSecondsAfterFinished": int,
            "activeDeadlineSeconds": int,
            "backoffLimit": int,
            "schedulingPolicy": dict,
            "suspend": bool,
        },
        "mpiReplicaSpecs*": {"Launcher*": REPLICAS, "Worker*": REPLICAS},
    },
}
POD: dict[str, Any] = {
    "containers*": list,
    "volumes": list,
    "securityContext": {"runAsUser": int, "fsGroup": int},
}
PROBE: dict[str, Any] = {
    "exec*": {"command*": list},
    "periodSeconds": int,
    "timeoutSeconds": int,
    "failureThreshold": int,
}
CONTAINER: dict[str, Any] = {
    "name*": str,
    "image*": str,
    "command": list,
    "args": list,
    "resources": {"limits": dict, "requests": dict},
    "volumeMounts": list,
    "startupProbe": PROBE,
    "livenessProbe": PROBE,
}


def problems(value: Any, schema: Any, path: str = "") -> list[str]:
    """What does not fit, by its path."""
    if isinstance(schema, set):
        return [] if value in schema else [f"{path}: {value!r} is not one of {sorted(schema)}"]
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{path}: {value!r} is not {schema.__name__}"]
    if not isinstance(value, dict):
        return [f"{path}: {value!r} is not a mapping"]
    known = {name.rstrip("*"): fields for name, fields in schema.items()}
    found = [f"{path}.{name[:-1]}: missing" for name in schema if name.endswith("*") and name[:-1] not in value]
    for name, inner in value.items():
        place = f"{path}.{name}"
        found += problems(inner, known[name], place) if name in known else [f"{place}: unknown"]
    return found


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    path = Path(__file__).parents[2] / "launch" / "k8s" / "mpijob.yaml"
    return dict(yaml.safe_load(path.read_text()))


def test_it_fits_the_schema(job: dict[str, Any]) -> None:
    assert problems(job, MPIJOB) == []
    for name, replicas in job["spec"]["mpiReplicaSpecs"].items():
        pod = replicas["template"]["spec"]
        assert problems(pod, POD, name) == []
        for container in pod["containers"]:
            assert problems(container, CONTAINER, name) == []
            assert all(isinstance(word, str) for key in ("command", "args") for word in container.get(key, []))
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_numbers_fit_together(job: dict[str, Any]) -> None:
    slots, replicas = job["spec"]["slotsPerWorker"], job["spec"]["mpiReplicaSpecs"]
    (launcher,), (worker,) = (replicas[name]["template"]["spec"]["containers"] for name in ("Launcher", "Worker"))
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == slots
    assert launcher["command"][launcher["command"].index("-np") + 1] == str(slots * replicas["Worker"]["replicas"])
    assert launcher["image"] == worker["image"]
    assert "recipes/gpu.toml" in launcher["args"]


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (("spec", "slotsPerWorker"), "8", ".spec.slotsPerWorker: '8' is not int"),
        (("spec", "slotPerWorker"), 8, ".spec.slotPerWorker: unknown"),
        (("spec", "mpiImplementation"), "openmpi", ".spec.mpiImplementation: 'openmpi' is not one of "),
        (("spec", "mpiReplicaSpecs", "Worker"), {"replicas": 2}, ".spec.mpiReplicaSpecs.Worker.template: missing"),
    ],
)
def test_the_schema_finds_mistakes(job: dict[str, Any], place: tuple[str, ...], value: object, problem: str) -> None:
    broken: dict[str, Any] = copy.deepcopy(job)
    inner = broken
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    assert any(found.startswith(problem) for found in problems(broken, MPIJOB))


def test_the_probes_ask_for_the_run_that_is_started(job: dict[str, Any]) -> None:
    (launcher,) = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"]
    recipe = launcher["args"][launcher["args"].index("--config") + 1]
    for kind in ("startupProbe", "livenessProbe"):
        *_, module, verb, run = launcher[kind]["exec"]["command"]
        assert (module, verb, run) == ("hvd_eurosat.report", "status", f"runs/{Path(recipe).stem}")
