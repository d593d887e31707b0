# Two commands matter: `make demo` and `make test`. Both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

NATIVE := qjax/kernels/native/src
CHECK := build/check

.PHONY: setup demo test lint interop slow sanitize arm old-cpu bench train clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard $(NATIVE)/*)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "qjax needs Python 3.11 or newer: make PYTHON=python3.12 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/qjax demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

interop: setup
	$(BIN)/python -m pytest -m interop $(ARGS)

slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

# The C++ core by itself, with cases of its own (tests/kernels/check.cc): memory, and what C++ leaves undefined.
sanitize: $(CHECK)/sanitize/check $(CHECK)/cases
	$^

# On an emulated ARM CPU that has every instruction the core knows.
ARM := aarch64-linux-gnu
arm: $(CHECK)/arm/check $(CHECK)/cases
	$(call needs,qemu-aarch64-static,qemu-user-static)
	qemu-aarch64-static -cpu max -L /usr/$(ARM) $^

# On an emulated CPU without AVX: the library must load there too.
old-cpu: $(CHECK)/plain/check $(CHECK)/cases
	$(call needs,qemu-x86_64-static,qemu-user-static)
	qemu-x86_64-static -cpu Nehalem $^

# $(call needs,program,Debian package)
needs = @command -v $(1) > /dev/null || { echo '$(1) is missing; on Debian: apt install $(2)'; exit 1; }

$(CHECK)/cases: tests/kernels/native_cases.py | setup
	mkdir -p $(@D)
	$(BIN)/python $< $@

# $(call check,folder,compiler,options,Debian package)
define check
$(CHECK)/$(1)/%.o: %.cc $(wildcard $(NATIVE)/*.h $(NATIVE)/*.inc)
	$$(call needs,$(2),$(4))
	@mkdir -p $$(@D)
	$(2) -std=c++17 -fno-math-errno -pthread -w -Wno-psabi $(3) -I$(NATIVE) -c $$< -o $$@
$(CHECK)/$(1)/check: $(patsubst %.cc,$(CHECK)/$(1)/%.o,check.cc $(notdir $(filter-out %/handler.cc,$(wildcard $(NATIVE)/*.cc))))
	$(2) -pthread $(3) $$^ -o $$@
endef
vpath %.cc $(NATIVE) tests/kernels
$(eval $(call check,plain,$(CXX),-O3,g++))
# -O0: with more the compilers take many minutes over it.
$(eval $(call check,sanitize,$(CXX),-O0 -g1 -fsanitize=address -fsanitize=undefined -fno-sanitize-recover=all,g++))
$(eval $(call check,arm,$(ARM)-g++,-O3,g++-$(ARM)))

bench: setup
	$(BIN)/python benchmarks/run.py

train: setup
	$(BIN)/qjax run configs/embedded.yaml

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
