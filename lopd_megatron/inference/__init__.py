"""Prompts, rollouts, teacher scores and evaluation on vLLM, in the order of the pipeline.

sources, prompts        data sets → prompt shards
requests, engine, sizes what an engine is asked; the vLLM engine, the only file that imports it; what fits
shards, leases, worker  a sharded stage: whole files, shared out among workers, safe to kill
rollouts, scoring       the two stages; score_paths picks the way to score and proves it right
stages                  the same as whole programs
grading, accuracy, evaluation
"""
