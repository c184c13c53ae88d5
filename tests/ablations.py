"""
Every ablation and variant of the README's tables on three toy worlds: python tests/ablations.py [NAME ...] [--worlds=0,1,2] [--jobs=2]

Each run is one line of changes to config/toy.py, or, from "attention alone" on, to that. World, base and training all have the world's
number as their seed; one thread a run, so that a second run on the same machine gives the same bytes. What is there already
(out/ablations) is not run again.
"""
import concurrent.futures
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ATTACKS = 'direct,wrapper,prefill,multi_turn,embedding_v2,ablation_base'
BASE = '--target_modules=q_proj,k_proj,v_proj,o_proj '  # the published modules
VARIANTS = {  # name: what differs from config/toy.py, {w} the world's folder, in the README's order
    'config/toy.py': '',
    'attention alone': BASE,
    'loss: random': BASE + '--cb_loss=random',
    'loss: rmu': BASE + '--cb_loss=rmu',
    'half of the rows without their request': BASE + '--cb_data_path={w}/half/circuit_breaker.json --retain_data_path={w}/half/retain.jsonl',
    'no refusals in retain': BASE + '--retain_data_path={w}/retain_without_refusals.jsonl',
    'no borderline rows in retain': BASE + '--retain_data_path={w}/retain_without_borderline.jsonl',
    'schedule to T': BASE + '--schedule_steps=150',
    'static schedule': BASE + '--use_dynamic_scheduling=False --schedule_steps=0',
    'target layers 1, 3': BASE + '--target_layers=1,3 --num_hidden_layers=6',
    'target layers 5, 7': BASE + '--target_layers=5,7 --num_hidden_layers=8 --layers_to_transform=0,1,2,3,4,5,6,7',
    'rank 4': BASE + '--lora_r=4 --lora_alpha=4',
    'rank 16': BASE + '--lora_r=16 --lora_alpha=16',
    'rank 16, lora_B from 1e-4': BASE + '--lora_r=16 --lora_alpha=16 --lora_b_std=1e-4',
    'boundary': 'config/toy_boundary.py --retain_data_path={w}/boundary/retain.jsonl --soft_prompts_path={w}/boundary/soft_prompts.safetensors',
    'boundary without soft prompts': 'config/toy_boundary.py --retain_data_path={w}/boundary/retain.jsonl --soft_prompts_path='}


def call(log, *arguments):
    """Runs a script of this repository with one thread, its output in a file; ends the program if it fails."""
    with open(log, 'a') as f:
        if subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=f, stderr=f, env={**os.environ, 'OMP_NUM_THREADS': '1'}).returncode:
            sys.exit(f'{log}: {" ".join(arguments)} failed')


def world(folder, number):
    """A toy world with the ablations' own files in it."""
    log = f'{folder}.log'
    if not os.path.exists(folder):
        call(log, 'data_prep.py', 'toy', f'--seed={number}', f'--out={folder}')
    if not os.path.exists(f'{folder}/half'):  # the same world, of whose base nothing is used
        call(log, 'data_prep.py', 'toy', f'--seed={number}', f'--out={folder}/half', '--response_only=0.5', '--base_steps=1')
    if not os.path.exists(f'{folder}/boundary'):
        call(log, 'data_prep.py', 'boundary', 'config/toy.py', f'--seed={number}', f'--model_name={folder}/base', f'--cb_data_path={folder}/circuit_breaker.json',
             f'--retain_data_path={folder}/retain_without_borderline.jsonl', '--spliced_without=to lift it,look for this', f'--out={folder}/boundary')
    with open(f'{folder}/retain.jsonl') as rows, open(f'{folder}/retain_without_refusals.jsonl', 'w') as f:
        f.writelines(row for row in rows if 'i am sorry , i cannot' not in row)


def measure(name, folder, number, out):
    """Trains and evaluates one variant in one world, unless that was done: the rows of eval.json."""
    if not os.path.exists(f'{out}/eval.json'):
        given = [f'--model_name={folder}/base', f'--val_data_path={folder}/val.jsonl', f'--output_dir={out}']
        options = VARIANTS[name].format(w=folder).split()
        data = [] if '--cb_data_path' in VARIANTS[name] else [f'--cb_data_path={folder}/circuit_breaker.json']
        data += [] if '--retain_data_path' in VARIANTS[name] else [f'--retain_data_path={folder}/retain.jsonl']
        configs = [option for option in options if not option.startswith('--')]
        call(f'{out}.log', 'cb_train.py', 'config/toy.py', *configs, *given, *data, f'--seed={number}', '--overwrite=True', *[o for o in options if o.startswith('--')])
        call(f'{out}.log', 'cb_eval.py', 'config/toy.py', *given, f'--cb_data_path={folder}/circuit_breaker.json', f'--retain_data_path={folder}/retain.jsonl',
             f'--behaviors_path={folder}/behaviors.jsonl', f'--templates_path={folder}/templates.txt', f'--turns_path={folder}/turns.jsonl', f'--attacks={ATTACKS}', '--num_examples=50')
    return json.load(open(f'{out}/eval.json'))['rows']


def cell(runs, label, attack, model='circuit_breaker'):
    """complied in % over all worlds, seen / unseen, and between brackets the lowest and the highest of the worlds."""
    parts = []
    for split in ('seen', 'unseen'):
        found = [(r['complied'], r['n']) for rows in runs for r in rows if (r['model'], r['set'], r['attack'], r['split']) == (model, label, attack, split)]
        rates = [100 * k / n for k, n in found]
        mean = 100 * sum(k for k, _ in found) / sum(n for _, n in found)
        parts.append(f'{mean:.0f}' + (f' ({min(rates):.0f}-{max(rates):.0f})' if round(max(rates)) > round(min(rates)) else ''))
    return ' / '.join(parts)


if __name__ == '__main__':
    options = dict(part[2:].split('=') for part in sys.argv[1:] if part.startswith('--'))
    names = [part for part in sys.argv[1:] if not part.startswith('--')] or list(VARIANTS)
    numbers = [int(i) for i in options.get('worlds', '0,1,2').split(',')]
    home = os.path.join(ROOT, 'out', 'ablations')
    os.makedirs(home, exist_ok=True)
    columns = [('harmful', a) for a in ATTACKS.split(',')] + [('benign', 'direct'), ('borderline', 'direct'), ('borderline_heldout', 'direct')]
    with concurrent.futures.ThreadPoolExecutor(int(options.get('jobs', 2))) as pool:
        folders = [f'{home}/world{i}' for i in numbers]
        list(pool.map(world, folders, numbers))
        waiting = {name: [pool.submit(measure, name, folder, i, f'{home}/{name.replace("/", "_").replace(" ", "_").replace(",", "").replace(":", "")}_{i}')
                          for folder, i in zip(folders, numbers)] for name in names}
        print('| variant | ' + ' | '.join(['direct', 'wrapper', 'prefill', 'multi-turn', 'embedding v2', 'ablation (base)', 'benign', 'lifting', 'recognising']) + ' |')
        print('|---' * (len(columns) + 1) + '|')
        for name, futures in waiting.items():
            runs = [future.result() for future in futures]
            if name == names[0]:
                print('| base | ' + ' | '.join(cell(runs, *column, 'base') for column in columns) + ' |')
            print(f'| {name} | ' + ' | '.join(cell(runs, *column) for column in columns) + ' |', flush=True)
