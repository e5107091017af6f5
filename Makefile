# Each target sets itself up first (launch/install.sh: minutes the first time, then nothing).
#   make train                                         the sample data; a rank per GPU, or 2 ranks on cores
#   make train DATA=EuroSAT_RGB.zip RECIPE=recipes/scratch.toml NP=4 ARGS="--train.epochs 10"

NP     ?= $(shell $(BIN)/python -c 'from hvd_eurosat.cluster.node import ranks_here; print(ranks_here())')
RECIPE ?= recipes/quickstart.toml
DATA   ?= sample
SCENE  ?= data/$(NAME)/scene.tif
ARGS   ?=
SAMPLE_RATIOS := 80,10,10

BIN  := $(or $(SETUP_VENV),.venv)/bin
NAME := $(basename $(notdir $(DATA:%/=%)))
RUN  := $(basename $(notdir $(RECIPE)))-$(NAME)
BENCH = --data.root data/$(NAME) --run.dir runs/benchmark-$(NAME) $(ARGS)
SIDE    = --dist loadfile --no-loadscope-reorder --numprocesses # of files of tests at a time: jobs wait much; long ones first
LONGEST := $(addprefix tests/system/test_,image.py slurm.py elastic.py)
SCRIPTS = .ci/run $(shell find launch docker tests/gpu -name '*.sh' -o -name '*.sbatch' -o -name '*.env.example') launch/elastic/ssh

ifeq ($(shell id -u),0) # Open MPI asks root twice
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

.PHONY: help setup train map bench test test-long test-faults test-system test-gpu lint format docs pictures constraints clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]*:.*## / { printf "%-13s%s\n", $$1, $$2 }' Makefile

setup: ## .venv with everything in it, Horovod included
	@bash launch/install.sh

data/$(NAME): | setup
	$(BIN)/python -m hvd_eurosat.prepare --source $(DATA) --out $@ $(if $(filter sample,$(DATA)),--ratios $(SAMPLE_RATIOS))

train: setup data/$(NAME) ## train RECIPE on DATA with NP ranks (default: one per GPU, or 2 on cores) and ARGS, into runs/
	$(BIN)/mpirun -np $(NP) --bind-to none $(BIN)/python -m hvd_eurosat.train \
	  --config $(RECIPE) --data.root data/$(NAME) --run.dir runs/$(RUN) $(ARGS)

map: setup data/$(NAME) ## a map of SCENE (default: the sample's) by the best network of `make train`, into maps/
	$(BIN)/mpirun -np $(NP) --bind-to none $(BIN)/python -m hvd_eurosat.map \
	  --checkpoint runs/$(RUN)/checkpoints/best.json --scene $(SCENE) --out maps/$(basename $(notdir $(SCENE))) $(ARGS)

test test-long test-faults test-system: export CUDA_VISIBLE_DEVICES := # they are of CPUs
test: setup ## the tests, those under mpirun and horovodrun included (ARGS go to pytest)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE) 4 -m "not slow and not long" tests/faults tests/parallel tests/unit $(ARGS)

test-long: setup ## what `make test` leaves out for its length: jobs that compile or measure, all of EuroSAT, more files
	$(BIN)/python -m pytest $(SIDE) 2 -m long tests/parallel tests/unit $(ARGS)

test-faults: setup ## the whole fault suite (docs/reliability.md)
	$(BIN)/python -m pytest tests/faults $(ARGS)

test-system: setup ## Slurm, several hosts, an image: as root, with the packages that .ci/run installs
	$(BIN)/python -m pytest $(SIDE) 3 $(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/system/test_*.py)) $(ARGS)

test-gpu: setup ## on a GPU: step, exchange, runs and rates, in six minutes at most; skipped where there is none
	$(BIN)/python -m pytest tests/gpu $(ARGS)

bench: setup data/$(NAME) ## the benchmark: step with NP ranks, scaling, projection, memory; hours (ARGS="--steps 5": less)
	$(BIN)/mpirun -np $(NP) --bind-to none $(BIN)/python -m hvd_eurosat.benchmark step $(BENCH)
	$(BIN)/python -m hvd_eurosat.benchmark scaling $(BENCH)
	$(if $(filter 1,$(NP)),@echo "one rank: no projection; that takes messages between two",\
	  $(BIN)/python -m hvd_eurosat.benchmark project $(BENCH))
	$(BIN)/python -m hvd_eurosat.benchmark memory $(BENCH)

lint: setup ## ruff, mypy --strict, shellcheck
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources $(SCRIPTS)

format: setup ## what ruff can put right by itself
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

docs: setup ## docs/configuration.md, from the code
	$(BIN)/python -m docs.generate

pictures: setup ## docs/images: network, speed; samples of data/ and curves of runs/scratch (an hour's run) where they are
	$(BIN)/python -m docs.pictures

constraints: setup ## the newest versions that pyproject.toml allows, into launch/constraints.txt
	sed -i '/^[^#]/d' launch/constraints.txt
	$(BIN)/uv pip compile --universal --python-version 3.10 --all-extras --group horovod-build \
	  --no-header --no-annotate --no-emit-index-url --quiet pyproject.toml >> launch/constraints.txt

clean: ## remove all that make made, but data/, runs/ and maps/
	rm -rf $(BIN:/bin=) $(BIN:/bin=.lock) build hvd_eurosat/model/*.so *.egg-info .mypy_cache .pytest_cache .ruff_cache
