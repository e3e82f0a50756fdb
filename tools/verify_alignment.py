"""The same as `lopd verify`."""

from lopd_megatron.__main__ import run_verb

if __name__ == "__main__":
    run_verb("verify")
