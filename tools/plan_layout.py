"""The door to `lopd plan`: python tools/plan_layout.py --model Qwen3-8B --gpus 8 --gpu H100."""

from lopd_megatron.errors import run_program
from lopd_megatron.performance.plan import main

if __name__ == "__main__":
    run_program(main)
