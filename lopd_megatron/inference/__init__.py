"""Prompts, rollouts, teacher scores and evaluation on vLLM.

requests    what an engine is asked and what it answers; nothing here knows vLLM
engine      the vLLM engine, the only file that imports it
scoring     which of vLLM's three ways to score is used, and the proof that it is right
shards      Parquet shards: whole or absent
worker      one worker of a sharded stage: claim, feed, commit
"""
