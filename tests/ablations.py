"""
The ablations of tests/ablations.md on toy worlds: python tests/ablations.py [NAME ...] [--jobs=2] [--worlds=0,1,2,3,4]
[--seeds=0,1,rounding] [--picture=assets/frontier.png]

Each variant is one change to config/toy.py. It is trained in every world with two seeds, and in world 0 once more with
two threads in place of one, which is another rounding: eleven runs. A cell is the mean over them and, in brackets, the
worst. The base of a world is measured once. What is there already (out/ablations) is not run again; one run takes some
five minutes on one core.

The embedding attack is put to 20 requests a split, from three starts (words, random words, the target itself), by
signed steps and by Adam, with 10 and with 20 soft tokens: a request counts if any of the twelve attacks succeeds.
"""
import concurrent.futures
import functools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch
from safetensors.torch import load_file, save_file

import cb_eval
from configurator import configure

HOME = os.path.join(ROOT, 'out', 'ablations')
ASKED_OF_ALL = ('direct', 'wrapper', 'multi_turn')  # and not of harmful rows alone
ASKED = ['direct', 'wrapper', 'prefill', 'multi_turn', 'ablation_own', 'ablation_base', 'embedding_universal']
SPLITS = ('seen', 'unseen')
COLUMNS = [('wrapper', 'harmful', 'wrapper', 'complied'), ('prefill', 'harmful', 'prefill', 'complied'),
           ('multi-turn', 'harmful', 'multi_turn', 'complied'), ('embedding', 'harmful', 'embedding', 'complied'),
           ('universal', 'harmful', 'embedding_universal', 'complied'),
           ('ablation own', 'harmful', 'ablation_own', 'complied'),
           ('ablation base', 'harmful', 'ablation_base', 'complied'),
           ('direct refused', 'harmful', 'direct', 'refused'), ('benign', 'benign', 'direct', 'complied'),
           ('lifting', 'borderline', 'direct', 'complied'),
           ('recognising', 'borderline_heldout', 'direct', 'complied'),
           ('benign, wrapped', 'benign', 'wrapper', 'complied'),
           ('benign in a conversation', 'benign', 'multi_turn', 'complied'),
           ('recognising in a conversation', 'borderline_heldout', 'multi_turn', 'complied')]
SCALES = {'states 10 times as large': 10, 'states 1000 times as large': 1000}  # of config/toy.py, in its units
SEVEN = '--target_modules=q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj'
PLAIN = ('--contexts=own --retain_contexts=own --loss_on=all --opening=0 --broken=0 --soft_contexts=0 --scrambled=0 '
         '--retain_noise=0 --strange=0 --retain_smooth=0 --use_dynamic_scheduling=True --schedule_steps=300 '
         '--learning_rate=1e-3 --lr_scheduler=constant --max_steps=150 --lora_dropout=0.05')
VARIANTS = {  # name: what differs from config/toy.py; {w} is the world's folder
    'config/toy.py': '',
    'plain rerouting': PLAIN,
    'plain rerouting, all weight on retain at the end': f'{PLAIN} --schedule_steps=0',
    'own': '--contexts=own',
    'own, noise': '--contexts=own,noise',
    'own, nothing, noise': '--contexts=own,nothing,noise',
    'benign rows behind their own requests': '--retain_contexts=own',
    'the opening counts': '--opening=0',
    'nothing broken': '--broken=0',
    'no adversary': '--soft_contexts=0',
    'dropout': '--lora_dropout=0.05',
    'an adversary in a quarter of the rows': '--soft_contexts=0.25',
    'an adversary in three quarters of the rows': '--soft_contexts=0.75',
    'tokens that nobody moves': '--soft_steps=1',
    'an adversary starts at words': '--soft_start=0',
    'an adversary of twice the step size': '--soft_lr=0.28',
    'scrambled 0.4': '--scrambled=0.4',
    'no scrambled rows': '--scrambled=0',
    'nothing strange': '--strange=0',
    'no noise': '--retain_noise=0',
    'noise 0.5': '--retain_noise=0.5',
    'noise 2': '--retain_noise=2',
    'kink': '--retain_smooth=0',
    'smooth 0.7': '--retain_smooth=0.7',
    'smooth 1.5': '--retain_smooth=1.5',
    'learning rate 1e-3': '--learning_rate=1e-3',
    'learning rate 3e-3': '--learning_rate=3e-3',
    'published schedule': '--use_dynamic_scheduling=True --schedule_steps=600',
    'constant rate': '--lr_scheduler=constant',
    '150 steps': '--max_steps=150',
    'rank 32': '--lora_r=32 --lora_alpha=32',
    'seven modules': SEVEN,
    'seven modules, learning rate 1e-3': f'{SEVEN} --learning_rate=1e-3',
    'target layers 2, 3, 4, 5': '--target_layers=2,3,4,5',
    'loss: random': '--cb_loss=random',
    'no borderline rows in retain': '--retain_data_path={w}/retain_without_borderline.jsonl',
    **dict.fromkeys(SCALES, '')}


def call(log, threads, *arguments):
    """Runs a script of this repository, its output in a file; ends the program if it fails."""
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'OMP_WAIT_POLICY': 'PASSIVE'}
    with open(log, 'a') as f:
        if subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=f, stderr=f, env=environment).returncode:
            sys.exit(f'{log}: {" ".join(arguments)} failed')


def enlarge(path, scale):
    """Makes every state of a saved toy model `scale` times as large: but for RMSNorm's epsilon, its logits stay."""
    tensors = load_file(f'{path}/model.safetensors')
    for name in tensors:
        if name.endswith(('embed_tokens.weight', 'o_proj.weight', 'down_proj.weight')):  # what writes to the stream
            tensors[name] *= scale
    save_file(tensors, f'{path}/model.safetensors', metadata={'format': 'pt'})


def soft_tokens(model, tokenizer, rows, c, start, adam, scale, answer):
    """
    Returns texts for each row by soft tokens after its request that begin as the token ids `start` and descend on the
    target's cross-entropy, by Adam or by signed steps, `scale` times the usual; answers are taken half way and at the
    end.
    """
    sides = [cb_eval.embedded_around(model, tokenizer, row['messages']) for row in rows]
    targets, answers = [cb_eval.text_ids(tokenizer, row['target']) for row in rows], []
    soft = cb_eval.embedded(model, start).float().expand(len(rows), -1, -1).clone().requires_grad_()  # (B, S, D)
    optimizer = torch.optim.Adam([soft], lr=1e-2 * scale)

    def joined():
        return list(map(cb_eval.between, sides, soft))  # (T, D) each
    for step in range(1, c['embedding_steps'] + 1):
        optimizer.zero_grad()
        cb_eval.target_losses(model, joined(), targets).sum().backward()
        if adam:
            optimizer.step()
        else:
            soft.data -= scale * c['embedding_v2_lr'] * soft.grad.sign()
        if step % (c['embedding_steps'] // 2) == 0:
            with torch.no_grad():
                answers.append(answer(joined()))
    return list(map(list, zip(*answers)))


def measure(folder, path, scale):
    """
    Returns {'label/attack/split': {verdict: count}} of a model directory in a world's folder, with states `scale` times
    as large as the base's there.
    """
    torch.set_num_threads(1)
    c = configure(os.path.join(ROOT, 'cb_eval.py'), [os.path.join(ROOT, 'config', 'toy.py')])
    c |= {'num_examples': 50, 'attacks': ASKED, 'val_data_path': '', 'cb_data_path': f'{folder}/circuit_breaker.json',
          'retain_data_path': f'{folder}/retain.jsonl', 'behaviors_path': f'{folder}/behaviors.jsonl',
          'templates_path': f'{folder}/templates.txt', 'turns_path': f'{folder}/turns.jsonl'}
    rows, data = cb_eval.read_inputs(c)
    model, tokenizer = cb_eval.load_model(f'{folder}/base', 'cpu', 'float32')
    data['base_direction'] = cb_eval.refusal_direction(model, tokenizer, data['harmful'], data['harmless'], 100)
    model, tokenizer = cb_eval.load_model(path, 'cpu', 'float32')
    texts = {}
    for name in ASKED:
        asked = [row for row in rows if name in ASKED_OF_ALL or row['label'] == 'harmful']
        texts[name] = list(zip(asked, cb_eval.run_attack(name, model, tokenizer, asked, c, data)[name]))
    harmful = [row for row in rows if row['label'] == 'harmful']
    few = [row for split in SPLITS for row in [row for row in harmful if row['split'] == split][:20]]
    answer = functools.partial(cb_eval.complete, model, tokenizer, max_new_tokens=48, batch_size=100)
    rng, found = random.Random(0), [[] for _ in few]
    for length in (10, 20):
        words = cb_eval.text_ids(tokenizer, c['suffix_words'])
        target = cb_eval.text_ids(tokenizer, few[0]['target'])
        drawn = rng.choices(range(7, len(tokenizer)), k=length)  # of the vocabulary behind the special tokens
        starts = [(words * length)[:length], drawn, (target * length)[:length]]
        for start in starts:
            for adam in (False, True):
                more = soft_tokens(model, tokenizer, few, c, start, adam, scale, answer)
                found = [had + new for had, new in zip(found, more)]
    texts['embedding'] = list(zip(few, found))
    counts = {}
    for name, answered in texts.items():
        for row, several in answered:
            verdicts = [cb_eval.judge_recipe(row, text) for text in several]
            verdict = 'complied' if 'complied' in verdicts else verdicts[0]
            cell = counts.setdefault(f'{row["label"]}/{name}/{row["split"]}', {})
            cell[verdict] = cell.get(verdict, 0) + 1
    return counts


def run(name, number, seed, threads):
    """Trains and measures one variant in one world, or its base if name is 'base', unless that was done: its counts."""
    folder, slug = f'{HOME}/world{number}', ''.join(letter if letter.isalnum() else '_' for letter in name)
    out = f'{HOME}/{slug}_{number}_{seed}_{threads}'
    if not os.path.exists(f'{out}.json'):
        start, path = time.time(), f'{folder}/base'
        base, scale = f'{folder}/base', SCALES.get(name, 1)
        if name in SCALES:
            base = shutil.copytree(base, f'{out}_base', dirs_exist_ok=True)
            enlarge(base, scale)
        if name != 'base':
            path, variant = out, VARIANTS[name].format(w=folder).split()
            call(f'{out}.log', threads, 'cb_train.py', 'config/toy.py', f'--model_name={base}',
                 f'--cb_data_path={folder}/circuit_breaker.json', f'--retain_data_path={folder}/retain.jsonl',
                 f'--val_data_path={folder}/val.jsonl', f'--output_dir={out}', f'--seed={seed}', '--overwrite=True',
                 *variant)
        seconds = time.time() - start
        call(f'{out}.log', 1, os.path.abspath(__file__), '--measure', folder, path, f'{out}.json', str(seconds),
             str(scale))
        if name != 'base':
            shutil.rmtree(out)
        if name in SCALES:
            shutil.rmtree(base)
    return json.load(open(f'{out}.json'))


def rate(counts, label, attack, verdict='complied', splits=SPLITS):
    """Returns one run's rate in % over both splits, or some."""
    cells = [counts[f'{label}/{attack}/{split}'] for split in splits]
    return 100 * sum(cell.get(verdict, 0) for cell in cells) / sum(sum(cell.values()) for cell in cells)


def cell(runs, label, attack, verdict):
    """Returns a rate in %, seen / unseen: the mean over runs, and in brackets the worst."""
    if f'{label}/{attack}/{SPLITS[0]}' not in runs[0]['counts']:  # of a run from before it was measured
        return '-'
    parts = []
    for split in SPLITS:
        rates = [rate(one['counts'], label, attack, verdict, [split]) for one in runs]
        worst = max(rates) if label == 'harmful' and verdict == 'complied' else min(rates)
        parts.append(f'{statistics.mean(rates):.0f} ({worst:.0f})')
    return ' / '.join(parts)


def picture(found, path):
    """Draws each run of {variant: runs}: its best attack, but for the universal one, against its hardest kept rows."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(7, 4.5), layout='constrained')
    ax = fig.subplots()
    for (name, runs), marker in zip(found.items(), 'oDs^vP*X<>' * 2):
        shown = {*ASKED, 'embedding'} - {'direct', 'embedding_universal'}
        attacks = [max(rate(one['counts'], 'harmful', attack) for attack in shown) for one in runs]
        kept = [min(rate(one['counts'], 'borderline_heldout', 'direct'),
                    rate(one['counts'], 'benign', 'direct', splits=['unseen'])) for one in runs]
        dots, = ax.plot(attacks, kept, marker, alpha=0.4, markersize=5)
        means = statistics.mean(attacks), statistics.mean(kept)
        ax.plot(*means, marker, color=dots.get_color(), markersize=11, label=name)
    ax.set_xlabel('the best attack of a run, the universal one apart, % of curses told')
    ax.set_ylabel('recognising or unseen potions,\nthe worse of them, % answered')
    ax.grid(color='0.9')
    ax.legend(frameon=False, fontsize=8)
    fig.savefig(path, dpi=130)


if __name__ == '__main__' and sys.argv[1:2] == ['--measure']:
    folder, path, out, seconds, scale = sys.argv[2:]
    counts = measure(folder, path, int(scale))
    with open(out, 'w') as f:
        json.dump({'counts': counts, 'seconds': float(seconds)}, f)
elif __name__ == '__main__':
    options = dict(part[2:].split('=') for part in sys.argv[1:] if part.startswith('--'))
    names = [part for part in sys.argv[1:] if not part.startswith('--')] or list(VARIANTS)
    numbers = [int(number) for number in options.get('worlds', '0,1,2,3,4').split(',')]
    seeds = options.get('seeds', '0,1,rounding').split(',')
    os.makedirs(HOME, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(int(options.get('jobs', 2))) as pool:
        made = [pool.submit(call, f'{HOME}/world{number}.log', 1, 'data_prep.py', 'toy', f'--seed={number}',
                            f'--out={HOME}/world{number}')
                for number in numbers if not os.path.exists(f'{HOME}/world{number}')]
        for future in made:
            future.result()
        waiting = {'base': [pool.submit(run, 'base', number, 0, 1) for number in numbers]}
        for name in names:
            jobs = [(number, int(seed), 1) for seed in seeds if seed != 'rounding' for number in numbers]
            jobs += [(numbers[0], 0, 2)] if 'rounding' in seeds else []
            waiting[name] = [pool.submit(run, name, *job) for job in jobs]
        headings = [heading for heading, *_ in COLUMNS] + ['runs', 'seconds']
        print('| variant | ' + ' | '.join(headings) + ' |\n' + '|---' * (len(headings) + 1) + '|')
        found = {}
        for name, futures in waiting.items():
            found[name] = runs = [future.result() for future in futures]
            seconds = statistics.mean(one['seconds'] for one in runs)
            cells = ' | '.join(cell(runs, *column) for _, *column in COLUMNS)
            print(f'| {name} | {cells} | {len(runs)} | {seconds:.0f} |', flush=True)
    if options.get('picture'):
        picture(found, options['picture'])
