# Each target makes the .venv that it needs. ARGS="..." goes to the program behind demo, test, bench*, fuzz-python and
# sanitize-cpu: `make test ARGS="-k select"`. SUMMARY="--summary CSV" goes to the report at the end of bench-ttft.
PYTHON ?= python3
JOBS ?= 2
CLANG ?= clang++
FUZZ_SECONDS ?= 600
VENV := .venv
BIN := $(VENV)/bin
# A build that goes on where the last one was: pip alone would begin again.
PIP := SKBUILD_BUILD_DIR="build/{wheel_tag}" $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc python triton_kernels -type f -not -name '*.pyc')

.PHONY: demo test docs bench bench-optim bench-finetune bench-gpu bench-ttft bench-retriever fuzz fuzz-python sanitize sanitize-cpu emulate supply-chain lint format clean

demo: $(VENV)/.demo
	$(BIN)/python -m bench.demo $(ARGS)

test: $(VENV)/.test
	$(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

docs: $(VENV)/.docs
	$(BIN)/python docs/tables.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.test
	$(BIN)/python -m bench.harness.run $(ARGS)

bench-optim: $(VENV)/.test
	$(BIN)/python -m bench.ops.optim $(ARGS)

bench-finetune: $(VENV)/.test
	$(BIN)/python -m bench.ops.finetune $(ARGS)

bench-gpu: $(VENV)/.test
	$(BIN)/python -m bench.ops.selection_gpu $(ARGS)
	$(BIN)/python -m bench.ops.sift_gpu $(ARGS)

# Two cores take about ten minutes. A run that was stopped goes on from its rows in demo_out/ttft.
TTFT := --out demo_out/ttft --budgets 3 6 --calibration 4
bench-ttft: $(VENV)/.test
	$(BIN)/python -m bench.ttft calibrate judge $(TTFT) --judged 20 --paths float32 --steps 1e-4 2e-4 4e-4 \
	  --rules kNN "kNN x 2" SIFT hull "hull, at most 2" $(ARGS)
	$(BIN)/python -m bench.ttft judge $(TTFT) --judged 4 --paths published $(ARGS)
	$(BIN)/python -m bench.ttft calibrate judge $(TTFT) --judged 20 --paths lora many --rules kNN --budgets 6 \
	  --steps 2e-3 4e-3 8e-3 --slots 4 $(ARGS)
	$(BIN)/python -m bench.ttft report --out demo_out/ttft $(SUMMARY)

bench-retriever: $(VENV)/.test
	$(BIN)/python -m bench.ops.retriever $(ARGS)

sanitize: $(VENV)/.test
	for tool in memcheck racecheck initcheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python tests/helpers/every_call.py || exit 1; \
	done

# Selections of the core on calls that clang's fuzzer makes up. What it learns stays in build/fuzz/corpus.
fuzz:
	cmake -S . -B build/fuzz -DHULLKIT_CUDA=OFF -DHULLKIT_PYTHON=OFF -DSKBUILD_PROJECT_VERSION=0 \
	  -DCMAKE_CXX_COMPILER=$(CLANG) -DHULLKIT_SANITIZE=fuzzer,address,undefined
	cmake --build build/fuzz --target fuzz_selection --parallel $(JOBS)
	mkdir -p build/fuzz/corpus
	build/fuzz/fuzz_selection -max_total_time=$(FUZZ_SECONDS) -max_len=64 -timeout=20 -print_final_stats=1 \
	  -artifact_prefix=build/fuzz/ build/fuzz/corpus csrc/fuzz/seeds

# Any calls in any order, from Python, for some minutes; the same in every `make test`, for seconds.
fuzz-python: $(VENV)/.test
	$(BIN)/python -m pytest -q --hypothesis-profile=long --hypothesis-show-statistics \
	  tests/selection/test_any_calls.py tests/optim/test_optim_changes.py \
	  tests/finetune/test_any_adaptations.py tests/prompt_batch/test_any_batches.py $(ARGS)

sanitize-cpu: $(VENV)/.test
	.ci/sanitize $(BIN)/python $(ARGS)

# The core on processors that are not here. Needs qemu-user and g++-aarch64-linux-gnu.
emulate:
	.ci/emulate

# Builds of the package: the same bytes twice, without network, CMake or Ninja, in a read-only folder with spaces.
supply-chain: $(VENV)/.test
	.ci/supply_chain $(BIN)/python

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

clean:
	rm -rf $(VENV) build dist demo_out

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hullkit needs Python >= 3.10; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python constraints.txt $(SOURCES)
	$(PIP) '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/bin/python constraints.txt $(SOURCES)
	$(PIP) '.[test]'
	touch $@ $(VENV)/.demo

$(VENV)/.docs: $(VENV)/bin/python constraints.txt pyproject.toml
	$(PIP) 'pip>=25.1'
	$(PIP) --group docs
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) '.[lint]'
	touch $@
