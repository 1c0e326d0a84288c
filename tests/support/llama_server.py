"""xllamacpp's server, which has no way to stop, in a process of its own."""

import subprocess
import sys
from contextlib import contextmanager

CODE = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], int(sys.argv[2]), 2
params.endpoint_metrics = True
params.port, params.hostnames, params.ui, params.warmup, params.verbosity = 0, ["127.0.0.1"], False, False, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print("address", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_server(path, context=1024):
    """The address of a server that has loaded a GGUF file."""
    command = [sys.executable, "-c", CODE, str(path), str(context)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        line = next(line for line in process.stdout if line.startswith("address"))
        yield line.split()[1]
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
