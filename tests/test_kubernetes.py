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
VOLUME = "volume.yaml"
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


class HelperContainer(Form):
    name: Name
    image: str
    command: list[str]
    volumeMounts: list[Mount]


class HelperSpec(Form):
    restartPolicy: Literal["Never"]
    securityContext: Security
    containers: list[HelperContainer] = Field(min_length=1)
    volumes: list[Volume]


class Helper(Form):
    apiVersion: Literal["v1"]
    kind: Literal["Pod"]
    metadata: Metadata
    spec: HelperSpec


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
    """The only thing in the file: what else were there would be deleted with the job."""
    (found,) = documents(name)
    return PyTorchJob.model_validate(found)


def claim():
    (found,) = documents(VOLUME)
    return VolumeClaim.model_validate(found)


def pods(name):
    replicas = job_of(name).spec.pytorchReplicaSpecs
    return [one for one in (replicas.Master, replicas.Worker) if one is not None]


def test_each_manifest_holds_one_thing_of_the_form_that_is_asked_for():
    """Fails where two jobs have one name, or the volume is deleted with a job."""
    assert claim().metadata.name == "atelier"
    (helper,) = documents("files.yaml")
    names = [job_of(name).metadata.name for name in JOBS]
    assert len({*names, Helper.model_validate(helper).metadata.name}) == 3


def test_the_volume_is_filled_by_a_pod_like_those_of_the_jobs():
    (helper,) = documents("files.yaml")
    pod = Helper.model_validate(helper).spec
    job = pods(JOBS[0])[0].template.spec
    assert pod.securityContext == job.securityContext
    assert pod.containers[0].image == job.containers[0].image
    (volume,) = pod.volumes
    assert volume.persistentVolumeClaim == Claim(claimName=claim().metadata.name)
    assert {mount.mountPath for mount in pod.containers[0].volumeMounts} == {"/atelier"}


def test_the_page_goes_on_with_the_job_that_the_manifest_makes():
    """Applied over a job that has ended, a manifest does nothing."""
    page = (ROOT / "docs/cluster.md").read_text("utf-8")
    for name in JOBS:
        again = f"kubectl delete pytorchjob {job_of(name).metadata.name} && kubectl apply -f "
        assert f"{again}scripts/kubernetes/{name}" in (FOLDER / name).read_text("utf-8")
    assert f"kubectl delete pytorchjob {job_of(JOBS[0]).metadata.name} && kubectl apply" in page
    assert "kubectl delete -f" not in page and "kubectl delete pvc" not in page


@pytest.mark.parametrize("name", JOBS)
def test_every_pod_is_like_the_others_and_has_what_it_mounts(name):
    templates = [replica.template for replica in pods(name)]
    assert all(template == templates[0] for template in templates)
    pod, (container,) = templates[0].spec, templates[0].spec.containers
    assert {mount.name for mount in container.volumeMounts} == {v.name for v in pod.volumes}
    shared = {volume.emptyDir.medium for volume in pod.volumes if volume.emptyDir}
    assert shared == {"Memory"}  # for the loader's workers
    (claimed,) = [v.persistentVolumeClaim for v in pod.volumes if v.persistentVolumeClaim]
    assert claimed.claimName == claim().metadata.name
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
    from train.stopping import SIGNALS, Interrupted

    assert {replica.restartPolicy for replica in pods("pytorchjob.yaml")} == {"ExitCode"}
    assert {Interrupted(number).code for number in SIGNALS} == {129, 130, 138, 143}
    page = (ROOT / "docs/cluster.md").read_text("utf-8")
    assert "| 143, 138 | asked to end" in page  # by the node, by a queue; the others are a person's
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
    copied = re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE)
    assert copied[-1] == "."
    for word in " ".join(copied).split():
        assert word == "." or (ROOT / word).exists(), word
    # Installed without the packages that pyproject.toml names, it would not be.
    assert text.index("COPY . .") < text.index("--editable .")
    (container,) = pods("pytorchjob.yaml")[0].template.spec.containers
    assert f"WORKDIR {container.workingDir}" in text and "ENV PATH=/app/.venv/bin" in text


def test_the_dockerfile_installs_what_the_project_needs():
    text = (FOLDER / "Dockerfile").read_text("utf-8")
    (program,) = re.findall(r"python -c '(.*)' > needed.txt", text)
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "torch>=" in said.stdout and len(said.stdout.splitlines()) > 10


def test_the_image_is_made_without_what_lies_in_the_working_tree():
    """Fails where the image would have another machine's environment, or somebody's runs."""
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    left_out = {line.removeprefix("**/") for line in lines if not line.startswith("#")}
    ignored = (ROOT / ".gitignore").read_text("utf-8").split()
    assert {name.strip("/") for name in ignored} | {".git"} <= left_out
    shipped = {"README.md", "LICENSE", "pyproject.toml", "train", "data", "configs", "docs"}
    assert not left_out & shipped


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
