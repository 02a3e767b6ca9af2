"""From a network to an artifact: deploy form, capture, graph passes, one file per target."""

if __name__ != "edgevit.export":
    raise ImportError("this folder is the package edgevit.export: import that name")
