"""Statistics against exact values, and evaluations of the built-in model: same seed same file, also after kills."""

import json
import math
import random
import subprocess
import sys
from itertools import combinations, product

import numpy as np
import pytest
import torch
from helpers.processes import output_of
from PIL import Image

from vigos.data.examples import load_rows
from vigos.eval.evaluate import evaluate, model_fingerprint
from vigos.eval.results import EvaluationResult, compare
from vigos.eval.statistics import bootstrap_interval, holm, mean_interval, pass_at_k, sign_flip_test, wilson_interval
from vigos.method.prompts import Prompts
from vigos.rollout.engine import RolloutEngine

# --- Statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_counts_subsets(n):
    for correct in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([i < correct for i in range(n)], k))
            exact = sum(any(s) for s in subsets) / len(subsets)
            assert pass_at_k(n, correct, k) == pytest.approx(exact, abs=1e-12)


def test_pass_at_k_refuses_what_it_cannot_know():
    with pytest.raises(ValueError, match="k must be between 1 and the 3 samples, got 4"):
        pass_at_k(3, 1, 4)
    with pytest.raises(ValueError, match="correct must be between 0 and the 3 samples, got 4"):
        pass_at_k(3, 4, 1)


def test_wilson_interval():
    # Agresti & Coull 1998, table: 0 of 10, and the textbook 15 of 20.
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    for p in (0.05, 0.4):  # it covers the truth about as often as it says
        draws = torch.binomial(torch.full((2000,), 60.0), torch.full((2000,), p), generator=generator).tolist()
        covered = sum(low <= p <= high for low, high in (wilson_interval(x, 60) for x in draws))
        assert 0.92 < covered / 2000 < 0.98


def test_sign_flip_test_is_mcnemar_on_single_examples():
    for better, worse in ((0, 0), (1, 0), (5, 0), (3, 9), (40, 61), (7, 7)):
        n = better + worse
        tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1)) / 2**n
        differences = [1.0] * better + [0.0] * 5 + [-1.0] * worse
        assert sign_flip_test(differences) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    assert 0 <= sign_flip_test([1.0] * 20_000 + [-1.0] * 20_500) < 0.02  # no overflow where coefficients pass 1e308


def test_sign_flip_test_counts_every_sign_of_every_cluster():
    differences = [1, 1, -1, 0.25, 0.5, 0, 1, -0.75, 1 / 3, 1 / 3]
    clusters = "aabbccdefg"
    sums = [sum(d for d, name in zip(differences, clusters, strict=True) if name == c) for c in "abcdefg"]
    flipped = [abs(sum(s * v for s, v in zip(signs, sums, strict=True))) for signs in product((1, -1), repeat=7)]
    exact = sum(f >= abs(sum(sums)) - 1e-9 for f in flipped) / 2**7
    assert sign_flip_test(differences, clusters) == pytest.approx(exact, rel=1e-12)
    # Two images that always fall together are one observation: the same question of each does not halve the chance.
    assert sign_flip_test([1.0] * 10, [i // 2 for i in range(10)]) == pytest.approx(2 / 2**5)


def test_holm():
    assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_intervals_and_tests_hold_under_correlated_examples(correlation):
    """The truth lies in 93 to 97 % of the intervals, and a test at 5 % raises a false alarm in no more than that."""
    rng = np.random.default_rng(3)
    clusters = [i // 2 for i in range(200)]

    def outcomes(p):
        shared = rng.random((400, 100, 1)) < correlation
        return np.where(shared, rng.random((400, 100, 1)) < p, rng.random((400, 100, 2)) < p).astype(float)

    a, b = outcomes(0.75), outcomes(0.75)
    intervals = [mean_interval(run.ravel().tolist(), clusters) for run in a]
    covered = sum(low <= 0.75 <= high for low, high in intervals) / 400
    assert 0.925 <= covered <= 0.98  # 400 draws: a standard error of 1.1 points
    alarms = sum(sign_flip_test((x - y).ravel().tolist(), clusters) < 0.05 for x, y in zip(a, b, strict=True)) / 400
    assert alarms <= 0.07


def test_bootstrap_interval():
    values = [float(v) for v in torch.rand(400, generator=torch.Generator().manual_seed(1)).gt(0.7)]
    low, high = bootstrap_interval(values)
    expected = wilson_interval(sum(values), 400)
    assert (low, high) == pytest.approx(expected, abs=0.01)
    assert bootstrap_interval(values) == (low, high)
    # Rows of a cluster that all agree carry the information of one row: the interval is sqrt(4) as wide.
    wide = bootstrap_interval([v for v in values for _ in range(4)], [i for i in range(400) for _ in range(4)])
    narrow = bootstrap_interval([v for v in values for _ in range(4)])
    assert (wide[1] - wide[0]) == pytest.approx(high - low, rel=0.1)
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(2, rel=0.15)
    assert bootstrap_interval([]) == (0.0, 1.0)


def test_mean_interval_picks_by_the_values():
    assert mean_interval([1.0, 0.0, 1.0]) == wilson_interval(2, 3)
    assert mean_interval([0.5, 0.25, 1.0]) == bootstrap_interval([0.5, 0.25, 1.0])


# --- Results made by hand ---------------------------------------------------------------------------------------------


def sample(correct=True, valid=True, prediction="x", finished=True, tokens=10):
    reason = "" if valid else "no_box"
    return {
        "text": "t", "prediction": prediction, "correct": correct, "valid": valid, "reason": reason,
        "finished": finished, "tokens": tokens,
    }  # fmt: skip


def result_of(outcomes, extras=None, n=1, k=1):
    """`outcomes`: for each row the list of its samples' correctness."""
    records = []
    for i, row in enumerate(outcomes):
        extra = extras[i] if extras else {}
        samples = [sample(c) if isinstance(c, bool) else c for c in row]
        records.append({"key": f"r{i}", "problem_id": f"r{i}", "answer": "x", "extra": extra, "samples": samples})
    return EvaluationResult({"n": n, "k": k}, records)


def test_summary_counts_what_it_says():
    bad = {"key": "r9", "problem_id": "r9", "skipped": {"reason": "missing_image", "detail": "gone"}}
    outcomes = [
        [True],
        [sample(True, valid=False)],
        [sample(False, valid=False, prediction=None, finished=False, tokens=50)],
        [False],
    ]
    result = result_of(outcomes)
    result.records.append(bad)
    summary = result.summary()
    assert (summary["examples"], summary["skipped"], summary["skipped_reasons"]) == (4, 1, {"missing_image": 1})
    assert (summary["accuracy"], summary["valid_rate"], summary["unparseable"]) == (0.5, 0.5, 0.25)
    assert summary["accuracy_interval"] == list(wilson_interval(2, 4))
    assert (summary["unfinished"], summary["tokens_mean"]) == (0.25, 20)
    assert summary["invalid_reasons"] == {"no_box": 2}
    assert not {"score", "prior", "variants", "groups", "pass@1"} & set(summary)
    json.dumps(summary)


def test_several_samples_a_row():
    outcomes = [[True, False, False, False], [False] * 4, [True] * 4]
    summary = result_of(outcomes, n=4, k=2).summary()
    assert summary["avg@4"] == summary["accuracy"] == pytest.approx(5 / 12)
    assert summary["pass@2"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert summary["pass@2_interval"] == list(bootstrap_interval([0.5, 0.0, 1.0]))
    plain = result_of(outcomes, n=4, k=4).summary()
    assert plain["pass@4"] == pytest.approx(2 / 3)
    assert plain["pass@4_interval"] == list(wilson_interval(2, 3))


def paired_extras(triplets):
    return [
        {"triplet": t, "role": "conflict" if place else "prior", "variant": "FP"[t % 2]}
        for t in range(triplets)
        for place in range(3)
    ]


def test_score_and_prior_come_from_their_rows():
    extras = paired_extras(4)
    extras.append({"role": "other"})
    outcomes = [[e.get("role") == "prior"] for e in extras]  # a model that always answers the prior
    outcomes[1] = [True]
    summary = result_of(outcomes, extras).summary(group_by="role")
    assert (summary["score"], summary["score_examples"]) == (1 / 8, 8)
    assert (summary["prior"], summary["prior_examples"]) == (1.0, 4)
    assert summary["score_interval"] == list(mean_interval([1.0] + [0.0] * 7, [0, 0, 1, 1, 2, 2, 3, 3]))
    assert summary["prior_interval"] == list(wilson_interval(4, 4))  # one image a triplet
    assert summary["variants"] == {"F": {"score": 0.25, "prior": 1.0}, "P": {"score": 0.0, "prior": 1.0}}
    groups = summary["groups"]
    assert {name: (g["accuracy"], g["examples"]) for name, g in groups.items()} == {
        "prior": (1.0, 4), "conflict": (1 / 8, 8), "other": (0.0, 1),
    }  # fmt: skip
    with pytest.raises(ValueError, match="group_by must be a field of the examples, got 'colour'"):
        result_of(outcomes, extras).summary(group_by="colour")
    with pytest.raises(ValueError, match=r"metric must be one of accuracy, .* got 'scores'"):
        result_of(outcomes).values("scores")


def test_compare_is_mcnemar_on_single_samples():
    a = result_of([[True]] * 30 + [[False]] * 70)
    b = result_of([[True]] * 25 + [[False]] * 5 + [[True]] * 20 + [[False]] * 50)
    found = compare(a, b)
    assert (found.examples, found.a, found.b, found.better, found.worse) == (100, 0.3, 0.45, 20, 5)
    assert found.difference == pytest.approx(0.15)
    assert found.p_value == sign_flip_test([1.0] * 20 + [-1.0] * 5)
    assert found.interval[0] < 0.15 < found.interval[1]
    assert found.interval[0] > 0  # as the p-value of .004 says
    back = compare(b, a)
    assert (back.difference, back.p_value, back.better) == (-found.difference, found.p_value, 5)


def test_compare_resamples_triplets_together():
    extras = paired_extras(40)
    a = result_of([[False]] * 120, extras)
    b = result_of([[e["triplet"] % 2 == 0] for e in extras], extras)
    width = (lambda c: c.interval[1] - c.interval[0])(compare(a, b))
    alone = (lambda c: c.interval[1] - c.interval[0])(compare(result_of([[False]] * 120), b))
    assert alone < width
    assert compare(a, b, metric="score").examples == 80
    assert compare(a, b, metric="prior").examples == 40


def test_compare_refuses_runs_of_different_data():
    a, b = result_of([[True]]), result_of([[True]])
    b.records[0]["answer"] = "y"
    with pytest.raises(ValueError, match="the answer of example r0 is 'x' in a and 'y' in b"):
        compare(a, b)
    with pytest.raises(ValueError, match="no example in common that score is taken over"):
        compare(a, a, metric="score")


@pytest.mark.slow
def test_compare_finds_what_is_there_and_nothing_else():
    """Two runs of one model, and a planted difference of ten points, both at n = 600."""
    silent = found = 0
    for seed in range(100):
        rng = random.Random(seed)
        ability = [rng.choice((0.05, 0.5, 0.9)) for _ in range(600)]
        runs = [result_of([[rng.random() < p + shift] for p in ability]) for shift in (0, 0, 0.1)]
        silent += compare(runs[0], runs[1]).differs is False
        found += compare(runs[0], runs[2]).differs
    assert silent >= 94
    assert found >= 95


# --- Evaluations ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    from vigos.world import load_base

    return load_base()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from vigos.world import write_world

    return write_world(tmp_path_factory.mktemp("world"), "test", 4, seed=3)  # 12 rows


SHORT = {"temperature": 1.0, "max_new_tokens": 12, "batch_size": 4, "seed": 5}


class Scripted(RolloutEngine):
    """A rollout engine that says what it is told, in the tokens of `tokenizer`."""

    def __init__(self, tokenizer, say):
        self.tokenizer, self.say, self.calls = tokenizer, say, []
        self.eos_token_ids = (tokenizer.eos_token_id,)

    def generate(self, prompts, sampling, seed):
        self.calls.append((len(prompts), list(seed)))
        texts = [text for prompt in prompts for text in self.say(self.tokenizer.decode(prompt.ids), sampling.n)]
        return [
            torch.tensor([*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id])
            for text in texts
        ]


def test_samples_are_graded_under_the_structured_prompt(base, world, tmp_path):
    model, processor = base
    asked = []

    def say(prompt, n):
        asked.append(prompt)
        return ["a 7</description><think>so</think>\\boxed{red}", "\\boxed{blue}", "no idea"][:n]

    engine = Scripted(processor.tokenizer, say)
    progress = []
    result = evaluate(
        model, processor, load_rows(world), prompts=Prompts(system="Look."), engine=engine, k=2, n=3,
        temperature=1.0, batch_size=9, records=tmp_path / "deep" / "r.jsonl",
        progress=lambda *counts: progress.append(counts),
    )  # fmt: skip
    assert [calls for calls, _ in engine.calls] == [3, 3, 3, 3]  # nine sequences are three rows of three samples
    assert progress == [(3, 12), (6, 12), (9, 12), (12, 12)]
    assert all(prompt.endswith("<description>") and "between <think> and </think>" in prompt for prompt in asked)
    for record in result.records:
        first, second, third = record["samples"]
        assert (first["valid"], first["prediction"], first["reason"]) == (True, "red", "")
        assert (second["valid"], second["prediction"], second["reason"]) == (False, "blue", "tagless")
        assert (third["valid"], third["prediction"], third["correct"]) == (False, None, False)
        assert first["text"] == "a 7</description><think>so</think>\\boxed{red}"
        assert first["correct"] == (record["answer"] == "red")
        assert all(s["finished"] for s in record["samples"])
        assert {"triplet", "role", "variant", "kind"} <= set(record["extra"])
    summary = result.summary()
    assert (summary["valid_rate"], summary["unparseable"]) == pytest.approx((1 / 3, 1 / 3))
    assert (summary["score_examples"], summary["prior_examples"]) == (8, 4)
    assert EvaluationResult.load(tmp_path / "deep" / "r.jsonl") == result


def test_the_seed_decides_and_the_other_rows_do_not(base, world, tmp_path):
    model, processor = base
    everything = evaluate(model, processor, load_rows(world), records=tmp_path / "a.jsonl", **SHORT)
    evaluate(model, processor, load_rows(world), records=tmp_path / "b.jsonl", **SHORT)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    lines = world.read_text().splitlines(keepends=True)
    some = world.parent / "some.jsonl"
    some.write_text("".join(lines[7:2:-1]))
    part = evaluate(model, processor, load_rows(some), **(SHORT | {"batch_size": 3}))
    texts = {r["key"]: [s["text"] for s in r["samples"]] for r in everything.records}
    assert [texts[r["key"]] for r in part.records] == [[s["text"] for s in r["samples"]] for r in part.records]
    other = evaluate(model, processor, load_rows(some), **(SHORT | {"seed": 6}))
    assert [r["samples"] for r in other.records] != [r["samples"] for r in part.records]
    streamed = evaluate(model, processor, load_rows(some, streaming=True), **(SHORT | {"batch_size": 3}))
    assert streamed.records == part.records


def test_resuming_gives_the_file_of_an_uninterrupted_run(base, world, tmp_path):
    model, processor = base
    evaluate(model, processor, load_rows(world), records=tmp_path / "whole.jsonl", **SHORT)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    ends = [i + 1 for i, b in enumerate(whole) if b == ord("\n")]
    path = tmp_path / "cut.jsonl"
    # Nothing, a cut header, the header, a cut row, four rows (a batch), six rows, a cut tail, all.
    for cut in (0, 5, ends[0], ends[0] + 9, ends[4], ends[6], len(whole) - 3, len(whole)):
        path.write_bytes(whole[:cut])
        batches = []
        evaluate(model, processor, load_rows(world), records=path, progress=lambda *c, b=batches: b.append(c), **SHORT)
        assert path.read_bytes() == whole, cut
        assert len(batches) == 3 - (sum(e <= cut for e in ends[1:]) // 4)
    assert EvaluationResult.load(path).summary()["examples"] == 12


def test_records_of_another_evaluation_are_not_mixed(base, world, tmp_path):
    model, processor = base
    path = tmp_path / "r.jsonl"
    evaluate(model, processor, load_rows(world), records=path, **SHORT)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"come from another evaluation \(seed 5 there, 6 here\); resume=False"):
        evaluate(model, processor, load_rows(world), records=path, **(SHORT | {"seed": 6}))
    with pytest.raises(ValueError, match=r"prompts '.*' there, '.*' here"):
        evaluate(model, processor, load_rows(world), records=path, prompts=Prompts(student="{problem}"), **SHORT)
    other = world.parent / "other.jsonl"
    other.write_text("".join(reversed(world.read_text().splitlines(keepends=True))))
    with pytest.raises(
        ValueError, match="belong to other examples: example 0 is 'test-00000' there and 'test-00011' here"
    ):
        evaluate(model, processor, load_rows(other), records=path, **SHORT)
    weight = model.get_input_embeddings().weight
    kept = weight.detach().clone()
    try:
        weight.data += 0.01
        with pytest.raises(ValueError, match=r"model '.*' there"):
            evaluate(model, processor, load_rows(world), records=path, **SHORT)
    finally:
        weight.data.copy_(kept)
    assert path.read_bytes() == before
    evaluate(model, processor, load_rows(world), records=path, resume=False, **(SHORT | {"seed": 6}))
    assert path.read_bytes() != before
    path.write_text("something else\n")
    with pytest.raises(ValueError, match="is not a records file"):
        evaluate(model, processor, load_rows(world), records=path, **SHORT)
    with pytest.raises(ValueError, match="its first line holds no settings"):
        EvaluationResult.load(path)


def test_a_fingerprint_follows_the_weights(base):
    model, _ = base
    first = model_fingerprint(model)
    assert model_fingerprint(model) == first
    kept = model.lm_head.weight.detach().clone()
    try:
        model.lm_head.weight.data += 1e-3
        assert model_fingerprint(model) != first
    finally:
        model.lm_head.weight.data.copy_(kept)
    assert model_fingerprint(model) == first


def test_rows_that_cannot_be_used_are_counted(base, world, tmp_path):
    model, processor = base
    lines = [json.loads(line) for line in world.read_text().splitlines()]
    lines[1]["images"] = ["images/gone.png"]
    lines[4]["answer"] = "{"
    wide = world.parent / "images" / "wide.png"
    Image.new("RGB", (1600, 8)).save(wide)
    lines[5]["images"] = ["images/wide.png"]
    lines[6]["problem_id"] = lines[7]["problem_id"]  # two rows of one name
    path = world.parent / "bad.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:8]))
    rows = load_rows(path)
    result = evaluate(model, processor, rows, records=tmp_path / "r.jsonl", **SHORT)
    assert rows.bad_examples == "raise"  # the caller's dataset is left as it was
    summary = result.summary()
    assert (summary["examples"], summary["skipped"]) == (5, 3)
    assert summary["skipped_reasons"] == {"missing_image": 1, "unbalanced_answer": 1, "aspect_ratio": 1}
    assert [r["key"] for r in result.records][6:] == ["test-00007", "test-00007#2"]
    skipped = result.records[1]
    assert (skipped["problem_id"], skipped["skipped"]["reason"]) == ("test-00001", "missing_image")
    path.write_text("".join(json.dumps(line | {"answer": ""}) + "\n" for line in lines[:8]))
    with pytest.raises(ValueError, match=r"none of the 8 could be used \(empty_answer 8\)"):
        evaluate(model, processor, load_rows(path), **SHORT)


def test_a_lone_surrogate_costs_an_example(base, tmp_path):
    _, processor = base
    rows = [{"problem": p, "answer": a, "problem_id": str(i)}
            for i, (p, a) in enumerate([("What \ud800?", "7"), ("What?", "a\ud800b"), ("What?", "7")])]  # fmt: skip
    engine, path = Scripted(processor.tokenizer, lambda prompt, n: ["\\boxed{7}"] * n), tmp_path / "r.jsonl"
    result = evaluate(None, processor.tokenizer, load_rows(rows), engine=engine, records=path)
    assert "skipped" in result.records[0]
    assert result.records[2]["samples"][0]["correct"]
    assert EvaluationResult.load(path) == result
    assert evaluate(None, processor.tokenizer, load_rows(rows), engine=engine, records=path).records == result.records


def test_options_accepted_answers_and_precision_are_graded_with(base):
    """A text for its letter, a further right answer, a number to the precision asked for; the same in training."""
    _, processor = base
    rows = [
        {"problem": "Which?\n(A) red\n(B) blue", "answer": "B"},
        {"problem": "How many?", "answer": "5", "accepted": ["blue"]},
        {"problem": "How long?", "answer": "2.5", "precision": 1.0},
    ]
    engine = Scripted(processor.tokenizer, lambda prompt, n: ["\\boxed{9} so \\boxed{blue}"])
    found = evaluate(None, processor.tokenizer, load_rows(rows), engine=engine).records
    assert [r["samples"][0]["correct"] for r in found] == [True, True, False]
    assert found[0]["samples"][0]["prediction"] == "blue"


def test_limits_of_the_image_processor_cost_a_row(base, world):
    model, processor = base
    seen = []

    def refuse(**options):
        seen.append(1)
        raise ValueError("absolute aspect ratio must be smaller than 200")

    class Refusing:
        tokenizer, image_processor = processor.tokenizer, processor.image_processor
        apply_chat_template = staticmethod(processor.apply_chat_template)
        __call__ = staticmethod(refuse)

    with pytest.raises(ValueError, match=r"none of the 12 could be used \(not_encodable 12\)"):
        evaluate(model, Refusing(), load_rows(world), **SHORT)
    assert len(seen) == 12


def test_text_only_rows_and_a_tokenizer(base):
    model, processor = base
    rows = load_rows([{"problem": "What?", "answer": "7", "problem_id": str(i)} for i in range(3)])
    result = evaluate(model, processor.tokenizer, rows, **SHORT)
    assert result.summary()["examples"] == 3
    with_image = load_rows([{"problem": "What?", "answer": "7", "images": [Image.new("RGB", (20, 20))]}])
    with pytest.raises(
        ValueError, match=r"processor must have an image processor for example 0, which has 1 image\(s\)"
    ):
        evaluate(model, processor.tokenizer, with_image, **SHORT)


def test_an_engine_alone_and_another_grader(base, world):
    _, processor = base
    engine = Scripted(processor.tokenizer, lambda prompt, n: ["\\boxed{x}"] * n)
    result = evaluate(None, processor, world, engine=engine, grader=lambda said, wanted: said == "x")
    assert result.summary()["accuracy"] == 1.0
    assert result.settings["model"] == ""


def test_wrong_arguments_are_named(base, world):
    model, processor = base
    cases = {
        "k must be between 1 and n = 2, got 3": {"k": 3, "n": 2, "temperature": 1.0},
        "temperature must be above 0 for 5 samples an example": {"k": 5},
        "batch_size must be at least 1, got 0": {"batch_size": 0},
        "top_p must be in": {"top_p": 0},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            evaluate(model, processor, world, **options)
    with pytest.raises(ValueError, match="model must be given where there is no engine"):
        evaluate(None, processor, world)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch, transformers, vigos.rollout.generate, vigos.eval.evaluate
from vigos.data.examples import load_rows
from vigos.world import load_base

torch.set_num_threads(1)
model, processor = load_base()
rows, path = sys.argv[1], Path(sys.argv[2])
options = {"temperature": 1.0, "max_new_tokens": 12, "batch_size": 2, "seed": 5}


def child():  # nothing was computed before the fork, so no thread of the parent's is missed
    vigos.eval.evaluate.evaluate(model, processor, load_rows(rows), records=path, **options)


rng = random.Random(0)
kills = 0
while True:
    pid = os.fork()
    if pid == 0:
        child()
        os._exit(0)
    start_size, patience = path.stat().st_size if path.exists() else 0, rng.random() * 0.05
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        # The first writes of this life, and a moment more: in the middle of a batch, or of a line.
        if kills < 10 and path.exists() and path.stat().st_size > start_size:
            time.sleep(patience)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            break
        time.sleep(0.001)
    else:
        break
print(kills)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_killed_for_real_ten_times(base, tmp_path):
    from vigos.world import write_world

    model, processor = base
    rows = write_world(tmp_path / "world", "test", 16, seed=4)  # 48 rows, 24 batches
    options = SHORT | {"batch_size": 2}
    evaluate(model, processor, load_rows(rows), records=tmp_path / "whole.jsonl", **options)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    said = output_of(script, [str(rows), str(tmp_path / "killed.jsonl")], tmp_path / "log")
    assert said.split()[-1] == "10"
    whole, killed = (EvaluationResult.load(tmp_path / name) for name in ("whole.jsonl", "killed.jsonl"))
    assert [r["key"] for r in killed.records] == [r["key"] for r in whole.records]
    assert killed == whole


def test_importing_needs_no_optional_package():
    names = ["PIL", "datasets", "transformers", "peft", "math_verify", "accelerate"]
    code = f"import sys; sys.modules.update(dict.fromkeys({names})); import vigos.eval.evaluate"
    subprocess.run([sys.executable, "-c", code], check=True)
