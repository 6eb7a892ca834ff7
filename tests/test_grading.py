"""Grades. Pairs are written down with the judgement a careful person would give."""

import os
import signal
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vigos.eval import grading
from vigos.eval.grading import grade, normalise
from vigos.eval.math_verify_worker import serve, verify_pair

RIGHT = [
    # text
    ("Red", "red"), ("red.", "red"), ("\\text{red}", "red"), ("The red", "red"), ("'red'", "red"),
    ("a  red\ncat", "red cat"),
    ("$\\mathrm{Red}$", "red"), ("The answer is red", "red"), ("Final answer: red", "red"), ("猫", "猫"),
    ("( 1 ,2)", "(1, 2)"),
    ("x", "X"), ("\\(red\\)", "red"), ("St. John", "st. john"),
    # choices
    ("B", "(B)"), ("(B)", "B"), ("B.", "B"), ("(b)", "B"), ("b", "B"), ("B. red", "B"), ("B) red", "(B) blue"),
    ("red", "(B) red"),
    ("Option B", "B"), ("\\text{B}", "B"), ("The answer is B.", "B"), ("\\text{(B) red}", "B"),
    # numbers
    ("42.0", "42"), ("1,200", "1200"), ("1{,}200", "1200"), ("0.5", "\\frac{1}{2}"), ("\\dfrac12", "1/2"),
    ("-\\frac{3}{4}", "-0.75"),
    ("1 1/2", "1.5"), ("1\\frac{1}{2}", "3/2"), ("3 \\times 10^4", "30000"), ("3e4", "30000"), ("10^{3}", "1000"),
    ("−3", "-3"),
    ("50\\%", "50"), ("50%", "0.5"), ("two", "2"), ("Seven", "7"), (".5", "0.5"), ("½", "0.5"), ("3.", "3"),
    ("+3", "3"),
    ("1.5 × 10^2", "150"),
    # units
    ("5 cm", "5"), ("5", "5 cm"), ("500 cm", "5 m"), ("5\\text{ cm}", "5 centimeters"), ("90^\\circ", "90"),
    ("90°", "90 degrees"),
    ("\\$5", "5"), ("$5$", "5"), ("2 hours", "120 min"), ("3 cats", "3"), ("3 cats", "3 cat"),
    ("4 cm^2", "4 square cm"),
    ("4 cm²", "0.0004 m^2"), ("12 sq ft", "12 ft^2"), ("1 in", "2.54 cm"), ("8 cubic m", "8 m^{3}"),
    # mathematics
    ("x^2+2x", "2x + x^2"), ("x=3", "3"), ("\\{1,2\\}", "\\{2,1\\}"), ("\\sqrt{8}", "2\\sqrt{2}"),
    ("2\\pi", "2 \\pi"),
    ("\\log_2 8", "3"), ("\\frac{\\sqrt{2}}{2}", "1/\\sqrt{2}"),
]  # fmt: skip

WRONG = [
    ("blue", "red"), ("der", "red"), ("", "red"), ("   ", "red"), ("red or blue", "red"), ("no", "yes"),
    ("A", "B"), ("A. red", "B"), ("(A) red", "(B) red"), ("A dog", "A"), ("blue", "(B) red"), ("Bob", "B"),
    ("AB", "B"),
    ("41", "42"), ("-42", "42"), ("1,20", "120"), ("0.333", "1/3"), ("1/0", "0"), ("3", "three hundred"),
    ("10^2", "1000"),
    ("5 cm", "5 m"), ("5 kg", "5 m"), ("3 red cars", "3 blue cars"), ("5 cm^2", "5 cm"), ("60 s", "1 hour"),
    ("5%", "0.5"),
    ("x^2", "x^3"), ("(1,2)", "(2,1)"), ("x+1", "red"), ("\\frac{", "1/2"), ("2x", "2y"), ("\\sqrt{2}", "1.41"),
    ("7 and red", "7"), ("the 7 is red", "the 7 is blue"),
]  # fmt: skip


@pytest.mark.parametrize(("prediction", "answer"), RIGHT)
def test_right(prediction, answer):
    assert grade(prediction, answer)


@pytest.mark.parametrize(("prediction", "answer"), WRONG)
def test_wrong(prediction, answer):
    assert not grade(prediction, answer)


@pytest.mark.parametrize("answer", [answer for _, answer in RIGHT])
def test_a_reference_equals_itself(answer):
    assert grade(answer, answer)
    assert grade(f"${answer}$", answer)
    assert not grade(None, answer)


def test_words_never_become_products_of_letters(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"asked math-verify about {args}")

    monkeypatch.setattr(grading._worker, "verify", refuse)
    assert not grade("listen", "silent")
    assert not grade("a red 7", "7 red cats")
    with pytest.raises(AssertionError, match="asked math-verify"):
        grade("x+1", "1+x+0")


def test_power_towers_end():
    start = time.perf_counter()
    assert not grade("10^{10^{10}}", "x^2", timeout_s=1)
    assert time.perf_counter() - start < 20
    assert grade("x+1", "1+x")


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs POSIX signals")
def test_a_worker_that_hangs_is_replaced(caplog):
    assert grade("x+1", "1+x")
    process = grading._worker.process
    os.kill(process.pid, signal.SIGSTOP)
    assert not grade("x+2", "2+x", timeout_s=0.2)
    assert "took more than 0.2 s: counted as wrong" in caplog.text
    assert process.poll() is not None
    assert grade("x+2", "2+x")


def test_a_worker_that_died_is_replaced():
    assert grade("x+1", "1+x")
    process = grading._worker.process
    process.kill()
    process.wait()
    assert grade("x+1", "1+x")
    assert grading._worker.process is not process


def test_threads_share_the_worker():
    results = []
    pairs = [("x+1", "1+x", True), ("x+1", "x+2", False)] * 6
    threads = [threading.Thread(target=lambda p=p: results.append(grade(p[0], p[1]) == p[2])) for p in pairs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [True] * 12


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_its_own_worker():
    import multiprocessing

    assert grade("x+1", "1+x")
    process = grading._worker.process
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(grade, ("x+2", "2+x")) is True
    assert grading._worker.process is process
    assert process.poll() is None
    assert grade("x+3", "3+x")


def test_the_worker_answers_whatever_it_is_asked():
    import io

    requests = io.StringIO('["x+1", "1+x", 5]\n["\\\\frac{", "1", 5]\n["", "", 5]\n')
    replies = io.StringIO()
    serve(requests, replies)
    assert replies.getvalue().splitlines() == [
        '{"ready": true}',
        '{"equal": true}',
        '{"equal": false}',
        '{"equal": false}',
    ]
    assert verify_pair("2x+1", "1+2x", 2)


def test_without_math_verify_the_extra_is_named(monkeypatch, tmp_path):
    import io
    import sys

    monkeypatch.setitem(sys.modules, "math_verify", None)
    replies = io.StringIO()
    serve(io.StringIO(), replies)
    assert "error" in replies.getvalue()
    script = tmp_path / "without.py"
    script.write_text(f"print({replies.getvalue().strip()!r}, flush=True)")
    worker = grading._Verifier(script)
    with pytest.raises(ImportError, match=r"pip install 'vigos\[train\]' \(.*math_verify"):
        worker.verify("x+1", "1+x", 1)


pieces = st.sampled_from(
    [*"0123456789.,-+/*^%$\\{}()[] abxBC°²½−", "\\frac", "\\text{", "\\boxed{", " cm", "e5", "10^", "\\times"]
)
answers = st.lists(pieces, max_size=12).map("".join) | st.text(max_size=20)


@settings(max_examples=500, deadline=None)
@given(answers, answers)
def test_any_text_can_be_graded(said, wanted):
    with pytest.MonkeyPatch.context() as patch:  # what math-verify makes of it is bounded elsewhere
        patch.setattr(grading._worker, "verify", lambda *pair: False)
        assert grade(said, wanted) in (True, False)
        if said.strip():
            assert grade(said, said)


def test_normalise_keeps_what_distinguishes():
    assert normalise("The 7.5") == "7.5"
    assert normalise(" A Cat. ") == "cat"
    assert normalise("a") == "a"
    assert normalise(r"\left( x ,\; y \right)") == "(x,y)"
    assert normalise(r"\textbf{\text{Red}}") == "red"


def test_importing_needs_no_optional_package():
    import subprocess
    import sys

    code = "import sys; sys.modules.update(dict.fromkeys(['math_verify', 'sympy', 'transformers']))\n"
    code += "import vigos.eval.grading"
    subprocess.run([sys.executable, "-c", code], check=True)
