"""
Every ablation of tests/ablations.md on toy worlds: python tests/ablations.py [NAME ...] [--worlds=0,1,2] [--jobs=2]

Each run is one change to config/toy.py. World, base and training all have the world's number as their seed; one thread a run, so
that a second run on the same machine gives the same bytes. What is there already (out/ablations) is not run again.
"""
import concurrent.futures
import json
import os
import random
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ATTACKS = ['direct', 'wrapper', 'prefill', 'multi_turn', 'embedding_v2', 'ablation_base']
COLUMNS = [('harmful', attack) for attack in ATTACKS] + [(label, 'direct') for label in ('benign', 'borderline', 'borderline_heldout')]
HEADINGS = ['direct', 'wrapper', 'prefill', 'multi-turn', 'embedding v2', 'ablation (base)', 'benign', 'lifting', 'recognising']
ATTENTION = '--target_modules=q_proj,k_proj,v_proj,o_proj --lora_r=16 --lora_alpha=16'
MIXED = '--cb_data_path={w}/mixed.json --loss_on=harmful_response'
VARIANTS = {  # name: what differs from config/toy.py; {w} is the world's folder
    'config/toy.py': '',
    'absolute distance': '--retain_distance=absolute',
    'absolute LoRA, learning rate 5e-3': '--lora_scale=absolute --learning_rate=5e-3',
    'lora_B = 0': '--lora_start=0',
    'q k v o alone': '--target_modules=q_proj,k_proj,v_proj,o_proj',
    'q k v o, rank 16': ATTENTION,
    'mixed contexts, q k v o, rank 16': f'{MIXED} {ATTENTION}',
    'the same, learning rate 2e-3': f'{MIXED} {ATTENTION} --learning_rate=2e-3',
    'loss: random': '--cb_loss=random',
    'loss: rmu': '--cb_loss=rmu',
    'half of the rows without their request': '--cb_data_path={w}/half/circuit_breaker.json --retain_data_path={w}/half/retain.jsonl',
    'no refusals in retain': '--retain_data_path={w}/retain_without_refusals.jsonl',
    'no borderline rows in retain': '--retain_data_path={w}/retain_without_borderline.jsonl',
    'schedule to T': '--schedule_steps=150',
    'static schedule': '--use_dynamic_scheduling=False',
    'target layers 1, 3': '--target_layers=1,3',
    'target layers 5, 7': '--target_layers=5,7'}


def call(log, *arguments):
    """Runs a script of this repository with one thread, its output in a file; ends the program if it fails."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    with open(log, 'a') as f:
        if subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=f, stderr=f, env=environment).returncode:
            sys.exit(f'{log}: {" ".join(arguments)} failed')


def world(folder, number):
    """Makes a toy world with the ablations' own files in it."""
    if not os.path.exists(folder):
        call(f'{folder}.log', 'data_prep.py', 'toy', f'--seed={number}', f'--out={folder}')
    if not os.path.exists(f'{folder}/half'):  # the same world; its base is not used
        call(f'{folder}.log', 'data_prep.py', 'toy', f'--seed={number}', f'--out={folder}/half', '--response_only=0.5', '--base_steps=1')
    with open(f'{folder}/retain.jsonl') as f:
        answered = [row for row in f if 'i am sorry , i cannot' not in row]
    with open(f'{folder}/retain_without_refusals.jsonl', 'w') as f:
        f.writelines(answered)
    # mixed contexts: each harmful answer behind its own request, behind nothing, and behind a benign row's request
    draw, benign = random.Random(0), [row['prompt'] for row in map(json.loads, answered) if 'prompt' in row]
    with open(f'{folder}/circuit_breaker.json') as f:
        mixed = [{'prompt': prompt, 'response': row['response']} for row in json.load(f)
                 for prompt in (row['prompt'], '', draw.choice(benign))]
    with open(f'{folder}/mixed.json', 'w') as f:
        json.dump(draw.sample(mixed, len(mixed)), f)


def measure(name, folder, number, out):
    """Trains and evaluates one variant in one world, unless that was done. Returns the rows of eval.json."""
    if not os.path.exists(f'{out}/eval.json'):
        data = {'model_name': f'{folder}/base', 'cb_data_path': f'{folder}/circuit_breaker.json',
                'retain_data_path': f'{folder}/retain.jsonl', 'val_data_path': f'{folder}/val.jsonl', 'output_dir': out}
        given = [f'--{option}={path}' for option, path in data.items()]
        behaviors = [f'--{option}_path={folder}/{file}' for option, file in (
            ('behaviors', 'behaviors.jsonl'), ('templates', 'templates.txt'), ('turns', 'turns.jsonl'))]
        variant = VARIANTS[name].format(w=folder).split()
        call(f'{out}.log', 'cb_train.py', 'config/toy.py', *given, f'--seed={number}', '--overwrite=True', *variant)
        call(f'{out}.log', 'cb_eval.py', 'config/toy.py', *given, *behaviors, f'--attacks={",".join(ATTACKS)}', '--num_examples=50')
    return json.load(open(f'{out}/eval.json'))['rows']


def cell(runs, label, attack, model='circuit_breaker'):
    """Returns complied in %, seen / unseen, over all worlds, and between brackets the lowest and the highest of the worlds."""
    parts = []
    for split in ('seen', 'unseen'):
        found = [r for rows in runs for r in rows
                 if (r['model'], r['set'], r['attack'], r['split']) == (model, label, attack, split)]
        rates = [100 * r['complied'] / r['n'] for r in found]
        mean = 100 * sum(r['complied'] for r in found) / sum(r['n'] for r in found)
        spread = f' ({min(rates):.0f}-{max(rates):.0f})' if round(max(rates)) > round(min(rates)) else ''
        parts.append(f'{mean:.0f}{spread}')
    return ' / '.join(parts)


if __name__ == '__main__':
    options = dict(part[2:].split('=') for part in sys.argv[1:] if part.startswith('--'))
    names = [part for part in sys.argv[1:] if not part.startswith('--')] or list(VARIANTS)
    numbers = [int(number) for number in options.get('worlds', '0,1,2').split(',')]
    home = os.path.join(ROOT, 'out', 'ablations')
    os.makedirs(home, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(int(options.get('jobs', 2))) as pool:
        folders = {number: f'{home}/world{number}' for number in numbers}
        list(pool.map(world, folders.values(), folders))
        waiting = {}
        for name in names:
            out = f'{home}/{"".join(c if c.isalnum() else "_" for c in name)}'
            waiting[name] = [pool.submit(measure, name, folders[number], number, f'{out}_{number}') for number in numbers]
        print('| variant | ' + ' | '.join(HEADINGS) + ' |\n' + '|---' * (len(HEADINGS) + 1) + '|')
        for name, futures in waiting.items():
            runs = [future.result() for future in futures]
            if name == names[0]:
                print('| base | ' + ' | '.join(cell(runs, *column, 'base') for column in COLUMNS) + ' |')
            print(f'| {name} | ' + ' | '.join(cell(runs, *column) for column in COLUMNS) + ' |', flush=True)
