# Every target does its own set-up; `make run` and `make test` are all a newcomer needs.
SHELL := /bin/bash
BIN := .venv/bin
SEEDS ?= 1..1000
SECONDS_EACH ?= 60
KILLS ?= 1000
WHOLE = -n 2 --dist loadfile
SEED ?= 1
C_FILES = $(shell find native -name '*.c' | sort)
.PHONY: run test lint setup native sim storm fuzz perf clean

run:                ## a farm from configs/quickstart.yaml, in the foreground
	@scripts/setup run
	@exec $(BIN)/nbdvvol up -f configs/quickstart.yaml

test:               ## the whole test suite, in two workers; or some of it, in one: make test ARGS="tests/unit -k cache"
	@scripts/setup run test
	$(BIN)/python -m pytest $(or $(ARGS),$(WHOLE))

lint:               ## ruff, mypy, import-linter, and a C compile with warnings as errors
	@scripts/setup lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	scripts/lint-c

setup:              ## what `run`, `test` and `lint` need, without running anything
	@scripts/setup run test lint

native:             ## build the data plane into the source tree
	@scripts/setup run

sim:                ## replay the data plane under simulated faults: make sim SEEDS=1..100000
	@scripts/setup run test
	scripts/sim $(SEEDS)

storm:              ## kill the daemons around a mirror for longer: make storm KILLS=1000 SEED=7
	@scripts/setup run test
	NBDVVOL_STORM_KILLS=$(KILLS) NBDVVOL_SEED=$(SEED) $(BIN)/python -m pytest tests/e2e/test_mirror_storm.py

fuzz:               ## coverage-guided fuzzing of handshake and transmission: make fuzz SECONDS_EACH=600
	@scripts/setup run test
	scripts/fuzz $(SECONDS_EACH)

perf:               ## measure beside other NBD servers: make perf ARGS="--suite core --rounds 7"
	@scripts/setup run perf
	$(BIN)/python -m perf run $(ARGS)

clean:              ## remove what was built; farms' data stays
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis nbdvvol/dataplane/_native*.so
