"""Grades. Pairs are written down with the judgement a careful person would give."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vigos.eval import grading
from vigos.eval.choices import chosen_letters, options_in
from vigos.eval.grading import grade, hints
from vigos.eval.math_verify_worker import equal, read, serve
from vigos.eval.normalise import number_in_words, plain, text_key
from vigos.eval.units import conversion, split_unit

CASES = [json.loads(line) for line in (Path(__file__).parent / "data" / "grading.jsonl").read_text().splitlines()]

RIGHT = [
    # text
    ("Red", "red"), ("red.", "red"), ("\\text{red}", "red"), ("The red", "red"), ("'red'", "red"),
    ("a  red\ncat", "red cat"),
    ("$\\mathrm{Red}$", "red"), ("The answer is red", "red"), ("Final answer: red", "red"), ("猫", "猫"),
    ("( 1 ,2)", "(1, 2)"),
    ("x", "X"), ("\\(red\\)", "red"), ("St. John", "st. john"),
    ("TV", "television"), ("two tvs", "two televisions"), ("grey", "gray"), ("mountain bike", "mountain bicycle"),
    ("planes", "airplane"), ("colour photo", "color photograph"),
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
    # kinds that were graded wrong once
    ("x=5", "5"), ("5 m", "5"), ("24", "2 dozen"), ("2 dozen", "24"), ("5 million", "5000000"),
    ("3.2 billion", "3.2\\times10^9"), ("\\$5 million", "5,000,000"), ("twenty-one", "21"), ("third", "3"),
    ("3rd", "3"), ("three hundred", "300"), ("four", "4"), ("Four.", "4"), ("2¾", "11/4"), ("1½", "1.5"),
    ("-1 1/2", "-1.5"), ("x² + 1", "x^2+1"), ("√2/2", "\\frac{\\sqrt{2}}{2}"), ("6!", "720"),
    ("1\\,000\\,000", "1000000"), ("1 000", "1000"), ("10,000", "10000"), ("1.5e3", "1500"), ("1.5 x 10^{3}", "1500"),
    ("1.5*10^3", "1500"), ("2 × 10⁻³", "0.002"), ("\\angle A = 45^\\circ", "45"), ("∠A = 45°", "45°"),
    ("45 degrees", "45"), ("m\\angle ABC = 30", "30^\\circ"), ("AB=2\\sqrt{5}", "2\\sqrt{5}"),
    ("\\text{Area} = 12", "12"), ("Area = 12 cm²", "12"), ("b + a", "a+b"), ("2+x", "x+2"), ("y = 2x + 1", "y=1+2x"),
    ("b)", "B"), ("B (red)", "B"), ("**B**", "B"), ("Answer: **B**", "B"), ("**Answer: B**", "B"),
    ("answer is B", "(B)"), ("\\boxed{B}", "B"), ("B", "\\boxed{B}"), ("4", "\\boxed{4}"), ("C, A", "A, C"),
    ("A and C", "C, A"), ("A; C", "A,C"), ("AC", "A, C"), ("60 mph", "60 miles/hour"), ("28 pct", "28%"),
    ("28 percent", "28\\%"), ("0.28", "28%"), ("100 km/h", "100 kilometers per hour"), ("1 km", "1000 m"),
    ("3.5 ft", "3.5 feet"), ("5 m/s", "5 meters per second"), ("$\\frac{1}{2}$", "$0.5$"), ("$x=3$", "$3$"),
    ("3", "$3$"), ("leaf", "leaves"), ("cat", "a cat"), ("yes", "Yes."), ("No", "no"), ("$12$ cm", "12 cm"),
    ("12cm", "12 cm"), ("€5", "5 euros"), ("$5", "5 dollars"), ("{1,2,3}", "{3,2,1}"), ("1, 2, 3", "3, 2, 1"),
    ("(1,2)", "(1, 2)"), ("x = 1 or x = 2", "1, 2"), ("x=1, x=2", "x=2, x=1"), ("\\frac{22}{7}", "22/7"),
    ("[0, 1]", "0 \\le x \\le 1"), ("x > 3", "3 < x"), ("\\infty", "∞"), ("2π", "2\\pi"), ("6.283185", "2\\pi"),
    ("D. None of the above", "D"), ("Option C", "C"), ("(A) 1", "A"), ("A: 1", "A"), ("E - foo bar", "E"),
    ("C because it is larger", "C"), ("the answer is 5", "5"), ("The final answer is $\\frac{3}{4}$.", "0.75"),
    ("12th", "12"), ("\\text{12}", "12"), ("\\mathbf{7}", "7"), ("1/3", "0.333333"), ("1,234.50", "1234.5"),
    ("-7", "−7"), ("+7", "7"), ("7.", "7"), ("7.0", "7"), ("0.50", "1/2"), ("3 hours", "180 minutes"),
    ("2x+3", "3+2x"), ("a/b", "\\frac{a}{b}"), ("\\frac{a+b}{2}", "(a+b)/2"),
    ("$\\begin{bmatrix}1\\\\2\\end{bmatrix}$", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"), ("3√2", "3\\sqrt2"),
    ("H2O", "H_2O"), ("CO₂", "CO2"), ("NaCl", "nacl"), ("5 apples", "5"), ("5", "5 apples"),
    ("five apples", "5 apples"), ("2.9999999", "3"), ("x=1, y=2", "(1,2)"), ("m = 5, n = 6", "5, 6"),
    ("x=4, x=3", "3, 4"), ("1, 2", "x=1, y=2"), ("H_{2}O", "H₂O"),
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
    ("3x", "3"), ("2i", "2"), ("6π", "6"), ("6\\pi", "6"), ("7k", "7"), ("4y", "4"), ("5n", "5"), ("3", "3x"),
    ("2", "2\\sqrt{3}"), ("10000001", "10000000"), ("99999999", "100000000"), ("(a) 5, (b) 6", "(a) 5, (b) 7"),
    ("a) 5 b) 6", "a) 1 b) 2"), ("A", "(a) 5, (b) 6"), ("(a)", "(a) 5, (b) 6"), ("32, 349", "32349"),
    ("32349", "32, 349"), ("1½", "5.5"), ("2½", "1"), ("2 dozen", "2"), ("5 million", "5"),
    ("5 thousand", "5 million"), ("3 hundred", "3"), ("3²", "32"), ("2³", "23"), ("5 kg", "5 g"), ("5 cm", "5 mm"),
    ("€5", "$5"), ("5°C", "5°F"), ("60 mph", "60 km/h"), ("28%", "0.28%"), ("-5", "5"), ("1/2", "1/3"),
    ("x+1", "x-1"), ("(1,2)", "[1,2]"), ("A, B", "A"), ("A", "A, B"), ("A, B", "A, C"), ("not A", "A"),
    ("C because it is an A", "A"), ("A1", "A"), ("AB", "A"), ("1:2", "2:1"), ("5!", "5"), ("10^3", "10^4"),
    ("2^{10}", "210"), ("x = 5", "y = 5"), ("x=5", "x=6"), ("AB = 5", "AB = 6"), ("cat", "car"), ("listen", "silent"),
    ("god", "dog"), ("a", "b"), ("1,000", "1"), ("0.001", "1000"), ("3 or 4", "4"), ("3 and 4", "4"), ("12", "1 2"),
    ("1 2", "12"), ("5/0", "0"), ("five", "6"), ("twenty", "2"), ("first", "2"), ("1.22", "1.2"), ("1.23", "1.234"),
    ("7, 8", "78"), ("\\sqrt{2}", "2"), ("2\\sqrt{2}", "2\\sqrt{3}"), ("sin x", "cos x"), ("3 cats", "3 dogs"),
    ("I", "1"), ("O", "0"), ("2e", "2"), ("5m", "5"), ("3t", "3"), ("4h", "4"), ("8l", "8"), ("9c", "9"),
    ("1000000.5", "1000000"), ("1000000", "1000000.5"), ("2.999", "3"), ("m=6, n=5", "5, 6"),
    ("x=2, y=1", "(1,2)"), ("2, 1", "x=1, y=2"),
    ("H2O", "HO2"), ("C_2O", "CO_2"),
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
    assert grade(answer, rf"\boxed{{{answer}}}")
    assert not grade(None, answer)


def test_cases_that_were_marked_by_hand():
    wrong = [case for case in CASES if grade(case["prediction"], case["reference"]) != case["expected"]]
    assert len(CASES) == 128
    assert not wrong


# --- Choices ----------------------------------------------------------------------------------------------------------


def test_the_text_of_an_option_is_its_letter():
    options = ["12 cm", "red", "15 cm", "two"]
    assert grade("red", "B", options=options)
    assert grade("Red.", "(B)", options=options)
    assert grade("15", "C", options=options)
    assert grade("2", "D", options=options)
    assert grade("B", "red", options=options)
    assert grade("C", "15 cm", options=options)
    assert not grade("15 cm", "A", options=options)
    assert not grade("12 cm", "B", options=options)
    assert not grade("(A) red", "B", options=options)  # the letter counts
    assert not grade("A", "red", options=options)
    letters = ["C", "A", "B"]  # options that are letters: a letter is a letter of the list
    assert grade("B", "B", options=letters)
    assert not grade("A", "B", options=letters)


def test_options_are_read_from_the_question():
    assert options_in("Which?\n(A) red\n(B) blue\nAnswer with the letter.") == ["red", "blue"]
    assert options_in("Find x. Choices:\nA:1\nB:2") == ["1", "2"]
    assert options_in("Which?\nA. left\nB. right\nPlease answer.") == ["left", "right"]
    assert options_in("(A) alone") == options_in("What is (A)?") == options_in("B. second\nC. third") == []
    found = hints("Which?\n(A) red\n(B) blue", {"precision": 1.0, "accepted": ["5", 6]})
    assert found == {"options": ["red", "blue"], "accepted": ["5", "6"], "precision": 1}
    assert hints("?", {"options": [1, 2], "precision": float("nan")}) == {
        "options": ["1", "2"], "accepted": [], "precision": None,
    }  # fmt: skip


def test_letters():
    assert chosen_letters("B - the red one") == (frozenset("B"), "the red one")
    assert chosen_letters("A, C") == (frozenset("AC"), "")
    for text in ("(a) 5, (b) 6", "A: 30, B: 60", "A dog", "AB", "A1", "k", "x = B", "Bob", "", "and"):
        assert chosen_letters(text) is None, text
    assert chosen_letters("C because it is") is None
    assert chosen_letters("C because it is", reasons=True) == (frozenset("C"), "")


def test_accepted_answers_and_precision():
    assert grade("6", "5", accepted=["6", "six sides"])
    assert not grade("7", "5", accepted=["6"])
    assert grade("2.53", "2.5", precision=1)
    assert not grade("2.56", "2.5", precision=1)
    assert grade("3.0", "3", precision=0)
    assert not grade("2.53", "2.5")


# --- Spelling, words, units -------------------------------------------------------------------------------------------


def test_plain():
    assert plain(r"**The answer is** $\text{2}\,\dfrac{1}{2}$") == r"2 \frac{1}{2}"
    assert plain("1½") == "1 1/2"
    assert plain("x⁻²") == "x^{-2}"
    assert plain(r"11,\! 111,\! 111") == "11,111,111"
    assert plain("$5") == "$5"
    assert text_key(plain(" The Cat. ")) == "cat"
    assert text_key("a") == "a"
    assert text_key(plain(r"\textbf{\text{Red}}")) == "red"
    assert text_key("1 2") != text_key("12")


def test_numbers_in_words():
    values = {"zero": 0, "Twenty-one": 21, "one hundred and five": 105, "third": 3, "twelfth": 12, "twentieth": 20,
              "two million three hundred thousand": 2_300_000, "a dozen": 12}  # fmt: skip
    assert {text: number_in_words(text) for text in values} == values
    for text in ("", "a", "red", "seven cats", "fifty-fifty-x"):
        assert number_in_words(text) is None


def test_units():
    assert split_unit(r"9 \pi cm^{2}") == (r"9 \pi", "cm^{2}")
    assert split_unit("5 m") == ("5", "m")
    for text in ("5m", "3x", "2i", r"6\pi", "2 sin x", "7 and red", "x + 2"):
        assert split_unit(text) == (text, ""), text
    assert conversion("cm", "m") == pytest.approx(0.01)
    assert conversion("km/h", "m/s") == pytest.approx(1 / 3.6)
    assert conversion("mph", "miles per hour") == pytest.approx(1)
    assert conversion("sq ft", "ft^{2}") == 1
    assert conversion("cats", "cat") == conversion("", "m") == 1
    assert conversion("cats", "dogs") is conversion("kg", "m") is conversion("°C", "°F") is None


# --- The process of math-verify ---------------------------------------------------------------------------------------


def test_words_never_become_products_of_letters(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"asked math-verify about {args}")

    monkeypatch.setattr(grading._worker, "verify", refuse)
    assert not grade("listen", "silent")
    assert not grade("a red 7", "7 red cats")
    with pytest.raises(AssertionError, match="asked math-verify"):
        grade("x+1", "1+x+0")


@pytest.mark.parametrize("tower", ["10^{10^{10}}", "9^{9^{9^{9}}}", "100000000!", r"\dfrac{5^{5^{5^5}} - 5}{16}"])
def test_what_is_too_large_is_not_calculated(tower, caplog):
    assert not grade(tower, "92")
    assert not grade(tower, "x^2")
    assert grade(tower, tower)
    assert "took more than" not in caplog.text
    assert grade("x+1", "1+x")


def test_what_takes_too_long_is_wrong(caplog):
    assert grade("x+1", "1+x")
    process = grading._worker.process
    assert not grade(r"\sin(x)^{8}+\cos(x)^{8}", r"\frac{1}{64}(35+28\cos(4x)+\cos(8x))", timeout_s=0.01)
    assert "took more than 0.01 s: wrong" in caplog.text
    assert grading._worker.process is process  # it was interrupted, not killed
    assert grade("x+1", "1+x")


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs POSIX signals")
def test_a_worker_that_hangs_is_replaced(caplog):
    assert grade("x+1", "1+x")
    process = grading._worker.process
    os.kill(process.pid, signal.SIGSTOP)
    assert not grade("x+2", "2+x", timeout_s=0.2)
    assert "took more than 0.2 s: wrong" in caplog.text
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

    def question(said, wanted):
        return json.dumps([[said, False], [wanted, False], 1.0, 5]) + "\n"

    requests = io.StringIO(
        question("x+1", "1+x") + question("\\frac{", "1") + question("", "") + question("5", "\ud800")
    )
    replies = io.StringIO()
    serve(requests, replies)
    answers = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert answers == [{"ready": True}, {"equal": True}, {"equal": False}, {"equal": False}, {"equal": False}]
    assert equal(read("2x+1"), read("1+2x"))
    assert equal(read("The answer is $5$.", sentence=True), read("5"))
    assert not equal(read(r"\frac{1}{2006!}"), read(r"\frac{1}{2004!}"))  # both are tiny


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
        worker.verify(("x+1", False), ("1+x", False), 1.0, 1.0)


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
        assert grade(said, wanted, options=["1", wanted], precision=2) in (True, False)


def test_nothing_that_a_model_writes_raises():
    """Digits, brackets, Unicode and nesting, up to 100 kB; math-verify included. bench/grading.py has the times."""
    rng = random.Random(0)
    texts = ["9" * n for n in (310, 4300, 5000, 100_000)] + ["1e" + "9" * 400, "9" * 400 + "." + "9" * 400]
    texts += [b * n + "1" + b2 * n for b, b2 in ("()", "[]", "{}") for n in (7, 30, 2000, 50_000)]
    texts += [
        r"\frac{" * 30 + "1" + "}{2}" * 30,
        r"\boxed{" * 14_000 + "7",
        r"\sqrt{" * 9 + "2" + "}" * 9,
        "^".join("23456789"),
    ]
    texts += [
        "\ud800",
        "\u2028",
        "٣",
        "𝟙",
        "1/0",
        "0/0",
        "0^0",
        r"\frac{1}{0}",
        "½" * 50,
        "-" * 2000,
        "e" * 3000,
        "!" * 500,
    ]
    texts += [
        "".join(chr(rng.choice((rng.randint(32, 0x2FFF), rng.randint(0xD800, 0xDFFF)))) for _ in range(60))
        for _ in range(40)
    ]
    for text in texts:
        for answer in ("5", "x^2", "B", "5 cm", text):
            assert grade(text, answer) in (True, False)


def test_importing_needs_no_optional_package():
    code = "import sys; sys.modules.update(dict.fromkeys(['math_verify', 'sympy', 'transformers']))\n"
    code += "import vigos.eval.grading"
    subprocess.run([sys.executable, "-c", code], check=True)
