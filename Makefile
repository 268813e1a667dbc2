VENV ?= .venv
PYTHON ?= python3
STAMP := $(VENV)/.ready

.PHONY: serve test check bench clean lock

serve: $(STAMP)      ## set up, build, start; prints URL and key
	@exec $(VENV)/bin/cellvm serve

test: $(STAMP)       ## everything, on real machines too
	@exec sh tests/run.sh

check: $(STAMP)      ## format, lint, types
	$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy

bench: $(STAMP)      ## measure, beside a floor in the same run; raw samples in bench-results/
	@exec $(VENV)/bin/python -m tests.bench

clean:               ## forget the virtual environment and results; the cache in ~/.cache/cellvm stays
	rm -rf $(VENV) bench-results test-results .pytest_cache .mypy_cache .ruff_cache .hypothesis

lock:                ## renew the lock files of the guests, of development and of JupyterLab's tests
	$(VENV)/bin/pip install --quiet uv
	$(VENV)/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 rootfs/requirements.in -o rootfs/requirements.lock
	$(VENV)/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 \
	  --universal --all-extras pyproject.toml -o requirements-dev.lock
	$(VENV)/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 \
	  --universal tests/e2e/lab.in -o tests/e2e/lab.lock

$(STAMP): pyproject.toml requirements-dev.lock
	@sh .ci/venv.sh $(PYTHON) $(VENV)
	@touch $@
