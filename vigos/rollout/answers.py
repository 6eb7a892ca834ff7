"""Schema of the answers of a rollout server: what is not exactly as asked never reaches training."""

from __future__ import annotations

from typing import Any

from vigos.system.http import UnusableAnswer

_LARGEST_ID = 2**31


Read = tuple[list[int], str, list[float]]  # ids, finish_reason, log-probabilities of the tokens: none, or one for each


def read_completions(answer: Any, n: int, max_tokens: int) -> tuple[list[int], list[Read]] | None:
    """Return ids of the prompt, and what was read of each completion in order; None where no ids came at all.

    Args:
        answer: of /chat/completions, parsed.
        n: completions that were asked for. max_tokens: tokens that each may have.

    Raises:
        UnusableAnswer: naming the field, what was wanted and what came.
    """
    choices = _typed(_typed(answer, "the answer", dict), "choices", list)
    if len(choices) != n:
        raise UnusableAnswer(f"{len(choices)} completions, {n} were asked for")
    found: dict[int, tuple[Any, str, list[float]]] = {}
    for choice in choices:
        index, reason = (_typed(_typed(choice, "a choice", dict), *field) for field in _CHOICE)
        found[index] = (choice.get("token_ids"), reason, _logprobs(choice.get("logprobs")))
    if sorted(found) != list(range(n)):
        raise UnusableAnswer(f"completions numbered {sorted(found)}, wanted 0 to {n - 1}")
    usage = _typed(_typed(answer, "usage", dict), "completion_tokens", int)
    prompt = answer.get("prompt_token_ids")
    if prompt is None or any(ids is None for ids, _, _ in found.values()):
        return None
    completions = [(_ids(ids, "token_ids"), reason, values) for _, (ids, reason, values) in sorted(found.items())]
    total = sum(len(ids) for ids, _, _ in completions)
    if total != usage:
        raise UnusableAnswer(f"{total} token ids, but usage says {usage}")
    if (longest := max(len(ids) for ids, _, _ in completions)) > max_tokens:
        raise UnusableAnswer(f"a completion of {longest} tokens, {max_tokens} were asked for")
    return _ids(prompt, "prompt_token_ids"), completions


def read_names(answer: Any) -> list[str]:
    """Return the names of models and adapters in an answer of /models. Raises UnusableAnswer."""
    models = _typed(_typed(answer, "the answer", dict), "data", list)
    return [_typed(_typed(model, "a model", dict), "id", str) for model in models]


_CHOICE = (("index", int), ("finish_reason", str))


def _typed(value: Any, name: str, kind: type) -> Any:
    """Return a value, or of a mapping its field `name`, if it is exactly of a type: True is no number."""
    field = value.get(name) if isinstance(value, dict) and " " not in name else value
    if type(field) is not kind:
        raise UnusableAnswer(f"an answer in which {name!r} is no {kind.__name__}, but a {type(field).__name__}")
    return field


def _ids(ids: Any, name: str) -> list[int]:
    if type(ids) is not list or not all(type(i) is int and 0 <= i < _LARGEST_ID for i in ids):
        raise UnusableAnswer(f"{name} that are no list of token ids")
    return ids


def _logprobs(given: Any) -> list[float]:
    """Return the log-probabilities of a choice's tokens; [] where none were sent."""
    content = None if given is None else _typed(given, "the logprobs", dict).get("content")
    tokens = [] if content is None else _typed(content, "the content", list)
    return [_typed(_typed(token, "a token", dict), "logprob", float) for token in tokens]
