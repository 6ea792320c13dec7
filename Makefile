# Makefile - builds the library, the program, the tests. GNU make; nothing is probed.
#
#   make demo      everything for a first look: packages, build, model, a prompt
#   make test      all tests            make help      all targets and variables
#
# Everything that is built lies below $(B). Set CC, CFLAGS, CPPFLAGS, LDFLAGS as you like: what the
# sources need is added to them. Objects are rebuilt when the flags change.

PREFIX ?= /usr/local
DESTDIR ?=
CFLAGS ?= -O2 -g
PKG_CONFIG_DIR ?= $(PREFIX)/lib/pkgconfig

# Variants. SAN=asan (address and undefined behaviour), ubsan, tsan. CORE=dist: the two-file form.
# MOE_NO_TEXT=1: no tokenizers, and none of their libraries. MOE_NO_ZSTD=1: no compressed weights.
SAN ?=
CORE ?=
MOE_NO_TEXT ?=
MOE_NO_ZSTD ?=
B ?= build$(SAN:%=/%)$(CORE:%=/%)$(if $(MOE_NO_TEXT),/notext)$(if $(MOE_NO_ZSTD),/nozstd)

VERSION := $(shell sed -n 's/^\#define MOE_VERSION_[MP][A-Z]* \([0-9]*\)$$/\1/p' moe.h | \
	paste -sd. -)
SOVERSION := $(firstword $(subst ., ,$(VERSION)))

# ---------------------------------------------------------------------------------- flags --

SAN_asan := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
	-DMOE_DEBUG
SAN_ubsan := -fsanitize=undefined -fno-sanitize-recover=all -DMOE_DEBUG
SAN_tsan := -fsanitize=thread -DMOE_DEBUG
ifneq ($(SAN),)
ifeq ($(SAN_$(SAN)),)
$(error SAN=$(SAN): expected asan, ubsan or tsan)
endif
endif

WARN := -Wall -Wextra -Wshadow
BUILD_CFLAGS = -std=c11 $(WARN) $(SAN_$(SAN)) $(if $(MOE_NO_TEXT),-DMOE_NO_TEXT) \
	$(if $(MOE_NO_ZSTD),-DMOE_NO_ZSTD) $(CPPFLAGS) $(CFLAGS)
TEXT_LIBS := -lutf8proc
LIBS = $(if $(MOE_NO_TEXT),,$(TEXT_LIBS)) $(if $(MOE_NO_ZSTD),,-lzstd) -lm -pthread
TEST_LIBS = $(if $(MOE_NO_TEXT),,-lzstd)

ifeq ($(CORE),dist)
CORE_SOURCE := dist/moe.c
TEST_CORE := -DMOE_TEST_CORE='"../dist/moe.c"'
else ifeq ($(CORE),)
CORE_SOURCE := moe.c
else
$(error CORE=$(CORE): expected dist, or nothing)
endif

# -------------------------------------------------------------------------------- targets --

PROGRAM := $(B)/moe
# The converter needs the tokenizers and zstd; it includes the library's sources.
CONVERTER := $(if $(MOE_NO_TEXT)$(MOE_NO_ZSTD),,$(B)/moe-convert)
STATIC_LIB := $(B)/libmoe.a
SHARED_LIB := $(B)/libmoe.so
# Tests and benches whose names contain a word of T (all, if T is empty).
T ?=
pick = $(if $(T),$(foreach t,$(T),$(foreach f,$(1),$(if $(findstring $(t),$(f)),$(f)))),$(1))
TESTS := $(sort $(patsubst tests/%.c,$(B)/tests/%,$(call pick,$(wildcard tests/test_*.c))))
# test_x86_emulated needs a library that nothing else needs: it is built if T names it.
TESTS := $(if $(findstring emulated,$(T)),$(TESTS),$(filter-out %/test_x86_emulated,$(TESTS)))
# To compile the library once instead of once per test, several tests are one program (tests/all.c).
JOINED := $(filter-out %/test_x86_emulated,$(TESTS))
JOINED := $(if $(word 2,$(JOINED)),$(JOINED))
JOINED_SOURCES := $(JOINED:$(B)/%=%.c)
TEST_SCRIPTS := $(call pick,$(wildcard tests/test_*.sh))
BENCHES := $(patsubst bench/%.c,$(B)/bench/%,$(wildcard bench/*.c))
CLI_OBJECTS := $(patsubst %.c,$(B)/%.o,$(wildcard cli/*.c))

.PHONY: all lib demo models test tests bench bench-report bench-format fuzz dist install uninstall clean help
.DELETE_ON_ERROR:
all: $(PROGRAM) $(CONVERTER) lib
lib: $(STATIC_LIB) $(SHARED_LIB)

# The flags, and the tests that are joined, so that a change rebuilds. A file is touched only if it
# differs.
$(shell mkdir -p $(B)/cli $(B)/tests $(B)/bench)
keep = $(file >$1.new,$2)$(shell cmp -s $1.new $1 && rm $1.new || mv $1.new $1)
$(call keep,$(B)/flags,$(CC) $(BUILD_CFLAGS) $(LDFLAGS) $(LIBS))
$(call keep,$(B)/tests/list,$(JOINED))

$(B)/moe.o: $(CORE_SOURCE) $(B)/flags
	$(CC) $(BUILD_CFLAGS) -fPIC -fvisibility=hidden -MMD -MP -c $< -o $@

$(STATIC_LIB): $(B)/moe.o
	rm -f $@
	$(AR) rcs $@ $<

$(SHARED_LIB): $(B)/moe.o
	$(CC) $(BUILD_CFLAGS) $(LDFLAGS) -shared -Wl,-soname,libmoe.so.$(SOVERSION) $< $(LIBS) \
		-o $@.$(VERSION)
	ln -sf libmoe.so.$(VERSION) $@.$(SOVERSION)
	ln -sf libmoe.so.$(VERSION) $@

$(B)/cli/%.o: cli/%.c $(B)/flags
	$(CC) $(BUILD_CFLAGS) -MMD -MP -c $< -o $@

$(PROGRAM): $(CLI_OBJECTS) $(STATIC_LIB)
	$(CC) $(BUILD_CFLAGS) $(LDFLAGS) $(CLI_OBJECTS) $(STATIC_LIB) $(LIBS) -o $@

$(B)/moe-convert: convert/main.c $(B)/flags
	$(CC) $(BUILD_CFLAGS) -MMD -MP -MF $@.d $< $(LDFLAGS) $(LIBS) -o $@

# A test or bench is one file that includes the whole library, internals and all.
$(JOINED): $(B)/tests/all
	ln -sf $(<F) $@

$(B)/tests/all: tests/all.c $(JOINED_SOURCES) $(B)/flags $(B)/tests/list \
		| $(if $(CORE),$(CORE_SOURCE))
	$(CC) $(BUILD_CFLAGS) $(TEST_CORE) -MMD -MP -MF $@.d $(JOINED_SOURCES:%=-include %) \
		-DTEST_PROGRAMS='$(JOINED:$(B)/tests/test_%=TEST(%))' $< $(LDFLAGS) $(LIBS) $(TEST_LIBS) -o $@

$(B)/tests/%: tests/%.c $(B)/flags | $(if $(CORE),$(CORE_SOURCE))
	rm -f $@
	$(CC) $(BUILD_CFLAGS) $(TEST_CORE) -MMD -MP -MF $@.d $< $(LDFLAGS) $(LIBS) $(TEST_LIBS) -o $@

$(B)/bench/%: bench/%.c $(B)/flags
	$(CC) $(BUILD_CFLAGS) -MMD -MP -MF $@.d $< $(LDFLAGS) $(LIBS) $(TEST_LIBS) -o $@

-include $(B)/moe.d $(B)/moe-convert.d $(CLI_OBJECTS:.o=.d) $(addsuffix .d,$(B)/tests/all \
	$(TESTS) $(BENCHES))

# ----------------------------------------------------------------------------------- runs --

# Where `make models` and `make demo` keep the models. The variables are read by the scripts.
MODELS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/moe/models
# In front of each test program, such as "qemu-aarch64 -L /usr/aarch64-linux-gnu".
RUN ?=

tests: $(TESTS) $(if $(TEST_SCRIPTS),$(PROGRAM) lib)
# A missing package is said before the compiler says it, unless the target is another machine.
test:
	@$(if $(MOE_NO_TEXT)$(RUN),,CC="$(CC)" cli/deps.sh check)
	@$(MAKE) --no-print-directory tests
	@MOE="$(abspath $(PROGRAM))" MOE_BUILD="$(abspath $(B))" MOE_MODELS="$(MODELS)" RUN="$(RUN)" \
		tests/run.sh $(TESTS) $(TEST_SCRIPTS)

# The build is the script's second step: it first sees to the packages that the build needs.
demo:
	@MAKE="$(MAKE)" CC="$(CC)" MOE="$(PROGRAM)" MOE_MODELS="$(MODELS)" cli/demo.sh

models:
	@MOE_MODELS="$(MODELS)" cli/fetch.sh smollm2 gemma3

# Fuzzers, for libFuzzer: build/fuzz/NAME [options] FOLDER... Needs clang. They are after what reads
# files; the kernels for vectors, which have tests of their own, take a quarter of an hour to build.
FUZZERS := $(patsubst tests/fuzz_%.c,build/fuzz/%,$(wildcard tests/fuzz_*.c))
fuzz: $(FUZZERS)
build/fuzz/%: tests/fuzz_%.c
	@mkdir -p build/fuzz
	clang $(BUILD_CFLAGS) -O1 -DMOE_FUZZ -DMOE_DEBUG -DMOE_NO_SIMD \
		-fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
		-MMD -MP -MF $@.d $< $(LDFLAGS) $(LIBS) $(TEST_LIBS) -o $@
-include $(addsuffix .d,$(FUZZERS))

bench: $(BENCHES)
	@for b in $(BENCHES); do echo "== $$b"; $$b || exit 1; done

# Sizes, errors, divergences and loading times of .moe files, into docs/format.md.
bench-format: $(PROGRAM) $(CONVERTER) $(B)/bench/loading $(B)/bench/neutral
	@MOE_BUILD="$(B)" MOE_MODELS="$(MODELS)" bench/format.sh

# How throughput scales, for docs/performance.md. REPORT: options of bench/report.sh.
MODELS_DIR ?= $(MODELS)
REPORT ?=
bench-report: $(PROGRAM) $(B)/bench/roofline
	MOE="$(PROGRAM)" ROOFLINE="$(B)/bench/roofline" bench/report.sh $(REPORT) \
		$(wildcard $(MODELS_DIR)/*.gguf $(MODELS_DIR)/*.moe)

# ------------------------------------------------------------------- distribution, install --

dist: dist/moe.c dist/moe.h
CORE_PARTS := moe.c moe.h $(wildcard $(foreach d,core quant backends,$d/*.[ch] $d/*.def))
dist/moe.c: $(CORE_PARTS) core/amalgamate.awk | dist/moe.h
	@mkdir -p dist
	awk -f core/amalgamate.awk moe.c >$@
dist/moe.h: moe.h
	@mkdir -p dist
	cp moe.h $@

install: all
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/lib \
		$(DESTDIR)$(PKG_CONFIG_DIR)
	install -m 755 $(PROGRAM) $(CONVERTER) $(DESTDIR)$(PREFIX)/bin
	install -m 644 moe.h $(DESTDIR)$(PREFIX)/include/moe.h
	install -m 644 $(STATIC_LIB) $(DESTDIR)$(PREFIX)/lib/libmoe.a
	install -m 755 $(SHARED_LIB).$(VERSION) $(DESTDIR)$(PREFIX)/lib/
	ln -sf libmoe.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib/libmoe.so.$(SOVERSION)
	ln -sf libmoe.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib/libmoe.so
	printf '%s\n' 'prefix=$(PREFIX)' 'Name: moe' \
		'Description: Inference for quantized MoE language models' 'Version: $(VERSION)' \
		'Cflags: -I$${prefix}/include' 'Libs: -L$${prefix}/lib -lmoe' \
		'Libs.private: $(LIBS)' >$(DESTDIR)$(PKG_CONFIG_DIR)/moe.pc

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/moe $(DESTDIR)$(PREFIX)/bin/moe-convert \
		$(DESTDIR)$(PREFIX)/include/moe.h \
		$(DESTDIR)$(PREFIX)/lib/libmoe.a $(DESTDIR)$(PREFIX)/lib/libmoe.so* \
		$(DESTDIR)$(PKG_CONFIG_DIR)/moe.pc

clean:
	rm -rf build dist

help:
	@echo 'make             build/moe, build/moe-convert, build/libmoe.a, build/libmoe.so'
	@echo 'make demo        install what is missing, build, fetch a 98 MB model, run it'
	@echo 'make test        all tests; T="kernels gguf" for those whose names contain a word'
	@echo 'make test SAN=asan | ubsan | tsan    the same under a sanitizer'
	@echo 'make test CORE=dist                  the same on the two-file form'
	@echo 'make models      both models that the tests use; kept in $(MODELS)'
	@echo 'make bench       the benchmarks in bench/'
	@echo 'make bench-format    tables of sizes and errors into docs/format.md'
	@echo 'make bench-report MODELS_DIR=FOLDER    tables and a plot into docs/performance.md'
	@echo 'make fuzz        build/fuzz/*, fuzzers; needs clang'
	@echo 'make dist        dist/moe.c and dist/moe.h'
	@echo 'make install     PREFIX=$(PREFIX) DESTDIR=$(DESTDIR)'
	@echo 'make uninstall   removes what install put there'
	@echo 'make lib, tests  only the library; all tests, built but not run'
	@echo 'make clean       removes build/ and dist/'
	@echo 'MOE_NO_TEXT=1 leaves the tokenizers out, MOE_NO_ZSTD=1 compressed weights;'
	@echo 'CPPFLAGS=-DMOE_NO_SIMD leaves portable C. B=FOLDER: where it is built;'
	@echo 'RUN=COMMAND: in front of each test; REPORT=OPTIONS: for bench/report.sh.'
