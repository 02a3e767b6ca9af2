"""A runtime runs one model file: load, run, close."""

if __name__ != "edgevit.runtimes":
    raise ImportError("this folder is the package edgevit.runtimes: import that name")
