VENV ?= .venv
PYTHON ?= python3
STAMP := $(VENV)/.ready

.PHONY: serve test test-fast test-full frameworks check audit bench siege docs clean lock

serve: $(STAMP)      ## set up, build, start; prints URL and key
	@exec $(VENV)/bin/cellvm serve

test: $(STAMP)       ## everything, on real machines too
	@exec sh tests/run.sh

test-fast: $(STAMP)  ## the tests that need no machine
	@exec sh tests/run.sh fast

test-full: $(STAMP)  ## the tests of the template code_interpreter_full, which is built first if it is missing
	@exec sh tests/run.sh full

frameworks: $(STAMP) ## the tests of frameworks on E2B's API; `make test` runs the two cheapest of them
	@exec sh tests/run.sh frameworks

check: $(STAMP)      ## format, lint, types
	$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy

audit: $(STAMP) $(VENV)-audit/.ready     ## known vulnerabilities of the locks, updates that the guest images lack
	@exec $(VENV)/bin/python -m tests.audit $(VENV)-audit/bin/pip-audit

bench: $(STAMP)      ## measure, beside a floor in the same run; raw samples in bench-results/
	@exec $(VENV)/bin/python -m tests.bench

siege: $(STAMP)      ## a server under everything at once for ten minutes; curve and figures in test-results/
	@exec $(VENV)/bin/python -m tests.siege

docs: $(VENV)-docs/.ready    ## the manual as a site, in site/; warnings end it, so it may not be --quiet
	$(VENV)-docs/bin/mkdocs build --strict

clean:               ## forget the virtual environment and results; the cache in ~/.cache/cellvm stays
	rm -rf $(VENV) $(VENV)-docs $(VENV)-audit site bench-results test-results .pytest_cache .mypy_cache .ruff_cache .hypothesis

lock:                ## renew the lock files of the guests, of development, of tests with other clients, of the manual and audit
	$(VENV)/bin/pip install --quiet uv
	$(VENV)/bin/uv pip compile --quiet --generate-hashes --no-header --annotation-style line --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 rootfs/requirements.in -o rootfs/requirements.lock
	$(VENV)/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 \
	  --universal --extra dev pyproject.toml -o requirements-dev.lock
	$(VENV)/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 \
	  --universal tests/e2e/lab.in -o tests/e2e/lab.lock
	for each in tests/e2e/e2b/python-*.in tests/e2e/mcp/python-*.in; do \
	  $(VENV)/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 \
	    --universal $$each -o $${each%.in}.lock; done
	for each in tests/e2e/e2b/frameworks/*; do \
	  $(VENV)/bin/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 \
	    --universal $$each/requirements.in -o $$each/requirements.lock; done
	$(VENV)/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 \
	  --universal --extra docs pyproject.toml -o docs/requirements.lock
	$(VENV)/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 \
	  --universal tests/audit.in -o tests/audit.lock

$(STAMP): pyproject.toml requirements-dev.lock
	@sh .ci/venv.sh $(PYTHON) $(VENV)
	@touch $@

$(VENV)-docs/.ready: docs/requirements.lock
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet --require-hashes --requirement docs/requirements.lock
	@touch $@

$(VENV)-audit/.ready: tests/audit.lock
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install --quiet --require-hashes --requirement tests/audit.lock
	@touch $@
