# Every target first makes .venv from requirements.txt if it is missing or stale.
# Variables may be exported, given on the line (make extract LIMIT=100), or kept in an untracked local.mk.
-include local.mk

PYTHON3 ?= python3
PYTHON  := .venv/bin/python
READY   := .venv/.ready

.DEFAULT_GOAL := help

$(READY): requirements.txt
	@echo "making .venv from requirements.txt (once)"
	@test -x $(PYTHON) || $(PYTHON3) -m venv .venv
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check uv
	@.venv/bin/uv pip install --quiet --python $(PYTHON) --requirements requirements.txt
	@.venv/bin/uv pip install --quiet --python $(PYTHON) --no-deps --no-build-isolation --editable . --config-settings editable_mode=compat
	@touch $(READY)

.PHONY: requirements
requirements: $(READY)  ## resolve requirements.in into the pinned, universal requirements.txt
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header --no-emit-index-url \
	  requirements.in --output-file requirements.txt
