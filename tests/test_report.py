"""The report: what it says of a real run, that nothing in a run becomes markup, and how it behaves in Chromium."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import (
    CUT_OFF,
    PROMPTS,
    TAGLESS,
    VALID_A,
    VALID_B,
    ScriptedEngine,
    chat,
    config,
    full_log_probs,
    picture,
    processor,
    rows,
    tiny_student,
    trainer,
)
from PIL import Image

from vigos.cli import main
from vigos.divergence.head import Head
from vigos.eval.evaluate import evaluate
from vigos.report.evaluations import flipped
from vigos.report.page import (
    MAX_DATA_BYTES,
    MAX_TOKENS,
    headline,
    load_run,
    render,
    rollout_data,
    script_json,
    write_report,
)
from vigos.train.records import token_texts
from vigos.train.top_tokens import top_tokens

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">{{ 7*7 }}"
EVIL_COMPLETION = f"A red 7 {EVIL}</description><think>The </script> is red.</think>\\boxed{{<b>red</b>}}"
WIDE = "A snowman ☃ and 數字.</description><think>ok then</think>\\boxed{☃}"


def evaluated(folder: Path, name: str, answers: list[str]) -> None:
    """Records of a real evaluation whose completions are given: two rows of conflict and one of prior a triplet."""
    data = [
        row | {"answer": "red", "role": "conflict" if i % 3 else "prior", "triplet": i // 3}
        for i, row in enumerate(rows(len(answers)))
    ]
    texts = [f"A red 7.</description><think>so</think>\\boxed{{{answer}}}" for answer in answers]
    engine: Any = ScriptedEngine(texts)
    evaluate(
        None, processor(), data, prompts=PROMPTS, engine=engine, records=folder / name, max_new_tokens=64,
        eos_token_ids=[processor().tokenizer.eos_token_id],
    )  # fmt: skip


def a_run(folder: Path, **options: Any) -> Path:
    data = rows(6)
    data[1]["problem"] = EVIL
    data[1]["problem_id"] = "<b>row</b>"
    data[2]["images"] = [picture(7, width=320, height=480)]
    texts = [VALID_A, EVIL_COMPLETION, CUT_OFF, VALID_B, TAGLESS, WIDE]
    made = trainer(
        tiny_student(),
        config(
            folder / "train",
            max_steps=3,
            per_device_train_batch_size=6,
            completion_steps=1,
            completion_top_k=3,
            palr_steps=2,
            token_clip=0.3,
            grade_rollouts=True,
            **options,
        ),
        data,
        texts=texts,
    )
    made.train()
    evaluated(folder, "before.jsonl", ["red", "blue", "blue", "red", "blue", "red"] * 3)
    evaluated(folder, "after.jsonl", ["red", "red", "blue", "red", "red", "red"] * 3)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_run(tmp_path_factory.mktemp("runs") / "vigos <&> run")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_run(tmp_path_factory.mktemp("runs") / "opsd", method="opsd")


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return write_report(run, run / "report.html")


# --- What a run folder keeps for it -----------------------------------------------------------------------------------


def test_likeliest_tokens_are_those_of_the_full_logits(run: Path) -> None:
    """The first step's student is the teacher with a fresh adapter: the base model itself."""
    record = json.loads((run / "train" / "completions" / "step-000001.jsonl").read_text().splitlines()[0])
    row = rows(1)[0]
    ids = torch.tensor(processor().tokenizer(VALID_A, add_special_tokens=False)["input_ids"])
    asked = chat(f"{row['problem']} Describe, think, answer.", "<description>")
    exact = full_log_probs(tiny_student(), asked, row["images"][0], ids).exp()
    for term, of in record["teachers"].items():
        for token, top in zip(of["tokens"], of["student_top"], strict=True):
            values, places = exact[token].topk(3)
            assert [p for _, p in top] == pytest.approx(values.tolist(), abs=2e-5), term
            assert [text for text, _ in top] == [processor().tokenizer.decode([i]) for i in places.tolist()]
    assert len(record["teachers"]["perception"]["teacher_top"][0]) == 3


def test_likeliest_tokens_in_many_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, generator=generator) for size in ((40, 8), (30, 8), (30,)))
    rows_ = torch.randint(40, (300,), generator=generator)
    ids, p = top_tokens(hidden, Head(weight, bias, scale=0.5, softcap=3.0), rows_, 4, temperature=0.7)
    z = 3.0 * torch.tanh((hidden.double() @ weight.double().T + bias.double()) * 0.5 / 3.0) / 0.7
    values, places = z.softmax(-1)[rows_].topk(4)
    assert torch.equal(ids, places)
    torch.testing.assert_close(p.double(), values, rtol=1e-5, atol=1e-6)
    assert top_tokens(hidden, Head(weight), rows_[:2], 99)[0].shape == (2, 30)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        top_tokens(hidden, Head(weight), rows_, 0)


def test_images_are_kept_once_and_small(run: Path) -> None:
    from PIL import Image

    records = [
        json.loads(line)
        for path in sorted((run / "train" / "completions").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    names = {name for record in records for name in record["images"]}
    assert len(records) == 18
    assert {p.name for p in (run / "train" / "completions" / "images").iterdir()} == {n.split("/")[1] for n in names}
    assert len(names) == 6
    sizes = {Image.open(run / "train" / "completions" / name).size for name in names}
    assert (171, 256) in sizes
    small = next(r for r in records if r["problem_id"] == "row-0")["images"][0]
    assert Image.open(run / "train" / "completions" / small).convert("RGB").tobytes() == picture(0).tobytes()


def test_characters_split_over_tokens_survive() -> None:
    snow = "a☃b".encode()
    assert token_texts([snow[:2], snow[2:3], snow[3:]]) == ["a", "", "☃b"]
    assert "".join(token_texts([b"ok", b"\xe2\x98"])) == "ok�"


# --- What the page says -----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements and attributes of a page, and the text of its script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


def test_page_is_one_file_with_one_script(page: Path) -> None:
    text = page.read_text()
    found = Page(text)
    data, script = found.scripts
    assert json.loads(data)["runs"] == ["vigos <&> run"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a)
    assert f"script-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none';")
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids)), "ids are unique over all figures"
    used = re.findall(r"url\(#([^)]+)\)", text) + [a["href"][1:] for t, a in found.tags if t == "use" and a.get("href")]  # type: ignore[index]
    assert set(used) <= set(ids)


def test_nothing_of_a_run_becomes_markup(run: Path, page: Path) -> None:
    text = page.read_text()
    assert "<script>document" not in text
    assert "<img src=x" not in text
    assert "<b>row</b>" not in text
    assert "vigos &lt;&amp;&gt; run" in text
    data = json.loads(Page(text).scripts[0])
    evil = next(r for r in data["rollouts"] if r["id"] == "<b>row</b>")
    assert evil["problem"] == EVIL
    assert "".join(data["texts"][i] for i in evil["tokens"]).startswith(EVIL_COMPLETION)
    for awkward in ("</script>", "<!--", "]]>", "\u2028", '"quote"', "&amp;"):
        assert json.loads(script_json([awkward])) == [awkward]
        assert not set(script_json([awkward])) & set("<>&\u2028")


def test_headline_is_paired_and_has_intervals(run: Path) -> None:
    loaded = load_run(run)
    score, prior, valid = headline(loaded.evaluations.before, loaded.evaluations.after)
    assert [n.label for n in (score, prior, valid)] == ["Score", "Prior", "In format"]
    assert score.before is not None
    assert score.after is not None
    assert score.comparison is not None
    assert (round(score.before[0]), round(score.after[0]), score.comparison.examples) == (25, 75, 12)
    assert score.before[1] < score.before[0] < score.before[2]
    assert (score.comparison.better, score.comparison.worse) == (6, 0)
    text = render([loaded])
    assert "+50.0" in text
    assert "12 examples" in text


def test_evaluations_of_other_rows_are_not_paired(run: Path, tmp_path: Path) -> None:
    """Numbers yes, a difference no: neither for other keys nor for the same keys with other answers."""
    loaded = load_run(run / "train")
    assert (loaded.name, loaded.evaluations.before is not None) == (run.name, True)
    lines = (run / "after.jsonl").read_text().splitlines()
    for name, change in (("keys", {"key": "other"}), ("answers", {"answer": "other"})):
        path = tmp_path / f"{name}.jsonl"
        changed = [json.dumps(json.loads(line) | change) for line in lines[1:]]
        path.write_text("\n".join([lines[0], *changed]) + "\n")
        numbers = headline(loaded.evaluations.before, load_run(run, after=path).evaluations.after)
        assert all(n.after is not None and n.comparison is None for n in numbers)
    render([load_run(run, after=tmp_path / "keys.jsonl")])


def test_rollout_data_holds_what_was_logged(run: Path) -> None:
    loaded = load_run(run)
    data = rollout_data([loaded])
    assert len(data["rollouts"]) == loaded.written == 18
    assert len(data["images"]) == 6
    for shown, record in zip(data["rollouts"], loaded.rollouts, strict=True):
        assert [data["texts"][i] for i in shown["tokens"]] == record["tokens"]
        logged = sum(len(of["tokens"]) for of in record["teachers"].values())
        assert len(shown["taught"]) == logged
        for token, teacher, segment, kl, clipped, p, q, top_p, top_q in shown["taught"]:
            of = record["teachers"][("perception", "reasoning", "reference")[teacher]]
            i = of["tokens"].index(token)
            assert (segment, bool(clipped)) == (of["segments"][i], of["clipped"][i])
            assert [kl, p, q] == [round(of[k][i], 5) for k in ("divergence", "student_logprob", "teacher_logprob")]
            assert [data["texts"][x] for x in top_q[::2]] == [text for text, _ in of["teacher_top"][i]]
            assert len(top_p) == 6


def test_own_teachers_and_what_they_saw(tmp_path: Path) -> None:
    """Seven teachers have a colour, a curve and a line of the legend each; views are drawn with their owner's name."""
    views = ["blank", "blur", "none", {"mask": "box"}, "shuffle", None, {"crop": "box"}]
    teachers = [
        {"name": f"own{i}", "reads": "student"} | ({"view": view} if view else {}) for i, view in enumerate(views)
    ]
    data = [row | {"box": [0, 0, 16, 16]} for row in rows(2)]
    args = config(tmp_path / "train", teachers=teachers, clip_mode="none", completion_steps=1)
    trainer(tiny_student(), args, data, texts=[VALID_A, VALID_B]).train()
    loaded = load_run(tmp_path)
    shown = rollout_data([loaded])
    names = [teacher["name"] for teacher in teachers]
    assert shown["teachers"][3:] == names
    first = shown["rollouts"][0]
    assert {t[1] for t in first["taught"]} == set(range(3, 10))
    seen = dict(first["views"])
    assert seen.keys() == {name for name, view in zip(names, views, strict=True) if view}
    assert seen["own2"] == []
    kept = {name: {shown["images"][i]["src"] for i in images} for name, images in seen.items()}
    assert len(set().union(*kept.values())) == 5, "each another picture"
    page = write_report(tmp_path, tmp_path / "page.html").read_text(encoding="utf-8")
    for name in names:
        assert re.search(f'<span class="tok t[3-8]" [^>]*>{name}</span> of the run&#39;s own: reads student', page)
        assert f'"kl/{name}"' in page or f">{name}<" in page
    assert ">perception<" not in page


def test_figures_follow_the_log(page: Path) -> None:
    text = page.read_text()
    for title in ("Loss by term", "PALR", "Clipped divergence", "Invalid rollouts, by reason", "Time of a step"):
        assert title in text
    assert "tagless" not in text.split('id="data"')[0] or "no tags at all" in text
    assert "no tags at all" in text
    assert "Left out" not in text, "nothing was"
    assert not re.findall(r"#0a0b0|#01010|#02020|#03030", text), "a marker colour was left"


def test_damaged_pictures_cost_themselves(tmp_path: Path, run: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    pictures = sorted((folder / "train" / "completions" / "images").iterdir())
    shown = len(rollout_data([load_run(folder)])["images"])
    assert shown == len(pictures) >= 3
    content = pictures[0].read_bytes()
    pictures[0].write_bytes(content[: len(content) // 2])
    pictures[1].write_bytes(b"")
    assert len(rollout_data([load_run(folder)])["images"]) == shown - 2
    write_report(folder, tmp_path / "report.html")


def test_older_and_emptier_runs(tmp_path: Path, run: Path) -> None:
    """Without evaluations, images, likeliest tokens or rollouts; and with lines cut off by a kill."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 0.5, "kl/perception": 0.1, "examples/skipped": 2}\n{"step": 2, "lo'
    )
    text = write_report(bare, tmp_path / "bare.html").read_text()
    assert "Divergence before the clip" in text
    assert "Left out" in text
    assert "Before and after</h2>" not in (tmp_path / "bare.html").read_text()
    folder = bare / "completions"
    folder.mkdir()
    source = (run / "train" / "completions" / "step-000001.jsonl").read_text().splitlines()[0]
    old = json.loads(source)
    del old["images"]
    for of in old["teachers"].values():
        del of["student_top"], of["teacher_top"], of["student_logprob"]
    evil = old | {"images": ["../../secret.png", "images/" + "0" * 24 + ".png"], "correct": None}
    (folder / "step-000001.jsonl").write_text(json.dumps(old) + "\n" + json.dumps(evil) + "\n" + source[:40])
    loaded = load_run(bare)
    assert (loaded.written, len(loaded.rollouts)) == (2, 2)
    assert rollout_data([loaded])["images"] == []
    render([loaded])


def test_questions_that_training_turned_come_with_image_before_and_after(run: Path, tmp_path: Path) -> None:
    (run / "world").mkdir(exist_ok=True)
    picture(3).save(run / "world" / "q.png")
    changed = []
    for name in ("before.jsonl", "after.jsonl"):
        lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
        lines[2] |= {"images": ["q.png", "../../secret.png"], "problem": EVIL}
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        changed.append(tmp_path / name)
    loaded = load_run(run, before=changed[0], after=changed[1])
    ((title, questions),) = flipped(loaded.evaluations)
    assert title == "6 became right"
    first = questions[0]
    assert [(s["when"], s["prediction"], s["right"]) for s in first["said"]] == [
        ("before", "blue", False), ("after", "red", True),
    ]  # fmt: skip
    assert [src[:22] for src in first["images"]] == ["data:image/png;base64,"], "and none of outside"
    text = render([loaded])
    assert text.index("6 became right") < text.index('id="rollouts"')
    assert "<script>document.title" not in text
    swapped = load_run(run, before=changed[1], after=changed[0])
    assert [title for title, _ in flipped(swapped.evaluations)] == ["6 became wrong"]


def test_evaluations_under_the_run_are_found(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "train", tmp_path / "run")
    model = load_run(folder).config["run"]["model"]
    models = {"base": model, "trained": str(folder / "merged"), "another": "other/model"}
    for (name, of), source in zip(models.items(), ("before", "after", "after"), strict=True):
        (folder / name).mkdir()
        shutil.copy(run / f"{source}.jsonl", folder / name / "records.jsonl")
        (folder / name / "evaluation.json").write_text(json.dumps({"model": of}))
    score = headline((found := load_run(folder).evaluations).before, found.after)[0]
    assert score.comparison is not None
    assert score.comparison.better == 6
    shutil.rmtree(folder / "base")
    assert load_run(folder).evaluations.before is None
    (folder / "trained" / "evaluation.json").write_text("[")
    assert load_run(folder).evaluations.after is None


@pytest.mark.slow
def test_the_page_is_bounded_whatever_rows_hold(run: Path, tmp_path: Path) -> None:
    """Many small pictures a row, long questions, long tokens, one line of many megabytes."""
    folder = shutil.copytree(run / "train", tmp_path / "run")
    source = next((folder / "completions").glob("step-*.jsonl"))
    record = json.loads(source.read_text().splitlines()[0])
    rng = random.Random(0)
    with (folder / "completions" / "step-000009.jsonl").open("w") as file:
        for step in range(60):
            names = []
            for i in range(40):
                names.append(f"images/{step:08x}{i:08x}.png")
                Image.frombytes("RGB", (90, 90), rng.randbytes(24_300)).save(folder / "completions" / names[-1])
            hostile = {"images": names, "problem": "x" * 300_000, "answer": "y" * 300_000, "problem_id": str(step)}
            file.write(json.dumps(record | hostile | {"step": 9}) + "\n")
        file.write(json.dumps(record | {"problem": "z" * 9_000_000}) + "\n")
    loaded = load_run(folder)
    assert loaded.damaged == 1
    path = write_report(folder, tmp_path / "report.html")
    assert path.stat().st_size < MAX_DATA_BYTES + 4_000_000
    shown = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.S)[1])["rollouts"]  # type: ignore[index]
    assert all(len(r["images"]) <= 8 for r in shown)
    assert f"{len(shown)} of the {loaded.written} rollouts that were written are on this page" in path.read_text()
    assert [r["step"] for r in shown] == sorted(r["step"] for r in shown)


def test_mistakes(tmp_path: Path, run: Path) -> None:
    with pytest.raises(ValueError, match=r"the run must be a folder, got .*none, which is none"):
        load_run(tmp_path / "none")
    with pytest.raises(ValueError, match=r"is no run folder: it holds neither metrics.jsonl nor train/metrics.jsonl"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="rollouts must be at least 1, got 0"):
        write_report(run, tmp_path / "x.html", rollouts=0)


def ten_thousand(folder: Path, run: Path) -> Path:
    """A run folder with 10,000 records: those of a real run under other steps and ids."""
    lines = [
        line for p in sorted((run / "train" / "completions").glob("*.jsonl")) for line in p.read_text().splitlines()
    ]
    shutil.copytree(run / "train" / "completions" / "images", folder / "completions" / "images")
    shutil.copy(run / "train" / "metrics.jsonl", folder)
    for step in range(1, 201):
        with (folder / "completions" / f"step-{step:06d}.jsonl").open("w") as file:
            for i in range(50):
                record = json.loads(lines[(step + i) % len(lines)]) | {"step": step, "problem_id": f"row-{step}-{i}"}
                file.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    return ten_thousand(tmp_path_factory.mktemp("large"), run)


@pytest.mark.slow
def test_ten_thousand_rollouts_are_sampled_evenly(large: Path) -> None:
    loaded = load_run(large, rollouts=400)
    steps = [r["step"] for r in loaded.rollouts]
    assert (loaded.written, len(steps)) == (10_000, 400)
    assert steps == sorted(steps)
    assert all(sum(low < s <= low + 20 for s in steps) == 40 for low in range(0, 200, 20))
    text = render([loaded])
    assert "400 of the 10000 rollouts" in text
    assert len(text) < 8_000_000
    tokens = sum(len(r["tokens"]) for r in load_run(large, rollouts=10_000).rollouts)
    assert 0.99 * MAX_TOKENS < tokens <= MAX_TOKENS


# --- In Chromium ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'vigos[dev]'")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    binary = next((path for name in names if (path := shutil.which(name))), None)
    with api.sync_playwright() as playwright:
        if binary is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("needs a Chromium: `playwright install chromium`, or the system's package")
        launched = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield launched
        launched.close()


class Tab:
    """A page in the browser, with everything it complained about or asked the network for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.trouble: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.trouble.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: self.trouble.append(f"dialog {dialog.message}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#list .card")

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *error: object) -> None:
        asked = [url for url in self.requests if not url.startswith(("file:", "data:"))]
        self.context.close()
        assert not self.trouble, self.trouble
        assert not asked, asked


def settle(tab: Any, cards: int) -> None:
    """Waits until the search has left so many cards."""
    from playwright.sync_api import expect

    expect(tab.locator("#list .card")).to_have_count(cards)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_renders_without_complaints(browser: Any, page: Path, width: int, scheme: str) -> None:
    with Tab(browser, page, width, scheme) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out sideways"
        assert tab.locator("#list .card").count() == 18
        assert tab.locator("figure svg").count() >= 12
        loaded = "[...document.images].every((i) => i.complete ? i.naturalWidth > 0 : true)"
        assert tab.evaluate(loaded)
        dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(int(x) for x in re.findall(r"\d+", dark)[:3]) < 150) == (scheme == "dark")
        tab.click("#theme")
        turned = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(int(x) for x in re.findall(r"\d+", turned)[:3]) < 150) == (scheme == "light")
        # Text on the deepest shade of every teacher is readable: WCAG's 4.5 to 1, in both schemes.
        for _ in range(2):
            assert min(tab.evaluate(CONTRASTS)) > 4.5
            tab.click("#theme")


# Contrast ratios of ink on the deepest token of each teacher, painted on a canvas as the browser blends them.
CONTRASTS = """() => [0, 1, 2].map((k) => {
  const host = document.querySelector("#list .card"), token = document.createElement("span");
  token.className = "tok t" + k; token.textContent = "x";
  token.style.setProperty("--k", "calc(4% + 1 * var(--deep))"); host.append(token);
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const paint = (...colours) => { for (const c of colours) { context.fillStyle = c; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const under = getComputedStyle(host).backgroundColor, style = getComputedStyle(token);
  const [a, b] = [light(paint(under, style.backgroundColor)), light(paint(style.color))];
  token.remove();
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
})"""


@pytest.mark.slow
def test_largest_kl_comes_first_and_charts_tell_their_values(browser: Any, page: Path) -> None:
    with Tab(browser, page) as tab:
        kl = tab.evaluate("[...document.querySelectorAll('#list .text')].map((text) => text.rollout.kl)")
        assert kl == sorted(kl, reverse=True)
        drawing = tab.locator(".drawing[data-chart=loss]")
        drawing.scroll_into_view_if_needed()
        box = drawing.bounding_box()
        tab.mouse.move(box["x"] + 0.98 * box["width"], box["y"] + 0.5 * box["height"])
        logged = json.loads(tab.locator("#data").inner_text())["charts"]["loss"]["curves"]
        assert tab.locator("#tip").inner_text().split("\n")[0] == "step 3"
        assert f"perception: {logged[0][2][-1]}" in tab.locator("#tip").inner_text()
        tab.mouse.move(0, 0)
        assert not tab.locator("#tip").is_visible()


@pytest.mark.slow
def test_script_in_a_rollout_stays_text(browser: Any, page: Path) -> None:
    with Tab(browser, page) as tab:
        tab.fill("#q", "document.title")
        settle(tab, 3)
        assert "<script>document.title='owned'</script>" in tab.locator("#list .text").first.inner_text()
        assert EVIL in tab.locator("#list .ask").first.inner_text()
        assert tab.locator("script").count() == 2
        assert tab.locator("img[src='x']").count() == 0
        assert "owned" not in tab.title()
        tab.locator(".text .tok").nth(4).hover()
        assert tab.locator("#tip").is_visible()


@pytest.mark.slow
def test_filters(browser: Any, page: Path) -> None:
    def count() -> int:
        return tab.locator("#list .card").count()

    with Tab(browser, page) as tab:
        assert tab.locator("#count").inner_text() == "18 rollouts"
        tab.select_option("#format", "valid")
        assert count() == 12
        tab.select_option("#format", "invalid")
        assert count() == 6
        tab.select_option("#format", "=tagless")
        assert count() == 6
        assert tab.locator("#count").inner_text() == "6 of 18 rollouts"
        assert tab.locator("#format option").all_inner_texts()[3:] == ["tagless (6)"]
        tab.select_option("#format", "")
        tab.select_option("#right", "yes")
        right = count()
        tab.select_option("#right", "no")
        assert right + count() == 18
        assert right > 0
        tab.select_option("#right", "")
        tab.fill("#from", "2")
        assert count() == 12
        tab.fill("#to", "2")
        assert count() == 6
        tab.fill("#q", "SNOWMAN")
        settle(tab, 1)
        assert "☃" in tab.locator("#list .text").inner_text()
        tab.fill("#q", "no such words")
        settle(tab, 0)
        assert "nothing fits the filters" in tab.locator("#count").inner_text()
        for selector in ("#q", "#from", "#to"):
            tab.fill(selector, "")
        settle(tab, 18)
        tab.select_option("#order", "kl")
        largest = json.loads(tab.locator("#data").inner_text())["rollouts"]
        top = max(max((t[3] for t in r["taught"]), default=0) for r in largest)
        shown = tab.locator("#list .text").first.evaluate("(node) => node.rollout.kl")
        assert shown == top
        tab.select_option("#order", "-step")
        assert tab.locator("#list .meta").first.inner_text().startswith("step 3")


@pytest.mark.slow
def test_keyboard_moves_from_token_to_token(browser: Any, page: Path) -> None:
    with Tab(browser, page) as tab:
        tab.select_option("#order", "step")
        tab.locator("#order").focus()
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.textContent") == "A"
        tip = tab.locator("#tip")
        assert "token 1 of" in tip.inner_text()
        assert "perception teacher" in tip.inner_text()
        assert "STUDENT" in tip.inner_text().upper()
        assert tip.locator("li").count() == 6
        tab.keyboard.press("ArrowRight")
        assert "token 2 of" in tip.inner_text()
        assert tab.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
        tab.keyboard.press("End")
        assert tab.evaluate("document.activeElement.textContent") == "<|im_end|>"
        assert "no teacher supervises it" in tip.inner_text()
        tab.keyboard.press("Escape")
        assert not tip.is_visible()
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.closest('li') === document.querySelectorAll('#list .card')[1]")
        unnamed = (
            "[...document.querySelectorAll('input, select, button')].filter((e) => !e.labels?.length && !e.textContent)"
        )
        assert tab.evaluate(f"{unnamed}.length") == 0
        assert tab.evaluate("[...document.images].every((i) => i.alt)")


@pytest.mark.slow
def test_two_runs_side_by_side(browser: Any, run: Path, other: Path, tmp_path: Path) -> None:
    path = write_report(run, tmp_path / "two.html", compare=other)
    with Tab(browser, path) as tab:
        assert tab.locator("#list .card").count() == 18
        assert tab.locator("#list .card .pair").count() == 18
        assert tab.locator("#list .pair").first.locator(".letter").all_inner_texts() == ["A", "B"]
        assert tab.locator(".numbers").count() == 3
        differing = tab.locator(".facts .differs").all_inner_texts()
        assert [text for text in differing if "duration" not in text] == ["methodvigos", "methodopsd"]
        assert "run B" in tab.locator(".key").first.inner_text()
    with Tab(browser, path, 390) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_ten_thousand_rollouts_in_the_browser(browser: Any, large: Path, tmp_path: Path) -> None:
    with Tab(browser, write_report(large, tmp_path / "large.html")) as tab:
        assert tab.locator("#count").inner_text() == "400 rollouts"
        assert tab.locator("#list .card").count() == 20
        tab.click("#more")
        assert tab.locator("#list .card").count() == 40
        wanted = tab.evaluate("JSON.parse(document.getElementById('data').textContent).rollouts[333].id")
        tab.fill("#q", wanted)
        settle(tab, 1)
        assert tab.locator("#count").inner_text() == "1 of 400 rollouts"


@pytest.mark.slow
def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", str(run), "--output-dir", str(tmp_path), "--rollouts", "5"])
    assert stop.value.code in (0, None)
    assert "5 of the 18 rollouts" in (tmp_path / "report.html").read_text()
    assert "written:" in capsys.readouterr().out
