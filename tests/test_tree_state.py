"""The prefix tree over layers that carry state: how a pack is cut, and what the comparison of families would notice."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from helpers.tiny_models import IMAGE, fed, fed_alone, mixed_rows, tiny_model
from test_model_families import far

from vigos.scoring.hidden_states import hidden_states
from vigos.scoring.prefix_tree import PrefixTree
from vigos.scoring.tree_state import TreeState, cut_runs

# A layer kind each: Gated DeltaNet (alone, with experts), a short convolution, Mamba-2.
MODELS = ("qwen3_5", "qwen3_5_moe", "qwen3_next", "minicpmv4_6", "lfm2_vl", "lfm3_vl", "nemotron_h")


def test_runs_are_cut_where_branches_leave() -> None:
    sequences = mixed_rows("qwen3_5")
    for budget in (16_384, 60):
        for pack in PrefixTree(sequences, token_budget=budget, image_token_id=IMAGE).packs:
            runs = cut_runs(pack)
            assert [place for run in runs for place in range(run.start, run.stop)] == list(range(pack.tokens))
            for number, run in enumerate(runs):
                assert len(run.path) == pack.depth[run.start]
                if run.parent is not None:
                    assert run.parent < number
                    assert runs[run.parent].stop == run.path[-1] + 1, "it begins where its parent ends"
                    assert runs[run.parent].level == run.level - 1
    (pack,) = PrefixTree(sequences, image_token_id=IMAGE).packs
    assert max(run.level for run in cut_runs(pack)) >= 2
    assert fed(PrefixTree(sequences, image_token_id=IMAGE)) < 0.6 * fed_alone(sequences)


# ---- negative controls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("wrong", ["parent state dropped", "branches out of order", "convolution of another parent"])
def test_what_the_comparison_would_notice(family: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sequences = tiny_model(family), mixed_rows(family)
    batch, tails = TreeState._batch, TreeState.tails
    if wrong == "convolution of another parent":
        monkeypatch.setattr(
            TreeState, "tails", lambda self, k: [torch.where(t < self.tokens, 0, t) for t in tails(self, k)]
        )
    else:
        monkeypatch.setattr(
            TreeState, "_batch",
            lambda self, *a: dataclasses.replace(
                made := batch(self, *a), parents=[0] * len(made.parents) if wrong == "branches out of order" else []
            ),
        )  # fmt: skip
    with torch.no_grad():
        exact = hidden_states(model, sequences, scoring="separate")
        error = far(hidden_states(model, sequences, scoring="tree"), exact)
    if family.startswith("lfm") and wrong != "convolution of another parent":  # they have no other state
        assert error < 1e-5
    else:
        assert error > 1e-2


def test_a_fused_layer_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba-2's fused kernel, which a machine with a GPU has, would run over a pack as if it were one sequence."""
    model, sequences = tiny_model("nemotron_h").train(), mixed_rows("nemotron_h")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        exact, apart = hidden_states(model, sequences, scoring="separate"), model(ids, use_cache=False).logits
        fused = lambda states, *_, outproj_weight, **__: states[..., :1] * outproj_weight.sum(1)  # noqa: E731
        monkeypatch.setattr(sys.modules[type(model).__module__], "mamba2_split_conv1d_scan_combined", fused)
        assert far(model(ids, use_cache=False).logits, apart) > 1e-2, "the layer takes the fused kernel"
        assert far(hidden_states(model, sequences, scoring="tree"), exact) < 1e-5


def test_ordinary_calls_are_the_models_own() -> None:
    model, sequences = tiny_model("qwen3_5"), mixed_rows("qwen3_5")
    file = sys.modules[type(model).__module__]
    before = (file.causal_conv1d_fn, file.torch_chunk_gated_delta_rule)
    with torch.no_grad():
        exact = hidden_states(model, sequences, scoring="separate")
        hidden_states(model, sequences, scoring="tree")
        assert torch.equal(hidden_states(model, sequences, scoring="separate"), exact)
    assert (file.causal_conv1d_fn, file.torch_chunk_gated_delta_rule) == before
