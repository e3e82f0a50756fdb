"""Prompts, rollouts, teacher scores and evaluation on vLLM, in the order of the pipeline.

sources, prompts       data sets → prompt shards
requests, engine       what an engine is asked and answers; the vLLM engine, the only file that imports it
shards, leases, worker a sharded stage: whole files, shared out among workers, safe to kill
rollouts, scoring      the two stages; score_paths: which of vLLM's ways to score, and the proof that it is right
stages                 the same as whole programs
grading, accuracy, evaluation
teacher_client         scores from a live vLLM server
"""
