"""Chat templates of other shapes: thinking, refused system turns, options by role, typed special tokens."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
from helpers.training import PROMPTS, VALID_A, config, picture, processor, rows, tiny_student, trainer

from vigos.launch import EvalSource
from vigos.method.asking import Asking
from vigos.method.encode import encode_prompt
from vigos.method.prompts import ROLES, Prompts
from vigos.rollout.engine import Sampling
from vigos.rollout.server import ServerEngine

TURNS = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{%- for part in m.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}<|im_end|>\n{% endfor -%}{{ '<|im_start|>assistant\n' }}"
)
# In the shape of Qwen3.5's: thinking is opened unless it is switched off, and then stands closed and empty.
THINKS = TURNS + "{{ '<think>\n' if enable_thinking is not defined or enable_thinking else '<think>\n\n</think>\n\n' }}"
REFUSES = "{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"


def speaking(template: str):
    """The world's processor with another chat template."""
    other = copy.deepcopy(processor())
    other.chat_template = other.tokenizer.chat_template = template
    return other


@pytest.mark.parametrize("role", ROLES)
def test_an_opened_thinking_is_the_methods_to_open(role):
    """No prompt ends inside a `<think>` that the template opened, and no prefill stands behind one."""
    prompt = encode_prompt(speaking(THINKS), PROMPTS, role, "Which?", "red", [picture(0)])
    plain = encode_prompt(speaking(TURNS), PROMPTS, role, "Which?", "red", [picture(0)])
    assert prompt.text == plain.text
    assert prompt.ids.tolist() == plain.ids.tolist()
    released = encode_prompt(speaking(THINKS), PROMPTS, "reasoning", "Which?", "red", prefill="<think>")
    assert released.text.endswith("assistant\n<think>")
    free = encode_prompt(speaking(THINKS), replace(PROMPTS, prefill=""), "student", "Which?")
    assert free.text.endswith("<think>\n")  # the student begins as its template says where the method does not


def test_template_options_for_all_roles_and_for_each():
    prompts = PROMPTS.with_template_kwargs('{"enable_thinking": false, "reference": {"enable_thinking": true}}')
    texts = {r: encode_prompt(speaking(THINKS), prompts, r, "Which?", "red").text for r in ROLES}
    assert {r for r in ROLES if "</think>" in texts[r]} == set(ROLES) - {"reference"}
    assert texts["student"].endswith("<think>\n\n</think>\n\n<description>")
    assert texts["reference"].endswith("assistant\n<description>")
    for wrong in ("{", "[1]"):
        with pytest.raises(ValueError, match="chat_template_kwargs must be a JSON object"):
            PROMPTS.with_template_kwargs(wrong)


def test_template_options_travel_with_the_weights_and_to_a_server(tmp_path):
    prompts = PROMPTS.with_template_kwargs({"enable_thinking": False})
    Asking(prompts).save(tmp_path)
    (tmp_path / "file.yaml").write_text("chat_template_kwargs: {enable_thinking: true, student: {budget: 5}}\n")
    assert Asking.load(tmp_path).prompts == prompts
    from_file = Prompts.from_file(tmp_path / "file.yaml")
    assert from_file.template_kwargs("student") == {"enable_thinking": True, "budget": 5}
    asked = EvalSource(model=str(tmp_path), chat_template_kwargs='{"budget": 3}').asking().prompts
    assert asked.chat_template_kwargs == {"enable_thinking": False, "budget": 3}
    prompt = encode_prompt(speaking(THINKS), prompts, "student", "Which?")
    engine = ServerEngine("http://localhost/v1", "m", processor().tokenizer, eos_token_ids=[2])
    assert engine._body(prompt, Sampling(), 0)["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_refused_system_turn_names_the_way_out():
    with pytest.raises(ValueError, match=r"refuses the conversation: System role not supported; set `system: ''` in"):
        encode_prompt(speaking(REFUSES + TURNS), Prompts(), "student", "Which?")
    assert "Which?" in encode_prompt(speaking(REFUSES + TURNS), replace(Prompts(), system=""), "student", "Which?").text


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>"])
@pytest.mark.parametrize("role", ROLES)
def test_a_typed_special_token_is_text(role, token):
    """In question and reference, for the student and every teacher: ids hold the template's own tokens and no more."""
    tokenizer = processor().tokenizer
    clean, typed = (
        encode_prompt(processor(), PROMPTS, role, f"What is {x}?", f"It is {x}.", [picture(0)]) for x in ("it", token)
    )
    control = tokenizer.convert_tokens_to_ids(token)
    assert (typed.ids == control).sum() == (clean.ids == control).sum()
    assert typed.images.key == clean.images.key
    if role != "perception":
        assert token[1:] in typed.text.replace("\u2060", "")
        assert token[3:-2] in tokenizer.decode(typed.ids)


def test_what_each_role_reads_is_shown_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="vigos")
    args = config(tmp_path, max_steps=2, chat_template_kwargs='{"enable_thinking": false}')
    run = trainer(tiny_student(), args, rows(4), texts=[VALID_A])
    run.train()
    shown = [r.getMessage() for r in caplog.records if "prompt, example" in r.getMessage()]
    assert [s.split("'s prompt")[0].removeprefix("the ") for s in shown] == [
        "student", "perception teacher", "reasoning teacher", "reference teacher",
    ]  # fmt: skip
    assert "Which ink is digit 0?" in shown[0]
    assert "Key: red" in shown[2]
    assert "Key: red" not in shown[0] + shown[1]
    assert Asking.load(tmp_path / "adapter").prompts.chat_template_kwargs == {"enable_thinking": False}
