"""Token sequences on their way through a model: what is fed, and at which positions a hidden state is wanted."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vigos.method.prompts import Prompts, Role

if TYPE_CHECKING:
    from PIL.Image import Image

# What a processor returns about text; everything else it returns belongs to the images.
# How chat templates of thinking models open the assistant's turn: the method says where thinking begins.
_OPEN_THINKING = re.compile(r"(?:<think>|\[THINK\]|<seed:think>|◁think▷)\s*\Z")
_TEXT_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True)
class ImageInputs:
    """The processed images of one prompt. `key` is equal for equal pixels: the identity that allows prefix sharing."""

    key: str
    tensors: dict[str, Tensor]  # pixel_values, image_grid_thw, … as the processor returned them

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> ImageInputs:
        """Return the inputs with a digest of names, shapes, dtypes and bytes as their key."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(tensors):
            array = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name}{tuple(array.shape)}{array.dtype}".encode())
            digest.update(array.view(torch.uint8).numpy().tobytes() if array.numel() else b"")
        return cls(digest.hexdigest(), tensors)


@dataclass(frozen=True)
class Chat:
    """Messages, images and prefill that a prompt was rendered from, for servers that render it themselves."""

    messages: Seq[dict[str, Any]]  # contents are parts, {"type": "image"} in place of each image
    images: Seq[Image]
    prefill: str
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as ids, image placeholders expanded and the assistant's prefill included."""

    ids: Tensor  # (P,) int64
    token_type_ids: Tensor | None  # (P,) int64, the processor's mm_token_type_ids: 0 text, 1 image; None without images
    images: ImageInputs | None
    chat: Chat | None = field(default=None, repr=False, compare=False)
    text: str = field(default="", repr=False, compare=False)  # as rendered, with one placeholder an image
    processed: Seq[Any] = field(
        default=(), repr=False, compare=False
    )  # what the image processor returned, call by call


@dataclass(frozen=True)
class ScoredSequence:
    """A prompt, a completion appended to it as ids, and the completion tokens whose prediction is wanted.

    The hidden state that predicts `completion_ids[i]` is the one at position `len(prompt.ids) + i - 1`.
    `completion_ids` may be cut after the last scored token: later tokens cannot change a causal model's result.
    """

    prompt: EncodedPrompt
    completion_ids: Tensor  # (C,) int64
    scored: Tensor  # (S,) int64, increasing indices into completion_ids
    owner: tuple[int, str] = field(default=(0, ""))  # rollout of the batch and role, for messages and metrics


def encode_prompt(
    processor: Any,
    prompts: Prompts,
    role: Role,
    problem: str,
    answer: str = "",
    images: Seq[Image] = (),
    prefill: str | None = None,
    like: EncodedPrompt | None = None,
    columns: Mapping[str, str] | None = None,
) -> EncodedPrompt:
    """Render the chat template of `role`, append the assistant's prefill and tokenise the text at once.

    A thinking model's template may open `<think>` itself: that is taken off before a prefill and for teachers, since
    the method's format says where thinking begins. Special tokens that someone typed into `problem` or `answer` stay
    text: an invisible character (U+2060) breaks them.

    Args:
        processor: a transformers processor (or, for text-only models, a tokenizer) with a chat template.
        prefill: text that opens the assistant's turn; None takes the role's own (`Prompts.prefill` for the student and
            the reference teacher, nothing for the perception and reasoning teachers).
        like: another prompt of the same images and processor, whose processed images are taken instead of processing
            them again: resizing and cutting a large image takes longer than the text of many prompts.
        columns: the example's texts that the template names, beside problem and answer.

    Raises:
        ValueError: the chat template refuses the conversation, or the image processor an image.
    """
    if prefill is None:
        prefill = prompts.prefill if role in ("student", "reference") else ""
    problem, answer = (typed_text(processor, text) for text in (problem, answer))
    columns = {name: typed_text(processor, text) for name, text in (columns or {}).items()}
    messages = prompts.messages(role, problem, answer, len(images), columns)
    chat = Chat(messages, tuple(images), prefill, prompts.template_kwargs(role))
    if not hasattr(processor, "image_processor"):  # a tokenizer: its templates expect plain strings
        messages = [m | {"content": "".join(part["text"] for part in m["content"])} for m in messages]
    text = _rendered(processor, messages, chat.template_kwargs)
    if prefill or role != "student":
        text = _OPEN_THINKING.sub("", text)
    text += prefill
    tokenizer = getattr(processor, "tokenizer", processor)
    # A template that writes BOS (Gemma, Llama, Mistral) would get a second one from the tokenizer.
    special = {"add_special_tokens": False} if tokenizer.bos_token and text.startswith(tokenizer.bos_token) else {}
    processed: list[Any] = []
    if images:
        with _processing_once(processor.image_processor, like.processed if like else (), processed):
            batch = processor(
                text=[text], images=[list(images)], return_tensors="pt", return_mm_token_type_ids=True, **special
            )
    else:
        batch = processor(text=[text], return_tensors="pt", **special)
    tensors = {k: v for k, v in batch.items() if k not in _TEXT_KEYS and isinstance(v, Tensor)}
    types = batch.get("mm_token_type_ids", batch.get("token_type_ids")) if images else None  # Gemma 3 has the latter
    return EncodedPrompt(
        ids=batch["input_ids"][0],
        token_type_ids=None if types is None else torch.as_tensor(types)[0],
        images=_image_inputs(tensors, like) if tensors else None,
        chat=chat,
        text=text,
        processed=processed,
    )


def typed_text(processor: Any, text: str) -> str:
    """Return `text` with an invisible word joiner inside every special token, which then is tokenised as text."""
    tokenizer = getattr(processor, "tokenizer", processor)
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    special |= {getattr(processor, name, None) for name in ("image_token", "video_token", "audio_token", "boi_token")}
    for token in sorted((t for t in special if isinstance(t, str) and len(t) > 2), key=len, reverse=True):
        text = text.replace(token, f"{token[0]}\u2060{token[1:]}")
    return text


def _rendered(processor: Any, messages: Seq[Any], options: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except TemplateError as error:
        system = messages[0]["role"] == "system"
        hint = "; set `system: ''` in prompts_file, and say there in the user turns what it said" if system else ""
        raise ValueError(f"the chat template refuses the conversation: {error}{hint}") from error


@contextmanager
def _processing_once(image_processor: Any, known: Seq[Any], outputs: list[Any]) -> Iterator[None]:
    """Append to `outputs` what the image processor returns, call by call; calls that are in `known` are not made."""
    original = image_processor.preprocess

    def preprocess(*args: Any, **kwargs: Any) -> Any:
        n = len(outputs)
        outputs.append(known[n] if n < len(known) else original(*args, **kwargs))
        return copy(outputs[n])  # processors take keys out of it

    image_processor.preprocess = preprocess
    try:
        yield
    finally:
        del image_processor.preprocess


def _image_inputs(tensors: dict[str, Tensor], like: EncodedPrompt | None) -> ImageInputs:
    """Return the images of `like` if these are its tensors: hashing all pixels takes as long as processing them."""
    if like is not None and like.images is not None:
        known = like.images.tensors
        if known.keys() == tensors.keys() and all(known[name] is tensor for name, tensor in tensors.items()):
            return like.images
    return ImageInputs.from_tensors(tensors)
