"""A model's way from its head's output to its logits: measured on its own forward, or read from its configuration.

Some families scale or cap their logits after the head, under names of their own, and some wrappers do not do what their
text model's configuration says. What counts is the model's forward, from which it samples.
"""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vigos.divergence.reference import adjust
from vigos.models.parts import base_model, eval_mode, image_token_id_of, lm_head, replaced_forward

logger = logging.getLogger("vigos")

_SMALL, _LARGE = 2.0**-6, 4096.0  # the slope at 0, and a bound; both fit any 16-bit format
_PROBES = (_SMALL, _LARGE, 0.5, -0.5, 3.0, -3.0, 11.0, -11.0, 40.0, -40.0, 300.0, -300.0, 0.0, -_LARGE)
_measured: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def logit_settings(config: Any) -> dict[str, Any]:
    """Read from a text config what a model's own forward does to its head's output, as fields of `vigos.Head`."""
    scaling = getattr(config, "logits_scaling", None) or 1.0  # Granite divides by it, HyperCLOVA X multiplies
    scale = scaling if getattr(config, "model_type", "") == "hyperclovax" else 1.0 / scaling
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or scale
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    return {"softcap": softcap, "scale": float(scale)}


def logit_transform(model: nn.Module) -> dict[str, Any]:
    """Return what the model's own forward does to its head's output, as fields of `vigos.Head`.

    It is measured once a model, by a forward of one token in which the head returns chosen numbers. A model that is
    sharded by then is taken at its configuration's word. Raises ValueError where no scale and softcap give the model's
    logits, or its head's weight and bias do not give the head's output.
    """
    base = base_model(model)
    if base not in _measured:
        listed = logit_settings(base.config.get_text_config())
        if any(type(p) is not nn.Parameter or p.numel() == 0 or p.is_meta for p in lm_head(model).parameters()):
            return listed
        _measured[base] = _fitted(base, _probed(base), listed)
    return dict(_measured[base])


@torch.no_grad()
def _probed(base: Any) -> Tensor | None:
    """Return the model's logits (V,) where its head returns `_PROBES` over and over; None if it reads no bare token."""
    head: Any = lm_head(base)
    plain = head.forward

    def probe(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        output = plain(hidden)
        _check_linear(base, head, hidden, output)
        return _raw(output.shape[-1]).to(output.device).expand(output.shape).clone()

    token = next(i for i in range(1, 99) if i != image_token_id_of(base))
    ids = torch.full((1, 1), token, device=head.weight.device)
    with eval_mode(base), replaced_forward(head, probe):
        try:
            return base(input_ids=ids).logits[0, -1].double().cpu()
        except _NotLinear as error:
            raise ValueError(str(error)) from None
        except Exception as error:  # a model may want more than a token, in any way of its own
            logger.warning(
                "%s runs no forward of one token (%s: %s): what it does to its logits is read from its configuration",
                type(base).__name__, type(error).__name__, str(error)[:200],
            )  # fmt: skip
            return None


class _NotLinear(Exception):
    """Carries a refusal out of the model's forward."""


def _check_linear(base: Any, head: Any, hidden: Tensor, output: Tensor) -> None:
    bias = getattr(head, "bias", None)
    ours = nn.functional.linear(hidden, head.weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    error = (ours.double() - output.double()).norm() / output.double().norm().clamp_min(1e-12)
    if not error <= 0.02:
        raise _NotLinear(
            f"the head of {type(base).__name__} must return hidden @ weight.T + bias, got an output that is "
            f"{error:.1%} off ({type(head).__name__})"
        )


def _raw(v: int) -> Tensor:
    return torch.tensor(_PROBES).repeat(v // len(_PROBES) + 1)[:v]


def _fitted(base: Any, logits: Tensor | None, listed: dict[str, Any]) -> dict[str, Any]:
    """Return the scale and softcap that give `logits` from `_PROBES`: nothing, what the list says, or what fits."""
    if logits is None or logits.shape[0] < 2:
        return listed
    raw = _raw(logits.shape[0]).double()
    scale, bound = (logits[0] / _SMALL).item(), logits[1].item()
    capped = abs(bound - scale * _LARGE) > 1e-2 * abs(scale * _LARGE)
    measured = {"softcap": bound if capped else None, "scale": scale}
    candidates: tuple[tuple[dict[str, Any], float], ...] = (
        ({"softcap": None, "scale": 1.0}, 1e-2),
        (listed, 1e-2),
        (measured, 1e-3),
    )
    for settings, tolerance in candidates:
        if settings["scale"] > 0 and (settings["softcap"] is None or settings["softcap"] > 0):
            off = (adjust(raw, **settings) - logits).abs() - tolerance * logits.abs()
            if (off <= 1e-6).all():
                return settings
    worst = (adjust(raw, **listed) - logits).abs().nan_to_num(torch.inf).argmax()
    raise ValueError(
        f"{type(base).__name__} must turn its head's output into logits by a scale and a softcap: its own forward "
        f"turns {raw[worst]:g} into {logits[worst]:g}, where {listed} gives {adjust(raw, **listed)[worst]:g}"
    )
