# make demo, make test: everything else they need is made first, and not again without need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CUDA_VENV := .venv-cuda
COVERAGE_VENV := .venv-coverage
DOCS_VENV := .venv-docs
RECIPES_VENV := .venv-recipes
# For test-torch: make test-torch TORCH=2.11.0
TORCH ?= 2.14.1
TORCH_VENV := .venv-torch-$(TORCH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CPP := $(shell find csrc tests examples -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# An environment with the torch of a version. torchvision (0.26 goes with torch 2.11, 0.27 with 2.12, and so on) is for its models'
# definitions alone: with its dependencies it could replace torch by another build.
define environment
$(PYTHON) -m venv $(@D)
$(@D)/bin/pip install --quiet -r requirements-dev.txt torch==$(1)
$(@D)/bin/pip install --quiet --no-deps 'torchvision==0.$(shell expr $(word 2,$(subst ., ,$(1))) + 15).*'
touch $@
endef

# An environment with more packages. torch, torchvision and fusedconvbn are those of $(VENV), with the versions that are there.
define beside
$(BIN)/python -m venv $(@D)
$(@D)/bin/pip install --quiet $(1) -r $<
$(@D)/bin/python -c 'import site, sys; print(f"import site; site.addsitedir({sys.argv[1]!r})", \
  file=open(site.getsitepackages()[0] + "/project.pth", "w"))' \
  "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"
touch $@
endef

.PHONY: demo test test-all lint check-cuda test-cuda test-torch says-what-it-needs gpu-bundle bench bench-models bench-cuda coverage recipes docs fuzz leak sanitize build format clean

demo: build
	$(BIN)/python examples/mnist.py --output output/mnist.png

# On two cores, with one thread each. CONTRIBUTING.md says which cases `make test` leaves out.
IN_PARALLEL = OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup
test: build lint
	$(IN_PARALLEL) -m "not slow"

# The device of test_launches.py stays for as long as its process lives.
test-all: build lint check-cuda
	$(IN_PARALLEL) --ignore tests/kernels/test_launches.py
	$(BIN)/pytest tests/kernels/test_launches.py

# An hour and more on two cores; nothing else should run. `make bench-models` alone goes on where it was stopped.
bench: build
	$(BIN)/python benchmarks/experiment.py
	$(BIN)/python benchmarks/conv_bn.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/models.py
	$(BIN)/python benchmarks/peaks.py
	$(BIN)/python benchmarks/tables.py

bench-models: build
	$(BIN)/python benchmarks/models.py --resume
	$(BIN)/python benchmarks/tables.py

# On one GPU, with the CUDA build of torch.
bench-cuda: says-what-it-needs $(CUDA_VENV)/built
	$(CUDA_VENV)/bin/python benchmarks/kernels.py --device cuda
	$(CUDA_VENV)/bin/python benchmarks/growth.py --device cuda
	$(CUDA_VENV)/bin/python benchmarks/peaks.py --device cuda --batch 64
	for tune in "" --cudnn-benchmark; do \
	  $(CUDA_VENV)/bin/python benchmarks/conv_bn.py --device cuda $$tune \
	    --output benchmarks/results/gpu-conv_bn$$tune.json || exit 1; \
	  for batch in 128 256; do \
	    $(CUDA_VENV)/bin/python benchmarks/models.py --device cuda --batch $$batch $$tune \
	      --output benchmarks/results/gpu-models-$$batch$$tune.json || exit 1; done; done
	$(CUDA_VENV)/bin/python benchmarks/tables.py

# An hour and more on one core: `fuse` on the models of seven libraries, which are installed for this alone. Goes on where it was
# stopped; COVERAGE="--only ^timm" for a part, "--retry" for what was wrong once more, "--jobs 2" on two cores.
COVERAGE ?=
coverage: build $(COVERAGE_VENV)/requirements
	$(COVERAGE_VENV)/bin/python benchmarks/coverage.py --resume $(COVERAGE)

$(COVERAGE_VENV)/requirements: benchmarks/coverage-requirements.txt $(VENV)/requirements
	$(call beside,--no-deps)

# The recipes of docs/recipes.md, with the frameworks that they are for: two minutes.
recipes: build $(RECIPES_VENV)/requirements
	$(RECIPES_VENV)/bin/python -m pytest tests/recipes

$(RECIPES_VENV)/requirements: tests/recipes/requirements.txt benchmarks/coverage-requirements.txt $(VENV)/requirements
	$(call beside,--no-deps)

# The site, in build/docs. A warning is an error.
docs: build $(DOCS_VENV)/requirements
	$(DOCS_VENV)/bin/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky docs build/docs
	@echo build/docs/index.html

$(DOCS_VENV)/requirements: docs/requirements.txt $(VENV)/requirements
	$(call beside)

# 10,000 random calls, other ones each time; a failure prints how to repeat it. FUZZ_EXAMPLES=100000 for a night, with
# -j2 on two cores.
FUZZ_EXAMPLES ?= 10000
fuzz: fuzz-DEFAULT fuzz-AVX2

# With oneDNN's kernels for one instruction set; half of the examples. The last one is written down before it is run.
fuzz-%: build
	mkdir -p build
	OMP_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=$* FUZZ_LAST=build/fuzz-$*.txt FUZZ_EXAMPLES=$$(($(FUZZ_EXAMPLES) / 2)) \
	  $(BIN)/pytest -p no:cacheprovider tests/operator/test_fuzz.py \
	  tests/operator/test_fuzz_errors.py --hypothesis-show-statistics

leak: build
	$(BIN)/python tests/operator/leak.py

# The suite on a build with AddressSanitizer and UBSan, in a folder of its own; what tests compile with g++ (the CUDA kernels'
# shim) has both too. Left out is what starts a compiler under the sanitizer's preload (TorchInductor, CMake), what measures memory,
# which the sanitizer's allocator holds back, and what does not run the operators: the build's facts, the reference. The
# examples are left out, too.
SANITIZED := build/sanitize/lib
SANITIZER_PRELOAD = $(shell g++ -print-file-name=libasan.so):$(shell g++ -print-file-name=libubsan.so)
NOT_SANITIZED := deploy/test_mnist deploy/test_train_folder deploy/test_quickstart deploy/test_package operator/test_reference operator/test_memory \
  operator/test_memory_contract deploy/test_compile deploy/test_export deploy/test_cpp_example gpu/test_gpu_script
sanitize: $(SANITIZED)/built
	LD_PRELOAD=$(SANITIZER_PRELOAD) PYTHONPATH=$(SANITIZED) OMP_NUM_THREADS=2 \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  $(BIN)/pytest -p no:cacheprovider $(NOT_SANITIZED:%=--ignore=tests/%.py) \
	  -k "not memory_does_not_grow and not bytes_of_a_fused_network and not inductor"

$(SANITIZED)/built: $(VENV)/requirements $(SOURCES) $(wildcard fusedconvbn/*.py fusedconvbn/*/*.py)
	PATH=$(CURDIR)/$(BIN):$$PATH FUSEDCONVBN_SANITIZE=1 $(BIN)/python setup.py --quiet build \
	  --build-base build/sanitize --build-lib $(SANITIZED)
	touch $@

lint: $(VENV)/requirements
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

format: $(VENV)/requirements
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

# Compiles the CUDA sources for sm_80, sm_90 and sm_100 wherever nvcc is found, with or without a GPU.
check-cuda: $(VENV)/requirements
	$(BIN)/python tests/kernels/build_cuda.py check

build: $(VENV)/built

$(VENV)/requirements: requirements-dev.txt Makefile
	$(call environment,2.13.0)

$(VENV)/built: $(VENV)/requirements $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# The whole suite on a CUDA build of torch, in an environment and a build folder of its own. Runs what needs a GPU where
# there is one.
test-cuda: says-what-it-needs $(CUDA_VENV)/built
	$(CUDA_VENV)/bin/pytest

says-what-it-needs:
	@echo 'test-cuda (half an hour) and bench-cuda (hours, on a GPU) need nvcc, and a network to install 5 GB from.'
	@echo 'With a GPU for ten minutes and no network: bash tests/gpu/run.sh OUT'

$(CUDA_VENV)/requirements: requirements-dev.txt Makefile
	$(call environment,2.11.0)

$(CUDA_VENV)/built: $(CUDA_VENV)/requirements $(SOURCES) $(wildcard fusedconvbn/*.py fusedconvbn/*/*.py)
	$(CUDA_VENV)/bin/python tests/kernels/build_cuda.py install
	touch $@

# The whole suite with another torch, in an environment and a build folder of its own, without CUDA kernels. pip chooses the build
# of torch as it is set up to; with a CUDA build there are 5 GB to install.
test-torch: $(TORCH_VENV)/built
	$(TORCH_VENV)/bin/pytest

$(TORCH_VENV)/requirements: requirements-dev.txt Makefile
	$(call environment,$(TORCH))

$(TORCH_VENV)/built: $(TORCH_VENV)/requirements $(SOURCES) $(wildcard fusedconvbn/*.py fusedconvbn/*/*.py)
	FORCE_CUDA=0 $(TORCH_VENV)/bin/python tests/kernels/build_cuda.py install
	touch $@

# What tests/gpu/run.sh takes along to a machine with a GPU and no network (CONTRIBUTING.md).
gpu-bundle: build/gpu/_C.py
	git describe --always --dirty > build/gpu/commit

build/gpu/_C.py: $(CUDA_VENV)/requirements $(SOURCES) tests/kernels/build_cuda.py $(wildcard tests/kernels/cuda_shim/*)
	$(CUDA_VENV)/bin/python tests/kernels/build_cuda.py bundle build/gpu

RELEASE_VENV := .venv-release
WHEEL_TORCHES ?= 2.11.0 2.12.1 2.13.0 2.14.1
.PHONY: sdist wheels

# dist/fusedconvbn-VERSION.tar.gz, without torch. A copy of what git knows: nothing else that lies in this folder gets into it.
sdist: $(RELEASE_VENV)/requirements
	rm -rf build/sdist dist/*.tar.gz && mkdir -p build/sdist
	git ls-files -z | xargs -0 cp --parents -t build/sdist
	$(RELEASE_VENV)/bin/python -m build --sdist --outdir dist build/sdist
	$(RELEASE_VENV)/bin/twine check --strict dist/*.tar.gz

$(RELEASE_VENV)/requirements: Makefile
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet build==1.6.1 twine==7.0.0
	touch $@

# A wheel of the sdist for each torch, for the Python that is $(PYTHON), without CUDA kernels unless FORCE_CUDA=1. Each is built
# and tried in a new environment that holds torch alone.
wheels: $(WHEEL_TORCHES:%=wheel-%)

wheel-%: export FUSEDCONVBN_LABEL := 1
wheel-%: export FORCE_CUDA ?= 0
wheel-%: sdist
	rm -rf build/$@
	$(PYTHON) -m venv build/$@
	build/$@/bin/pip install --quiet torch==$*
	build/$@/bin/pip wheel --quiet --no-cache-dir --no-deps --wheel-dir build/$@ dist/*.tar.gz
	build/$@/bin/pip install --quiet build/$@/*.whl
	build/$@/bin/python tests/deploy/smoke.py $*
	mv build/$@/*.whl dist
	rm -rf build/$@

clean:
	rm -rf build dist $(VENV) .venv-* fusedconvbn/*.so *.egg-info
