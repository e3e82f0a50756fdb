# make demo: the whole pipeline on a tiny task. make test: env system  ## unit, distributed, end-to-end and Slurm tests on CPU
	$(PY) -m pytest tests

# Slurm for tests/slurm and a browser for the report's test. Without root or apt those tests skip and say so.
system:
	@tools/install_system_packages.sh

demo: env  ## the whole pipeline on a tiny task, about ten minutes on two cores
	$(PY) tools/demo.py

demo-clean:  ## forget what the demo made
	rm -rf runs/demo
