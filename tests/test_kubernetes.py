"""scripts/kubernetes: the manifests have the form that the training operator asks for, and give a
container what train/launch.py reads.

The form is that of kubeflow.org/v1 as far as the manifests use it, written down from the operator's
API reference (pytorch_types.go, common_types.go, pytorch_validation.go) and Kubernetes' core/v1. No
cluster has seen them.
"""

import os
import re
import shlex
import socket
import subprocess
import sys
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from tests.runs import ROOT, arguments, make_world

FOLDER = ROOT / "scripts/kubernetes"
JOBS = ("pytorchjob.yaml", "torchrun.yaml")
Name = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|[KMGTPE]i?)?$")]


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Form):
    name: Name


class Variable(Form):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str  # a number without quotes is refused


class Port(Form):
    name: Name
    containerPort: int = Field(ge=1, le=65535)


class Resources(Form):
    requests: dict[str, Quantity | int] = {}
    limits: dict[str, Quantity | int] = {}


class Mount(Form):
    name: Name
    mountPath: Annotated[str, StringConstraints(pattern="^/")]


class Container(Form):
    name: Literal["pytorch"]  # which the operator looks for
    image: str = Field(min_length=1)
    workingDir: str
    command: list[str]
    args: list[str]
    env: list[Variable]
    ports: list[Port]
    resources: Resources
    volumeMounts: list[Mount]


class Claim(Form):
    claimName: Name


class EmptyDir(Form):
    medium: Literal["", "Memory"] = ""
    sizeLimit: Quantity | None = None


class Volume(Form):
    name: Name
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


class Security(Form):
    runAsUser: int
    runAsGroup: int
    fsGroup: int


class Pod(Form):
    terminationGracePeriodSeconds: int
    securityContext: Security
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume]


class Template(Form):
    spec: Pod


class Replica(Form):
    replicas: int = Field(ge=1)
    restartPolicy: Literal["Always", "OnFailure", "Never", "ExitCode"]
    template: Template


class Master(Replica):
    replicas: Literal[1]


class Replicas(Form):
    Master: Master
    Worker: Replica | None = None


class RunPolicy(Form):
    cleanPodPolicy: Literal["All", "Running", "None"]
    backoffLimit: int | None = Field(None, ge=0)


class Spec(Form):
    runPolicy: RunPolicy
    pytorchReplicaSpecs: Replicas


class PyTorchJob(Form):
    apiVersion: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: Metadata
    spec: Spec


class ClaimSpec(Form):
    accessModes: list[Literal["ReadWriteMany"]]  # the pods are on several nodes
    resources: Resources


class VolumeClaim(Form):
    apiVersion: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


def documents(name):
    return list(yaml.safe_load_all((FOLDER / name).read_text("utf-8")))


def job_of(name):
    (found,) = [one for one in documents(name) if one["kind"] == "PyTorchJob"]
    return PyTorchJob.model_validate(found)


def pods(name):
    replicas = job_of(name).spec.pytorchReplicaSpecs
    return [one for one in (replicas.Master, replicas.Worker) if one is not None]


@pytest.mark.parametrize("name", JOBS)
def test_a_manifest_has_the_form_that_the_operator_asks_for(name):
    forms = {"PyTorchJob": PyTorchJob, "PersistentVolumeClaim": VolumeClaim}
    for document in documents(name):
        forms[document["kind"]].model_validate(document)


@pytest.mark.parametrize("name", JOBS)
def test_every_pod_is_like_the_others_and_has_what_it_mounts(name):
    templates = [replica.template for replica in pods(name)]
    assert all(template == templates[0] for template in templates)
    pod, (container,) = templates[0].spec, templates[0].spec.containers
    assert {mount.name for mount in container.volumeMounts} == {v.name for v in pod.volumes}
    shared = {volume.emptyDir.medium for volume in pod.volumes if volume.emptyDir}
    assert shared == {"Memory"}  # for the loader's workers
    (claimed,) = [v.persistentVolumeClaim for v in pod.volumes if v.persistentVolumeClaim]
    claims = [one["metadata"]["name"] for one in documents(JOBS[0]) if "accessModes" in one["spec"]]
    assert [claimed.claimName] == claims
    # A port of this name is where the operator makes MASTER_PORT of.
    assert [port.name for port in container.ports] == ["pytorchjob-port"]
    assert container.resources.limits["nvidia.com/gpu"]


def test_there_is_time_to_save():
    """As much as the templates of SLURM give (scripts/slurm); torchrun gives a little less."""
    for name in JOBS:
        for replica in pods(name):
            assert replica.template.spec.terminationGracePeriodSeconds >= 180
            (container,) = replica.template.spec.containers
            given = {variable.name: variable.value for variable in container.env}
            wait = int(given.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 0))
            assert wait < replica.template.spec.terminationGracePeriodSeconds
            assert (wait > 120) == (name == "torchrun.yaml")


def test_restarts_follow_the_exit_codes():
    """ExitCode: 1 to 127 end the job, 128 and above start the pod again."""
    from train.stopping import SIGNALS

    assert {replica.restartPolicy for replica in pods("pytorchjob.yaml")} == {"ExitCode"}
    assert all(128 + number >= 128 for number in SIGNALS)
    # torchrun's code says nothing, so how often is limited.
    assert {replica.restartPolicy for replica in pods("torchrun.yaml")} == {"OnFailure"}
    assert job_of("torchrun.yaml").spec.runPolicy.backoffLimit


def by_the_operator(name, rank, port):
    """What the operator and the manifest give the pod of this rank."""
    (container,) = pods(name)[0].template.spec.containers
    total = sum(replica.replicas for replica in pods(name))
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONUNBUFFERED": "0"}
    given |= {"WORLD_SIZE": str(total), "RANK": str(rank)}
    return given | {variable.name: variable.value for variable in container.env}


def test_each_pod_starts_an_entry_with_its_own_arguments(monkeypatch, tmp_path):
    from train.config import FullRun, LoraRun, load

    (container,) = pods("pytorchjob.yaml")[0].template.spec.containers
    assert container.command == ["python", "train/lora.py"]  # no shell: it hears SIGTERM itself
    config = load(LoraRun, container.args)
    assert str(config.data.cache) == "/atelier/cache" and str(config.output).startswith("/atelier/")
    (container,) = pods("torchrun.yaml")[0].template.spec.containers
    words = shlex.split(container.args[0])
    entry = words.index("train/full.py")
    assert words[:2] == ["exec", "torchrun"] and load(FullRun, words[entry + 1 :])
    assert f"--nnodes={sum(replica.replicas for replica in pods('torchrun.yaml'))}" in words
    gpus = container.resources.limits["nvidia.com/gpu"]
    assert f"--nproc-per-node={gpus}" in words


def test_torchruns_line_is_one_that_torchrun_takes():
    from torch.distributed.run import get_args_parser

    (container,) = pods("torchrun.yaml")[0].template.spec.containers
    words = shlex.split(re.sub(r'"\$(\w+)"', "1", container.args[0]))
    read = get_args_parser().parse_args(words[2:])
    assert read.training_script == "train/full.py" and read.node_rank == 1


def test_the_dockerfile_makes_what_the_job_starts():
    text = (FOLDER / "Dockerfile").read_text("utf-8")
    copied = set(re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE))
    for word in " ".join(copied).split():
        assert word == "." or (ROOT / word).exists(), word
    (container,) = pods("pytorchjob.yaml")[0].template.spec.containers
    assert f"WORKDIR {container.workingDir}" in text and "ENV PATH=/app/.venv/bin" in text


@pytest.mark.slow
def test_two_pods_train_together_and_a_mistake_ends_both(tmp_path):
    """With the environment that they would have, on one machine without GPUs."""
    world = make_world(tmp_path / "world")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(*overrides):
        values = arguments(world, tmp_path / "run", "train.steps=2", "preview.every=0", *overrides)
        own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pods_ = [
            subprocess.Popen(
                [sys.executable, "train/lora.py", *values],
                cwd=ROOT,
                env=os.environ
                | by_the_operator("pytorchjob.yaml", rank, port)
                | own
                # Two of the four.
                | {"WORLD_SIZE": "2", "HF_HOME": str(tmp_path)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        said = [pod.communicate(timeout=300)[0] for pod in pods_]
        return [pod.returncode for pod in pods_], said

    codes, said = start("train.steps=0")
    assert codes == [2, 2], said
    codes, said = start()
    assert codes == [0, 0], said
    assert (tmp_path / "run/adapter/pytorch_lora_weights.safetensors").is_file()
