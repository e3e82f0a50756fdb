#!/bin/bash
# The chain as Slurm jobs: run it in the checkout on a login node. Prints the id of every job.
# When a job is refused, those before it are cancelled: what they make would be waited for by nobody.
set -euo pipefail
if [ -n "${SLURM_JOB_ID:-}" ]; then # inside a job, whose GPUs and array these jobs would take for their own
  for name in "${!SLURM_@}"; do [ "$name" = SLURM_CONF ] || unset "$name"; done
fi
job=()
trap '[ $? = 0 ] || { echo "not submitted; cancelling ${job[*]}" >&2
  printf "%s\n" "${job[@]}" | xargs -r scancel; }' EXIT

export LOPD_LOGS=runs/qwen3_32b/sft/logs
export LOPD_MAX_RESTARTS=8
export LOPD_MAX_RETRIES=1
export LOPD_CONTAINER_IMAGE=nvcr.io/nvidia/nemo:25.09
export LOPD_CONTAINER_MOUNTS=/lustre/models:/lustre/models:ro

mkdir -p runs/qwen3_32b/sft/logs/prompts
job[0]=$(sbatch --parsable \
  --export=ALL \
  --job-name=qwen3_32b-sft-prompts \
  --output=runs/qwen3_32b/sft/logs/prompts/%j.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  slurm/prompts.sbatch \
  python -m lopd_megatron prompts recipes/qwen3_32b.py:sft parallel.tensor_model_parallel_size=4 parallel.pipeline_model_parallel_size=4 launch.stages.train.nodes=8 launch.account=llm launch.partition=batch 'launch.sbatch_options=[--exclusive,--mem=0]' launch.container_image=nvcr.io/nvidia/nemo:25.09 'launch.container_mounts=[/lustre/models:/lustre/models:ro]')
echo qwen3_32b-sft-prompts "${job[0]}"

mkdir -p runs/qwen3_32b/sft/logs/rollouts
job[1]=$(sbatch --parsable \
  --export=ALL \
  --job-name=qwen3_32b-sft-rollouts \
  --output=runs/qwen3_32b/sft/logs/rollouts/%A_%a.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --gpus-per-node=8 \
  --array=0-3 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"${job[0]}" \
  slurm/rollouts.sbatch \
  python -m lopd_megatron rollouts recipes/qwen3_32b.py:sft parallel.tensor_model_parallel_size=4 parallel.pipeline_model_parallel_size=4 launch.stages.train.nodes=8 launch.account=llm launch.partition=batch 'launch.sbatch_options=[--exclusive,--mem=0]' launch.container_image=nvcr.io/nvidia/nemo:25.09 'launch.container_mounts=[/lustre/models:/lustre/models:ro]')
echo qwen3_32b-sft-rollouts "${job[1]}"

mkdir -p runs/qwen3_32b/sft/logs/dataset
job[2]=$(sbatch --parsable \
  --export=ALL \
  --job-name=qwen3_32b-sft-dataset \
  --output=runs/qwen3_32b/sft/logs/dataset/%j.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"${job[1]}" \
  slurm/dataset.sbatch \
  python -m lopd_megatron dataset recipes/qwen3_32b.py:sft parallel.tensor_model_parallel_size=4 parallel.pipeline_model_parallel_size=4 launch.stages.train.nodes=8 launch.account=llm launch.partition=batch 'launch.sbatch_options=[--exclusive,--mem=0]' launch.container_image=nvcr.io/nvidia/nemo:25.09 'launch.container_mounts=[/lustre/models:/lustre/models:ro]')
echo qwen3_32b-sft-dataset "${job[2]}"

mkdir -p runs/qwen3_32b/sft/logs/train
job[3]=$(sbatch --parsable \
  --export=ALL \
  --job-name=qwen3_32b-sft-train \
  --output=runs/qwen3_32b/sft/logs/train/%j.batch.log \
  --time=1-00:00:00 \
  --nodes=8 \
  --gpus-per-node=8 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"${job[2]}" \
  slurm/train.sbatch \
  python -m lopd_megatron.launch.torchrun --nnodes 8 --nproc-per-node 8 -m lopd_megatron.train recipes/qwen3_32b.py:sft parallel.tensor_model_parallel_size=4 parallel.pipeline_model_parallel_size=4 launch.stages.train.nodes=8 launch.account=llm launch.partition=batch 'launch.sbatch_options=[--exclusive,--mem=0]' launch.container_image=nvcr.io/nvidia/nemo:25.09 'launch.container_mounts=[/lustre/models:/lustre/models:ro]')
echo qwen3_32b-sft-train "${job[3]}"

mkdir -p runs/qwen3_32b/sft/logs/export
job[4]=$(sbatch --parsable \
  --export=ALL \
  --job-name=qwen3_32b-sft-export \
  --output=runs/qwen3_32b/sft/logs/export/%j.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"${job[3]}" \
  slurm/export.sbatch \
  python -m lopd_megatron export recipes/qwen3_32b.py:sft parallel.tensor_model_parallel_size=4 parallel.pipeline_model_parallel_size=4 launch.stages.train.nodes=8 launch.account=llm launch.partition=batch 'launch.sbatch_options=[--exclusive,--mem=0]' launch.container_image=nvcr.io/nvidia/nemo:25.09 'launch.container_mounts=[/lustre/models:/lustre/models:ro]')
echo qwen3_32b-sft-export "${job[4]}"

mkdir -p runs/qwen3_32b/sft/logs/evaluate
job[5]=$(sbatch --parsable \
  --export=ALL \
  --job-name=qwen3_32b-sft-evaluate \
  --output=runs/qwen3_32b/sft/logs/evaluate/%j.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --gpus-per-node=2 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"${job[4]}" \
  slurm/evaluate.sbatch \
  python -m lopd_megatron evaluate recipes/qwen3_32b.py:sft parallel.tensor_model_parallel_size=4 parallel.pipeline_model_parallel_size=4 launch.stages.train.nodes=8 launch.account=llm launch.partition=batch 'launch.sbatch_options=[--exclusive,--mem=0]' launch.container_image=nvcr.io/nvidia/nemo:25.09 'launch.container_mounts=[/lustre/models:/lustre/models:ro]')
echo qwen3_32b-sft-evaluate "${job[5]}"

export LOPD_LOGS=runs/qwen3_32b/lightning_opd/logs
export LOPD_MAX_RESTARTS=8
export LOPD_MAX_RETRIES=1
export LOPD_CONTAINER_IMAGE=nvcr.io/nvidia/nemo:25.09
export LOPD_CONTAINER_MOUNTS=/lustre/models:/lustre/models:ro

mkdir -p runs/qwen3_32b/lightning_opd/logs/prompts
job[6]=$(sbatch --parsable \
  --export=ALL \
  --job-name=qwen3_32b-lightning_opd-prompts \
  --output=runs/qwen3_32b/lightning_opd/logs/prompts/%j.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"${job[4]}" \
  slurm/prompts.sbatch \
  python -m lopd_megatron prompts recipes/qwen3_32b.py:lightning_opd parallel.tensor_model_parallel_size=4 parallel.pipeline_model_parallel_size=4 launch.stages.train.nodes=8 launch.account=llm launch.partition=batch 'launch.sbatch_options=[--exclusive,--mem=0]' launch.container_image=nvcr.io/nvidia/nemo:25.09 'launch.container_mounts=[/lustre/models:/lustre/models:ro]')
echo qwen3_32b-lightning_opd-prompts "${job[6]}"

mkdir -p runs/qwen3_32b/lightning_opd/logs/rollouts
job[7]=$(sbatch --parsable \
  --export=ALL \
  --job-name=qwen3_32b-lightning_opd-rollouts \
  --output=runs/qwen3_32b/lightning_opd/logs/rollouts/%A_%a.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --gpus-per-node=2 \
  --array=0-3 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"${job[6]}":"${job[4]}" \
  slurm/rollouts.sbatch \
  python -m lopd_megatron rollouts recipes/qwen3_32b.py:lightning_opd parallel.tensor_model_parallel_size=4 parallel.pipeline_model_parallel_size=4 launch.stages.train.nodes=8 launch.account=llm launch.partition=batch 'launch.sbatch_options=[--exclusive,--mem=0]' launch.container_image=nvcr.io/nvidia/nemo:25.09 'launch.container_mounts=[/lustre/models:/lustre/models:ro]')
echo qwen3_32b-lightning_opd-rollouts "${job[7]}"

mkdir -p runs/qwen3_32b/lightning_opd/logs/scores
job[8]=$(sbatch --parsable \
  --export=ALL \
  --job-name=qwen3_32b-lightning_opd-scores \
  --output=runs/qwen3_32b/lightning_opd/logs/scores/%j.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --gpus-per-node=8 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"${job[7]}" \
  slurm/scores.sbatch \
  python -m lopd_megatron scores recipes/qwen3_32b.py:lightning_opd parallel.tensor_model_parallel_size=4 parallel.pipeline_model_parallel_size=4 launch.stages.train.nodes=8 launch.account=llm launch.partition=batch 'launch.sbatch_options=[--exclusive,--mem=0]' launch.container_image=nvcr.io/nvidia/nemo:25.09 'launch.container_mounts=[/lustre/models:/lustre/models:ro]')
echo qwen3_32b-lightning_opd-scores "${job[8]}"

mkdir -p runs/qwen3_32b/lightning_opd/logs/dataset
job[9]=$(sbatch --parsable \
  --export=ALL \
  --job-name=qwen3_32b-lightning_opd-dataset \
  --output=runs/qwen3_32b/lightning_opd/logs/dataset/%j.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"${job[8]}" \
  slurm/dataset.sbatch \
  python -m lopd_megatron dataset recipes/qwen3_32b.py:lightning_opd parallel.tensor_model_parallel_size=4 parallel.pipeline_model_parallel_size=4 launch.stages.train.nodes=8 launch.account=llm launch.partition=batch 'launch.sbatch_options=[--exclusive,--mem=0]' launch.container_image=nvcr.io/nvidia/nemo:25.09 'launch.container_mounts=[/lustre/models:/lustre/models:ro]')
echo qwen3_32b-lightning_opd-dataset "${job[9]}"

mkdir -p runs/qwen3_32b/lightning_opd/logs/train
job[10]=$(sbatch --parsable \
  --export=ALL \
  --job-name=qwen3_32b-lightning_opd-train \
  --output=runs/qwen3_32b/lightning_opd/logs/train/%j.batch.log \
  --time=1-00:00:00 \
  --nodes=8 \
  --gpus-per-node=8 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"${job[4]}":"${job[9]}" \
  slurm/train.sbatch \
  python -m lopd_megatron.launch.torchrun --nnodes 8 --nproc-per-node 8 -m lopd_megatron.train recipes/qwen3_32b.py:lightning_opd parallel.tensor_model_parallel_size=4 parallel.pipeline_model_parallel_size=4 launch.stages.train.nodes=8 launch.account=llm launch.partition=batch 'launch.sbatch_options=[--exclusive,--mem=0]' launch.container_image=nvcr.io/nvidia/nemo:25.09 'launch.container_mounts=[/lustre/models:/lustre/models:ro]')
echo qwen3_32b-lightning_opd-train "${job[10]}"

mkdir -p runs/qwen3_32b/lightning_opd/logs/export
job[11]=$(sbatch --parsable \
  --export=ALL \
  --job-name=qwen3_32b-lightning_opd-export \
  --output=runs/qwen3_32b/lightning_opd/logs/export/%j.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"${job[10]}":"${job[4]}" \
  slurm/export.sbatch \
  python -m lopd_megatron export recipes/qwen3_32b.py:lightning_opd parallel.tensor_model_parallel_size=4 parallel.pipeline_model_parallel_size=4 launch.stages.train.nodes=8 launch.account=llm launch.partition=batch 'launch.sbatch_options=[--exclusive,--mem=0]' launch.container_image=nvcr.io/nvidia/nemo:25.09 'launch.container_mounts=[/lustre/models:/lustre/models:ro]')
echo qwen3_32b-lightning_opd-export "${job[11]}"

mkdir -p runs/qwen3_32b/lightning_opd/logs/evaluate
job[12]=$(sbatch --parsable \
  --export=ALL \
  --job-name=qwen3_32b-lightning_opd-evaluate \
  --output=runs/qwen3_32b/lightning_opd/logs/evaluate/%j.batch.log \
  --time=04:00:00 \
  --nodes=1 \
  --gpus-per-node=2 \
  --account=llm \
  --partition=batch \
  --exclusive \
  --mem=0 \
  --dependency=afterok:"${job[11]}" \
  slurm/evaluate.sbatch \
  python -m lopd_megatron evaluate recipes/qwen3_32b.py:lightning_opd parallel.tensor_model_parallel_size=4 parallel.pipeline_model_parallel_size=4 launch.stages.train.nodes=8 launch.account=llm launch.partition=batch 'launch.sbatch_options=[--exclusive,--mem=0]' launch.container_image=nvcr.io/nvidia/nemo:25.09 'launch.container_mounts=[/lustre/models:/lustre/models:ro]')
echo qwen3_32b-lightning_opd-evaluate "${job[12]}"
