#!/bin/bash
# Submit a recipe's stages as a chain of Slurm jobs and print their ids. On a login node, in the checkout:
#   slurm/pipeline.sh recipes/qwen3_8b.py:sft recipes/qwen3_8b.py:lightning_opd \
#     launch.account=ACCOUNT launch.partition=PARTITION [--stages train,export] [--dry-run]
# --dry-run prints the sbatch commands instead.
set -eo pipefail
cd "$(dirname "$0")/.."
LOPD_CONTAINER_IMAGE='' # the login node has no container
source slurm/env.sh
exec python -m lopd_megatron run --on slurm "$@"
