"""The tiny verifiable task: chains of eight operations mod 17, one token per number.

    prompt    <bos> a0 op1 b1 … op8 b8 :                      19 tokens
    solution  a0, eight steps, # x8 <eos>                     36 tokens
    step      style A `op b = r`, style B `b op : r`          x_k = (x_{k−1} op b_k) mod 17

A solution is right when `# x8` stands before its first <eos>. Solving needs 867 facts (a op b mod 17) and
eight correct steps in a row, so a student that knows most facts still fails often, which is what
on-policy distillation mends. The leading `a0` spares the student a copying skill that would otherwise
dominate the errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

MODULUS = 17
CHAIN = 8
OPERATIONS = ("+", "-", "*")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
VOCABULARY = (*SPECIAL, *(str(n) for n in range(MODULUS)), *OPERATIONS, "=", ":", "#")
PROMPT_LENGTH = 3 + 2 * CHAIN
SOLUTION_LENGTH = 4 + 4 * CHAIN

_ID = {word: index for index, word in enumerate(VOCABULARY)}
_PAD, _BOS, _EOS, _UNK = range(4)
_NUMBER = _ID["0"]
_OPERATION = _ID["+"]


@dataclass(frozen=True)
class Problems:
    """n problems: `start` [n] and `operand` [n, 8] in 0…16, `operation` [n, 8] in 0…2."""

    start: np.ndarray
    operation: np.ndarray
    operand: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def rows(self, where: slice) -> Problems:
        return Problems(self.start[where], self.operation[where], self.operand[where])


def true_facts() -> np.ndarray:
    """`[3, 17, 17]`: the value of `a op b mod 17`."""
    a, b = np.arange(MODULUS)[:, None], np.arange(MODULUS)[None, :]
    return np.stack([(a + b), (a - b), (a * b)]) % MODULUS


def corrupted_facts(share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A wrong value for every fact, and which facts (a `share` of them) are corrupted."""
    facts = true_facts()
    wrong = (facts + rng.integers(1, MODULUS, facts.shape)) % MODULUS
    return wrong, rng.random(facts.shape) < share


def sample_problems(count: int, rng: np.random.Generator, taken: set[bytes]) -> Problems:
    """`count` distinct problems, none of them in `taken`, which they are then added to."""
    kept: list[np.ndarray] = []
    while len(kept) < count:
        draw = np.concatenate(
            [
                rng.integers(0, MODULUS, (count, 1)),
                rng.integers(0, len(OPERATIONS), (count, CHAIN)),
                rng.integers(0, MODULUS, (count, CHAIN)),
            ],
            axis=1,
        ).astype(np.int8)
        for row in draw:
            key = row.tobytes()
            if key not in taken and len(kept) < count:
                taken.add(key)
                kept.append(row)
    table = np.stack(kept).astype(np.int64)
    return Problems(table[:, 0], table[:, 1 : 1 + CHAIN], table[:, 1 + CHAIN :])


def answers(problems: Problems) -> np.ndarray:
    """`[n]`: x8 of each problem."""
    facts, value = true_facts(), problems.start
    for k in range(CHAIN):
        value = facts[problems.operation[:, k], value, problems.operand[:, k]]
    return value


def prompt_tokens(problems: Problems) -> np.ndarray:
    """`[n, 19]` int32."""
    tokens = np.empty((len(problems), PROMPT_LENGTH), np.int32)
    tokens[:, 0] = _BOS
    tokens[:, 1] = _NUMBER + problems.start
    tokens[:, 2:-1:2] = _OPERATION + problems.operation
    tokens[:, 3:-1:2] = _NUMBER + problems.operand
    tokens[:, -1] = _ID[":"]
    return tokens


def solution_tokens(
    problems: Problems,
    style_a: float,
    rng: np.random.Generator,
    corruption: tuple[np.ndarray, np.ndarray] | None = None,
    corruption_rate: float = 0.6,
) -> np.ndarray:
    """`[n, 36]` int32: worked solutions, each step in style A with probability `style_a`.

    With a `corruption` (from `corrupted_facts`), each use of a corrupted fact takes its fixed wrong value
    with probability `corruption_rate`; the chain then goes on from the wrong value.
    """
    count, facts = len(problems), true_facts()
    tokens = np.empty((count, SOLUTION_LENGTH), np.int32)
    tokens[:, 0] = _NUMBER + problems.start
    value = problems.start
    for k in range(CHAIN):
        operation, operand = problems.operation[:, k], problems.operand[:, k]
        result = facts[operation, value, operand]
        if corruption is not None:
            wrong, bad = corruption
            hit = bad[operation, value, operand] & (rng.random(count) < corruption_rate)
            result = np.where(hit, wrong[operation, value, operand], result)
        value = result
        op, b, r = _OPERATION + operation, _NUMBER + operand, _NUMBER + value
        first = np.stack([op, b, np.full(count, _ID["="]), r], axis=1)
        second = np.stack([b, op, np.full(count, _ID[":"]), r], axis=1)
        style = rng.random((count, 1)) < style_a
        tokens[:, 1 + 4 * k : 5 + 4 * k] = np.where(style, first, second)
    tokens[:, -3] = _ID["#"]
    tokens[:, -2] = _NUMBER + value
    tokens[:, -1] = _EOS
    return tokens


def text(tokens: np.ndarray) -> str:
    """Words separated by blanks; what the tokenizer maps back to the same ids."""
    return " ".join(VOCABULARY[token] for token in tokens)


def save_tokenizer(folder: Path) -> None:
    """A word-level Hugging Face tokenizer of the 27 words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel(_ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
