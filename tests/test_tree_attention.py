"""Every backend against the mask's definition in fp64, and the installation against ordinary calls."""

from __future__ import annotations

import math
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from helpers.tiny_models import mixed_rows, tiny_model, visible_keys, words
from test_prefix_tree import sequence

import vigos.scoring.tree_attention as tree_attention
from vigos.scoring.hidden_states import hidden_states
from vigos.scoring.prefix_tree import PrefixTree
from vigos.scoring.tree_attention import TreePlan, attend, dummy_mask, installed, registered_name


def bushy_pack(scale: int = 1):
    """Depth 3, branches of different lengths, a repeated sequence and one that ends inside another."""
    trunk, left, right = (words(n * scale, seed).tolist() for n, seed in ((7, 1), (4, 2), (5, 3)))
    leaves = [words(n * scale, 10 + n).tolist() for n in (1, 3, 6, 2)]
    texts = [trunk + left + leaves[0], trunk + left + leaves[1], trunk + right + leaves[2], trunk + right + leaves[3]]
    texts += [trunk, trunk + left + leaves[1], words(5 * scale, 30).tolist()]
    members = [sequence(text, [1, 1], [0]) for text in texts]
    (pack,) = PrefixTree(members).packs
    return pack


def definition(q, k, v, pack, scale, window=None, softcap=None, limit=None):
    """Attention of every token over what it may see, one loop each; no mask algebra shared with the code."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    for t in range(pack.tokens):
        path = [j for j in range(t + 1) if t < int(pack.subtree_end[j])]
        if limit is not None:
            path += range(t + 1, t + 1 + int(limit[t]) - int(pack.depth[t]))
        if window is not None:
            path = [j for j in path if int(pack.depth[t]) - int(pack.depth[j]) < window]
        for h in range(q.shape[1]):
            scores = (k[path, h // group] @ q[t, h]) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[t, h] = scores.softmax(0) @ v[path, h // group]
    return out


def peaked_qkv(pack, heads, kv_heads, width, dtype, seed=0):
    """Queries close to some key: a few clear winners in each row, as in a trained model."""
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(pack.tokens, kv_heads, width, generator=g, dtype=torch.float64)
    v = torch.randn(pack.tokens, kv_heads, width, generator=g, dtype=torch.float64)
    pick = (torch.rand(pack.tokens, generator=g) * torch.arange(1, pack.tokens + 1)).long()
    q = k[pick].repeat_interleave(heads // kv_heads, 1) * 2 + torch.randn(
        pack.tokens, heads, width, generator=g, dtype=torch.float64
    )
    return tuple(x.to(dtype) for x in (q, k, v))


# Grouped heads, one group, as many keys as queries; a head width that is no power of two.
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 8), (6, 1, 12), (2, 2, 16)])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["dense", "segments", "flex", "triton"])
def test_backends(backend, window, heads, kv_heads, width):
    pack = bushy_pack()
    q, k, v = peaked_qkv(pack, heads, kv_heads, width, torch.float64)
    exact = definition(q, k, v, pack, 0.3, window)
    # Uncompiled, flex is here for its numbers alone: it has no backward on a CPU.
    inputs = [x.float().requires_grad_(backend != "flex") for x in (q, k, v)]
    out = attend(*inputs, TreePlan(pack, backend=backend), scale=0.3, window=window)
    assert (out.double() - exact).abs().max() < 1e-5
    if backend == "flex":
        return
    upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(upstream.float())
    reference = [x.clone().requires_grad_() for x in (q, k, v)]
    definition_differentiable(*reference, pack, 0.3, window).backward(upstream)
    for ours, theirs, name in zip(inputs, reference, "qkv", strict=True):
        assert (ours.grad.double() - theirs.grad).abs().max() < 1e-5 * theirs.grad.abs().max(), name


def definition_differentiable(q, k, v, pack, scale, window=None):
    """The definition in one expression: its gradient comes from autograd in fp64."""
    visible = visible_keys(pack)
    if window is not None:
        visible &= pack.depth[:, None] - pack.depth[None] < window
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * scale
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["dense", "flex", "triton", "auto"])
def test_softcap(backend):
    pack = bushy_pack()
    q, k, v = peaked_qkv(pack, 4, 2, 8, torch.float64)
    out = attend(*(x.float() for x in (q, k, v)), TreePlan(pack, backend=backend), scale=0.3, softcap=2.0)
    assert (out.double() - definition(q, k, v, pack, 0.3, softcap=2.0)).abs().max() < 1e-5
    assert (out.double() - definition(q, k, v, pack, 0.3)).abs().max() > 0.05, "the cap did nothing"


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("backend", ["dense", "segments"])
def test_image_blocks(backend, window):
    """Tokens 2 to 4 and 5 to 6 of the trunk are two images whose tokens see each other."""
    pack = bushy_pack()
    limit = pack.depth.clone()
    limit[2:5], limit[5:7] = 4, 6
    q, k, v = peaked_qkv(pack, 4, 2, 8, torch.float64)
    plan = TreePlan(pack, backend=backend, limit=limit)
    out = attend(*(x.float() for x in (q, k, v)), plan, scale=0.3, window=window)
    assert (out.double() - definition(q, k, v, pack, 0.3, window, limit=limit)).abs().max() < 1e-5
    assert (out.double() - definition(q, k, v, pack, 0.3, window)).abs().max() > 0.05
    with pytest.raises(ValueError, match="image tokens see each other, got 'flex'"):
        attend(q, k, v, TreePlan(pack, backend="flex", limit=limit), scale=0.3)


@pytest.mark.parametrize("window", [None, 300])
def test_segments_longer_than_a_block_of_queries(window):
    pack = bushy_pack(scale=70)  # 280 to 490 tokens a branch, blocks of 256
    q, k, v = peaked_qkv(pack, 2, 1, 8, torch.float32)
    dense, segments = (
        attend(q, k, v, TreePlan(pack, backend=b), scale=0.3, window=window) for b in ("dense", "segments")
    )
    assert (dense - segments).abs().max() < 1e-5


def test_a_wrong_subtree_end_is_seen():
    """The oracle above would notice a mask that lets one branch see another."""
    pack = bushy_pack()
    q, k, v = peaked_qkv(pack, 2, 1, 8, torch.float64)
    plan = TreePlan(pack, backend="dense")
    plan.subtree_end = torch.full_like(plan.subtree_end, pack.tokens)
    assert (attend(q, k, v, plan, scale=0.3) - definition(q, k, v, pack, 0.3)).abs().max() > 0.05


def test_named_backends_run_or_raise():
    pack = bushy_pack()
    q, k, v = peaked_qkv(pack, 4, 2, 8, torch.float32)
    with pytest.raises(ValueError, match="backend must be one of auto, dense, segments"):
        TreePlan(pack, backend="sparse")
    with pytest.raises(ValueError, match="'segments' has no softcap"):
        attend(q, k, v, TreePlan(pack, backend="segments"), scale=1.0, softcap=5.0)
    for name in ("flash_attn", "xformers"):
        if find_spec(name) is None:
            with pytest.raises(ModuleNotFoundError, match=name):
                attend(q, k, v, TreePlan(pack, backend=name), scale=1.0)
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, NotImplementedError)):  # torch's kernel exists for GPUs alone
            attend(q.half(), k.half(), v.half(), TreePlan(pack, backend="varlen"), scale=1.0)


def test_dense_refuses_large_packs(monkeypatch):
    monkeypatch.setattr(tree_attention, "DENSE_LIMIT", 20)
    pack = bushy_pack()
    q, k, v = peaked_qkv(pack, 4, 2, 8, torch.float32)
    for backend in ("dense", "flex"):
        with pytest.raises(ValueError, match=f"at most 20 tokens, got {pack.tokens}"):
            attend(q, k, v, TreePlan(pack, backend=backend), scale=1.0)


class Varlen:
    """Stands in for torch.nn.attention.varlen, whose kernel needs a GPU: bottom-right causal, in plain PyTorch."""

    @staticmethod
    def compute(q, k, v, cu_q, cu_k, scale, window):
        out = torch.empty_like(q)
        for i in range(len(cu_q) - 1):
            a, b, c, d = int(cu_q[i]), int(cu_q[i + 1]), int(cu_k[i]), int(cu_k[i + 1])
            lag = (torch.arange(b - a)[:, None] + (d - c) - (b - a)) - torch.arange(d - c)[None]
            visible = (lag >= 0) & ((lag <= window) if window >= 0 else True)
            group = q.shape[1] // k.shape[1]
            scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d].repeat_interleave(group, 1)) * scale
            weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
            out[a:b] = torch.einsum("hqk,khd->qhd", weights, v[c:d].repeat_interleave(group, 1))
        return out


def varlen_latest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                  window_size=(-1, -1), enable_gqa=False):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size[1] == 0
    return Varlen.compute(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0])


def varlen_first(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    assert query.shape[1] == key.shape[1], "the first release had no grouped heads"
    return Varlen.compute(query, key, value, cu_seq_q, cu_seq_k, query.shape[-1] ** -0.5, -1)


@pytest.mark.parametrize("release", [varlen_latest, varlen_first])
def test_varlen_arguments_follow_the_signature(monkeypatch, release):
    import torch.nn.attention.varlen as module

    monkeypatch.setattr(module, "varlen_attn", release)
    pack = bushy_pack()
    q, k, v = peaked_qkv(pack, 4, 2, 8, torch.float64)
    plan = TreePlan(pack, backend="varlen")
    assert (attend(q, k, v, plan, scale=0.3) - definition(q, k, v, pack, 0.3)).abs().max() < 1e-12
    if release is varlen_latest:
        out = attend(q, k, v, plan, scale=0.3, window=6)
        assert (out - definition(q, k, v, pack, 0.3, 6)).abs().max() < 1e-12
    else:
        with pytest.raises(ValueError, match="no sliding window, got window 6"):
            attend(q, k, v, plan, scale=0.3, window=6)


# ---- transformers --------------------------------------------------------------------------------------------------


def padded_batch():
    ids = torch.stack([words(12, 1), words(12, 2)])
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0  # left padding, as generate wants it
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_ordinary_calls_are_bit_identical(implementation):
    model = tiny_model("qwen3")
    model.set_attn_implementation(implementation)

    def ordinary():
        with torch.no_grad():
            logits = model(**padded_batch()).logits
        torch.manual_seed(3)
        sampled = model.generate(**padded_batch(), max_new_tokens=8, do_sample=True, pad_token_id=0)
        return logits, sampled

    before = ordinary()
    with installed(model):
        assert model.config._attn_implementation == registered_name(implementation)
        during = ordinary()
    after = ordinary()
    assert model.config._attn_implementation == implementation
    for other in (during, after):
        assert torch.equal(before[0], other[0])
        assert torch.equal(before[1], other[1])


def test_only_the_text_model_is_touched():
    model = tiny_model("qwen2_5_vl")
    with installed(model):
        assert model.config.text_config._attn_implementation == registered_name("sdpa")
        assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "sdpa"
    assert "vigos" not in str(model.config.to_dict())


def test_without_its_mask_function_padding_vanishes(monkeypatch):
    """Why the name is registered twice: transformers builds no mask for a name it does not know there."""
    from transformers import AttentionMaskInterface

    model = tiny_model("qwen3")
    real = padded_batch()["attention_mask"].bool()
    with torch.no_grad():
        before = model(**padded_batch()).logits[real]
        name = registered_name("sdpa")
        known = dict(AttentionMaskInterface._global_mapping)
        known.pop(name)
        monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", known)
        with installed(model):
            assert not torch.allclose(model(**padded_batch()).logits[real], before, atol=1e-2)


def test_a_layer_that_ignores_the_plan_fails():
    """The dummy mask fits no scores: without the installation a packed forward cannot return wrong numbers."""
    pack = bushy_pack()
    model = tiny_model("qwen3")
    inputs = {
        "input_ids": pack.ids[None], "position_ids": pack.depth[None], "attention_mask": dummy_mask("cpu"),
        "tree_plan": TreePlan(pack), "use_cache": False,
    }  # fmt: skip
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad(), pytest.raises(RuntimeError):
            model(**inputs)
        with torch.no_grad(), installed(model):
            assert torch.isfinite(model(**inputs).logits).all()


@contextmanager
def attention_dropout(model, p):
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = p
    yield


def test_what_a_plan_cannot_express_is_refused():
    pack = bushy_pack()
    model = tiny_model("qwen3").train()
    inputs = {"input_ids": pack.ids[None], "position_ids": pack.depth[None], "attention_mask": dummy_mask("cpu")}
    with (
        installed(model),
        attention_dropout(model, 0.1),
        pytest.raises(ValueError, match=r"dropout must be 0 .* got 0\.1"),
    ):
        model(**inputs, tree_plan=TreePlan(pack), use_cache=False)
    with installed(model), pytest.raises(ValueError, match=r"self-attention over its \d+ tokens, got query \(2, "):
        model(input_ids=pack.ids.expand(2, -1), attention_mask=dummy_mask("cpu"), tree_plan=TreePlan(pack))


# ---- GPU -----------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("backend", ["dense", "segments", "varlen", "triton", "flex", "auto"])
def test_backends_on_a_gpu(backend, window, dtype):
    """No further from fp64 than twice PyTorch's own attention under the dense mask, forward and backward."""
    if backend == "varlen" and dtype == torch.float32:
        pytest.skip("torch's varlen attention takes 16-bit tensors alone")
    pack = bushy_pack(scale=40)  # about 1,000 tokens: several blocks of queries and keys
    exact_inputs = [x.cuda().requires_grad_() for x in peaked_qkv(pack, 8, 2, 64, torch.float64)]
    visible = visible_keys(pack)
    if window is not None:
        visible &= pack.depth[:, None] - pack.depth[None] < window

    def dense(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible.cuda(), scale=0.1, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    def run(fn, inputs):
        out = fn(*inputs)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
        return [out, *torch.autograd.grad(out, inputs, upstream)]

    exact = run(dense, exact_inputs)
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact_inputs]
    plan = TreePlan(pack, backend=backend, device="cuda")
    ours = run(lambda q, k, v: attend(q, k, v, plan, scale=0.1, window=window), inputs)
    for mine, plain, truth, name in zip(ours, run(dense, inputs), exact, ("out", "dq", "dk", "dv"), strict=True):
        error, usual = ((x.double() - truth).abs().max().item() for x in (mine, plain))
        rounding = torch.finfo(dtype).eps * truth.abs().max().item()
        assert error <= 2 * usual + rounding, f"{name}: {error:.1e}, plain PyTorch {usual:.1e}"


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("backend", ["varlen", "triton", "flex", "auto"])
def test_hidden_states_on_a_gpu(backend):
    for family in ("qwen3", "smolvlm", "internvl"):
        # Heads of 16: the least that GPU kernels take.
        model = tiny_model(family, dtype=torch.bfloat16, hidden_size=64, head_dim=16).cuda()
        with torch.no_grad():
            alone = hidden_states(model, mixed_rows(family), scoring="separate", token_budget=1).double()
            padded = hidden_states(model, mixed_rows(family), scoring="separate").double()
            tree = hidden_states(model, mixed_rows(family), scoring="tree", backend=backend).double()
        assert (tree - alone).norm() <= 2 * (padded - alone).norm() + 1e-2 * alone.norm(), family
