"""
Benchmarks; their figures stand in the README. Not collected by pytest.

    python tests/bench.py tiny small                # a training step: the straightforward loop against this project, on the CPU
    python tests/bench.py llama3-8b llama3-70b      # the same on a GPU, random weights made there
    python tests/bench.py launch                    # from the command to the first step of a run on 15,000 rows
    python tests/bench.py merge                     # merging into a 4.4 GB checkpoint of 4 shards: time against a plain copy, memory

A step is retain and harmful rows forward and backward, clipping, AdamW and what the log reads, with the same weights, rows and seeds.
The straightforward loop is that of the published code: peft's LoRA, AutoModelForCausalLM with its logits, all hidden states stacked,
rows padded to the maximum. Each has the attention that it picks by itself. Times are medians in one process, the contestants taken in
turn after a warm-up. Memory is taken in a fresh process each: CUDA's own peak, or the resident set's peak less what it was after the
imports.
"""
import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import configurator


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


# name: blocks kept, target layers, rows of each set, maximum length, recompute blocks in the straightforward loop (as published), its config
SHAPES = {
    'tiny': (7, [3, 6], 8, 256, False, dict(hidden_size=256, intermediate_size=896, num_attention_heads=8, num_key_value_heads=2, vocab_size=512)),
    'small': (7, [3, 6], 8, 256, False, dict(hidden_size=256, intermediate_size=896, num_attention_heads=8, num_key_value_heads=2, vocab_size=32000)),
    'llama3-8b': (21, [10, 20], 16, 1024, True, dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
                                                     vocab_size=128256)),
    'llama3-70b': (51, [25, 50], 16, 1024, True, dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
                                                      vocab_size=128256))}
LORA = dict(r=16, alpha=16, dropout=0.05)
MODULES = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
WEIGHT = 5.0  # of both losses, as half way through a schedule


def make_config(shape, blocks):
    """A Llama of one of SHAPES with so many blocks."""
    from transformers import LlamaConfig
    return LlamaConfig(**SHAPES[shape][5], num_hidden_layers=blocks, max_position_embeddings=SHAPES[shape][3])


def make_rows(shape, median, spread):
    """
    A step's retain and harmful rows of random ids. Their lengths are the quantiles of a log-normal distribution with this median, as a
    share of the maximum, and this spread of the logarithm, cut at the maximum: the same for both sets, in an order drawn for each.
    """
    import cb_train
    _, _, count, longest, _, config = SHAPES[shape]
    draw, normal = random.Random(0), statistics.NormalDist(0, spread)
    lengths = [min(longest, round(longest * median * math.exp(normal.inv_cdf((i + 0.5) / count)))) for i in range(count)]
    ids = lambda n: [draw.randrange(config['vocab_size']) for _ in range(n)]
    return [[cb_train.Row(ids(n), [1] * n, '') for n in draw.sample(lengths, count)] for _ in range(2)]


def straightforward(shape, rows, device, dropout=LORA['dropout']):
    """The published code's step. Returns (step, the decoder, {name of a linear: (A, B)}); step(update) gives [retain loss, cb loss]."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    blocks, targets, _, longest, checkpointing, _ = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(make_config(shape, blocks), dtype=torch.bfloat16 if device != 'cpu' else torch.float32)
    whole = get_peft_model(model, LoraConfig(r=LORA['r'], lora_alpha=LORA['alpha'], lora_dropout=dropout, target_modules=MODULES, task_type='CAUSAL_LM'))
    if checkpointing:
        whole.enable_input_require_grads()
        whole.gradient_checkpointing_enable(dict(use_reentrant=False))
    parameters = [p for p in whole.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)

    def states(inputs):
        return whole(**inputs, output_hidden_states=True, use_cache=False).hidden_states  # blocks + 1 of (B, T, D)

    def step(update=True):
        retain, harmful = ({'input_ids': torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in batch], device=device),
                            'attention_mask': torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in batch], device=device)}
                           for batch in rows)
        retain_mask, harmful_mask = retain['attention_mask'].unsqueeze(-1), harmful['attention_mask']  # (B, T, 1), (B, T)
        whole.eval()
        with torch.no_grad(), whole.disable_adapter():
            retain_h = torch.stack(states(retain)) * retain_mask
            harmful_h = torch.stack([h for l, h in enumerate(states(harmful)) if l in targets])
        whole.train()
        retain_lora = torch.stack(states(retain)) * retain_mask
        retain_loss = torch.norm(retain_lora - retain_h, dim=-1, dtype=torch.float).sum() / (blocks * retain_mask.sum())
        harmful_lora = torch.stack([h for l, h in enumerate(states(harmful)) if l in targets])
        cosine = torch.cosine_similarity(harmful_lora.float(), harmful_h.float(), dim=-1) * harmful_mask
        cb_loss = cosine.relu().sum() / (len(targets) * harmful_mask.sum())
        (WEIGHT * retain_loss + WEIGHT * cb_loss).backward()
        if update:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return [retain_loss.item(), cb_loss.item()]
    loras = {name.rpartition('model.')[2]: (module.lora_A['default'].weight, module.lora_B['default'].weight)
             for name, module in whole.named_modules() if hasattr(module, 'lora_A')}
    return step, model.model, loras


def adopt(model, source):
    """Gives the weights and buffers of one decoder, peft's or not, to another of the same shape that is still on the meta device."""
    given = {name.replace('.base_layer', ''): tensor for name, tensor in (*source.named_parameters(), *source.named_buffers())}
    for name, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            own |= {leaf: given[f'{name}.{leaf}'] for leaf, tensor in own.items() if tensor is not None}


def ours(shape, rows, device, dropout=LORA['dropout'], source=None):
    """
    This project's step by its own functions, as straightforward gives it: the absolute distance, and every token counts. The weights
    are those of `source`, if given.
    """
    import torch
    from transformers import AutoModel

    import cb_train
    blocks, targets, count, longest, _, _ = SHAPES[shape]
    c = types.SimpleNamespace(**configurator.configure(cb_train.__file__, []), rank=0, world=1)
    c.device, c.target_layers, c.batch_size, c.retain_distance, c.lorra_alpha = device, targets, count, 'absolute', WEIGHT
    c.micro_batch_tokens, c.use_dynamic_scheduling = (512 if device == 'cpu' else 2048), False
    torch.manual_seed(0)
    with torch.device('meta' if source else device):
        dtype = 'float32' if device == 'cpu' else 'bfloat16'
        model = AutoModel.from_config(make_config(shape, blocks), dtype=dtype).eval()
    if source:
        adopt(model, source)
    loras = cb_train.add_lora(model, MODULES, range(blocks), LORA['r'], LORA['alpha'], dropout)
    parameters = [p for lora in loras.values() for p in (lora.lora_A, lora.lora_B)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    sets = dict(zip(('retain', 'harmful'), rows))
    streams = cb_train.make_streams(c, sets, sets, blocks, model.get_input_embeddings().weight)

    def step(update=True):
        losses = []
        for stream in streams:
            divisor = stream.divisor(stream.rows)
            batches, weight = cb_train.my_batches(stream.rows, c), stream.coefficient(0) / divisor
            losses.append(cb_train.run_stream(model, loras, stream, batches, c, weight)[0] / divisor)
        if update:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack(losses).tolist()
    passes = [batch for stream in streams for batch in cb_train.my_batches(stream.rows, c)]
    step.computed = sum(len(batch) * len(batch[0].ids) for batch in passes)
    return step, model, {name: (lora.lora_A, lora.lora_B) for name, lora in loras.items()}


CONTESTANTS = {'straightforward': straightforward, 'this project': ours}
MEMORY = '''
import torch, transformers
contestant, shape, device, rows = CONTESTANTS[sys.argv[1]], sys.argv[2], sys.argv[3], make_rows(sys.argv[2], *map(float, sys.argv[4:]))
if contestant is straightforward:
    import peft
import cb_train
before = memory('VmRSS')
step, _, _ = contestant(shape, rows, device)
for _ in range(3):
    step()
print(json.dumps(torch.cuda.max_memory_allocated() / 2**20 if device != 'cpu' else memory('VmHWM') - before))
'''


def farthest_gradient(shape, rows, device):
    """Both contestants with the same LoRA whose B is not zero, no dropout: the largest relative difference of their losses and of a gradient."""
    import torch
    step, theirs, loras = straightforward(shape, rows, device, 0.0)
    our_step, _, our_loras = ours(shape, rows, device, 0.0, theirs)
    draw = torch.Generator(device).manual_seed(1)
    for name, (a, b) in loras.items():
        torch.nn.init.normal_(b, std=0.05, generator=draw)
        for mine, other in zip(our_loras[name], (a, b)):
            mine.data.copy_(other)
    losses = max(abs(mine - other) / other for other, mine in zip(step(False), our_step(False)))
    return losses, max(((mine.grad - other.grad).norm() / other.grad.norm()).item() for name in loras for other, mine in zip(loras[name], our_loras[name]))


def ceiling():
    """What this GPU's matrix products reach in bfloat16, in FLOP a second: the best of some large ones."""
    import torch
    a, b = (torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        torch.cuda.synchronize()
        best = max(best, 10 * 2 * 8192 ** 3 / (time.perf_counter() - start))
    return best


def bench_step(shape, rounds, device, median, spread):
    """Prints the rows of the README's table for one shape, their ratios, and how far the two are apart."""
    import torch
    blocks, targets, count, longest, _, _ = SHAPES[shape]
    rows = make_rows(shape, median, spread)
    real = [sum(len(row.ids) for row in batch) for batch in rows]
    step, theirs, _ = straightforward(shape, rows, device)
    our_step, model, _ = ours(shape, rows, device, source=theirs)
    # a product with a block's weights is 2 FLOP a weight and token: reference, adapted, and the gradient of its input
    weights = sum(p.numel() for name, p in model.layers[0].named_parameters() if 'lora_' not in name and p.dim() == 2)
    flop = 3 * 2 * weights * (real[0] * blocks + real[1] * max(targets))
    steps, times = {'straightforward': step, 'this project': our_step}, {name: [] for name in CONTESTANTS}
    for i in range(rounds + 2):  # two rounds warm up
        for name, run in steps.items():
            start = time.perf_counter()
            run()  # ends with a read from the device
            times[name] += [time.perf_counter() - start] if i > 1 else []
    computed = {'straightforward': 2 * count * longest, 'this project': our_step.computed}
    top = ceiling() if device != 'cpu' else None
    del steps, step, our_step, theirs, model, run
    if top:
        torch.cuda.empty_cache()
    peak = {name: alone(MEMORY, name, shape, device, median, spread) for name in CONTESTANTS}
    seconds = {name: statistics.median(times[name]) for name in CONTESTANTS}
    for name in CONTESTANTS:
        share = f'{flop / seconds[name] / top:.0%} of {top / 1e12:.0f} TFLOP/s' if top else '-'
        print(f'| {shape} | {name} | {seconds[name]:.3f} | {sum(real) / seconds[name]:,.0f} | {sum(real) / computed[name]:.0%} | {peak[name]:,.0f} | {share} |')
    print(f'| {shape} | ratio | {seconds["straightforward"] / seconds["this project"]:.2f}x faster | | | '
          f'{peak["this project"] / peak["straightforward"]:.2f} of the memory | |')
    if device == 'cpu':
        losses, gradients = farthest_gradient(shape, rows, device)
        print(f'{shape}: losses agree to {losses:.0e}, gradients to {gradients:.0e} (relative, float32, from a non-zero B)')


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


def make_world(folder, harmful=5000, benign=10000):
    """A tiny Llama with a byte-level BPE of 8,000 pieces, as a real one's, and rows of random syllables. Returns cb_train.py's arguments."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    draw = random.Random(0)
    words = [''.join(draw.choices('ka lo mi ter an so ri pel du vor ne sta ing ble qu ome'.split(), k=draw.randint(1, 4))) for _ in range(8000)]
    text = lambda words_: ' '.join(draw.choices(words, k=words_))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = ['<bos>', '<start>', '<end>']
    core.train_from_iterator([text(2000) for _ in range(50)], trainers.BpeTrainer(vocab_size=8000, special_tokens=marks, show_progress=False,
                                                                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token='<bos>', eos_token='<end>', chat_template=(
        "{{ bos_token }}{% for m in messages %}{{ '<start>' + m.role + '\n\n' + m.content + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start>assistant\n\n' }}{% endif %}"))
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                                 num_key_value_heads=2)).save_pretrained(os.path.join(folder, 'base'))
    tokenizer.save_pretrained(os.path.join(folder, 'base'))
    length = lambda: max(5, int(draw.lognormvariate(5.2, 0.6)))  # words of an answer, of about 1.4 tokens
    rows = {'cb': [{'prompt': text(15), 'response': text(length())} for _ in range(harmful)],
            'retain': [{'messages': [{'role': role, 'content': text(length() // 2)} for role in ('user', 'assistant') * 2]} for _ in range(benign)]}
    for name, some in rows.items():
        with open(os.path.join(folder, f'{name}.json'), 'w') as f:
            json.dump(some, f)
    return [f'--model_name={folder}/base', f'--cb_data_path={folder}/cb.json', f'--retain_data_path={folder}/retain.json', f'--num_cb_examples={harmful}',
            f'--num_retain_examples={benign}', f'--output_dir={folder}/out', '--overwrite=True', '--device=cpu',
            '--target_layers=2', '--max_steps=1', '--max_seq_length=1024']


def bench_launch(rounds=3):
    """Prints how long it takes from the command to the first step's line, and how long the bare imports take."""
    def seconds(*command):
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, '-u', *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
            for line in run.stdout:
                if line.startswith('step'):
                    return time.perf_counter() - start  # the rest of the run, the merge, is awaited and not counted
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        arguments = make_world(folder)
        imports = [seconds('-c', 'import torch, transformers; from transformers import AutoModel, LlamaModel') for _ in range(rounds)]
        first = [seconds(os.path.join(ROOT, 'cb_train.py'), *arguments) for _ in range(rounds)]
    print(f'from the command to the first step, 15,000 rows, median of {rounds}: {statistics.median(first):.1f} s; of that importing torch '
          f'and transformers {statistics.median(imports):.1f} s')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('jobs', nargs='+', choices=[*SHAPES, 'launch', 'merge'])
    parser.add_argument('--rounds', type=int, default=7, help='steps of each contestant after two that warm up')
    parser.add_argument('--device', default='', help='cpu or cuda; default: cuda where it is, but for tiny and small')
    parser.add_argument('--median', type=float, default=0.37, help='of the row lengths, as a share of the maximum')
    parser.add_argument('--spread', type=float, default=0.4, help='standard deviation of the logarithm of a row length')
    options = parser.parse_args()
    for number, job in enumerate(options.jobs):
        if job in ('launch', 'merge'):
            {'launch': bench_launch, 'merge': bench_merge}[job]()
            continue
        if not number:
            print('| shape | loop | step s | real tokens/s | real tokens | peak MB | share of the ceiling |\n|---|---|---|---|---|---|---|')
        bench_step(job, options.rounds, options.device or ('cpu' if job in ('tiny', 'small') else 'cuda'), options.median, options.spread)
