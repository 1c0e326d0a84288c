"""xllamacpp's server, which has no way to stop, in a process of its own."""

import subprocess
import sys
from contextlib import contextmanager

CODE = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], *map(int, sys.argv[2:4])
params.endpoint_metrics = True
params.port, params.hostnames, params.ui, params.warmup, params.verbosity = 0, ["127.0.0.1"], False, False, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[4])
server = xllamacpp.Server(params)
print("address", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_server(path, context=1024, streams=2, threads=1):
    """The address of a server that has loaded a GGUF file; its texts share the context."""
    command = [sys.executable, "-c", CODE, str(path), *map(str, (context, streams, threads))]
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
