# Each target does all the set-up that it needs, as root on Debian; see CONTRIBUTING.md.

MAKEFLAGS += --no-builtin-rules

VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/
ARM64_PACKAGES := qemu-system-arm mmdebstrap gcc-aarch64-linux-gnu libc6-dev-arm64-cross
# No path of the machine gets into the object, so it is the same wherever it is built.
# Of the folder's program: $(call BPF_COMPILE,FOLDER,PROGRAM,OBJECT)
BPF_COMPILE = cd src/libummunotify/$(1) && \
	zig=$$($(abspath $(RUN))/python -c 'import pathlib, ziglang; print(pathlib.Path(ziglang.__file__).parent)') && \
	ZIG_GLOBAL_CACHE_DIR=$$(mktemp -d $(abspath $(VENV))/zig.XXXXXX) $$zig/zig cc -target bpfel-freestanding -mcpu=v3 -O2 -g \
	-fno-stack-protector -Wall -Wextra -Wno-unused-parameter -I.. -idirafter /usr/include \
	-fdebug-compilation-dir=. -ffile-prefix-map=$$zig=zig -c $(2).bpf.c -o $(abspath $(3))

SOURCES := $(shell find src -type f -not -name '*.pyc') meson.build pyproject.toml

.PHONY: demo test selftest lint docs bpf check-bpf bench vmtest vmtest-arm64 vmtest-arm64-short vmtest-packages support wheels \
	wheels-arm64-test packages-test clean packages
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(RUN)ummunotify demo

# All tests, or those that TESTS names.
test: $(VENV)/installed $(if $(TESTS),,$(VENV)/engines)
	$(RUN)python -m pytest $(TESTS)

selftest: $(VENV)/installed
	$(RUN)ummunotify selftest

# Writes docs/benchmarks.md, or only the sections that SECTIONS names.
bench: $(VENV)/installed
	tools/debian-packages libucx-dev
	$(RUN)python -m benchmarks $(SECTIONS)

vmtest-packages: $(VENV)/installed
	tools/debian-packages qemu-system-x86 busybox-static kmod udev systemd e2fsprogs iproute2 ibverbs-providers python3-pyverbs openmpi-bin libopenmpi-dev

# The kernel tests on other kernels; see tests/vm/kernels.toml.
vmtest: vmtest-packages
	$(RUN)python tests/vm/run.py

# The same for arm64, by emulation; it takes hours.
vmtest-arm64: vmtest-packages
	tools/debian-packages $(ARM64_PACKAGES)
	UMMUNOTIFY_CHANGES=$${UMMUNOTIFY_CHANGES:-100000} $(RUN)python tests/vm/run.py --arch arm64 --jobs 1 --timeout 28800

# The part that each change has to pass: compiled for arm64, where warnings are errors, and a few tests with pages of 16 KiB.
vmtest-arm64-short: vmtest-packages
	tools/debian-packages $(ARM64_PACKAGES)
	UMMUNOTIFY_STEPS="selftest tests/test_watch.py" $(RUN)python tests/vm/run.py --only debian-6.12-arm64-16k

# Writes docs/support.md: what is seen on which kernel, and by others.
support: vmtest-packages
	tools/debian-packages libucx-dev libfabric-dev $(ARM64_PACKAGES)
	$(RUN)python -m benchmarks.support

lint: $(VENV)/installed
	$(RUN)ruff check
	$(RUN)ruff format --check
	$(RUN)mypy src tests benchmarks
	$(RUN)python -m mypy.stubtest $(subst /,.,$(patsubst src/%.pyi,%,$(wildcard src/ummunotify/*.pyi)))
	$(RUN)lint-imports

# The site, in build/site. Links between pages are checked; what they name outside is not.
docs: $(VENV)/installed
	tools/debian-packages mandoc
	rm -rf build/site
	$(RUN)python -m sphinx -q -W --keep-going -d build/site.doctrees docs build/site

# After release 13 Debian's UCX brings gigabytes of ROCm along: there the tests take PyPI's alone.
UCX := $(if $(filter 12 13,$(shell . /etc/os-release && echo $$VERSION_ID)),libucx-dev)

packages:
	tools/debian-packages gcc g++ pkgconf clang libclang-rt-dev make libc6-dev python3-dev python3-venv libbpf1 libbpf-dev \
		libfabric-bin libfabric-dev libibverbs-dev liburing2 $(UCX) systemd

$(VENV)/tools: pyproject.toml | packages
	$(PYTHON) -m venv $(VENV)
	$(PYTHON) tools/requirements.py dev | xargs -d '\n' $(RUN)pip install -q --disable-pip-version-check
	touch $@

$(VENV)/installed: $(VENV)/tools $(SOURCES)
	PATH="$(abspath $(RUN)):$$PATH" $(RUN)pip install -q --disable-pip-version-check --no-build-isolation --no-deps .
	touch $@

# Large wheels for one test. Without what they name: for NIXL that is PyTorch, which its API does not need.
$(VENV)/engines: $(VENV)/tools
	tools/debian-packages libcurl4 libibverbs1 libnuma1
	$(PYTHON) tools/requirements.py engines | xargs -d '\n' $(RUN)pip install -q --disable-pip-version-check --no-deps
	touch $@

# The committed object is what users load: they need no compiler for BPF.
bpf: $(VENV)/tools
	$(call BPF_COMPILE,bpf,watch,src/ummunotify/bpf/watch.bpf.o)
	$(call BPF_COMPILE,bpf,stacks,src/ummunotify/bpf/stacks.bpf.o)
	$(call BPF_COMPILE,daemon,peers,src/ummunotify/bpf/peers.bpf.o)

check-bpf: $(VENV)/tools
	$(call BPF_COMPILE,bpf,watch,$(VENV)/watch.bpf.o)
	$(call BPF_COMPILE,bpf,stacks,$(VENV)/stacks.bpf.o)
	$(call BPF_COMPILE,daemon,peers,$(VENV)/peers.bpf.o)
	cmp $(VENV)/watch.bpf.o src/ummunotify/bpf/watch.bpf.o
	cmp $(VENV)/stacks.bpf.o src/ummunotify/bpf/stacks.bpf.o
	cmp $(VENV)/peers.bpf.o src/ummunotify/bpf/peers.bpf.o

# What is committed, as dist/*.tar.gz, and wheels for each of PYTHONS: for this machine's architecture and arm64.
wheels:
	tools/debian-packages gcc libc6-dev python3-dev python3-venv git
	tools/wheels $(PYTHONS)

# Those for arm64, each by itself in an emulated guest.
wheels-arm64-test: vmtest-packages
	tools/debian-packages $(ARM64_PACKAGES)
	$(RUN)python tests/vm/wheels.py

# The Debian packages: built, installed, used, upgraded and purged in a minimal Debian 13.
packages-test:
	tools/fresh-machine -s trixie tools/test-packages

clean:
	rm -rf $(VENV) build dist
