# `make test` and `make demo` are all the set-up there is; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python -m

MODEL := mobileformer_294m
ARTIFACT := dist/$(MODEL)-onnx-fp32
PHOTOGRAPH := edgevit/photos/astronaut.jpg
MODELS = $$($(VENV)/bin/edgevit list)
RUNTIME := ort
DURATION := 20
LIMIT := 2000
TABLES :=
GATES := 200 100 100
STUDY := dist/gate-study.jsonl
TARGETS := openvino tensorrt coreml
PRECISIONS := fp32 fp16
GPU := sm89

.PHONY: help test test-slow lint demo exports bench-naive bench-pointwise bench-int8 gate-study reference-nets constraints clean \
	distclean

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-16s %s\n", $$1, $$2}' Makefile

test: lint ## set up, then ruff, mypy and every test but the slow ones
	$(RUN) pytest -m "not slow" tests/bench tests/export tests/models tests/runtimes
	$(RUN) pytest -m "not slow" tests/test_*.py # a process of their own: signals beside all native runtimes crashed once

test-slow: $(READY) ## set up, then export every large network
	$(RUN) pytest -m slow

lint: $(READY) ## set up, then ruff and mypy
	$(RUN) ruff check
	$(RUN) mypy

demo: $(READY) ## set up, then export a network, verify it, classify a photograph with it and time it
	$(VENV)/bin/edgevit export $(MODEL) --to onnx --out dist --force
	$(VENV)/bin/edgevit verify $(ARTIFACT)
	$(VENV)/bin/edgevit run $(ARTIFACT) $(PHOTOGRAPH)
	$(VENV)/bin/edgevit bench $(ARTIFACT) --threads 1

exports: $(READY) ## export MODELS to TARGETS in PRECISIONS, each compared with the reference; GPU=sm89 for the engines
	for model in $(MODELS); do for target in $(TARGETS); do for precision in $(PRECISIONS); do \
		option=; [ $$target != tensorrt ] || option="--gpu $(GPU)"; \
		$(VENV)/bin/edgevit export $$model --to $$target --precision $$precision $$option --out dist --force || exit 1; \
	done; done; done

bench-naive: $(READY) ## race each deploy form against the plain export of the same network; RUNTIME=ov on OpenVINO
	for model in $(MODELS); do \
		$(VENV)/bin/edgevit bench $$model --vs naive --runtime $(RUNTIME) --threads 1 --duration $(DURATION) || exit 1; \
	done

bench-pointwise: $(READY) ## race the grouped against the dense form of 26M: what export/measurements.json records
	$(VENV)/bin/edgevit export mobileformer_26m --to onnx --pointwise dense --out dist/dense --force
	$(VENV)/bin/edgevit export mobileformer_26m --to onnx --pointwise grouped --out dist/grouped --force
	$(VENV)/bin/edgevit bench dist/dense/mobileformer_26m-onnx-fp32 dist/grouped/mobileformer_26m-onnx-fp32 \
		--threads 1 --duration $(DURATION)

bench-int8: $(READY) ## speed, size and accuracy of int8, as in the README; TABLES="speed size accuracy", LIMIT pictures
	$(RUN) edgevit.cli.int8_study --duration $(DURATION) --limit $(LIMIT) $(TABLES)

gate-study: $(READY) ## how often the gate errs, as in docs/gate.md; GATES of the same, 5 % and 10 % slower; hours
	mkdir -p $(dir $(STUDY))
	$(RUN) edgevit.cli.gate_study $(STUDY) --gates $(GATES)

reference-nets: $(READY) ## train the small networks of the reference task anew: over two hours on one busy core
	$(RUN) edgevit.reference.train
	$(RUN) edgevit.reference.ranges

# torch keeps its pin, which is raised by hand; what only a CUDA build of it needs is not listed.
constraints: ## write constraints.txt anew: the newest versions that pyproject.toml allows
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	grep '^torch==' constraints.txt > build/constraints/torch.txt
	build/constraints/bin/python -m pip install --disable-pip-version-check -U setuptools
	build/constraints/bin/python -m pip install --disable-pip-version-check -c build/constraints/torch.txt \
		--no-build-isolation -e '.[test]'
	grep '^#' constraints.txt > build/constraints/new.txt
	build/constraints/bin/python -m pip freeze --all --exclude pip --exclude edgevit | sed 's/+.*//' | \
		grep -v -e '^nvidia-' -e '^cuda-' -e '^triton' >> build/constraints/new.txt
	mv build/constraints/new.txt constraints.txt

clean: ## remove what builds, tests and the demo left; the environment stays
	rm -rf build dist ./*.egg-info .mypy_cache .pytest_cache .ruff_cache
	find bench edgevit export runtimes tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environment too
	rm -rf $(VENV)

# One environment, made anew only when what it is made from changes. Paths are relative: the checkout may lie anywhere.
# setuptools comes first, from the same pins, so that the editable install builds with it and fetches nothing unpinned.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "edgevit needs Python 3.11 or newer; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --disable-pip-version-check -c constraints.txt setuptools
	$(RUN) pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@
