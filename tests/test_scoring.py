"""Hidden states through the prefix tree against independent forwards, in every family; the teacher around them."""

from __future__ import annotations

import copy
import dataclasses
import os
import types
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers.processes import FORKSERVER
from helpers.tiny_models import (
    FAMILIES,
    HIDDEN,
    IMAGE,
    LAYERS,
    SIZES,
    VOCAB,
    fed,
    fed_alone,
    images,
    mixed_rows,
    prompt,
    tiny_model,
    words,
)
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import vigos.scoring.forwards as forwards_module
import vigos.scoring.tree_attention as tree_attention
from vigos.divergence.supervision import Supervision
from vigos.method.encode import EncodedPrompt, ImageInputs, ScoredSequence
from vigos.models.vision_cache import VisionCache
from vigos.scoring.check import TreeCheck
from vigos.scoring.hidden_states import hidden_states
from vigos.scoring.prefix_tree import PrefixTree, model_input_ids
from vigos.scoring.teacher import TeacherScorer

ALL = (*FAMILIES, "gemma3")
MIXED = {family: mixed_rows(family) for family in ALL}


def independent(model, sequences):
    """The definition: each sequence alone, unpadded and uncut, through the model's own forward."""
    types_name = {"gemma3": "token_type_ids"}.get(model.config.model_type, "mm_token_type_ids")
    rows = []
    for s in sequences:
        ids = torch.cat([s.prompt.ids, s.completion_ids])[None]
        inputs = {"input_ids": ids}
        if s.prompt.images is not None:
            inputs |= s.prompt.images.tensors
            if model.config.model_type in ("gemma3", "qwen2_5_vl", "qwen3_vl"):
                inputs[types_name] = (ids == IMAGE).long()
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        rows.append(hidden[0, len(s.prompt.ids) + s.scored - 1])
    return torch.cat(rows)


def lora(model, targets=("q_proj", "v_proj", "down_proj"), **options):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **options)
    return get_peft_model(copy.deepcopy(model), config)


def batch(sequences):
    n = sum(len(s.scored) for s in sequences)
    return types.SimpleNamespace(teacher_sequences=sequences, supervision=Supervision.aligned(n))


# ---- against independent forwards ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_hidden_states(family):
    """Depth 1 to 3, several image sizes, several images, no image, repeats; whole, and cut by two budgets."""
    model, rows = tiny_model(family), MIXED[family]
    with torch.no_grad():
        exact = independent(model, rows)
        assert exact.shape == (sum(len(s.scored) for s in rows), HIDDEN)
        for options in (
            {"scoring": "separate"},
            {"scoring": "separate", "token_budget": 70},
            {"scoring": "tree"},
            {"scoring": "tree", "backend": "dense"},
            {"scoring": "tree", "backend": "segments", "token_budget": 60},
            {"scoring": "tree", "token_budget": 1},
        ):
            ours = hidden_states(model, rows, **options)
            assert (ours - exact).abs().max() < 1e-5, options
    if family != "gemma3":  # a window of 8 tokens leaves little of the tree to its packs' tokens
        tree = PrefixTree(rows, image_token_id=IMAGE)
        assert fed(tree) < 0.6 * fed_alone(rows)


@pytest.mark.parametrize("family", ALL)
def test_these_are_the_rows_the_head_is_given(family):
    model, rows = tiny_model(family), MIXED[family][:1]
    with torch.no_grad():
        ids = torch.cat([rows[0].prompt.ids, rows[0].completion_ids])[None]
        inputs = rows[0].prompt.images.tensors if rows[0].prompt.images else {}
        if family in ("qwen2_5_vl", "qwen3_vl"):
            inputs = inputs | {"mm_token_type_ids": (ids == IMAGE).long()}
        if family == "gemma3":
            inputs = inputs | {"token_type_ids": (ids == IMAGE).long()}
        logits = model(input_ids=ids, **inputs).logits[0, len(rows[0].prompt.ids) + rows[0].scored - 1]
        assert (model.lm_head(hidden_states(model, rows)) - logits).abs().max() < 1e-4


def test_through_the_triton_kernel():
    """The same states and gradients with backend="triton", in Triton's interpreter where there is no GPU."""
    model, rows = tiny_model("qwen2_5_vl"), MIXED["qwen2_5_vl"]
    exact = gradients(model, rows, scoring="separate")
    ours = gradients(model, rows, scoring="tree", backend="triton")
    assert max((ours[name] - exact[name]).abs().max() for name in exact) < 1e-5


def gradients(model, sequences, **options):
    model.zero_grad()
    hidden = hidden_states(model, sequences, **options)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4)) / len(hidden)
    (hidden * upstream).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpointing(model, *, use_reentrant):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("family", ALL)
def test_gradients(family):
    """Vision tower included; whole and cut in packs; every layer's recomputation under gradient checkpointing."""
    model, rows = tiny_model(family), MIXED[family]
    exact = gradients(model, rows, scoring="separate", token_budget=1)
    assert max(g.abs().max() for g in exact.values()) > 0.1
    calls = []
    for options in ({"backend": "dense"}, {"backend": "segments"}, {"token_budget": 60}, {"checkpoint": True}):
        with pytest.MonkeyPatch.context() as patch:
            if options.pop("checkpoint", False):
                attend = tree_attention.attend
                patch.setattr(tree_attention, "attend", lambda *a, f=attend, **k: calls.append(1) or f(*a, **k))
                model.train()
                checkpointing(model, use_reentrant=False)
            ours = gradients(model, rows, scoring="tree", **options)
        assert ours.keys() == exact.keys()
        for name in exact:
            assert (ours[name] - exact[name]).abs().max() < 1e-5, (options, name)
    assert len(calls) == 2 * LAYERS, "the layers were not recomputed through the plan"
    assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_gradient_checkpointing_reentrant():
    model, rows = tiny_model("qwen2_5_vl"), MIXED["qwen2_5_vl"]
    exact = gradients(model, rows, scoring="separate")
    model.train()
    checkpointing(model, use_reentrant=True)
    model.enable_input_require_grads()
    ours = gradients(model, rows, scoring="tree")
    assert max((ours[name] - exact[name]).abs().max() for name in exact) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_through_peft(family):
    model, rows = tiny_model(family), MIXED[family]
    adapted = lora(model)
    merged = copy.deepcopy(adapted).merge_and_unload()
    with torch.no_grad():
        on = hidden_states(adapted, rows, scoring="tree")
        assert (on - independent(merged, rows)).abs().max() < 1e-5
        off, _ = TeacherScorer(adapted).score(batch(rows))
        assert (off - independent(model, rows)).abs().max() < 1e-5
        assert (on - off).abs().max() > 0.1


def test_bf16_is_as_close_as_padding():
    """The tree moves 16-bit states no more than padding does: from each other over all families, and from fp32."""
    tree_moves, padding_moves = [], []
    for family in FAMILIES:
        for seed in range(3):
            model, rows = tiny_model(family, dtype=torch.bfloat16, seed=seed, num_hidden_layers=4), MIXED[family]
            with torch.no_grad():
                alone = hidden_states(model, rows, scoring="separate", token_budget=1).double()
                padded = hidden_states(model, rows, scoring="separate").double()
                tree = hidden_states(model, rows, scoring="tree").double()
                exact = hidden_states(model.float(), rows, scoring="separate").double()
            error, usual = ((x - exact).norm() / exact.norm() for x in (tree, padded))
            assert error <= 1.1 * max(usual, (alone - exact).norm() / exact.norm()), family
            tree_moves.append((tree - alone).norm() / alone.norm())
            padding_moves.append((padded - alone).norm() / alone.norm())
    # Single cases differ by chance in both directions; over 18 models chance is a few percent.
    assert torch.stack(tree_moves).mean() <= 1.1 * torch.stack(padding_moves).mean()


# ---- negative controls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_positions_are_wrong(family, monkeypatch):
    """Positions of the pack instead of the path: the comparison above would notice."""
    model, rows = tiny_model(family), MIXED[family]
    right = forwards_module.pack_positions
    for wrong in (
        lambda base, pack, members: torch.arange(pack.tokens).expand(right(base, pack, members).shape),
        lambda base, pack, members: right(base, pack, members) + (pack.depth > 20),
    ):
        monkeypatch.setattr(forwards_module, "pack_positions", wrong)
        with torch.no_grad():
            deviation = hidden_states(model, rows, scoring="tree") - hidden_states(model, rows, scoring="separate")
        assert deviation.abs().max() > 1e-2


def test_one_axis_positions_are_wrong_with_three():
    model, rows = tiny_model("qwen2_5_vl"), MIXED["qwen2_5_vl"]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        exact = hidden_states(model, rows, scoring="tree")
        patch.setattr(forwards_module, "pack_positions", lambda base, pack, members: pack.depth.expand(3, 1, -1))
        assert (hidden_states(model, rows, scoring="tree") - exact).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("scoring", ["tree", "separate"])
def test_missing_token_types_are_refused(family, scoring):
    row = MIXED[family][0]
    bare = dataclasses.replace(row, prompt=dataclasses.replace(row.prompt, token_type_ids=None))
    with pytest.raises(ValueError, match="must be the processor's mm_token_type_ids"):
        hidden_states(tiny_model(family), [bare], scoring=scoring)


def test_token_types_of_another_length_are_refused():
    row = MIXED["qwen2_5_vl"][0]
    short = dataclasses.replace(row, prompt=dataclasses.replace(row.prompt, token_type_ids=torch.zeros(3)))
    with pytest.raises(ValueError, match=r"token_type_ids .* must match its ids \(\d+,\), got \(3,\)"):
        hidden_states(tiny_model("qwen2_5_vl"), [short])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen3"])
def test_same_ids_with_different_images(family):
    """Not shared; and a wrong identity, which would share them, gives wrong states."""
    model, size = tiny_model(family), SIZES[family][:1]
    pair = [
        ScoredSequence(prompt(family, size, image_seed=seed, question=words(5, 1)), words(6, 2), torch.arange(6))
        for seed in (1, 2)
    ]
    with torch.no_grad():
        exact = independent(model, pair)
        assert (hidden_states(model, pair, scoring="tree") - exact).abs().max() < 1e-5
        forged = ImageInputs(pair[0].prompt.images.key, pair[1].prompt.images.tensors)
        lied = [pair[0], dataclasses.replace(pair[1], prompt=dataclasses.replace(pair[1].prompt, images=forged))]
        assert (hidden_states(model, lied, scoring="tree") - exact).abs().max() > 1e-2


def test_images_blocks_without_their_limit_are_wrong(monkeypatch):
    """Gemma 3 with a causal mask over its images: the comparison would notice."""
    model, rows = tiny_model("gemma3"), MIXED["gemma3"]
    monkeypatch.setattr(forwards_module, "_block_limits", lambda pack, members, image: pack.depth)
    with torch.no_grad():
        assert (hidden_states(model, rows) - hidden_states(model, rows, scoring="separate")).abs().max() > 1e-2


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_models_whose_state_cannot_be_shared():
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    config = FalconMambaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, state_size=4
    )
    mamba, rows = FalconMambaForCausalLM(config), MIXED["qwen3"]
    with pytest.raises(
        ValueError, match=r"FalconMamba.*carry state that branches cannot share.*use scoring='separate'"
    ):
        hidden_states(mamba, rows, scoring="tree")
    with torch.no_grad():
        assert hidden_states(mamba, rows, scoring="separate").shape == (36, 16)


def test_a_model_that_does_not_use_the_interface_is_refused():
    """Every layer has to take the plan; one that computes attention its own way is noticed."""
    model = tiny_model("qwen3")
    own = model.model.layers[1].self_attn
    own.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ValueError, match=f"needs {LAYERS} layers .* plan, got {LAYERS - 1} of Qwen3ForCausalLM"):
        hidden_states(model, MIXED["qwen3"])


@pytest.mark.parametrize("scoring", ["tree", "separate"])
def test_no_cache_of_keys_and_values_is_kept(scoring):
    model, caches = tiny_model("qwen3"), []
    model.model.register_forward_hook(lambda module, args, out: caches.append(out.past_key_values))
    with torch.no_grad():
        hidden_states(model, MIXED["qwen3"], scoring=scoring)
    assert caches
    assert set(caches) == {None}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: hidden_states(m, [], scoring="forest"), "scoring must be one of tree, separate, got 'forest'"),
        (lambda m: hidden_states(m, [], token_budget=0), "token_budget must be at least 1, got 0"),
        (lambda m: hidden_states(m.model, []), "must have a language-model head, got Qwen3Model"),
        (lambda m: hidden_states(torch.nn.Linear(2, 2), []), "must be a transformers model .* got Linear"),
        (lambda m: hidden_states(m, MIXED["qwen3"], backend="best"), "backend must be one of auto, .* got 'best'"),
        (lambda m: TeacherScorer(m, verify="maybe"), "verify must be .* got 'maybe'"),
        (lambda m: TeacherScorer(m, adapter="half"), "adapter must be 'off' or 'on', got 'half'"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_model("qwen3"))


def test_nothing_to_score():
    model = tiny_model("qwen3")
    for scoring in ("tree", "separate"):
        assert hidden_states(model, [], scoring=scoring).shape == (0, HIDDEN)
        unscored = ScoredSequence(
            EncodedPrompt(words(3, 1), None, None), words(2, 2), torch.empty(0, dtype=torch.int64)
        )
        assert hidden_states(model, [unscored], scoring=scoring).shape == (0, HIDDEN)


def test_images_of_different_shape_are_refused():
    one, two = (ImageInputs.from_tensors({"pixel_values": torch.zeros(1, 2, 3, n, n)}) for n in (8, 16))
    with pytest.raises(ValueError, match="pixel_values of one batch must agree beyond the second axis"):
        forwards_module.concat_images([one, two])


# ---- the teacher ---------------------------------------------------------------------------------------------------


def test_the_teacher_leaves_everything_as_it_was():
    model = lora(tiny_model("qwen2_5_vl"))
    model.train()
    model.base_model.model.model.visual.eval()  # somebody froze the tower on purpose
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: p.clone() for name, p in model.named_parameters()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    given = batch(MIXED["qwen2_5_vl"])
    hidden, supervision = TeacherScorer(model).score(given)
    assert not hidden.requires_grad
    assert supervision is given.supervision
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert wanted == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert model.active_adapters == ["default"]


def test_the_teacher_is_in_eval_mode():
    model = lora(tiny_model("qwen3"), lora_dropout=0.5)
    model.train()
    scorers = [TeacherScorer(model, adapter=adapter) for adapter in ("off", "on")]
    for scorer in scorers:
        first, second = (scorer.score(batch(MIXED["qwen3"]))[0] for _ in range(2))
        assert torch.equal(first, second)
    off, on = (scorer.score(batch(MIXED["qwen3"]))[0] for scorer in scorers)
    assert (off - on).abs().max() > 0.1


def test_adapters_that_hide_the_teacher_are_refused():
    base = tiny_model("qwen3")
    with pytest.raises(ValueError, match=r"must not have modules_to_save, got \['norm'\]"):
        TeacherScorer(lora(base, modules_to_save=["norm"]))
    with pytest.raises(ValueError, match="must have bias='none', got 'lora_only'"):
        TeacherScorer(lora(base, bias="lora_only"))
    with pytest.raises(ValueError, match="must not cover the language-model head"):
        TeacherScorer(lora(base, targets=["q_proj", "lm_head"]))
    model = lora(base)
    scorer = TeacherScorer(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="the adapter must not be merged"):
        scorer.score(batch(MIXED["qwen3"]))
    model.unmerge_adapter()
    scorer.score(batch(MIXED["qwen3"]))


def test_verify_first_notices_a_mismatch_and_stops_sharing(monkeypatch):
    model, rows = tiny_model("qwen2_5_vl"), MIXED["qwen2_5_vl"]
    compared = []
    compare = TreeCheck._compare
    monkeypatch.setattr(TreeCheck, "_compare", lambda self, *a: compared.append(1) or compare(self, *a))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = TeacherScorer(model)
        for _ in range(2):
            exact = good.score(batch(rows))[0]
            own = good.check.hidden_states(model, rows, "student").detach()
    assert (len(compared), good.scoring) == (2, "tree"), "once a side"
    assert good.check.deviation < 1e-5

    always = TeacherScorer(model, verify="always")
    for _ in range(2):
        always.score(batch(rows))
    assert len(compared) == 4

    right = forwards_module.pack_positions
    monkeypatch.setattr(forwards_module, "pack_positions", lambda *a: right(*a) + (a[1].depth > 8))
    bad = TeacherScorer(model)
    with pytest.warns(UserWarning, match=r"Qwen2_5_VL.* \(full attention\): .* of the teacher .*'separate'"):
        hidden, _ = bad.score(batch(rows))
    assert bad.scoring == "separate"
    assert (hidden - exact).abs().max() < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the student follows, without a second warning
        assert (bad.check.hidden_states(model, rows, "student") - own).abs().max() < 1e-5
    trusting = TeacherScorer(model, verify="never")
    assert (trusting.score(batch(rows))[0] - exact).abs().max() > 1e-2


def test_the_teacher_follows_a_student_that_cannot_share(monkeypatch):
    """The student alone is wrong: its gradients are those of separate forwards, and the teacher leaves the tree."""
    model, rows = lora(tiny_model("qwen3")), MIXED["qwen3"]
    model.train()
    exact = gradients(model, rows, scoring="separate")
    scorer = TeacherScorer(model)
    scorer.score(batch(rows))
    right = forwards_module.pack_positions
    monkeypatch.setattr(forwards_module, "pack_positions", lambda *a: right(*a) + (a[1].depth > 8))
    model.zero_grad()
    with pytest.warns(UserWarning, match="of the student deviate by"):
        hidden = scorer.check.hidden_states(model, rows, "student")
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4)) / len(hidden)
    (hidden * upstream).sum().backward()
    assert model.training
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert max((ours[name] - exact[name]).abs().max() for name in exact) < 1e-6
    assert scorer.scoring == "separate"


def test_an_example_with_an_image_is_compared_as_soon_as_there_is_one(monkeypatch):
    """Gemma 3 with a causal mask over its images: text alone shows nothing, the first image does."""
    model, rows = tiny_model("gemma3"), MIXED["gemma3"]
    monkeypatch.setattr(forwards_module, "_block_limits", lambda pack, members, image: pack.depth)
    text = [s for s in rows if s.prompt.images is None]
    assert text
    assert rows[0].prompt.images is not None
    check = TreeCheck()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check.hidden_states(model, text, "student")
    assert check._seen["student"], "compared"
    with pytest.warns(UserWarning, match="image tokens attend to each other"):
        check.hidden_states(model, [*text, *rows], "student")
    assert check.failed


def test_verify_waits_for_something_to_compare():
    scorer = TeacherScorer(tiny_model("qwen3"))
    assert scorer.score(batch([]))[0].shape == (0, HIDDEN)
    assert not scorer.check._seen["teacher"]


# ---- the vision tower ----------------------------------------------------------------------------------------------


def tower_calls(model, patch):
    inner, calls = model.model, []
    tower = next(m for name, m in inner.named_children() if "vis" in name)
    patch.setattr(tower, "forward", lambda *a, f=tower.forward, **k: calls.append(1) or f(*a, **k))
    return calls


@pytest.mark.parametrize("family", [f for f in ALL if f != "qwen3"])
def test_image_features_are_kept(family, monkeypatch):
    """Three distinct images: encoded once in all for the teacher and the student, in one call or many."""
    model, rows = tiny_model(family).requires_grad_(False), MIXED[family]
    exact = independent(model, rows)
    vision = VisionCache()
    calls = tower_calls(model, monkeypatch)
    for options in ({}, {"token_budget": 1}, {"scoring": "separate"}):
        assert (hidden_states(model, rows, vision=vision, **options) - exact).abs().max() < 1e-5
    assert len(calls) == 3


def test_an_image_under_two_prefixes_is_encoded_once(monkeypatch):
    """Other system words before the image: nothing to share in the language model, one image all the same."""
    model = tiny_model("qwen2_5_vl").requires_grad_(False)
    size = SIZES["qwen2_5_vl"][:1]
    pair = [
        ScoredSequence(prompt("qwen2_5_vl", size, question=words(5, 1), head=head), words(4, 2), torch.arange(4))
        for head in (4, 6)
    ]
    exact = independent(model, pair)
    calls = tower_calls(model, monkeypatch)
    assert (hidden_states(model, pair, scoring="tree") - exact).abs().max() < 1e-5
    assert len(calls) == 1


def test_the_teacher_and_the_student_share_an_images_features(monkeypatch):
    """LoRA on the language model: a run of the tower an image, and gradients as without sharing."""
    targets = [f"language_model.layers.{i}.self_attn.{p}_proj" for i in range(LAYERS) for p in "qv"]
    model, rows = lora(tiny_model("qwen2_5_vl"), targets=targets), MIXED["qwen2_5_vl"]
    model.train()
    exact = gradients(model, rows, scoring="separate")
    teacher = TeacherScorer(model, verify="never").score(batch(rows))[0]
    calls = tower_calls(model.get_base_model(), monkeypatch)
    vision = VisionCache.for_model(model.get_base_model())
    shared, _ = TeacherScorer(model, verify="never").score(batch(rows), vision=vision)
    ours = gradients(model, rows, scoring="tree", vision=vision)
    assert len(calls) == 3
    assert (shared - teacher).abs().max() < 1e-5
    assert max((ours[name] - exact[name]).abs().max() for name in exact) < 1e-5
    assert VisionCache.for_model(tiny_model("qwen2_5_vl")) is None


def test_kept_features_need_a_frozen_tower():
    vision = VisionCache()
    trained = tiny_model("smolvlm")
    with pytest.raises(ValueError, match=r"frozen tower, got a model where .*is being trained"):
        hidden_states(trained, MIXED["smolvlm"], vision=vision)
    adapted = lora(tiny_model("smolvlm"), targets=["q_proj"])  # the bare name also matches the vision tower
    assert "vision_model" in VisionCache.obstacle(adapted.get_base_model())
    language = lora(tiny_model("smolvlm"), targets=[f"text_model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)])
    assert VisionCache.obstacle(language.get_base_model()) is None
    assert VisionCache.obstacle(tiny_model("qwen3")) == "Qwen3ForCausalLM has no get_image_features"
    frozen, other = (tiny_model("smolvlm").requires_grad_(False) for _ in range(2))
    hidden_states(frozen, MIXED["smolvlm"], vision=vision)
    with pytest.raises(ValueError, match="vision must serve one model"):
        hidden_states(other, MIXED["smolvlm"], vision=vision)
    with pytest.raises(ValueError, match="max_images must be at least 1, got 0"):
        VisionCache(0)


def test_kept_features_with_gradients_and_a_full_cache():
    model = tiny_model("qwen3_vl")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual" not in name)
    rows = MIXED["qwen3_vl"]
    exact = gradients(model, rows, scoring="separate")
    vision = VisionCache(max_images=1)
    ours = gradients(model, rows, scoring="tree", vision=vision)
    assert ours.keys() == exact.keys()
    assert max((ours[n] - exact[n]).abs().max() for n in exact) < 1e-5
    assert len(vision._features) == 1


# ---- cost ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor any operation made, in elements."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor) and "view" not in str(func) and "expand" not in str(func):
                self.elements = max(self.elements, each.numel())
        return out


def test_nothing_of_size_tokens_times_vocabulary_or_tokens_squared():
    model = tiny_model("qwen3", vocab_size=4_000, intermediate_size=48, max_position_embeddings=4096)
    trunk = words(900, 1)
    rows = [
        ScoredSequence(
            EncodedPrompt(torch.cat([trunk, words(30, n)]), None, None), words(200, 9 + n), torch.arange(200)
        )
        for n in range(4)
    ]
    tokens = fed(PrefixTree(rows))
    with torch.no_grad(), Largest() as largest:
        hidden_states(model, rows, scoring="tree")
    assert largest.elements < min(tokens * 4_000, tokens**2) / 4, (largest.elements, tokens)
    with torch.no_grad(), Largest() as dense:
        hidden_states(model, rows, scoring="tree", backend="dense")
    assert dense.elements >= tokens**2


# ---- wrappers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_students_call_goes_through_ddp(one_rank):
    from torch.nn.parallel import DistributedDataParallel

    model, rows = tiny_model("qwen3"), MIXED["qwen3"]
    exact = gradients(model, rows, scoring="separate")
    buckets = []

    def hook(state, bucket):
        buckets.append(bucket.index())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

    model.lm_head.requires_grad_(False)  # it takes no part in the forward: DDP would wait for its gradient
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, hook)
    ours = gradients(wrapped, rows, scoring="tree", token_budget=60)
    assert buckets, "the wrapper's hooks never fired"
    for name, gradient in ours.items():
        assert (gradient - exact[name.removeprefix("module.")]).abs().max() < 1e-5
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__
    with torch.no_grad():
        assert hidden_states(wrapped, rows).shape == (36, HIDDEN)


def test_the_students_call_goes_through_fsdp(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, rows = tiny_model("qwen3"), MIXED["qwen3"]
    exact = gradients(model, rows, scoring="separate")
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ours = gradients(model, rows, scoring="tree")
    for name, gradient in ours.items():
        assert (gradient.full_tensor() - exact[name]).abs().max() < 1e-5


def test_mixed_precision_of_the_wrapped_forward_holds():
    """accelerate puts autocast around the model's forward: the redirected call has to keep it."""
    model, rows = tiny_model("qwen3"), MIXED["qwen3"]
    plain = hidden_states(model, rows).detach()
    original = model.forward
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(original)
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *a: seen.append(a[-1].dtype))
    mixed = hidden_states(model, rows).detach()
    assert seen == [torch.bfloat16]
    assert 0 < (mixed.float() - plain).abs().max() < 0.2


def two_ranks(rank, path):
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    different_numbers_of_forwards(rank)
    # After the wrapper is gone: as the group's last owner it would wait for gloo's threads with the GIL in hand.
    dist.destroy_process_group()


def different_numbers_of_forwards(rank):
    """Rank 1 needs more forwards than rank 0, and rank 0 none at all in the last call."""
    model, rows = tiny_model("qwen3"), MIXED["qwen3"]
    exact = hidden_states(model, rows, scoring="separate").detach()
    model.lm_head.requires_grad_(False)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    hidden = hidden_states(wrapped, rows, token_budget=16_384 if rank == 0 else 1)
    assert (hidden.detach() - exact).abs().max() < 1e-5
    hidden.sum().backward()
    hidden = hidden_states(wrapped, [] if rank == 0 else rows, token_budget=60)
    assert len(hidden) == (0 if rank == 0 else 36)
    hidden.sum().backward()
    total = model.model.embed_tokens.weight.grad.clone()
    gathered = [torch.empty_like(total) for _ in range(2)]
    dist.all_gather(gathered, total)
    assert torch.equal(*gathered), "the ranks' gradients went apart"
    scored = TeacherScorer(wrapped).score(batch([] if rank == 0 else rows))[0]
    assert len(scored) == (0 if rank == 0 else 36)


@pytest.mark.slow
def test_ranks_with_different_numbers_of_forwards(tmp_path):
    torch.multiprocessing.start_processes(two_ranks, args=(str(tmp_path),), nprocs=2, start_method=FORKSERVER)


def test_images_helper_matches_its_placeholders():
    """The hand-made prompts are what the models expect: as many features as placeholders, in every size."""
    for family in ALL:
        for size in SIZES.get(family, []):
            _, counts = images(family, [size], 0)
            made = prompt(family, [size], question=words(3, 1))
            assert int((made.ids == IMAGE).sum()) == sum(counts)
            row = ScoredSequence(made, words(3, 2), torch.tensor([2]))
            with torch.no_grad():
                assert hidden_states(tiny_model(family), [row]).shape == (1, HIDDEN)
            assert len(model_input_ids(row)) == len(made.ids) + 2
