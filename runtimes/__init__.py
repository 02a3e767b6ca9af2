"""A runtime runs one model: load, run, close. Used through `Session`, which checks in one place."""

if __name__ != "edgevit.runtimes":
    raise ImportError("this folder is the package edgevit.runtimes: import that name")

from .session import Session

__all__ = ["Session"]
