"""One page on what this machine has for the pipeline, what does not fit together, and what to do about it.

    lopd doctor

Exit code 1 if something is wrong; what is merely absent is listed and is no error.
"""

from __future__ import annotations

import argparse

from lopd_megatron.launch.environment_check import examine

MARKS = {"ok": "ok     ", "absent": "absent ", "problem": "PROBLEM"}


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    findings = examine()
    for finding in findings:
        print(f"{MARKS[finding.state]}  {finding.topic}: {finding.what}")
        if finding.advice:
            print(f"{'':9}→ {finding.advice}")
    return int(any(finding.state == "problem" for finding in findings))
