# A GPU node's image. BASE_IMAGE is NVIDIA's PyTorch container of NGC, which brings torch, Transformer Engine and
# apex built against each other (the package called `apex` in the Python registry is another project):
#   docker build --build-arg BASE_IMAGE=<NGC PyTorch image>:25.10-py3 -t lopd_megatron .
# Linted in the tests; not built by the project's own CI, which has no container engine.
ARG BASE_IMAGE
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}

WORKDIR /opt/lopd_megatron
COPY pyproject.toml README.md LICENSE ./
COPY lopd_megatron lopd_megatron
COPY recipes recipes
COPY tools tools
COPY slurm slurm

# The container's constraints keep its own torch. vLLM lives in an environment of its own: its wheel is built
# against another torch, and the offline programs share nothing with training but files.
RUN pip install --no-cache-dir --no-build-isolation . \
 && python -m venv /opt/rollout \
 && /opt/rollout/bin/pip install --no-cache-dir ".[gpu]"

# hadolint ignore=DL3064
ENV CUDA_DEVICE_MAX_CONNECTIONS=1 \
    TOKENIZERS_PARALLELISM=false
