"""
Benchmarks; their figures stand in the README. Not collected by pytest.

    python tests/bench.py merge     # merging into a 4.4 GB checkpoint of 4 shards: time against a plain copy, memory over the imports

Each contestant runs in a process of its own; memory is the resident set's peak less what it was after the imports.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def memory(field):
    """VmRSS (now) or VmHWM (peak) of this process in MB."""
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(field))


def alone(code, *arguments):
    """Runs code in a fresh interpreter that has imported this file, and returns the dict that it prints last."""
    done = subprocess.run([sys.executable, '-c', f'import sys; sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r}); from bench import *\n{code}',
                           *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def make_checkpoint(folder, blocks=10, width=4096, inner=14336, kv=1024, shards=4):
    """A checkpoint of Llama-3-8B's block shapes in bfloat16 (437 MB a block), random and never loaded by a model."""
    import torch
    from safetensors.torch import save_file
    os.makedirs(folder)
    shapes = {'self_attn.q_proj': (width, width), 'self_attn.k_proj': (kv, width), 'self_attn.v_proj': (kv, width), 'self_attn.o_proj': (width, width),
              'mlp.gate_proj': (inner, width), 'mlp.up_proj': (inner, width), 'mlp.down_proj': (width, inner)}
    names, weight_map = [f'model-{i + 1:05d}-of-{shards:05d}.safetensors' for i in range(shards)], {}
    for i, name in enumerate(names):
        tensors = {f'model.layers.{block}.{linear}.weight': torch.randn(shape, dtype=torch.bfloat16)
                   for block in range(i * blocks // shards, (i + 1) * blocks // shards) for linear, shape in shapes.items()}
        save_file(tensors, os.path.join(folder, name), metadata={'format': 'pt'})
        weight_map |= dict.fromkeys(tensors, name)
    with open(os.path.join(folder, 'model.safetensors.index.json'), 'w') as f:
        json.dump({'metadata': {}, 'weight_map': weight_map}, f)
    return {f'layers.{block}.{linear}': shapes[linear] for block in range(7) for linear in list(shapes)[:4]}


MERGE = '''
import torch, cb_train
torch.manual_seed(0)
linears = json.loads(sys.argv[3])
loras = {name: (torch.randn(out, 16), torch.randn(16, fan_in)) for name, (out, fan_in) in linears.items()}
before, start = memory('VmRSS'), time.time()
cb_train.merge(sys.argv[1], sys.argv[2], {name: lambda rows, b=b, a=a: b[rows] @ a for name, (b, a) in loras.items()})
print(json.dumps({'seconds': time.time() - start, 'MB': memory('VmHWM') - before}))
'''
COPY = '''
start = time.time()
os.makedirs(sys.argv[2])
for name in os.listdir(sys.argv[1]):
    shutil.copyfile(os.path.join(sys.argv[1], name), os.path.join(sys.argv[2], name))
print(json.dumps({'seconds': time.time() - start}))
'''


def bench_merge(rounds=3):
    with tempfile.TemporaryDirectory(dir='.') as folder:
        source, target = os.path.join(folder, 'base'), os.path.join(folder, 'out')
        linears = json.dumps(make_checkpoint(source))
        size = sum(os.path.getsize(os.path.join(source, name)) for name in os.listdir(source))
        times, peaks = {'copy': [], 'merge': []}, []
        for i in range(rounds + 1):  # the first round warms the disk's cache
            for name, code in (('copy', COPY), ('merge', MERGE)):
                os.sync()
                found = alone(code, source, target, linears)
                shutil.rmtree(target)
                if i:
                    times[name].append(found['seconds'])
                    peaks += [found['MB']] if 'MB' in found else []
        copy, merge = (statistics.median(times[name]) for name in ('copy', 'merge'))
        print(f'{size / 1e9:.2f} GB in 4 shards, median of {rounds}: copy {copy:.2f} s, merge {merge:.2f} s ({merge / copy:.2f}x), '
              f'memory over the imports {max(peaks):.0f} MB')


if __name__ == '__main__':
    if sys.argv[1:] != ['merge']:
        sys.exit(__doc__)
    bench_merge()
