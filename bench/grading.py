"""Grade fuzzed predictions: how many raise, and how long the slowest takes.

python bench/grading.py --predictions 5000
"""

from __future__ import annotations

import argparse
import logging
import random
import time

from vigos.eval.grading import grade

PIECES = [
    *"0123456789.,-+/*^%$\\{}()[]|<>=!_& ~abxyABC°²½−√π×÷≤∞漢\n\ud800\u2028٣",
    *(
        "\\frac{",
        "\\text{",
        "\\boxed{",
        "\\times",
        "\\sqrt{",
        "^{",
        "\\begin{pmatrix}",
        "\\end{pmatrix}",
        "\\sum_{k=1}^{",
    ),
    *(" cm", "e5", "10^", "99999", " million", " dozen", " and ", "\\sin "),
]
REFERENCES = ("5", "x^2+1", "B", "red", "\\frac{1}{2}", "(1,2)", "5 cm", "12^{100}", "A, C")


def prediction(rng: random.Random) -> str:
    """Draw symbols in a row, long numbers, deep brackets, fractions, powers or factorials, of up to 100 kB."""
    kind = rng.randrange(10)
    if kind == 0:
        return "".join(rng.choices("0123456789", k=rng.choice((10, 310, 4300, 100_000))))
    if kind == 1:
        left, right = rng.choice(("()", "[]", "{}"))
        return left * rng.choice((4, 6, 50, 50_000)) + "1" + right * rng.choice((4, 6, 50, 50_000))
    if kind == 2:
        depth = rng.randint(1, 30)
        return "\\frac{" * depth + "1" + "}{2}" * depth
    if kind == 3:
        return "^".join(str(rng.randint(2, 99)) for _ in range(rng.randint(1, 12)))
    if kind == 4:
        return f"{rng.randint(1, 10 ** rng.randint(1, 9))}!" * rng.randint(1, 3)
    return "".join(rng.choices(PIECES, k=rng.choice((5, 20, 40, 40, 2000, 30_000))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rng, seconds, raised = random.Random(args.seed), [], 0
    grade("x+1", "1+x")  # starts math-verify
    for _ in range(args.predictions):
        text = prediction(rng)
        start = time.perf_counter()
        try:
            grade(text, rng.choice((*REFERENCES, text)))
        except Exception as error:
            raised += 1
            print(f"{type(error).__name__}: {text[:80]!r}")
        seconds.append((time.perf_counter() - start, text[:60]))
    seconds.sort(reverse=True)
    over = sum(s > 1 for s, _ in seconds)
    print(f"{args.predictions} predictions: {raised} raised, {over} took over a second, the slowest:")
    for s, text in seconds[:5]:
        print(f"  {s:.2f} s  {text!r}")


if __name__ == "__main__":
    main()
