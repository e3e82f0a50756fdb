# shellcheck shell=bash
# Environment of every job of this project: the one file to edit for a cluster. Sourced in the checkout.
# Secrets (HF_TOKEN, WANDB_API_KEY) reach a job from the environment of whoever submits it. Never write one here.

# Python: the checkout's virtual environment, unless the job runs in a container. `module load` lines go here.
: "${LOPD_VENV:=.venv}"
if [ -z "${LOPD_CONTAINER_IMAGE:-}" ] && [ -d "$LOPD_VENV" ]; then
  PATH="$(cd "$LOPD_VENV" && pwd)/bin:$PATH"
fi
export PATH PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # a container has the checkout, but has not installed it
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# CUDA. One hardware queue: Megatron relies on the launch order to overlap tensor-parallel communication.
export CUDA_DEVICE_MAX_CONNECTIONS=1

# NCCL. The rest are its own good defaults; uncomment what your network needs.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 # a collective that hangs or fails ends the process
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0 # the interface all nodes share
# export NCCL_IB_HCA=mlx5                                # InfiniBand adapters

# Before training every node is checked (lopd_megatron.launch.node_check); 0: not.
export LOPD_HEALTH_CHECK="${LOPD_HEALTH_CHECK:-1}"
