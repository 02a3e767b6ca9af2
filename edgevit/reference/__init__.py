"""A classification task that needs no download, and small networks trained on it, to measure what int8 costs."""

from __future__ import annotations

from dataclasses import replace

from edgevit.specs import ImageSpec, ModelCard

CLASSES = 16  # of the task
NOTE = "a small network with all mechanisms of its family, trained on edgevit's own reference task; no paper has it"


def reference_card(like: ModelCard, name: str, parameters: int, macs: int) -> ModelCard:
    """The card of a small network of the family of `like`; its weights ship with edgevit."""
    return replace(
        like,
        name=name,
        parameters=parameters,
        macs=macs,
        paper={},
        image=ImageSpec(),
        notes=(NOTE,),
        num_classes=CLASSES,
    )
