"""Grades of math answers: what is right, what only looks like it, and what nobody may wait for."""

from __future__ import annotations

import os
import time

import pytest

from lopd_megatron.evaluation.answers import find_answers
from lopd_megatron.evaluation.grading import GRADERS
from lopd_megatron.evaluation.grading_process import ELAPSED_SECONDS, GradingProcess

pytestmark = pytest.mark.processes

grade = GRADERS["math_verify"]

SAME = r"""
42                      | 42.
42                      | 42,
42                      | \text{42}
42                      | **42**
42                      | 042
42                      | 42.0
42                      | +42
42                      | forty-two
42                      | \mathbf{42}
42                      | {42}
42                      | (42)
42                      | \(42\)
42                      | x = 42
42                      | x=y=42
42                      | f(3) = 42
42                      | n \in 42
42                      | \approx 42
-5                      | −5
-5                      | -5.00
-5                      | x = -5
1234                    | 1,234
1234                    | 1\,234
1234                    | 1{,}234
1234                    | 1 234
1234                    | 1\ 234
1234.5                  | 1,234.5
1234567                 | 1,234,567
1000000                 | 10^6
0.5                     | \frac{1}{2}
0.5                     | \frac12
0.5                     | 1/2
0.5                     | .5
0.5                     | \dfrac{1}{2}
0.5                     | ½
0.5                     | 50\%
0.5                     | 5 \times 10^{-1}
-\frac{1}{2}            | \frac{-1}{2}
-\frac{1}{2}            | -0.5
\frac{7}{2}             | 3\frac{1}{2}
\frac{7}{2}             | 3 1/2
\frac{7}{2}             | 3\frac12
\frac{7}{2}             | 3½
\frac{1}{3}             | 0.\overline{3}
\frac{22}{7}            | 22/7
\frac{2}{4}             | \frac{1}{2}
50\%                    | 50
50\%                    | 50%
50\%                    | 0.5
50                      | 50 percent
12.5\%                  | \frac{1}{8}
1.5e3                   | 1500
1.2\times 10^{5}        | 120000
1.2\cdot10^5            | 120,000
6.02 × 10^{23}          | 6.02\times10^{23}
7                       | 7 cm
7                       | 7\text{ cm}
7                       | 7\,\mathrm{cm}
7                       | 7cm
7 \text{ cm}            | 7
7 \text{ cm}            | 7 centimeters
7 \text{ cm}^2          | 7 cm^2
7                       | 7 \text{ square units}
7                       | 7 m
12                      | 12 \text{ apples}
12                      | 12 km/h
3.5                     | 3.5 hours
\frac{3}{4}             | \frac{3}{4} \text{ hours}
18                      | \$18
18                      | \$18.00
18                      | $18$
18                      | 18 dollars
18                      | €18
1800                    | \$1,800
60                      | 60^\circ
60                      | 60^{\circ}
60                      | 60°
60                      | 60 degrees
60^\circ                | 60
(1,2)                   | (1, 2)
(1,2)                   | \left(1,2\right)
(1,2)                   | (x,y) = (1,2)
(1,2)                   | (1.0, \frac{4}{2})
(\frac{1}{2}, 3)        | (0.5, 3)
1,2                     | 2,1
1,2                     | 1 and 2
1,2                     | 1 \text{ or } 2
1,2                     | x=1, x=2
1,2                     | x = 1 \text{ or } x = 2
1,2                     | \{1,2\}
1,2                     | 1; 2
1, 2, 3                 | 1, 2, \text{ and } 3
\{1,2\}                 | \{2,1\}
\{1,2\}                 | \left\{1, 2\right\}
\{(1,2),(3,4)\}         | (3,4),(1,2)
100, 200                | 100,200
1,234, 5,678            | 1234, 5678
\pm 3                   | \pm3
\pm 3                   | 3, -3
3, -3                   | \pm 3
1 \pm \sqrt{2}          | 1+\sqrt{2}, 1-\sqrt{2}
x = \pm 2               | -2, 2
[0,1]                   | [0, 1]
[0,1]                   | x \in [0,1]
(-\infty,3]             | \left(-\infty, 3\right]
(0,\infty)              | (0,+\infty)
(0,∞)                   | (0,\infty)
(-\infty,-1)\cup(1,\infty) | (1,\infty)\cup(-\infty,-1)
x > 3                   | x>3
x \ge 3                 | x \geq 3
x \ge 3                 | x ≥ 3
x > 3                   | (3,\infty)
3 < x < 5               | (3,5)
\sqrt{2}                | √2
\sqrt{2}                | \sqrt2
2\sqrt{3}               | \sqrt{12}
\frac{\sqrt{2}}{2}      | \frac{1}{\sqrt{2}}
\pi                     | π
\pi                     | pi
2\pi                    | 2π
\frac{\pi}{2}           | \pi/2
2\pi                    | 2 \pi \text{ cm}
e^2                     | e^{2}
x^2+2x+1                | (x+1)^2
x+1                     | 1+x
2x                      | x \cdot 2
y = 2x+1                | y=1+2x
2x+1                    | y = 2x+1
\frac{x}{2}             | 0.5x
\frac{1}{x+1}           | \dfrac{1}{1+x}
2^{10}                  | 1024
5!                      | 120
\binom{5}{2}            | 10
\frac{1}{2^{99}}        | 2^{-99}
1+2i                    | 2i+1
\log_2 8                | 3
\ln e                   | 1
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix}1\\2\end{pmatrix}     | \begin{pmatrix} 1 \\ 2 \end{pmatrix}
C                       | (C)
C                       | C.
C                       | \text{C}
C                       | c
C                       | \textbf{(C)}
C                       | (C) 12
(C)                     | C
\textbf{(C)}\ 12        | C
\textbf{(C)}\ 12        | 12
Yes                     | yes
Yes                     | \text{Yes.}
True                    | \text{true}
\text{Evelyn}           | Evelyn
east                    | \text{East}
\text{no solution}      | No solutions
\emptyset               | ∅
\emptyset               | \varnothing
\infty                  | infinity
three                   | 3
3500000                 | 3.5 million
3500000                 | \$3.5 \text{ million}
3.5 \text{ million dollars} | 3,500,000
one hundred twenty      | 120
1010_2                  | 1010_{2}
1010_2                  | 1010
2:3                     | 2 : 3
12:30                   | 12:30
\boxed{34}              | 34
$\frac{9}{7}$           | 9/7
\#### 5                 | 5
0                       | -0
"""

DIFFERENT = r"""
42                      | 43
42                      | -42
42                      | 4.2
42                      | 420
42                      | 42i
42                      | 42x
42                      | \frac{42}{0}
42                      | x
1234                    | 1,235
1234                    | 1.234
1234                    | 1, 234
1234                    | 12,34
\frac{1}{3}             | 0.333
\frac{1}{3}             | 0.33333333
\frac{2}{3}             | 0.667
\pi                     | 3.14
\pi                     | 3.14159265
\pi                     | \frac{22}{7}
3.14                    | \pi
\sqrt{2}                | 1.414
\sqrt{2}                | 1.41421356
\sqrt{2}                | -\sqrt{2}
e                       | 2.718
0.1                     | 0.10000001
\frac{1}{2^{99}}        | \frac{1}{2^{98}}
2^{100}                 | 2^{101}
2^{1000}                | 2^{1000}+1
10^{-9}                 | 0
10^{-9}                 | 2 \times 10^{-9}
50\%                    | 5
50\%                    | 500
7 \text{ cm}            | 7 m
7 \text{ cm}            | 7 inches
5 \text{ hours}         | 5 minutes
\$18                    | 18 cents
(1,2)                   | (2,1)
(1,2)                   | [1,2]
(1,2)                   | (1,3)
(1,2)                   | (1,2,3)
(1,2)                   | \{1,2\}
[0,1]                   | (0,1)
[0,1]                   | [0,1)
(-\infty,3]             | (-\infty,3)
(-\infty,-1)\cup(1,\infty) | (-\infty,\infty)
(-\infty,-1)\cup(1,\infty) | (1,\infty)
1,2                     | 1
1,2                     | 2
1,2                     | 1,3
1,2                     | 1,2,3
1                       | 1,2
1                       | 1 or 2
\{1,2\}                 | \{1\}
\pm 3                   | 3
3                       | \pm 3
1331 and 1728           | 1728
x > 3                   | x < 3
x > 3                   | x \ge 3
x > 3                   | 3
x \ne 3                 | 3
x^2+2x+1                | (x-1)^2
y = 2x+1                | y = 2x-1
x                       | y
C                       | B
C                       | (D)
C                       | \text{Cat}
Yes                     | No
True                    | False
\text{Evelyn}           | \text{Angela}
east                    | west
12:00                   | 1:00
2:3                     | 3:2
1010_2                  | 1010_3
1010_2                  | 10
\infty                  | -\infty
\infty                  | 10
\emptyset               | 0
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&2\\4&3\end{pmatrix}
1+2i                    | 1-2i
three                   | 4
3.5                     | 3.5 million
5                       | {}
5                       | \frac{}{}
5                       | \undefinedcommand
"""


def pairs(table: str) -> list[tuple[str, str]]:
    found = [line.partition(" |") for line in table.strip().splitlines()]
    return [(gold.strip(), answer.strip()) for gold, _, answer in found]


@pytest.mark.parametrize(("gold", "answer"), pairs(SAME))
def test_same(gold: str, answer: str) -> None:
    assert grade(rf"So the answer is \boxed{{{answer}}}.", "stop", gold.removeprefix(r"\#### "))[1]


@pytest.mark.parametrize(("gold", "answer"), pairs(DIFFERENT))
def test_different(gold: str, answer: str) -> None:
    assert not grade(rf"So the answer is \boxed{{{answer}}}.", "stop", gold)[1]


@pytest.mark.parametrize(
    ("response", "answers"),
    [
        (r"first \boxed{4} then finally \boxed{5}", ["5"]),
        (r"$a=\boxed{3}$ and $b=\boxed{4}$", ["3", "4"]),
        (r"\boxed{1}, \boxed{2}, and \boxed{3}", ["1", "2", "3"]),
        (r"\boxed{4}. Checking again, it is \boxed{5}.", ["5"]),
        (r"The answer is \boxed{42}. I put it within \boxed{}.", ["42"]),
        (r"\boxed{42} in the form \boxed{\text{answer}}", ["42"]),
        (r"\boxed{42} and not \boxed{...}", ["42"]),
        (r"I use \boxed{...}. The answer is 42.", ["42"]),
        (r"\boxed{7} and then \boxed{1", ["7"]),
        (r"\boxed {4}", ["4"]),
        (r"\boxed 4", ["4"]),
        (r"\fbox{4}", ["4"]),
        (r"\boxed{\boxed{5}}", ["5"]),
        (r"\boxed{\text{\boxed{5}}}", ["5"]),
        (r"\boxed{\{1,2\}}", [r"\{1,2\}"]),
        (r"the set {1, 2 \boxed{\frac{1}{2}}", [r"\frac{1}{2}"]),
        ("so\n#### 1,234", ["1,234"]),
        ("The answer is $x = 5$.", ["x = 5"]),
        ("**Answer:** 12", ["12"]),
        ("The final answer is 5 apples.", ["5 apples"]),
        ("Answer: B", ["B"]),
        ("2 apples, 3 pears: in all 5.", ["5"]),
        (r"it is $\frac{3}{4}$.", [r"\frac{3}{4}"]),
        ("Yes.", ["Yes."]),
        ("2x+1", ["2x+1"]),
        ("I do not know what to say", []),
        ("", []),
    ],
)
def test_the_answer_in_a_response(response: str, answers: list[str]) -> None:
    assert find_answers(response) == answers


def test_equal_answers_are_one_vote() -> None:
    votes = [
        grade(rf"\boxed{{{text}}}", "stop", "7")[0]
        for text in ("0.5", r"\frac12", "1/2", "½", r"x=\frac{1}{2}")
    ]
    assert len(set(votes)) == 1
    assert grade(r"\boxed{\text{Yes}}", "stop", "No")[0] == grade(r"\boxed{yes.}", "stop", "No")[0]


HOSTILE = [
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "2003^{2002^{2001}}",
    "99999999!!",
    "(10^{9})!",
    r"\binom{10^{9}}{10^{8}}",
    r"\sum_{k=1}^{10^{12}} \frac{1}{k^k}",
    r"\int_0^{10} x^{x^{x}} \sin(x^{9}) dx",
    "(x+y+z+w)^{400}",
    r"\sqrt{" * 500 + "2" + "}" * 500,
    "(" * 5000 + "1" + ")" * 5000,
    "1," * 5000,
    "{" * 20000,
    r"\frac{1}{" * 300 + "2" + "}" * 300,
    "7" * 100_000,
    "a" * 50_000 + "!",
    "1 " * 20_000 + "x",
    r"\text{" * 3000,
    "x=" * 5000 + "1",
    "1,234" * 3000,
    "=" * 20000,
    r"\pm " * 30,
    r"10^{-10^{10}}",
    "\\",
    "\x00\ud83d",
]


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_no_answer_takes_longer_than_five_seconds(answer: str) -> None:
    """Not a measure of speed: without the limit many of these run for hours."""
    grade("1", "stop", "1")  # the helper is up
    for response, gold in ((rf"\boxed{{{answer}}}", "8675309"), (answer, "8675309"), (r"\boxed{9}", answer)):
        started = time.monotonic()
        assert not grade(response, "stop", gold)[1]
        # The kernel ends the worker at ELAPSED_SECONDS; one more for the fork and a busy machine.
        assert time.monotonic() - started < ELAPSED_SECONDS + 1


def test_a_killed_helper_is_replaced() -> None:
    process = GradingProcess()
    assert process.grade("4", "4") == ("4", True)
    assert process._helper is not None
    process._helper.kill()
    process._helper.wait()
    assert process.grade("4", "4") == ("4", True)


def test_a_fork_has_a_helper_of_its_own() -> None:
    process = GradingProcess()
    process.grade("4", "4")
    pid = os.fork()
    if pid == 0:
        os._exit(0 if process.grade("5", "5")[1] else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert process.grade("6", "6")[1]
