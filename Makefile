# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv when it is not there.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
EXTRAS = train,eval,quantization,lora,s3,ray,dev,docs

.PHONY: demo test test-slow test-kernels fuzz lint typecheck docs bench clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/kd demo --out demo-out

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 -m slow

# Triton comes with torch for CUDA. Without a GPU its interpreter runs the kernels of student_trainer/faster, and its compiler makes
# machine code of them.
test-kernels: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[triton]'
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "slow or not slow" \
	  tests/student_trainer/faster/test_triton_kernels.py

FUZZ_SECONDS ?= 900
FUZZ_TARGETS = manifest commit shard table task recipe experiment pool config rows talk template
fuzz: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt atheris
	for target in $(FUZZ_TARGETS); do mkdir -p fuzz/$$target; done
	for v in v1 v2; do cp tests/golden/$$v/manifest.json fuzz/manifest/$$v; cp tests/golden/$$v/commits/00000.json fuzz/commit/$$v; \
	  cp tests/golden/$$v/targets.zarr/logprobs/c/0/0 fuzz/shard/$$v; cp tests/golden/$$v/examples/00000.parquet fuzz/table/$$v; done
	cp data/instruction_tasks/instructions/*.yaml fuzz/task; cp recipes/*.yaml fuzz/recipe; cp recipes/experiments/*.yaml fuzz/experiment
	printf 'base: a\nmodels: {cola: {path: x, revision: y}}\n' > fuzz/pool/one; printf 'models:\n- {name: a, path: b}\n' > fuzz/pool/two
	printf 'cache: c\nstudent: demo\nout: o\nlr: 5e-4\nobjective: {loss: kl}\n' > fuzz/config/one
	printf '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}], "tools": []}\n' > fuzz/rows/one
	printf '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"}\n' > fuzz/rows/two
	printf '{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}' > fuzz/talk/one
	printf "{%% for m in messages %%}{%% if '</think>' in m.content %%}{{ m.content.split('</think>')[0] }}{%% endif %%}{%% endfor %%}" \
	  > fuzz/template/one
	for target in $(FUZZ_TARGETS); do \
	  $(BIN)/python tests/fuzz_cache.py $$target fuzz/$$target -max_total_time=$(FUZZ_SECONDS) -max_len=20000 -artifact_prefix=fuzz/found-$$target- || exit 1; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Tests need no annotations, and a None that cannot be is found when they run.
LOOSER = --allow-untyped-defs --allow-incomplete-defs --allow-untyped-calls --allow-any-generics --no-warn-return-any \
  --no-warn-unused-ignores --no-strict-equality --disable-error-code union-attr --disable-error-code operator \
  --disable-error-code index --disable-error-code var-annotated --disable-error-code func-returns-value
typecheck: $(STAMP)
	$(BIN)/mypy
	$(BIN)/mypy --cache-dir .mypy_cache/tests $(LOOSER) tests

docs: $(STAMP)
	$(BIN)/python scripts/write_cli_docs.py
	$(BIN)/python scripts/write_api_docs.py
	$(BIN)/python scripts/write_architecture.py
	$(BIN)/python scripts/build_site.py site

bench: $(STAMP)
	$(BIN)/python benchmarks/bench.py

clean:
	rm -rf $(VENV) fuzz demo-out site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
