#!/bin/bash
# The chain as Slurm jobs: run it in the checkout on a login node. Prints the id of every job.
set -euo pipefail

export LOPD_LOGS=runs/opd/logs
export LOPD_MAX_RESTARTS=8
export LOPD_MAX_RETRIES=1
export LOPD_CONTAINER_IMAGE=nvcr.io/nvidia/nemo:25.09
export LOPD_CONTAINER_MOUNTS=/lustre/models:/lustre/models:ro

mkdir -p runs/opd/logs/prompts
opd_prompts=$(sbatch --parsable \
  --job-name=opd-prompts \
  --output=runs/opd/logs/prompts/%j.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  slurm/prompts.sbatch \
  python tools/prepare_prompts.py --recipe tests/unit/launch/cluster.py:opd_64gpu train.train_iters=300)
echo "opd-prompts $opd_prompts"

mkdir -p runs/opd/logs/rollouts
opd_rollouts=$(sbatch --parsable \
  --job-name=opd-rollouts \
  --output=runs/opd/logs/rollouts/%A_%a.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --gpus-per-node=8 \
  --array=0-15 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"$opd_prompts" \
  slurm/rollouts.sbatch \
  python tools/generate_rollouts.py --recipe tests/unit/launch/cluster.py:opd_64gpu train.train_iters=300)
echo "opd-rollouts $opd_rollouts"

mkdir -p runs/opd/logs/score
opd_score=$(sbatch --parsable \
  --job-name=opd-score \
  --output=runs/opd/logs/score/%A_%a.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --gpus-per-node=8 \
  --array=0-7 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"$opd_rollouts" \
  slurm/score.sbatch \
  python tools/score_rollouts.py --recipe tests/unit/launch/cluster.py:opd_64gpu train.train_iters=300)
echo "opd-score $opd_score"

mkdir -p runs/opd/logs/build
opd_build=$(sbatch --parsable \
  --job-name=opd-build \
  --output=runs/opd/logs/build/%j.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"$opd_score" \
  slurm/build.sbatch \
  python tools/build_dataset.py --recipe tests/unit/launch/cluster.py:opd_64gpu train.train_iters=300)
echo "opd-build $opd_build"

mkdir -p runs/opd/logs/train
opd_train=$(sbatch --parsable \
  --job-name=opd-train \
  --output=runs/opd/logs/train/%j.batch.log \
  --time=1-00:00:00 \
  --nodes=8 \
  --gpus-per-node=8 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"$opd_build" \
  slurm/train.sbatch \
  python -m lopd_megatron.launch.torchrun --nnodes 8 --nproc-per-node 8 -m lopd_megatron.train --recipe tests/unit/launch/cluster.py:opd_64gpu train.train_iters=300)
echo "opd-train $opd_train"

mkdir -p runs/opd/logs/export
opd_export=$(sbatch --parsable \
  --job-name=opd-export \
  --output=runs/opd/logs/export/%j.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"$opd_train" \
  slurm/export.sbatch \
  python tools/convert_checkpoint.py export --checkpoint runs/opd/checkpoints --hf models/student-32b --output runs/opd/hf --overwrite)
echo "opd-export $opd_export"

mkdir -p runs/opd/logs/evaluate
opd_evaluate=$(sbatch --parsable \
  --job-name=opd-evaluate \
  --output=runs/opd/logs/evaluate/%j.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --gpus-per-node=8 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"$opd_export" \
  slurm/evaluate.sbatch \
  python tools/evaluate.py --recipe tests/unit/launch/cluster.py:opd_64gpu train.train_iters=300)
echo "opd-evaluate $opd_evaluate"
